//! Interrupt controllers.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_ioapic_state,
    kvm_ioapic_state__bindgen_ty_1, kvm_irqchip, kvm_irqchip__bindgen_ty_1, kvm_pic_state,
};
use triarch_hypervisor::{HypervisorError, Vm};

use super::{IoApicV1, PicV1, PlatformStateV1, time};
use crate::StateError;
use crate::x86_64::Platform;

const PICS: [u32; 2] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE];

impl Platform {
    /// Reads what of the VM is outside of its vCPUs, which must not run any more. Guest memory stays as it is.
    pub fn save(&self, vm: &Vm) -> Result<PlatformStateV1, StateError> {
        let [master, slave] = PICS.map(|chip| pic(vm, chip));
        Ok(PlatformStateV1 {
            io_apic: io_apic(vm)?,
            pics: [master?, slave?],
            clock: time::clock(vm)?,
        })
    }

    /// Sets it, after the vCPUs' registers: an interrupt that waits in the I/O APIC goes on to them. The clock is
    /// [`restore_time`](crate::restore_time)'s.
    pub fn restore(&self, vm: &Vm, state: &PlatformStateV1) -> Result<(), StateError> {
        for (chip_id, pic) in PICS.into_iter().zip(&state.pics) {
            set(vm, chip_id, kvm_irqchip__bindgen_ty_1 { pic: pic.into() })?;
        }
        let saved = &state.io_apic;
        let ioapic = kvm_ioapic_state {
            base_address: saved.base,
            ioregsel: saved.select,
            id: saved.id,
            irr: saved.pending,
            pad: 0,
            redirtbl: saved.redirections.map(|bits| kvm_ioapic_state__bindgen_ty_1 { bits }),
        };
        set(vm, KVM_IRQCHIP_IOAPIC, kvm_irqchip__bindgen_ty_1 { ioapic })
    }
}

fn get(vm: &Vm, chip_id: u32) -> Result<kvm_irqchip, HypervisorError> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    vm.fd()
        .get_irqchip(&mut chip)
        .map_err(HypervisorError::kvm("read an interrupt controller"))?;
    Ok(chip)
}

fn set(vm: &Vm, chip_id: u32, chip: kvm_irqchip__bindgen_ty_1) -> Result<(), StateError> {
    let chip = kvm_irqchip { chip_id, pad: 0, chip };
    vm.fd()
        .set_irqchip(&chip)
        .map_err(|error| StateError::damaged("an interrupt controller", format!("KVM refuses it ({error})")))
}

fn pic(vm: &Vm, chip: u32) -> Result<PicV1, HypervisorError> {
    let chip = get(vm, chip)?;
    // SAFETY: KVM fills in this variant of the union for these chips, and every one is plain numbers.
    let pic: kvm_pic_state = unsafe { chip.chip.pic };
    Ok((&pic).into())
}

fn io_apic(vm: &Vm) -> Result<IoApicV1, HypervisorError> {
    let chip = get(vm, KVM_IRQCHIP_IOAPIC)?;
    // SAFETY: KVM fills in this variant of the union for this chip, and every one is plain numbers.
    let state: kvm_ioapic_state = unsafe { chip.chip.ioapic };
    Ok(IoApicV1 {
        base: state.base_address,
        select: state.ioregsel,
        id: state.id,
        pending: state.irr,
        // SAFETY: an entry and its fields are the same 64 bits.
        redirections: state.redirtbl.map(|entry| unsafe { entry.bits }),
    })
}
