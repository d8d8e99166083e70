//! The interrupt controller in the kernel (Linux, Documentation/virt/kvm/devices/arm-vgic-v3.rst and arm-vgic-its.rst).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
    KVM_IRQ_ROUTING_IRQCHIP, KVM_VGIC_ITS_ADDR_TYPE, KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_irq_routing_entry,
};
use kvm_ioctls::DeviceFd;
use triarch_hypervisor::{HypervisorError, Interrupts, Vm};

use super::layout;
use crate::NmiError;

/// Interrupt numbers the GIC has: private ones and [`WIRED`].
pub(super) const INTERRUPTS: u32 = layout::interrupt::FIRST_SHARED + WIRED;
/// Wired interrupts, the GSIs from 0 on.
const WIRED: u32 = 64;

/// The VM's interrupt controller. It works once the vCPUs are made, which is when KVM knows how many there are.
pub struct Platform {
    /// Wired and message-signalled interrupts of the VM.
    pub interrupts: Arc<Interrupts>,
    pub(super) gic: DeviceFd,
    pub(super) its: DeviceFd,
    /// How many there are.
    redistributors: AtomicU32,
}

impl Platform {
    /// Makes the GIC and its ITS for `vm`, which must not have vCPUs yet.
    pub fn new(vm: &Vm) -> Result<Self, HypervisorError> {
        let gic = create(vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, "create a GICv3")?;
        let its = create(vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, "create an ITS")?;
        let place = |device: &DeviceFd, kind: u32, at: u64| {
            set(device, KVM_DEV_ARM_VGIC_GRP_ADDR, kind, Some(&at)).map_err(HypervisorError::kvm("place the GIC"))
        };
        set(&gic, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, Some(&INTERRUPTS)).map_err(HypervisorError::kvm("size the GIC"))?;
        place(&gic, KVM_VGIC_V3_ADDR_TYPE_DIST, layout::GIC_DISTRIBUTOR)?;
        place(&its, KVM_VGIC_ITS_ADDR_TYPE, layout::GIC_ITS)?;
        let routed = Interrupts::new(vm.fd().clone(), wired_routes(), true);
        let failed = |source| HypervisorError::Kvm {
            what: "route interrupts",
            source,
        };
        Ok(Self {
            interrupts: routed.map_err(failed)?,
            gic,
            its,
            redistributors: AtomicU32::new(0),
        })
    }

    /// Gives each of `vcpus` its redistributor. Before the vCPUs are made.
    pub(super) fn place_redistributors(&self, vcpus: u32) -> Result<(), HypervisorError> {
        // Number of redistributors from bit 52 on, address, no flags, index of the region 0.
        let region = u64::from(vcpus) << 52 | layout::GIC_REDISTRIBUTORS;
        let kind = KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION;
        set(&self.gic, KVM_DEV_ARM_VGIC_GRP_ADDR, kind, Some(&region))
            .map_err(HypervisorError::kvm("place the GIC's redistributors"))?;
        self.redistributors.store(vcpus, Ordering::Relaxed);
        Ok(())
    }

    /// How many vCPUs there are.
    pub(super) fn redistributors(&self) -> u32 {
        self.redistributors.load(Ordering::Relaxed)
    }

    /// Starts the controller, when all vCPUs that will ever be are there.
    pub(super) fn start(&self) -> Result<(), HypervisorError> {
        for (device, what) in [(&self.gic, "start the GIC"), (&self.its, "start the ITS")] {
            set::<u64>(device, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, None)
                .map_err(HypervisorError::kvm(what))?;
        }
        Ok(())
    }
}

fn create(vm: &Vm, kind: u32, what: &'static str) -> Result<DeviceFd, HypervisorError> {
    let mut device = kvm_create_device {
        type_: kind,
        ..Default::default()
    };
    vm.fd().create_device(&mut device).map_err(|error| match error.errno() {
        libc::ENODEV | libc::ENXIO => {
            HypervisorError::Capability("a GICv3 with ITS; the host's own GIC must be a GICv3")
        }
        _ => HypervisorError::kvm(what)(error),
    })
}

/// Sets an attribute; the kernel reads the value while it is borrowed.
fn set<T>(device: &DeviceFd, group: u32, attr: u32, value: Option<&T>) -> Result<(), kvm_ioctls::Error> {
    device.set_device_attr(&kvm_device_attr {
        flags: 0,
        group,
        attr: u64::from(attr),
        addr: value.map_or(0, |value| std::ptr::from_ref(value) as u64),
    })
}

/// GSI n is the shared interrupt n, number 32 + n of the GIC.
fn wired_routes() -> Vec<kvm_irq_routing_entry> {
    let entry = |pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi: pin,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip.irqchip = 0;
        entry.u.irqchip.pin = pin;
        entry
    };
    (0..WIRED).map(entry).collect()
}

/// Stock kernels take no interrupt here that they cannot mask: there is nothing to send.
pub fn inject_nmi(_vm: &Vm) -> Result<(), NmiError> {
    Err(NmiError::Unsupported)
}
