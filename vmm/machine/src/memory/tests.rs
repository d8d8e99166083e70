//! Targets and guests of all kinds, against the device that both use.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use triarch_device_core::BusDevice;
use triarch_device_core::mock::CountingLine;
use triarch_legacy::{Ged, MemoryHotplug, MemorySlot};

use super::dimms::{MemoryMeters, check_target, count_all};
use super::sizing::*;
use crate::changes::{Direction, Outcome};

const BOOT: u64 = 1 << 30;
const ROOM: std::ops::Range<u64> = 4 << 30..(4 << 30) + 8 * BLOCK;
const SLOTS: u32 = 4;

/// Host and guest: the host keeps to [`Sizing`], the guest to the registers.
struct World {
    memory: MemoryHotplug,
    known: Vec<MemorySlot>,
    open: Option<Sizing>,
    /// Where the host has memory beside what the guest started with: start and size.
    provided: BTreeSet<(u64, u64)>,
    /// Slots whose memory the guest uses.
    used: BTreeSet<u32>,
}

impl World {
    fn new() -> Self {
        let events = Arc::new(Ged::new(Arc::new(CountingLine::default())));
        let memory = MemoryHotplug::new(SLOTS, events, || {});
        Self {
            known: memory.slots(),
            memory,
            open: None,
            provided: BTreeSet::new(),
            used: BTreeSet::new(),
        }
    }

    fn gaps(&self) -> Vec<(u64, u64)> {
        let (mut gaps, mut at) = (Vec::new(), ROOM.start);
        for (start, size) in &self.provided {
            if *start > at {
                gaps.push((at, start - at));
            }
            at = start + size;
        }
        if ROOM.end > at {
            gaps.push((at, ROOM.end - at));
        }
        gaps
    }

    /// Asks for `target` as a client would; false when it has to wait or cannot be.
    fn resize(&mut self, target: u64) -> bool {
        self.look();
        match &self.open {
            Some(open) if open.target == target => return true,
            Some(open) if open.direction == Direction::Remove => return false,
            _ => {}
        }
        let Ok(sizing) = Sizing::plan(&self.known, BOOT, target, &self.gaps()) else {
            return false;
        };
        let before = self.open.take();
        for dimm in &sizing.added {
            assert!(self.provided.insert((dimm.place.start, dimm.place.size)));
        }
        if !sizing.waiting.is_empty() {
            sizing.ask(&self.memory, before.as_ref().map_or(&[], |open| &open.waiting));
            self.open = Some(sizing);
            self.look();
        }
        true
    }

    fn look(&mut self) {
        loop {
            let slots = self.memory.slots();
            let all = news(&self.known, &slots);
            let mut again = false;
            for one in &all {
                if let News::Gone(dimm) = one {
                    assert!(
                        self.provided.remove(&(dimm.place.start, dimm.place.size)),
                        "it went twice"
                    );
                }
                if let News::Refused(dimm, _) = one
                    && !slots[dimm.slot].taken
                {
                    self.memory.withdraw(dimm.slot);
                    again = true;
                }
                if let Some(open) = &mut self.open {
                    open.hear(one);
                }
            }
            self.known = slots;
            if !again {
                break;
            }
        }
        if self.open.as_ref().is_some_and(|open| open.waiting.is_empty()) {
            self.open = None;
        }
        let there: BTreeSet<_> = present(&self.known)
            .map(|(dimm, _)| (dimm.place.start, dimm.place.size))
            .collect();
        assert_eq!(there, self.provided, "what the guest has is what the host provides");
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.memory.read(offset, &mut data).expect("a register");
        u32::from_le_bytes(data)
    }

    fn ost(&self, slot: u32, event: u32, status: u32) {
        let at = 0x20 + 0x20 * u64::from(slot);
        self.memory.write(at + 8, &event.to_le_bytes()).expect("a register");
        self.memory.write(at + 12, &status.to_le_bytes()).expect("a register");
    }

