//! Identity mappings above 4 GiB: 1 GiB at a time, made when first asked for. The page tables are ordinary memory to
//! ring 3, and a new entry needs no flush (not-present entries are not cached: Intel SDM 3A §4.10.2.3).

use alloc::alloc::{Layout, alloc_zeroed};
use core::ops::Range;

const PRESENT: u64 = 0x27; // present, writable, user, accessed
const LARGE: u64 = 0xe7; // the same, dirty, page size
const UNCACHED: u64 = 0x18;

fn new_table() -> *mut [u64; 512] {
    // SAFETY: the layout is not empty.
    unsafe { alloc_zeroed(Layout::new::<[u64; 512]>().align_to(4096).unwrap()).cast() }
}

/// Makes `range` accessible; `ram` tells whether it may be cached. False when it lies beyond what the tables reach.
pub fn map(range: &Range<u64>, ram: bool) -> bool {
    const GIB: u64 = 1 << 30;
    let mut gib = range.start & !(GIB - 1);
    while gib < range.end {
        if !map_gib(gib, ram) {
            return false;
        }
        gib += GIB;
    }
    true
}

fn map_gib(gib: u64, ram: bool) -> bool {
    const PML4: u64 = 0x10_3000;
    if gib >> 47 != 0 {
        return false;
    }
    // SAFETY: the tables built in boot.s and here; only the boot processor changes them, and only from absent to
    // present.
    unsafe {
        let top = (PML4 as *mut u64).add((gib >> 39) as usize);
        if top.read() & 1 == 0 {
            let table = new_table();
            if table.is_null() {
                return false;
            }
            top.write(table as u64 | PRESENT);
        }
        let pointers = (top.read() & !0xfff) as *mut u64;
        let slot = pointers.add((gib >> 30) as usize & 511);
        if slot.read() & 1 == 0 {
            let table = new_table();
            if table.is_null() {
                return false;
            }
            let flags = if ram { LARGE } else { LARGE | UNCACHED };
            for (n, entry) in (*table).iter_mut().enumerate() {
                *entry = gib + ((n as u64) << 21) + flags;
            }
            slot.write(table as u64 | PRESENT);
        }
    }
    true
}
