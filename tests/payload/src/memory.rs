//! What the PVH start information tells: RAM, command line, RSDP (Xen's public/arch-x86/hvm/start_info.h).

use crate::heap;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

/// `hvm_start_info`.
#[repr(C)]
pub struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    cmdline: u64,
    rsdp: u64,
    memmap: u64,
    memmap_entries: u32,
    reserved: u32,
}

/// One entry of the memory map.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MapEntry {
    /// First guest-physical address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
    /// E820 type; 1 is RAM.
    pub kind: u32,
    reserved: u32,
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
}

const MAGIC: u32 = 0x336e_c578;

impl Platform {
    /// Reads the start information at guest-physical `address`.
    ///
    /// # Safety
    /// `address` is what the VMM passed in EBX: the structure and what it points to lie in mapped RAM.
    pub unsafe fn read(address: u64) -> Result<Self, &'static str> {
        // SAFETY: by contract.
        let info = unsafe { (address as *const StartInfo).read_unaligned() };
        if info.magic != MAGIC {
            return Err("start info has a wrong magic number");
        }
        let mut cmdline = String::new();
        if info.cmdline != 0 {
            for n in 0..4096 {
                // SAFETY: the string is in RAM and NUL-terminated.
                match unsafe { (info.cmdline as *const u8).add(n).read() } {
                    0 => break,
                    byte => cmdline.push(char::from(byte)),
                }
            }
        }
        let mut map = Vec::new();
        if info.version >= 1 {
            for n in 0..(info.memmap_entries as usize).min(256) {
                // SAFETY: the table holds that many entries.
                map.push(unsafe { (info.memmap as *const MapEntry).add(n).read_unaligned() });
            }
        }
        Ok(Self {
            rsdp: info.rsdp,
            cmdline,
            map,
            modules: info.module_count,
        })
    }

    /// Bytes of RAM in all.
    pub fn ram(&self) -> u64 {
        self.map
            .iter()
            .filter(|entry| entry.kind == 1)
            .map(|entry| entry.size)
            .sum()
    }

    /// RAM that nothing but the tests uses: above the heap, page-aligned, in address order.
    pub fn arenas(&self) -> Vec<Range<u64>> {
        let mut arenas: Vec<_> = self
            .map
            .iter()
            .filter(|entry| entry.kind == 1)
            .map(|entry| entry.base.max(heap::RANGE.end).next_multiple_of(4096)..(entry.base + entry.size) & !4095)
            .filter(|range| range.start < range.end)
            .collect();
        arenas.sort_by_key(|range| range.start);
        arenas
    }

    /// Whether `range` lies in test RAM whole.
    pub fn is_arena(&self, range: &Range<u64>) -> bool {
        self.arenas()
            .iter()
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
