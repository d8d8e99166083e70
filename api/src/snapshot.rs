//! What clients say of snapshots.

use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ApiError;

/// Body of `vm.snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct SnapshotConfig {
    /// `file://` and the absolute path of a directory, which is made if it is not there, and holds no snapshot yet.
    pub destination_url: String,
    /// `file://` and the absolute path of the snapshot that this one builds on: the last one of this VM that was saved with
    /// `track_writes`. Only memory that was written since is saved, and a restore needs both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Whether writes to memory are logged from now on, so that later snapshots can build on this one. `false` ends that; without it, it
    /// stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track_writes: Option<bool>,
}

/// Body of `vm.restore`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct RestoreConfig {
    /// `file://` and the absolute path of the snapshot's directory.
    #[cfg_attr(feature = "openapi", schemars(required))]
    pub source_url: String,
    /// Whether all memory is there before the guest goes on, which what `memory_restore_mode` says otherwise may not be.
    pub prefault: bool,
    /// Network interfaces whose taps the client opened: their descriptors come with the request, one for each pair of queues, in this
    /// order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net_fds: Option<Vec<RestoredNet>>,
    /// How memory comes back.
    pub memory_restore_mode: RestoreMode,
    /// Whether the guest goes on at once; otherwise it is paused, until `vm.resume`.
    pub resume: bool,
    /// Whether the guest's clocks stood still since it was saved.
    pub clock: RestoreClock,
    /// Whether writes to memory are logged from now on, so that later snapshots can build on this one, which was saved with
    /// `track_writes`.
    pub track_writes: bool,
}

/// A network interface of a guest that is restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct RestoredNet {
    /// The device's id.
    pub id: String,
    /// How many of the descriptors are its own.
    pub num_fds: usize,
}

/// How memory comes back from a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum RestoreMode {
    /// It is copied before the guest goes on.
    #[default]
    Copy,
    /// The file is mapped, and a page is copied when the guest writes to it. The file must stay as it is while the guest runs.
    Mapped,
    /// It is copied when somebody first touches it, and by and by all of it; the event `memory-restored` tells when the snapshot is not
    /// needed any more.
    OnDemand,
}

/// What becomes of the time between a guest's being saved and restored, for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum RestoreClock {
    /// It did not pass: the guest's clocks go on from where they stood.
    #[default]
    Stands,
    /// It passed, by the host's clock: the guest's counters are ahead by it, and timers that were due meanwhile fire.
    Passes,
}

impl FromStr for RestoreClock {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "stands" => Ok(Self::Stands),
            "passes" => Ok(Self::Passes),
            _ => Err("write stands or passes"),
        }
    }
}

impl FromStr for RestoreMode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "copy" => Ok(Self::Copy),
            "mapped" => Ok(Self::Mapped),
            "ondemand" => Ok(Self::OnDemand),
            _ => Err("write copy, mapped or ondemand"),
        }
    }
}

impl SnapshotConfig {
    /// The directory.
    pub fn directory(&self) -> Result<PathBuf, ApiError> {
        directory("destination_url", &self.destination_url)
    }

    /// The directory of the snapshot that it builds on.
    pub fn base_directory(&self) -> Result<Option<PathBuf>, ApiError> {
        self.base.as_ref().map(|url| directory("base", url)).transpose()
    }
}

impl RestoreConfig {
    /// The directory.
    pub fn directory(&self) -> Result<PathBuf, ApiError> {
        directory("source_url", &self.source_url)
    }

    /// How many descriptors come with the request.
    pub fn descriptors(&self) -> usize {
        let nets = self.net_fds.iter().flatten();
        nets.fold(0, |sum, net| sum.saturating_add(net.num_fds))
    }
}

/// The path of a `file:` URL (RFC 8089) on this host.
fn directory(field: &str, url: &str) -> Result<PathBuf, ApiError> {
    let bad = || {
        ApiError::BadRequest(format!(
            "{field}: '{url}' names no directory of this host; write file:// and its absolute path, as in file:///var/lib/vm/snapshot"
        ))
    };
    let path = url.strip_prefix("file://").ok_or_else(bad)?;
    let path = path.strip_prefix("localhost").unwrap_or(path);
    let bytes = path.starts_with('/').then(|| decoded(path)).flatten().ok_or_else(bad)?;
    match bytes.contains(&0) {
        true => Err(bad()),
        false => Ok(std::ffi::OsString::from_vec(bytes).into()),
    }
}

/// `text` with `%20` as a space, and so on (RFC 3986, 2.1).
fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                (digit()? << 4 | digit()?) as u8
            }
            other => other,
        });
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(url: &str) -> Option<String> {
        let config = SnapshotConfig {
            destination_url: url.to_owned(),
            base: Some(url.to_owned()),
            track_writes: None,
        };
        assert_eq!(config.directory().ok(), config.base_directory().ok().flatten());
        let path = config.directory().ok()?;
        path.to_str().map(ToOwned::to_owned)
    }

    #[test]
    fn urls_name_directories_of_this_host() {
        for (url, expected) in [
            ("file:///a/b", Some("/a/b")),
            ("file://localhost/a", Some("/a")),
            ("file:///a%20b%2f", Some("/a b/")),
            ("file://other/a", None),
            ("file://a", None),
            ("/a", None),
            ("tcp:1.2.3.4:5", None),
            ("file:///a%2", None),
            ("file:///a%zz", None),
            ("file:///a%00", None),
            ("", None),
        ] {
            assert_eq!(path(url).as_deref(), expected, "{url}");
        }
    }

    #[test]
    fn modes_are_known_by_both_their_names() {
        for (text, mode) in [
            ("copy", RestoreMode::Copy),
            ("OnDemand", RestoreMode::OnDemand),
            ("mapped", RestoreMode::Mapped),
        ] {
            assert_eq!(text.parse(), Ok(mode));
        }
        assert!("lazy".parse::<RestoreMode>().is_err());
        assert_eq!("passes".parse(), Ok(RestoreClock::Passes));
        assert_eq!("Stands".parse(), Ok(RestoreClock::Stands));
        assert!("flies".parse::<RestoreClock>().is_err());
        assert_eq!(
            serde_json::to_string(&RestoreMode::OnDemand).expect("JSON"),
            "\"OnDemand\""
        );
    }
}
