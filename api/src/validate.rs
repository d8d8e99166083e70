//! Checks that need nothing but the configuration itself.

use std::path::{Path, PathBuf};

use std::ops::RangeInclusive;

use thiserror::Error;

use crate::{ConsoleConfig, ConsoleMode, DebugConsoleConfig, DiskConfig, NetConfig, VmConfig, served};

/// Why a configuration cannot be used: names the field, its value and the fix.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// A number is out of its range.
    #[error("{field} is {value}; it must be {allowed}")]
    Range {
        /// Where the field stands, like `disks[0].num_queues`.
        field: String,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// A field is missing.
    #[error("{0}")]
    Missing(String),
    /// Two things cannot be had together.
    #[error("{0}")]
    Conflict(String),
}

/// vCPUs a guest can have: APIC id 255 is the broadcast.
const MAX_VCPUS: u32 = 254;
/// Queues a disk or pair-wise a network interface can have.
const MAX_QUEUES: u16 = 256;
/// Ring sizes of network interfaces: what virtio allows.
pub(crate) const NET_QUEUE_SIZES: RangeInclusive<u16> = 2..=32768;
/// Ring sizes of disks: a request has three descriptors at least, and the host takes 1024 buffers at once.
pub(crate) const DISK_QUEUE_SIZES: RangeInclusive<u16> = 4..=1024;

/// Ids of devices that every VM has.
const RESERVED_IDS: [&str; 3] = ["_rng", "_console", "_iommu"];

pub(crate) fn range(field: impl Into<String>, value: impl ToString, allowed: impl Into<String>) -> ConfigError {
    ConfigError::Range {
        field: field.into(),
        value: value.to_string(),
        allowed: allowed.into(),
    }
}

