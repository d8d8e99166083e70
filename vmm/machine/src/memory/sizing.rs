//! What is open between the guest and whoever wants another amount of memory: no KVM, no clock.

use std::cmp::Reverse;
use std::time::Duration;

use thiserror::Error;
use triarch_legacy::{MemoryHotplug, MemoryPlace, MemorySlot, Removal};

use crate::changes::Direction;
use crate::cpus::status_name;

/// Memory comes in multiples of this: the block of x86 guests with less than 64 GiB, and of ARM guests with pages of 4 KiB.
pub(super) const BLOCK: u64 = 128 << 20;

/// What a Linux guest needs to take memory.
const NEEDS: &str = "Linux needs CONFIG_ACPI_HOTPLUG_MEMORY, and memory in multiples of its block, which \
                     /sys/devices/system/memory/block_size_bytes tells";

impl Direction {
    /// What the job does.
    pub(super) fn phase(self) -> &'static str {
        match self {
            Self::Add => "the guest has to take memory",
            Self::Remove => "the guest has to give back memory",
        }
    }

    /// What the job did.
    pub(super) fn outcome(self, done: &[Dimm]) -> String {
        let did = match self {
            Self::Add => "took",
            Self::Remove => "gave back",
        };
        match done {
            [] => format!("the guest {did} none"),
            _ => format!("the guest {did} {}", mib(bytes(done))),
        }
    }
}

/// A memory device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dimm {
    pub(super) slot: usize,
    pub(super) place: MemoryPlace,
}

impl Dimm {
    fn name(&self) -> String {
        format!("{} at {:#x}", mib(self.place.size), self.place.start)
    }
}

/// Bytes of all of them.
pub(super) fn bytes(dimms: &[Dimm]) -> u64 {
    dimms.iter().map(|dimm| dimm.place.size).sum()
}

/// `512 MiB`.
pub(super) fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// What a guest did about memory, or what became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// It uses it.
    Taken(Dimm),
    /// It does not have it any more.
    Gone(Dimm),
    /// It does not want to do what it was asked, with this status of `_OST`.
    Refused(Dimm, u32),
}

/// What happened between two looks.
pub(super) fn news(before: &[MemorySlot], after: &[MemorySlot]) -> Vec<News> {
    let mut news = Vec::new();
    for (slot, now) in after.iter().enumerate() {
        let old = before.get(slot);
        if let Some(place) = now.gone {
            news.push(News::Gone(Dimm { slot, place }));
        }
        let Some(place) = now.place else { continue };
        if now.taken && !old.is_some_and(|old| old.taken && old.place == now.place) {
            news.push(News::Taken(Dimm { slot, place }));
        }
        if let Some(status) = now.refusal {
            news.push(News::Refused(Dimm { slot, place }, status));
        }
    }
    news
}

/// Why there is no way to a target.
#[derive(Debug, PartialEq, Eq, Error)]
pub(super) enum Unreachable {
    /// All slots are used.
    #[error("all {0} slots for memory devices are used; give back memory first, or add more of it at once")]
    NoSlot(usize),
    /// What is free does not hold it.
    #[error("there is no room for it behind the guest's memory (hotplug_size)")]
    NoRoom,
    /// Memory devices go as a whole.
    #[error("memory devices are given back as a whole, the last one first, so it can be {}", sizes(.0))]
    Whole(Vec<u64>),
}

fn sizes(possible: &[u64]) -> String {
    let sizes: Vec<_> = possible.iter().map(|size| format!("{size} ({})", mib(*size))).collect();
    sizes.join(", ")
}

/// A resize, from what it asks for to what came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sizing {
    /// How many bytes the guest should have.
    pub(super) target: u64,
    /// Which way it goes.
    pub(super) direction: Direction,
    /// What the guest gets now and did not have.
    pub(super) added: Vec<Dimm>,
    /// That of which nothing was heard yet.
    pub(super) waiting: Vec<Dimm>,
    /// That of which the guest did what it was asked.
    pub(super) done: Vec<Dimm>,
    /// That of which it did not want to, and the status of its `_OST`.
    pub(super) refused: Vec<(Dimm, u32)>,
}

/// The memory devices in `slots`.
pub(super) fn present(slots: &[MemorySlot]) -> impl Iterator<Item = (Dimm, &MemorySlot)> {
    let numbered = slots.iter().enumerate();
    numbered.filter_map(|(index, slot)| slot.place.map(|place| (Dimm { slot: index, place }, slot)))
}

