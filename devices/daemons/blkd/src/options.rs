//! Exports as they are described on the command line.

use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;
use triarch_api::flags::{FlagError, KeyValues};
use triarch_block::{Backend, DiskOptions};

/// Keys of `--export`.
const KEYS: &[&str] = &[
    "name",
    "path",
    "socket",
    "readonly",
    "num_queues",
    "queue_size",
    "direct",
    "io_uring",
    "serial",
];

/// Why an export is not possible as it was described.
#[derive(Debug, Error)]
pub enum OptionsError {
    /// The flag cannot be understood.
    #[error(transparent)]
    Flag(#[from] FlagError),
    /// Something is missing.
    #[error("--export: {0}= is missing")]
    Missing(&'static str),
    /// The name would be no good one in logs, metrics and thread names.
    #[error("--export: the name '{0}' is not made of 1 to 64 letters, digits, '.', '_' and '-'")]
    Name(String),
}

/// One export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportOptions {
    /// What it is called.
    pub name: String,
    /// The image or block device.
    pub path: PathBuf,
    /// Where front ends connect: a path, or `fd=N`.
    pub socket: String,
    /// Refuse writes.
    pub readonly: bool,
    /// Queues, 1 to 256.
    pub num_queues: u16,
    /// Descriptors of a queue as the guest is told: a power of two, 4 to 1024.
    pub queue_size: u16,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// Use io_uring where it works.
    pub io_uring: bool,
    /// Serial number; by default one made from the file's identity.
    pub serial: Option<String>,
}

impl ExportOptions {
    /// How its disk is opened.
    pub fn disk(&self) -> DiskOptions {
        DiskOptions {
            readonly: self.readonly,
            direct: self.direct,
            backend: if self.io_uring { Backend::Auto } else { Backend::Sync },
            serial: self.serial.clone(),
            ..DiskOptions::new(&self.path)
        }
    }
}

impl FromStr for ExportOptions {
    type Err = OptionsError;

    /// Reads `name=NAME,path=FILE,socket=PATH` and so on.
    fn from_str(text: &str) -> Result<Self, OptionsError> {
        let kv = KeyValues::parse("--export", text, KEYS, &[])?;
        let needed = |key| kv.text(key).filter(|t| !t.is_empty()).ok_or(OptionsError::Missing(key));
        let name = needed("name")?;
        let good = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if name.len() > 64 || !name.bytes().all(good) {
            return Err(OptionsError::Name(name.to_owned()));
        }
        Ok(Self {
            name: name.to_owned(),
            path: needed("path")?.into(),
            socket: needed("socket")?.to_owned(),
            readonly: kv.switch("readonly")?.unwrap_or(false),
            num_queues: kv.number("num_queues")?.unwrap_or(1),
            queue_size: kv.number("queue_size")?.unwrap_or(128),
            direct: kv.switch("direct")?.unwrap_or(false),
            io_uring: kv.switch("io_uring")?.unwrap_or(true),
            serial: kv.text("serial").map(str::to_owned),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_is_read() {
        let all =
            "name=a-1,path=/x/y,socket=fd=3,readonly=on,num_queues=4,queue_size=64,direct=on,io_uring=off,serial=s";
        let read: ExportOptions = all.parse().expect("valid");
        let expected = ExportOptions {
            name: "a-1".into(),
            path: "/x/y".into(),
            socket: "fd=3".into(),
            readonly: true,
            num_queues: 4,
            queue_size: 64,
            direct: true,
            io_uring: false,
            serial: Some("s".into()),
        };
        assert_eq!(read, expected);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |text: &str| text.parse::<ExportOptions>().expect_err(text).to_string();
        assert_eq!(error("name=a,path=b"), "--export: socket= is missing");
        assert!(error("name=a b,path=b,socket=c").contains("'a b'"));
        assert!(error("nam=a").contains("no key 'nam'"));
        assert!(error("name=a,path=b,socket=c,num_queues=70000").contains("too large"));
    }
}
