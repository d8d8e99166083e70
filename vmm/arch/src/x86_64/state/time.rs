//! The guest's time: time stamp counters, the timers that wait for them, KVM's clock.
//!
//! Guests compare the two, and do without a counter that is not where the clock says. So what is saved is a pair, of one instant, which is
//! told by the host's counter: each vCPU's counter and the clock with what the host's was then. A pair is what is set again (Linux,
//! Documentation/virt/kvm/devices/vcpu.rst, 4.1).

use std::arch::x86_64::_rdtsc;
use std::time::Duration;

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use triarch_hypervisor::{HypervisorError, Vcpu, Vm};

use super::counter::{Counter, later, middle};
use super::{ClockV1, PlatformStateV1, TscV1, VcpuStateV1, msr, offset};
use crate::common::state::now_ns;
use crate::{Elapsed, StateError};

/// How often a moment is taken: the shortest is kept, in which the fewest others ran.
const TRIES: usize = 4;

fn host_tsc() -> u64 {
    // SAFETY: every CPU that KVM runs on has the instruction, and it does nothing else.
    unsafe { _rdtsc() }
}

/// What `read` tells, and what the host's counter was before and after.
fn moment<T, E>(mut read: impl FnMut() -> Result<T, E>) -> Result<(T, [u64; 2]), E> {
    let mut once = || {
        let before = host_tsc();
        let told = read()?;
        Ok((told, [before, host_tsc()]))
    };
    let mut best = once()?;
    let width = |(_, [before, after]): &(T, [u64; 2])| after.wrapping_sub(*before);
    for _ in 1..TRIES {
        let next = once()?;
        if width(&next) < width(&best) {
            best = next;
        }
    }
    Ok(best)
}

/// KVM's clock now.
pub(super) fn clock(vm: &Vm) -> Result<ClockV1, HypervisorError> {
    let read = || {
        let clock = vm.fd().get_clock().map_err(HypervisorError::kvm("read its clock"))?;
        Ok((clock, now_ns()))
    };
    let ((clock, now), bounds) = moment(read)?;
    let has = |flag, told, else_| if clock.flags & flag != 0 { told } else { else_ };
    Ok(ClockV1 {
        guest_ns: clock.clock,
        // Since Linux 5.16, if the host's own clock is its counter.
        host_ns: has(KVM_CLOCK_REALTIME, clock.realtime, now),
        host_tsc: has(KVM_CLOCK_HOST_TSC, clock.host_tsc, middle(bounds)),
    })
}

/// A vCPU's counter now.
fn counter(vcpu: &Vcpu) -> Result<(Counter, u64), HypervisorError> {
    let offset = offset::get(vcpu);
    let (value, bounds) = moment(|| msr::read_one(vcpu, msr::TSC))?;
    let value = value.unwrap_or(0);
    Ok((Counter::read(value, bounds, offset), value))
}

/// Reads a vCPU's counter and the timer that waits for it.
pub(super) fn tsc(vcpu: &Vcpu) -> Result<TscV1, HypervisorError> {
    let (counter, value) = counter(vcpu)?;
    Ok(TscV1 {
        value,
        host: counter.host(),
        offset: offset::get(vcpu),
        khz: vcpu.fd().get_tsc_khz().ok().filter(|khz| *khz > 0),
        deadline: msr::read_one(vcpu, msr::TSC_DEADLINE)?,
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

/// Lets the guest's time go on from where it was when `platform` was saved, and with it the timers. The vCPUs must not have run
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
    let saved_clock = &platform.clock;
    set_clock(vm, saved_clock, elapsed.since(saved_clock.host_ns))?;
    // The clock runs: where it is now, the counters have to be.
    let here = clock(vm)?;
    let passed = Duration::from_nanos(here.guest_ns.saturating_sub(saved_clock.guest_ns));
    let counters: Vec<&TscV1> = saved.iter().map(|vcpu| &vcpu.tsc).collect();
    let wanted = later(&counters, saved_clock, passed);
    if !set_offsets(vcpus, &wanted, here.host_tsc)? {
        // KVM takes values that follow one another this fast for those of counters that are to be the same.
        for (vcpu, value) in vcpus.iter().zip(wanted) {
            let (counter, _) = counter(vcpu)?;
            let since = counter.at(host_tsc()).wrapping_sub(counter.at(here.host_tsc));
            set(vcpu, msr::TSC, value.wrapping_add(since))?;
        }
    }
    for (vcpu, tsc) in vcpus.iter().zip(&counters) {
        if let Some(deadline) = tsc.deadline {
            set(vcpu, msr::TSC_DEADLINE, deadline)?;
        }
    }
    tell_that_it_stood(vcpus)
}

/// Sets a register that every CPU has, unless it has that value anyway: 0 of one that this CPU does not have.
fn set(vcpu: &Vcpu, index: u32, value: u64) -> Result<(), StateError> {
    if msr::write_one(vcpu, index, value)? || value == 0 {
        return Ok(());
    }
    Err(StateError::damaged("a vCPU", format!("KVM refuses its MSR {index:#x}")))
}

/// Has the counters count `wanted` when the host's counts `host`. False where KVM does not let it be told like this.
fn set_offsets(vcpus: &[Vcpu], wanted: &[u64], host: u64) -> Result<bool, StateError> {
    let (Some(first), Some(base)) = (vcpus.first(), wanted.first()) else {
        return Ok(true);
    };
    let (here, _) = counter(first)?;
    let Some(offset) = here.offset_for(*base, host) else {
        return Ok(false);
    };
    for (vcpu, value) in vcpus.iter().zip(wanted) {
        // All are scaled alike: what is common to them must not differ by how one of them was read.
        let offset = offset.wrapping_add(value.wrapping_sub(*base));
        offset::set(vcpu, offset).map_err(|source| HypervisorError::Kvm {
            what: "set the TSC",
            source,
        })?;
    }
    Ok(true)
}

fn set_clock(vm: &Vm, saved: &ClockV1, elapsed: Duration) -> Result<(), HypervisorError> {
    let passed = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
    let clock = kvm_clock_data {
        clock: saved.guest_ns.saturating_add(passed),
        ..Default::default()
    };
    vm.fd().set_clock(&clock).map_err(HypervisorError::kvm("set its clock"))
}

fn tell_that_it_stood(vcpus: &[Vcpu]) -> Result<(), StateError> {
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
