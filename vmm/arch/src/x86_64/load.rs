//! What the first vCPU finds in memory: kernel, initramfs, ACPI, SMBIOS, boot data.

use thiserror::Error;
use triarch_boot::{
    BootDataError, BootEntry, BootLayout, BootParams, BootTarget, CpuTables, InitramfsError, KernelError, LayoutError,
    MemKind, MemMapEntry, MemRange, MemoryLayout, OpenError, load_initramfs, load_kernel, open_boot_file,
    write_boot_data,
};
use triarch_memory::GuestMemory;
use triarch_pci::BarAllocator;
use triarch_tables::acpi::{
    self, AcpiConfig, AcpiError, AcpiPlacement, Cpu, EventDevice, InterruptConfig, IoApic, IoWindow, MmioWindow,
    PciSegment, PmConfig, Register, ResetRegister, Rtc, SerialPort,
};
use triarch_tables::smbios::{self, SmbiosConfig, SmbiosError, UuidError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::{board, layout};
use crate::LoadConfig;

/// State of the first vCPU at its first instruction.
pub struct Entry {
    pub(super) boot: BootEntry,
    pub(super) tables: CpuTables,
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
    /// The boot data cannot be written.
    #[error(transparent)]
    BootData(#[from] BootDataError),
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
    let boot_layout = BootLayout::X86_64;
    let target = BootTarget {
        mem: config.memory,
        memory: &memory,
        layout: &boot_layout,
        memory_is_zero: true,
    };

    let mut file = open_boot_file(&config.kernel, "kernel")?;
    let kernel = load_kernel(&target, &mut file, &config.kernel)?;
    let initramfs = match &config.initramfs {
        Some(path) => {
            let mut file = open_boot_file(path, "initramfs")?;
            Some(load_initramfs(&target, &kernel, &mut file, path)?)
        }
        None => None,
    };
    let rsdp = write_tables(config)?;
    let params = BootParams {
        kernel: &kernel,
        initramfs,
        cmdline: &config.cmdline,
        rsdp: Some(rsdp),
    };
    let boot = write_boot_data(&target, &params)?;
    let tables = CpuTables::write(config.memory, &boot_layout, boot.mode)?;
    Ok(Entry { boot, tables })
}

fn memory_layout(memory: &GuestMemory) -> Result<MemoryLayout, LayoutError> {
    let ram = memory
        .iter()
        .map(|r| MemRange {
            start: r.start_addr().0,
            size: r.len(),
        })
        .collect();
    let ecam = MemRange {
        start: layout::ECAM,
        size: layout::PCI_BUSES * layout::ECAM_BUS_SIZE,
    };
    let reserved = [layout::ACPI_TABLES, layout::SMBIOS, ecam];
    let reserved = reserved
        .into_iter()
        .map(|range| MemMapEntry {
            range,
            kind: MemKind::Reserved,
        })
        .collect();
    MemoryLayout::new(ram, reserved)
}

/// Code at [`layout::RESET_VECTOR`]: asks the keyboard controller for a reset, then halts.
///
/// Linux believes every machine with hardware-reduced ACPI to have EFI, restarts it by EFI unless its command line says
/// otherwise, finds that there is none, and goes on with the BIOS's reset vector (arch/x86/kernel/reboot.c).
const RESET_CODE: [u8; 7] = [
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];

/// Writes ACPI and SMBIOS tables and returns the address of the RSDP.
fn write_tables(config: &LoadConfig<'_>) -> Result<GuestAddress, LoadError> {
    let tables = acpi::build(&acpi_config(config))?;
    for (at, bytes) in tables.pieces() {
        config.memory.write_slice(bytes, GuestAddress(at))?;
    }
    let identity = SmbiosConfig {
        version: env!("CARGO_PKG_VERSION").into(),
        serial_number: config.serial_number.clone(),
        uuid: config.uuid.as_deref().map(smbios::parse_uuid).transpose()?,
        oem_strings: config.oem_strings.clone(),
    };
    let room = (layout::RESET_VECTOR - smbios::PC_ADDRESS) as usize;
    let bytes = smbios::build(&identity, smbios::PC_ADDRESS, room)?;
    config.memory.write_slice(&bytes, GuestAddress(smbios::PC_ADDRESS))?;
    let vector = GuestAddress(layout::RESET_VECTOR);
    config.memory.write_slice(&RESET_CODE, vector)?;
    Ok(GuestAddress(tables.rsdp_at))
}

fn acpi_config(config: &LoadConfig<'_>) -> AcpiConfig {
    let plan = config.plan;
    let cpu = |index| Cpu {
        apic_id: plan.hardware_id(index),
        enabled: index < plan.boot_vcpus(),
        node: 0,
    };
    AcpiConfig {
        placement: AcpiPlacement::PC,
        cpus: (0..plan.max_vcpus()).map(cpu).collect(),
        interrupts: InterruptConfig {
            lapic_base: layout::LOCAL_APIC as u32,
            ioapic: IoApic {
                id: 0,
                base: layout::IO_APIC as u32,
                gsi_base: 0,
            },
            overrides: Vec::new(),
        },
        pm: PmConfig {
            sleep_control: board::SLEEP,
            sleep_status: board::SLEEP + 1,
            pm_timer: Some(board::PM_TIMER),
            reset: Some(ResetRegister {
                port: board::RESET,
                value: board::RESET_VALUE,
            }),
        },
        pci: vec![pci_segment(config.windows)],
        events: Some(EventDevice {
            gsi: board::GED_GSI,
            register: Register::Io(board::GED),
        }),
        serial: config
            .board
            .serial()
            .map(|_| SerialPort {
                port: board::COM1,
                gsi: board::COM1_GSI,
            })
            .into_iter()
            .collect(),
        rtc: Some(Rtc {
            port: board::CMOS,
            gsi: None,
        }),
        numa: Vec::new(),
    }
}

fn pci_segment(windows: &BarAllocator) -> PciSegment {
    let mmio = [(&windows.mmio32, false), (&windows.mmio64, true)];
    let mmio = mmio.into_iter().filter(|(range, _)| !range.is_empty());
    PciSegment {
        segment: 0,
        ecam_base: layout::ECAM,
        first_bus: 0,
        last_bus: (layout::PCI_BUSES - 1) as u8,
        io: vec![IoWindow {
            first: windows.io.start,
            last: windows.io.end - 1,
        }],
        mmio: mmio
            .map(|(range, prefetchable)| MmioWindow {
                start: range.start,
                size: range.end - range.start,
                prefetchable,
            })
            .collect(),
        prt: Vec::new(),
        node: 0,
    }
}
