//! Configuration of a memory balloon.

use serde::{Deserialize, Serialize};

use crate::ConfigError;
use crate::validate::range;

/// Pages of a balloon have this size.
const PAGE: u64 = 4096;

/// A memory balloon.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct BalloonConfig {
    /// Bytes the balloon takes from the guest.
    #[cfg_attr(feature = "openapi", schemars(extend("multipleOf" = 4096)))]
    pub size: u64,
    /// The guest may take memory back when it runs short.
    pub deflate_on_oom: bool,
    /// The guest may tell which of its memory is free, and the host then uses it.
    pub free_page_reporting: bool,
    /// Name in the API; `_balloon3` and so on when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(regex(pattern = "^(_?[^_]|_$)")))]
    pub id: Option<String>,
}

impl BalloonConfig {
    /// Checks it, for a guest that has `memory` bytes.
    pub(crate) fn validate(&self, memory: u64) -> Result<(), ConfigError> {
        if self.size.is_multiple_of(PAGE) && self.size <= memory {
            return Ok(());
        }
        let allowed = format!("a multiple of {PAGE} and at most what the guest has ({memory})");
        Err(range("balloon.size", format!("{} bytes", self.size), allowed))
    }
}
