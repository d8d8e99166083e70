//! What is open between the guest and whoever wants another number of processors: no threads, no KVM, no clock.

use std::time::Duration;

use triarch_legacy::{CpuHotplug, CpuSlot, Removal};

/// Which way a resize goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// The guest gets processors.
    Add,
    /// It should give some back.
    Remove,
}

impl Direction {
    /// What the job does.
    pub(super) fn phase(self) -> &'static str {
        match self {
            Self::Add => "the guest has to start vCPUs",
            Self::Remove => "the guest has to give back vCPUs",
        }
    }

    /// What the job did.
    pub(super) fn outcome(self, done: &[u32]) -> String {
        let did = match self {
            Self::Add => "started",
            Self::Remove => "gave back",
        };
        match done {
            [] => format!("the guest {did} none"),
            _ => {
                let mut done = done.to_vec();
                done.sort_unstable();
                format!("the guest {did} {}", listed(&done))
            }
        }
    }
}

/// What a guest did about a processor, or what became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// It runs.
    Started(u32),
    /// The guest does not have it any more.
    Gone(u32),
    /// The guest does not want to do what it was asked, with this status of `_OST`.
    Refused(u32, u32),
}

/// What happened between two looks.
pub(super) fn news(before: &[CpuSlot], after: &[CpuSlot]) -> Vec<News> {
    let mut news = Vec::new();
    for (index, (old, new)) in (0u32..).zip(before.iter().zip(after)) {
        if new.started && !old.started {
            news.push(News::Started(index));
        }
        if old.present && !new.present {
            news.push(News::Gone(index));
        }
        if let Some(status) = new.refusal {
            news.push(News::Refused(index, status));
        }
    }
    news
}

/// A resize, from what it asks for to what came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sizing {
    /// How many processors the guest should have.
    pub(super) target: u32,
    /// Which way it goes.
    pub(super) direction: Direction,
    /// Those the guest gets now and did not have.
    pub(super) added: Vec<u32>,
    /// Those of which nothing was heard yet.
    pub(super) waiting: Vec<u32>,
    /// Those of which the guest did what it was asked.
    pub(super) done: Vec<u32>,
    /// Those of which it did not want to, and the status of its `_OST`.
    pub(super) refused: Vec<(u32, u32)>,
}

impl Sizing {
    /// What has to change to get from `slots` to `target` processors: lowest first when they come, highest first when they go. Those
    /// that the guest has and never started are offered again unless it should give some back.
    pub(super) fn plan(slots: &[CpuSlot], target: u32) -> Self {
        let indexes = |wanted: fn(&CpuSlot) -> bool| {
            let numbered = (0u32..).zip(slots);
            numbered.filter(move |(_, slot)| wanted(slot)).map(|(index, _)| index)
        };
        let present = indexes(|slot| slot.present).count() as u32;
        let mut sizing = Self {
            target,
            direction: Direction::Add,
            added: Vec::new(),
            waiting: Vec::new(),
            done: Vec::new(),
            refused: Vec::new(),
        };
        if target < present {
            sizing.direction = Direction::Remove;
            let mut given: Vec<u32> = indexes(|slot| slot.present).collect();
            given.reverse();
            // What the guest does not use is what it gives back most easily.
            given.sort_by_key(|index| slots.get(*index as usize).is_some_and(|slot| slot.started));
            given.truncate((present - target) as usize);
            sizing.waiting = given;
        } else {
            let absent = indexes(|slot| !slot.present);
            sizing.added = absent.take((target - present) as usize).collect();
            let idle = indexes(|slot| slot.present && !slot.started);
            sizing.waiting = idle.chain(sizing.added.iter().copied()).collect();
        }
        sizing
    }

    /// Asks the guest. What it does not know of is taken from it at once.
    pub(super) fn ask(&mut self, cpus: &CpuHotplug) {
        match self.direction {
            Direction::Add => self.waiting.iter().for_each(|index| cpus.offer(*index)),
            // Those that are withdrawn are found to be gone at the next look.
            Direction::Remove => self.waiting.iter().for_each(|index| match cpus.ask_back(*index) {
                Removal::Asked | Removal::Withdrawn => {}
            }),
        }
    }

    /// Processors it is about.
    pub(super) fn total(&self) -> usize {
        self.waiting.len() + self.done.len() + self.refused.len()
    }

    /// Takes note of what happened.
    pub(super) fn hear(&mut self, news: &News) {
        let (index, refusal) = match (*news, self.direction) {
            (News::Started(index), Direction::Add) | (News::Gone(index), Direction::Remove) => (index, None),
            // Given back without having been started: as good as refused.
            (News::Gone(index), Direction::Add) => (index, Some(0)),
            (News::Refused(index, status), _) => (index, Some(status)),
            (News::Started(_), Direction::Remove) => return,
        };
        let Some(at) = self.waiting.iter().position(|waiting| *waiting == index) else {
            return;
        };
        self.waiting.remove(at);
        match refusal {
            None => self.done.push(index),
            Some(status) => self.refused.push((index, status)),
        }
    }

    /// What the guest refused.
    pub(super) fn refusal(&self) -> String {
        let what = match self.direction {
            Direction::Add => "does not take",
            Direction::Remove => "does not give back",
        };
        let refused = self.refused.iter();
        let reasons: Vec<_> = refused
            .map(|(index, status)| format!("vCPU {index} ({})", status_name(*status)))
            .collect();
        format!("the guest {what} {}", reasons.join(", "))
    }

    /// Why it failed, when everything was answered.
    pub(super) fn failure(&self) -> String {
        let refusal = self.refusal();
        match self.direction {
            Direction::Add => format!("{refusal}: {}", triarch_arch::CPU_HOTPLUG_NEEDS),
            Direction::Remove => refusal,
        }
    }

    /// What did not happen in time. `slots` is how things stand.
    pub(super) fn late(&self, slots: &[CpuSlot], patience: Duration) -> String {
        let seconds = patience.as_secs();
        let open = listed(&self.waiting);
        let deaf = self
            .waiting
            .iter()
            .any(|index| slots.get(*index as usize).is_some_and(|slot| slot.unheard));
        let mut text = match (self.direction, deaf) {
            (Direction::Add, true) => format!(
                "the guest did not look at {open} within {seconds} s: it is not up yet or cannot add CPUs ({})",
                triarch_arch::CPU_HOTPLUG_NEEDS
            ),
            (Direction::Add, false) => format!(
                "the guest has {open} and did not bring them online within {seconds} s; they can still be started ({})",
                triarch_arch::CPU_HOTPLUG_NEEDS
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

/// `vCPU 2`, `vCPUs 2, 3`.
pub(super) fn listed(indexes: &[u32]) -> String {
    let numbers: Vec<_> = indexes.iter().map(ToString::to_string).collect();
    let s = if indexes.len() == 1 { "" } else { "s" };
    format!("vCPU{s} {}", numbers.join(", "))
}

/// What a status of `_OST` means (ACPI 6.5, 6.3.5); that of a processor that was given back without being asked for is 0.
pub(super) fn status_name(status: u32) -> String {
    let name = match status {
        0 => return "given back unused".to_owned(),
        1 => "failure",
        2 => "unknown notification",
        0x80 => "not supported",
        0x81 => "in use",
        0x82 => "busy",
        0x83 => "something that depends on it is busy",
        _ => "no reason that ACPI knows",
    };
    format!("{name}, _OST status {status:#x}")
}
