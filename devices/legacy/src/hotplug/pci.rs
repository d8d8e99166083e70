//! PCI devices that come and go: a register block that the methods of PCI roots use (triarch-tables, `acpi/pci_slots.rs`). Each segment
//! has one.
//!
//! The registers are those of `registers.rs`, 0x10 bytes a slot. A slot's status tells whether it has a device. Slot 0 is the host bridge. A
//! segment with several root buses has the slots of one behind those of the other; slot 0 of the others has nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use triarch_device_core::{AccessError, BusDevice};

use super::registers::{self, Line, Notice, Slots, THERE, Talk};
use crate::{Ged, GedEvents};

/// Slots of a root bus.
pub const PCI_SLOTS: usize = 32;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Slot {
    present: bool,
    /// Its device stays.
    fixed: bool,
    /// Its device came while the guest ran, and the guest has not refused it.
    offered: bool,
    ejected: bool,
    vanished: bool,
    talk: Talk,
}

/// How a slot stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciSlot {
    /// It has a device.
    pub present: bool,
    /// The guest has not taken the last notice.
    pub unheard: bool,
    /// The guest gave the device back, and it is still to be taken.
    pub ejected: bool,
    /// The last device was taken without the guest's consent: its driver may still be there.
    pub vanished: bool,
    /// What the guest answered to the last notice, if that was a refusal: the status of `_OST` (ACPI 6.5, 6.3.5). Told once.
    pub refusal: Option<u32>,
}

impl Slot {
    fn view(self) -> PciSlot {
        PciSlot {
            present: self.present,
            unheard: self.talk.notice.is_some(),
            ejected: self.ejected,
            vanished: self.vanished,
            refusal: self.talk.refusal,
        }
    }
}

/// The slots of all root buses of a segment, as the guest's ACPI methods see them.
pub struct PciHotplug {
    slots: Mutex<Vec<Slot>>,
    line: Line,
}

/// What is saved of a slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciSlotStateV1 {
    /// It has a device.
    pub present: bool,
    /// Its device came while the guest ran, and the guest has not refused it.
    pub offered: bool,
    /// What the guest has not heard.
    pub notice: Option<Notice>,
    /// The device was asked back, and the guest has not answered.
    pub asked_back: bool,
    /// The guest gave the device back, and it was not taken yet.
    pub ejected: bool,
    /// The last device was taken without the guest's consent.
    pub vanished: bool,
    /// First argument of the last `_OST`.
    pub event: u32,
}

/// What the device saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciHotplugStateV1 {
    /// Every slot, in their order.
    pub slots: Vec<PciSlotStateV1>,
    /// Bit n: the device of slot n stays. On bus 0 alone there are such.
    pub fixed: u32,
}

/// Why a state cannot be restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PciHotplugRestoreError {
    /// Other buses.
    #[error("the state has {found} PCI slots, and here are {expected}")]
    Count {
        /// Slots in the state.
        found: usize,
        /// Those of the root buses.
        expected: usize,
    },
    /// A device that stays is not there, or was asked back.
    #[error("the device of PCI slot {slot} stays, and the state says otherwise")]
    Fixed {
        /// The slot.
        slot: usize,
    },
}

impl PciHotplug {
    /// Bytes of the registers of `roots` root buses.
    pub const fn size(roots: usize) -> u64 {
        registers::size::<Self>((roots * PCI_SLOTS) as u32)
    }

