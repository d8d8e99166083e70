//! What clients say of live migrations, and are told of them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{ApiError, RestoredNet};

/// Most percent of the time for which vCPUs are held.
pub const MAX_THROTTLE: u8 = 99;
/// Most connections for memory.
pub const MAX_CONNECTIONS: u16 = 16;

/// Files with which the two sides of a migration know each other, PEM; TLS 1.3, in both directions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct MigrationTls {
    /// This side's certificate, and those between it and the authority's.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Certificates of authorities, one of which must have signed the other side's.
    pub ca: PathBuf,
    /// The name or IP address that the other side's certificate must have. Without one a source expects the host of the address, and a
    /// destination takes whoever has a certificate of the authority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
}

/// What happens when a migration takes longer than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum TimeoutStrategy {
    /// It ends, and the guest stays.
    #[default]
    Cancel,
    /// The guest is moved, however long it is paused for that.
    Ignore,
    /// The guest is moved with the memory that is there, and the rest follows; `post_copy` must allow that.
    PostCopy,
}

/// Body of `vm.send-migration`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct SendMigration {
    /// Where the other VMM waits: `unix:/path`, `tcp:host:port` with TLS, or `tcp-plain:host:port`, which anybody on the way can read and
    /// change.
    #[cfg_attr(feature = "openapi", schemars(required))]
    pub destination_url: String,
    /// Milliseconds for which the guest may be paused. It is not paused while that cannot be kept.
    #[cfg_attr(feature = "openapi", schemars(range(min = 1)))]
    pub downtime_ms: u64,
    /// Seconds that copying may take.
    #[cfg_attr(feature = "openapi", schemars(range(min = 1)))]
    pub timeout_s: u64,
    /// What happens after that.
    pub timeout_strategy: TimeoutStrategy,
    /// Connections for memory, beside one for all else.
    #[cfg_attr(feature = "openapi", schemars(range(min = 1, max = 16)))]
    pub connections: u16,
    /// Bytes a second that may be sent; absent or 0: as many as there is room for. It can be changed while the guest is moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<u64>,
    /// Percent of the time for which the guest's vCPUs may be held, if it writes memory faster than it can be sent; 0: never. They are
    /// held no longer than it takes, and never more than this.
    #[cfg_attr(feature = "openapi", schemars(range(max = 99)))]
    pub throttle: u8,
    /// Whether pages are compressed (LZ4) as long as that is faster than to send them as they are.
    pub compress: bool,
    /// Whether the guest may run at the destination before all of its memory is there: after `vm.set-migration` with `post_copy`, or when
    /// the time is over. From then on it lives by both hosts and the network between them: whichever of them ends for good ends it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub post_copy: bool,
    /// Seconds for which a connection that is lost then is tried again without being asked. Absent: as long as it takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recover_s: Option<u64>,
    /// Certificates, for `tcp:`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<MigrationTls>,
    /// Whether the memory's descriptors are handed over to the other VMM, on this host by `unix:`, instead of copying what is in it. The
    /// guest must have shared memory; nothing is sent, so that `connections`, `bandwidth`, `throttle`, `compress` and `downtime_ms` mean
    /// nothing. Not with `post_copy`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub local: bool,
}

impl Default for SendMigration {
    fn default() -> Self {
        Self {
            destination_url: String::new(),
            downtime_ms: 300,
            timeout_s: 3600,
            timeout_strategy: TimeoutStrategy::default(),
            connections: 1,
            bandwidth: None,
            throttle: 0,
            compress: false,
            post_copy: false,
            recover_s: None,
            tls: None,
            local: false,
        }
    }
}

