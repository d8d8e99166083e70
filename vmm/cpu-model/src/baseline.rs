//! What several hosts have in common: the CPU of a guest that runs on each of them.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::features::{Output, Register, Table};
use crate::listing::lowest;
use crate::{
    Arm64, CpuidEntry, CpuidTable, DescriptionError, GuestProcessor, HostProcessor, Processor, Verdict, X86, compare,
};

/// Why hosts have no CPU in common.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BaselineError {
    /// There is no host.
    #[error("a baseline needs a host")]
    NoHost,
    /// The hosts' CPUs are of different kinds.
    #[error("the hosts' CPUs differ in {0}; a baseline is of one vendor's CPUs")]
    Kind(&'static str),
    /// They differ in what has no common value.
    #[error("the hosts' CPUs differ in {}, and no guest can have both values", .0.join(", "))]
    Differ(Vec<String>),
    /// A host cannot give a guest what they have in common, because its kernel does not let something be set.
    #[error("host {index} cannot give guests what the hosts have in common: {verdict}")]
    Refused {
        /// Which of the hosts, from 0.
        index: usize,
        /// What stands in the way there.
        verdict: Box<Verdict>,
    },
    /// It is no CPU.
    #[error("what the hosts have in common is no CPU")]
    Description(#[from] DescriptionError),
}

/// The most a guest can have that is to run on all of `hosts`. Each of them accepts it.
pub fn baseline(hosts: &[HostProcessor]) -> Result<GuestProcessor, BaselineError> {
    let (first, others) = hosts.split_first().ok_or(BaselineError::NoHost)?;
    let common = others.iter().try_fold(first.processor().clone(), |common, host| {
        common.intersect(host.processor())
    })?;
    let guest = GuestProcessor::new(common)?;
    for (index, host) in hosts.iter().enumerate() {
        let verdict = compare(&guest, host);
        if !verdict.is_accepted() {
            let verdict = Box::new(verdict);
            return Err(BaselineError::Refused { index, verdict });
        }
    }
    Ok(guest)
}

impl Processor {
    /// What two CPUs have in common. It does not matter in which order CPUs are taken, nor how often one is.
    pub fn intersect(&self, other: &Self) -> Result<Self, BaselineError> {
        let (a, b) = match (self, other) {
            (Self::X86(a), Self::X86(b)) if a.vendor_name() == b.vendor_name() => (self.registers(), other.registers()),
            (Self::Arm64(a), Self::Arm64(b)) if a.counter_hz == b.counter_hz => (self.registers(), other.registers()),
            (Self::X86(_), Self::X86(_)) => return Err(BaselineError::Kind("vendor")),
            (Self::Arm64(_), Self::Arm64(_)) => return Err(BaselineError::Differ(vec!["CNTFRQ_EL0".to_owned()])),
            _ => return Err(BaselineError::Kind("architecture")),
        };
        let mut differ = Vec::new();
        let mut common = BTreeMap::new();
        for register in a.keys().chain(b.keys()) {
            let values = [&a, &b].map(|registers| registers.get(register).copied().unwrap_or(0));
            common.insert(*register, self.common(*register, values, &mut differ));
        }
        differ.dedup();
        if !differ.is_empty() {
            return Err(BaselineError::Differ(differ));
        }
        Ok(match (self, other) {
            (Self::X86(a), Self::X86(b)) => Self::X86(x86(a, b, &common)),
            (Self::Arm64(a), Self::Arm64(b)) => Self::Arm64(arm64(a, b, &common)),
            _ => return Err(BaselineError::Kind("architecture")),
        })
    }

    fn common(&self, register: Register, [a, b]: [u64; 2], differ: &mut Vec<String>) -> u64 {
        let (table, vendor) = (self.features(), self.vendor());
        if table.ignored(register).is_some() {
            return if a == b { a } else { 0 };
        }
        let mut value = 0;
        for feature in table.fields(register, vendor) {
            match feature.common(feature.value(a), feature.value(b)) {
                Some(field) => value |= field << feature.low,
                None => differ.push(feature.name_in(register)),
            }
        }
        let unnamed = table.unnamed(register, vendor);
        let mut rest = (a | b) & unnamed;
        while let Some(low) = lowest(register, rest) {
            let field = Table::anonymous(register, low);
            rest &= !field.mask();
            let [a, b] = [a, b].map(|value| field.value(value & unnamed));
            value |= field.common(a, b).unwrap_or(0) << low;
        }
        value
    }
}

/// Leaves of which nothing is left are left out.
fn x86(a: &X86, b: &X86, common: &BTreeMap<Register, u64>) -> X86 {
    let merged: CpuidTable = a.cpuid.entries().iter().chain(b.cpuid.entries()).copied().collect();
    let mut entries: Vec<CpuidEntry> = merged.entries().iter().map(|entry| filled(entry, common)).collect();
    entries.sort_by_key(|entry| (entry.leaf, entry.subleaf));
    let msrs = a.msrs.keys().chain(b.msrs.keys());
    X86 {
        cpuid: entries.into_iter().collect(),
        msrs: msrs
            .map(|index| (*index, common.get(&Register::Msr(*index)).copied().unwrap_or(0)))
            .collect(),
        tsc_khz: a.tsc_khz.filter(|_| a.tsc_khz == b.tsc_khz),
    }
}

fn filled(entry: &CpuidEntry, common: &BTreeMap<Register, u64>) -> CpuidEntry {
    let (leaf, subleaf) = (entry.leaf, if entry.indexed { entry.subleaf } else { 0 });
    let [eax, ebx, ecx, edx] = Output::ALL.map(|output| {
        let value = common.get(&Register::Cpuid { leaf, subleaf, output });
        value.copied().unwrap_or(0) as u32
    });
    CpuidEntry {
        eax,
        ebx,
        ecx,
        edx,
        ..*entry
    }
}

fn arm64(a: &Arm64, b: &Arm64, common: &BTreeMap<Register, u64>) -> Arm64 {
    let numbers = a.registers.keys().chain(b.registers.keys());
    let same = a
        .vector_lengths
        .iter()
        .zip(&b.vector_lengths)
        .take_while(|(a, b)| a == b);
    Arm64 {
        registers: numbers
            .map(|number| (*number, common.get(&Register::Kvm(*number)).copied().unwrap_or(0)))
            .collect(),
        init: a.init & b.init,
        vector_lengths: same.map(|(length, _)| *length).collect(),
        counter_hz: a.counter_hz,
        address_bits: a.address_bits.min(b.address_bits),
    }
}
