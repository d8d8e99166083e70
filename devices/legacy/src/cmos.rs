//! The real-time clock and its battery-backed memory: Motorola MC146818A, with the PC's additions.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use triarch_device_core::{AccessError, ByteRegisters};

use crate::calendar::Civil;
use crate::clock::Clock;

/// Ports the device claims: index, then data.
pub const CMOS_PORTS: u64 = 2;

const SIZE: usize = 128;
const SECONDS: usize = 0x00;
const MINUTES: usize = 0x02;
const HOURS: usize = 0x04;
const WEEKDAY: usize = 0x06;
const DAY: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
const STATUS_A: usize = 0x0a;
const STATUS_B: usize = 0x0b;
const STATUS_C: usize = 0x0c;
const STATUS_D: usize = 0x0d;
const CENTURY: usize = 0x32;
/// Base memory in KiB.
const BASE_MEMORY: usize = 0x15;
/// Memory from 1 MiB on in KiB, 65,535 at most; at both places.
const EXTENDED_MEMORY: [usize; 2] = [0x17, 0x30];
/// Memory from 16 MiB to 4 GiB in units of 64 KiB.
const MEMORY_FROM_16M: usize = 0x34;
/// Memory from 4 GiB on in units of 64 KiB, three bytes.
const MEMORY_FROM_4G: usize = 0x5b;

/// Update in progress.
const A_UPDATING: u8 = 0x80;
/// 32.768 kHz time base, 1,024 Hz periodic rate: what PC firmware sets.
const A_DEFAULT: u8 = 0x26;
/// The guest holds the clock to set it.
const B_SET: u8 = 0x80;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;
/// The memory is valid: the battery never ran out.
const D_VALID: u8 = 0x80;
const PM: u8 = 0x80;

/// How long before each update the chip says that one is coming: t_BUC (244 us) and then t_UC (1,984 us) of the data sheet.
const UPDATE_NS: u32 = 244_000 + 1_984_000;

/// The real-time clock at ports 0x70 and 0x71. Claim [`CMOS_PORTS`] for it.
///
/// It tells the host's time in UTC. A guest that sets it moves its own offset only. There are no alarms: it has no interrupt, and the
/// firmware tables must not promise one.
pub struct Cmos {
    clock: Arc<dyn Clock>,
    registers: Mutex<Registers>,
}

struct Registers {
    index: u8,
    memory: [u8; SIZE],
    /// What the guest's clock is ahead of the host's, in seconds.
    offset: i64,
}

/// What the RTC saves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosStateV1 {
    /// What was written to the index port last.
    pub index: u8,
    /// The 128 registers; the clock's own are only valid while it is held.
    pub registers: Vec<u8>,
    /// Seconds the guest's clock is ahead of UTC.
    pub offset: i64,
}

impl Cmos {
    /// A clock that shows UTC, and memory sizes in bytes: all RAM below 4 GiB (counted from address 0), and RAM from 4 GiB on.
    pub fn new(clock: Arc<dyn Clock>, below_4g: u64, above_4g: u64) -> Self {
        let mut memory = [0; SIZE];
        memory[STATUS_A] = A_DEFAULT;
        memory[STATUS_B] = B_24_HOURS;
        memory[STATUS_D] = D_VALID;
        let mut put = |at: usize, n: usize, value: u64| {
            let bytes = value.min((1 << (8 * n)) - 1).to_le_bytes();
            memory[at..at + n].copy_from_slice(&bytes[..n]);
        };
        put(BASE_MEMORY, 2, 640);
        for at in EXTENDED_MEMORY {
            put(at, 2, below_4g.saturating_sub(1 << 20) >> 10);
        }
        put(MEMORY_FROM_16M, 2, below_4g.saturating_sub(16 << 20) >> 16);
        put(MEMORY_FROM_4G, 3, above_4g >> 16);
        Self {
            clock,
            registers: Mutex::new(Registers {
                index: 0,
                memory,
                offset: 0,
            }),
        }
    }

