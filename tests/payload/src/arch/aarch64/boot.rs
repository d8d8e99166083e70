//! What the VMM tells an ARM guest at entry: a device tree that leads to EFI's tables, and those to memory map and ACPI
//! (Linux, Documentation/arch/arm/uefi.rst; UEFI 2.7, 4.3 to 4.6 and 7.2).

use super::fdt::{self, Tree};
use super::uart;
use crate::memory::{MapEntry, Platform, bytes};
use alloc::string::String;
use alloc::vec::Vec;
use core::arch::global_asm;
use core::ops::Range;

global_asm!(include_str!("boot.s"));

/// Where the heap starts and ends: behind the image, below the RAM that tests use. boot.s tells the VMM of it.
pub const HEAP: Range<u64> = 0x4060_0000..0x4100_0000;

const SYSTEM_TABLE: usize = 120;
const ACPI_20: [u8; 16] = [
    0x71, 0xe8, 0x68, 0x88, 0xf1, 0xe4, 0xd3, 0x11, 0xbc, 0x22, 0x00, 0x80, 0xc7, 0x3c, 0x88, 0x81,
];

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
    word.map_or(0, u64::from_le_bytes)
}

/// Reads the device tree at guest-physical `address` and what it points to.
///
/// # Safety
/// `address` is what the VMM passed in x0: the tree and what it points to lie in the first GiB of RAM.
pub unsafe fn read(address: u64) -> Result<Platform, &'static str> {
    // SAFETY: by contract.
    let tree = unsafe { Tree::at(address) }.ok_or("no device tree")?;
    let chosen = |name: &str| tree.property("chosen", name);
    let cmdline: String = fdt::text(chosen("bootargs").unwrap_or(&[]))
        .iter()
        .map(|byte| char::from(*byte))
        .collect();
    if cmdline.starts_with("bench") {
        uart::write("T");
    }
    let number = |name: &str| chosen(name).and_then(fdt::number);
    let system = number("linux,uefi-system-table").ok_or("no EFI system table")?;
    let (map, size, step) = number("linux,uefi-mmap-start")
        .zip(number("linux,uefi-mmap-size"))
        .zip(number("linux,uefi-mmap-desc-size"))
        .map(|((map, size), step)| (map, size as usize, step as usize))
        .ok_or("no EFI memory map")?;
    if !(40..=4096).contains(&step) || size > 1 << 16 {
        return Err("the EFI memory map has an odd size");
    }
    // SAFETY: by contract; sizes are checked.
    let map = unsafe { bytes(map, size) };
    // SAFETY: by contract.
    let rsdp = unsafe { rsdp(bytes(system, SYSTEM_TABLE)) }?;
    Ok(Platform {
        rsdp,
        cmdline,
        map: map.chunks_exact(step).map(entry).collect::<Vec<_>>(),
        modules: u32::from(number("linux,initrd-start").is_some()),
        rooms: alloc::vec::Vec::new(),
    })
}

fn entry(descriptor: &[u8]) -> MapEntry {
    let kind = u64_at(descriptor, 0) as u32;
    MapEntry {
        base: u64_at(descriptor, 8),
        size: u64_at(descriptor, 24).saturating_mul(4096),
        kind,
        // Loader and boot services, conventional, and what holds the ACPI tables.
        ram: matches!(kind, 1..=4 | 7 | 9),
    }
}

/// ACPI's root pointer among the configuration tables.
///
/// # Safety
/// What the system table points to lies in mapped RAM.
unsafe fn rsdp(system: &[u8]) -> Result<u64, &'static str> {
    if !system.starts_with(b"IBI SYST") {
        return Err("the EFI system table has a wrong signature");
    }
    let count = u64_at(system, 104).min(64) as usize;
    // SAFETY: by contract.
    let tables = unsafe { bytes(u64_at(system, 112), count * 24) };
    tables
        .chunks_exact(24)
        .find(|table| table.starts_with(&ACPI_20))
        .map(|table| u64_at(table, 16))
        .ok_or("EFI has no ACPI table")
}

/// Where else a root pointer may lie: nowhere.
pub fn rsdp_places() -> impl Iterator<Item = u64> {
    core::iter::empty()
}
