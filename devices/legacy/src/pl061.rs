//! ARM's general purpose I/O: PrimeCell PL061 (ARM DDI 0190), for keys.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use triarch_device_core::{AccessError, BusDevice, InterruptLine, RateLimit};

use crate::primecell::{self, IDENTIFICATION};

/// Bytes of addresses the device claims.
pub const PL061_SIZE: u64 = 0x1000;

/// The data register fills all addresses below the others: bits 2 to 9 of the address say which pins are meant.
const DATA_END: u64 = 0x400;
const DIRECTION: u64 = 0x400;
const SENSE: u64 = 0x404;
const BOTH_EDGES: u64 = 0x408;
const EVENT: u64 = 0x40c;
const ENABLE: u64 = 0x410;
const RAW: u64 = 0x414;
const MASKED: u64 = 0x418;
const CLEAR: u64 = 0x41c;
const ALTERNATE: u64 = 0x420;

const PART: primecell::Part = primecell::Part {
    number: 0x061,
    revision: 0,
};

/// A PL061, whose pins are keys. Claim [`PL061_SIZE`] bytes for it.
///
/// A key that was pressed holds its pin high until the guest has seen it so, and lets go then: whatever time a driver waits for the
/// contacts to settle, it sees both. The interrupt is an edge each time a pin gives a new cause; firmware tables must say so.
pub struct Pl061 {
    registers: Mutex<Pl061StateV1>,
    line: Arc<dyn InterruptLine>,
    log: RateLimit,
}

/// What a PL061 saves, a bit a pin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Pl061StateV1 {
    /// Keys that are down.
    pub keys: u8,
    /// What the guest drives pins to that are outputs.
    pub output: u8,
    /// GPIODIR.
    pub direction: u8,
    /// GPIOIS.
    pub sense: u8,
    /// GPIOIBE.
    pub both_edges: u8,
    /// GPIOIEV.
    pub event: u8,
    /// GPIOIE.
    pub enable: u8,
    /// Edges that were seen and not cleared.
    pub edges: u8,
    /// GPIOAFSEL.
    pub alternate: u8,
}

impl Pl061StateV1 {
    fn pins(&self) -> u8 {
        self.output & self.direction | self.keys & !self.direction
    }

    /// GPIORIS: edges seen before, and levels as they are.
    fn raw(&self) -> u8 {
        self.edges & !self.sense | !(self.pins() ^ self.event) & self.sense
    }

    fn masked(&self) -> u8 {
        self.raw() & self.enable
    }

    /// Carries out `change` and notes the edges it makes; true if there is a new cause for an interrupt.
    fn change(&mut self, change: impl FnOnce(&mut Self)) -> bool {
        let (pins, causes) = (self.pins(), self.masked());
        change(self);
        let now = self.pins();
        let wanted = self.both_edges | !(now ^ self.event);
        self.edges |= (pins ^ now) & wanted & !self.sense;
        self.masked() & !causes != 0
    }

    fn register(&mut self, offset: u64) -> Option<&mut u8> {
        Some(match offset {
            DIRECTION => &mut self.direction,
            SENSE => &mut self.sense,
            BOTH_EDGES => &mut self.both_edges,
            EVENT => &mut self.event,
            ENABLE => &mut self.enable,
            ALTERNATE => &mut self.alternate,
            _ => return None,
        })
    }
}

/// The pins that an address of the data register is about.
fn mask(offset: u64) -> u8 {
    (offset >> 2) as u8
}

impl Pl061 {
    /// Keys none of which is pressed, on a device in reset state that interrupts through `line`.
    pub fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self::with(Pl061StateV1::default(), line)
    }

    /// Goes on where `state` was taken. A pending interrupt is raised once more: the first may not have been saved.
    pub fn restore(state: Pl061StateV1, line: Arc<dyn InterruptLine>) -> Self {
        let keys = Self::with(state, line);
        keys.interrupt(state.masked() != 0);
        keys
    }

    fn with(state: Pl061StateV1, line: Arc<dyn InterruptLine>) -> Self {
        Self {
            registers: Mutex::new(state),
            line,
            log: RateLimit::default(),
        }
    }

    /// Everything the guest can see, and the keys.
    pub fn state(&self) -> Pl061StateV1 {
        *self.lock()
    }

    /// Presses the key at `pin`, 0 to 7.
    pub fn press(&self, pin: u8) {
        let key = 1u8.checked_shl(u32::from(pin)).unwrap_or(0);
        let raised = self.lock().change(|registers| registers.keys |= key);
        self.interrupt(raised);
    }

    fn lock(&self) -> MutexGuard<'_, Pl061StateV1> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn interrupt(&self, raised: bool) {
        if raised
            && let Err(error) = self.line.trigger()
            && self.log.admit().is_some()
        {
            tracing::warn!("a key cannot interrupt the guest: {error}");
        }
    }
}

