//! What the first vCPU finds in memory: kernel, initramfs, and the machine described by ACPI or by a device tree.

use triarch_boot::arm64::{self, Chosen, EfiPointers};
use triarch_boot::{LayoutError, MemKind, MemMapEntry, MemRange, MemoryLayout, open_boot_file};
use triarch_legacy::PL031_SIZE;
use triarch_memory::GuestMemory;
use triarch_tables::acpi;
use triarch_tables::efi::{self, EfiConfig, Runtime};

use super::{describe, layout, runtime};
use crate::LoadConfig;
use crate::common::load::{LoadError, ram, write_pieces, write_smbios};

/// State of the first vCPU at its first instruction.
pub struct Entry {
    /// Address of the kernel.
    pub(super) kernel: u64,
    /// Address of the device tree.
    pub(super) device_tree: u64,
}

/// Loads everything and says how the first vCPU starts.
pub fn load(config: &LoadConfig<'_>) -> Result<Entry, LoadError> {
    let memory = memory_layout(config.memory)?;
    let mut file = open_boot_file(&config.kernel, "kernel")?;
    let kernel = arm64::load_image(config.memory, &memory, layout::KERNEL, &mut file, &config.kernel)?;
    let initramfs = match &config.initramfs {
        Some(path) => {
            let mut file = open_boot_file(path, "initramfs")?;
            Some(arm64::load_initramfs(config.memory, &memory, &kernel, &mut file, path)?)
        }
        None => None,
    };
    let chosen = Chosen {
        cmdline: &config.cmdline,
        initramfs,
        room: layout::DEVICE_TREE.size as usize,
    };
    let tree = if config.device_tree {
        arm64::device_tree(&chosen, &describe::device_tree(config))?
    } else {
        arm64::stub_device_tree(&chosen, &write_tables(config)?)?
    };
    write_pieces(config.memory, [(layout::DEVICE_TREE.start, &tree[..])])?;
    Ok(Entry {
        kernel: kernel.entry.0,
        device_tree: layout::DEVICE_TREE.start,
    })
}

fn memory_layout(memory: &GuestMemory) -> Result<MemoryLayout, LayoutError> {
    let ranges = ram(memory).map(|(start, size)| MemRange { start, size });
    let reserved = [layout::DEVICE_TREE, layout::TABLES].map(|range| MemMapEntry {
        range,
        kind: MemKind::Reserved,
    });
    MemoryLayout::new(ranges.collect(), reserved.to_vec())
}

/// Writes ACPI, SMBIOS and the EFI tables that lead to them.
fn write_tables(config: &LoadConfig<'_>) -> Result<EfiPointers, LoadError> {
    let tables = acpi::arm::build(&describe::acpi(config))?;
    write_pieces(config.memory, tables.pieces())?;
    let place = layout::SMBIOS;
    write_smbios(config, place.start, place.size as usize)?;
    let efi = efi::build(&EfiConfig {
        at: layout::EFI_TABLES,
        rsdp: tables.rsdp_at,
        smbios: Some(place.start),
        ram: ram(config.memory).collect(),
        tables: (layout::TABLES.start, layout::TABLES.size),
        runtime: Runtime {
            code: runtime::code(),
            place: (layout::EFI_RUNTIME.start, layout::EFI_RUNTIME.size),
            registers: (layout::RTC, PL031_SIZE),
        },
    });
    let pieces = [
        (layout::EFI_TABLES, &efi.bytes[..]),
        (layout::EFI_RUNTIME.start, &efi.runtime[..]),
    ];
    write_pieces(config.memory, pieces)?;
    Ok(EfiPointers {
        system_table: efi.system_table,
        memory_map: efi.memory_map,
        memory_map_size: efi.memory_map_size,
        descriptor_size: efi::DESCRIPTOR_SIZE,
        descriptor_version: efi::DESCRIPTOR_VERSION,
    })
}
