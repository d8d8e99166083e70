//! The interrupt translation service: a device's message becomes an LPI of the boot processor (Arm IHI 0069, chapter 5).

use super::gic::{self, FIRST_LPI};
use super::io::Mmio;
use crate::interrupts::{Message, new_vector};
use crate::memory::block;
use crate::pci::map_registers;
use alloc::collections::BTreeMap;
use alloc::string::String;
use core::cell::UnsafeCell;

const GITS_CTLR: u64 = 0;
const GITS_TYPER: u64 = 8;
const GITS_CBASER: u64 = 0x80;
const GITS_CWRITER: u64 = 0x88;
const GITS_CREADR: u64 = 0x90;
const GITS_BASER: u64 = 0x100;
const GITS_TRANSLATER: u64 = 0x1_0040;
const GITS_BYTES: u64 = 0x2_0000;

const ENABLED: u32 = 1;
const VALID: u64 = 1 << 63;
/// Tables and queue are inner shareable and written back.
const SHARED_CACHED: u64 = 7 << 59 | 1 << 10;
/// Table types of GITS_BASER.
const DEVICES: u64 = 1;
const COLLECTIONS: u64 = 4;
const PAGE_64K: u64 = 2 << 8;
const TABLE_BYTES: usize = 0x1_0000;

const QUEUE_BYTES: u64 = 4096;
const COMMAND_BYTES: u64 = 32;
const SYNC: u64 = 5;
const MAPD: u64 = 8;
const MAPC: u64 = 9;
const MAPTI: u64 = 0xa;

/// As many events as an MSI-X table has entries at most.
const EVENT_BITS: u64 = 11;
/// Vectors that devices can have; no two events may share an LPI.
const MOST_EVENTS: usize = 160;

/// The ITS and what was made known to it.
struct Its {
    registers: Mmio,
    queue: u64,
    next: u64,
    /// The boot processor, as commands name it.
    target: u64,
    /// Bytes that an entry of a device's table takes.
    entry: u64,
    devices: BTreeMap<u16, u64>,
    events: BTreeMap<(u16, u16), u8>,
}

struct Place(UnsafeCell<Option<Its>>);

// SAFETY: only the boot processor uses it, in one place at a time.
unsafe impl Sync for Place {}

static ITS: Place = Place(UnsafeCell::new(None));

/// Makes tables and queue for the ITS at `base` and turns it on.
pub fn init(base: u64) -> Result<(), String> {
    let registers = map_registers(base, GITS_BYTES)?;
    let (by_address, by_number) = gic::take_lpis()?;
    let features = registers.read64_whole(GITS_TYPER);
    let by_address_only = features & 1 << 19 != 0;
    for number in 0..8 {
        let at = GITS_BASER + 8 * number;
        let kind = registers.read64_whole(at) >> 56 & 7;
        if kind == DEVICES || kind == COLLECTIONS {
            // 8 bytes for every function of 256 buses.
            let pages = if kind == DEVICES { 8 } else { 1 };
            let table = block(pages * TABLE_BYTES, TABLE_BYTES)?;
            registers.write64_whole(at, VALID | SHARED_CACHED | table | PAGE_64K | (pages as u64 - 1));
        }
    }
    let queue = block(QUEUE_BYTES as usize, TABLE_BYTES)?;
    registers.write64_whole(GITS_CBASER, VALID | SHARED_CACHED | queue);
    registers.write64_whole(GITS_CWRITER, 0);
    registers.write32(GITS_CTLR, ENABLED);
    let mut its = Its {
        registers,
        queue,
        next: 0,
        target: if by_address_only { by_address } else { by_number << 16 },
        entry: (features >> 4 & 0xf) + 1,
        devices: BTreeMap::new(),
        events: BTreeMap::new(),
    };
    let target = its.target;
    its.command([MAPC, 0, VALID | target, 0]);
    its.run()?;
    // SAFETY: the boot processor is alone here.
    unsafe { *ITS.0.get() = Some(its) };
    Ok(())
}

/// The message by which MSI-X entry `entry` of the function `requester` interrupts the boot processor. The same every
/// time.
pub fn connect(requester: u16, entry: u16) -> Result<Message, String> {
    // SAFETY: the boot processor alone uses it, and this function does not call itself.
    let its = unsafe { &mut *ITS.0.get() }.as_mut().ok_or("no ITS")?;
    let vector = match its.events.get(&(requester, entry)) {
        Some(vector) => *vector,
        None => its.map(requester, entry)?,
    };
    Ok(Message {
        vector,
        address: its.registers.address() + GITS_TRANSLATER,
        data: u32::from(entry),
    })
}

impl Its {
    fn command(&mut self, words: [u64; 4]) {
        // SAFETY: a slot of the queue, which the ITS has read: it is waited for after each few commands.
        unsafe { ((self.queue + self.next) as *mut [u64; 4]).write_volatile(words) };
        self.next = (self.next + COMMAND_BYTES) % QUEUE_BYTES;
    }

    /// Lets the ITS carry out what was queued, and waits for it.
    fn run(&mut self) -> Result<(), String> {
        self.command([SYNC, 0, self.target, 0]);
        self.registers.write64_whole(GITS_CWRITER, self.next);
        loop {
            match self.registers.read64_whole(GITS_CREADR) {
                at if at & 1 != 0 => return Err("the ITS has stalled".into()),
                at if at == self.next => return Ok(()),
                _ => core::hint::spin_loop(),
            }
        }
    }

    fn map(&mut self, requester: u16, entry: u16) -> Result<u8, String> {
        if self.events.len() >= MOST_EVENTS {
            return Err("all vectors are in use".into());
        }
        let device = u64::from(requester) << 32;
        if !self.devices.contains_key(&requester) {
            let table = block((self.entry << EVENT_BITS) as usize, 4096)?;
            self.command([MAPD | device, EVENT_BITS - 1, VALID | table, 0]);
            self.devices.insert(requester, table);
        }
        let vector = new_vector();
        let lpi = u64::from(FIRST_LPI) + u64::from(vector);
        self.command([MAPTI | device, lpi << 32 | u64::from(entry), 0, 0]);
        self.run()?;
        self.events.insert((requester, entry), vector);
        Ok(vector)
    }
}
