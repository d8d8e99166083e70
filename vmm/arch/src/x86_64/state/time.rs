//! The guest's time: time stamp counters, the timers that wait for them, KVM's clock.

use std::time::Duration;

use kvm_bindings::kvm_clock_data;
use triarch_hypervisor::{HypervisorError, Vcpu, Vm};

use super::{ClockV1, PlatformStateV1, TscV1, VcpuStateV1, msr, offset};
use crate::common::state::{now_ns, ticks};
use crate::{Elapsed, StateError};

/// KVM's clock now.
pub(super) fn clock(vm: &Vm) -> Result<ClockV1, HypervisorError> {
    let clock = vm.fd().get_clock().map_err(HypervisorError::kvm("read its clock"))?;
    Ok(ClockV1 {
        guest_ns: clock.clock,
        host_ns: now_ns(),
    })
}

/// Lets a counter have the frequency that was saved.
pub(super) fn restore_frequency(vcpu: &Vcpu, saved: &TscV1) -> Result<(), StateError> {
    let here = vcpu.fd().get_tsc_khz().ok().filter(|khz| *khz > 0);
    match (saved.khz, here) {
        (None, _) => Ok(()),
        (Some(saved), Some(here)) if saved == here => Ok(()),
        // KVM also takes it without scaling when both are as close as clocks are.
        (Some(saved), here) => vcpu.fd().set_tsc_khz(saved).map_err(|_| StateError::Frequency {
            clock: "TSC",
            unit: "kHz",
            saved: saved.into(),
            here: here.unwrap_or(0).into(),
            why: "its CPU cannot scale it",
            or: ", or with a CPU that scales it",
        }),
    }
}

/// Lets the guest's time go on from where it was when `saved` and `platform` were, and with it the timers. The vCPUs must not have run
/// yet; call it as late as possible, since from here on time passes.
pub fn restore_time(
    vm: &Vm,
    vcpus: &[Vcpu],
    saved: &[VcpuStateV1],
    platform: &PlatformStateV1,
    elapsed: Elapsed,
) -> Result<(), StateError> {
    if vcpus.len() != saved.len() {
        return Err(StateError::Count {
            found: saved.len(),
            expected: format!("{} were made", vcpus.len()),
        });
    }
    let elapsed = elapsed.since(platform.clock.host_ns);
    let counters: Vec<&TscV1> = saved.iter().map(|vcpu| &vcpu.tsc).collect();
    if !restore_offsets(vcpus, &counters, elapsed)? {
        // KVM takes values that follow one another this fast for those of counters that are to be the same.
        for (vcpu, tsc) in vcpus.iter().zip(&counters) {
            set(vcpu, msr::TSC, at(tsc, elapsed))?;
        }
    }
    for (vcpu, tsc) in vcpus.iter().zip(&counters) {
        if let Some(deadline) = tsc.deadline {
            set(vcpu, msr::TSC_DEADLINE, deadline)?;
        }
    }
    restore_clock(vm, vcpus, &platform.clock, elapsed)
}

/// What a counter is to count after `elapsed`.
fn at(tsc: &TscV1, elapsed: Duration) -> u64 {
    let hz = u64::from(tsc.khz.unwrap_or(0)) * 1000;
    tsc.value.wrapping_add(ticks(elapsed, hz))
}

/// Sets a register that every CPU has, unless it has that value anyway: 0 of one that this CPU does not have.
fn set(vcpu: &Vcpu, index: u32, value: u64) -> Result<(), StateError> {
    if msr::write_one(vcpu, index, value)? || value == 0 {
        return Ok(());
    }
    Err(StateError::damaged("a vCPU", format!("KVM refuses its MSR {index:#x}")))
}

/// Sets the counters by what they count more than the host's, so that they differ from one another as they did. False when this cannot
/// be told on this host or was not saved.
fn restore_offsets(vcpus: &[Vcpu], saved: &[&TscV1], elapsed: Duration) -> Result<bool, StateError> {
    let (Some(first), Some(tsc)) = (vcpus.first(), saved.first()) else {
        return Ok(true);
    };
    let offsets: Option<Vec<u64>> = saved.iter().map(|tsc| tsc.offset).collect();
    let (Some(offsets), Some(saved_first), Some(here)) = (offsets, tsc.offset, offset::get(first)) else {
        return Ok(false);
    };
    let counts = msr::read_one(first, msr::TSC)?.unwrap_or(0);
    // By so much the first one has to be set forth, and with it all.
    let first_offset = here.wrapping_add(at(tsc, elapsed).wrapping_sub(counts));
    let moved = first_offset.wrapping_sub(saved_first);
    for (vcpu, saved) in vcpus.iter().zip(offsets) {
        offset::set(vcpu, saved.wrapping_add(moved)).map_err(|source| HypervisorError::Kvm {
            what: "set the TSC",
            source,
        })?;
    }
    Ok(true)
}

fn restore_clock(vm: &Vm, vcpus: &[Vcpu], saved: &ClockV1, elapsed: Duration) -> Result<(), StateError> {
    let passed = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
    let clock = kvm_clock_data {
        clock: saved.guest_ns.saturating_add(passed),
        ..Default::default()
    };
    vm.fd()
        .set_clock(&clock)
        .map_err(HypervisorError::kvm("set its clock"))?;
    for vcpu in vcpus {
        match vcpu.fd().kvmclock_ctrl() {
            Ok(()) => {}
            // The guest does not use that clock.
            Err(error) if error.errno() == libc::EINVAL => {}
            Err(error) => return Err(HypervisorError::kvm("tell the guest that it stood still")(error).into()),
        }
    }
    Ok(())
}
