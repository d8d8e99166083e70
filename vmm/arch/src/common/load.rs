//! What loading a guest has in common on every architecture.

use thiserror::Error;
use triarch_boot::{InitramfsError, KernelError, LayoutError, OpenError};
use triarch_memory::GuestMemory;
use triarch_pci::BarAllocator;
use triarch_tables::acpi::{AcpiError, IoWindow, MemorySlots, MmioWindow, PciSegment, PciSlots, rotating_prt};
use triarch_tables::smbios::{self, SmbiosConfig, SmbiosError, UuidError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::LoadConfig;
use crate::{BootError, layout};

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
    /// What the kernel's boot protocol wants beside it cannot be made.
    #[error(transparent)]
    Boot(#[from] BootError),
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

/// Ranges of RAM: first GPA and length in bytes. Regions that touch are one: what backs them is no matter of the guest's.
pub fn ram(memory: &GuestMemory) -> impl Iterator<Item = (u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for region in memory.iter() {
        let (at, size) = (region.start_addr().0, region.len());
        match joined.last_mut() {
            Some((start, len)) if *start + *len == at => *len += size,
            _ => joined.push((at, size)),
        }
    }
    joined.into_iter()
}

/// Writes the pieces of the ACPI tables: each with its GPA.
///
/// # Errors
/// One does not lie in guest memory.
pub fn write_pieces<'a>(
    memory: &GuestMemory,
    pieces: impl IntoIterator<Item = (u64, &'a [u8])>,
) -> Result<(), GuestMemoryError> {
    pieces
        .into_iter()
        .try_for_each(|(at, bytes)| memory.write_slice(bytes, GuestAddress(at)))
}

/// Writes the SMBIOS tables to GPA `at`, into `room` bytes.
///
/// # Errors
/// The UUID is none, or they do not fit.
pub fn write_smbios(config: &LoadConfig<'_>, at: u64, room: usize) -> Result<(), LoadError> {
    let identity = SmbiosConfig {
        version: env!("CARGO_PKG_VERSION").into(),
        serial_number: config.serial_number.clone(),
        uuid: config.uuid.as_deref().map(smbios::parse_uuid).transpose()?,
        oem_strings: config.oem_strings.clone(),
    };
    let bytes = smbios::build(&identity, at, room)?;
    Ok(write_pieces(config.memory, [(at, &bytes[..])])?)
}

/// What ACPI tells of memory that comes and goes by the registers at `registers`.
pub fn memory_slots(config: &LoadConfig<'_>, registers: u64) -> Option<MemorySlots> {
    let count = config.board.memory()?.count();
    Some(MemorySlots { registers, count })
}

/// What ACPI tells of the root buses of PCI segment 0: its configuration space at GPA `ecam_base`, the windows devices are in, and the
/// registers of slots at `slots`, if the board has any.
pub fn pci_roots(config: &LoadConfig<'_>, ecam_base: u64, slots: u64) -> Vec<PciSegment> {
    let buses = (0..=u8::MAX).step_by(layout::PCI_BUSES as usize);
    // Each is for the node of its number.
    let roots = (0u32..).zip(buses.zip(config.windows));
    let root = |(node, (first_bus, windows)): (u32, (u8, &BarAllocator))| PciSegment {
        segment: 0,
        ecam_base,
        first_bus,
        last_bus: first_bus + (layout::PCI_BUSES - 1) as u8,
        io: io_windows(windows),
        mmio: mmio_windows(windows),
        prt: rotating_prt(&layout::PCI_WIRES),
        node,
        slots: config.board.slots().map(|board| PciSlots {
            registers: slots,
            first: first_bus.into(),
            // All that stays is on bus 0.
            fixed: if first_bus == 0 { board.fixed() } else { 0 },
        }),
        iommu: config.iommu.clone().filter(|_| first_bus == 0),
    };
    roots.map(root).collect()
}

fn io_windows(windows: &BarAllocator) -> Vec<IoWindow> {
    let window = Some(&windows.io).filter(|range| !range.is_empty());
    let window = window.map(|range| IoWindow {
        first: range.start,
        last: range.end - 1,
    });
    window.into_iter().collect()
}

fn mmio_windows(windows: &BarAllocator) -> Vec<MmioWindow> {
    let all = [(&windows.mmio32, false), (&windows.mmio64, true)];
    let all = all.into_iter().filter(|(range, _)| !range.is_empty());
    all.map(|(range, prefetchable)| MmioWindow {
        start: range.start,
        size: range.end - range.start,
        prefetchable,
    })
    .collect()
}
