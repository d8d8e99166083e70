//! The format of the files of features.
//!
//! A line is a feature, `#` starts a comment, and for what is not compared as a feature the comment is the reason, which it needs:
//!
//! ```text
//! CPUID.7.0:ECX[11]        avx512_vnni
//! CPUID.80000008:EAX[7:0]  physical_address_bits at-most
//! CPUID.8000000A:EDX[0]    npt @amd,hygon
//! CPUID.D.2-3F:EAX[31:0]   xsave_component_size_{n} same
//! MSR.485[6]               vmx_activity_hlt if=vmx
//! SYSREG.3.0.0.4.1[7:4]    ID_AA64PFR1_EL1.SSBS at-most
//! CPUID.4                  - ignored  # caches
//! ```
//!
//! First the place: leaf (and subleaf, or a range of them) and output register of CPUID, hexadecimal; the index of an MSR; the encoding
//! of an ARM system register (op0, op1, CRn, CRm, op2, decimal); the low half of KVM's number of another register; or `INIT`, the
//! features of `KVM_ARM_VCPU_INIT`. Then the name, the [`Rule`] (of one bit: `subset` unless told otherwise), `signed` for numbers with
//! a sign, `if=` with the feature without which a guest has no use for it, and after `@` whose CPUs have it, if its meaning is not the
//! same on all. A line without bits is about all there is in that place.

use super::{Feature, Output, Register, Rule};
use crate::Vendor;

/// A line that is no feature.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{line}\": {problem}")]
pub struct ParseError {
    line: String,
    problem: &'static str,
}

/// Where a line's feature is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// A register, and whether its name has a subleaf.
    One(Register, bool),
    /// The same register of several subleaves.
    Subleaves {
        leaf: u32,
        first: u32,
        last: u32,
        output: Output,
    },
    /// All of a leaf.
    Leaf(u32),
}

/// What a line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) place: Place,
    pub(super) feature: Feature,
}

/// Reads a line; `None` if it is empty or a comment.
pub(super) fn line(text: &'static str) -> Result<Option<Line>, ParseError> {
    let (data, comment) = match text.split_once('#') {
        Some((data, comment)) => (data, Some(comment.trim())),
        None => (text, None),
    };
    let mut words = data.split_whitespace();
    let Some(place) = words.next() else {
        return Ok(None);
    };
    let wrong = |problem| ParseError {
        line: text.to_owned(),
        problem,
    };
    let (place, bits) = match place.split_once('[') {
        Some((place, bits)) => (place, bits.strip_suffix(']')),
        None => (place, None),
    };
    let place = self::place(place).ok_or_else(|| wrong("there is no such place"))?;
    let whole = bits.is_none();
    let (low, width) = match bits {
        Some(bits) => self::bits(bits).ok_or_else(|| wrong("these are no bits"))?,
        None => (0, 64),
    };
    let name = words.next().ok_or_else(|| wrong("it has no name"))?;
    let mut feature = Feature {
        name,
        low,
        width,
        signed: false,
        rule: Rule::Subset,
        vendors: &[],
        needs: None,
        reason: comment,
    };
    let mut ruled = width == 1;
    for word in words {
        if let Some(rule) = Rule::from_name(word) {
            (feature.rule, ruled) = (rule, true);
        } else if word == "signed" {
            feature.signed = true;
        } else if let Some(needs) = word.strip_prefix("if=") {
            feature.needs = Some(needs);
        } else if let Some(vendors) = word.strip_prefix('@') {
            feature.vendors = self::vendors(vendors).ok_or_else(|| wrong("there is no such vendor"))?;
        } else {
            return Err(wrong("there is no such rule"));
        }
    }
    let reasoned = comment.is_some() || feature.rule.compares() && feature.rule != Rule::Any;
    match (ruled, reasoned, whole == (feature.rule == Rule::Ignored && name == "-")) {
        (false, ..) => Err(wrong("several bits need a rule")),
        (_, false, _) => Err(wrong("what is not compared needs a reason")),
        (.., false) => Err(wrong("only what is ignored has no bits")),
        _ => Ok(Some(Line { place, feature })),
    }
}

