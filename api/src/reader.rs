//! Reading what is described as JSON text: the body of a request, or a file.
//!
//! Agents send fields of other versions; those are ignored, and named to the caller. But a field that asks for a device or a protection
//! this build does not have must not be ignored: the agent would believe the guest has it.

use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;

use crate::strict::Strict;

/// Names of fields that mean something the guest would miss, wherever they stand, unless their value is nothing: null, false, 0 or empty.
const MISSED: &[&str] = &[
    // Devices.
    "devices",
    "ivshmem",
    "pmem",
    "pvpanic",
    "tpm",
    "user_devices",
    "vdpa",
    "watchdog",
    // Where they are and what serves them.
    "backing_files",
    "iommu",
    "iommu_segments",
    "pci_segment",
    "pci_segments",
    "vhost_socket",
    "vhost_user",
    // What limits and protects.
    "igvm",
    "landlock_enable",
    "rate_limit_group",
    "rate_limit_groups",
    "rate_limiter_config",
    "sev_snp",
    "tdx",
];

/// Why a text does not describe what it should.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ReadError {
    /// It is not JSON: why, and where.
    #[error("it is not JSON: {0}")]
    NotJson(String),
    /// It is some other JSON value.
    #[error("it is not a JSON object")]
    NotAnObject,
    /// It is an object without something it must have.
    #[error("{0}")]
    Object(String),
    /// A field has a value of the wrong kind.
    #[error("{path}: {reason}")]
    Field {
        /// Where it stands, like `disks[0].num_queues`.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A field asks for something this build does not have.
    #[error("this version does not support {0}; leave it out")]
    Unsupported(String),
}

/// Reads a JSON object, without checking that its values go together (for a VM, [`VmConfig::validate`](crate::VmConfig::validate)
/// does). Returns also the names of fields it does not know, once each.
pub fn read_object<T: DeserializeOwned>(text: &[u8]) -> Result<(T, Vec<String>), ReadError> {
    let value: Value = serde_json::from_slice(text).map_err(|error| ReadError::NotJson(error.to_string()))?;
    if !value.is_object() {
        return Err(ReadError::NotAnObject);
    }
    let mut unknown = Vec::new();
    let mut note = |path: serde_ignored::Path<'_>| unknown.push(Field::at(&path, &value));
    let mut track = serde_path_to_error::Track::new();
    let inner = serde_path_to_error::Deserializer::new(Strict(&value), &mut track);
    let outer = serde_ignored::Deserializer::new(inner, &mut note);
    let read: Result<T, _> = serde::Deserialize::deserialize(outer);
    let read = read.map_err(|error| match track.path() {
        path if path.iter().next().is_some() => ReadError::Field {
            path: path.to_string(),
            reason: error.to_string(),
        },
        _ => ReadError::Object(error.to_string()),
    })?;
    let mut ignored = Vec::new();
    for Field { name, missed } in unknown {
        if missed {
            return Err(ReadError::Unsupported(name));
        }
        if !ignored.contains(&name) {
            ignored.push(name);
        }
    }
    Ok((read, ignored))
}

/// A field that nobody asked for.
struct Field {
    /// Names on the way to it, without positions in lists.
    name: String,
    /// The guest would miss what it asks for.
    missed: bool,
}

impl Field {
    fn at(path: &serde_ignored::Path<'_>, root: &Value) -> Self {
        let mut names = Vec::new();
        let value = find(path, root, &mut names);
        let missed = names.last().is_some_and(|name| MISSED.contains(&name.as_str()));
        Self {
            missed: missed && !value.is_none_or(is_nothing),
            name: names.join("."),
        }
    }
}

/// The value at `path`; adds the names on the way to it.
fn find<'v>(path: &serde_ignored::Path<'_>, root: &'v Value, names: &mut Vec<String>) -> Option<&'v Value> {
    use serde_ignored::Path;
    match path {
        Path::Root => Some(root),
        Path::Seq { parent, index } => find(parent, root, names)?.get(index),
        Path::Map { parent, key } => {
            let value = find(parent, root, names);
            names.push(key.clone());
            value?.get(key)
        }
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => {
            find(parent, root, names)
        }
    }
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Number(n) => n.as_u64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}
