//! Mappings above the first two GiB: 1 GiB at a time, made when first asked for, every address at itself.

use alloc::alloc::{Layout, alloc_zeroed};
use core::arch::asm;
use core::ops::Range;

const VALID: u64 = 1;
const TABLE: u64 = 3;
/// Blocks as in boot.s.
const DEVICE: u64 = 0x0060_0000_0000_0401;
const NORMAL: u64 = 0x705;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
const GIB: u64 = 1 << 30;
/// What 48 bits reach.
const END: u64 = 1 << 48;

unsafe extern "C" {
    static mut page_tables: [u64; 512];
}

fn new_table() -> Option<*mut u64> {
    let layout = Layout::from_size_align(4096, 4096).ok()?;
    // SAFETY: the layout is not empty.
    let table: *mut u64 = unsafe { alloc_zeroed(layout) }.cast();
    (!table.is_null()).then_some(table)
}

/// Makes the physical `range` accessible and returns its virtual address; `ram` tells whether it may be cached. `None`
/// when there is no memory for tables, or the range is beyond them.
pub fn map(range: &Range<u64>, ram: bool) -> Option<u64> {
    if range.end > END {
        return None;
    }
    let mut gib = range.start & !(GIB - 1);
    while gib < range.end {
        map_gib(gib, ram)?;
        gib += GIB;
    }
    Some(range.start)
}

fn map_gib(gib: u64, ram: bool) -> Option<()> {
    // SAFETY: the tables built in boot.s and here; only the boot processor changes them, and only from invalid to valid,
    // which needs no more than that the walker sees it (Arm ARM D8.14).
    unsafe {
        let top = (&raw mut page_tables).cast::<u64>().add((gib >> 39) as usize & 511);
        if top.read_volatile() & VALID == 0 {
            top.write_volatile(new_table()? as u64 | TABLE);
        }
        let slot = ((top.read_volatile() & ADDRESS) as *mut u64).add((gib >> 30) as usize & 511);
        if slot.read_volatile() & VALID == 0 {
            slot.write_volatile(gib | if ram { NORMAL } else { DEVICE });
            asm!("dsb ishst", "isb", options(nostack, preserves_flags));
        }
    }
    Some(())
}