impl Sizing {
    /// What has to change to get from `boot` bytes and what is in `slots` to `target` bytes: lowest addresses of `gaps` (start, length)
    /// first when memory comes, highest first when it goes. What the guest has and never took is offered again unless it should give some
    /// back.
    pub(super) fn plan(slots: &[MemorySlot], boot: u64, target: u64, gaps: &[(u64, u64)]) -> Result<Self, Unreachable> {
        let now = boot + present(slots).map(|(dimm, _)| dimm.place.size).sum::<u64>();
        let mut sizing = Self {
            target,
            direction: Direction::Add,
            added: Vec::new(),
            waiting: Vec::new(),
            done: Vec::new(),
            refused: Vec::new(),
        };
        if target < now {
            sizing.direction = Direction::Remove;
            sizing.waiting = given_back(slots, now, target)?;
            return Ok(sizing);
        }
        let idle = present(slots).filter(|(_, slot)| !slot.taken);
        sizing.waiting = idle.map(|(dimm, _)| dimm).collect();
        let mut free = (0..slots.len()).filter(|slot| slots.get(*slot).is_some_and(|s| s.place.is_none()));
        let mut left = target - now;
        for (start, length) in gaps {
            let size = left.min(length / BLOCK * BLOCK);
            if size == 0 {
                continue;
            }
            let slot = free.next().ok_or(Unreachable::NoSlot(slots.len()))?;
            let place = MemoryPlace { start: *start, size };
            sizing.added.push(Dimm { slot, place });
            left -= size;
        }
        if left > 0 {
            return Err(Unreachable::NoRoom);
        }
        sizing.waiting.extend(&sizing.added);
        Ok(sizing)
    }

    /// Asks the guest, which was asked for `before` already. What it does not know of is taken from it at once.
    pub(super) fn ask(&self, memory: &MemoryHotplug, before: &[Dimm]) {
        for dimm in &self.waiting {
            match self.direction {
                Direction::Add if self.added.contains(dimm) => memory.offer(dimm.slot, dimm.place),
                Direction::Add if before.contains(dimm) => {}
                Direction::Add => memory.offer_again(dimm.slot),
                // What is withdrawn is found to be gone at the next look.
                Direction::Remove => match memory.ask_back(dimm.slot) {
                    Removal::Asked | Removal::Withdrawn => {}
                },
            }
        }
    }

    /// Bytes it is about.
    pub(super) fn total(&self) -> u64 {
        let refused: u64 = self.refused.iter().map(|(dimm, _)| dimm.place.size).sum();
        bytes(&self.waiting) + bytes(&self.done) + refused
    }

    /// Takes note of what happened.
    pub(super) fn hear(&mut self, news: &News) {
        let (dimm, refusal) = match (*news, self.direction) {
            (News::Taken(dimm), Direction::Add) | (News::Gone(dimm), Direction::Remove) => (dimm, None),
            // Given back without having been taken: as good as refused.
            (News::Gone(dimm), Direction::Add) => (dimm, Some(0)),
            (News::Refused(dimm, status), _) => (dimm, Some(status)),
            (News::Taken(_), Direction::Remove) => return,
        };
        let Some(at) = self.waiting.iter().position(|waiting| *waiting == dimm) else {
            return;
        };
        self.waiting.remove(at);
        match refusal {
            None => self.done.push(dimm),
            Some(status) => self.refused.push((dimm, status)),
        }
    }

    /// What the guest refused.
    fn refusal(&self) -> String {
        let what = match self.direction {
            Direction::Add => "does not take",
            Direction::Remove => "does not give back",
        };
        let refused = self.refused.iter();
        let reasons: Vec<_> = refused
            .map(|(dimm, status)| format!("{} ({})", dimm.name(), status_name(*status)))
            .collect();
        format!("the guest {what} {}", reasons.join(", "))
    }

    /// Why it failed, when everything was answered.
    pub(super) fn failure(&self) -> String {
        let refusal = self.refusal();
        match self.direction {
            Direction::Add => format!("{refusal}: {NEEDS}"),
            Direction::Remove => format!("{refusal}: it can give back only what it took as movable memory"),
        }
    }

    /// What did not happen in time. `slots` is how things stand.
    pub(super) fn late(&self, slots: &[MemorySlot], patience: Duration) -> String {
        let seconds = patience.as_secs();
        let open = mib(bytes(&self.waiting));
        let unheard = |dimm: &Dimm| slots.get(dimm.slot).is_some_and(|slot| slot.unheard);
        let mut text = match (self.direction, self.waiting.iter().any(unheard)) {
            (Direction::Add, true) => format!(
                "the guest did not look at {open} within {seconds} s: it is not up yet or cannot add memory ({NEEDS})"
            ),
            (Direction::Add, false) => format!(
                "the guest has {open} and did not say within {seconds} s whether it takes them; it may still do so"
            ),
            (Direction::Remove, true) => {
                format!("the guest did not hear within {seconds} s that it should give back {open}")
            }
            (Direction::Remove, false) => format!("the guest did not give back {open} within {seconds} s"),
        };
        if !self.refused.is_empty() {
            text.push_str("; ");
            text.push_str(&self.refusal());
        }
        text
    }
}

/// What the guest should give back: what it does not use first, then what has the highest addresses.
fn given_back(slots: &[MemorySlot], now: u64, target: u64) -> Result<Vec<Dimm>, Unreachable> {
    let mut order: Vec<_> = present(slots).collect();
    order.sort_by_key(|(dimm, slot)| (slot.taken, Reverse(dimm.place.start)));
    let (mut given, mut possible, mut size) = (Vec::new(), vec![now], now);
    for (dimm, _) in order {
        size -= dimm.place.size;
        if size < target {
            possible.push(size);
            return Err(Unreachable::Whole(possible));
        }
        given.push(dimm);
        possible.push(size);
        if size == target {
            return Ok(given);
        }
    }
    Err(Unreachable::Whole(possible))
}
