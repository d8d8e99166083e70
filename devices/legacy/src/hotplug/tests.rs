use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use triarch_device_core::mock::CountingLine;
use triarch_device_core::{AccessError, BusDevice};

use super::*;
use crate::Ged;

/// Four processors, of which the guest starts with two and keeps the first.
struct Machine {
    cpus: CpuHotplug,
    line: Arc<CountingLine>,
    told: Arc<AtomicU32>,
}

fn machine() -> Machine {
    let (line, told) = (Arc::new(CountingLine::default()), Arc::new(AtomicU32::new(0)));
    let (events, counter) = (Arc::new(Ged::new(line.clone())), told.clone());
    let config = CpuHotplugConfig {
        max: 4,
        present: 2,
        fixed: 1,
        absent: 0,
    };
    let cpus = CpuHotplug::new(config, Some(events), move || {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    Machine { cpus, line, told }
}

impl Machine {
    fn read(&self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.cpus.read(offset, &mut data).expect("a register");
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.cpus.write(offset, &value.to_le_bytes()).expect("a register");
    }

    fn statuses(&self) -> [u32; 4] {
        [0x10, 0x20, 0x30, 0x40].map(|offset| self.read(offset))
    }

    fn ost(&self, index: u64, event: u32, status: u32) {
        self.write(0x18 + 0x10 * index, event);
        self.write(0x1c + 0x10 * index, status);
    }

    fn told(&self) -> u32 {
        self.told.load(Ordering::SeqCst)
    }
}

#[test]
fn a_processor_is_offered_started_and_given_back() {
    let m = machine();
    assert_eq!((m.read(0), m.read(4), m.statuses()), (4, 0, [0xf, 0xf, 0, 0]));
    m.cpus.offer(2);
    assert_eq!((m.line.count(), m.statuses()), (1, [0xf, 0xf, 0xf, 0]));
    assert_eq!([m.read(4), m.read(4)], [0x201, 0]);
    assert!(!m.cpus.slots()[2].started);
    m.cpus.started(2);
    assert!(m.cpus.slots()[2].started);
    assert_eq!(m.cpus.ask_back(2), Removal::Asked);
    assert_eq!((m.line.count(), m.read(4)), (2, 0x203));
    m.ost(2, 3, 0x84);
    assert_eq!(m.told(), 0, "it goes on");
    m.write(0x34, 1);
    assert_eq!((m.told(), m.statuses()), (1, [0xf, 0xf, 0, 0]));
    let slot = m.cpus.slots()[2];
    assert!(!slot.present && !slot.started && !slot.unheard);
    m.ost(2, 3, 0);
    assert_eq!(m.told(), 1);
}

#[test]
fn what_the_guest_does_not_know_of_is_withdrawn() {
    let m = machine();
    m.cpus.offer(2);
    assert_eq!((m.cpus.ask_back(2), m.read(4)), (Removal::Withdrawn, 0));
    m.cpus.offer(2);
    m.read(0x30);
    assert_eq!(
        m.cpus.ask_back(2),
        Removal::Asked,
        "a kernel that boots looks at all of them"
    );
    assert_eq!(m.cpus.ask_back(3), Removal::Withdrawn);
    assert_eq!(m.cpus.ask_back(99), Removal::Withdrawn);
}

#[test]
fn refusals_are_told_once_and_only_when_something_was_asked() {
    let m = machine();
    m.ost(1, 3, 0x82);
    assert_eq!(m.told(), 0, "nobody asked");
    m.cpus.ask_back(1);
    m.read(4);
    m.ost(1, 3, 0x82);
    m.ost(1, 3, 0x82);
    assert_eq!(m.told(), 1);
    assert_eq!(
        [m.cpus.slots()[1].refusal, m.cpus.slots()[1].refusal],
        [Some(0x82), None]
    );
    m.cpus.offer(3);
    m.ost(3, 1, 0x80);
    assert_eq!(m.cpus.slots()[3].refusal, None);
    m.ost(3, 1, 1);
    assert_eq!(m.cpus.slots()[3].refusal, Some(1));
    m.cpus.started(3);
    m.ost(3, 1, 1);
    assert_eq!(m.cpus.slots()[3].refusal, None, "it runs already");
}

#[test]
fn a_guest_that_is_told_twice_does_not_refuse() {
    let m = machine();
    m.cpus.offer(2);
    m.read(4);
    m.ost(2, 1, 0);
    m.cpus.offer(2);
    assert_eq!(m.read(4), 0x201);
    m.ost(2, 1, 1);
    assert_eq!((m.cpus.slots()[2].refusal, m.told()), (None, 0), "it has it already");
    m.cpus.offer(3);
    m.read(4);
    m.cpus.ask_back(3);
    m.ost(3, 1, 1);
    assert_eq!(m.cpus.slots()[3].refusal, None, "it is wanted back by now");
    m.read(4);
    m.ost(3, 3, 1);
    assert_eq!(m.cpus.slots()[3].refusal, Some(1));
    // Another one in the same place is another one.
    m.write(0x34, 1);
    m.cpus.offer(2);
    m.read(4);
    m.ost(2, 1, 1);
    assert_eq!(m.cpus.slots()[2].refusal, Some(1));
}

#[test]
fn the_first_is_never_given_back_and_none_twice() {
    let m = machine();
    m.write(0x14, 1);
    m.write(0x44, 1);
    m.write(0x24, 2);
    assert_eq!((m.told(), m.statuses()), (0, [0xf, 0xf, 0, 0]));
    m.write(0x24, 1);
    m.write(0x24, 1);
    assert_eq!((m.told(), m.statuses()), (1, [0xf, 0, 0, 0]));
}

#[test]
fn what_was_not_heard_is_told_again() {
    let m = machine();
    m.cpus.remind();
    assert_eq!(m.line.count(), 0);
    m.cpus.offer(2);
    m.cpus.remind();
    assert_eq!(m.line.count(), 2);
    m.read(4);
    m.cpus.remind();
    assert_eq!(m.line.count(), 2);
    m.cpus.ask_back(1);
    m.cpus.leave(1);
    assert_eq!((m.read(4), m.cpus.slots()[1].present), (0, true));
}

#[test]
fn accesses_of_another_size_are_refused() {
    let m = machine();
    assert_eq!(m.cpus.read(0, &mut [0; 1]), Err(AccessError::BadAccess));
    assert_eq!(m.cpus.read(2, &mut [0; 4]), Err(AccessError::BadAccess));
    assert_eq!(m.cpus.write(0x14, &[1]), Err(AccessError::BadAccess));
    assert_eq!(m.cpus.write(0x15, &[1, 0, 0, 0]), Err(AccessError::BadAccess));
    assert_eq!(m.read(u64::MAX - 3), 0);
    m.write(u64::MAX - 3, 1);
    assert_eq!(CpuHotplug::size(4), 0x50);
}

#[test]
fn a_saved_state_goes_on_elsewhere() {
    let m = machine();
    m.cpus.offer(2);
    m.read(4);
    m.ost(2, 1, 0);
    m.cpus.ask_back(1);
    m.write(0x28, 3);
    let state = m.cpus.state();
    let other = machine();
    other.cpus.restore(&state).expect("restored");
    assert_eq!(
        (other.cpus.state(), other.line.count(), other.told()),
        (state.clone(), 1, 1)
    );
    assert_eq!([other.read(4), other.read(4)], [0x103, 0]);
    other.write(0x2c, 1);
    assert_eq!(other.cpus.slots()[1].refusal, Some(1));
    other.ost(2, 1, 1);
    assert_eq!(other.cpus.slots()[2].refusal, None, "it took it over before");

    let refused = |change: fn(&mut CpuHotplugStateV1)| {
        let mut state = state.clone();
        change(&mut state);
        machine().cpus.restore(&state).expect_err("refused")
    };
    assert_eq!(
        refused(|s| s.slots.truncate(3)),
        CpuHotplugRestoreError::Count { found: 3, expected: 4 }
    );
    assert_eq!(
        refused(|s| s.slots[0].present = false),
        CpuHotplugRestoreError::Fixed { index: 0 }
    );
}

proptest! {
    /// Whatever a guest reads and writes, it has the first processor, and none that it was not given.
    #[test]
    fn no_guest_takes_more_than_it_was_given(accesses in proptest::collection::vec((0u64..0x60, 0u32..5, any::<bool>()), 0..200)) {
        let m = machine();
        m.cpus.offer(2);
        m.cpus.ask_back(1);
        for (offset, value, write) in accesses {
            let _ = match write {
                true => m.cpus.write(offset, &value.to_le_bytes()),
                false => m.cpus.read(offset, &mut [0; 4]),
            };
            let slots = m.cpus.slots();
            prop_assert!(slots[0].present && !slots[3].present);
            prop_assert!(slots.iter().all(|slot| slot.present || !slot.started && slot.refusal.is_none()));
        }
        prop_assert!(m.told() <= 200);
    }
}
