//! What is open between the guest and whoever wants another number of processors: no threads, no KVM, no clock.

use std::time::Duration;

use triarch_legacy::{CpuHotplug, CpuSlot, Removal};

use crate::changes::Direction;

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

/// Processors that all go the same way, from what the guest is asked for to what came of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Side {
    /// Those of which nothing was heard yet.
    pub(super) waiting: Vec<u32>,
    /// Those of which the guest did what it was asked.
    pub(super) done: Vec<u32>,
    /// Those of which it did not want to, and the status of its `_OST`.
    pub(super) refused: Vec<(u32, u32)>,
}

impl Side {
    fn total(&self) -> usize {
        self.waiting.len() + self.done.len() + self.refused.len()
    }

    fn end(&mut self, index: u32, refusal: Option<u32>) {
        let Some(at) = self.waiting.iter().position(|waiting| *waiting == index) else {
            return;
        };
        self.waiting.remove(at);
        match refusal {
            None => self.done.push(index),
            Some(status) => self.refused.push((index, status)),
        }
    }

    /// What the guest `did`, if it was asked for anything.
    fn outcome(&self, did: &str) -> Option<String> {
        let mut done = self.done.clone();
        done.sort_unstable();
        match (self.total(), done.as_slice()) {
            (0, _) => None,
            (_, []) => Some(format!("the guest {did} none")),
            (_, done) => Some(format!("the guest {did} {}", listed(done))),
        }
    }

    /// What the guest `does_not` want to do, if that is so.
    fn refusal(&self, does_not: &str) -> Option<String> {
        let refused = self.refused.iter();
        let reasons: Vec<_> = refused
            .map(|(index, status)| format!("vCPU {index} ({})", status_name(*status)))
            .collect();
        (!reasons.is_empty()).then(|| format!("the guest {does_not} {}", reasons.join(", ")))
    }

    /// Whether there is something in `slots` that the guest was to hear and did not.
    fn is_deaf(&self, slots: &[CpuSlot]) -> bool {
        let mut waiting = self.waiting.iter();
        waiting.any(|index| slots.get(*index as usize).is_some_and(|slot| slot.unheard))
    }
}

/// A resize, from what it asks for to what came of it. It is over when the guest runs as many processors as it should, or has said that
/// it does not want to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sizing {
    /// How many processors the guest should have.
    pub(super) target: u32,
    /// Those the guest gets now and did not have.
    pub(super) added: Vec<u32>,
    /// Those taken back before the guest knew of them.
    pub(super) withdrawn: Vec<u32>,
    /// Those the guest should start: new ones, and those it has and never started.
    pub(super) coming: Side,
    /// Those it should give back.
    pub(super) going: Side,
}

impl Sizing {
    /// What has to change to get from `slots` to `target` processors: lowest first when they come, highest first when they go.
    pub(super) fn plan(slots: &[CpuSlot], target: u32) -> Self {
        let indexes = |wanted: fn(&CpuSlot) -> bool| {
            let numbered = (0u32..).zip(slots);
            numbered.filter(move |(_, slot)| wanted(slot)).map(|(index, _)| index)
        };
        let mut given: Vec<u32> = indexes(|slot| slot.present).collect();
        let surplus = given.len().saturating_sub(target as usize);
        let lack = (target as usize).saturating_sub(given.len());
        given.reverse();
        // What the guest does not use is what it gives back most easily.
        given.sort_by_key(|index| slots.get(*index as usize).is_some_and(|slot| slot.started));
        given.truncate(surplus);
        let added: Vec<u32> = indexes(|slot| !slot.present).take(lack).collect();
        let idle = indexes(|slot| slot.present && !slot.started).filter(|index| !given.contains(index));
        let coming = idle.chain(added.iter().copied()).collect();
        let side = |waiting| Side {
            waiting,
            ..Side::default()
        };
        Self {
            target,
            added,
            withdrawn: Vec::new(),
            coming: side(coming),
            going: side(given),
        }
    }

    /// Asks the guest. What it does not know of is taken from it at once, and is found to be gone at the next look.
    pub(super) fn ask(&mut self, cpus: &CpuHotplug) {
        let withdrawn = &mut self.withdrawn;
        self.going.waiting.retain(|index| match cpus.ask_back(*index) {
            Removal::Asked => true,
            Removal::Withdrawn => {
                withdrawn.push(*index);
                false
            }
        });
        withdrawn.sort_unstable();
        self.coming.waiting.iter().for_each(|index| cpus.offer(*index));
    }

