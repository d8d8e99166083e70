//! What the first vCPU finds in memory: kernel, initramfs, and the machine described by ACPI or by a device tree.

use thiserror::Error;
use triarch_boot::arm64::{self, Chosen, EfiPointers, FdtError};
use triarch_boot::{
    InitramfsError, KernelError, LayoutError, MemKind, MemMapEntry, MemRange, MemoryLayout, OpenError, open_boot_file,
};
use triarch_legacy::PL031_SIZE;
use triarch_memory::GuestMemory;
use triarch_tables::acpi::{self, AcpiError};
use triarch_tables::efi::{self, EfiConfig, Runtime};
use triarch_tables::smbios::{self, SmbiosConfig, SmbiosError, UuidError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::{describe, layout, runtime};
use crate::LoadConfig;

/// State of the first vCPU at its first instruction.
pub struct Entry {
    /// Address of the kernel.
    pub(super) kernel: u64,
    /// Address of the device tree.
    pub(super) device_tree: u64,
}

/// Why a guest could not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The file cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The kernel cannot be used.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initramfs cannot be used.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The device tree cannot be made.
    #[error(transparent)]
    DeviceTree(#[from] FdtError),
    /// The memory map is invalid.
    #[error("the guest's memory map is invalid")]
    Layout(#[from] LayoutError),
    /// ACPI.
    #[error("cannot describe the machine by ACPI")]
    Acpi(#[from] AcpiError),
    /// SMBIOS.
    #[error("cannot describe the machine by SMBIOS")]
    Smbios(#[from] SmbiosError),
    /// The UUID is no UUID.
    #[error("--platform uuid is invalid")]
    Uuid(#[from] UuidError),
    /// A structure does not fit into guest memory.
    #[error("the guest has too little memory for its boot data")]
    Memory(#[from] GuestMemoryError),
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
    config
        .memory
        .write_slice(&tree, GuestAddress(layout::DEVICE_TREE.start))?;
    Ok(Entry {
        kernel: kernel.entry.0,
        device_tree: layout::DEVICE_TREE.start,
    })
}

/// Regions of RAM: first address and length in bytes.
pub(super) fn ram(memory: &GuestMemory) -> Vec<(u64, u64)> {
    memory.iter().map(|r| (r.start_addr().0, r.len())).collect()
}

fn memory_layout(memory: &GuestMemory) -> Result<MemoryLayout, LayoutError> {
    let ranges = ram(memory).into_iter().map(|(start, size)| MemRange { start, size });
    let reserved = [layout::DEVICE_TREE, layout::TABLES].map(|range| MemMapEntry {
        range,
        kind: MemKind::Reserved,
    });
    MemoryLayout::new(ranges.collect(), reserved.to_vec())
}

/// Writes ACPI, SMBIOS and the EFI tables that lead to them.
fn write_tables(config: &LoadConfig<'_>) -> Result<EfiPointers, LoadError> {
    let tables = acpi::arm::build(&describe::acpi(config))?;
    for (at, bytes) in tables.pieces() {
        config.memory.write_slice(bytes, GuestAddress(at))?;
    }
    let identity = SmbiosConfig {
        version: env!("CARGO_PKG_VERSION").into(),
        serial_number: config.serial_number.clone(),
        uuid: config.uuid.as_deref().map(smbios::parse_uuid).transpose()?,
        oem_strings: config.oem_strings.clone(),
    };
    let place = layout::SMBIOS;
    let bytes = smbios::build(&identity, place.start, place.size as usize)?;
    config.memory.write_slice(&bytes, GuestAddress(place.start))?;
    let efi = efi::build(&EfiConfig {
        at: layout::EFI_TABLES,
        rsdp: tables.rsdp_at,
        smbios: Some(place.start),
        ram: ram(config.memory),
        tables: (layout::TABLES.start, layout::TABLES.size),
        runtime: Runtime {
            code: runtime::code(),
            place: (layout::EFI_RUNTIME.start, layout::EFI_RUNTIME.size),
            registers: (layout::RTC, PL031_SIZE),
        },
    });
    for (at, bytes) in [
        (layout::EFI_TABLES, &efi.bytes),
        (layout::EFI_RUNTIME.start, &efi.runtime),
    ] {
        config.memory.write_slice(bytes, GuestAddress(at))?;
    }
    Ok(EfiPointers {
        system_table: efi.system_table,
        memory_map: efi.memory_map,
        memory_map_size: efi.memory_map_size,
        descriptor_size: efi::DESCRIPTOR_SIZE,
        descriptor_version: efi::DESCRIPTOR_VERSION,
    })
}
