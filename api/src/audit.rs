//! One record for each call that changes something, or tried to: who, what, when, with what result.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

use crate::server::Peer;
use crate::{Request, VmConfig};

/// Devices of a kind that a record names.
const NAMED: usize = 8;
/// Characters of a path or an error's text in a record.
const TEXT: usize = 400;

/// A call that changed something, or tried to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AuditRecord {
    /// When it came: RFC 3339, UTC, with microseconds.
    pub time: String,
    /// User of the caller (SO_PEERCRED, when it connected).
    pub uid: u32,
    /// Group of the caller.
    pub gid: u32,
    /// Process of the caller; 0 if this process cannot see it.
    pub pid: u32,
    /// What was asked for, as `vm.boot`.
    pub request: String,
    /// The main parameters of it, if it has any; no command line of a kernel, which may have secrets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Value>,
    /// The HTTP status that was answered.
    pub status: u16,
    /// Why it was refused or failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Microseconds until the answer.
    pub duration_us: u64,
}

impl AuditRecord {
    /// The record as one line of JSON, in ASCII and without a newline.
    pub fn to_json(&self) -> String {
        // Text and numbers always serialise.
        let text = serde_json::to_string(self).unwrap_or_default();
        String::from_utf8_lossy(&crate::server::ascii(text)).into_owned()
    }
}

/// Takes records, without waiting for anything.
pub trait AuditSink: Send + Sync {
    /// Takes one record.
    fn record(&self, record: &AuditRecord);
}

/// Takes no records.
pub struct NoAudit;

impl AuditSink for NoAudit {
    fn record(&self, _record: &AuditRecord) {}
}

/// What a record tells of a request's parameters, if it has any.
fn parameters(request: &Request) -> Option<Value> {
    let mut value = match request {
        Request::Create(config) => of_config(config),
        Request::Resize(target) => json!({ "vcpus": target.desired_vcpus, "memory": target.desired_ram }),
        Request::ResizeZone(target) => json!({ "id": cut(&target.id), "memory": target.desired_ram }),
        Request::ResizeDisk(target) => json!({ "id": cut(&target.id), "size": target.desired_size }),
        Request::AddDisk(disk) => json!({ "id": disk.id.as_deref().map(cut), "path": disk.path.as_deref().map(path) }),
        Request::AddNet(net, fds) => {
            json!({ "id": net.id.as_deref().map(cut), "tap": net.tap.as_deref().map(cut), "descriptors": fds.len() })
        }
        Request::AddFs(fs) => {
            json!({ "id": fs.id.as_deref().map(cut), "tag": cut(&fs.tag), "socket": path(&fs.socket) })
        }
        Request::AddGenericVhostUser(device) => json!({
            "id": device.id.as_deref().map(cut), "device_type": device.device_type, "socket": path(&device.socket),
        }),
        Request::AddVsock(vsock) => json!({ "cid": vsock.cid, "socket": path(&vsock.socket) }),
        Request::AddDevice(device, fds) => json!({
            "id": device.id.as_deref().map(cut), "path": device.path.as_deref().map(path),
            "descriptors": Some(fds.len()).filter(|count| *count > 0),
        }),
        Request::RemoveDevice(device) => json!({ "id": cut(&device.id), "force": device.force.then_some(true) }),
        Request::Snapshot(snapshot) => json!({ "to": cut(&snapshot.destination_url) }),
        Request::Restore(restore, fds) => json!({ "from": cut(&restore.source_url), "descriptors": fds.len() }),
        Request::SendMigration(send) => json!({ "to": cut(&send.destination_url) }),
        Request::CheckMigration(check) => json!({ "to": cut(&check.destination_url) }),
        Request::ReceiveMigration(receive, fds) => {
            json!({ "from": cut(&receive.receiver_url), "descriptors": fds.len() })
        }
        Request::SetMigration(set) => json!({ "bandwidth": set.bandwidth }),
        _ => return None,
    };
    if let Some(fields) = value.as_object_mut() {
        fields.retain(|_, value| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty()));
    }
    Some(value)
}

fn of_config(config: &VmConfig) -> Value {
    let payload = config.payload.as_ref();
    let boots = payload.and_then(|payload| payload.kernel.as_deref().or(payload.firmware.as_deref()));
    let disks = config.disks.iter().flatten().filter_map(|disk| disk.path.as_deref());
    let taps = config.net.iter().flatten().filter_map(|net| net.tap.as_deref());
    let devices = config
        .devices
        .iter()
        .flatten()
        .filter_map(|device| device.path.as_deref());
    json!({
        "vcpus": config.cpus.boot_vcpus,
        "memory": config.memory.boot_size(),
        "boots": boots.map(path),
        "disks": disks.take(NAMED).map(path).collect::<Vec<_>>(),
        "devices": devices.take(NAMED).map(path).collect::<Vec<_>>(),
        "taps": taps.take(NAMED).map(cut).collect::<Vec<_>>(),
    })
}

