//! The configuration of a VM: the body of `vm.create`, and what the command line is turned into.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{
    BalloonConfig, DataPath, DeviceConfig, DiskBackend, FsConfig, GenericVhostUserConfig, HotplugMethod,
    MemoryZoneConfig, NetBackend, NumaConfig, OnDisconnect, PlatformConfig, VhostMode,
};

/// A whole VM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "openapi", schemars(extend("required" = ["payload"])))]
pub struct VmConfig {
    /// Processors.
    pub cpus: CpusConfig,
    /// RAM.
    pub memory: MemoryConfig,
    /// What to boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(with = "PayloadConfig"))]
    pub payload: Option<PayloadConfig>,
    /// Disks, in the order of their slots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskConfig>>,
    /// Network interfaces, in the order of their slots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net: Option<Vec<NetConfig>>,
    /// File systems that daemons share with the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fs: Option<Vec<FsConfig>>,
    /// Other devices that daemons serve.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generic_vhost_user: Option<Vec<GenericVhostUserConfig>>,
    /// Devices of the host that are passed through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<DeviceConfig>>,
    /// Entropy source.
    pub rng: RngConfig,
    /// Serial port.
    pub serial: ConsoleConfig,
    /// virtio console.
    pub console: ConsoleConfig,
    /// Port 0x402, where firmware writes its log (x86).
    pub debug_console: DebugConsoleConfig,
    /// Sockets between guest and host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Memory that the guest lends to the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// NUMA nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa: Option<Vec<NumaConfig>>,
    /// Identity of the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformConfig>,
}

/// What a disk has to have.
#[cfg(feature = "openapi")]
fn file_or_daemon() -> serde_json::Value {
    let text = serde_json::json!({ "type": "string", "minLength": 1 });
    serde_json::json!([
        { "required": ["path"], "properties": { "path": text, "vhost_user": { "const": false } } },
        { "required": ["vhost_user", "vhost_socket"], "properties": { "vhost_user": { "const": true }, "vhost_socket": text } },
    ])
}

/// What a network interface has to have.
#[cfg(feature = "openapi")]
fn tap_or_daemon() -> serde_json::Value {
    let text = serde_json::json!({ "type": "string", "minLength": 1 });
    let nothing = serde_json::json!({ "type": "null" });
    serde_json::json!([
        { "properties": {
            "vhost_user": { "const": false }, "vhost_socket": nothing, "backend": { "const": "vmm" },
            "vhost_mode": { "const": "Client" }, "on_disconnect": { "const": "stall" }, "datapath": { "const": "auto" },
        } },
        { "required": ["backend", "tap"], "properties": {
            "backend": { "const": "netd" }, "tap": text, "vhost_user": { "const": false }, "vhost_socket": nothing,
            "vhost_mode": { "const": "Client" }, "ip": nothing, "mask": nothing, "host_mac": nothing, "fds": nothing,
        } },
        { "required": ["vhost_user", "vhost_socket"], "properties": {
            "vhost_user": { "const": true }, "vhost_socket": text,
            "tap": nothing, "ip": nothing, "mask": nothing, "host_mac": nothing, "fds": nothing,
        } },
    ])
}

#[cfg(feature = "openapi")]
pub(crate) fn powers_of_two(from: u16, to: u16) -> Vec<u16> {
    (0..16)
        .map(|bit| 1 << bit)
        .filter(|size| (from..=to).contains(size))
        .collect()
}

/// Processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct CpusConfig {
    /// vCPUs the guest starts with.
    #[cfg_attr(feature = "openapi", schemars(range(min = 1, max = 254)))]
    pub boot_vcpus: u32,
    /// vCPUs it can have in all.
    #[cfg_attr(feature = "openapi", schemars(range(min = 1, max = 254)))]
    pub max_vcpus: u32,
    /// Their shape; flat when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<CpuTopology>,
    /// Most bits of a guest physical address; what the host has when absent, and never more.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(range(min = 32, max = 64)))]
    pub max_phys_bits: Option<u8>,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
            topology: None,
            max_phys_bits: None,
        }
    }
}

/// Shape of the guest's processor; the product is `max_vcpus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct CpuTopology {
    /// Threads of a core.
    pub threads_per_core: u16,
    /// Cores of a die.
    pub cores_per_die: u16,
    /// Dies of a package.
    pub dies_per_package: u16,
    /// Packages.
    pub packages: u16,
}

/// Size of explicit huge pages in bytes.
pub type HugePageSize = u64;

/// Memory is in one piece, or in zones.
#[cfg(feature = "openapi")]
fn piece_or_zones() -> serde_json::Value {
    let nothing = serde_json::json!({ "enum": [0, null] });
    serde_json::json!([
        { "properties": { "size": { "minimum": 1_048_576 }, "zones": { "enum": [null, []] } } },
        { "required": ["size", "zones"], "properties": {
            "size": { "const": 0 }, "zones": { "type": "array", "minItems": 1, "maxItems": 64 },
            "hugepages": { "const": false }, "hugepage_size": { "type": "null" }, "mergeable": { "const": false },
            "hotplug_size": nothing, "hotplugged_size": nothing,
        } },
    ])
}

/// RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "openapi", schemars(extend("anyOf" = piece_or_zones())))]
pub struct MemoryConfig {
    /// Bytes the guest starts with; 0 with `zones`.
    #[cfg_attr(feature = "openapi", schemars(extend("multipleOf" = 1_048_576)))]
    pub size: u64,
    /// Bytes that may be added while the guest runs. Agents read it back from `vm.info` before they ask for more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// By what they are added.
    pub hotplug_method: HotplugMethod,
    /// Bytes of them that the guest has, or should have, by virtio-mem.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// Other processes may map it (vhost-user devices need that).
    pub shared: bool,
    /// Take it from the host's huge page pool.
    pub hugepages: bool,
    /// Which pool; the host's default when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<HugePageSize>,
    /// Touch every page at start.
    pub prefault: bool,
    /// Let the kernel use transparent huge pages.
    pub thp: bool,
    /// Let the kernel merge equal pages of several guests (KSM).
    pub mergeable: bool,
    /// What it consists of, if not of one piece; `size` is 0 then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zones: Option<Vec<MemoryZoneConfig>>,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            hotplug_size: None,
            hotplug_method: HotplugMethod::Acpi,
            hotplugged_size: None,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: false,
            thp: true,
            mergeable: false,
            zones: None,
        }
    }
}

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "openapi", schemars(extend("anyOf" = [{"required": ["kernel"]}, {"required": ["firmware"]}])))]
pub struct PayloadConfig {
    /// Kernel: a PVH ELF or a bzImage (x86).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Kernel command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Initial RAM file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// Firmware instead of a kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
}

/// Format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum ImageType {
    /// The bytes of the disk as they are.
    #[default]
    Raw,
    /// The client does not say: `Raw`, if the image does not look like another format.
    Unknown,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "openapi", schemars(extend("anyOf" = file_or_daemon())))]
pub struct DiskConfig {
    /// File or block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(length(min = 1)))]
    pub path: Option<PathBuf>,
    /// Format of the image.
    pub image_type: ImageType,
    /// The guest cannot write.
    pub readonly: bool,
    /// Bypass the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Queues, each with a thread of its own.
    #[cfg_attr(feature = "openapi", schemars(range(min = 1, max = 256)))]
    pub num_queues: u16,
    /// Descriptors of a queue: a power of two.
    #[cfg_attr(feature = "openapi", schemars(range(min = 4, max = 1024), extend("enum" = powers_of_two(4, 1024))))]
    pub queue_size: u16,
    /// Serial number, at most 20 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(length(max = 20)))]
    pub serial: Option<String>,
    /// Do not use io_uring even where the host has it.
    pub disable_io_uring: bool,
    /// What serves its file.
    #[serde(skip_serializing_if = "DiskBackend::is_vmm")]
    pub backend: DiskBackend,
    /// A daemon serves it over vhost-user, instead of a file.
    pub vhost_user: bool,
    /// Unix socket where VMM and daemon meet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
    /// Which side makes the connection.
    #[serde(skip_serializing_if = "VhostMode::is_client")]
    pub vhost_mode: VhostMode,
    /// What happens to requests while there is no daemon.
    #[serde(skip_serializing_if = "OnDisconnect::is_stall")]
    pub on_disconnect: OnDisconnect,
    /// Who works on the guest's rings.
    #[serde(skip_serializing_if = "DataPath::is_auto")]
    pub datapath: DataPath,
    /// It is behind the guest's IOMMU.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub iommu: bool,
    /// It is below a PCI Express root port: on a bus of its own.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub root_port: bool,
    /// NUMA node of the guest that it is in, 0 to 7: it has a PCI root of that node above it. Node 0 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(range(max = 7)))]
    pub guest_numa_id: Option<u32>,
    /// Name in the API; `_disk0` and so on when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(regex(pattern = "^(_?[^_]|_$)")))]
    pub id: Option<String>,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            path: None,
            image_type: ImageType::Raw,
            readonly: false,
            direct: false,
            num_queues: 1,
            queue_size: 128,
            serial: None,
            disable_io_uring: false,
            backend: DiskBackend::Vmm,
            vhost_user: false,
            vhost_socket: None,
            vhost_mode: VhostMode::Client,
            on_disconnect: OnDisconnect::Stall,
            datapath: DataPath::Auto,
            iommu: false,
            root_port: false,
            guest_numa_id: None,
            id: None,
        }
    }
}

/// An Ethernet address, written `12:34:56:78:9a:bc`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

#[cfg(feature = "openapi")]
impl schemars::JsonSchema for MacAddress {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "MacAddress".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "A unicast Ethernet address: the first byte is even.",
            "pattern": "^[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}$",
        })
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let failed = || format!("'{text}' is not a MAC address; write six hexadecimal bytes, like 12:34:56:78:9a:bc");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(failed)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| failed())?;
        }
        if parts.next().is_some() {
            return Err(failed());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "openapi", schemars(extend("anyOf" = tap_or_daemon())))]