    /// Everything the guest can see but the host's time.
    pub fn state(&self) -> CmosStateV1 {
        let registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        CmosStateV1 {
            index: registers.index,
            registers: registers.memory.to_vec(),
            offset: registers.offset,
        }
    }

    /// A clock that goes on where `state` was taken: the guest finds the time that has passed. `None` if there are not 128 registers.
    pub fn restore(state: &CmosStateV1, clock: Arc<dyn Clock>) -> Option<Self> {
        let registers = Registers {
            index: state.index,
            memory: state.registers.as_slice().try_into().ok()?,
            offset: state.offset,
        };
        Some(Self {
            clock,
            registers: Mutex::new(registers),
        })
    }
}

impl ByteRegisters for Cmos {
    const COUNT: u64 = CMOS_PORTS;

    fn read_byte(&self, offset: u64) -> Result<u8, AccessError> {
        let registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let value = match offset {
            // The index cannot be read back on a PC.
            0 => 0xff,
            1 => {
                let now = self.clock.time_of_day();
                registers.read(now.as_secs(), now.subsec_nanos())
            }
            _ => return Err(AccessError::BadAccess),
        };
        Ok(value)
    }

    fn write_byte(&self, offset: u64, value: u8) -> Result<(), AccessError> {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        match offset {
            0 => registers.index = value,
            1 => registers.write(value, self.clock.time_of_day().as_secs()),
            _ => return Err(AccessError::BadAccess),
        }
        Ok(())
    }
}

impl Registers {
    /// Bit 7 of the index masks NMIs, of which there are none here.
    fn selected(&self) -> usize {
        usize::from(self.index) % SIZE
    }

    fn read(&self, seconds: u64, nanoseconds: u32) -> u8 {
        let index = self.selected();
        let held = self.memory[STATUS_B] & B_SET != 0;
        match index {
            STATUS_A => {
                let updating = !held && nanoseconds >= 1_000_000_000 - UPDATE_NS;
                self.memory[STATUS_A] | if updating { A_UPDATING } else { 0 }
            }
            // No interrupt is ever pending.
            STATUS_C => 0,
            _ if is_time(index) && !held => self.encode(index, self.now(seconds)),
            _ => self.memory[index],
        }
    }

    fn write(&mut self, value: u8, seconds: u64) {
        let index = self.selected();
        match index {
            STATUS_A => self.memory[STATUS_A] = value & !A_UPDATING,
            STATUS_B => {
                let was_held = self.memory[STATUS_B] & B_SET != 0;
                let held = value & B_SET != 0;
                // The format changes with the time at rest in the registers, so fill or read them in the old one.
                if held && !was_held {
                    self.fill(seconds);
                }
                self.memory[STATUS_B] = value;
                if was_held && !held {
                    self.set(seconds);
                }
            }
            STATUS_C | STATUS_D => {}
            _ if is_time(index) && self.memory[STATUS_B] & B_SET == 0 => {
                self.fill(seconds);
                self.memory[index] = value;
                self.set(seconds);
            }
            _ => self.memory[index] = value,
        }
    }

    /// The guest's time.
    fn now(&self, seconds: u64) -> Civil {
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        Civil::from_unix(seconds.saturating_add(self.offset).clamp(-LIMIT, LIMIT))
    }

    /// Puts the guest's time into the registers.
    fn fill(&mut self, seconds: u64) {
        let now = self.now(seconds);
        for index in TIME {
            self.memory[index] = self.encode(index, now);
        }
    }

    /// Makes what the registers say the guest's time.
    fn set(&mut self, seconds: u64) {
        let value = |index: usize| self.decode(self.memory[index]);
        let raw_hour = self.memory[HOURS];
        let hour = match self.memory[STATUS_B] & B_24_HOURS {
            0 => self.decode(raw_hour & !PM) % 12 + if raw_hour & PM != 0 { 12 } else { 0 },
            _ => self.decode(raw_hour),
        };
        let wanted = Civil {
            year: i64::from(value(CENTURY)) * 100 + i64::from(value(YEAR)),
            month: value(MONTH),
            day: value(DAY),
            hour,
            minute: value(MINUTES),
            second: value(SECONDS),
        };
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        self.offset = wanted.to_unix().saturating_sub(seconds);
    }

