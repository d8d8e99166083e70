//! Devices that other processes serve over vhost-user.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::validate::{ConfigError, DISK_QUEUE_SIZES, NET_QUEUE_SIZES, range, validate_queues};
use crate::{DataPath, DiskConfig, NetConfig, VmConfig};

/// Bytes of a tag (virtio 1.2, 5.11.4).
const TAG: usize = 36;
/// The greatest number of a device type that a PCI device id can tell (virtio 1.2, 4.1.2).
const MAX_TYPE: u32 = 63;
/// Queues of a file system: the one for urgent requests is beside them.
const MAX_FS_QUEUES: u16 = 255;
/// Queues of any device.
const MAX_QUEUES: usize = 256;

/// What a device does whose daemon is gone; written `stall` or `error-after=SECONDS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum OnDisconnect {
    /// Its requests wait until a daemon is back.
    #[default]
    Stall,
    /// They wait for so many seconds, then they fail until a daemon is back.
    ErrorAfter(u32),
}

impl OnDisconnect {
    /// Whether it is the default.
    pub fn is_stall(&self) -> bool {
        *self == Self::Stall
    }
}

impl fmt::Display for OnDisconnect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stall => f.write_str("stall"),
            Self::ErrorAfter(seconds) => write!(f, "error-after={seconds}"),
        }
    }
}

impl FromStr for OnDisconnect {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "stall" {
            return Ok(Self::Stall);
        }
        let seconds = text.strip_prefix("error-after=").and_then(|n| n.parse().ok());
        let failed = || format!("'{text}' says not what to do without a daemon; write stall or error-after=SECONDS");
        seconds.map(Self::ErrorAfter).ok_or_else(failed)
    }
}

#[cfg(feature = "openapi")]
impl schemars::JsonSchema for OnDisconnect {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "OnDisconnect".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "What a device does whose daemon is gone.",
            "pattern": "^(stall|error-after=[0-9]+)$",
        })
    }
}

impl TryFrom<String> for OnDisconnect {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<OnDisconnect> for String {
    fn from(policy: OnDisconnect) -> Self {
        policy.to_string()
    }
}

/// Which side makes the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum VhostMode {
    /// The daemon listens, the VMM connects.
    #[default]
    Client,
    /// The VMM listens, the daemon connects.
    Server,
}

impl VhostMode {
    /// Whether it is the default.
    pub fn is_client(&self) -> bool {
        *self == Self::Client
    }
}

/// A file system that a daemon shares with the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct FsConfig {
    /// What the guest mounts it by: at most 36 bytes.
    #[cfg_attr(feature = "openapi", schemars(length(min = 1, max = 36)))]
    pub tag: String,
    /// Unix socket the daemon listens on.
    #[cfg_attr(feature = "openapi", schemars(length(min = 1)))]
    pub socket: PathBuf,
    /// Queues for requests; there is one more for urgent ones.
    #[serde(default = "one")]
    #[cfg_attr(feature = "openapi", schemars(range(min = 1, max = 255)))]
    pub num_queues: u16,
    /// Descriptors of a queue: a power of two.
    #[serde(default = "fs_queue_size")]
    #[cfg_attr(feature = "openapi", schemars(range(min = 4, max = 1024), extend("enum" = crate::config::powers_of_two(4, 1024))))]
    pub queue_size: u16,
    /// What happens to requests while there is no daemon.
    #[serde(default, skip_serializing_if = "OnDisconnect::is_stall")]
    pub on_disconnect: OnDisconnect,
    /// Who works on the guest's rings.
    #[serde(default, skip_serializing_if = "DataPath::is_auto")]
    pub datapath: DataPath,
    /// Name in the API; `_fs2` and so on when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(regex(pattern = "^(_?[^_]|_$)")))]
    pub id: Option<String>,
}

impl FsConfig {
    /// A file system with as many queues as one has that says nothing of them.
    pub fn new(tag: impl Into<String>, socket: impl Into<PathBuf>) -> Self {
        Self {
            tag: tag.into(),
            socket: socket.into(),
            num_queues: one(),
            queue_size: fs_queue_size(),
            on_disconnect: OnDisconnect::Stall,
            datapath: DataPath::Auto,
            id: None,
        }
    }
}

fn one() -> u16 {
    1
}

fn fs_queue_size() -> u16 {
    1024
}

