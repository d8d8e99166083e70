//! Bodies of requests.

use std::collections::BTreeSet;

use serde::de::DeserializeOwned;

use crate::{ApiError, ReadError, read_object};

/// Unknown fields that are remembered as logged.
const MAX_LOGGED: usize = 100;
/// Characters of a field's name that are logged.
const MAX_NAME: usize = 100;

/// Reads bodies and remembers which fields it ignored.
#[derive(Debug, Default)]
pub(super) struct Reader {
    logged: BTreeSet<String>,
}

impl Reader {
    /// Reads the body of a call of the route `name`.
    pub(super) fn read<T: DeserializeOwned>(&mut self, name: &str, body: &[u8]) -> Result<T, ApiError> {
        let (read, ignored) = read_object(body).map_err(|error| {
            let message = match &error {
                ReadError::NotJson(why) => format!("{name}: the body is not JSON: {why}"),
                ReadError::NotAnObject => format!("{name}: the body is not a JSON object"),
                ReadError::Object(_) | ReadError::Field { .. } | ReadError::Unsupported(_) => {
                    format!("{name}: {error}")
                }
            };
            match error {
                ReadError::Unsupported(_) => ApiError::Unsupported(message),
                _ => ApiError::BadRequest(message),
            }
        })?;
        for field in ignored {
            self.log(name, field);
        }
        Ok(read)
    }

    fn log(&mut self, name: &str, field: String) {
        if self.logged.len() < MAX_LOGGED && !self.logged.contains(&field) {
            let start: String = field.chars().take(MAX_NAME).collect();
            tracing::info!(field = ?start, "{name}: ignored");
            self.logged.insert(field);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{RemoveDevice, VmConfig};

    fn read(body: &str) -> Result<VmConfig, ApiError> {
        Reader::default().read("vm.create", body.as_bytes())
    }

    fn error(body: &str) -> (u16, String) {
        let error = read(body).expect_err("an error");
        (error.status(), error.to_string())
    }

    /// What Kata sends for a small guest, by the names and values of its fields.
    const KATA: &str = r#"{
        "cpus": {"boot_vcpus": 1, "max_vcpus": 4, "topology": {"threads_per_core":1,"cores_per_die":4,"dies_per_package":1,"packages":1}, "nested": false},
        "memory": {"size": 268435456, "shared": true, "hugepages": false, "hotplug_size": 1073741824, "prefault": false, "mergeable": false},
        "payload": {"kernel": "/k", "cmdline": "console=hvc0", "initramfs": "/i"},
        "platform": {"num_pci_segments": 1, "iommu_segments": []},
        "disks": [{"path": "/d", "readonly": true, "image_type": "Raw", "direct": false, "num_queues": 1, "queue_size": 1024, "iommu": false}],
        "fs": null, "devices": [],
        "vsock": {"cid": 3, "socket": "/s", "iommu": false},
        "rng": {"src": "/dev/urandom", "iommu": false},
        "serial": {"mode": "Off"}, "console": {"mode": "Off", "iommu": false},
        "net": [{"fds": [5, 6], "num_queues": 2}]
    }"#;

    #[test]
    fn what_agents_send_is_understood() {
        let config = read(KATA).expect("a configuration");
        assert_eq!(config.cpus.max_vcpus, 4);
        assert_eq!(config.memory.size, 256 << 20);
        assert_eq!(config.vsock.expect("vsock").cid, 3);
        assert_eq!(config.disks.expect("disks")[0].queue_size, 1024);
    }

    #[test]
    fn what_the_guest_would_miss_is_refused() {
        for (body, name) in [
            (r#"{"pmem": [{"file": "a"}]}"#, "pmem"),
            (r#"{"pvpanic": {"size": 0, "deep": true}}"#, "pvpanic"),
            (
                r#"{"vsock": {"cid": 3, "socket": "s", "vhost_user": true}}"#,
                "vsock.vhost_user",
            ),
            (r#"{"console": {"mode": "Pty", "iommu": true}}"#, "console.iommu"),
            (
                r#"{"devices": [{"path": "/d", "pci_segment": 1}]}"#,
                "devices.pci_segment",
            ),
        ] {
            let (status, text) = error(body);
            assert_eq!(status, 501, "{text}");
            assert!(text.contains(&format!("support {name};")), "{text}");
        }
    }

    #[test]
    fn unknown_fields_are_ignored_and_remembered_once() {
        let mut reader = Reader::default();
        for _ in 0..3 {
            reader
                .read::<VmConfig>(
                    "vm.create",
                    br#"{"future": {"a": 1}, "disks": [{"colour": 1}, {"colour": 2}]}"#,
                )
                .expect("a configuration");
        }
        let names: Vec<_> = reader.logged.iter().map(String::as_str).collect();
        assert_eq!(names, ["disks.colour", "future"]);
        for i in 0..1000 {
            reader
                .read::<VmConfig>("vm.create", format!("{{\"f{i}\": 1}}").as_bytes())
                .expect("a configuration");
        }
        assert_eq!(reader.logged.len(), MAX_LOGGED);
    }

    #[test]
    fn errors_name_the_field() {
        let (status, text) = error(r#"{"disks": [{}, {"num_queues": "many"}]}"#);
        assert_eq!(status, 400);
        assert!(text.contains("disks[1].num_queues: invalid type: string"), "{text}");
        let missing = Reader::default().read::<RemoveDevice>("vm.remove-device", b"{}");
        let missing = missing.expect_err("no id").to_string();
        assert_eq!(missing, "vm.remove-device: missing field `id`");
        assert!(error(r#"{"serial": {"mode": "Loud"}}"#).1.contains("serial.mode"));
        for body in ["", "{", "[]", "7", "\"a\"", "{\"a\":1}x", &"[".repeat(100_000)] {
            assert_eq!(error(body).0, 400, "{body:.20}");
        }
    }

    proptest! {
        #[test]
        fn random_bodies_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Reader::default().read::<VmConfig>("vm.create", &body);
        }

        #[test]
        fn a_body_broken_anywhere_never_panics(at in 0..KATA.len(), byte in any::<u8>()) {
            let mut body = KATA.as_bytes().to_vec();
            body[at] = byte;
            let _ = Reader::default().read::<VmConfig>("vm.create", &body);
            let _ = Reader::default().read::<VmConfig>("vm.create", &body[..at]);
        }
    }
}
