//! Memory that comes and goes: a register block that the methods of `\_SB.MHPC` use (triarch-tables, `acpi/memory.rs`).
//!
//! The registers are those of `registers.rs`, 0x20 bytes a slot. Its status is `_STA` of the memory device in it, and it has four more:
//!
//! | offset | access | register |
//! |---|---|---|
//! | 0x20 + 0x20 n + 0x10, 0x14 | read | first address: lower and upper half |
//! | 0x20 + 0x20 n + 0x18, 0x1c | read | bytes: lower and upper half |

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use triarch_device_core::{AccessError, BusDevice};

use super::Removal;
use super::registers::{self, Line, Notice, Slots, THERE, Talk};
use crate::{Ged, GedEvents};

/// Where a memory device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryPlace {
    /// Its first address (GPA).
    pub start: u64,
    /// Its bytes.
    pub size: u64,
}

/// What is saved of a slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySlotStateV1 {
    /// The memory that the guest has there.
    pub place: Option<MemoryPlace>,
    /// The guest may know that it is there.
    pub seen: bool,
    /// The guest found it by itself, before it heard of it.
    pub found: bool,
    /// The guest uses it.
    pub taken: bool,
    /// What the guest has not heard.
    pub notice: Option<Notice>,
    /// It was asked back, and the guest has not answered.
    pub asked_back: bool,
    /// First argument of the last `_OST`.
    pub event: u32,
}

/// What the device saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugStateV1 {
    /// Every slot, in their order.
    pub slots: Vec<MemorySlotStateV1>,
}

/// Why a state cannot be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum MemoryHotplugRestoreError {
    /// Another machine.
    #[error("the state has {found} memory slots, the machine has {expected}")]
    Count {
        /// Slots in the state.
        found: usize,
        /// Slots of the machine.
        expected: usize,
    },
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    place: Option<MemoryPlace>,
    seen: bool,
    found: bool,
    taken: bool,
    talk: Talk,
    /// What the guest gave back, until somebody looks.
    gone: Option<MemoryPlace>,
}

/// How a slot stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySlot {
    /// The memory that the guest has there.
    pub place: Option<MemoryPlace>,
    /// The guest may know of it: it took the notice, or looked.
    pub seen: bool,
    /// The guest said that it uses it, or found it by itself.
    pub taken: bool,
    /// The guest has not taken the last notice.
    pub unheard: bool,
    /// What the guest answered to the last notice, if that was a refusal: the status of `_OST` (ACPI 6.5, 6.3.5). Told once.
    pub refusal: Option<u32>,
    /// What the guest gave back. Told once.
    pub gone: Option<MemoryPlace>,
}

/// The slots of a guest for memory devices, as its ACPI methods see them.
pub struct MemoryHotplug {
    slots: Mutex<Vec<Slot>>,
    line: Line,
}

impl MemoryHotplug {
    /// Bytes of the registers of a machine with so many slots.
    pub fn size(slots: u32) -> u64 {
        registers::size::<Self>(slots)
    }