/// A device of any type that a daemon serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct GenericVhostUserConfig {
    /// Number of its type, as virtio has them.
    #[serde(alias = "virtio_id")]
    #[cfg_attr(feature = "openapi", schemars(range(min = 1, max = 63)))]
    pub device_type: u32,
    /// Unix socket the daemon listens on.
    #[cfg_attr(feature = "openapi", schemars(length(min = 1)))]
    pub socket: PathBuf,
    /// Descriptors of each of its queues: powers of two.
    #[cfg_attr(feature = "openapi", schemars(schema_with = "queue_sizes"))]
    pub queue_sizes: Vec<u16>,
    /// Who works on the guest's rings.
    #[serde(default, skip_serializing_if = "DataPath::is_auto")]
    pub datapath: DataPath,
    /// Name in the API; `_generic_vhost_user3` and so on when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(regex(pattern = "^(_?[^_]|_$)")))]
    pub id: Option<String>,
}

#[cfg(feature = "openapi")]
fn queue_sizes(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_QUEUES,
        "items": {
            "type": "integer", "format": "uint16", "minimum": 2, "maximum": 32768,
            "enum": crate::config::powers_of_two(2, 32768),
        },
    })
}

/// Names that stand for numbers of device types (virtio 1.2, 5).
const TYPES: [(&str, u32); 16] = [
    ("net", 1),
    ("block", 2),
    ("console", 3),
    ("rng", 4),
    ("balloon", 5),
    ("scsi", 8),
    ("9p", 9),
    ("gpu", 16),
    ("input", 18),
    ("vsock", 19),
    ("crypto", 20),
    ("iommu", 23),
    ("sound", 25),
    ("fs", 26),
    ("i2c", 34),
    ("gpio", 41),
];

/// The number of a device type: a number or a name.
pub(crate) fn device_type(text: &str) -> Result<u32, String> {
    let named = TYPES.iter().find(|(name, _)| *name == text);
    match named {
        Some((_, number)) => Ok(*number),
        None => text.parse().map_err(|_| {
            let names: Vec<_> = TYPES.iter().map(|(name, _)| *name).collect();
            format!(
                "'{text}' is no type of device; write its number or one of {}",
                names.join(", ")
            )
        }),
    }
}

impl VmConfig {
    /// The sockets of daemons, with the fields they stand in.
    fn sockets(&self) -> Vec<(String, &Path)> {
        let disks = list("disks", "vhost_socket", &self.disks, |disk| {
            disk.vhost_socket.as_deref()
        });
        let nets = list("net", "vhost_socket", &self.net, |net| net.vhost_socket.as_deref());
        let fs = list("fs", "socket", &self.fs, |fs| Some(&fs.socket));
        let others = list("generic_vhost_user", "socket", &self.generic_vhost_user, |device| {
            Some(&device.socket)
        });
        disks.chain(nets).chain(fs).chain(others).collect()
    }

    /// Whether other processes must be able to map its memory: they serve devices.
    pub fn needs_shared_memory(&self) -> bool {
        let disks = self.disks.iter().flatten().any(DiskConfig::has_daemon);
        let nets = self.net.iter().flatten().any(NetConfig::has_daemon);
        let fs = self.fs.iter().flatten().next().is_some();
        disks || nets || fs || self.generic_vhost_user.iter().flatten().next().is_some()
    }

    /// Checks what only devices of daemons have.
    pub(crate) fn validate_served(&self) -> Result<(), ConfigError> {
        for (i, fs) in self.fs.iter().flatten().enumerate() {
            validate_fs(&format!("fs[{i}]"), fs)?;
        }
        for (i, device) in self.generic_vhost_user.iter().flatten().enumerate() {
            validate_generic(&format!("generic_vhost_user[{i}]"), device)?;
        }
        let mut before: Vec<&Path> = Vec::new();
        for (field, socket) in self.sockets() {
            if before.contains(&socket) {
                return Err(ConfigError::Conflict(format!(
                    "{field} is {}, which another device has; give each its own",
                    socket.display()
                )));
            }
            before.push(socket);
        }
        let tags = self.fs.iter().flatten().map(|fs| &fs.tag);
        let mut seen: Vec<&String> = Vec::new();
        for tag in tags {
            if seen.contains(&tag) {
                return Err(ConfigError::Conflict(format!(
                    "two file systems have the tag '{tag}'; give each its own"
                )));
            }
            seen.push(tag);
        }
        Ok(())
    }
}

