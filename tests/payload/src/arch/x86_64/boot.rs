//! What the PVH start information tells: RAM, command line, RSDP (Xen's public/arch-x86/hvm/start_info.h).

use crate::memory::{MapEntry, Platform};
use alloc::string::String;
use alloc::vec::Vec;
use core::arch::global_asm;
use core::ops::Range;

global_asm!(include_str!("boot.s"), options(att_syntax));

/// Where the heap starts and ends: behind the image, below the RAM that tests use.
pub const HEAP: Range<u64> = 0x20_0000..0x100_0000;

/// `hvm_start_info`.
#[repr(C)]
struct StartInfo {
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

/// `hvm_memmap_table_entry`.
#[repr(C)]
struct Entry {
    base: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

const MAGIC: u32 = 0x336e_c578;
/// The E820 type of RAM.
const RAM: u32 = 1;

/// Reads the start information at guest-physical `address`.
///
/// # Safety
/// `address` is what the VMM passed in EBX: the structure and what it points to lie in mapped RAM.
pub unsafe fn read(address: u64) -> Result<Platform, &'static str> {
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
            let Entry { base, size, kind, .. } = unsafe { (info.memmap as *const Entry).add(n).read_unaligned() };
            map.push(MapEntry {
                base,
                size,
                kind,
                ram: kind == RAM,
            });
        }
    }
    Ok(Platform {
        rsdp: info.rsdp,
        cmdline,
        map,
        modules: info.module_count,
        rooms: alloc::vec::Vec::new(),
    })
}

/// Where else a root pointer may lie: the BIOS area and the EBDA.
pub fn rsdp_places() -> impl Iterator<Item = u64> {
    (0xe_0000..0x10_0000)
        .step_by(16)
        .chain((0x9_fc00..0xa_0400).step_by(16))
}