impl VmConfig {
    /// The ids of its devices that have one.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        let disks = self.disks.iter().flatten().filter_map(|d| d.id.as_deref());
        let nets = self.net.iter().flatten().filter_map(|n| n.id.as_deref());
        let fs = self.fs.iter().flatten().filter_map(|f| f.id.as_deref());
        let others = self.generic_vhost_user.iter().flatten();
        let others = others.filter_map(|device| device.id.as_deref());
        let devices = self.devices.iter().flatten().filter_map(|d| d.id.as_deref());
        let others = others.chain(devices);
        let vsock = self.vsock.iter().filter_map(|v| v.id.as_deref());
        let balloon = self.balloon.iter().filter_map(|b| b.id.as_deref());
        disks.chain(nets).chain(fs).chain(others).chain(vsock).chain(balloon)
    }

    /// Whether the VMM has to start daemons for it.
    pub fn needs_daemons(&self) -> bool {
        let disks = self.disks.iter().flatten().any(|disk| !disk.backend.is_vmm());
        let nets = self.net.iter().flatten().any(|net| !net.backend.is_vmm());
        disks || nets
    }

    /// Checks every value; the first error is returned.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_cpus()?;
        self.validate_memory()?;
        self.validate_numa()?;
        self.validate_pci_nodes()?;
        let payload = self.payload.as_ref();
        if payload.is_none_or(|p| p.kernel.is_none() && p.firmware.is_none()) {
            return Err(ConfigError::Missing(
                "payload.kernel is missing, so there is nothing to boot; give the path of a kernel".into(),
            ));
        }
        self.validate_disks()?;
        for (i, net) in self.net.iter().flatten().enumerate() {
            validate_net(i, net)?;
        }
        self.validate_served()?;
        self.validate_devices()?;
        self.validate_iommu()?;
        self.validate_consoles()?;
        if let Some(vsock) = &self.vsock {
            if !(3..u64::from(u32::MAX)).contains(&vsock.cid) {
                return Err(range("vsock.cid", vsock.cid, "between 3 and 4294967294"));
            }
            if vsock.socket.as_os_str().is_empty() {
                return Err(ConfigError::Missing(
                    "vsock.socket is empty; give the path of a unix socket".into(),
                ));
            }
        }
        if self.rng.src.as_os_str().is_empty() {
            return Err(ConfigError::Missing("rng.src is empty; give /dev/urandom".into()));
        }
        if let Some(balloon) = &self.balloon {
            balloon.validate(self.memory.boot_size())?;
        }
        self.validate_ids()
    }

    fn validate_cpus(&self) -> Result<(), ConfigError> {
        let cpus = &self.cpus;
        if !(1..=MAX_VCPUS).contains(&cpus.boot_vcpus) {
            return Err(range(
                "cpus.boot_vcpus",
                cpus.boot_vcpus,
                format!("between 1 and {MAX_VCPUS}"),
            ));
        }
        if !(cpus.boot_vcpus..=MAX_VCPUS).contains(&cpus.max_vcpus) {
            let allowed = format!("between boot_vcpus ({}) and {MAX_VCPUS}", cpus.boot_vcpus);
            return Err(range("cpus.max_vcpus", cpus.max_vcpus, allowed));
        }
        if let Some(bits) = cpus.max_phys_bits.filter(|bits| !(32..=64).contains(bits)) {
            return Err(range("cpus.max_phys_bits", bits, "between 32 and 64"));
        }
        Ok(())
    }

    fn validate_memory(&self) -> Result<(), ConfigError> {
        const MIB: u64 = 1 << 20;
        let memory = &self.memory;
        if memory.zones().is_empty() && (memory.size == 0 || !memory.size.is_multiple_of(MIB)) {
            return Err(range(
                "memory.size",
                format!("{} bytes", memory.size),
                "a whole number of MiB, at least 1",
            ));
        }
        if memory.hugepage_size.is_some() && !memory.hugepages {
            return Err(ConfigError::Conflict(
                "memory.hugepage_size needs memory.hugepages switched on".into(),
            ));
        }
        if memory.any_mergeable() && self.needs_shared_memory() {
            return Err(ConfigError::Conflict(
                "memory.mergeable works on private pages only, and vhost-user devices share them; switch it off".into(),
            ));
        }
        memory.validate_hotplug()?;
        if memory.mergeable && (memory.shared || memory.hugepages) {
            return Err(ConfigError::Conflict(
                "memory.mergeable works on private small pages only; switch memory.shared and memory.hugepages off"
                    .into(),
            ));
        }
        Ok(())
    }

    fn validate_disks(&self) -> Result<(), ConfigError> {
        let mut before: Vec<&DiskConfig> = Vec::new();
        for (i, disk) in self.disks.iter().flatten().enumerate() {
            validate_disk(i, disk)?;
            let same = before.iter().find(|d| d.path == disk.path);
            if let (Some(other), Some(path)) = (same, &disk.path)
                && !(disk.readonly && other.readonly)
            {
                return Err(ConfigError::Conflict(format!(
                    "disks[{i}].path is {}, which another disk has; give each its own, or make both readonly",
                    path.display()
                )));
            }
            before.push(disk);
        }
        Ok(())
    }

    fn validate_consoles(&self) -> Result<(), ConfigError> {
        validate_console("serial", &self.serial)?;
        validate_console("console", &self.console)?;
        validate_debug_console(&self.debug_console)?;
        if self.serial.mode == ConsoleMode::Tty && self.console.mode == ConsoleMode::Tty {
            return Err(ConfigError::Conflict(
                "serial.mode and console.mode want the same terminal; set one of them to Off or Null".into(),
            ));
        }
        let debug = &self.debug_console;
        let paths = [
            place(self.serial.mode, &self.serial.file, &self.serial.socket),
            place(self.console.mode, &self.console.file, &self.console.socket),
            place(debug.mode, &debug.file, &None),
        ];
        for (i, path) in paths.iter().enumerate() {
            if let Some(path) = path
                && paths[..i].contains(&Some(path))
            {
                return Err(ConfigError::Conflict(format!(
                    "two consoles lead to {}; give each a path of its own",
                    path.display()
                )));
            }
        }
        Ok(())
    }

    fn validate_ids(&self) -> Result<(), ConfigError> {
        let mut ids: Vec<&str> = self.ids().collect();
        let bad = |id: &&&str| id.is_empty() || id.starts_with("__") || RESERVED_IDS.contains(id);
        if let Some(id) = ids.iter().find(bad) {
            let allowed = "not empty, not _rng, _console or _iommu and without a leading '__': those names are our own";
            return Err(range("id", format!("'{id}'"), allowed));
        }
        ids.sort_unstable();
        match ids.windows(2).find(|w| w[0] == w[1]) {
            Some(w) => Err(ConfigError::Conflict(format!(
                "two devices have the id '{}'; give each its own",
                w[0]
            ))),
            None => Ok(()),
        }
    }
}