/// The sockets in a list of devices, with the fields they stand in.
fn list<'a, T: 'a>(
    name: &'a str,
    field: &'a str,
    devices: &'a Option<Vec<T>>,
    socket: impl Fn(&'a T) -> Option<&'a Path> + 'a,
) -> impl Iterator<Item = (String, &'a Path)> {
    let devices = devices.iter().flatten().enumerate();
    devices.filter_map(move |(i, device)| Some((format!("{name}[{i}].{field}"), socket(device)?)))
}

fn missing(field: String) -> ConfigError {
    ConfigError::Missing(format!("{field} is missing; give the socket its daemon listens on"))
}

/// What its daemon decides is not for the VMM to set.
fn refuse_given(field: &str, given: &[(&str, bool)]) -> Result<(), ConfigError> {
    match given.iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(ConfigError::Conflict(format!(
            "{field}.{name} cannot be had with {field}.vhost_user; it is set where the daemon is started"
        ))),
        None => Ok(()),
    }
}

/// A disk with `vhost_user`.
pub(crate) fn validate_disk(field: &str, disk: &DiskConfig) -> Result<(), ConfigError> {
    if disk.vhost_socket.as_ref().is_none_or(|p| p.as_os_str().is_empty()) {
        return Err(missing(format!("{field}.vhost_socket")));
    }
    let given = [
        ("backend", !disk.backend.is_vmm()),
        ("path", disk.path.is_some()),
        ("serial", disk.serial.is_some()),
        ("direct", disk.direct),
        ("disable_io_uring", disk.disable_io_uring),
    ];
    refuse_given(field, &given)?;
    validate_queues(field, disk.num_queues, disk.queue_size, &DISK_QUEUE_SIZES)
}

/// What an interface has of `vhost_user`, or lacks.
pub(crate) fn validate_net(field: &str, net: &NetConfig) -> Result<(), ConfigError> {
    if !net.backend.is_vmm() {
        return validate_switched(field, net);
    }
    if !net.vhost_user {
        let plain = net.on_disconnect.is_stall() && net.datapath.is_auto();
        if net.vhost_socket.is_some() || !net.vhost_mode.is_client() || !plain {
            return Err(ConfigError::Conflict(format!(
                "{field}.vhost_socket, {field}.vhost_mode, {field}.on_disconnect and {field}.datapath need {field}.vhost_user switched on"
            )));
        }
        return Ok(());
    }
    if net.vhost_socket.as_ref().is_none_or(|p| p.as_os_str().is_empty()) {
        return Err(missing(format!("{field}.vhost_socket")));
    }
    let given = [
        ("tap", net.tap.is_some()),
        ("ip", net.ip.is_some()),
        ("mask", net.mask.is_some()),
        ("host_mac", net.host_mac.is_some()),
        ("fds", net.fds.is_some()),
    ];
    refuse_given(field, &given)
}