    /// The guest takes a notice and does what it says, or refuses.
    fn guest(&mut self, willing: bool) -> bool {
        let notice = self.read(4);
        let slot = notice >> 8;
        match (notice & 0xff, willing) {
            (0, _) => return false,
            (1, true) => {
                assert_eq!(self.read(0x20 + 0x20 * u64::from(slot)), 0xf);
                let new = self.used.insert(slot);
                self.ost(slot, 1, if new { 0 } else { 1 });
            }
            (1, false) => self.ost(slot, 1, if self.used.contains(&slot) { 0 } else { 1 }),
            (_, true) => {
                self.used.remove(&slot);
                let at = 0x24 + 0x20 * u64::from(slot);
                self.memory.write(at, &1u32.to_le_bytes()).expect("a register");
                self.ost(slot, 3, 0);
            }
            (_, false) => self.ost(slot, 3, 0x82),
        }
        true
    }
}

#[test]
fn memory_comes_lowest_first_and_goes_highest_first() {
    let mut world = World::new();
    for blocks in [1, 3, 4] {
        assert!(world.resize(BOOT + blocks * BLOCK));
        assert!(world.guest(true));
        world.look();
        assert!(world.open.is_none());
    }
    let places: Vec<_> = world
        .provided
        .iter()
        .map(|(start, size)| ((start - ROOM.start) / BLOCK, size / BLOCK))
        .collect();
    assert_eq!(places, [(0, 1), (1, 2), (3, 1)]);
    let plan = Sizing::plan(&world.known, BOOT, BOOT + 2 * BLOCK, &world.gaps());
    let error = plan.expect_err("a device is given back whole").to_string();
    let possible = [4, 3, 1].map(|blocks| (BOOT + blocks * BLOCK).to_string());
    assert!(possible.iter().all(|size| error.contains(size)), "{error}");
    assert!(world.resize(BOOT + BLOCK));
    assert!(
        !world.resize(BOOT) && !world.resize(BOOT + 4 * BLOCK),
        "one after the other"
    );
    assert!(world.guest(true) && world.guest(true) && !world.guest(true));
    world.look();
    assert_eq!(world.provided.len(), 1);
}

#[test]
fn gaps_are_filled_and_what_does_not_fit_is_refused() {
    let mut world = World::new();
    for blocks in [1, 2, 3] {
        assert!(world.resize(BOOT + blocks * BLOCK) && world.guest(true));
    }
    // The guest gives back the one in the middle by itself.
    world.memory.write(0x44, &1u32.to_le_bytes()).expect("a register");
    world.used.remove(&1);
    world.look();
    assert!(world.resize(BOOT + 8 * BLOCK));
    let open = world.open.as_ref().expect("open");
    let added: Vec<_> = open
        .added
        .iter()
        .map(|dimm| ((dimm.place.start - ROOM.start) / BLOCK, dimm.place.size / BLOCK))
        .collect();
    assert_eq!(added, [(1, 1), (3, 5)]);
    assert!(world.guest(true) && world.guest(true));
    world.look();
    let plan = |target| Sizing::plan(&world.known, BOOT, target, &world.gaps()).expect_err("full");
    assert_eq!(plan(BOOT + 9 * BLOCK), Unreachable::NoRoom);
    let mut world = World::new();
    for blocks in 1..=4 {
        assert!(world.resize(BOOT + blocks * BLOCK) && world.guest(true));
    }
    world.look();
    let plan = Sizing::plan(&world.known, BOOT, BOOT + 5 * BLOCK, &world.gaps());
    assert_eq!(plan, Err(Unreachable::NoSlot(4)));
}

#[test]
fn what_is_refused_is_taken_away() {
    let mut world = World::new();
    assert!(world.resize(BOOT + 2 * BLOCK));
    assert!(world.guest(false));
    world.look();
    assert!(world.open.is_none() && world.provided.is_empty());
}

