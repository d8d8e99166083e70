//! What the VMM told about the machine at entry, and which RAM is for tests.

use crate::arch::boot::HEAP;
use alloc::alloc::{Layout, alloc_zeroed};
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

/// One entry of the memory map.
#[derive(Clone, Copy)]
pub struct MapEntry {
    /// First guest-physical address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
    /// Type as the map has it: of E820 on x86, of UEFI on ARM.
    pub kind: u32,
    /// Free to use.
    pub ram: bool,
}

/// What the VMM told us at entry.
pub struct Platform {
    /// Address of the ACPI root pointer, 0 when not given.
    pub rsdp: u64,
    /// The command line.
    pub cmdline: String,
    /// The memory map.
    pub map: Vec<MapEntry>,
    /// Number of modules (initramfs).
    pub modules: u32,
    /// Where memory devices have memory, if they have: nothing but the tests uses it.
    pub rooms: Vec<Range<u64>>,
}

impl Platform {
    /// Bytes of RAM in all.
    pub fn ram(&self) -> u64 {
        self.map.iter().filter(|entry| entry.ram).map(|entry| entry.size).sum()
    }

    /// RAM that nothing but the tests uses: above the heap, page-aligned, in address order, neighbours joined.
    pub fn arenas(&self) -> Vec<Range<u64>> {
        let mut arenas: Vec<_> = self
            .map
            .iter()
            .filter(|entry| entry.ram)
            .map(|entry| entry.base.max(HEAP.end).next_multiple_of(4096)..(entry.base + entry.size) & !4095)
            .filter(|range| range.start < range.end)
            .collect();
        arenas.sort_by_key(|range| range.start);
        // Memory that came lies behind other memory, and is one with it for whoever uses it.
        let mut joined: Vec<Range<u64>> = Vec::new();
        for arena in arenas {
            match joined.last_mut() {
                Some(last) if last.end == arena.start => last.end = arena.end,
                _ => joined.push(arena),
            }
        }
        joined
    }

    /// Takes the region of a memory device for test RAM, which it is as far as it is plugged.
    pub fn add_room(&mut self, room: Range<u64>) {
        if !self.rooms.contains(&room) {
            self.rooms.push(room);
        }
    }

    /// Whether `range` lies in test RAM whole.
    pub fn is_arena(&self, range: &Range<u64>) -> bool {
        let arenas = self.arenas();
        arenas
            .iter()
            .chain(&self.rooms)
            .any(|arena| arena.start <= range.start && range.end <= arena.end)
    }
}

/// The bytes at a mapped guest-physical address.
///
/// # Safety
/// The range is mapped RAM (or table memory) that nobody writes while the slice lives.
pub unsafe fn bytes(address: u64, len: usize) -> &'static [u8] {
    // SAFETY: by contract.
    unsafe { core::slice::from_raw_parts(address as *const u8, len) }
}

/// `len` zeroed bytes that are never freed, aligned to `align`; their address.
pub fn block(len: usize, align: usize) -> Result<u64, String> {
    let layout = Layout::from_size_align(len.max(1), align).map_err(|_| "bad layout")?;
    // SAFETY: the layout is not empty.
    match unsafe { alloc_zeroed(layout) } as u64 {
        0 => Err("out of memory".into()),
        address => Ok(address),
    }
}
