//! vCPUs.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_ARM_WRITABLE_IMP_ID_REGS, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_STOPPED, kvm_enable_cap, kvm_mp_state,
    kvm_vcpu_events, kvm_vcpu_init,
};
use kvm_ioctls::Kvm;
use triarch_hypervisor::{Firmware, FirmwareStateV1, HypervisorError, Vcpu, Vm};

use super::{CpuPlanStateV1, EventsV1, RunV1, VcpuStateV1, registers, time};
use crate::aarch64::cpu::{CpuPlan, Features, create_all};
use crate::aarch64::psci::{self, Psci};
use crate::aarch64::{Platform, processor};
use crate::common::state::check_firmware;
use crate::starts::Starts;
use crate::{CpuCount, StateError, Vcpus};

/// KVM_MP_STATE_SUSPENDED.
const SUSPENDED: u32 = 10;

const RUN: [(RunV1, u32); 3] = [
    (RunV1::Running, KVM_MP_STATE_RUNNABLE),
    (RunV1::Stopped, KVM_MP_STATE_STOPPED),
    (RunV1::Suspended, SUSPENDED),
];

impl CpuPlan {
    /// What it takes to make the same processors on another host.
    pub fn save(&self) -> CpuPlanStateV1 {
        let Features { sve, pauth, pmu } = self.features;
        CpuPlanStateV1 {
            boot: self.count.boot,
            now: self.count.now,
            max: self.count.max,
            topology: self.topology,
            address_bits: self.address_bits,
            sve,
            pauth,
            pmu,
        }
    }

    /// Plans the processors of a guest that was saved. That this host's CPU has all of theirs is checked register by register when they
    /// are made; everything at once, and before, by [`check_processor`](crate::check_processor).
    pub fn restore(kvm: &Kvm, saved: &CpuPlanStateV1) -> Result<Self, StateError> {
        let CpuPlanStateV1 { boot, now, max, .. } = *saved;
        if boot == 0 || now == 0 || boot > max || now > max || max > u32::from(u16::MAX) {
            let problem = format!("{now} vCPUs of {max} at most");
            return Err(StateError::damaged("the processors", problem));
        }
        let mut plan = Self::new(kvm, CpuCount { boot, now, max }, Some(saved.topology))?;
        let lacks = |what: String| Err(StateError::Lacks { what });
        let here = plan.features;
        for (had, has, what) in [
            (saved.sve, here.sve, "scalable vectors (SVE)"),
            (saved.pauth, here.pauth, "pointer authentication"),
            (saved.pmu, here.pmu, "performance monitors"),
        ] {
            if had && !has {
                return lacks(what.to_owned());
            }
        }
        if plan.address_bits < saved.address_bits {
            let (needed, here) = (saved.address_bits, plan.address_bits);
            return lacks(format!("addresses of {needed} bits instead of {here}"));
        }
        plan.limit_address_bits(saved.address_bits);
        plan.features = Features {
            sve: saved.sve,
            pauth: saved.pauth,
            pmu: saved.pmu,
        };
        Ok(plan)
    }
}

