//! What a comparison says: yes, or every reason why not.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::features::{Feature, Register, Rule, Table};
use crate::{Processor, bounded};

/// Reasons that are kept. No real pair of CPUs comes near.
const MAX_BLOCKERS: usize = 512;

/// Whether a guest can run on a host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Verdict {
    /// What stands in the way, in the order of the registers. Empty: nothing does.
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_BLOCKERS>")]
    pub blockers: Vec<Blocker>,
    /// Blockers beyond those that are listed.
    pub omitted: u32,
}

/// One thing that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// Its name, as Linux and QEMU write it: `avx512_vnni`, `ID_AA64PFR1_EL1.SSBS`.
    pub name: String,
    /// Where it is: `CPUID.7.0:ECX[11]`. Empty for what is in no register.
    pub place: String,
    /// What the guest has.
    pub guest: String,
    /// What the destination offers.
    pub destination: String,
    /// What would remove it.
    pub remedy: String,
}

impl Verdict {
    /// Whether the guest can run there.
    pub fn is_accepted(&self) -> bool {
        self.blockers.is_empty()
    }

    /// The names of what stands in the way.
    pub fn names(&self) -> Vec<&str> {
        self.blockers.iter().map(|blocker| blocker.name.as_str()).collect()
    }

    pub(super) fn refuse(&mut self, blocker: Blocker) {
        self.refuse_with(|| blocker);
    }

    pub(super) fn refuse_with(&mut self, blocker: impl FnOnce() -> Blocker) {
        if self.blockers.len() < MAX_BLOCKERS {
            self.blockers.push(blocker());
        } else {
            self.omitted = self.omitted.saturating_add(1);
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_accepted() {
            return f.write_str("the destination's CPU has all that the guest has");
        }
        f.write_str("the destination's CPU does not fit: ")?;
        f.write_str(&self.names().join(", "))?;
        match self.omitted {
            0 => Ok(()),
            more => write!(f, ", and {more} more"),
        }
    }
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if !self.place.is_empty() && self.place != self.name {
            write!(f, " ({})", self.place)?;
        }
        let Self {
            guest,
            destination,
            remedy,
            ..
        } = self;
        write!(f, ": the guest has {guest}, the destination {destination}; {remedy}")
    }
}

/// Name and place of a feature.
pub(super) struct Shown {
    name: String,
    place: String,
}

impl Shown {
    pub(super) fn named(table: &Table, register: Register, feature: &Feature) -> impl Fn() -> Self {
        move || Self {
            name: feature.name_in(register),
            place: table.place(register, feature.low, feature.width),
        }
    }

    /// Of bits without a name the place is the name.
    pub(super) fn by_place(table: &Table, register: Register, field: &Feature) -> impl Fn() -> Self {
        move || {
            let place = table.place(register, field.low, field.width);
            Self {
                name: place.clone(),
                place,
            }
        }
    }
}

/// What would remove a blocker.
pub(super) enum Remedy {
    /// Another guest.
    Without,
    /// A guest that has it.
    With,
    /// A guest with the value of both hosts.
    Equal,
    /// Another kernel on the destination.
    Kernel(String),
}

impl Remedy {
    pub(super) fn of(rule: Rule) -> Self {
        match rule {
            Rule::Burden | Rule::AtLeast | Rule::Granule => Self::With,
            Rule::Exact => Self::Equal,
            _ => Self::Without,
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Without => {
                "boot the guest with a CPU that has no more than this destination's, or choose a destination \
                 that has it (a newer CPU, microcode or kernel)"
                    .to_owned()
            }
            Self::With => "the guest does not know of what this destination's CPU has: boot it with a CPU that was \
                 made for both hosts, or choose a destination without it"
                .to_owned(),
            Self::Equal => "no guest can have both values: choose a destination with the guest's".to_owned(),
            Self::Kernel(release) => format!(
                "the CPU would do, but the KVM of the destination's kernel ({release}) does not let it be set: \
                 choose a destination with a kernel that does, or with the guest's value"
            ),
        }
    }
}

impl Blocker {
    pub(super) fn of(feature: &Feature, shown: Shown, values: [u64; 2], remedy: Remedy) -> Self {
        let [guest, destination] = values.map(|value| text(feature, value));
        let Shown { name, place } = shown;
        Self {
            name,
            place,
            guest,
            destination,
            remedy: remedy.text(),
        }
    }

    fn plain(name: &str, guest: String, destination: String, remedy: &str) -> Self {
        Self {
            name: name.to_owned(),
            place: String::new(),
            guest,
            destination,
            remedy: remedy.to_owned(),
        }
    }

    pub(super) fn vendor(guest: &str, destination: &str) -> Self {
        let remedy =
            "a guest moves between CPUs of two vendors only if it was booted with a profile that both have in common";
        Self::plain("vendor", guest.to_owned(), destination.to_owned(), remedy)
    }

    pub(super) fn architecture(guest: &Processor, destination: &Processor) -> Self {
        let name = |processor: &Processor| processor.architecture().to_owned();
        let remedy = "no guest moves between architectures: choose a destination of the guest's";
        Self::plain("architecture", name(guest), name(destination), remedy)
    }

    pub(super) fn frequency(name: &str, unit: &str, guest: u64, destination: Option<u64>) -> Self {
        let destination = destination.map_or("an unknown one".to_owned(), |n| format!("{n} {unit}"));
        let remedy = match name {
            "tsc_khz" => "the destination's CPU cannot scale its TSC: choose one that can, or one with this frequency",
            _ => "KVM cannot scale the counter: choose a destination with this frequency",
        };
        Self::plain(name, format!("{guest} {unit}"), destination, remedy)
    }

    pub(super) fn address_bits(guest: u8, destination: u8) -> Self {
        let remedy = "boot the guest with fewer address bits (--cpus max_phys_bits)";
        Self::plain("ipa_bits", guest.to_string(), destination.to_string(), remedy)
    }

    pub(super) fn vector_lengths(guest: &[u16], destination: &[u16]) -> Self {
        let shown = |lengths: &[u16]| match lengths {
            [] => "none".to_owned(),
            lengths => lengths.iter().map(u16::to_string).collect::<Vec<_>>().join("/") + " bits",
        };
        let remedy = "a vCPU has all of its host's vector lengths up to its longest: boot the guest with shorter \
             vectors, or without SVE, or choose a destination that has them";
        Self::plain("sve_vector_lengths", shown(guest), shown(destination), remedy)
    }
}

/// A value as people read it: registers and sets of bits hexadecimal, numbers decimal.
fn text(feature: &Feature, value: u64) -> String {
    if feature.signed && value >> (feature.width - 1) == 1 {
        return format!("-{}", (1 << feature.width) - value);
    }
    match feature.rule {
        _ if feature.width > 32 => format!("{value:#x}"),
        Rule::Subset | Rule::Burden | Rule::Any | Rule::Same if feature.width > 1 => format!("{value:#x}"),
        _ => value.to_string(),
    }
}
