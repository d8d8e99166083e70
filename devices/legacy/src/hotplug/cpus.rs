//! Processors that come and go: a register block that the methods of `\_SB.CPUS` use (triarch-tables, `acpi/cpus.rs`).
//!
//! All registers have 32 bits and are accessed as such. What is not listed reads as zero and ignores writes.
//!
//! | offset | access | register |
//! |---|---|---|
//! | 0x00 | read | number of processors there may ever be |
//! | 0x04 | read | takes the next notice: bits 7 to 0 the value for `Notify` (1 look whether it is there, 3 eject it), bits 31 to 8 the processor; 0: there is none |
//! | 0x10 + 0x10 n + 0x0 | read | processor n: `_STA` |
//! | 0x10 + 0x10 n + 0x4 | write | `_EJ0`: 1 gives it back |
//! | 0x10 + 0x10 n + 0x8 | write | `_OST`, first argument: what the next is about |
//! | 0x10 + 0x10 n + 0xc | write | `_OST`, second argument: what came of it |
//!
//! Each processor has registers of its own, so there is no selector, hence no lock in the guest and no state between two accesses.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use triarch_device_core::{AccessError, BusDevice};

use crate::{Ged, GedEvents};

/// Bytes of the registers that all share, and of those of each processor.
const STRIDE: u64 = 0x10;
/// Present, enabled, shown, functioning (ACPI 6.5, 6.3.7).
const THERE: u32 = 0xf;
/// Values for `Notify` (ACPI 6.5, 5.6.6), and the first argument of `_OST`.
const DEVICE_CHECK: u32 = 1;
const EJECT_REQUEST: u32 = 3;
/// First arguments of `_OST` that mean the same (ACPI 6.5, 6.3.5): a bus check, an ejection that the guest began.
const BUS_CHECK: u32 = 0;
const EJECTION: u32 = 0x103;
/// Second arguments of `_OST` that decide nothing: success is told by other means, and these two say that it goes on.
const SUCCESS: u32 = 0;
const INSERTING: u32 = 0x80;
const EJECTING: u32 = 0x84;

/// What the guest is to be told of a processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Notice {
    /// It is there.
    Check,
    /// It should be given back.
    Eject,
}

