//! What a VM needs before its vCPUs: interrupt controllers in the kernel and KVM's own pages.

use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irq_routing_entry,
};
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
        Ok(Self {
            interrupts: Interrupts::new(fd.clone(), wired_routes(), false),
        })
    }
}

/// The kernel's own default: GSI n is pin n of the I/O APIC and, for the first 16, also of the PICs.
fn wired_routes() -> Vec<kvm_irq_routing_entry> {
    let entry = |gsi, irqchip, pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip.irqchip = irqchip;
        entry.u.irqchip.pin = pin;
        entry
    };
    let pics = (0..16).map(|gsi| match gsi {
        0..8 => entry(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
        _ => entry(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
    });
    let io_apic = (0..IO_APIC_PINS).map(|gsi| entry(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    pics.chain(io_apic).collect()
}