pub(crate) fn validate_queues(
    field: &str,
    queues: u16,
    size: u16,
    sizes: &RangeInclusive<u16>,
) -> Result<(), ConfigError> {
    if !(1..=MAX_QUEUES).contains(&queues) {
        return Err(range(
            format!("{field}.num_queues"),
            queues,
            format!("between 1 and {MAX_QUEUES}"),
        ));
    }
    if !size.is_power_of_two() || !sizes.contains(&size) {
        let allowed = format!("a power of two between {} and {}", sizes.start(), sizes.end());
        return Err(range(format!("{field}.queue_size"), size, allowed));
    }
    Ok(())
}

fn validate_disk(index: usize, disk: &DiskConfig) -> Result<(), ConfigError> {
    let field = format!("disks[{index}]");
    if disk.vhost_user {
        return served::validate_disk(&field, disk);
    }
    if disk.vhost_socket.is_some() || !disk.vhost_mode.is_client() {
        return Err(ConfigError::Conflict(format!(
            "{field}.vhost_socket and {field}.vhost_mode need {field}.vhost_user switched on"
        )));
    }
    let plain = disk.on_disconnect.is_stall() && disk.datapath.is_auto();
    if !plain && !disk.has_daemon() {
        return Err(ConfigError::Conflict(format!(
            "{field}.on_disconnect and {field}.datapath need a daemon; give {field}.vhost_user or {field}.backend"
        )));
    }
    if disk.path.as_ref().is_none_or(|p| p.as_os_str().is_empty()) {
        return Err(ConfigError::Missing(format!(
            "{field}.path is missing; give a file or a block device"
        )));
    }
    if let Some(serial) = disk.serial.as_ref().filter(|s| s.len() > 20) {
        return Err(range(
            format!("{field}.serial"),
            format!("'{serial}'"),
            "at most 20 bytes long",
        ));
    }
    validate_queues(&field, disk.num_queues, disk.queue_size, &DISK_QUEUE_SIZES)
}