#[test]
fn texts_say_what_happened() {
    let mut world = World::new();
    world.resize(BOOT + 2 * BLOCK);
    let patience = Duration::from_secs(30);
    let mut open = world.open.clone().expect("open");
    assert_eq!(
        (open.total(), open.direction.phase()),
        (2 * BLOCK, "the guest has to take memory")
    );
    let text = open.late(&world.known, patience);
    assert!(
        text.starts_with("the guest did not look at 256 MiB within 30 s: it is not up yet"),
        "{text}"
    );
    world.read(4);
    world.look();
    let text = open.late(&world.known, patience);
    assert!(
        text.starts_with("the guest has 256 MiB and did not say within 30 s"),
        "{text}"
    );
    let dimm = open.waiting[0];
    open.hear(&News::Refused(dimm, 1));
    let text = open.failure();
    assert!(
        text.starts_with("the guest does not take 256 MiB at 0x100000000 (failure, _OST status 0x1): Linux needs"),
        "{text}"
    );
    assert_eq!(open.direction.outcome(&open.done), "the guest took none");
    assert_eq!(open.direction.outcome(&[dimm, dimm]), "the guest took 512 MiB");
    assert_eq!(Direction::Remove.outcome(&[dimm]), "the guest gave back 256 MiB");
}

#[test]
fn sizes_are_counted_whole() {
    let (meters, world) = (MemoryMeters::default(), World::new());
    let gaps: Vec<_> = (0..3).map(|index| (ROOM.start + 2 * index * BLOCK, BLOCK)).collect();
    let mut sizing = Sizing::plan(&world.known, BOOT, BOOT + 3 * BLOCK, &gaps).expect("there is room");
    let [first, second, _] = sizing.waiting[..] else {
        panic!("one memory device a gap: {sizing:?}");
    };
    sizing.hear(&News::Taken(first));
    sizing.hear(&News::Refused(second, 1));
    count_all(&meters, &sizing, Outcome::Replaced);
    let counted: Vec<_> = meters.changes().into_iter().filter(|change| change.2 > 0).collect();
    let all = [("add", "done", 1), ("add", "refused", 1), ("add", "replaced", 1)];
    assert_eq!(counted, all);
}

#[test]
fn targets_are_checked() {
    let room = 8 * BLOCK + 4096;
    assert!(check_target(BOOT, BOOT, room).is_ok() && check_target(BOOT + 8 * BLOCK, BOOT, room).is_ok());
    for (target, words) in [
        (BOOT - BLOCK, "between 1073741824"),
        (BOOT + 9 * BLOCK, "2147483648 (hotplug_size)"),
        (u64::MAX, "18446744073709551615"),
        (BOOT + BLOCK / 2, "multiple of 134217728"),
    ] {
        let error = check_target(target, BOOT, room).expect_err("refused");
        assert_eq!(error.status(), 400);
        assert!(error.to_string().contains(words), "{error}");
    }
}

proptest! {
    /// Whatever is asked for and whatever the guest does, both sides agree on what there is, and a willing guest gets where it should.
    #[test]
    fn host_and_guest_agree(steps in proptest::collection::vec((0u64..10, 0u8..6), 0..60)) {
        let mut world = World::new();
        for (blocks, what) in steps {
            match what {
                0 | 1 => drop(world.resize(BOOT + blocks * BLOCK)),
                2 | 3 => drop(world.guest(true)),
                4 => drop(world.guest(false)),
                _ => {
                    // It gives back what nobody asked for.
                    let slot = (blocks % 4) as u32;
                    world.used.remove(&slot);
                    world.memory.write(0x24 + 0x20 * u64::from(slot), &1u32.to_le_bytes()).expect("a register");
                }
            }
            world.look();
        }
        while world.guest(true) {
            world.look();
        }
        prop_assert!(world.open.is_none());
    }
}
