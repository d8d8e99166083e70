//! What all register blocks of things that come and go have in common: how they are laid out, what is said of a slot in both
//! directions, and who hears of it.
//!
//! All registers have 32 bits and are accessed as such. What is not listed reads as zero and ignores writes. `S` is the block's stride.
//!
//! | offset | access | register |
//! |---|---|---|
//! | 0x00 | read | number of slots |
//! | 0x04 | read | takes the next notice: bits 7 to 0 the value for `Notify`, bits 31 to 8 the slot; 0: there is none |
//! | S + S n + 0x0 | read | slot n: its status |
//! | S + S n + 0x4 | write | `_EJ0`: 1 gives back what is in the slot |
//! | S + S n + 0x8 | write | `_OST`, first argument: what the next is about |
//! | S + S n + 0xc | write | `_OST`, second argument: what came of it |
//! | S + S n + 0x10 on | read | what else the block has for a slot |
//!
//! Each slot has registers of its own, so there is no selector, hence no lock in the guest and no state between two accesses.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use triarch_device_core::{AccessError, Observed};

use crate::{Ged, GedEvents};

/// Status of a slot with something in it: present, enabled, shown, functioning (ACPI 6.5, 6.3.7).
pub(super) const THERE: u32 = 0xf;

/// First arguments of `_OST` that no notice of ours has (ACPI 6.5, 6.3.5): an ejection that the guest began.
const EJECTION: u32 = 0x103;
/// Second arguments of `_OST` that decide nothing: success is told by other means, and these two say that it goes on.
const SUCCESS: u32 = 0;
const INSERTING: u32 = 0x80;
const EJECTING: u32 = 0x84;

/// What a guest is to be told of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// There is something in it.
    Check,
    /// What is in it should be given back.
    Eject,
    /// What was in it was taken away.
    Vanished,
}

impl Notice {
    /// The value for `Notify` (ACPI 6.5, 5.6.6): device check, eject request, bus check.
    fn value(self) -> u32 {
        match self {
            Self::Check => 1,
            Self::Eject => 3,
            Self::Vanished => 0,
        }
    }

    /// Of which notice a first argument of `_OST` speaks.
    fn of_event(event: u32) -> Option<Self> {
        match event {
            0 | 1 => Some(Self::Check),
            3 | EJECTION => Some(Self::Eject),
            _ => None,
        }
    }
}

/// What is open between the guest and whoever wants something of a slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Talk {
    /// What the guest has not heard.
    pub(super) notice: Option<Notice>,
    /// The guest was asked for what is in the slot, and neither gave it nor refused.
    pub(super) asked_back: bool,
    /// First argument of the last `_OST`.
    pub(super) event: u32,
    /// Status of an `_OST` that refused, until it was told.
    pub(super) refusal: Option<u32>,
}

impl Talk {
    /// As it was saved. A refusal was told before.
    pub(super) fn restored(notice: Option<Notice>, asked_back: bool, event: u32) -> Self {
        Self {
            notice,
            asked_back,
            event,
            refusal: None,
        }
    }

    /// The guest should look at what is in the slot.
    pub(super) fn offer(&mut self) {
        *self = Self {
            notice: Some(Notice::Check),
            event: self.event,
            ..Self::default()
        };
    }

    /// The guest should give back what is in the slot.
    pub(super) fn ask_back(&mut self) {
        *self = Self {
            notice: Some(Notice::Eject),
            asked_back: true,
            event: self.event,
            refusal: None,
        };
    }

    /// The guest need not give it back any more. It may have heard that it should, and can still do so.
    pub(super) fn leave(&mut self) {
        self.asked_back = false;
        self.notice = self.notice.filter(|notice| *notice != Notice::Eject);
    }

    /// Whether the second argument of an `_OST` says that the guest has taken what it was offered into use.
    pub(super) fn accepts(&self, status: u32) -> bool {
        Notice::of_event(self.event) == Some(Notice::Check) && !self.asked_back && status == SUCCESS
    }

    /// The second argument of an `_OST`; `arriving` while the guest has not taken what it was offered into use. Returns whether it
    /// refuses what it was asked for: nothing else is of interest.
    pub(super) fn answer(&mut self, status: u32, arriving: bool) -> bool {
        let refused = match Notice::of_event(self.event) {
            Some(Notice::Eject) => self.asked_back && !matches!(status, SUCCESS | EJECTING),
            Some(_) => arriving && !self.asked_back && !matches!(status, SUCCESS | INSERTING),
            None => false,
        };
        if refused {
            self.asked_back = false;
            self.refusal = Some(status);
        }
        refused
    }
}

