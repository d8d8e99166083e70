//! Where a device sits on the guest's PCI bus.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A slot of bus 0 and a function in it, written `05.1`: the slot in hexadecimal, as `lspci` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SlotAddress {
    slot: u8,
    function: u8,
}

impl SlotAddress {
    /// The slot, 1 to 31.
    pub const fn slot(self) -> u8 {
        self.slot
    }

    /// The function, 0 to 7.
    pub const fn function(self) -> u8 {
        self.function
    }
}

#[cfg(feature = "openapi")]
impl schemars::JsonSchema for SlotAddress {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "SlotAddress".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "A slot of the guest's PCI bus, 01 to 1f in hexadecimal, and a function in it, 0 to 7: 05.1. Without a function it is 0.",
            "pattern": r"^(0?[1-9A-Fa-f]|1[0-9A-Fa-f])(\.[0-7])?$",
        })
    }
}

impl fmt::Display for SlotAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{}", self.slot, self.function)
    }
}

impl FromStr for SlotAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let failed = || {
            format!(
                "'{text}' is no place on the guest's PCI bus; write a slot from 01 to 1f and a function from 0 to 7, like 05.0"
            )
        };
        let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
        let hex = |digits: &str, most: usize| {
            let plain = digits.len() <= most && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            plain.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
        };
        let slot = hex(slot, 2).filter(|slot| (1..32).contains(slot)).ok_or_else(failed)?;
        let function = hex(function, 1).filter(|function| *function < 8).ok_or_else(failed)?;
        Ok(Self { slot, function })
    }
}

impl TryFrom<String> for SlotAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<SlotAddress> for String {
    fn from(address: SlotAddress) -> Self {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_as_lspci_shows_it() {
        let parsed = |text: &str| text.parse::<SlotAddress>().map(|address| address.to_string());
        assert_eq!(parsed("05.1").as_deref(), Ok("05.1"));
        assert_eq!(parsed("1F.7").as_deref(), Ok("1f.7"));
        assert_eq!(parsed("6").as_deref(), Ok("06.0"));
        for wrong in [
            "", "0", "00.0", "20.0", "05.8", "05.", ".1", "005.0", "5.10", "+5.0", "00:05.0",
        ] {
            assert!(parsed(wrong).is_err_and(|text| text.contains("like 05.0")), "{wrong:?}");
        }
    }
}