    /// Slots of `roots` root buses, without devices. `changed` is called on the vCPU thread that did something of interest; it must return at once.
    pub fn new(roots: usize, events: Arc<Ged>, changed: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            slots: Mutex::new(vec![Slot::default(); roots * PCI_SLOTS]),
            line: Line::new(Some(events), GedEvents::PCI, changed),
        }
    }

    /// What the guest finds at its start: the slots that have devices, and bit n of `fixed` tells that the one in slot n stays.
    pub fn begin(&self, present: impl IntoIterator<Item = u8>, fixed: u32) {
        let mut slots = self.lock();
        slots.fill(Slot::default());
        for number in present {
            if let Some(slot) = slots.get_mut(usize::from(number)) {
                slot.present = true;
                slot.fixed = stays(fixed, number.into());
            }
        }
    }

    /// Bit n: slot n has a device that stays.
    pub fn fixed(&self) -> u32 {
        fixed(&self.lock())
    }

    /// Puts in place what was saved. Notices the guest has not taken are told again, and so is what happened to the devices.
    pub fn restore(&self, state: &PciHotplugStateV1) -> Result<(), PciHotplugRestoreError> {
        let (found, saved) = (state.slots.len(), &state.slots);
        let expected = self.lock().len();
        if found != expected {
            return Err(PciHotplugRestoreError::Count { found, expected });
        }
        let wrong = |(slot, saved): (usize, &PciSlotStateV1)| {
            (stays(state.fixed, slot) && (!saved.present || saved.asked_back || saved.ejected)).then_some(slot)
        };
        if let Some(slot) = saved.iter().enumerate().find_map(wrong) {
            return Err(PciHotplugRestoreError::Fixed { slot });
        }
        for (number, (slot, saved)) in self.lock().iter_mut().zip(saved).enumerate() {
            *slot = Slot {
                present: saved.present,
                fixed: stays(state.fixed, number),
                offered: saved.offered,
                ejected: saved.ejected,
                vanished: saved.vanished,
                talk: Talk::restored(saved.notice, saved.asked_back, saved.event),
            };
        }
        self.remind();
        self.line.guest.changed();
        Ok(())
    }

    /// What is to be saved.
    pub fn state(&self) -> PciHotplugStateV1 {
        let slot = |slot: &Slot| PciSlotStateV1 {
            present: slot.present,
            offered: slot.offered,
            notice: slot.talk.notice,
            asked_back: slot.talk.asked_back,
            ejected: slot.ejected,
            vanished: slot.vanished,
            event: slot.talk.event,
        };
        let slots = self.lock();
        PciHotplugStateV1 {
            slots: slots.iter().map(slot).collect(),
            fixed: fixed(&slots),
        }
    }

    /// How all slots stand. What happens from now on is told again.
    pub fn slots(&self) -> Vec<PciSlot> {
        self.line.guest.looked();
        let mut slots = self.lock();
        let view = slots.iter().map(|slot| slot.view()).collect();
        slots.iter_mut().for_each(|slot| slot.talk.refusal = None);
        view
    }

    /// How all slots stand, without an effect on what is told.
    pub fn peek(&self) -> Vec<PciSlot> {
        self.lock().iter().map(|slot| slot.view()).collect()
    }

    /// Tells the guest that `slot` has a device, which can be used by now.
    pub fn came(&self, slot: u8) {
        if let Some(slot) = self.lock().get_mut(usize::from(slot)) {
            *slot = Slot {
                present: true,
                offered: true,
                ..Slot::default()
            };
            slot.talk.offer();
        }
        self.line.notify();
    }

    /// Asks the guest for the device in `slot`.
    pub fn ask_back(&self, slot: u8) {
        if let Some(slot) = self.lock().get_mut(usize::from(slot)).filter(|slot| slot.present) {
            slot.talk.ask_back();
        }
        self.line.notify();
    }

    /// Does not want the device in `slot` back any more. The guest may have heard that it was wanted, and can still give it.
    pub fn leave(&self, slot: u8) {
        if let Some(slot) = self.lock().get_mut(usize::from(slot)) {
            slot.talk.leave();
        }
    }

    /// `slot` has no device any more. The guest is told if it did not give it back and may have it in use (`vanished`).
    pub fn gone(&self, slot: u8, vanished: bool) {
        if let Some(slot) = self.lock().get_mut(usize::from(slot)) {
            *slot = Slot {
                vanished,
                ..Slot::default()
            };
            slot.talk.notice = vanished.then_some(Notice::Vanished);
        }
        if vanished {
            self.line.notify();
        }
    }

    /// Of several devices in `slot` one was taken without the guest's consent: it is told to look which are there.
    pub fn shrank(&self, slot: u8) {
        if let Some(slot) = self.lock().get_mut(usize::from(slot)).filter(|slot| slot.present) {
            slot.talk.notice.get_or_insert(Notice::Vanished);
        }
        self.line.notify();
    }

    /// Interrupts the guest once more if there is something it has not heard: before its driver is there, an interrupt is lost.
    /// Returns whether there is.
    pub fn remind(&self) -> bool {
        self.line.remind(self.lock().iter().map(|slot| &slot.talk))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the device of `slot` stays, as the bits tell.
fn stays(fixed: u32, slot: usize) -> bool {
    slot < PCI_SLOTS && fixed >> slot & 1 != 0
}

/// Bit n: slot n has a device that stays.
fn fixed(slots: &[Slot]) -> u32 {
    slots
        .iter()
        .take(PCI_SLOTS)
        .rev()
        .fold(0, |bits, slot| bits << 1 | u32::from(slot.fixed))
}

impl Slots for PciHotplug {
    fn count(&self) -> u32 {
        self.lock().len() as u32
    }

    fn take_notice(&self) -> u32 {
        let mut slots = self.lock();
        let talks = slots.iter_mut().map(|slot| &mut slot.talk).enumerate();
        // The host bridge has none, so none is 0.
        registers::take_notice(talks.skip(1)).map_or(0, |(_, notice)| notice)
    }

    fn status(&self, slot: usize) -> u32 {
        match self.lock().get(slot) {
            Some(slot) if slot.present => THERE,
            _ => 0,
        }
    }

    /// Also without having been asked.
    fn eject(&self, slot: usize) {
        match self.lock().get_mut(slot) {
            Some(slot) if slot.present && !slot.ejected && !slot.fixed => {
                slot.ejected = true;
                slot.talk.notice = None;
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
            Some(slot) if slot.present && !slot.ejected => {
                let refused = slot.talk.answer(status, slot.offered);
                slot.offered &= !refused;
                refused
            }
            _ => false,
        };
        if refused {
            self.line.guest.changed();
        }
    }
}

impl BusDevice for PciHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        registers::read(self, offset, data)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        registers::write(self, offset, data)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use proptest::prelude::*;
    use triarch_device_core::mock::CountingLine;

    use super::*;

    /// A bus with the host bridge, a device that stays in slot 1, and one that can go in slot 2; and another with a device in its slot 8.
    struct Bus {
        slots: PciHotplug,
        line: Arc<CountingLine>,
        told: Arc<AtomicU32>,
    }

    fn bus() -> Bus {
        let (line, told) = (Arc::new(CountingLine::default()), Arc::new(AtomicU32::new(0)));
        let counter = told.clone();
        let slots = PciHotplug::new(2, Arc::new(Ged::new(line.clone())), move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        slots.begin([0, 1, 2, 40], 0b11);
        Bus { slots, line, told }
    }

    impl Bus {
        fn read(&self, offset: u64) -> u32 {
            let mut data = [0xaa; 4];
            self.slots.read(offset, &mut data).expect("a register");
            u32::from_le_bytes(data)
        }

        fn write(&self, offset: u64, value: u32) {
            self.slots.write(offset, &value.to_le_bytes()).expect("a register");
        }

        fn status(&self, slot: u64) -> u32 {
            self.read(0x10 + 0x10 * slot)
        }

        fn eject(&self, slot: u64) {
            self.write(0x14 + 0x10 * slot, 1);
        }

        fn ost(&self, slot: u64, event: u32, status: u32) {
            self.write(0x18 + 0x10 * slot, event);
            self.write(0x1c + 0x10 * slot, status);
        }

        fn told(&self) -> u32 {
            self.told.load(Ordering::SeqCst)
        }
    }

    #[test]
    fn a_device_comes_and_is_given_back() {
        let b = bus();
        assert_eq!((b.read(0), b.read(4), b.status(2), b.status(3)), (64, 0, 0xf, 0));
        b.slots.came(31);
        assert_eq!((b.line.count(), b.status(31)), (1, 0xf));
        assert!(b.slots.slots()[31].unheard);
        assert_eq!([b.read(4), b.read(4)], [31 << 8 | 1, 0]);
        assert!(!b.slots.slots()[31].unheard);
        b.slots.ask_back(31);
        assert_eq!((b.line.count(), b.read(4)), (2, 31 << 8 | 3));
        b.ost(31, 3, 0x84);
        assert_eq!(b.told(), 0, "it goes on");
        b.eject(31);
        assert_eq!((b.told(), b.slots.slots()[31].ejected), (1, true));
        b.ost(31, 3, 0);
        b.eject(31);
        assert_eq!(b.told(), 1, "once");
        assert_eq!(b.status(31), 0xf, "until it is taken");
        b.slots.gone(31, false);
        assert_eq!((b.status(31), b.read(4), b.line.count()), (0, 0, 2));
    }

    #[test]
    fn what_stays_is_not_given_back_and_what_is_not_there_neither() {
        let b = bus();
        for slot in [0, 1, 3, 31, 32, 63, 64, 1 << 20] {
            b.eject(slot);
        }
        b.write(0x34, 2);
        assert_eq!((b.told(), b.slots.slots()[2].ejected), (0, false));
        b.eject(2);
        assert_eq!((b.told(), b.slots.slots()[2].ejected), (1, true), "unasked");
    }

    #[test]
    fn slots_of_another_root_bus_are_like_the_first_ones() {
        let b = bus();
        assert_eq!((b.status(40), b.status(41), b.slots.fixed()), (0xf, 0, 0b11));
        b.slots.came(63);
        b.slots.ask_back(40);
        assert_eq!([b.read(4), b.read(4), b.read(4)], [40 << 8 | 3, 63 << 8 | 1, 0]);
        b.eject(40);
        assert!(b.slots.slots()[40].ejected);
        b.slots.gone(40, true);
        assert_eq!((b.read(4), b.status(40)), (40 << 8, 0));
        let state = b.slots.state();
        let other = bus();
        other.slots.restore(&state).expect("restored");
        assert_eq!((other.slots.state(), other.status(63)), (state, 0xf));
    }

    #[test]
    fn refusals_are_told_once() {
        let b = bus();
        b.ost(2, 3, 0x82);
        assert_eq!(b.told(), 0, "it was not asked");
        b.slots.ask_back(2);
        b.ost(2, 3, 0x82);
        assert_eq!(b.told(), 1);
        assert_eq!(b.slots.slots()[2].refusal, Some(0x82));
        assert_eq!(b.slots.slots()[2].refusal, None);
        b.slots.came(3);
        b.ost(3, 1, 0x80);
        b.ost(3, 1, 1);
        assert_eq!(b.slots.peek()[3].refusal, Some(1));
        assert_eq!((b.told(), b.slots.slots()[3].refusal), (2, Some(1)));
        b.ost(3, 1, 1);
        assert_eq!(b.told(), 2, "once");
    }

    #[test]
    fn a_notice_that_is_not_wanted_any_more_is_not_told() {
        let b = bus();
        b.slots.ask_back(2);
        b.slots.leave(2);
        assert_eq!((b.read(4), b.slots.remind()), (0, false));
        b.slots.ask_back(2);
        assert!(b.slots.remind());
        assert_eq!(b.line.count(), 3);
    }

    #[test]
    fn the_guest_hears_of_a_device_that_vanished() {
        let b = bus();
        b.slots.gone(2, true);
        let slot = b.slots.slots()[2];
        assert!(slot.vanished && slot.unheard && !slot.present);
        assert_eq!([b.read(4), b.read(4)], [2 << 8, 0]);
        b.slots.came(2);
        assert!(!b.slots.slots()[2].vanished);
    }

    #[test]
    fn the_guest_hears_that_one_of_several_devices_vanished() {
        let bus = bus();
        bus.slots.shrank(2);
        assert_eq!((bus.read(4), bus.status(2)), (2 << 8, 0xf), "look at the whole bus");
        bus.slots.ask_back(2);
        bus.slots.shrank(2);
        assert_eq!(
            bus.read(4),
            2 << 8 | 3,
            "that it should give back the others is not forgotten"
        );
        bus.slots.shrank(3);
        assert_eq!(bus.read(4), 0, "nothing is there");
    }

    #[test]
    fn a_state_is_restored_and_told_again() {
        let b = bus();
        b.slots.came(5);
        b.slots.ask_back(2);
        let state = b.slots.state();
        let other = bus();
        other.slots.restore(&state).expect("restored");
        assert_eq!(
            (other.slots.state(), other.line.count(), other.told()),
            (state.clone(), 1, 1)
        );
        assert_eq!([other.read(4), other.read(4), other.read(4)], [0x203, 0x501, 0]);
        let mut bad = state.clone();
        bad.slots.pop();
        assert_eq!(
            other.slots.restore(&bad),
            Err(PciHotplugRestoreError::Count {
                found: 63,
                expected: 64
            })
        );
        let mut bad = state;
        bad.slots[1].present = false;
        assert_eq!(
            other.slots.restore(&bad),
            Err(PciHotplugRestoreError::Fixed { slot: 1 })
        );
    }

    proptest! {
        #[test]
        fn no_access_does_harm(accesses in prop::collection::vec((any::<bool>(), 0..2 * PciHotplug::size(2), 0usize..9, any::<u32>()), 0..64)) {
            let b = bus();
            for (write, offset, len, value) in accesses {
                let mut data = [u64::from(value), 0].map(u64::to_le_bytes).concat();
                let _ = match write {
                    true => b.slots.write(offset, &data[..len]),
                    false => b.slots.read(offset, &mut data[..len]),
                };
            }
            let slots = b.slots.slots();
            prop_assert!(slots[0].present && slots[1].present && !slots[0].ejected && !slots[1].ejected);
        }
    }
}