impl BusDevice for Pl061 {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        primecell::check(offset, data.len())?;
        let mut registers = self.lock();
        let mut raised = false;
        let value = match offset {
            0..DATA_END => {
                let seen = registers.pins() & mask(offset);
                raised = registers.change(|registers| registers.keys &= !seen);
                seen
            }
            RAW => registers.raw(),
            MASKED => registers.masked(),
            CLEAR => 0,
            _ => match registers.register(offset) {
                Some(register) => *register,
                None => PART.identification(offset).ok_or(AccessError::BadAccess)?,
            },
        };
        drop(registers);
        primecell::put(value.into(), data);
        self.interrupt(raised);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        primecell::check(offset, data.len())?;
        let value = primecell::get(data) as u8;
        let mut registers = self.lock();
        let raised = match offset {
            0..DATA_END => {
                let mask = mask(offset) & registers.direction;
                registers.change(|registers| registers.output = registers.output & !mask | value & mask)
            }
            CLEAR => registers.change(|registers| registers.edges &= !value),
            RAW | MASKED | IDENTIFICATION.. => false,
            _ if registers.register(offset).is_none() => return Err(AccessError::BadAccess),
            _ => registers.change(|registers| {
                if let Some(register) = registers.register(offset) {
                    *register = value;
                }
            }),
        };
        drop(registers);
        self.interrupt(raised);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use triarch_device_core::mock::CountingLine;

    const ALL: u64 = 0x3fc;
    const KEY: u8 = 1 << 3;

    fn keys() -> (Pl061, Arc<CountingLine>) {
        let line = Arc::new(CountingLine::default());
        (Pl061::new(line.clone()), line)
    }

    fn get(keys: &Pl061, offset: u64) -> u8 {
        let mut value = [0; 1];
        keys.read(offset, &mut value).unwrap();
        value[0]
    }

    fn set(keys: &Pl061, offset: u64, value: u8) {
        keys.write(offset, &[value]).unwrap();
    }

    #[test]
    fn a_key_is_down_until_the_guest_has_seen_it() {
        let (keys, line) = keys();
        set(&keys, BOTH_EDGES, KEY);
        set(&keys, ENABLE, KEY);
        keys.press(3);
        assert_eq!((line.count(), get(&keys, MASKED)), (1, KEY));
        set(&keys, CLEAR, KEY);
        assert_eq!((get(&keys, MASKED), get(&keys, !u64::from(KEY) << 2 & ALL)), (0, 0));
        assert_eq!(
            get(&keys, u64::from(KEY) << 2),
            KEY,
            "still down: the others were asked for"
        );
        assert_eq!((line.count(), get(&keys, MASKED)), (2, KEY), "it was let go");
        set(&keys, CLEAR, KEY);
        assert_eq!(get(&keys, ALL), 0);
        keys.press(3);
        assert_eq!(line.count(), 3);
        keys.press(3);
        keys.press(200);
        assert_eq!(line.count(), 3, "it is down already");
    }

    #[test]
    fn a_driver_gets_the_edge_or_the_level_it_asks_for() {
        for (event, counts) in [(KEY, [1, 1]), (0, [0, 1])] {
            let (keys, line) = keys();
            set(&keys, EVENT, event);
            set(&keys, ENABLE, KEY);
            keys.press(3);
            assert_eq!(line.count(), counts[0], "pressed");
            set(&keys, CLEAR, KEY);
            get(&keys, ALL);
            assert_eq!(line.count(), counts[1], "released");
        }
        let (keys, line) = keys();
        set(&keys, SENSE, KEY);
        set(&keys, EVENT, KEY);
        set(&keys, ENABLE, KEY);
        keys.press(3);
        set(&keys, CLEAR, KEY);
        assert_eq!((line.count(), get(&keys, RAW)), (1, KEY), "a level cannot be cleared");
        get(&keys, ALL);
        assert_eq!(get(&keys, RAW), 0);
    }

    #[test]
    fn a_key_pressed_before_it_may_interrupt_does_so_then() {
        let (keys, line) = keys();
        set(&keys, EVENT, KEY);
        keys.press(3);
        assert_eq!((line.count(), get(&keys, RAW), get(&keys, MASKED)), (0, KEY, 0));
        set(&keys, ENABLE, KEY);
        assert_eq!(line.count(), 1);
        let again = Arc::new(CountingLine::default());
        let restored = Pl061::restore(keys.state(), again.clone());
        assert_eq!((again.count(), restored.state()), (1, keys.state()));
    }

    #[test]
    fn outputs_are_what_the_guest_drives() {
        let (keys, line) = keys();
        set(&keys, DIRECTION, 0x0f);
        set(&keys, ALL, 0xff);
        assert_eq!(get(&keys, ALL), 0x0f);
        set(&keys, 0x3 << 2, 0);
        assert_eq!(get(&keys, ALL), 0x0c);
        keys.press(3);
        assert_eq!((get(&keys, ALL), line.count()), (0x0c, 0));
    }

    #[test]
    fn drivers_find_the_primecell_and_bad_accesses_are_told() {
        let (keys, _) = keys();
        let id = |from: u64| (0..4).fold(0, |id, n| id | u32::from(get(&keys, from + 4 * n)) << (8 * n));
        assert_eq!((id(0xfe0), id(0xff0)), (0x0004_1061, 0xb105_f00d));
        for (offset, len) in [(1, 1), (0x400, 8), (0x424, 1), (0x1000, 4), (0x400, 0)] {
            let mut data = vec![0; len];
            assert_eq!(keys.read(offset, &mut data), Err(AccessError::BadAccess));
            assert_eq!(keys.write(offset, &data), Err(AccessError::BadAccess));
        }
    }
}
