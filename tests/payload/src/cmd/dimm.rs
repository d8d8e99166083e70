//! Memory that comes and goes: what an operating system does by the methods in the DSDT, done by hand.

use super::notices::{Block, CHECK, EJECT_REQUEST, PRESENT};
use crate::arch::{paging, smp as arch};
use crate::clock::{self, Deadline};
use crate::memory::MapEntry;
use crate::shell::{Args, Reply};
use crate::{Guest, interrupts};
use alloc::format;
use alloc::string::String;

/// Bytes of a slot's registers, and where in them its memory stands.
const STRIDE: u64 = 0x20;
const ADDRESS: u64 = 0x10;
const SIZE: u64 = 0x18;
/// More slots than any VMM has.
const MOST: u64 = 64;
/// The event register's bit for memory.
const MEMORY: u8 = 2;
/// Usable RAM in the memory map.
const RAM: u32 = 1;

/// What `_CRS` says: first address and bytes.
fn place(memory: &Block, slot: u32) -> (u64, u64) {
    let wide = |at| u64::from(memory.read(slot, at)) | u64::from(memory.read(slot, at + 4)) << 32;
    (wide(ADDRESS), wide(SIZE))
}

/// `dimm count|events|status|place|next|eject|ost|take|drop|serve|timed`
pub fn run(guest: &mut Guest, args: &mut Args) -> Reply {
    let memory = Block::map(arch::MEMORY_HOTPLUG, "slot", MOST, STRIDE)?;
    let what = args.word("what")?;
    if let Some(answer) = memory.run(what, args)? {
        return Ok(answer);
    }
    Ok(match what {
        "place" => {
            let (start, size) = place(&memory, memory.index(args)?);
            format!("{start:#x}+{size:#x}")
        }
        "take" => {
            take(guest, &memory, memory.index(args)?)?;
            String::new()
        }
        "drop" => {
            forget(guest, &memory, memory.index(args)?);
            String::new()
        }
        "serve" => serve(guest, &memory, args)?.0,
        "timed" => {
            let (answer, us) = serve(guest, &memory, args)?;
            format!("{answer} us={us}")
        }
        other => return Err(format!("dimm {other}?")),
    })
}

/// Makes the memory in `slot` test RAM, once both of its ends are found to be memory.
fn take(guest: &mut Guest, memory: &Block, slot: u32) -> Result<(), String> {
    if memory.status(slot) != PRESENT {
        return Err(format!("slot {slot} is empty"));
    }
    let (base, size) = place(memory, slot);
    let range = base..base.checked_add(size).ok_or("the range wraps")?;
    if size < 8 || paging::map(&range, true) != Some(base) {
        return Err(format!("{base:#x}+{size:#x} cannot be mapped"));
    }
    for at in [base, base + size - 8] {
        let word = at as *mut u64;
        // SAFETY: the VMM says that there is memory, nothing uses it yet, and it was mapped just now.
        let found = unsafe {
            word.write_volatile(!at);
            word.read_volatile()
        };
        if found != !at {
            return Err(format!("there is no memory at {at:#x}"));
        }
    }
    guest.platform.map.retain(|entry| entry.base != base);
    guest.platform.map.push(MapEntry {
        base,
        size,
        kind: RAM,
        ram: true,
    });
    Ok(())
}

/// Uses the memory in `slot` no more.
fn forget(guest: &mut Guest, memory: &Block, slot: u32) {
    let (base, size) = place(memory, slot);
    guest
        .platform
        .map
        .retain(|entry| (entry.base, entry.size) != (base, size));
}

/// `dimm serve N MS`: does what N notices ask for as an operating system would, and gives up after so many milliseconds. `dimm timed` also
/// tells how many microseconds it took from the first interrupt on.
fn serve(guest: &mut Guest, memory: &Block, args: &mut Args) -> Result<(String, u64), String> {
    let wanted = args.number("N")?;
    let deadline = Deadline::after_ms(args.number_to("MS", 600_000)?);
    let (mut taken, mut ejected) = (0u64, 0u64);
    let mut heard = None;
    while taken + ejected < wanted {
        if deadline.left().is_none() {
            return Err(format!("taken={taken} ejected={ejected} and no more notices"));
        }
        if arch::take_events()? & MEMORY == 0 {
            interrupts::sleep(0, interrupts::count(0), 200_000);
            continue;
        }
        heard.get_or_insert_with(clock::ticks);
        while let Some((slot, value)) = memory.next() {
            match value {
                CHECK => {
                    take(guest, memory, slot)?;
                    memory.ost(slot, CHECK, 0);
                    taken += 1;
                }
                EJECT_REQUEST => {
                    forget(guest, memory, slot);
                    memory.eject(slot);
                    memory.ost(slot, EJECT_REQUEST, 0);
                    ejected += 1;
                }
                other => return Err(format!("notice {other} for slot {slot}?")),
            }
        }
    }
    let us = heard.map_or(0, |heard| clock::nanoseconds(clock::ticks() - heard) / 1000);
    Ok((format!("taken={taken} ejected={ejected}"), us))
}