/// An interface with `backend`.
fn validate_switched(field: &str, net: &NetConfig) -> Result<(), ConfigError> {
    if net.tap.as_ref().is_none_or(String::is_empty) {
        return Err(ConfigError::Missing(format!(
            "{field}.tap is missing, and {field}.backend=netd needs to know its tap; give its name"
        )));
    }
    let given = [
        ("vhost_user", net.vhost_user),
        ("vhost_socket", net.vhost_socket.is_some()),
        ("vhost_mode", !net.vhost_mode.is_client()),
        ("ip", net.ip.is_some()),
        ("mask", net.mask.is_some()),
        ("host_mac", net.host_mac.is_some()),
        ("fds", net.fds.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(ConfigError::Conflict(format!(
            "{field}.{name} cannot be had with {field}.backend=netd; leave one of them out"
        ))),
        None => Ok(()),
    }
}

fn validate_fs(field: &str, fs: &FsConfig) -> Result<(), ConfigError> {
    if fs.tag.is_empty() || fs.tag.len() > TAG || fs.tag.contains('\0') {
        let value = format!("'{}'", fs.tag.escape_debug());
        return Err(range(
            format!("{field}.tag"),
            value,
            "1 to 36 bytes long, none of them zero",
        ));
    }
    if fs.socket.as_os_str().is_empty() {
        return Err(missing(format!("{field}.socket")));
    }
    if fs.num_queues > MAX_FS_QUEUES {
        let allowed = format!("between 1 and {MAX_FS_QUEUES}");
        return Err(range(format!("{field}.num_queues"), fs.num_queues, allowed));
    }
    validate_queues(field, fs.num_queues, fs.queue_size, &DISK_QUEUE_SIZES)
}

fn validate_generic(field: &str, device: &GenericVhostUserConfig) -> Result<(), ConfigError> {
    if !(1..=MAX_TYPE).contains(&device.device_type) {
        let allowed = format!("between 1 and {MAX_TYPE}");
        return Err(range(format!("{field}.device_type"), device.device_type, allowed));
    }
    if device.socket.as_os_str().is_empty() {
        return Err(missing(format!("{field}.socket")));
    }
    if !(1..=MAX_QUEUES).contains(&device.queue_sizes.len()) {
        let value = format!("a list of {}", device.queue_sizes.len());
        return Err(range(
            format!("{field}.queue_sizes"),
            value,
            format!("one of 1 to {MAX_QUEUES} sizes"),
        ));
    }
    for (i, size) in device.queue_sizes.iter().enumerate() {
        if !size.is_power_of_two() || !NET_QUEUE_SIZES.contains(size) {
            let allowed = format!(
                "a power of two between {} and {}",
                NET_QUEUE_SIZES.start(),
                NET_QUEUE_SIZES.end()
            );
            return Err(range(format!("{field}.queue_sizes[{i}]"), size, allowed));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(edit: impl Fn(&mut VmConfig)) -> String {
        let mut config = VmConfig::default();
        edit(&mut config);
        config.validate_served().expect_err("refused").to_string()
    }

    fn fs(edit: impl Fn(&mut FsConfig)) -> FsConfig {
        let mut fs = FsConfig::new("tag", "/s");
        edit(&mut fs);
        fs
    }

    fn generic(queue_sizes: &[u16]) -> GenericVhostUserConfig {
        GenericVhostUserConfig {
            device_type: 26,
            socket: "/s".into(),
            queue_sizes: queue_sizes.to_vec(),
            datapath: DataPath::Auto,
            id: None,
        }
    }

    #[test]
    fn refusals_name_field_value_and_fix() {
        let one = |fs: FsConfig| refusal(|c| c.fs = Some(vec![fs.clone()]));
        assert_eq!(
            one(fs(|f| f.tag.clear())),
            "fs[0].tag is ''; it must be 1 to 36 bytes long, none of them zero"
        );
        assert!(one(fs(|f| f.tag = "x".repeat(37))).contains("1 to 36 bytes"));
        assert!(one(fs(|f| f.socket.clear())).contains("fs[0].socket is missing"));
        assert!(one(fs(|f| f.num_queues = 256)).contains("between 1 and 255"));
        assert!(one(fs(|f| f.queue_size = 1000)).contains("power of two"));
        let one = |device: GenericVhostUserConfig| refusal(|c| c.generic_vhost_user = Some(vec![device.clone()]));
        assert!(one(generic(&[])).contains("a list of 0"));
        assert!(one(generic(&[64, 3])).contains("queue_sizes[1] is 3"));
        let mut unknown = generic(&[64]);
        unknown.device_type = 64;
        assert!(one(unknown).contains("device_type is 64; it must be between 1 and 63"));
    }

    #[test]
    fn no_two_devices_share_a_daemon_or_a_tag() {
        let text = refusal(|c| {
            c.fs = Some(vec![fs(|_| ())]);
            c.generic_vhost_user = Some(vec![generic(&[64])]);
        });
        assert_eq!(
            text,
            "generic_vhost_user[0].socket is /s, which another device has; give each its own"
        );
        let text = refusal(|c| c.fs = Some(vec![fs(|_| ()), fs(|f| f.socket = "/t".into())]));
        assert_eq!(text, "two file systems have the tag 'tag'; give each its own");
    }

    #[test]
    fn interfaces_have_a_tap_or_a_daemon() {
        let refusal = |edit: fn(&mut NetConfig)| {
            let mut net = NetConfig {
                vhost_user: true,
                vhost_socket: Some("/s".into()),
                ..NetConfig::default()
            };
            edit(&mut net);
            validate_net("net[0]", &net).expect_err("refused").to_string()
        };
        assert!(refusal(|n| n.tap = Some("tap0".into())).contains("net[0].tap cannot be had with net[0].vhost_user"));
        assert!(refusal(|n| n.vhost_socket = None).contains("net[0].vhost_socket is missing"));
        let idle = |n: &mut NetConfig| (n.vhost_user, n.vhost_socket, n.vhost_mode) = (false, None, VhostMode::Server);
        assert!(refusal(idle).contains("vhost_mode, net[0].on_disconnect and net[0].datapath need"));
        assert!(refusal(|n| n.vhost_user = false).contains("need net[0].vhost_user switched on"));
    }

    #[test]
    fn types_have_names_and_numbers() {
        assert_eq!((device_type("fs"), device_type("41")), (Ok(26), Ok(41)));
        assert!(device_type("fan").expect_err("refused").contains("one of net, block"));
    }
}
