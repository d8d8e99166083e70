//! Processors that come and go: a register block that the methods of `\_SB.CPUS` use (triarch-tables, `acpi/cpus.rs`).
//!
//! The registers are those of `registers.rs`, 0x10 bytes a processor. Its status is `_STA`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use triarch_device_core::{AccessError, BusDevice};

use super::registers::{self, Line, Notice, Slots, THERE, Talk};
use crate::{Ged, GedEvents};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Slot {
    present: bool,
    /// The guest may know that it is there.
    seen: bool,
    started: bool,
    /// The guest answered that it has taken it over.
    accepted: bool,
    talk: Talk,
}

/// How a processor stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuSlot {
    /// The guest has it.
    pub present: bool,
    /// The guest may know that it has it: it took the notice, or asked for the status.
    pub seen: bool,
    /// The guest has started it since it got it.
    pub started: bool,
    /// The guest has not taken the last notice.
    pub unheard: bool,
    /// What the guest answered to the last notice, if that was a refusal: the status of `_OST` (ACPI 6.5, 6.3.5). Told once.
    pub refusal: Option<u32>,
}

/// What asking a processor back comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// The guest did not know that it had it, and has it no more.
    Withdrawn,
    /// The guest was asked for it.
    Asked,
}

/// What is fixed about the processors of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuHotplugConfig {
    /// Processors there may ever be.
    pub max: u32,
    /// Those the guest starts with, from the first on.
    pub present: u32,
    /// Those it cannot give back, from the first on.
    pub fixed: u32,
    /// `_STA` of one that the guest does not have.
    pub absent: u8,
}

/// The processors of a guest, as its ACPI methods see them.
pub struct CpuHotplug {
    slots: Mutex<Vec<Slot>>,
    fixed: u32,
    absent: u8,
    line: Line,
}

/// What is saved of a processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuSlotStateV1 {
    /// The guest has it.
    pub present: bool,
    /// The guest may know that it has it.
    pub seen: bool,
    /// The guest has started it.
    pub started: bool,
    /// The guest has said that it took it over.
    pub accepted: bool,
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
pub struct CpuHotplugStateV1 {
    /// Every processor there may be, in their order.
    pub slots: Vec<CpuSlotStateV1>,
}

/// Why a state cannot be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CpuHotplugRestoreError {
    /// Another machine.
    #[error("the state has {found} processors, the machine has {expected}")]
    Count {
        /// Processors in the state.
        found: usize,
        /// Processors of the machine.
        expected: u32,
    },
    /// The guest cannot run without.
    #[error("processor {index}, which every guest of this machine has, is not there")]
    Fixed {
        /// The processor.
        index: usize,
    },
}

impl CpuHotplug {
    /// Bytes of the registers of a machine with at most `max` processors.
    pub fn size(max: u32) -> u64 {
        registers::size::<Self>(max)
    }

    /// Processors as a guest finds them at its start. `changed` is called on the vCPU thread that did something of interest; it must
    /// return at once.
    pub fn new(config: CpuHotplugConfig, events: Option<Arc<Ged>>, changed: impl Fn() + Send + Sync + 'static) -> Self {
        let slot = |index| Slot {
            present: index < config.present,
            seen: index < config.present,
            started: index < config.present,
            ..Slot::default()
        };
        Self {
            slots: Mutex::new((0..config.max).map(slot).collect()),
            fixed: config.fixed,
            absent: config.absent,
            line: Line::new(events, GedEvents::CPUS, changed),
        }
    }

    /// Puts in place what was saved. Notices the guest has not taken are told again, and so is what happened to the processors.
    pub fn restore(&self, state: &CpuHotplugStateV1) -> Result<(), CpuHotplugRestoreError> {
        let mut restored = Vec::with_capacity(state.slots.len());
        for (index, slot) in state.slots.iter().enumerate() {
            if !slot.present && (index as u64) < u64::from(self.fixed) {
                return Err(CpuHotplugRestoreError::Fixed { index });
            }
            restored.push(Slot {
                present: slot.present,
                seen: slot.seen,
                started: slot.started,
                accepted: slot.accepted,
                talk: Talk::restored(slot.notice, slot.asked_back, slot.event),
            });
        }
        let mut slots = self.lock();
        if restored.len() != slots.len() {
            return Err(CpuHotplugRestoreError::Count {
                found: restored.len(),
                expected: slots.len() as u32,
            });
        }
        *slots = restored;
        drop(slots);
        self.remind();
        self.line.guest.changed();
        Ok(())
    }