pub struct NetConfig {
    /// Name of the tap interface; made, and named by the kernel, when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// IPv4 address the tap interface gets on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<std::net::IpAddr>,
    /// Netmask that goes with `ip`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<std::net::IpAddr>,
    /// Address of the guest's interface; a random local one when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// Address of the host's interface.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_mac: Option<MacAddress>,
    /// Largest packet in bytes, without the Ethernet header.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(range(min = 68)))]
    pub mtu: Option<u16>,
    /// Queues: two for each pair of receive and transmit.
    #[cfg_attr(feature = "openapi", schemars(range(min = 2, max = 256), extend("multipleOf" = 2)))]
    pub num_queues: u16,
    /// Descriptors of a queue: a power of two.
    #[cfg_attr(feature = "openapi", schemars(range(min = 2, max = 32768), extend("enum" = powers_of_two(2, 32768))))]
    pub queue_size: u16,
    /// Descriptors of an open tap interface, inherited from whoever started the VMM, one a queue pair.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fds: Option<Vec<i32>>,
    /// What serves its tap.
    #[serde(skip_serializing_if = "NetBackend::is_vmm")]
    pub backend: NetBackend,
    /// A daemon serves it over vhost-user, instead of a tap.
    pub vhost_user: bool,
    /// Unix socket of the daemon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
    /// Which side makes the connection.
    #[serde(skip_serializing_if = "VhostMode::is_client")]
    pub vhost_mode: VhostMode,
    /// What happens while there is no daemon: packets wait, or after a time the link goes down.
    #[serde(skip_serializing_if = "OnDisconnect::is_stall")]
    pub on_disconnect: OnDisconnect,
    /// Who works on the guest's rings.
    #[serde(skip_serializing_if = "DataPath::is_auto")]
    pub datapath: DataPath,
    /// Offer TCP segmentation offload to the guest.
    pub offload_tso: bool,
    /// Offer UDP fragmentation and segmentation offload to the guest.
    pub offload_ufo: bool,
    /// Offer checksum offload to the guest.
    pub offload_csum: bool,
    /// It is behind the guest's IOMMU.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub iommu: bool,
    /// NUMA node of the guest that it is in, 0 to 7: it has a PCI root of that node above it. Node 0 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(range(max = 7)))]
    pub guest_numa_id: Option<u32>,
    /// Name in the API; `_net1` and so on when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(regex(pattern = "^(_?[^_]|_$)")))]
    pub id: Option<String>,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            tap: None,
            ip: None,
            mask: None,
            mac: None,
            host_mac: None,
            mtu: None,
            num_queues: 2,
            queue_size: 256,
            fds: None,
            backend: NetBackend::Vmm,
            vhost_user: false,
            vhost_socket: None,
            vhost_mode: VhostMode::Client,
            on_disconnect: OnDisconnect::Stall,
            datapath: DataPath::Auto,
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
            iommu: false,
            guest_numa_id: None,
            id: None,
        }
    }
}

/// Entropy source of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct RngConfig {
    /// File the bytes come from; `/dev/urandom` stands for the kernel's generator.
    #[cfg_attr(feature = "openapi", schemars(length(min = 1)))]
    pub src: PathBuf,
    /// It is behind the guest's IOMMU.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub iommu: bool,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: "/dev/urandom".into(),
            iommu: false,
        }
    }
}

/// Where a console's bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum ConsoleMode {
    /// There is no such device.
    Off,
    /// The device is there, its output is dropped.
    #[default]
    Null,
    /// A pseudo terminal made for it.
    Pty,
    /// The terminal the VMM was started on.
    Tty,
    /// A file.
    File,
    /// A unix socket others connect to.
    Socket,
}

/// A serial port or virtio console.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct ConsoleConfig {
    /// What it is connected to.
    pub mode: ConsoleMode,
    /// The file; for a pty, in replies, its path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

/// Port 0x402.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct DebugConsoleConfig {
    /// What it is connected to: `Off`, `Null`, `Tty` (standard error) or `File`.
    pub mode: ConsoleMode,
    /// The file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

impl Default for DebugConsoleConfig {
    fn default() -> Self {
        Self {
            mode: ConsoleMode::Off,
            file: None,
        }
    }
}

/// Sockets between guest and host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct VsockConfig {
    /// Context id of the guest: 3 or more.
    #[cfg_attr(feature = "openapi", schemars(range(min = 3, max = 4_294_967_294_u64)))]
    pub cid: u64,
    /// Unix socket on the host: programs connect to it and send `CONNECT PORT`; guests reach `SOCKET_PORT`.
    #[cfg_attr(feature = "openapi", schemars(length(min = 1)))]
    pub socket: PathBuf,
    /// It is behind the guest's IOMMU.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub iommu: bool,
    /// Name in the API; `_vsock3` and so on when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(regex(pattern = "^(_?[^_]|_$)")))]
    pub id: Option<String>,
}