impl SendMigration {
    /// Whether all of it can be done.
    pub fn validate(&self) -> Result<(), ApiError> {
        let bad = |text: String| Err(ApiError::BadRequest(text));
        one_way(
            self.local,
            self.post_copy || self.timeout_strategy == TimeoutStrategy::PostCopy,
        )?;
        if !(1..=MAX_CONNECTIONS).contains(&self.connections) {
            return bad(format!(
                "connections: {} is not between 1 and {MAX_CONNECTIONS}",
                self.connections
            ));
        }
        if self.downtime_ms == 0 {
            return bad("downtime_ms: a guest is paused for a moment at least; give 1 or more".to_owned());
        }
        if self.throttle > MAX_THROTTLE {
            return bad(format!(
                "throttle: vCPUs can be held for {MAX_THROTTLE} percent of the time at most, and {} was given",
                self.throttle
            ));
        }
        if self.timeout_s == 0 {
            return bad("timeout_s: give 1 second at least".to_owned());
        }
        if self.timeout_strategy == TimeoutStrategy::PostCopy && !self.post_copy {
            return bad("timeout_strategy: PostCopy needs post_copy, which allows it".to_owned());
        }
        if self.recover_s.is_some() && !self.post_copy {
            return bad("recover_s: it is for post_copy, which was not asked for".to_owned());
        }
        Ok(())
    }
}

/// Refuses what excludes each other: memory that is handed over is there when the guest runs.
fn one_way(local: bool, post_copy: bool) -> Result<(), ApiError> {
    match local && post_copy {
        true => Err(ApiError::BadRequest(
            "local: memory that is handed over is all there when the guest runs; leave post_copy out, or local"
                .to_owned(),
        )),
        false => Ok(()),
    }
}

/// Body of `vm.receive-migration`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct ReceiveMigration {
    /// Where to wait for the guest: `unix:/path`, `tcp:host:port` with TLS, or `tcp-plain:host:port`, which anybody on the way can read and
    /// change. Port 0 is any that is free; the event `listening` tells which.
    #[cfg_attr(feature = "openapi", schemars(required))]
    pub receiver_url: String,
    /// Certificates, for `tcp:`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<MigrationTls>,
    /// What of the guest's configuration is different here: a part of a configuration that is laid over it. Devices are found by their
    /// `id`. Paths, sockets, taps and modes of consoles may differ, not what the guest sees.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub config: Map<String, Value>,
    /// Network interfaces whose taps the client opened: their descriptors come with the request, one for each pair of queues, in this
    /// order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net_fds: Option<Vec<RestoredNet>>,
}

/// Body of `vm.check-migration`: where a VM would be moved to, as for `vm.send-migration`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct CheckMigration {
    /// Where the other VMM waits with `vm.receive-migration`: `unix:/path`, `tcp:host:port` with TLS, or `tcp-plain:host:port`.
    #[cfg_attr(feature = "openapi", schemars(required))]
    pub destination_url: String,
    /// Certificates, for `tcp:`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<MigrationTls>,
    /// Whether memory would be handed over within this host.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub local: bool,
    /// Whether the guest might run there before all of its memory is there. Not with `local`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub post_copy: bool,
}

impl CheckMigration {
    /// Whether it can be asked.
    pub fn validate(&self) -> Result<(), ApiError> {
        one_way(self.local, self.post_copy)
    }
}

/// Answer of `vm.check-migration`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct MigrationCheck {
    /// All that is in the way. Empty: the VM would be taken.
    pub blockers: Vec<MigrationBlocker>,
}

/// One thing that is in the way of a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct MigrationBlocker {
    /// To what it belongs.
    pub what: MigrationPart,
    /// Id of the device, or name of the CPU's feature. Null where neither is meant.
    pub name: Option<String>,
    /// Why the VM cannot be moved.
    pub reason: String,
    /// What would remove it.
    pub remedy: String,
}

/// What something in the way of a migration belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum MigrationPart {
    /// The host, or its VMM.
    Host,
    /// A feature of the CPUs.
    Cpu,
    /// The frequency of the guest's clock.
    Clock,
    /// Memory.
    Memory,
    /// A disk.
    Disk,
    /// Another device.
    Device,
    /// The configuration.
    Configuration,
}

