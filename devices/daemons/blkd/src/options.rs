//! Exports as they are described on the command line and on the control socket.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use triarch_api::flags::{FlagError, KeyValues};
use triarch_block::{Backend, DiskOptions, Limits, Rate};

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
    "poll_us",
    "lock",
    "iops",
    "iops_burst",
    "bw",
    "bw_burst",
];

/// The longest time a queue may look for work, in microseconds. Stopping it waits for so long.
const MAX_POLL: u32 = 100_000;

/// Without a burst of its own, a limit lets this part of a second's worth go at once.
const BURST_PART: u64 = 10;

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
    #[error("the name '{0}' is not made of 1 to 64 letters, digits, '.', '_' and '-'")]
    Name(String),
    /// Neither of the two.
    #[error("lock is early or late, not '{0}'")]
    Lock(String),
    /// Nobody should wait for so long.
    #[error("poll_us is at most {MAX_POLL}, not {0}")]
    Poll(u32),
    /// A limit of nothing, or a burst of what is not limited.
    #[error("{0} must be at least 1, and a burst needs its limit")]
    Limit(&'static str),
}

/// How much an export may do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitOptions {
    /// Operations per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Operations that may be done at once after a pause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<u64>,
    /// Bytes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bw: Option<u64>,
    /// Bytes that may be moved at once after a pause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bw_burst: Option<u64>,
}

impl LimitOptions {
    /// As the disk takes them.
    ///
    /// # Errors
    /// A number is zero, or a burst has no limit.
    pub fn limits(&self) -> Result<Limits, OptionsError> {
        let rate = |what, rate: Option<u64>, burst: Option<u64>| match (rate, burst) {
            (None, None) => Ok(None),
            (Some(0), _) | (_, Some(0)) | (None, Some(_)) => Err(OptionsError::Limit(what)),
            (Some(per_second), burst) => Ok(Some(Rate {
                per_second,
                burst: burst.unwrap_or((per_second / BURST_PART).max(1)),
            })),
        };
        Ok(Limits {
            operations: rate("iops", self.iops, self.iops_burst)?,
            bytes: rate("bw", self.bw, self.bw_burst)?,
        })
    }
}

/// One export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportOptions {
    /// What it is called.
    pub name: String,
    /// The image or block device.
    pub path: PathBuf,
    /// Where front ends connect: a path, or `fd=N`.
    pub socket: String,
    /// Refuse writes.
    #[serde(default)]
    pub readonly: bool,
    /// Queues, 1 to 256.
    #[serde(default = "one")]
    pub num_queues: u16,
    /// Descriptors of a queue as the guest is told: a power of two, 4 to 1024.
    #[serde(default = "usual_size")]
    pub queue_size: u16,
    /// Bypass the host's page cache.
    #[serde(default)]
    pub direct: bool,
    /// Use io_uring where it works.
    #[serde(default = "yes")]
    pub io_uring: bool,
    /// Serial number; by default one made from the file's identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// How long each queue looks for work before it sleeps, at most, in microseconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub poll_us: u32,
    /// When it is locked.
    #[serde(default, skip_serializing_if = "LockTime::is_early")]
    pub lock: LockTime,
    /// How much it may do.
    #[serde(default)]
    pub limits: LimitOptions,
}

/// When the disk of an export is locked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LockTime {
    /// When it is opened.
    #[default]
    Early,
    /// When a front end begins to use it: another daemon uses it until then, whose guest is to come here.
    Late,
}

impl LockTime {
    fn is_early(&self) -> bool {
        *self == Self::Early
    }
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn one() -> u16 {
    1
}

fn usual_size() -> u16 {
    128
}

fn yes() -> bool {
    true
}

impl ExportOptions {
    /// Checks what no type does.
    ///
    /// # Errors
    /// The name or a limit is unusable.
    pub fn check(&self) -> Result<(), OptionsError> {
        let good = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if !(1..=64).contains(&self.name.len()) || !self.name.bytes().all(good) {
            return Err(OptionsError::Name(self.name.clone()));
        }
        if self.poll_us > MAX_POLL {
            return Err(OptionsError::Poll(self.poll_us));
        }
        self.limits.limits().map(drop)
    }

    /// How its disk is opened.
    pub fn disk(&self) -> DiskOptions {
        DiskOptions {
            readonly: self.readonly,
            direct: self.direct,
            backend: if self.io_uring { Backend::Auto } else { Backend::Sync },
            serial: self.serial.clone(),
            // Checked when the options were read.
            limits: Some(self.limits.limits().unwrap_or_default()),
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
        let options = Self {
            name: needed("name")?.to_owned(),
            path: needed("path")?.into(),
            socket: needed("socket")?.to_owned(),
            readonly: kv.switch("readonly")?.unwrap_or(false),
            num_queues: kv.number("num_queues")?.unwrap_or_else(one),
            queue_size: kv.number("queue_size")?.unwrap_or_else(usual_size),
            direct: kv.switch("direct")?.unwrap_or(false),
            io_uring: kv.switch("io_uring")?.unwrap_or(true),
            serial: kv.text("serial").map(str::to_owned),
            poll_us: kv.number("poll_us")?.unwrap_or(0),
            lock: match kv.text("lock") {
                None | Some("early") => LockTime::Early,
                Some("late") => LockTime::Late,
                Some(other) => return Err(OptionsError::Lock(other.to_owned())),
            },
            limits: LimitOptions {
                iops: kv.number("iops")?,
                iops_burst: kv.number("iops_burst")?,
                bw: kv.size("bw")?,
                bw_burst: kv.size("bw_burst")?,
            },
        };
        options.check()?;
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_is_read() {
        let all = "name=a-1,path=/x/y,socket=fd=3,readonly=on,num_queues=4,queue_size=64,direct=on,io_uring=off,serial=s,\
                   poll_us=50,lock=late,iops=500,bw=1M,bw_burst=4M";
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
            poll_us: 50,
            lock: LockTime::Late,
            limits: LimitOptions {
                iops: Some(500),
                iops_burst: None,
                bw: Some(1 << 20),
                bw_burst: Some(4 << 20),
            },
        };
        assert_eq!(read, expected);
        let limits = read.limits.limits().expect("limits");
        let rate = |per_second, burst| Some(Rate { per_second, burst });
        assert_eq!(limits.operations, rate(500, 50));
        assert_eq!(limits.bytes, rate(1 << 20, 4 << 20));
        let json = serde_json::to_string(&read).expect("json");
        assert_eq!(
            serde_json::from_str::<ExportOptions>(&json).expect("read again"),
            expected
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |text: &str| text.parse::<ExportOptions>().expect_err(text).to_string();
        assert_eq!(error("name=a,path=b"), "--export: socket= is missing");
        assert!(error("name=a b,path=b,socket=c").contains("'a b'"));
        assert!(error("nam=a").contains("no key 'nam'"));
        assert!(error("name=a,path=b,socket=c,num_queues=70000").contains("too large"));
        assert!(error("name=a,path=b,socket=c,poll_us=100001").contains("100000, not 100001"));
        assert!(error("name=a,path=b,socket=c,lock=no").contains("'no'"));
        assert!(error("name=a,path=b,socket=c,iops=0").contains("iops"));
        assert!(error("name=a,path=b,socket=c,bw_burst=5").contains("needs its limit"));
    }
}
