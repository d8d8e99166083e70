//! All features of one architecture, by register and by name.

use std::collections::{BTreeMap, HashMap};

use super::parse::{self, Line, ParseError, Place};
use super::{Feature, Output, Register, Rule};
use crate::Vendor;

/// A register of several subleaves.
#[derive(Debug)]
struct Range {
    leaf: u32,
    subleaves: std::ops::RangeInclusive<u32>,
    output: Output,
    feature: Feature,
}

/// Features by register and by name.
#[derive(Debug, Default)]
pub struct Table {
    fields: BTreeMap<Register, Vec<Feature>>,
    ranges: Vec<Range>,
    /// Leaves that hold no features, and why.
    leaves: BTreeMap<u32, &'static str>,
    /// Other registers that hold none, and why.
    registers: BTreeMap<Register, &'static str>,
    /// Leaves whose places are told with their subleaf.
    indexed: Vec<u32>,
    names: HashMap<&'static str, (Register, usize)>,
}

impl Table {
    /// Reads files of features; their format is told in [`parse`].
    pub fn parse(files: &[&'static str]) -> Result<Self, ParseError> {
        let mut table = Self::default();
        for text in files.iter().flat_map(|file| file.lines()) {
            if let Some(line) = parse::line(text)? {
                table.add(line);
            }
        }
        for features in table.fields.values_mut() {
            features.sort_by_key(|feature| feature.low);
        }
        for (register, features) in &table.fields {
            for (index, feature) in features.iter().enumerate() {
                table.names.insert(feature.name, (*register, index));
            }
        }
        Ok(table)
    }

    fn add(&mut self, line: Line) {
        let Line { place, feature } = line;
        let whole = feature.name == "-";
        match place {
            Place::Leaf(leaf) => drop(self.leaves.insert(leaf, feature.reason.unwrap_or_default())),
            Place::One(register, _) if whole => {
                self.registers.insert(register, feature.reason.unwrap_or_default());
            }
            Place::One(register, with_subleaf) => {
                if let (Register::Cpuid { leaf, .. }, true) = (register, with_subleaf) {
                    self.indexed.push(leaf);
                }
                self.fields.entry(register).or_default().push(feature);
            }
            Place::Subleaves {
                leaf,
                first,
                last,
                output,
            } => {
                self.indexed.push(leaf);
                self.ranges.push(Range {
                    leaf,
                    subleaves: first..=last,
                    output,
                    feature,
                });
            }
        }
    }

    /// The features of a register on CPUs of `vendor` (`None`: not x86), by ascending bits.
    pub fn fields(&self, register: Register, vendor: Option<Vendor>) -> impl Iterator<Item = &Feature> {
        let ranges = self.ranges.iter().filter(move |range| {
            matches!(register, Register::Cpuid { leaf, subleaf, output }
                if leaf == range.leaf && output == range.output && range.subleaves.contains(&subleaf))
        });
        let own = self.fields.get(&register).into_iter().flatten();
        own.chain(ranges.map(|range| &range.feature))
            .filter(move |feature| feature.is_of(vendor))
    }

    /// Why a register as a whole holds no features; `None` if it does.
    pub fn ignored(&self, register: Register) -> Option<&'static str> {
        match register {
            Register::Cpuid { leaf, .. } => self.leaves.get(&leaf),
            other => self.registers.get(&other),
        }
        .copied()
    }

    /// The feature of this name, and where it is. Those of a range of subleaves have no one place.
    pub fn find(&self, name: &str) -> Option<(Register, &Feature)> {
        let (register, index) = self.names.get(name)?;
        let feature = self.fields.get(register)?.get(*index)?;
        Some((*register, feature))
    }

    /// Every feature with its place; of one in a range of subleaves the first.
    pub fn all(&self) -> impl Iterator<Item = (Register, &Feature)> {
        let own = self
            .fields
            .iter()
            .flat_map(|(register, features)| features.iter().map(|feature| (*register, feature)));
        own.chain(self.ranges.iter().map(|range| {
            let (leaf, subleaf, output) = (range.leaf, *range.subleaves.start(), range.output);
            (Register::Cpuid { leaf, subleaf, output }, &range.feature)
        }))
    }

    /// Leaves and registers that hold no features, each with the reason.
    pub fn all_ignored(&self) -> impl Iterator<Item = (String, &'static str)> {
        let leaves = self.leaves.iter().map(|(leaf, why)| (format!("CPUID.{leaf:X}"), *why));
        leaves.chain(
            self.registers
                .iter()
                .map(|(register, why)| (register.to_string(), *why)),
        )
    }

    /// How bits of a register are called whose name nobody knows: `CPUID.7.1:EAX[13]`, `ID_AA64PFR1_EL1[23:20]`.
    pub fn place(&self, register: Register, low: u8, width: u8) -> String {
        let known = self.fields.get(&register).and_then(|features| features.first());
        let register = match (register, known.and_then(|feature| feature.name.split_once('.'))) {
            (Register::Kvm(_), Some((name, _))) => name.to_owned(),
            (Register::Cpuid { leaf, subleaf: 0, .. }, _) if self.indexed.contains(&leaf) => {
                register.to_string().replacen(':', ".0:", 1)
            }
            _ => register.to_string(),
        };
        match width {
            1 => format!("{register}[{low}]"),
            _ => format!("{register}[{}:{low}]", low + (width - 1)),
        }
    }

    /// The bits of a register that no feature has.
    pub(crate) fn unnamed(&self, register: Register, vendor: Option<Vendor>) -> u64 {
        self.fields(register, vendor)
            .fold(u64::MAX, |rest, feature| rest & !feature.mask())
    }

    /// What is compared of bits that no feature has: each bit as one of x86, each field of four as a number of ARM's.
    pub(crate) fn anonymous(register: Register, low: u8) -> Feature {
        let (width, rule) = match register {
            Register::Kvm(_) => (4, Rule::AtMost),
            _ => (1, Rule::Subset),
        };
        Feature {
            name: "",
            low,
            width,
            signed: false,
            rule,
            vendors: &[],
            needs: None,
            reason: None,
        }
    }
}
