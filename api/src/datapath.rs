//! Who works on the guest's rings of a device that a daemon serves.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Who is to work on the guest's rings of a device that a daemon serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum DataPath {
    /// The daemon if it can, otherwise the VMM.
    #[default]
    Auto,
    /// The daemon; one that cannot is refused.
    Direct,
    /// The VMM, which passes requests on to the daemon.
    Relay,
}

impl DataPath {
    /// Whether it is the default.
    pub fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

impl FromStr for DataPath {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "direct" => Ok(Self::Direct),
            "relay" => Ok(Self::Relay),
            _ => Err("write auto, direct or relay"),
        }
    }
}
