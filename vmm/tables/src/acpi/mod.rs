//! ACPI for a hardware-reduced PC (ACPI 6.5); for ARM see [`arm`].
//!
//! | table | what it says |
//! |---|---|
//! | RSDP, XSDT | where the others are |
//! | FADT | hardware-reduced; sleep, reset and PM timer ports; no legacy hardware |
//! | MADT | local APICs, I/O APIC, overrides, NMI |
//! | MCFG | ECAM of every PCI segment |
//! | VIOT | which PCI functions are behind a virtio-iommu, when there is one |
//! | SRAT, SLIT | NUMA, when there are nodes |
//! | DSDT | PCI roots, processors, event device, power button, serial ports, RTC |
//!
//! All tables lie in one block at [`AcpiPlacement::tables`], the RSDP apart from it at [`AcpiPlacement::rsdp`]. A kernel finds
//! the RSDP by the pointer of its boot protocol, or, when it lies at 0xE0000..0x100000 on a 16-byte boundary, by the search that
//! the specification asks of it (5.2.5.1).
//!
//! What the machine owes a guest that reads these tables:
//!
//! - No interrupt may reach an 8259. A hardware-reduced kernel neither programs nor masks one, and what a PIC with its reset
//!   values delivers is an exception vector: seen to end in a double fault. Route GSIs to the I/O APIC only.
//! - The sleep control port sees a write of 0x34 for soft-off. Where the sleep status is the same port, a write of 0x80 (clear
//!   the wake status) precedes it and means nothing.
//! - Reading the event register returns what is pending and clears it, see [`EventBits`].

pub mod arm;
mod config;
mod cpus;
mod dsdt;
mod events;
mod fadt;
mod madt;
mod memory;
mod numa;
mod pci;
mod pci_slots;
mod slots;
mod table;
#[cfg(test)]
mod tests;
mod viot;

pub use config::{
    AcpiConfig, AcpiPlacement, Cpu, EventDevice, InterruptConfig, IoApic, IoWindow, IrqOverride, IrqPolarity,
    IrqTrigger, MemoryAffinity, MmioWindow, NumaNode, PciIommu, PciSegment, PciSlots, PmConfig, PrtEntry, Register,
    ResetRegister, Rtc, SerialPort,
};
pub use events::EventBits;
pub use memory::MemorySlots;
pub use pci::rotating_prt;

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use thiserror::Error;

pub(crate) use table::checksum;
use table::{OEM_ID, Table};

/// Tables begin on this boundary, in bytes.
const ALIGN: usize = 16;

/// The tables and where they go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// Guest physical address of [`Self::tables`].
    pub tables_at: u64,
    /// All tables but the RSDP.
    pub tables: Vec<u8>,
    /// Guest physical address of [`Self::rsdp`].
    pub rsdp_at: u64,
    /// The root pointer.
    pub rsdp: Vec<u8>,
}

impl AcpiTables {
    /// Every piece with its guest physical address.
    pub fn pieces(&self) -> [(u64, &[u8]); 2] {
        [(self.tables_at, &self.tables), (self.rsdp_at, &self.rsdp)]
    }
}

