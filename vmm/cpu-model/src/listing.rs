//! What a CPU has, by name.

use std::collections::BTreeMap;

use crate::Processor;
use crate::features::{Register, Rule, Table};

/// Features by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listing {
    /// Those that are there or not, in the order of their places.
    pub features: Vec<String>,
    /// Those that have a value, which is not 0.
    pub values: BTreeMap<String, u64>,
    /// Bits that are set and have no name, by place.
    pub unnamed: Vec<String>,
}

impl Processor {
    /// What it has, by name. Topology, caches and the like are no features and not among them.
    pub fn listing(&self) -> Listing {
        let (table, vendor) = (self.features(), self.vendor());
        let mut listing = Listing::default();
        for (register, value) in self.registers() {
            if table.ignored(register).is_some() {
                continue;
            }
            for feature in table.fields(register, vendor) {
                let found = feature.value(value);
                match (found, feature.width, feature.rule) {
                    (0, ..) | (.., Rule::Ignored) => {}
                    (1, 1, Rule::Subset | Rule::Burden) => listing.features.push(feature.name_in(register)),
                    _ => drop(listing.values.insert(feature.name_in(register), found)),
                }
            }
            listing
                .unnamed
                .extend(unnamed(table, register, value & table.unnamed(register, vendor)));
        }
        if let Self::Arm64(arm) = self {
            listing.values.insert("counter_hz".to_owned(), arm.counter_hz);
            listing.values.insert("ipa_bits".to_owned(), arm.address_bits.into());
            for length in &arm.vector_lengths {
                listing.features.push(format!("sve{length}"));
            }
        }
        listing
    }
}

fn unnamed(table: &'static Table, register: Register, mut rest: u64) -> impl Iterator<Item = String> {
    std::iter::from_fn(move || {
        let field = Table::anonymous(register, lowest(register, rest)?);
        rest &= !field.mask();
        Some(table.place(register, field.low, field.width))
    })
}

/// The lowest bit of a field without a name in which a bit is set.
pub(crate) fn lowest(register: Register, bits: u64) -> Option<u8> {
    let bit = (bits != 0).then(|| bits.trailing_zeros() as u8)?;
    let width = Table::anonymous(register, 0).width;
    Some(bit / width * width)
}
