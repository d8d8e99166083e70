//! The guest's time: the generic timer's counters. Its timers are registers of the vCPUs and compare with them.

use triarch_hypervisor::{HypervisorError, Vcpu, Vm};

use super::{ClockV1, CountersV1, PlatformStateV1, VcpuStateV1};
use crate::aarch64::cpu::{get_register, set_register};
use crate::aarch64::processor::counter_hz;
use crate::common::state::ticks;
use crate::{Elapsed, StateError};

/// CNTVCT_EL0, which has the number of another register in KVM's interface.
pub(super) const VIRTUAL: u64 = 0x6030_0000_0013_df1a;
/// CNTPCT_EL0.
pub(super) const PHYSICAL: u64 = 0x6030_0000_0013_df01;

/// Reads the counters. `physical`: KVM has that one.
pub(super) fn save(vcpu: &Vcpu, physical: bool) -> Result<CountersV1, HypervisorError> {
    Ok(CountersV1 {
        virtual_count: get_register(vcpu, VIRTUAL)?,
        physical_count: physical.then(|| get_register(vcpu, PHYSICAL)).transpose()?,
    })
}

pub(super) fn check_frequency(saved: &ClockV1) -> Result<(), StateError> {
    let here = counter_hz();
    if here == saved.counter_hz {
        return Ok(());
    }
    Err(StateError::Frequency {
        clock: "counter",
        unit: "Hz",
        saved: saved.counter_hz,
        here,
        why: "KVM cannot scale it",
        or: "",
    })
}

/// Lets the guest's time go on from where it was when `saved` and `platform` were, and with it the timers. The vCPUs must not have run
/// yet; call it as late as possible, since from here on time passes.
pub fn restore_time(
    _vm: &Vm,
    vcpus: &[Vcpu],
    saved: &[VcpuStateV1],
    platform: &PlatformStateV1,
    elapsed: Elapsed,
) -> Result<(), StateError> {
    let (Some(vcpu), Some(state)) = (vcpus.first(), saved.first()) else {
        return Err(StateError::Count {
            found: saved.len(),
            expected: format!("{} were made", vcpus.len()),
        });
    };
    check_frequency(&platform.clock)?;
    let passed = ticks(elapsed.since(platform.clock.host_ns), platform.clock.counter_hz);
    let CountersV1 {
        virtual_count,
        physical_count,
    } = state.counters;
    // All vCPUs have these in common. Each goes on from where it was, which one offset for both could not do.
    set_register(vcpu, VIRTUAL, virtual_count.wrapping_add(passed))?;
    if let Some(count) = physical_count
        && let Err(error) = set_register(vcpu, PHYSICAL, count.wrapping_add(passed))
    {
        // Linux looks at the other one.
        tracing::debug!("the guest's physical counter is this host's: {error}");
    }
    Ok(())
}
