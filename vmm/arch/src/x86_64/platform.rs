//! What a VM needs before its vCPUs: interrupt controllers in the kernel and KVM's own pages.

use std::sync::Arc;

use kvm_bindings::{KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, kvm_irq_routing_entry};
use triarch_hypervisor::{HypervisorError, Interrupts, Vm};

use super::layout;

/// Pins of the I/O APIC.
const IO_APIC_PINS: u32 = 24;

/// The VM's interrupt controllers.
pub struct Platform {
    /// Wired and message-signalled interrupts of the VM.
    pub interrupts: Arc<Interrupts>,
}

impl Platform {
    /// Sets up `vm`, which must not have vCPUs yet.
    pub fn new(vm: &Vm) -> Result<Self, HypervisorError> {
        let fd = vm.fd();
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(HypervisorError::kvm("place its identity map"))?;
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(HypervisorError::kvm("place its task state"))?;
        fd.create_irq_chip()
            .map_err(HypervisorError::kvm("create interrupt controllers"))?;
        let routed = Interrupts::new(fd.clone(), wired_routes(), false);
        let failed = |source| HypervisorError::Kvm {
            what: "route interrupts",
            source,
        };
        Ok(Self {
            interrupts: routed.map_err(failed)?,
        })
    }
}

/// GSI n is pin n of the I/O APIC, and nothing reaches the PICs: a hardware-reduced ACPI guest neither programs nor masks them, so an
/// interrupt through them would come with a vector nobody set.
fn wired_routes() -> Vec<kvm_irq_routing_entry> {
    let entry = |pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi: pin,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
        entry.u.irqchip.pin = pin;
        entry
    };
    (0..IO_APIC_PINS).map(entry).collect()
}
