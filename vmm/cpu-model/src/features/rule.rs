//! How a guest's value of a feature and a host's are compared, and what two hosts have in common.

use super::Feature;

/// How values of a feature compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Bits that each are a feature: the host has all that the guest has.
    Subset,
    /// A number; the host's is as high or higher.
    AtMost,
    /// A number; the host's is as low or lower.
    AtLeast,
    /// A value that means nothing but itself: the guest has none (0), or the host's.
    Same,
    /// Like [`Rule::Same`], but 0 is a value, too.
    Exact,
    /// Bits that each are a weakness or a demand: the guest knows of all that the host has.
    Burden,
    /// A size that must not be too small; 0 stands for the largest.
    Granule,
    /// A number as of [`Rule::AtMost`], of which 0 says nothing.
    Width,
    /// Its value does not matter if KVM lets it be set.
    Any,
    /// Not compared. Guests that are to run on several hosts have the lowest.
    Lowest,
    /// Not compared: it is no feature.
    Ignored,
}

impl Rule {
    pub(super) fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "subset" => Self::Subset,
            "at-most" => Self::AtMost,
            "at-least" => Self::AtLeast,
            "same" => Self::Same,
            "exact" => Self::Exact,
            "burden" => Self::Burden,
            "granule" => Self::Granule,
            "width" => Self::Width,
            "any" => Self::Any,
            "lowest" => Self::Lowest,
            "ignored" => Self::Ignored,
            _ => return None,
        })
    }

    /// Whether it is compared at all.
    pub fn compares(self) -> bool {
        !matches!(self, Self::Lowest | Self::Ignored)
    }
}

/// Order of a granule: 0 is the largest.
fn granule(value: u64) -> u64 {
    value.wrapping_sub(1)
}

impl Feature {
    /// Puts a value on the number line. A flip of the sign bit does that for numbers with a sign.
    fn order(&self, value: u64) -> u64 {
        if self.signed {
            value ^ 1 << (self.width - 1)
        } else {
            value
        }
    }

    /// Whether a guest with `guest` can run on a host with `host`.
    pub fn fits(&self, guest: u64, host: u64) -> bool {
        let (low, high) = (self.order(guest), self.order(host));
        match self.rule {
            Rule::Subset => guest & !host == 0,
            Rule::AtMost => low <= high,
            Rule::AtLeast => low >= high,
            Rule::Same => guest == 0 || guest == host,
            Rule::Exact => guest == host,
            Rule::Burden => host & !guest == 0,
            Rule::Granule => granule(guest) >= granule(host),
            Rule::Width => host == 0 || guest <= host,
            Rule::Any | Rule::Lowest | Rule::Ignored => true,
        }
    }

    /// What a guest has that can run on hosts with `a` and with `b`; `None` if there is no such value.
    pub fn common(&self, a: u64, b: u64) -> Option<u64> {
        let by = |wins: bool| if wins { a } else { b };
        Some(match self.rule {
            Rule::Subset => a & b,
            Rule::Burden => a | b,
            Rule::AtMost | Rule::Any | Rule::Lowest => by(self.order(a) <= self.order(b)),
            Rule::AtLeast => by(self.order(a) >= self.order(b)),
            Rule::Same | Rule::Ignored => by(a == b) * u64::from(a == b),
            Rule::Exact if a == b => a,
            Rule::Exact => return None,
            Rule::Granule => by(granule(a) >= granule(b)),
            Rule::Width if a == 0 || b == 0 => a | b,
            Rule::Width => a.min(b),
        })
    }
}