    fn encode(&self, index: usize, now: Civil) -> u8 {
        let twelve = self.memory[STATUS_B] & B_24_HOURS == 0;
        let value = match index {
            SECONDS => now.second,
            MINUTES => now.minute,
            HOURS if twelve => (now.hour + 11) % 12 + 1,
            HOURS => now.hour,
            WEEKDAY => now.weekday(),
            DAY => now.day,
            MONTH => now.month,
            YEAR => now.year.rem_euclid(100) as u8,
            _ => now.year.div_euclid(100).rem_euclid(100) as u8,
        };
        let coded = if self.memory[STATUS_B] & B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) + value % 10
        };
        coded
            | if index == HOURS && twelve && now.hour >= 12 {
                PM
            } else {
                0
            }
    }

    /// Digits above nine count as what they are worth, so every value decodes.
    fn decode(&self, coded: u8) -> u8 {
        if self.memory[STATUS_B] & B_BINARY != 0 {
            coded
        } else {
            (coded >> 4) * 10 + (coded & 0x0f)
        }
    }
}

const TIME: [usize; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];
/// Seconds either side of 1970 the clock can show: more than 20,000 years.
const LIMIT: i64 = 1 << 40;

fn is_time(index: usize) -> bool {
    TIME.contains(&index)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock::ManualClock;
    use triarch_device_core::BusDevice as _;

    const SECOND: u64 = 1_000_000_000;
    /// 2026-11-21 18:49:07 UTC, a Saturday.
    const NOW: u64 = 1_795_286_947;

    fn get(cmos: &Cmos, index: usize) -> u8 {
        // With the NMI bit set, as firmware does.
        cmos.write(0, &[index as u8 | 0x80]).unwrap();
        let mut value = [0];
        cmos.read(1, &mut value).unwrap();
        value[0]
    }

    fn set(cmos: &Cmos, index: usize, value: u8) {
        cmos.write(0, &[index as u8]).unwrap();
        cmos.write(1, &[value]).unwrap();
    }

    fn shown(cmos: &Cmos) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|i| get(cmos, i))
    }

    fn cmos(clock: &Arc<ManualClock>) -> Cmos {
        Cmos::new(clock.clone(), 0xc000_0000, 5 << 30)
    }

    #[test]
    fn shows_utc_in_every_format() {
        let cmos = cmos(&ManualClock::at(NOW * SECOND));
        assert_eq!(shown(&cmos), [0x20, 0x26, 0x11, 0x21, 7, 0x18, 0x49, 0x07]);
        set(&cmos, STATUS_B, B_24_HOURS | B_BINARY);
        assert_eq!(shown(&cmos), [20, 26, 11, 21, 7, 18, 49, 7]);
        set(&cmos, STATUS_B, 0);
        assert_eq!(get(&cmos, HOURS), PM | 0x06);
        for (hour, expected) in [(0, 0x12), (1, 0x01), (11, 0x11), (12, PM | 0x12), (23, PM | 0x11)] {
            let cmos = self::cmos(&ManualClock::at(hour * 3600 * SECOND));
            set(&cmos, STATUS_B, 0);
            assert_eq!(get(&cmos, HOURS), expected, "{hour}");
        }
    }

    #[test]
    fn an_update_is_announced_and_ends() {
        let clock = ManualClock::at(NOW * SECOND);
        let cmos = cmos(&clock);
        for (ns, updating) in [
            (0, false),
            (997_000_000, false),
            (998_000_000, true),
            (999_999_999, true),
        ] {
            clock.set(NOW * SECOND + ns);
            assert_eq!(get(&cmos, STATUS_A) & A_UPDATING != 0, updating, "{ns}");
            assert_eq!(get(&cmos, SECONDS), 0x07);
        }
        clock.set((NOW + 1) * SECOND);
        assert_eq!((get(&cmos, STATUS_A), get(&cmos, SECONDS)), (A_DEFAULT, 0x08));
        clock.set(NOW * SECOND + 999_000_000);
        set(&cmos, STATUS_B, B_SET | B_24_HOURS);
        assert_eq!(get(&cmos, STATUS_A) & A_UPDATING, 0, "a held clock does not update");
    }

    #[test]
    fn the_guest_sets_its_own_clock() {
        let clock = ManualClock::at(NOW * SECOND);
        let cmos = cmos(&clock);
        set(&cmos, STATUS_B, B_SET | B_24_HOURS);
        assert_eq!(get(&cmos, YEAR), 0x26, "a held clock still shows where it was held");
        for (index, value) in [
            (CENTURY, 0x19),
            (YEAR, 0x99),
            (MONTH, 0x12),
            (DAY, 0x31),
            (HOURS, 0x23),
            (MINUTES, 0x59),
            (SECONDS, 0x58),
        ] {
            set(&cmos, index, value);
        }
        clock.set((NOW + 10) * SECOND);
        assert_eq!(get(&cmos, SECONDS), 0x58, "held");
        set(&cmos, STATUS_B, B_24_HOURS);
        clock.set((NOW + 12) * SECOND);
        assert_eq!(shown(&cmos), [0x20, 0x00, 0x01, 0x01, 7, 0x00, 0x00, 0x00]);
        let restored = Cmos::restore(&cmos.state(), clock.clone()).unwrap();
        clock.set((NOW + 13) * SECOND);
        assert_eq!(shown(&restored), [0x20, 0x00, 0x01, 0x01, 7, 0x00, 0x00, 0x01]);
        set(&cmos, MINUTES, 0x30);
        assert_eq!(
            shown(&cmos)[5..],
            [0x00, 0x30, 0x01],
            "one register, without holding the clock"
        );
        let mut short = cmos.state();
        short.registers.pop();
        assert!(Cmos::restore(&short, clock).is_none());
    }

    #[test]
    fn memory_sizes_are_where_firmware_looks() {
        let size =
            |cmos: &Cmos, at: usize, n: usize| (0..n).map(|i| usize::from(get(cmos, at + i)) << (8 * i)).sum::<usize>();
        let cmos = cmos(&ManualClock::at(0));
        assert_eq!(size(&cmos, 0x15, 2), 640);
        assert_eq!(size(&cmos, 0x17, 2), 65_535);
        assert_eq!(size(&cmos, 0x34, 2) << 16, 0xc000_0000 - (16 << 20));
        assert_eq!(size(&cmos, 0x5b, 3) << 16, 5 << 30);
        let tiny = Cmos::new(ManualClock::at(0), 8 << 20, 0);
        assert_eq!((size(&tiny, 0x30, 2), size(&tiny, 0x34, 2)), (7 << 10, 0));
        let huge = Cmos::new(ManualClock::at(0), 0xc000_0000, 1 << 41);
        assert_eq!(size(&huge, 0x5b, 3), 0xff_ffff);
    }

    #[test]
    fn the_rest_is_memory() {
        let cmos = cmos(&ManualClock::at(0));
        set(&cmos, 0x0f, 0x0a);
        assert_eq!(get(&cmos, 0x0f), 0x0a, "shutdown status");
        set(&cmos, STATUS_D, 0);
        assert_eq!(get(&cmos, STATUS_D), D_VALID);
        set(&cmos, STATUS_A, 0xff);
        assert_eq!(get(&cmos, STATUS_A) & A_UPDATING, 0);
        assert_eq!(cmos.read(1, &mut [0; 2]), Err(AccessError::BadAccess));
        assert_eq!(cmos.write(2, &[0]), Err(AccessError::BadAccess));
    }

    proptest! {
        #[test]
        fn nothing_written_panics(
            writes in prop::collection::vec((0u64..2, any::<u8>()), 1..60),
            time in any::<u64>(),
        ) {
            let clock = ManualClock::at(time);
            let cmos = cmos(&clock);
            for (port, value) in writes {
                cmos.write(port, &[value]).unwrap();
                cmos.read(1, &mut [0]).unwrap();
            }
            Cmos::restore(&cmos.state(), clock).unwrap();
        }
    }
}