    /// Empty slots; notices go through `events`. `changed` is called on the vCPU thread that did something of interest; it must return at
    /// once.
    pub fn new(slots: u32, events: Arc<Ged>, changed: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            slots: Mutex::new((0..slots).map(|_| Slot::default()).collect()),
            line: Line::new(Some(events), GedEvents::MEMORY, changed),
        }
    }

    /// How many slots there are.
    pub fn count(&self) -> u32 {
        self.lock().len() as u32
    }

    /// Puts in place what was saved. Notices the guest has not taken are told again, and so is what happened to the memory.
    pub fn restore(&self, state: &MemoryHotplugStateV1) -> Result<(), MemoryHotplugRestoreError> {
        let mut slots = self.lock();
        if state.slots.len() != slots.len() {
            return Err(MemoryHotplugRestoreError::Count {
                found: state.slots.len(),
                expected: slots.len(),
            });
        }
        for (slot, state) in slots.iter_mut().zip(&state.slots) {
            *slot = Slot {
                place: state.place,
                seen: state.seen,
                found: state.found,
                taken: state.taken,
                talk: Talk::restored(state.notice, state.asked_back, state.event),
                gone: None,
            };
        }
        drop(slots);
        self.remind();
        self.line.guest.changed();
        Ok(())
    }

    /// What is to be saved.
    pub fn state(&self) -> MemoryHotplugStateV1 {
        let slot = |slot: &Slot| MemorySlotStateV1 {
            place: slot.place,
            seen: slot.seen,
            found: slot.found,
            taken: slot.taken,
            notice: slot.talk.notice,
            asked_back: slot.talk.asked_back,
            event: slot.talk.event,
        };
        MemoryHotplugStateV1 {
            slots: self.lock().iter().map(slot).collect(),
        }
    }

    /// How all slots stand. What happens from now on is told again.
    pub fn slots(&self) -> Vec<MemorySlot> {
        self.line.guest.looked();
        let view = |slot: &mut Slot| MemorySlot {
            place: slot.place,
            seen: slot.seen,
            taken: slot.taken,
            unheard: slot.talk.notice.is_some(),
            refusal: slot.talk.refusal.take(),
            gone: slot.gone.take(),
        };
        self.lock().iter_mut().map(view).collect()
    }

    /// Puts memory at `place` into slot `index`, which must be empty, before the guest runs: it finds it there when it starts.
    pub fn put(&self, index: usize, place: MemoryPlace) {
        if let Some(slot) = self.lock().get_mut(index) {
            *slot = Slot {
                place: Some(place),
                seen: true,
                found: true,
                taken: true,
                ..Slot::default()
            };
        }
    }

    /// Gives the guest the memory at `place`, which is there by now, in slot `index`, which must be empty.
    pub fn offer(&self, index: usize, place: MemoryPlace) {
        if let Some(slot) = self.lock().get_mut(index) {
            *slot = Slot {
                place: Some(place),
                ..Slot::default()
            };
        }
        self.offer_again(index);
    }

    /// Tells the guest again of the memory in slot `index`.
    pub fn offer_again(&self, index: usize) {
        match self.lock().get_mut(index) {
            Some(slot) if slot.place.is_some() => slot.talk.offer(),
            _ => return,
        }
        self.line.notify();
    }

    /// Asks the guest for the memory in slot `index`.
    pub fn ask_back(&self, index: usize) -> Removal {
        {
            let mut slots = self.lock();
            let Some(slot) = slots.get_mut(index) else {
                return Removal::Withdrawn;
            };
            if slot.place.is_none() || !slot.seen {
                slot.withdraw();
                return Removal::Withdrawn;
            }
            slot.talk.ask_back();
        }
        self.line.notify();
        Removal::Asked
    }

    /// Does not want the memory in slot `index` back any more. The guest may have heard that it was wanted, and can still give it.
    pub fn leave(&self, index: usize) {
        if let Some(slot) = self.lock().get_mut(index) {
            slot.talk.leave();
        }
    }

    /// Takes the memory out of slot `index`, which the guest does not use: it said that it does not take it.
    pub fn withdraw(&self, index: usize) {
        if let Some(slot) = self.lock().get_mut(index) {
            slot.withdraw();
        }
    }

    /// Interrupts the guest once more if there is something it has not heard: before its driver is there, an interrupt is lost.
    pub fn remind(&self) {
        self.line.remind(self.lock().iter().map(|slot| &slot.talk));
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    fn withdraw(&mut self) {
        let gone = self.place.or(self.gone);
        *self = Self {
            gone,
            ..Self::default()
        };
    }
}

impl Slots for MemoryHotplug {
    const STRIDE: u64 = 0x20;

    fn count(&self) -> u32 {
        Self::count(self)
    }

    fn take_notice(&self) -> u32 {
        let mut slots = self.lock();
        let talks = slots.iter_mut().map(|slot| &mut slot.talk).enumerate();
        let Some((index, notice)) = registers::take_notice(talks) else {
            return 0;
        };
        if let Some(slot) = slots.get_mut(index) {
            slot.seen |= slot.place.is_some();
        }
        notice
    }

    fn status(&self, slot: usize) -> u32 {
        match self.lock().get_mut(slot) {
            Some(slot) if slot.place.is_some() => {
                slot.seen = true;
                THERE
            }
            _ => 0,
        }
    }

    /// Also without having been asked.
    fn eject(&self, slot: usize) {
        match self.lock().get_mut(slot) {
            Some(slot) if slot.place.is_some() => slot.withdraw(),
            _ => return,
        }
        self.line.guest.changed();
    }

    fn event(&self, slot: usize, event: u32) {
        if let Some(slot) = self.lock().get_mut(slot) {
            slot.talk.event = event;
        }
    }

    fn answer(&self, slot: usize, status: u32) {
        {
            let mut slots = self.lock();
            let Some(slot) = slots.get_mut(slot).filter(|slot| slot.place.is_some()) else {
                return;
            };
            let arriving = !slot.taken;
            if arriving && slot.talk.accepts(status) {
                slot.taken = true;
            } else if !slot.talk.answer(status, arriving) {
                return;
            } else if arriving && slot.found {
                // One that has it already says that it failed to add it.
                slot.taken = true;
                slot.talk.refusal = None;
            }
        }
        self.line.guest.changed();
    }

    /// What `_CRS` tells. Who reads it before the notice was taken has found the memory without it: a kernel that boots looks at all
    /// devices.
    fn more(&self, slot: usize, offset: u64) -> u32 {
        let mut slots = self.lock();
        let Some(slot) = slots.get_mut(slot) else { return 0 };
        let Some(MemoryPlace { start, size }) = slot.place else {
            return 0;
        };
        slot.seen = true;
        slot.found |= slot.talk.notice == Some(Notice::Check);
        match offset {
            0x10 => start as u32,
            0x14 => (start >> 32) as u32,
            0x18 => size as u32,
            0x1c => (size >> 32) as u32,
            _ => 0,
        }
    }
}

impl BusDevice for MemoryHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        registers::read(self, offset, data)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        registers::write(self, offset, data)
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