    /// What is to be saved.
    pub fn state(&self) -> CpuHotplugStateV1 {
        let slot = |slot: &Slot| CpuSlotStateV1 {
            present: slot.present,
            seen: slot.seen,
            started: slot.started,
            accepted: slot.accepted,
            notice: slot.talk.notice,
            asked_back: slot.talk.asked_back,
            event: slot.talk.event,
        };
        CpuHotplugStateV1 {
            slots: self.lock().iter().map(slot).collect(),
        }
    }

    /// How all processors stand. What happens from now on is told again.
    pub fn slots(&self) -> Vec<CpuSlot> {
        self.line.guest.looked();
        let view = |slot: &mut Slot| CpuSlot {
            present: slot.present,
            seen: slot.seen,
            started: slot.started,
            unheard: slot.talk.notice.is_some(),
            refusal: slot.talk.refusal.take(),
        };
        self.lock().iter_mut().map(view).collect()
    }

    /// Processors from the first on that the guest cannot give back.
    pub fn fixed(&self) -> u32 {
        self.fixed
    }

    /// Processors there may ever be.
    pub fn max(&self) -> u32 {
        self.lock().len() as u32
    }

    /// Gives the guest processor `index`, which can run by now, or tells it again of one that it has.
    pub fn offer(&self, index: u32) {
        if let Some(slot) = self.lock().get_mut(index as usize) {
            if !slot.present {
                *slot = Slot::default();
                slot.present = true;
            }
            slot.talk.offer();
        }
        self.line.notify();
    }

    /// Asks the guest for processor `index`.
    pub fn ask_back(&self, index: u32) -> Removal {
        {
            let mut slots = self.lock();
            let Some(slot) = slots.get_mut(index as usize) else {
                return Removal::Withdrawn;
            };
            if !slot.present || !slot.seen && !slot.started {
                *slot = Slot::default();
                return Removal::Withdrawn;
            }
            slot.talk.ask_back();
        }
        self.line.notify();
        Removal::Asked
    }

    /// Does not want processor `index` back any more. The guest may have heard that it was wanted, and can still give it.
    pub fn leave(&self, index: u32) {
        if let Some(slot) = self.lock().get_mut(index as usize) {
            slot.talk.leave();
        }
    }

    /// The guest has started processor `index`.
    pub fn started(&self, index: u32) {
        if let Some(slot) = self.lock().get_mut(index as usize) {
            slot.started = slot.present;
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

impl Slots for CpuHotplug {
    fn count(&self) -> u32 {
        self.max()
    }

    fn take_notice(&self) -> u32 {
        let mut slots = self.lock();
        let talks = slots.iter_mut().map(|slot| &mut slot.talk).enumerate();
        let Some((slot, notice)) = registers::take_notice(talks) else {
            return 0;
        };
        slots[slot].seen |= slots[slot].present;
        notice
    }

    fn status(&self, slot: usize) -> u32 {
        match self.lock().get_mut(slot) {
            Some(slot) if slot.present => {
                slot.seen = true;
                THERE
            }
            _ => self.absent.into(),
        }
    }

    /// Also without having been asked.
    fn eject(&self, slot: usize) {
        match self.lock().get_mut(slot) {
            Some(processor) if processor.present && slot as u64 >= u64::from(self.fixed) => {
                *processor = Slot::default();
            }
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
        let refused = match self.lock().get_mut(slot) {
            Some(slot) if slot.present => {
                // One that is told twice of a processor may answer an error the second time, as Linux 6.1 does, and has it all the same.
                slot.accepted |= matches!(slot.talk.event, 0 | 1) && status == 0;
                slot.talk.answer(status, !slot.started && !slot.accepted)
            }
            _ => false,
        };
        if refused {
            self.line.guest.changed();
        }
    }
}

impl BusDevice for CpuHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        registers::read(self, offset, data)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        registers::write(self, offset, data)
    }
}
