//! What a guest's CPU is, and what a host offers: plain data that goes from host to host.
//!
//! The format has a version. Reading refuses another one, and tables with more entries than any KVM makes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::features::{self, Output, Register, Table};
use crate::{CpuidEntry, CpuidTable, Vendor, bounded};

/// The version of the format that this program writes and reads.
const VERSION: u16 = 1;
/// KVM itself takes 256 entries of CPUID at most.
const MAX_CPUID: usize = 256;
/// KVM has some 25 feature MSRs.
const MAX_MSRS: usize = 256;
/// ARM has 192 places for ID registers, KVM some twenty registers beside them.
const MAX_REGISTERS: usize = 512;
/// 2048 bits is the longest vector, 128 the step.
const MAX_LENGTHS: usize = 16;

/// Why a description is not one.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DescriptionError {
    /// Another version of the format.
    #[error(
        "the description of the CPU has version {0}, this program knows version {VERSION}; both hosts need the same release"
    )]
    Version(u16),
    /// A table is too large.
    #[error("the description of the CPU has {found} {what}, more than {max}")]
    TooMany {
        /// Entries of what.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many there may be.
        max: usize,
    },
    /// A CPU without CPUID.
    #[error("the description of the CPU has no CPUID leaf 0")]
    NoVendor,
    /// Lengths are not what an ARM CPU can have.
    #[error("the description of the CPU has SVE vectors of {0} bits, which do not exist or are out of order")]
    VectorLength(u16),
}

/// An x86 CPU.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct X86 {
    /// CPUID. What differs from vCPU to vCPU does not matter.
    pub cpuid: CpuidTable,
    /// Feature MSRs by index.
    #[serde(deserialize_with = "bounded::map::<_, MAX_MSRS>")]
    pub msrs: BTreeMap<u32, u64>,
    /// Frequency of the TSC in kHz; `None` for a guest that takes what it gets, and for a host that does not tell.
    pub tsc_khz: Option<u32>,
}

/// A CPU of ARM's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Arm64 {
    /// Registers by the low half of KVM's number of them.
    #[serde(deserialize_with = "bounded::map::<_, MAX_REGISTERS>")]
    pub registers: BTreeMap<u32, u64>,
    /// Features of `KVM_ARM_VCPU_INIT`, as a bitmap.
    pub init: u32,
    /// Lengths of SVE vectors in bits, ascending; empty without SVE.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_LENGTHS>")]
    pub vector_lengths: Vec<u16>,
    /// Frequency of the counter in Hz.
    pub counter_hz: u64,
    /// Width of a guest physical address in bits: of a guest, what it has; of a host, what KVM can give.
    pub address_bits: u8,
}

/// A CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Processor {
    /// x86.
    #[serde(rename = "x86_64")]
    X86(X86),
    /// ARM64.
    #[serde(rename = "aarch64")]
    Arm64(Arm64),
}

/// A guest's CPU, as it was given to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Versioned<Processor>", into = "Versioned<Processor>")]
pub struct GuestProcessor(Processor);

/// What a host offers to guests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Versioned<Host>", into = "Versioned<Host>")]
pub struct HostProcessor(Host);

/// What a host offers to guests, and what KVM there can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The most a guest can get.
    pub processor: Processor,
    /// Release of the host's kernel, for messages.
    pub kernel: String,
    /// KVM can give guests another frequency of the TSC than the host's (x86).
    pub tsc_scaling: bool,
    /// The bits of ARM's registers that KVM lets be set to less than the host's, by register; what is not there is fixed.
    #[serde(deserialize_with = "bounded::map::<_, MAX_REGISTERS>")]
    pub writable: BTreeMap<u32, u64>,
}

/// A description with the version of its format.
#[derive(Clone, Serialize, Deserialize)]
struct Versioned<T> {
    version: u16,
    cpu: T,
}

fn current<T>(cpu: T) -> Versioned<T> {
    Versioned { version: VERSION, cpu }
}

impl<T> Versioned<T> {
    fn open(self) -> Result<T, DescriptionError> {
        match self.version {
            VERSION => Ok(self.cpu),
            other => Err(DescriptionError::Version(other)),
        }
    }
}

impl From<GuestProcessor> for Versioned<Processor> {
    fn from(guest: GuestProcessor) -> Self {
        current(guest.0)
    }
}

impl TryFrom<Versioned<Processor>> for GuestProcessor {
    type Error = DescriptionError;

    fn try_from(read: Versioned<Processor>) -> Result<Self, Self::Error> {
        Self::new(read.open()?)
    }
}

impl From<HostProcessor> for Versioned<Host> {
    fn from(host: HostProcessor) -> Self {
        current(host.0)
    }
}

impl TryFrom<Versioned<Host>> for HostProcessor {
    type Error = DescriptionError;

    fn try_from(read: Versioned<Host>) -> Result<Self, Self::Error> {
        Self::new(read.open()?)
    }
}

