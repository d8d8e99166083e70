//! Which vCPUs run where KVM starts them itself: on a PC by INIT and SIPI (Intel SDM volume 3, 9.4), on an ARM host whose KVM does not
//! forward PSCI by CPU_ON. A vCPU that the guest does not have rests outside of KVM, where nothing reaches it.

use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_mp_state;
use triarch_hypervisor::{Firmware, FirmwareStateV1, HypervisorError, StartV1, Vcpu};

/// The guest does not have it, and it waits for its start.
const ABSENT: u8 = 0;
/// The guest has given it back, and it is as the guest left it.
const LEFT: u8 = 1;
/// The guest has it, and has not started it.
const WAITING: u8 = 2;
/// It was started, or was there from the guest's start.
const STARTED: u8 = 3;

const STATES: [(u8, StartV1); 4] = [
    (ABSENT, StartV1::Absent),
    (LEFT, StartV1::Left),
    (WAITING, StartV1::Waiting),
    (STARTED, StartV1::Started),
];

/// The vCPUs of a guest.
pub(crate) struct Starts {
    vcpus: Box<[AtomicU8]>,
    /// KVM's state of one that waits for its start (KVM_SET_MP_STATE).
    waiting: u32,
}

impl Starts {
    /// `max` vCPUs, of which the guest starts with the first `present`. One that waits for its start is in KVM's state `waiting`.
    pub(crate) fn new(max: u32, present: u32, waiting: u32) -> Self {
        let state = |index| if index < present { STARTED } else { LEFT };
        Self {
            vcpus: (0..max).map(|index| AtomicU8::new(state(index))).collect(),
            waiting,
        }
    }

    /// The vCPUs of a guest that was saved.
    pub(crate) fn restored(saved: &[StartV1], waiting: u32) -> Self {
        let state = |saved: &StartV1| {
            STATES
                .iter()
                .find(|(_, name)| name == saved)
                .map_or(LEFT, |(state, _)| *state)
        };
        Self {
            vcpus: saved.iter().map(|saved| AtomicU8::new(state(saved))).collect(),
            waiting,
        }
    }

    fn get(&self, index: usize) -> u8 {
        self.vcpus
            .get(index)
            .map_or(ABSENT, |state| state.load(Ordering::SeqCst))
    }

    fn set(&self, index: usize, new: u8) {
        if let Some(state) = self.vcpus.get(index) {
            state.store(new, Ordering::SeqCst);
        }
    }

    /// Whether it was in state `from`, and is in state `to` now. A vCPU that was taken meanwhile stays so.
    fn advance(&self, index: usize, from: u8, to: u8) -> bool {
        let exchange = |state: &AtomicU8| state.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst);
        self.vcpus.get(index).is_some_and(|state| exchange(state).is_ok())
    }
}

impl Firmware for Starts {
    fn call(&self, _index: usize, _caller: &Vcpu, _function: u64) -> Result<bool, HypervisorError> {
        Ok(false)
    }

    fn runs(&self, index: usize) -> bool {
        matches!(self.get(index), WAITING | STARTED)
    }

    fn prepare(&self, _index: usize, _vcpu: &Vcpu) -> Result<(), HypervisorError> {
        Ok(())
    }

    fn waits(&self, index: usize) -> bool {
        self.get(index) == WAITING
    }

    fn started(&self, index: usize, vcpu: &Vcpu) -> bool {
        // A state that cannot be read is asked for again at the next wake-up.
        let woken = || {
            vcpu.fd()
                .get_mp_state()
                .is_ok_and(|state| state.mp_state != self.waiting)
        };
        self.get(index) == WAITING && woken() && self.advance(index, WAITING, STARTED)
    }

    /// What a vCPU did for the guest before it was given back is over. This comes before the guest can have it again, so that a start
    /// that follows at once is not lost.
    fn rest(&self, index: usize, vcpu: &Vcpu) -> Result<(), HypervisorError> {
        if self.get(index) != LEFT {
            return Ok(());
        }
        let state = kvm_mp_state { mp_state: self.waiting };
        vcpu.fd()
            .set_mp_state(state)
            .map_err(HypervisorError::kvm("make a vCPU wait for its start"))?;
        self.advance(index, LEFT, ABSENT);
        Ok(())
    }

    fn rested(&self, index: usize) -> bool {
        self.get(index) == ABSENT
    }

    fn plug(&self, index: usize) {
        self.advance(index, ABSENT, WAITING);
    }

    fn unplug(&self, index: usize) {
        if self.runs(index) {
            self.set(index, LEFT);
        }
    }

    fn save(&self) -> FirmwareStateV1 {
        let name = |index| {
            let state = self.get(index);
            STATES
                .iter()
                .find(|(known, _)| *known == state)
                .map_or(StartV1::Left, |(_, name)| *name)
        };
        FirmwareStateV1::StartedByKvm((0..self.vcpus.len()).map(name).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_is_taken_and_given_again() {
        let starts = Starts::new(3, 1, 0);
        assert_eq!([0, 1, 2, 3].map(|n| starts.runs(n)), [true, false, false, false]);
        starts.plug(1);
        assert!(!starts.runs(1), "it has not rested yet");
        assert!(starts.advance(1, LEFT, ABSENT) && starts.rested(1));
        starts.plug(1);
        assert!(starts.runs(1) && !starts.runs(2) && !starts.rested(1));
        assert_eq!([0, 1, 2].map(|n| starts.waits(n)), [false, true, false]);
        starts.unplug(1);
        assert!(!starts.advance(1, WAITING, STARTED), "it is not the guest's any more");
        assert!(!starts.runs(1) && !starts.rested(1));
        starts.plug(7);
        assert!(!starts.runs(7));
    }

    #[test]
    fn who_runs_is_saved_and_restored() {
        let starts = Starts::new(4, 1, 9);
        starts.advance(1, LEFT, ABSENT);
        starts.advance(2, LEFT, ABSENT);
        starts.plug(2);
        let FirmwareStateV1::StartedByKvm(saved) = starts.save() else {
            panic!("the kind of another");
        };
        assert_eq!(
            saved,
            [StartV1::Started, StartV1::Absent, StartV1::Waiting, StartV1::Left]
        );
        let again = Starts::restored(&saved, 9);
        assert_eq!([0, 1, 2, 3].map(|n| again.get(n)), [STARTED, ABSENT, WAITING, LEFT]);
        assert_eq!(again.save(), starts.save());
    }
}
