//! vCPUs.

use std::sync::Arc;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_UNINITIALIZED, kvm_mp_state, kvm_xcr, kvm_xcrs};
use kvm_ioctls::Kvm;
use triarch_cpu_model::CpuidTable;
use triarch_hypervisor::{FirmwareStateV1, HypervisorError, Vcpu, Vm};

use super::{CpuPlanStateV1, EventsV1, NumberedV1, RunV1, VcpuStateV1, msr, nested, time, xsave};
use crate::common::state::check_firmware;
use crate::starts::Starts;
use crate::x86_64::cpu::{self, CpuPlan};
use crate::x86_64::{Platform, processor};
use crate::{CpuCount, StateError, Vcpus};

/// Registers of a local APIC, 16 bytes from one another.
const APIC_REGISTERS: usize = 64;
const APIC_STEP: usize = 16;
/// Extended control registers KVM has room for.
const MAX_XCRS: usize = 16;

impl CpuPlan {
    /// What it takes to make the same processors on another host.
    pub fn save(&self) -> CpuPlanStateV1 {
        CpuPlanStateV1 {
            boot: self.boot,
            max: self.max,
            topology: self.topology,
            cpuid: self.host.clone(),
            tsc_deadline: self.tsc_deadline,
        }
    }

    /// Plans the processors of a guest that was saved. That this host's CPU has all of theirs is not checked here, but by
    /// [`check_processor`](crate::check_processor).
    pub fn restore(kvm: &Kvm, saved: &CpuPlanStateV1) -> Result<Self, StateError> {
        let CpuPlanStateV1 { boot, max, .. } = *saved;
        if boot == 0 || boot > max || max > u32::from(u16::MAX) {
            let problem = format!("{boot} vCPUs of {max} at most");
            return Err(StateError::damaged("the processors", problem));
        }
        let count = CpuCount { boot, now: boot, max };
        let mut plan = Self::new(kvm, count, Some(saved.topology))?;
        if saved.tsc_deadline && !plan.tsc_deadline {
            let what = "a local APIC with the TSC deadline timer".to_owned();
            return Err(StateError::Lacks { what });
        }
        let (here, needed) = (plan.host.physical_address_bits(), saved.cpuid.physical_address_bits());
        if here < needed {
            let what = format!("addresses of {needed} bits instead of {here}");
            return Err(StateError::Lacks { what });
        }
        plan.host = saved.cpuid.clone();
        plan.tsc_deadline = saved.tsc_deadline;
        Ok(plan)
    }
}

/// Makes the vCPUs of a guest that was saved, with their registers. Others can be made at any time.
pub fn recreate_vcpus(
    vm: &Vm,
    plan: &CpuPlan,
    _platform: &Platform,
    saved: &[VcpuStateV1],
    firmware: &FirmwareStateV1,
) -> Result<Vcpus, StateError> {
    check_firmware(saved.len(), firmware, plan.max)?;
    let FirmwareStateV1::StartedByKvm(starts) = firmware else {
        return Err(StateError::damaged(
            "the processors",
            "they are started as those of ARM are",
        ));
    };
    let make = |(index, state)| {
        let vcpu = cpu::create_vcpu(vm, plan, index)?;
        restore_vcpu(&vcpu, plan, state)?;
        Ok(vcpu)
    };
    let running = (0u32..).zip(saved).map(make).collect::<Result<Vec<_>, StateError>>()?;
    let first = running
        .first()
        .ok_or(HypervisorError::Capability("a vCPU to start with"))?;
    Ok(Vcpus {
        processor: processor::of_vcpu(first, plan.cpuid(0), &plan.feature_msrs),
        running,
        parked: Vec::new(),
        firmware: Arc::new(Starts::restored(starts, KVM_MP_STATE_UNINITIALIZED)),
    })
}

/// Reads all of a vCPU, which must not run; on its own thread, if it has one.
pub fn save_vcpu(vcpu: &Vcpu, plan: &CpuPlan) -> Result<VcpuStateV1, StateError> {
    let fd = vcpu.fd();
    // KVM may still have to bring the others to what this says, so it comes first.
    let run = fd.get_mp_state().map_err(HypervisorError::kvm("read a vCPU's state"))?;
    let run = RunV1::from_kvm(run.mp_state).ok_or_else(|| StateError::Unknown {
        what: format!("a vCPU in the state {}", run.mp_state),
    })?;
    let events = fd.get_vcpu_events().map_err(HypervisorError::kvm("read events"))?;
    let read = "read registers";
    let cpuid = fd
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(HypervisorError::kvm("read CPUID"))?;
    let xcrs = match fd.get_xcrs() {
        Ok(xcrs) => numbered(&xcrs),
        // A CPU without XSAVE.
        Err(error) if error.errno() == libc::EINVAL => Vec::new(),
        Err(error) => return Err(HypervisorError::kvm(read)(error).into()),
    };
    let apic = fd.get_lapic().map_err(HypervisorError::kvm("read a local APIC"))?;
    let special = fd.get_sregs().map_err(HypervisorError::kvm(read))?;
    if plan.can_nest {
        nested::check(vcpu, special.efer)?;
    }
    Ok(VcpuStateV1 {
        cpuid: cpuid.as_slice().iter().map(cpu::from_kvm).collect(),
        general: (&fd.get_regs().map_err(HypervisorError::kvm(read))?).into(),
        special: (&special).into(),
        debug: (&fd.get_debug_regs().map_err(HypervisorError::kvm(read))?).into(),
        xsave: xsave::save(vcpu, plan.xsave_size)?,
        xcrs,
        msrs: msr::save(vcpu, &plan.saved_msrs)?,
        local_apic: apic_registers(&apic.regs),
        run,
        events: EventsV1::from(&events),
        tsc: time::tsc(vcpu)?,
    })
}

