//! Every feature of a CPU that a guest can see, by name: data, read from the files in `data/`.
//!
//! A [`Feature`] is a field of a [`Register`], with the [`Rule`] by which a guest's value and a host's are compared. The format of the
//! files is told in [`parse`]. Bits that no file names are compared all the same, and called by their place (`CPUID.7.1:EAX[13]`).

pub mod parse;
mod place;
mod rule;
mod table;

use std::sync::OnceLock;

pub use place::{Output, Register};
pub use rule::Rule;
pub use table::Table;

use crate::Vendor;

/// A named field of a register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feature {
    /// Its name, as Linux and QEMU write it. `{n}` stands for the subleaf.
    pub name: &'static str,
    /// Its lowest bit.
    pub low: u8,
    /// Its width in bits, 1 to 64.
    pub width: u8,
    /// Its value is a number with a sign.
    pub signed: bool,
    /// How values are compared.
    pub rule: Rule,
    /// On whose CPUs it means this; everybody's when empty.
    pub vendors: &'static [Vendor],
    /// The feature without which a guest has no use for it.
    pub needs: Option<&'static str>,
    /// Why it is not compared, or not as a feature.
    pub reason: Option<&'static str>,
}

impl Feature {
    /// Its bits in place.
    pub fn mask(&self) -> u64 {
        (u64::MAX >> (64 - u32::from(self.width))) << self.low
    }

    /// Its value in a register, at bit 0.
    pub fn value(&self, register: u64) -> u64 {
        (register & self.mask()) >> self.low
    }

    /// Whether it means this on a CPU of `vendor`.
    pub fn is_of(&self, vendor: Option<Vendor>) -> bool {
        self.vendors.is_empty() || vendor.is_some_and(|vendor| self.vendors.contains(&vendor))
    }

    /// Its name, that of a range of subleaves with the number of `register`'s.
    pub fn name_in(&self, register: Register) -> String {
        match register {
            Register::Cpuid { subleaf, .. } => self.name.replace("{n}", &subleaf.to_string()),
            _ => self.name.to_owned(),
        }
    }
}

/// The features of x86 CPUs.
pub fn x86() -> &'static Table {
    static TABLE: OnceLock<Table> = OnceLock::new();
    TABLE.get_or_init(|| {
        embedded(&[
            include_str!("../../data/x86/basic.txt"),
            include_str!("../../data/x86/structured.txt"),
            include_str!("../../data/x86/state.txt"),
            include_str!("../../data/x86/blocks.txt"),
            include_str!("../../data/x86/paravirtual.txt"),
            include_str!("../../data/x86/extended.txt"),
            include_str!("../../data/x86/amd.txt"),
            include_str!("../../data/x86/centaur.txt"),
            include_str!("../../data/x86/msr.txt"),
            include_str!("../../data/x86/vmx.txt"),
        ])
    })
}

/// The features of ARM's CPUs.
pub fn arm64() -> &'static Table {
    static TABLE: OnceLock<Table> = OnceLock::new();
    TABLE.get_or_init(|| {
        embedded(&[
            include_str!("../../data/arm64/aarch64.txt"),
            include_str!("../../data/arm64/aarch32.txt"),
            include_str!("../../data/arm64/identity.txt"),
        ])
    })
}

/// What a name among the flags of Linux's `/proc/cpuinfo` stands for, on x86.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinuxName {
    /// Any of these features.
    Features(Vec<&'static str>),
    /// None: Linux has it from elsewhere, for this reason.
    Derived(&'static str),
}

/// Looks up a flag of `/proc/cpuinfo`.
pub fn linux_name(flag: &str) -> Option<LinuxName> {
    if let Some(name) = x86().find(flag) {
        return Some(LinuxName::Features(vec![name.1.name]));
    }
    include_str!("../../data/x86/linux.txt").lines().find_map(|line| {
        let (name, rest) = line.split_once(' ')?;
        if name != flag || name == "#" {
            return None;
        }
        match rest.split_once(' ')? {
            ("=", names) => Some(LinuxName::Features(names.split(' ').collect())),
            ("-", reason) => Some(LinuxName::Derived(reason)),
            _ => None,
        }
    })
}

/// The files are part of the program, and a test reads them: one that cannot be read is a mistake of the build.
fn embedded(files: &[&'static str]) -> Table {
    match Table::parse(files) {
        Ok(table) => table,
        Err(error) => unreachable!("{error}"),
    }
}