/// Why a configuration makes no tables.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AcpiError {
    /// No processor, or none that is enabled.
    #[error("no vCPU is enabled")]
    NoCpu,
    /// More processors than the name space numbers.
    #[error("{count} vCPUs are more than the {max} that the ACPI name space has names for")]
    TooManyCpus {
        /// Processors in the configuration.
        count: usize,
        /// The most.
        max: usize,
    },
    /// Two processors have one APIC identifier.
    #[error("two vCPUs have the APIC ID {0:#x}")]
    DuplicateApicId(u32),
    /// Two processors have one affinity.
    #[error("two vCPUs have the MPIDR {0:#x}")]
    DuplicateMpidr(u64),
    /// The topology has more or fewer places than there are processors.
    #[error("the CPU topology has {places} places for {cpus} vCPUs")]
    BadTopology {
        /// Product of its levels.
        places: u64,
        /// Processors in the configuration.
        cpus: usize,
    },
    /// More serial ports than a PC has.
    #[error("{count} serial ports are more than the {max} that a PC has")]
    TooManySerialPorts {
        /// Ports in the configuration.
        count: usize,
        /// The most.
        max: usize,
    },
    /// More PCI segments than names.
    #[error("{count} PCI segments are more than the {max} that are supported")]
    TooManySegments {
        /// Segments in the configuration.
        count: usize,
        /// The most.
        max: usize,
    },
    /// A window is empty, wraps around, or exceeds what its kind addresses.
    #[error("the {what} window at {start:#x} with {size:#x} bytes is empty or too large")]
    BadWindow {
        /// Its kind.
        what: &'static str,
        /// Its first address.
        start: u64,
        /// Its length in bytes.
        size: u64,
    },
    /// The bus range runs backwards.
    #[error("PCI segment {segment} has its last bus {last} below its first bus {first}")]
    BadBusRange {
        /// The segment.
        segment: u16,
        /// Its first bus.
        first: u8,
        /// Its last bus.
        last: u8,
    },
    /// More interrupt routes than a package holds.
    #[error("PCI segment {segment} has {count} interrupt routes, {max} is the most")]
    TooManyRoutes {
        /// The segment.
        segment: u16,
        /// Its routes.
        count: usize,
        /// The most.
        max: usize,
    },
    /// A processor names a NUMA node that is not there, or distances are not a square.
    #[error("the NUMA configuration is inconsistent: {0}")]
    BadNuma(String),
    /// The tables exceed their place.
    #[error("the ACPI tables take {size:#x} bytes and their place has {room:#x}")]
    TooLarge {
        /// Bytes of the tables.
        size: u64,
        /// Bytes reserved for them.
        room: u64,
    },
}

/// Makes the tables for `config`.
pub fn build(config: &AcpiConfig) -> Result<AcpiTables, AcpiError> {
    config.check()?;
    let mut block = Block::new(config.placement.tables);
    let dsdt = block.add(dsdt::dsdt(config));
    let mut pointers = vec![block.add(fadt::fadt(config, dsdt)), block.add(madt::madt(config))];
    if !config.pci.is_empty() {
        pointers.push(block.add(pci::mcfg(&config.pci)));
    }
    pointers.extend(viot::viot(&config.pci).map(|table| block.add(table)));
    if !config.numa.is_empty() {
        let cpus = config.cpus.iter().map(|cpu| numa::apic(cpu.apic_id, cpu.node));
        pointers.push(block.add(numa::srat(cpus, &config.numa)));
        if let Some(slit) = numa::slit(&config.numa) {
            pointers.push(block.add(slit));
        }
    }
    block.finish(pointers, &config.placement)
}

/// Tables one behind the other.
struct Block {
    base: u64,
    bytes: Vec<u8>,
}

impl Block {
    fn new(base: u64) -> Self {
        Self {
            base,
            bytes: Vec::new(),
        }
    }

    /// Appends `table` and returns its guest physical address.
    fn add(&mut self, table: Vec<u8>) -> u64 {
        let at = self.bytes.len().next_multiple_of(ALIGN);
        self.bytes.resize(at, 0);
        self.bytes.extend(table);
        self.base + at as u64
    }

    /// Ends the block with the XSDT of the tables at `pointers`, and makes the root pointer to it.
    fn finish(mut self, pointers: Vec<u64>, placement: &AcpiPlacement) -> Result<AcpiTables, AcpiError> {
        let mut xsdt = Table::new(*b"XSDT", 1);
        for pointer in pointers {
            xsdt.push(&pointer.to_le_bytes());
        }
        let xsdt = self.add(xsdt.finish());
        let size = self.bytes.len() as u64;
        if size > placement.tables_size {
            return Err(AcpiError::TooLarge {
                size,
                room: placement.tables_size,
            });
        }
        let mut rsdp = Vec::new();
        Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
        Ok(AcpiTables {
            tables_at: placement.tables,
            tables: self.bytes,
            rsdp_at: placement.rsdp,
            rsdp,
        })
    }
}
