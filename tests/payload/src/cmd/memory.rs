//! Commands about RAM.

use crate::arch::paging;
use crate::clock::{self, Deadline};
use crate::shell::{Args, Reply};
use crate::{Guest, data, interrupts, serial};
use alloc::format;
use alloc::string::String;
use core::fmt::Write;
use core::ops::Range;

/// A range of test RAM from `ADDR LEN`, mapped, as bytes.
fn range(guest: &Guest, args: &mut Args) -> Result<&'static mut [u8], String> {
    let (start, len) = (args.number("ADDR")?, args.number("LEN")?);
    let range = start..start.checked_add(len).ok_or("range wraps")?;
    slice(guest, &range)
}

fn slice(guest: &Guest, range: &Range<u64>) -> Result<&'static mut [u8], String> {
    if !guest.platform.is_arena(range) {
        return Err(format!("{:#x}..{:#x} is not test RAM", range.start, range.end));
    }
    if paging::map(range, true) != Some(range.start) {
        return Err("out of reach of the page tables".into());
    }
    // SAFETY: RAM that nothing else uses (above the heap), mapped just now; callers hold one slice at a time.
    Ok(unsafe { core::slice::from_raw_parts_mut(range.start as *mut u8, (range.end - range.start) as usize) })
}

/// `mem map|arenas|fill|zero|verify|checksum`
pub fn run(guest: &Guest, args: &mut Args) -> Reply {
    match args.word("what")? {
        "map" => {
            let mut text = String::new();
            for entry in &guest.platform.map {
                let _ = write!(
                    text,
                    "{}{:#x}+{:#x}:{}",
                    if text.is_empty() { "" } else { " " },
                    entry.base,
                    entry.size,
                    entry.kind
                );
            }
            Ok(text)
        }
        "arenas" => {
            let mut text = String::new();
            for arena in guest.platform.arenas() {
                let _ = write!(
                    text,
                    "{}{:#x}+{:#x}",
                    if text.is_empty() { "" } else { " " },
                    arena.start,
                    arena.end - arena.start
                );
            }
            Ok(text)
        }
        "fill" => {
            let bytes = range(guest, args)?;
            data::fill(bytes, args.number("SEED")?, 0);
            Ok(String::new())
        }
        "zero" => {
            range(guest, args)?.fill(0);
            Ok(String::new())
        }
        "verify" => {
            let bytes = range(guest, args)?;
            let seed = args.number("SEED")?;
            let mut expected = [0; 512];
            for (block, chunk) in bytes.chunks(512).enumerate() {
                data::fill(&mut expected[..chunk.len()], seed, block as u64);
                if chunk != &expected[..chunk.len()] {
                    return Err(format!("differs in block {block} at {:#x}", chunk.as_ptr() as u64));
                }
            }
            Ok(String::new())
        }
        "checksum" => Ok(format!("crc32={:#010x}", data::crc32(0, range(guest, args)?))),
        other => Err(format!("mem {other}?")),
    }
}

/// `dirty PAGES RATE SECONDS`: counts up the first word of PAGES pages of the largest test range, one after the other
/// and round again, RATE pages a second (0: as fast as it goes), for SECONDS (0: until a byte comes over the serial
/// line). With `spin=US` it does nothing for so many microseconds after each page. `gap_us` is the longest time between two batches, a
/// millisecond if nothing keeps it.
pub fn dirty(guest: &Guest, args: &mut Args) -> Reply {
    let (pages, rate, seconds) = (args.number("PAGES")?, args.number("RATE")?, args.number("SECONDS")?);
    let spin = args.option("spin", 0);
    let arena = guest
        .platform
        .arenas()
        .into_iter()
        .max_by_key(|arena| arena.end - arena.start)
        .ok_or("no test RAM")?;
    let bytes = slice(
        guest,
        &(arena.start
            ..arena.start
                + pages
                    .checked_mul(4096)
                    .filter(|len| *len > 0)
                    .ok_or("bad number of pages")?),
    )?;
    let words = |page: u64| (bytes.as_ptr() as u64 + page * 4096) as *mut u64;
    let start = clock::ticks();
    let end = if seconds == 0 {
        u64::MAX
    } else {
        start + clock::ticks_of_ms(seconds * 1000)
    };
    let (mut written, mut stopped) = (0u64, false);
    let (mut last, mut gap) = (start, 0);
    while clock::ticks() < end && !stopped {
        let now = clock::ticks();
        (gap, last) = (gap.max(now - last), now);
        // A batch of a millisecond's worth, then sleep until its time is over.
        let due = if rate == 0 {
            written + if spin > 0 { 16 } else { 1024 }
        } else {
            (clock::nanoseconds(clock::ticks() - start) / 1_000_000 + 1) * rate / 1000
        };
        while written < due {
            let word = words(written % pages);
            // SAFETY: inside `bytes`, which this function alone uses.
            unsafe { word.write_volatile(word.read_volatile().wrapping_add(1)) };
            written += 1;
            let after = Deadline::after_us(spin);
            while spin > 0 && after.left().is_some() {
                core::hint::spin_loop();
            }
        }
        if rate != 0 {
            let nap = Deadline::after_us(1000);
            if let Some(left) = nap.left() {
                interrupts::sleep(serial::VECTOR, interrupts::count(serial::VECTOR), left);
            }
        }
        stopped = seconds == 0 && serial::read_byte().is_some();
    }
    let us = clock::nanoseconds(clock::ticks() - start) / 1000;
    Ok(format!(
        "start={:#x} pages={written} us={us} rate={} gap_us={}",
        arena.start,
        written * 1_000_000 / us.max(1),
        clock::nanoseconds(gap) / 1000
    ))
}