/// Takes the first notice that there is in `talks`: the slot, and the value of the register that hands notices out.
pub(super) fn take_notice<'a>(talks: impl Iterator<Item = (usize, &'a mut Talk)>) -> Option<(usize, u32)> {
    for (slot, talk) in talks {
        if let Some(notice) = talk.notice.take() {
            return Some((slot, (slot as u32) << 8 | notice.value()));
        }
    }
    None
}

/// How the two sides of a block hear of each other.
pub(super) struct Line {
    /// Where interrupts come from; a machine without ACPI has no such device, and its guest hears of nothing.
    events: Option<Arc<Ged>>,
    bit: GedEvents,
    /// What the guest did.
    pub(super) guest: Observed,
}

impl Line {
    pub(super) fn new(events: Option<Arc<Ged>>, bit: GedEvents, changed: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            events,
            bit,
            guest: Observed::new(Box::new(changed)),
        }
    }

    /// Interrupts the guest.
    pub(super) fn notify(&self) {
        if let Some(events) = &self.events {
            events.notify(self.bit);
        }
    }

    /// Interrupts the guest once more if there is something in `talks` that it has not heard: before its driver is there, an interrupt is
    /// lost. Returns whether there is.
    pub(super) fn remind<'a>(&self, mut talks: impl Iterator<Item = &'a Talk>) -> bool {
        let unheard = talks.any(|talk| talk.notice.is_some());
        if unheard {
            self.notify();
        }
        unheard
    }
}

/// The slots behind a block of registers.
pub(super) trait Slots {
    /// Bytes of the registers that all slots share, and of those of each: 0x10, or more if there is more than status and answers.
    const STRIDE: u64 = 0x10;

    /// How many there are.
    fn count(&self) -> u32;
    /// The next notice as its register hands it out, which the guest has heard then.
    fn take_notice(&self) -> u32;
    /// Status of `slot`, which may be none.
    fn status(&self, slot: usize) -> u32;
    /// `_EJ0` of `slot`.
    fn eject(&self, slot: usize);
    /// First argument of an `_OST` of `slot`.
    fn event(&self, slot: usize, event: u32);
    /// Its second argument.
    fn answer(&self, slot: usize, status: u32);
    /// What else the block has for `slot`, by the offset in the slot's registers.
    fn more(&self, _slot: usize, _offset: u64) -> u32 {
        0
    }
}

/// Bytes of the registers of `count` slots.
pub(super) const fn size<S: Slots>(count: u32) -> u64 {
    S::STRIDE * (count as u64 + 1)
}

/// A read of the guest.
pub(super) fn read<S: Slots>(slots: &S, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
    if data.len() != 4 || !offset.is_multiple_of(4) {
        return Err(AccessError::BadAccess);
    }
    let value = match (offset, register::<S>(offset)) {
        (0x0, _) => slots.count(),
        (0x4, _) => slots.take_notice(),
        (_, Some((slot, 0x0))) => slots.status(slot),
        (_, Some((slot, offset))) => slots.more(slot, offset),
        (_, None) => 0,
    };
    data.copy_from_slice(&value.to_le_bytes());
    Ok(())
}

/// A write of the guest.
pub(super) fn write<S: Slots>(slots: &S, offset: u64, data: &[u8]) -> Result<(), AccessError> {
    let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else {
        return Err(AccessError::BadAccess);
    };
    if !offset.is_multiple_of(4) {
        return Err(AccessError::BadAccess);
    }
    match register::<S>(offset) {
        Some((slot, 0x4)) if value == 1 => slots.eject(slot),
        Some((slot, 0x8)) => slots.event(slot, value),
        Some((slot, 0xc)) => slots.answer(slot, value),
        _ => {}
    }
    Ok(())
}

/// The slot whose register is at `offset`, and the register's offset from the slot's first.
fn register<S: Slots>(offset: u64) -> Option<(usize, u64)> {
    let slot = (offset / S::STRIDE).checked_sub(1)?;
    Some((usize::try_from(slot).ok()?, offset % S::STRIDE))
}
