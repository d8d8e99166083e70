use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use triarch_device_core::mock::CountingLine;

use super::*;

const PLACE: MemoryPlace = MemoryPlace {
    start: 0x1_8000_0000,
    size: 0x2_1000_0000,
};

/// Three slots.
struct Machine {
    memory: MemoryHotplug,
    line: Arc<CountingLine>,
    told: Arc<AtomicU32>,
}

fn machine() -> Machine {
    let (line, told) = (Arc::new(CountingLine::default()), Arc::new(AtomicU32::new(0)));
    let (events, counter) = (Arc::new(Ged::new(line.clone())), told.clone());
    let memory = MemoryHotplug::new(3, events, move || {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    Machine { memory, line, told }
}

impl Machine {
    fn read(&self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.memory.read(offset, &mut data).expect("a register");
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.memory.write(offset, &value.to_le_bytes()).expect("a register");
    }

    fn ost(&self, index: u64, event: u32, status: u32) {
        self.write(0x28 + 0x20 * index, event);
        self.write(0x2c + 0x20 * index, status);
    }

    fn told(&self) -> u32 {
        self.told.load(Ordering::SeqCst)
    }

    /// As Linux does it.
    fn take(&self, index: usize) {
        self.memory.offer(index, PLACE);
        self.read(4);
        self.ost(index as u64, 1, 0);
        self.memory.slots();
    }
}

#[test]
fn memory_is_offered_taken_and_given_back() {
    let m = machine();
    assert_eq!([m.read(0), m.read(4), m.read(0x40), m.read(0x50)], [3, 0, 0, 0]);
    m.memory.offer(1, PLACE);
    assert_eq!((m.line.count(), m.memory.slots()[1].unheard), (1, true));
    assert_eq!([m.read(4), m.read(4)], [0x101, 0]);
    assert_eq!(m.read(0x40), 0xf);
    assert_eq!(
        [0x50, 0x54, 0x58, 0x5c].map(|at| m.read(at)),
        [0x8000_0000, 1, 0x1000_0000, 2]
    );
    assert!(!m.memory.slots()[1].taken);
    m.ost(1, 1, 0x80);
    assert_eq!(m.told(), 0, "it goes on");
    m.ost(1, 1, 0);
    assert_eq!(m.told(), 1);
    assert!(m.memory.slots()[1].taken);
    m.ost(1, 1, 1);
    assert!(m.memory.slots()[1].taken, "it is the first answer that counts");
    assert_eq!(m.told(), 1);

    assert_eq!(m.memory.ask_back(1), Removal::Asked);
    assert_eq!(m.read(4), 0x103);
    m.ost(1, 3, 0x84);
    assert_eq!(m.told(), 1);
    m.write(0x44, 1);
    m.ost(1, 3, 0);
    assert_eq!((m.told(), m.read(0x40), m.read(0x50)), (2, 0, 0));
    let slot = m.memory.slots()[1];
    assert_eq!((slot.place, slot.taken, slot.gone), (None, false, Some(PLACE)));
    assert_eq!(m.memory.slots()[1].gone, None, "told once");
}

#[test]
fn what_the_guest_finds_by_itself_is_taken() {
    let m = machine();
    m.memory.offer(0, PLACE);
    // A kernel that boots looks at all devices, and hears of this one later.
    assert_eq!((m.read(0x20), m.read(0x30)), (0xf, 0x8000_0000));
    assert_eq!(m.read(4), 1);
    m.ost(0, 1, 1);
    let slot = m.memory.slots()[0];
    assert!(slot.taken && slot.refusal.is_none());
    // One that looks when it has heard does not take it if it says so.
    m.memory.offer(1, PLACE);
    assert_eq!((m.read(4), m.read(0x40), m.read(0x50)), (0x101, 0xf, 0x8000_0000));
    m.ost(1, 1, 1);
    let slot = m.memory.slots()[1];
    assert!(!slot.taken && slot.refusal == Some(1));
    assert_eq!(m.memory.slots()[1].refusal, None, "told once");
    m.memory.withdraw(1);
    assert_eq!((m.read(0x40), m.memory.slots()[1].gone), (0, Some(PLACE)));
}

#[test]
fn what_is_there_from_the_start_is_taken() {
    let m = machine();
    m.memory.put(2, PLACE);
    assert_eq!((m.line.count(), m.read(4), m.read(0x60)), (0, 0, 0xf));
    assert!(m.memory.slots()[2].taken);
    assert_eq!(m.memory.ask_back(2), Removal::Asked);
}

#[test]
fn what_the_guest_does_not_know_of_is_withdrawn() {
    let m = machine();
    m.memory.offer(1, PLACE);
    assert_eq!((m.memory.ask_back(1), m.read(4)), (Removal::Withdrawn, 0));
    assert_eq!(m.memory.slots()[1].gone, Some(PLACE));
    m.memory.offer(1, PLACE);
    m.read(0x40);
    assert_eq!(m.memory.ask_back(1), Removal::Asked);
    assert_eq!(m.memory.ask_back(0), Removal::Withdrawn);
    assert_eq!(m.memory.ask_back(99), Removal::Withdrawn);
    assert_eq!(m.memory.slots()[0].gone, None);
}

#[test]
fn refusals_are_told_when_something_was_asked() {
    let m = machine();
    m.take(0);
    let told = m.told();
    m.ost(0, 3, 0x82);
    assert_eq!(m.told(), told, "nobody asked");
    m.memory.ask_back(0);
    m.read(4);
    m.ost(0, 3, 0x82);
    m.ost(0, 3, 0x82);
    assert_eq!((m.told(), m.memory.slots()[0].refusal), (told + 1, Some(0x82)));
    assert!(m.memory.slots()[0].taken);
    m.memory.ask_back(0);
    m.memory.leave(0);
    assert_eq!(m.read(4), 0);
    m.ost(0, 3, 0x82);
    assert_eq!(m.memory.slots()[0].refusal, None);
}

#[test]
fn what_was_not_heard_is_told_again() {
    let m = machine();
    m.memory.remind();
    m.memory.offer_again(0);
    assert_eq!((m.line.count(), m.read(4)), (0, 0), "an empty slot has no notice");
    m.memory.offer(0, PLACE);
    m.memory.remind();
    assert_eq!((m.line.count(), m.read(4)), (2, 1));
    m.memory.remind();
    assert_eq!(m.line.count(), 2);
    m.memory.offer_again(0);
    assert_eq!(m.read(4), 1);
    m.memory.offer(99, PLACE);
    assert_eq!(m.read(4), 0);
}

#[test]
fn accesses_of_another_size_are_refused() {
    let m = machine();
    assert_eq!(m.memory.read(0, &mut [0; 8]), Err(AccessError::BadAccess));
    assert_eq!(m.memory.read(2, &mut [0; 4]), Err(AccessError::BadAccess));
    assert_eq!(m.memory.write(0x24, &[1]), Err(AccessError::BadAccess));
    assert_eq!(m.memory.write(0x25, &[1, 0, 0, 0]), Err(AccessError::BadAccess));
    assert_eq!(m.read(u64::MAX - 3), 0);
    m.write(u64::MAX - 3, 1);
    assert_eq!(MemoryHotplug::size(3), 0x80);
}

#[test]
fn a_saved_state_goes_on_elsewhere() {
    let m = machine();
    m.take(0);
    m.memory.offer(1, PLACE);
    m.memory.ask_back(0);
    m.write(0x28, 3);
    let state = m.memory.state();
    let other = machine();
    other.memory.restore(&state).expect("restored");
    assert_eq!(
        (other.memory.state(), other.line.count(), other.told()),
        (state.clone(), 1, 1)
    );
    assert_eq!([other.read(4), other.read(4), other.read(4)], [3, 0x101, 0]);
    other.memory.slots();
    other.write(0x2c, 0x82);
    assert_eq!(other.memory.slots()[0].refusal, Some(0x82));
    let refused = |change: fn(&mut MemoryHotplugStateV1)| {
        let mut state = state.clone();
        change(&mut state);
        machine().memory.restore(&state).expect_err("refused")
    };
    assert_eq!(
        refused(|s| s.slots.truncate(2)),
        MemoryHotplugRestoreError::Count { found: 2, expected: 3 }
    );
}

proptest! {
    /// Whatever a guest reads and writes, it has no memory that it was not given, and what it gave back is told.
    #[test]
    fn no_guest_takes_more_than_it_was_given(accesses in proptest::collection::vec((0u64..0x90, 0u32..5, any::<bool>()), 0..200)) {
        let m = machine();
        m.memory.offer(0, PLACE);
        m.memory.put(1, PLACE);
        m.memory.ask_back(1);
        let mut gone = [false; 3];
        for (offset, value, write) in accesses {
            let _ = match write {
                true => m.memory.write(offset, &value.to_le_bytes()),
                false => m.memory.read(offset, &mut [0; 4]),
            };
            for (slot, gone) in m.memory.slots().iter().zip(&mut gone) {
                *gone |= slot.gone.is_some();
                prop_assert!(slot.place.is_some() || !slot.taken && slot.refusal.is_none() && !slot.unheard);
            }
            let slots = m.memory.slots();
            prop_assert!(slots[2].place.is_none() && !gone[2]);
            prop_assert!(slots[..2].iter().zip(gone).all(|(slot, gone)| slot.place.is_some() != gone));
        }
    }
}