/// Body of `vm.set-migration`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct SetMigration {
    /// Bytes a second that may be sent from now on; null or 0: as many as there is room for. Absent beside one of the other fields: as
    /// before.
    pub bandwidth: Option<u64>,
    /// `true`: the guest is moved now with the memory that is there, and the rest follows. Its `vm.send-migration` must have allowed that.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub post_copy: bool,
    /// `true`, at the source: a connection that was lost after that is tried again now.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub recover: bool,
}

/// Which side of a migration a VMM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum MigrationSide {
    /// It has the guest.
    Source,
    /// It gets it.
    Destination,
}

/// Where a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum MigrationPhase {
    /// The two sides are not joined yet.
    Connecting,
    /// Memory is copied while the guest runs.
    Copying,
    /// The destination has the guest's memory, and prepares a machine while the guest runs.
    #[serde(rename = "handing_over")]
    HandingOver,
    /// The guest is paused, and the rest is copied.
    Switching,
    /// The guest was given away; its end is awaited.
    Committed,
    /// The guest runs at the destination, and memory that it lacks comes from the source.
    #[serde(rename = "post-copy")]
    PostCopy,
    /// The same, and the connection is lost: whatever of the guest needs memory that it lacks stands still.
    #[serde(rename = "post-copy-paused")]
    PostCopyPaused,
    /// It is over, and the guest was moved.
    Done,
    /// It is over, and the guest was not moved.
    Failed,
}

/// Answer of `vm.migration-progress`: the migration that is under way, or the last one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct MigrationProgress {
    /// Which side this VMM is.
    pub side: MigrationSide,
    /// Where it is.
    pub phase: MigrationPhase,
    /// Number of the job.
    pub job: u64,
    /// Where the destination listens.
    pub address: String,
    /// Milliseconds since it began, or that it took.
    pub elapsed_ms: u64,
    /// Rounds of copying that began.
    pub rounds: u32,
    /// Bytes of the guest's memory.
    pub total: u64,
    /// Bytes left in this round, or lacking at the destination.
    pub remaining: u64,
    /// Pages of 4 KiB that were sent, each time they were.
    pub pages: u64,
    /// Pages of zeroes: told in a few bytes, or not at all.
    pub zero_pages: u64,
    /// Bytes that were sent.
    pub wire_bytes: u64,
    /// Bytes of memory that go a second.
    pub rate: u64,
    /// Bytes of memory that the guest writes a second.
    pub dirty_rate: u64,
    /// Milliseconds for which the guest would be paused if it were moved at the end of this round; of one that was moved, for which it
    /// was. Null where it is not known.
    pub downtime_ms: Option<u64>,
    /// How often the guest was paused and went on, since it would have taken longer than allowed.
    pub retreats: u32,
    /// Percent of the time for which the guest's vCPUs are held now.
    #[serde(default)]
    pub throttle: u8,
    /// Bytes a second that may be sent; null: as many as there is room for.
    pub bandwidth: Option<u64>,
    /// Why it failed, or why it stands in `post-copy-paused`, and what can be done.
    pub error: Option<String>,
}

/// Lays `over` over `config`: objects are merged by their fields, lists of objects by their `id`; anything else takes the place of what was
/// there, and null takes it away.
///
/// # Errors
/// An object of a list has an id that is not there, or none.
pub fn lay_over(config: &mut Map<String, Value>, over: Map<String, Value>) -> Result<(), String> {
    for (name, new) in over {
        match (config.get_mut(&name), new) {
            (_, Value::Null) => drop(config.remove(&name)),
            (Some(Value::Object(old)), Value::Object(new)) => {
                lay_over(old, new).map_err(|error| format!("{name}.{error}"))?;
            }
            (Some(Value::Array(old)), Value::Array(new)) if new.iter().any(Value::is_object) => {
                for one in new {
                    lay_over_one(old, one).map_err(|error| format!("{name}: {error}"))?;
                }
            }
            (None, Value::Array(new)) if new.iter().any(Value::is_object) => {
                return Err(format!("{name}: the guest has none"));
            }
            (_, new) => drop(config.insert(name, new)),
        }
    }
    Ok(())
}