fn validate_net(index: usize, net: &NetConfig) -> Result<(), ConfigError> {
    let field = format!("net[{index}]");
    served::validate_net(&field, net)?;
    validate_queues(&field, net.num_queues, net.queue_size, &NET_QUEUE_SIZES)?;
    if !net.num_queues.is_multiple_of(2) {
        return Err(range(
            format!("{field}.num_queues"),
            net.num_queues,
            "even: a receive and a transmit queue a pair",
        ));
    }
    if let Some(fds) = &net.fds {
        if net.tap.is_some() {
            return Err(ConfigError::Conflict(format!(
                "{field} has both a tap and descriptors of one; give one of them"
            )));
        }
        if fds.len() != usize::from(net.num_queues / 2) {
            let allowed = format!("one for each of the {} queue pairs", net.num_queues / 2);
            return Err(range(
                format!("{field}.fds"),
                format!("{} descriptors", fds.len()),
                allowed,
            ));
        }
    }
    if let Some(fd) = net.fds.iter().flatten().find(|fd| **fd < 0) {
        return Err(range(
            format!("{field}.fds"),
            fd,
            "the number of an inherited descriptor",
        ));
    }
    if let Some(mac) = net.mac.filter(|m| m.0[0] & 1 != 0) {
        return Err(range(
            format!("{field}.mac"),
            mac,
            "a unicast address: the first byte even",
        ));
    }
    if net.mask.is_some() != net.ip.is_some() {
        let (has, lacks) = if net.ip.is_some() {
            ("ip", "mask")
        } else {
            ("mask", "ip")
        };
        return Err(ConfigError::Missing(format!(
            "{field}.{has} needs {field}.{lacks} beside it; give both"
        )));
    }
    if let Some(mtu) = net.mtu.filter(|m| *m < 68) {
        return Err(range(format!("{field}.mtu"), mtu, "at least 68"));
    }
    Ok(())
}

fn validate_console(field: &str, console: &ConsoleConfig) -> Result<(), ConfigError> {
    let missing = |what: &str| {
        Err(ConfigError::Missing(format!(
            "{field}.{what} is missing; this mode needs a path"
        )))
    };
    let empty = |path: &Option<PathBuf>| path.as_ref().is_none_or(|p| p.as_os_str().is_empty());
    match console.mode {
        ConsoleMode::File if empty(&console.file) => missing("file"),
        ConsoleMode::Socket if empty(&console.socket) => missing("socket"),
        _ => Ok(()),
    }
}

/// The port only writes, so there is nothing for a client to connect to.
fn validate_debug_console(debug: &DebugConsoleConfig) -> Result<(), ConfigError> {
    let name = match debug.mode {
        ConsoleMode::Pty => "a pty",
        ConsoleMode::Socket => "a socket",
        mode => {
            let file = debug.file.clone();
            return validate_console(
                "debug_console",
                &ConsoleConfig {
                    mode,
                    file,
                    socket: None,
                },
            );
        }
    };
    Err(range("debug_console.mode", name, "Tty, Null, Off or File"))
}