fn place(text: &str) -> Option<Place> {
    if text == "INIT" {
        return Some(Place::One(Register::Init, false));
    }
    let hex = |digits: &str| u32::from_str_radix(digits, 16).ok();
    let (space, rest) = text.split_once('.')?;
    match space {
        "MSR" => Some(Place::One(Register::Msr(hex(rest)?), false)),
        "KVM" => Some(Place::One(Register::Kvm(hex(rest)?), false)),
        "SYSREG" => {
            let numbers: Vec<u32> = rest.split('.').map(|n| n.parse().ok()).collect::<Option<_>>()?;
            let [op0, op1, crn, crm, op2] = numbers[..] else {
                return None;
            };
            Some(Place::One(Register::system(op0, op1, crn, crm, op2), false))
        }
        "CPUID" => {
            let Some((input, output)) = rest.split_once(':') else {
                return Some(Place::Leaf(hex(rest)?));
            };
            let output = Output::from_name(output)?;
            let Some((leaf, subleaf)) = input.split_once('.') else {
                let (leaf, subleaf) = (hex(input)?, 0);
                return Some(Place::One(Register::Cpuid { leaf, subleaf, output }, false));
            };
            let leaf = hex(leaf)?;
            Some(match subleaf.split_once('-') {
                Some((first, last)) => Place::Subleaves {
                    leaf,
                    first: hex(first)?,
                    last: hex(last)?,
                    output,
                },
                None => {
                    let subleaf = hex(subleaf)?;
                    Place::One(Register::Cpuid { leaf, subleaf, output }, true)
                }
            })
        }
        _ => None,
    }
}

/// Lowest bit and width.
fn bits(text: &str) -> Option<(u8, u8)> {
    let (high, low) = text.split_once(':').unwrap_or((text, text));
    let (high, low): (u8, u8) = (high.parse().ok()?, low.parse().ok()?);
    (low <= high && high < 64).then(|| (low, high - low + 1))
}

fn vendors(text: &str) -> Option<&'static [Vendor]> {
    match text {
        "amd,hygon" => Some(&[Vendor::Amd, Vendor::Hygon]),
        "intel" => Some(&[Vendor::Intel]),
        "zhaoxin" => Some(&[Vendor::Zhaoxin]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_where_a_feature_is_and_how_it_compares() {
        let read = |text| line(text).expect("a line").expect("a feature");
        let bits = read("CPUID.80000008:EAX[15:8] linear_address_bits at-most");
        assert_eq!(
            (bits.feature.low, bits.feature.width, bits.feature.rule),
            (8, 8, Rule::AtMost)
        );
        let leaf = 0x8000_0008;
        let register = Register::Cpuid {
            leaf,
            subleaf: 0,
            output: Output::Eax,
        };
        assert_eq!(bits.place, Place::One(register, false));
        let ssbs = read("SYSREG.3.0.0.4.1[7:4] ID_AA64PFR1_EL1.SSBS at-most signed if=X");
        assert_eq!(ssbs.place, Place::One(Register::Kvm(0x13_c021), false));
        assert!(ssbs.feature.signed && ssbs.feature.needs == Some("X"));
        assert_eq!(read("MSR.10A[2] rsba burden").feature.rule, Rule::Burden);
        assert_eq!(read("CPUID.4 - ignored # why").place, Place::Leaf(4));
        assert_eq!(line("  # nothing"), Ok(None));
    }

    #[test]
    fn what_is_no_line_is_told() {
        for (text, problem) in [
            ("CPUID.7:EAX[0]", "it has no name"),
            ("CPUID.7:EIX[0] x", "there is no such place"),
            ("SYSREG.3.0.0[0] x", "there is no such place"),
            ("MSR.1[64] x", "these are no bits"),
            ("MSR.1[0:1] x at-most", "these are no bits"),
            ("MSR.1[1:0] x", "several bits need a rule"),
            ("MSR.1[0] x maybe", "there is no such rule"),
            ("MSR.1[0] x @cyrix", "there is no such vendor"),
            ("MSR.1[0] x ignored", "what is not compared needs a reason"),
            ("MSR.1 x subset", "only what is ignored has no bits"),
        ] {
            assert_eq!(line(text).expect_err(text).problem, problem, "{text}");
        }
    }
}