/// Makes all vCPUs that a guest which was saved may ever have, with their registers, and starts the GIC.
pub fn recreate_vcpus(
    vm: &Vm,
    plan: &CpuPlan,
    platform: &Platform,
    saved: &[VcpuStateV1],
    firmware: &FirmwareStateV1,
) -> Result<Vcpus, StateError> {
    check_firmware(saved.len(), firmware, plan.count.max)?;
    let forwarded = matches!(firmware, FirmwareStateV1::Psci(_));
    if forwarded && !psci::forward(vm)? {
        let what = "PSCI calls that KVM forwards (Linux 6.4)".to_owned();
        return Err(StateError::Lacks { what });
    }
    let capability = KVM_CAP_ARM_WRITABLE_IMP_ID_REGS;
    if vm.fd().check_extension_raw(capability.into()) > 0 {
        // What the CPU is called can be set, too.
        let enable = kvm_enable_cap {
            cap: capability,
            ..Default::default()
        };
        vm.fd()
            .enable_cap(&enable)
            .map_err(HypervisorError::kvm("let a vCPU have another name"))?;
    }
    let lengths = saved
        .first()
        .and_then(|vcpu| registers::vector_lengths(&vcpu.registers));
    let (target, mut running) = create_all(vm, plan, platform, lengths, |index| {
        index > 0 && (forwarded || (index as usize) < saved.len())
    })?;
    let parked = running.split_off(saved.len());
    for (vcpu, state) in running.iter().zip(saved) {
        restore_vcpu(vcpu, plan, state)?;
    }
    let first = running
        .first()
        .ok_or(HypervisorError::Capability("a vCPU to start with"))?;
    let firmware: Arc<dyn Firmware> = match firmware {
        FirmwareStateV1::Psci(all) => {
            let all = (0..).map(|index| plan.hardware_id(index)).zip(all.iter().copied());
            Arc::new(Psci::restored(all, plan.init(&target, true)))
        }
        FirmwareStateV1::StartedByKvm(all) => Arc::new(Starts::restored(all, KVM_MP_STATE_STOPPED)),
    };
    Ok(Vcpus {
        processor: processor::of_vcpu(first, plan, plan.init(&target, false).features[0]),
        running,
        parked,
        firmware,
    })
}

/// Features that vCPUs of `plan` are made with.
fn features(plan: &CpuPlan) -> u32 {
    plan.init(&kvm_vcpu_init::default(), false).features[0]
}

/// Reads all of a vCPU, which must not run; on its own thread, if it has one.
pub fn save_vcpu(vcpu: &Vcpu, plan: &CpuPlan) -> Result<VcpuStateV1, StateError> {
    let run = vcpu
        .fd()
        .get_mp_state()
        .map_err(HypervisorError::kvm("read a vCPU's state"))?;
    let known = RUN.iter().find(|(_, theirs)| *theirs == run.mp_state);
    let (run, _) = known.ok_or_else(|| StateError::Unknown {
        what: format!("a vCPU in the state {}", run.mp_state),
    })?;
    let events = vcpu
        .fd()
        .get_vcpu_events()
        .map_err(HypervisorError::kvm("read events"))?;
    let ids = registers::list(vcpu)?;
    Ok(VcpuStateV1 {
        features: features(plan),
        registers: registers::save(vcpu, &ids)?,
        run: *run,
        events: EventsV1 {
            serror_pending: events.exception.serror_pending != 0,
            serror_syndrome: (events.exception.serror_has_esr != 0).then_some(events.exception.serror_esr),
        },
        counters: time::save(vcpu, ids.contains(&time::PHYSICAL))?,
    })
}

/// Sets all of a vCPU that has not run yet, but its time: see [`restore_time`](super::restore_time).
pub fn restore_vcpu(vcpu: &Vcpu, plan: &CpuPlan, state: &VcpuStateV1) -> Result<(), StateError> {
    let here = features(plan);
    if here != state.features {
        let problem = format!(
            "it was made with features {:#x}, the guest's others with {here:#x}",
            state.features
        );
        return Err(StateError::damaged("a vCPU", problem));
    }
    registers::restore(vcpu, &state.registers)?;
    let EventsV1 {
        serror_pending,
        serror_syndrome,
    } = state.events;
    let mut events = kvm_vcpu_events::default();
    events.exception.serror_pending = serror_pending.into();
    events.exception.serror_has_esr = (serror_pending && serror_syndrome.is_some()).into();
    events.exception.serror_esr = serror_syndrome.filter(|_| serror_pending).unwrap_or(0);
    if serror_pending {
        vcpu.fd()
            .set_vcpu_events(&events)
            .map_err(HypervisorError::kvm("set events"))?;
    }
    let mp_state = RUN
        .iter()
        .find(|(ours, _)| *ours == state.run)
        .map_or(KVM_MP_STATE_RUNNABLE, |(_, theirs)| *theirs);
    vcpu.fd()
        .set_mp_state(kvm_mp_state { mp_state })
        .map_err(HypervisorError::kvm("set a vCPU's state"))?;
    Ok(())
}