/// The path a console leads to, if it leads to one.
fn place<'a>(mode: ConsoleMode, file: &'a Option<PathBuf>, socket: &'a Option<PathBuf>) -> Option<&'a Path> {
    match mode {
        ConsoleMode::File => file.as_deref(),
        ConsoleMode::Socket => socket.as_deref(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PayloadConfig, VsockConfig};

    fn good() -> VmConfig {
        let payload = Some(PayloadConfig {
            kernel: Some("vmlinuz".into()),
            ..PayloadConfig::default()
        });
        VmConfig {
            payload,
            ..VmConfig::default()
        }
    }

    fn refusal(edit: impl Fn(&mut VmConfig)) -> String {
        let mut config = good();
        edit(&mut config);
        config.validate().expect_err("refused").to_string()
    }

    #[test]
    fn defaults_are_valid() {
        good().validate().expect("valid");
    }

    #[test]
    fn refusals_name_field_value_and_fix() {
        assert_eq!(
            refusal(|c| c.cpus.boot_vcpus = 0),
            "cpus.boot_vcpus is 0; it must be between 1 and 254"
        );
        assert_eq!(
            refusal(|c| c.cpus.max_vcpus = 255),
            "cpus.max_vcpus is 255; it must be between boot_vcpus (1) and 254"
        );
        assert!(refusal(|c| c.memory.size = 0).starts_with("memory.size is 0 bytes"));
        assert!(refusal(|c| c.memory.size = 1_000_000).contains("whole number of MiB"));
        assert!(refusal(|c| c.payload = None).contains("payload.kernel"));
        let disk = |edit: fn(&mut DiskConfig)| {
            let mut disk = DiskConfig {
                path: Some("x".into()),
                ..DiskConfig::default()
            };
            edit(&mut disk);
            disk
        };
        assert!(refusal(|c| c.disks = Some(vec![disk(|d| d.path = None)])).contains("disks[0].path"));
        assert!(refusal(|c| c.disks = Some(vec![disk(|d| d.queue_size = 100)])).contains("power of two"));
        let same = disk(|d| {
            d.id = Some("a".into());
            d.readonly = true;
        });
        assert!(refusal(|c| c.disks = Some(vec![same.clone(), same.clone()])).contains("two devices have the id 'a'"));
        let net = |edit: fn(&mut NetConfig)| {
            let mut net = NetConfig::default();
            edit(&mut net);
            Some(vec![net])
        };
        assert!(refusal(|c| c.net = net(|n| n.num_queues = 3)).contains("even"));
        assert!(refusal(|c| c.net = net(|n| n.ip = "10.0.0.1".parse().ok())).contains("net[0].mask"));
        assert!(refusal(|c| c.disks = Some(vec![disk(|d| d.queue_size = 2048)])).contains("between 4 and 1024"));
        assert!(refusal(|c| c.net = net(|n| n.mac = Some(MAC_MULTICAST))).contains("unicast"));
        assert!(
            refusal(|c| c.vsock = Some(VsockConfig {
                cid: 2,
                socket: "s".into(),
                iommu: false,
                id: None
            }))
            .contains("cid is 2")
        );
        let served = |edit: fn(&mut DiskConfig)| {
            let mut disk = DiskConfig {
                vhost_user: true,
                vhost_socket: Some("s".into()),
                ..DiskConfig::default()
            };
            edit(&mut disk);
            disk
        };
        assert!(
            refusal(|c| c.disks = Some(vec![served(|d| d.vhost_socket = None)])).contains("vhost_socket is missing")
        );
        assert!(
            refusal(|c| c.disks = Some(vec![served(|d| d.path = Some("x".into()))])).contains("disks[0].path cannot")
        );
        assert!(refusal(|c| c.disks = Some(vec![served(|_| ()), served(|_| ())])).contains("which another device has"));
        assert!(refusal(|c| c.disks = Some(vec![served(|d| d.vhost_user = false)])).contains("vhost_user switched on"));
        let both = refusal(|c| {
            c.serial.mode = ConsoleMode::Tty;
            c.console.mode = ConsoleMode::Tty;
        });
        assert!(both.contains("same terminal"));
        let twice = refusal(|c| {
            c.serial.mode = ConsoleMode::File;
            c.serial.file = Some("log".into());
            c.debug_console.mode = ConsoleMode::File;
            c.debug_console.file = Some("log".into());
        });
        assert_eq!(twice, "two consoles lead to log; give each a path of its own");
        let twice = refusal(|c| c.disks = Some(vec![disk(|_| ()), disk(|d| d.readonly = true)]));
        assert!(twice.contains("disks[1].path is x"));
        assert!(
            refusal(|c| c.net = net(|n| n.ip = Some([10, 0, 0, 1].into()))).contains("net[0].ip needs net[0].mask")
        );
        assert!(refusal(|c| c.net = net(|n| n.fds = Some(vec![-1]))).contains("fds is -1"));
        assert!(refusal(|c| c.debug_console.mode = ConsoleMode::Pty).contains("debug_console.mode is a pty"));
        assert!(refusal(|c| c.rng.src = "".into()).contains("/dev/urandom"));
        let balloon = |size| {
            Some(crate::BalloonConfig {
                size,
                ..Default::default()
            })
        };
        assert!(refusal(|c| c.balloon = balloon(100)).contains("balloon.size is 100 bytes"));
        assert!(refusal(|c| c.balloon = balloon(c.memory.size + 4096)).contains("at most what the guest has"));
    }

    const MAC_MULTICAST: crate::MacAddress = crate::MacAddress([1, 0, 0, 0, 0, 1]);
}