    /// Both ways, with what is asked of the guest and what was done without it.
    pub(super) fn sides(&self) -> [(Direction, &Side, usize); 2] {
        let withdrawn = self.withdrawn.len();
        [
            (Direction::Add, &self.coming, self.coming.done.len()),
            (Direction::Remove, &self.going, self.going.done.len() + withdrawn),
        ]
    }

    /// Whether there is anything to do.
    pub(super) fn is_empty(&self) -> bool {
        self.total() == 0
    }

    /// Processors it is about.
    pub(super) fn total(&self) -> usize {
        self.withdrawn.len() + self.coming.total() + self.going.total()
    }

    /// How many of them are where they should be.
    pub(super) fn done(&self) -> usize {
        self.withdrawn.len() + self.coming.done.len() + self.going.done.len()
    }

    /// Whether everything was answered.
    pub(super) fn is_over(&self) -> bool {
        self.coming.waiting.is_empty() && self.going.waiting.is_empty()
    }

    /// Takes note of what happened.
    pub(super) fn hear(&mut self, news: &News) {
        match *news {
            News::Started(index) => self.coming.end(index, None),
            News::Gone(index) => {
                self.going.end(index, None);
                // Given back without having been started: as good as refused.
                self.coming.end(index, Some(0));
            }
            News::Refused(index, status) => {
                self.going.end(index, Some(status));
                self.coming.end(index, Some(status));
            }
        }
    }

    /// What is under way.
    pub(super) fn phase(&self) -> &'static str {
        match (self.going.waiting.is_empty(), self.coming.waiting.is_empty()) {
            (true, _) => "the guest has to start vCPUs",
            (false, true) => "the guest has to give back vCPUs",
            (false, false) => "the guest has to give back vCPUs and to start others",
        }
    }

    /// What came of it.
    pub(super) fn outcome(&self) -> String {
        let withdrawn = match self.withdrawn.as_slice() {
            [] => None,
            [one] => Some(format!("vCPU {one} was taken back before the guest saw it")),
            more => Some(format!("{} were taken back before the guest saw them", listed(more))),
        };
        let parts = [
            withdrawn,
            self.going.outcome("gave back"),
            self.coming.outcome("started"),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join("; ")
    }

    /// What the guest refused, if it did.
    fn refusals(&self) -> [Option<String>; 2] {
        [
            self.going.refusal("does not give back"),
            self.coming.refusal("does not take"),
        ]
    }

    /// Why it failed, when everything was answered; `None` if it did not.
    pub(super) fn failure(&self) -> Option<String> {
        let [going, coming] = self.refusals();
        let coming = coming.map(|coming| format!("{coming}: {}", triarch_arch::CPU_HOTPLUG_NEEDS));
        let reasons: Vec<_> = [going, coming].into_iter().flatten().collect();
        (!reasons.is_empty()).then(|| reasons.join("; "))
    }

    /// What did not happen in time. `slots` is how things stand.
    pub(super) fn late(&self, slots: &[CpuSlot], patience: Duration) -> String {
        let seconds = patience.as_secs();
        let needs = triarch_arch::CPU_HOTPLUG_NEEDS;
        let mut reasons = Vec::new();
        if !self.going.waiting.is_empty() {
            let open = listed(&self.going.waiting);
            reasons.push(match self.going.is_deaf(slots) {
                true => format!("the guest did not hear within {seconds} s that it should give back {open}"),
                false => format!("the guest did not give back {open} within {seconds} s"),
            });
        }
        if let Some((_, more)) = self.coming.waiting.split_first() {
            let open = listed(&self.coming.waiting);
            let them = if more.is_empty() { "it" } else { "them" };
            reasons.push(match self.coming.is_deaf(slots) {
                true => format!(
                    "the guest did not look at {open} within {seconds} s: it is not up yet or cannot add CPUs ({needs})"
                ),
                false => format!(
                    "the guest has {open} and did not bring {them} online within {seconds} s, which it still can ({needs})"
                ),
            });
        }
        reasons.extend(self.refusals().into_iter().flatten());
        reasons.join("; ")
    }
}

/// `vCPU 2`, `vCPUs 2, 3`.
pub(super) fn listed(indexes: &[u32]) -> String {
    let numbers: Vec<_> = indexes.iter().map(ToString::to_string).collect();
    let s = if indexes.len() == 1 { "" } else { "s" };
    format!("vCPU{s} {}", numbers.join(", "))
}

/// What a status of `_OST` means (ACPI 6.5, 6.3.5); that of a processor that was given back without being asked for is 0.
pub(crate) fn status_name(status: u32) -> String {
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
