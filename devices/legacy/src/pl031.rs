//! ARM's real-time clock: PrimeCell PL031 (ARM DDI 0224).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use triarch_device_core::{AccessError, BusDevice};

use crate::clock::Clock;
use crate::primecell::{self, IDENTIFICATION};

/// Bytes of addresses the device claims.
pub const PL031_SIZE: u64 = 0x1000;

/// Register with the seconds since 1970 (RTCDR), 32 bits.
pub const PL031_DATA: u64 = DATA;
/// Register that sets them (RTCLR), 32 bits.
pub const PL031_LOAD: u64 = LOAD;

const DATA: u64 = 0x00;
const MATCH: u64 = 0x04;
const LOAD: u64 = 0x08;
const CONTROL: u64 = 0x0c;
const INTERRUPT_MASK: u64 = 0x10;
const RAW_INTERRUPT: u64 = 0x14;
const MASKED_INTERRUPT: u64 = 0x18;
const INTERRUPT_CLEAR: u64 = 0x1c;

const PART: primecell::Part = primecell::Part {
    number: 0x031,
    revision: 0,
};

/// A PL031: seconds since 1970 in 32 bits. Claim [`PL031_SIZE`] bytes for it.
///
/// It tells the host's time in UTC. A guest that sets it moves its own offset only. There are no alarms: it has no interrupt, and the
/// firmware tables must not promise one.
pub struct Pl031 {
    clock: Arc<dyn Clock>,
    registers: Mutex<Pl031StateV1>,
}

/// What the RTC saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Pl031StateV1 {
    /// Seconds the guest's clock is ahead of UTC, wrapping in 32 bits.
    pub offset: u32,
    /// RTCMR.
    pub alarm: u32,
    /// RTCLR.
    pub load: u32,
    /// RTCIMSC.
    pub mask: u32,
}

impl Pl031 {
    /// A clock that shows UTC.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self::restore(Pl031StateV1::default(), clock)
    }

    /// A clock that goes on where `state` was taken: the guest finds the time that has passed.
    pub fn restore(state: Pl031StateV1, clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            registers: Mutex::new(state),
        }
    }

    /// Everything the guest can see but the host's time.
    pub fn state(&self) -> Pl031StateV1 {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Pl031StateV1> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host's time in the register's width: it wraps in 2106, as the device does.
    fn host(&self) -> u32 {
        self.clock.time_of_day().as_secs() as u32
    }
}

impl BusDevice for Pl031 {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        primecell::check(offset, data.len())?;
        let registers = self.lock();
        let value = match offset {
            DATA => self.host().wrapping_add(registers.offset),
            MATCH => registers.alarm,
            LOAD => registers.load,
            // It always runs.
            CONTROL => 1,
            INTERRUPT_MASK => registers.mask,
            RAW_INTERRUPT | MASKED_INTERRUPT => 0,
            _ => PART
                .identification(offset)
                .map(u32::from)
                .ok_or(AccessError::BadAccess)?,
        };
        primecell::put(value, data);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        primecell::check(offset, data.len())?;
        let value = primecell::get(data);
        let mut registers = self.lock();
        match offset {
            MATCH => registers.alarm = value,
            LOAD => {
                registers.load = value;
                registers.offset = value.wrapping_sub(self.host());
            }
            INTERRUPT_MASK => registers.mask = value & 1,
            DATA | CONTROL | RAW_INTERRUPT | MASKED_INTERRUPT | INTERRUPT_CLEAR | IDENTIFICATION.. => {}
            _ => return Err(AccessError::BadAccess),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    const SECOND: u64 = 1_000_000_000;

    fn get(rtc: &Pl031, offset: u64) -> u32 {
        let mut value = [0; 4];
        rtc.read(offset, &mut value).unwrap();
        u32::from_le_bytes(value)
    }

    #[test]
    fn it_shows_utc_until_it_is_set_and_goes_on_from_there() {
        let clock = ManualClock::at(1_700_000_000 * SECOND);
        let rtc = Pl031::new(clock.clone());
        assert_eq!(get(&rtc, DATA), 1_700_000_000);
        rtc.write(LOAD, &42u32.to_le_bytes()).unwrap();
        assert_eq!(get(&rtc, DATA), 42);
        clock.set(1_700_000_010 * SECOND);
        assert_eq!((get(&rtc, DATA), get(&rtc, LOAD)), (52, 42));
        let restored = Pl031::restore(rtc.state(), clock);
        assert_eq!(get(&restored, DATA), 52);
    }

    #[test]
    fn drivers_find_the_primecell_and_bad_accesses_are_told() {
        let rtc = Pl031::new(ManualClock::at(0));
        let id = |from: u64| (0..4).fold(0, |id, n| id | (get(&rtc, from + 4 * n) & 0xff) << (8 * n));
        assert_eq!((id(0xfe0), id(0xff0)), (0x0004_1031, 0xb105_f00d));
        for (offset, len) in [(1, 4), (0, 8), (0x20, 4), (0x1000, 4), (0, 0)] {
            let mut data = vec![0; len];
            assert_eq!(rtc.read(offset, &mut data), Err(AccessError::BadAccess));
            assert_eq!(rtc.write(offset, &data), Err(AccessError::BadAccess));
        }
    }
}