/// Sets all of a vCPU that has not run yet, but its time: see [`restore_time`](super::restore_time).
pub fn restore_vcpu(vcpu: &Vcpu, plan: &CpuPlan, state: &VcpuStateV1) -> Result<(), StateError> {
    let fd = vcpu.fd();
    let set = "set registers";
    let apic = apic_page(&state.local_apic)?;
    let xcrs = xcrs(&state.xcrs)?;
    set_cpuid(vcpu, &state.cpuid)?;
    time::restore_frequency(vcpu, &state.tsc)?;
    // Where the local APIC is decides what of it can be set; when it is there, its timer and what MSRs say of it.
    let special = (&state.special).into();
    fd.set_sregs(&special)
        .map_err(|error| refused("its special registers", error))?;
    fd.set_regs(&(&state.general).into())
        .map_err(HypervisorError::kvm(set))?;
    if xcrs.nr_xcrs > 0 {
        fd.set_xcrs(&xcrs).map_err(|error| refused("its XCR0", error))?;
    }
    xsave::restore(vcpu, plan.xsave_size, &state.xsave)?;
    fd.set_debug_regs(&(&state.debug).into())
        .map_err(|error| refused("its debug registers", error))?;
    fd.set_lapic(&apic).map_err(|error| refused("its local APIC", error))?;
    msr::restore(vcpu, &state.msrs)?;
    fd.set_vcpu_events(&(&state.events).into())
        .map_err(|error| refused("the events on their way to it", error))?;
    let mp_state = state.run.to_kvm();
    fd.set_mp_state(kvm_mp_state { mp_state })
        .map_err(|error| refused("how far it is", error))
}

/// KVM takes what it gave. What it does not take was not given like that, or by a KVM that knows more.
fn refused(what: &str, error: kvm_ioctls::Error) -> StateError {
    StateError::damaged("a vCPU", format!("KVM refuses {what} ({error})"))
}

fn set_cpuid(vcpu: &Vcpu, cpuid: &CpuidTable) -> Result<(), StateError> {
    let count = cpuid.entries().len();
    let table = cpu::kvm_cpuid(cpuid)
        .ok_or_else(|| StateError::damaged("a vCPU", format!("it has {count} entries of CPUID")))?;
    vcpu.fd()
        .set_cpuid2(&table)
        .map_err(|error| refused("its CPUID", error))
}

fn numbered(xcrs: &kvm_xcrs) -> Vec<NumberedV1> {
    let known = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize);
    known
        .map(|xcr| NumberedV1 {
            index: xcr.xcr,
            value: xcr.value,
        })
        .collect()
}

fn xcrs(saved: &[NumberedV1]) -> Result<kvm_xcrs, StateError> {
    if saved.len() > MAX_XCRS {
        let problem = format!("it has {} extended control registers", saved.len());
        return Err(StateError::damaged("a vCPU", problem));
    }
    let mut xcrs = kvm_xcrs {
        nr_xcrs: saved.len() as u32,
        ..Default::default()
    };
    for (to, from) in xcrs.xcrs.iter_mut().zip(saved) {
        *to = kvm_xcr {
            xcr: from.index,
            reserved: 0,
            value: from.value,
        };
    }
    Ok(xcrs)
}

/// Each register has the first four of its 16 bytes.
fn apic_registers(page: &[libc::c_char]) -> Vec<u32> {
    let (registers, _) = page.as_chunks::<APIC_STEP>();
    let register = |bytes: &[libc::c_char; APIC_STEP]| {
        let [a, b, c, d, ..] = bytes.map(|byte| byte as u8);
        u32::from_le_bytes([a, b, c, d])
    };
    registers.iter().map(register).collect()
}

fn apic_page(registers: &[u32]) -> Result<kvm_bindings::kvm_lapic_state, StateError> {
    if registers.len() != APIC_REGISTERS {
        let problem = format!("its local APIC has {} registers, not {APIC_REGISTERS}", registers.len());
        return Err(StateError::damaged("a vCPU", problem));
    }
    let mut page = kvm_bindings::kvm_lapic_state::default();
    for (to, from) in page.regs.chunks_mut(APIC_STEP).zip(registers) {
        for (to, from) in to.iter_mut().zip(from.to_le_bytes()) {
            *to = from as libc::c_char;
        }
    }
    Ok(page)
}
