//! The interrupt controller as a whole.

use kvm_bindings::{KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES};
use triarch_hypervisor::Vm;

use super::attribute::Group;
use super::{ClockV1, PlatformStateV1, gic, its, time};
use crate::StateError;
use crate::aarch64::Platform;
use crate::aarch64::processor::counter_hz;
use crate::common::state::now_ns;

impl Platform {
    /// Reads what of the VM is outside of its vCPUs, which must not run any more, and has KVM write what of it is in guest memory: save
    /// that after this.
    pub fn save(&self, _vm: &Vm) -> Result<PlatformStateV1, StateError> {
        let pending = Group {
            device: &self.gic,
            number: KVM_DEV_ARM_VGIC_GRP_CTRL,
            what: "write the GIC's tables of pending interrupts",
        };
        pending.command(KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES)?;
        let its = its::save(&self.its)?;
        let cpus = (0..self.redistributors()).map(|index| gic::save_cpu(&self.gic, index));
        Ok(PlatformStateV1 {
            distributor: gic::save_distributor(&self.gic)?,
            cpus: cpus.collect::<Result<_, _>>()?,
            its,
            clock: ClockV1 {
                counter_hz: counter_hz(),
                host_ns: now_ns(),
            },
        })
    }

    /// Sets it, after the vCPUs' registers and when guest memory is as it was saved. Interrupts of devices that come before are lost.
    pub fn restore(&self, _vm: &Vm, state: &PlatformStateV1) -> Result<(), StateError> {
        time::check_frequency(&state.clock)?;
        let vcpus = self.redistributors();
        if state.cpus.len() != vcpus as usize {
            return Err(StateError::Count {
                found: state.cpus.len(),
                expected: format!("the interrupt controller has {vcpus}"),
            });
        }
        gic::restore_distributor(&self.gic, &state.distributor)?;
        for (index, cpu) in (0..vcpus).zip(&state.cpus) {
            gic::restore_cpu(&self.gic, index, cpu)?;
        }
        its::restore(&self.its, &state.its)
    }
}