fn path(path: &Path) -> String {
    cut(&path.to_string_lossy())
}

/// `text`, or its beginning.
fn cut(text: &str) -> String {
    text.chars().take(TEXT).collect()
}

/// A call that is being carried out, for its record.
#[derive(Debug)]
pub(crate) struct Audited {
    began: std::time::Instant,
    record: AuditRecord,
}

impl Audited {
    /// A call of `name`, which came now. `request` is what it asks for, if it was understood.
    pub(crate) fn new(peer: Peer, name: &str, request: Option<&Request>) -> Self {
        Self {
            began: std::time::Instant::now(),
            record: AuditRecord {
                time: rfc3339(SystemTime::now()),
                uid: peer.uid,
                gid: peer.gid,
                pid: peer.pid,
                request: name.to_owned(),
                parameters: request.and_then(parameters),
                status: 0,
                error: None,
                duration_us: 0,
            },
        }
    }

    /// The call was answered: makes the record known, to `sink` and as a line of the log.
    pub(crate) fn answered(mut self, status: u16, error: Option<&str>, sink: &dyn AuditSink) {
        let record = &mut self.record;
        record.status = status;
        record.error = error.map(cut);
        record.duration_us = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let AuditRecord {
            uid,
            gid,
            pid,
            request,
            duration_us,
            ..
        } = &*record;
        tracing::info!(uid, gid, pid, request, status, error, duration_us, "call");
        sink.record(record);
    }
}

/// A point in time as RFC 3339 writes it, in UTC with microseconds. What is before 1970 is shown as its beginning.
pub fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_micros(time.max(UNIX_EPOCH)).to_string()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Duration;

    use super::*;
    use crate::{DiskConfig, PayloadConfig};

    #[test]
    fn times_are_written_as_the_calendar_has_them() {
        let at = |secs, micros| rfc3339(UNIX_EPOCH + Duration::from_secs(secs) + Duration::from_micros(micros));
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(at(951_782_399, 1), "2000-02-28T23:59:59.000001Z");
        assert_eq!(at(951_782_400, 0), "2000-02-29T00:00:00.000000Z");
        assert_eq!(at(1_234_567_890, 999_999), "2009-02-13T23:31:30.999999Z");
        assert_eq!(at(4_107_542_399, 0), "2100-02-28T23:59:59.000000Z");
        assert_eq!(at(4_107_542_400, 0), "2100-03-01T00:00:00.000000Z");
        assert_eq!(rfc3339(UNIX_EPOCH - Duration::from_secs(1)), at(0, 0));
    }

    #[derive(Default)]
    struct Kept(Mutex<Vec<String>>);

    impl AuditSink for Kept {
        fn record(&self, record: &AuditRecord) {
            self.0.lock().expect("lock").push(record.to_json());
        }
    }

    #[test]
    fn a_record_tells_who_and_what_but_no_secret() {
        let payload = PayloadConfig {
            kernel: Some("/Größe".into()),
            cmdline: Some("password=geheim".into()),
            ..PayloadConfig::default()
        };
        let disk = |n: u32| DiskConfig {
            path: Some(format!("/disk{n}").into()),
            ..DiskConfig::default()
        };
        let config = VmConfig {
            payload: Some(payload),
            disks: Some((0..200).map(disk).collect()),
            ..VmConfig::default()
        };
        let (sink, peer) = (Kept::default(), Peer { pid: 3, uid: 1, gid: 2 });
        let request = Request::Create(Box::new(config));
        Audited::new(peer, "vm.create", Some(&request)).answered(409, Some("there is\na VM"), &sink);
        Audited::new(peer, "vm.boot", Some(&Request::Boot)).answered(204, None, &sink);
        let lines = sink.0.into_inner().expect("lock");
        assert!(
            lines
                .iter()
                .all(|line| line.is_ascii() && !line.contains('\n') && !line.contains("geheim"))
        );
        let value: serde_json::Value = serde_json::from_str(&lines[0]).expect("JSON");
        assert_eq!(
            (&value["uid"], &value["gid"], &value["pid"]),
            (&1.into(), &2.into(), &3.into())
        );
        assert_eq!(
            (&value["request"], &value["status"]),
            (&"vm.create".into(), &409.into())
        );
        assert_eq!(value["error"], "there is\na VM");
        assert_eq!(value["parameters"]["boots"], "/Größe");
        assert_eq!(value["parameters"]["disks"].as_array().map(Vec::len), Some(NAMED));
        let value: serde_json::Value = serde_json::from_str(&lines[1]).expect("JSON");
        assert!(value.get("error").is_none() && value.get("parameters").is_none());
    }
}