impl GuestProcessor {
    /// A guest with this CPU.
    pub fn new(processor: Processor) -> Result<Self, DescriptionError> {
        processor.check()?;
        Ok(Self(processor))
    }

    /// Its CPU.
    pub fn processor(&self) -> &Processor {
        &self.0
    }
}

impl HostProcessor {
    /// A host that offers this.
    pub fn new(host: Host) -> Result<Self, DescriptionError> {
        host.processor.check()?;
        at_most("writable registers", host.writable.len(), MAX_REGISTERS)?;
        Ok(Self(host))
    }

    /// What it offers.
    pub fn host(&self) -> &Host {
        &self.0
    }

    /// The most a guest can get.
    pub fn processor(&self) -> &Processor {
        &self.0.processor
    }
}

fn at_most(what: &'static str, found: usize, max: usize) -> Result<(), DescriptionError> {
    if found <= max {
        return Ok(());
    }
    Err(DescriptionError::TooMany { what, found, max })
}

/// Family, model and stepping of an x86 CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// Family, with its extension.
    pub family: u32,
    /// Model, with its extension.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
}

impl X86 {
    /// Family, model and stepping (leaf 1, EAX).
    pub fn signature(&self) -> Signature {
        let eax = self.cpuid.get(1, 0).map_or(0, |entry| entry.eax);
        let (family, model) = (eax >> 8 & 0xf, eax >> 4 & 0xf);
        let extended = eax >> 16 & 0xf;
        Signature {
            family: if family == 0xf {
                family + (eax >> 20 & 0xff)
            } else {
                family
            },
            model: if matches!(family, 6 | 7 | 0xf) {
                extended << 4 | model
            } else {
                model
            },
            stepping: eax & 0xf,
        }
    }

    /// The vendor's name, as CPUID has it.
    pub fn vendor_name(&self) -> String {
        let Some(e) = self.cpuid.get(0, 0) else {
            return String::new();
        };
        let bytes = [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes).concat();
        bytes
            .iter()
            .map(|byte| {
                if byte.is_ascii_graphic() || *byte == b' ' {
                    char::from(*byte)
                } else {
                    '?'
                }
            })
            .collect()
    }
}

impl Processor {
    /// Whether it can be a CPU at all.
    fn check(&self) -> Result<(), DescriptionError> {
        match self {
            Self::X86(x86) => {
                at_most("entries of CPUID", x86.cpuid.entries().len(), MAX_CPUID)?;
                at_most("MSRs", x86.msrs.len(), MAX_MSRS)?;
                x86.cpuid.get(0, 0).map(|_| ()).ok_or(DescriptionError::NoVendor)
            }
            Self::Arm64(arm) => {
                at_most("registers", arm.registers.len(), MAX_REGISTERS)?;
                let mut longest = 0;
                for length in &arm.vector_lengths {
                    if length % 128 != 0 || *length <= longest || *length > 128 * MAX_LENGTHS as u16 {
                        return Err(DescriptionError::VectorLength(*length));
                    }
                    longest = *length;
                }
                Ok(())
            }
        }
    }

    /// `x86_64` or `aarch64`.
    pub fn architecture(&self) -> &'static str {
        match self {
            Self::X86(_) => "x86_64",
            Self::Arm64(_) => "aarch64",
        }
    }

    /// The features CPUs like it can have.
    pub fn features(&self) -> &'static Table {
        match self {
            Self::X86(_) => features::x86(),
            Self::Arm64(_) => features::arm64(),
        }
    }

    /// Who made it, which decides what its bits mean; `None` on ARM, where all agree.
    pub fn vendor(&self) -> Option<Vendor> {
        match self {
            Self::X86(x86) => Some(x86.cpuid.vendor()),
            Self::Arm64(_) => None,
        }
    }

    /// Every register that tells what it can do, in a fixed order.
    pub fn registers(&self) -> BTreeMap<Register, u64> {
        match self {
            Self::X86(x86) => {
                let cpuid = x86.cpuid.entries().iter().flat_map(outputs);
                let msrs = x86.msrs.iter().map(|(index, value)| (Register::Msr(*index), *value));
                cpuid.chain(msrs).collect()
            }
            Self::Arm64(arm) => {
                let registers = arm
                    .registers
                    .iter()
                    .map(|(number, value)| (Register::Kvm(*number), *value));
                registers.chain([(Register::Init, u64::from(arm.init))]).collect()
            }
        }
    }
}

fn outputs(entry: &CpuidEntry) -> impl Iterator<Item = (Register, u64)> {
    let (leaf, subleaf) = (entry.leaf, if entry.indexed { entry.subleaf } else { 0 });
    let values = [entry.eax, entry.ebx, entry.ecx, entry.edx];
    let registers = Output::ALL.map(|output| Register::Cpuid { leaf, subleaf, output });
    registers.into_iter().zip(values.map(u64::from))
}