fn lay_over_one(list: &mut [Value], new: Value) -> Result<(), String> {
    let id = new["id"].as_str().map(ToOwned::to_owned);
    let (Some(id), Value::Object(new)) = (id, new) else {
        return Err("each element needs the id of the device it is about".to_owned());
    };
    match list.iter_mut().find(|one| one["id"] == *id) {
        Some(Value::Object(old)) => lay_over(old, new),
        _ => Err(format!("the guest has no '{id}' there")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn laid(config: Value, over: Value) -> Result<Value, String> {
        let (Value::Object(mut config), Value::Object(over)) = (config, over) else {
            panic!("two objects");
        };
        lay_over(&mut config, over)?;
        Ok(Value::Object(config))
    }

    #[test]
    fn what_is_different_here_is_laid_over() {
        let config = json!({
            "serial": { "mode": "Socket", "socket": "/a" }, "cpus": { "boot_vcpus": 2 },
            "disks": [{ "id": "a", "path": "/a", "readonly": true }, { "id": "b", "path": "/b" }],
        });
        let over = json!({
            "serial": { "socket": "/c" }, "disks": [{ "id": "b", "path": "/c" }],
            "vsock": { "cid": 3 }, "cpus": { "boot_vcpus": null },
        });
        let expected = json!({
            "serial": { "mode": "Socket", "socket": "/c" }, "cpus": {},
            "disks": [{ "id": "a", "path": "/a", "readonly": true }, { "id": "b", "path": "/c" }],
            "vsock": { "cid": 3 },
        });
        assert_eq!(laid(config.clone(), over), Ok(expected));
        assert_eq!(laid(config.clone(), json!({})), Ok(config.clone()));
        let error = laid(config.clone(), json!({ "disks": [{ "id": "x", "path": "/c" }] })).expect_err("no such disk");
        assert_eq!(error, "disks: the guest has no 'x' there");
        assert!(laid(config.clone(), json!({ "disks": [{ "path": "/c" }] })).is_err());
        let error = laid(config, json!({ "net": [{ "id": "x" }] })).expect_err("no interfaces");
        assert_eq!(error, "net: the guest has none");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let good = SendMigration::default();
        assert_eq!(good.validate(), Ok(()));
        for (bad, status) in [
            (
                SendMigration {
                    connections: 0,
                    ..good.clone()
                },
                400,
            ),
            (
                SendMigration {
                    connections: 17,
                    ..good.clone()
                },
                400,
            ),
            (
                SendMigration {
                    downtime_ms: 0,
                    ..good.clone()
                },
                400,
            ),
            (
                SendMigration {
                    throttle: 100,
                    ..good.clone()
                },
                400,
            ),
            (
                SendMigration {
                    timeout_s: 0,
                    ..good.clone()
                },
                400,
            ),
            (
                SendMigration {
                    timeout_strategy: TimeoutStrategy::PostCopy,
                    ..good.clone()
                },
                400,
            ),
            (
                SendMigration {
                    recover_s: Some(5),
                    ..good.clone()
                },
                400,
            ),
        ] {
            assert_eq!(bad.validate().expect_err("refused").status(), status, "{bad:?}");
        }
    }

    #[test]
    fn memory_goes_one_way() {
        let local = SendMigration {
            local: true,
            ..SendMigration::default()
        };
        assert_eq!(local.validate(), Ok(()));
        let send = |change: fn(&mut SendMigration)| {
            let mut both = local.clone();
            change(&mut both);
            both.validate()
        };
        let check = |local, post_copy| {
            let question = CheckMigration {
                local,
                post_copy,
                ..CheckMigration::default()
            };
            question.validate()
        };
        for both in [
            send(|both| both.post_copy = true),
            send(|both| both.timeout_strategy = TimeoutStrategy::PostCopy),
            check(true, true),
        ] {
            let error = both.expect_err("refused");
            assert_eq!(error.status(), 400);
            assert!(error.to_string().contains("leave post_copy out, or local"), "{error}");
        }
        assert_eq!((check(true, false), check(false, true)), (Ok(()), Ok(())));
    }
}