impl Notice {
    fn value(self) -> u32 {
        match self {
            Self::Check => DEVICE_CHECK,
            Self::Eject => EJECT_REQUEST,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Slot {
    present: bool,
    /// The guest may know that it is there.
    seen: bool,
    started: bool,
    notice: Option<Notice>,
    /// It was asked back, and the guest neither gave it nor refused.
    asked_back: bool,
    /// First argument of the last `_OST`.
    event: u32,
    refusal: Option<u32>,
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
    /// Where interrupts come from; a machine without ACPI has no such device and hears of nothing.
    events: Option<Arc<Ged>>,
    /// Called when the guest did something, and not again before [`slots`](CpuHotplug::slots).
    changed: Box<dyn Fn() + Send + Sync>,
    told: AtomicBool,
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
    /// Value of `Notify` the guest has not taken: 0, 1 or 3.
    pub notice: u8,
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
    /// No notice of ours.
    #[error("processor {index} has the unknown notice {notice}")]
    Notice {
        /// The processor.
        index: usize,
        /// What it has.
        notice: u8,
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
        STRIDE * (u64::from(max) + 1)
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
            events,
            changed: Box::new(changed),
            told: AtomicBool::new(false),
        }
    }

    /// Puts in place what was saved. Notices the guest has not taken are told again, and so is what happened to the processors.
    pub fn restore(&self, state: &CpuHotplugStateV1) -> Result<(), CpuHotplugRestoreError> {
        let mut restored = Vec::with_capacity(state.slots.len());
        for (index, slot) in state.slots.iter().enumerate() {
            if !slot.present && (index as u64) < u64::from(self.fixed) {
                return Err(CpuHotplugRestoreError::Fixed { index });
            }
            let notice = match u32::from(slot.notice) {
                0 => None,
                DEVICE_CHECK => Some(Notice::Check),
                EJECT_REQUEST => Some(Notice::Eject),
                _ => {
                    let notice = slot.notice;
                    return Err(CpuHotplugRestoreError::Notice { index, notice });
                }
            };
            restored.push(Slot {
                present: slot.present,
                seen: slot.seen,
                started: slot.started,
                notice,
                asked_back: slot.asked_back,
                event: slot.event,
                refusal: None,
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
        self.tell();
        Ok(())
    }

    /// What is to be saved.
    pub fn state(&self) -> CpuHotplugStateV1 {
        let slot = |slot: &Slot| CpuSlotStateV1 {
            present: slot.present,
            seen: slot.seen,
            started: slot.started,
            notice: slot.notice.map_or(0, |notice| notice.value() as u8),
            asked_back: slot.asked_back,
            event: slot.event,
        };
        CpuHotplugStateV1 {
            slots: self.lock().iter().map(slot).collect(),
        }
    }

    /// How all processors stand. What happens from now on is told again.
    pub fn slots(&self) -> Vec<CpuSlot> {
        self.told.store(false, Ordering::SeqCst);
        let view = |slot: &mut Slot| CpuSlot {
            present: slot.present,
            seen: slot.seen,
            started: slot.started,
            unheard: slot.notice.is_some(),
            refusal: slot.refusal.take(),
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
            slot.notice = Some(Notice::Check);
            (slot.asked_back, slot.refusal) = (false, None);
        }
        self.notify();
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
            slot.notice = Some(Notice::Eject);
            (slot.asked_back, slot.refusal) = (true, None);
        }
        self.notify();
        Removal::Asked
    }

    /// Does not want processor `index` back any more. The guest may have heard that it was wanted, and can still give it.
    pub fn leave(&self, index: u32) {
        if let Some(slot) = self.lock().get_mut(index as usize) {
            slot.asked_back = false;
            slot.notice = slot.notice.filter(|notice| *notice != Notice::Eject);
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
        if self.lock().iter().any(|slot| slot.notice.is_some()) {
            self.notify();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self) {
        if let Some(events) = &self.events {
            events.notify(GedEvents::CPUS);
        }
    }

    fn tell(&self) {
        if !self.told.swap(true, Ordering::SeqCst) {
            (self.changed)();
        }
    }

    /// The next notice, which the guest has heard then.
    fn take_notice(&self) -> u32 {
        let mut slots = self.lock();
        for (index, slot) in (0u32..).zip(slots.iter_mut()) {
            if let Some(notice) = slot.notice.take() {
                slot.seen |= slot.present;
                return index << 8 | notice.value();
            }
        }
        0
    }

    fn status(&self, index: usize) -> u32 {
        match self.lock().get_mut(index) {
            Some(slot) if slot.present => {
                slot.seen = true;
                THERE
            }
            _ => self.absent.into(),
        }
    }

    /// `_EJ0`; also without having been asked.
    fn eject(&self, index: usize) {
        match self.lock().get_mut(index) {
            Some(slot) if slot.present && index as u64 >= u64::from(self.fixed) => *slot = Slot::default(),
            _ => return,
        }
        self.tell();
    }

    /// `_OST`: of interest is only that the guest refuses what it was asked for.
    fn answer(&self, index: usize, status: u32) {
        {
            let mut slots = self.lock();
            let Some(slot) = slots.get_mut(index).filter(|slot| slot.present) else {
                return;
            };
            let refused = match slot.event {
                EJECT_REQUEST | EJECTION => slot.asked_back && !matches!(status, SUCCESS | EJECTING),
                DEVICE_CHECK | BUS_CHECK => !slot.started && !matches!(status, SUCCESS | INSERTING),
                _ => false,
            };
            if !refused {
                return;
            }
            slot.asked_back = false;
            slot.refusal = Some(status);
        }
        self.tell();
    }
}

impl BusDevice for CpuHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let value = match (offset, data.len()) {
            (0x0, 4) => self.lock().len() as u32,
            (0x4, 4) => self.take_notice(),
            (_, 4) if offset.is_multiple_of(4) => match processor(offset) {
                Some((index, 0x0)) => self.status(index),
                _ => 0,
            },
            _ => return Err(AccessError::BadAccess),
        };
        data.copy_from_slice(&value.to_le_bytes());
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else {
            return Err(AccessError::BadAccess);
        };
        if !offset.is_multiple_of(4) {
            return Err(AccessError::BadAccess);
        }
        match processor(offset) {
            Some((index, 0x4)) if value == 1 => self.eject(index),
            Some((index, 0x8)) => {
                if let Some(slot) = self.lock().get_mut(index) {
                    slot.event = value;
                }
            }
            Some((index, 0xc)) => self.answer(index, value),
            _ => {}
        }
        Ok(())
    }
}

/// The processor whose register is at `offset`, and the register's offset from its first.
fn processor(offset: u64) -> Option<(usize, u64)> {
    let index = (offset / STRIDE).checked_sub(1)?;
    Some((usize::try_from(index).ok()?, offset % STRIDE))
}
