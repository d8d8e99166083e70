//! What the first vCPU finds in memory: kernel, initramfs, ACPI, SMBIOS, boot data.

use triarch_boot::{
    BootEntry, BootLayout, BootParams, BootTarget, CpuTables, LayoutError, MemKind, MemMapEntry, MemRange,
    MemoryLayout, load_initramfs, load_kernel, open_boot_file, write_boot_data,
};
use triarch_tables::acpi::{
    self, AcpiConfig, AcpiPlacement, Cpu, EventDevice, InterruptConfig, IoApic, PmConfig, Register, ResetRegister, Rtc,
    SerialPort,
};
use triarch_tables::smbios;
use vm_memory::GuestAddress;

use super::{board, layout};
use crate::LoadConfig;
use crate::common::load::{LoadError, memory_slots, pci_roots, ram, write_pieces, write_smbios};

/// State of the first vCPU at its first instruction.
pub struct Entry {
    pub(super) boot: BootEntry,
    pub(super) tables: CpuTables,
}

/// Loads everything and says how the first vCPU starts.
pub fn load(config: &LoadConfig<'_>) -> Result<Entry, LoadError> {
    let memory = memory_layout(config)?;
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

fn memory_layout(config: &LoadConfig<'_>) -> Result<MemoryLayout, LayoutError> {
    let ram = ram(config.memory)
        .map(|(start, size)| MemRange { start, size })
        .collect();
    let ecam = MemRange {
        start: layout::ECAM,
        size: config.windows.len() as u64 * layout::PCI_BUSES * layout::ECAM_BUS_SIZE,
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
    write_pieces(config.memory, tables.pieces())?;
    let room = (layout::RESET_VECTOR - smbios::PC_ADDRESS) as usize;
    write_smbios(config, smbios::PC_ADDRESS, room)?;
    write_pieces(config.memory, [(layout::RESET_VECTOR, &RESET_CODE[..])])?;
    Ok(GuestAddress(tables.rsdp_at))
}

fn acpi_config(config: &LoadConfig<'_>) -> AcpiConfig {
    let plan = config.plan;
    let cpu = |index| Cpu {
        apic_id: plan.hardware_id(index),
        enabled: index < plan.boot_vcpus(),
        removable: index >= plan.fixed_vcpus(),
        node: config.numa.of_cpu(index),
    };
    AcpiConfig {
        placement: AcpiPlacement::PC,
        cpus: (0..plan.max_vcpus()).map(cpu).collect(),
        cpu_hotplug: Some(layout::CPU_HOTPLUG),
        memory_hotplug: memory_slots(config, layout::MEMORY_HOTPLUG),
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
        pci: pci_roots(config, layout::ECAM, layout::PCI_HOTPLUG),
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
        numa: config.numa.nodes.clone(),
    }
}
