//! Where a feature is.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An output register of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Output {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Output {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Eax, Self::Ebx, Self::Ecx, Self::Edx];

    fn name(self) -> &'static str {
        match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Ecx => "ECX",
            Self::Edx => "EDX",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|output| output.name() == name)
    }
}

/// A register that tells what a CPU can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Register {
    /// An output of CPUID.
    Cpuid {
        /// Input EAX.
        leaf: u32,
        /// Input ECX; 0 for leaves that do not look at it.
        subleaf: u32,
        /// Which of the four.
        output: Output,
    },
    /// A model-specific register.
    Msr(u32),
    /// A register of an ARM vCPU: the low half of KVM's number of it (Linux, Documentation/virt/kvm/api.rst, 4.68).
    Kvm(u32),
    /// The features an ARM vCPU is made with (4.82).
    Init,
}

/// Low half of KVM's number of a system register, without its encoding.
const SYSTEM_REGISTER: u32 = 0x0013_0000;
/// Of registers that are numbered by another one: CCSIDR_EL1.
const DEMULTIPLEXED: u32 = 0x0011;

impl Register {
    /// A system register of ARM's by its encoding.
    pub const fn system(op0: u32, op1: u32, crn: u32, crm: u32, op2: u32) -> Self {
        Self::Kvm(SYSTEM_REGISTER | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2)
    }

    /// Whether KVM decides if it can be set. Others can be set to whatever the host offers, or less.
    pub fn needs_leave(self) -> bool {
        matches!(self, Self::Kvm(number) if matches!(number >> 16, 0x0013 | DEMULTIPLEXED))
    }
}

impl fmt::Display for Register {
    /// A subleaf is shown unless it is 0; [`Table::place`](super::Table::place) knows which leaves have some.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Cpuid {
                leaf,
                subleaf: 0,
                output,
            } => write!(f, "CPUID.{leaf:X}:{}", output.name()),
            Self::Cpuid { leaf, subleaf, output } => write!(f, "CPUID.{leaf:X}.{subleaf:X}:{}", output.name()),
            Self::Msr(index) => write!(f, "MSR.{index:X}"),
            Self::Kvm(number) if number & 0xffff_0000 == SYSTEM_REGISTER => {
                let n = number;
                let (op0, op1, op2) = (n >> 14 & 3, n >> 11 & 7, n & 7);
                write!(f, "S{op0}_{op1}_C{}_C{}_{op2}", n >> 7 & 15, n >> 3 & 15)
            }
            Self::Kvm(number) => write!(f, "KVM.{number:X}"),
            Self::Init => f.write_str("KVM_ARM_VCPU_INIT"),
        }
    }
}
