//! What a VM needs before its vCPUs: interrupt controllers in the kernel and KVM's own pages.

use std::sync::Arc;

use kvm_bindings::{KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, kvm_irq_routing_entry, kvm_msi};
use triarch_hypervisor::{HypervisorError, Interrupts, Vm};

use super::layout;
use crate::NmiError;

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

/// Interrupts every vCPU that runs with an NMI: a message to all of them, so that no vCPU has to be stopped for it.
pub fn inject_nmi(vm: &Vm) -> Result<(), NmiError> {
    /// Messages with this address go to all local APICs (Intel SDM volume 3, 11.11.1).
    const BROADCAST: u32 = 0xfee0_0000 | 0xff << 12;
    /// Delivery mode of their data (11.11.2).
    const NMI: u32 = 0b100 << 8;
    let message = kvm_msi {
        address_lo: BROADCAST,
        data: NMI,
        ..Default::default()
    };
    let delivered = vm.fd().signal_msi(message);
    delivered.map(drop).map_err(|error| NmiError::Kvm(error.into()))
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
