//! Mappings above 4 GiB: 1 GiB at a time, made when first asked for. The page tables are ordinary memory to ring 3, and
//! a new entry needs no flush (not-present entries are not cached: Intel SDM 3A §4.10.2.3).
//!
//! A physical address is mapped at the virtual address with the same low 48 bits: the same number below 2^47, and in
//! the upper canonical half above, where a VMM may put 64-bit BARs.

use alloc::alloc::{Layout, alloc_zeroed};
use core::ops::Range;

const PRESENT: u64 = 0x27; // present, writable, user, accessed
const LARGE: u64 = 0xe7; // the same, dirty, page size
const UNCACHED: u64 = 0x18;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const GIB: u64 = 1 << 30;
/// The top-level table of boot.s.
const PML4: u64 = 0x10_3000;

fn new_table() -> Option<*mut u64> {
    let layout = Layout::from_size_align(4096, 4096).ok()?;
    // SAFETY: the layout is not empty.
    let table: *mut u64 = unsafe { alloc_zeroed(layout) }.cast();
    (!table.is_null()).then_some(table)
}

/// Makes the physical `range` accessible and returns its virtual address; `ram` tells whether it may be cached. `None`
/// when there is no memory for tables, or another range has the same low 48 bits.
pub fn map(range: &Range<u64>, ram: bool) -> Option<u64> {
    let mut gib = range.start & !(GIB - 1);
    while gib < range.end {
        map_gib(gib, ram)?;
        gib += GIB;
    }
    Some(((range.start << 16) as i64 >> 16) as u64)
}

fn map_gib(gib: u64, ram: bool) -> Option<()> {
    // SAFETY: the tables built in boot.s and here; only the boot processor changes them, and only from absent to
    // present.
    unsafe {
        let top = (PML4 as *mut u64).add((gib >> 39) as usize & 511);
        if top.read() & 1 == 0 {
            top.write(new_table()? as u64 | PRESENT);
        }
        let slot = ((top.read() & ADDRESS) as *mut u64).add((gib >> 30) as usize & 511);
        if slot.read() & 1 == 0 {
            let table = new_table()?;
            let flags = if ram { LARGE } else { LARGE | UNCACHED };
            for n in 0..512 {
                table.add(n).write(gib + ((n as u64) << 21) + flags);
            }
            slot.write(table as u64 | PRESENT);
        }
        let first = ((slot.read() & ADDRESS) as *const u64).read();
        (first & ADDRESS & !0xfff_ffff == gib & !0xfff_ffff).then_some(())
    }
}
