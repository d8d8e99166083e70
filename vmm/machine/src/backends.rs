//! The host's ends of disks and network interfaces. They outlive resets of the guest: a disk stays locked, a tap keeps its place in
//! the host's network.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;
use triarch_api::{DiskBackend, DiskConfig, ImageType, NetBackend, NetConfig, VmConfig};
use triarch_block::{Backend, Disk, DiskOptions};
use triarch_device_core::Sandbox;
use triarch_net::{PacketBackend, Tap, TapError};
use triarch_vhost_user::Peer;
use triarch_virtio::net::NetCounters;

use crate::daemons::{Daemons, Started, start_disk, start_net};
use crate::{MachineError, vhost};

/// One of each for every device of the configuration, in its order.
pub(crate) struct Backends {
    pub(crate) disks: Vec<DiskEnd>,
    pub(crate) nets: Vec<NetEnd>,
    /// What went through each of the interfaces.
    pub(crate) net_counters: Vec<NetCounters>,
    /// The daemons of file systems.
    pub(crate) fs: Vec<Arc<Peer>>,
    /// Those of other devices.
    pub(crate) generic: Vec<Arc<Peer>>,
    /// Daemons of our own, which end after everything above has let go of them.
    daemons: Vec<Started>,
}

/// What serves a disk.
pub(crate) enum DiskEnd {
    /// This process, from a file or block device.
    File(Arc<Disk>),
    /// A daemon.
    Daemon(Arc<Peer>),
}

/// What serves a network interface.
pub(crate) enum NetEnd {
    /// This process, from a tap.
    Tap(Arc<Tap>),
    /// A daemon.
    Daemon(Arc<Peer>),
}

/// Taps that clients opened and handed over, by the ids of their devices. They are kept as long as the device is configured.
pub(crate) type HandedTaps = BTreeMap<String, Arc<Tap>>;

impl Backends {
    pub(crate) fn open(
        config: &VmConfig,
        handed: &HandedTaps,
        daemons: Option<&Arc<dyn Daemons>>,
        sandbox: &Arc<dyn Sandbox>,
    ) -> Result<Self, MachineError> {
        let mut started = Vec::new();
        let disks = config.disks.iter().flatten();
        let disks: Result<_, _> = disks
            .map(|disk| match disk.backend {
                DiskBackend::Vmm => open_disk(disk, sandbox),
                DiskBackend::Blkd => {
                    let (daemon, socket) = start_disk(disk, daemons)?;
                    started.push(daemon);
                    vhost::open_disk(disk, Some(&socket), sandbox).map(DiskEnd::Daemon)
                }
            })
            .collect();
        let mut nets = Vec::new();
        let mut net_counters = Vec::new();
        for net in config.net.iter().flatten() {
            let handed = net.id.as_ref().and_then(|id| handed.get(id));
            let (end, counters) = match net.backend {
                NetBackend::Vmm => open_net(net, handed, sandbox)?,
                NetBackend::Netd => {
                    let (daemon, socket) = start_net(net, daemons)?;
                    started.push(daemon);
                    daemon_net(net, Some(&socket), sandbox)?
                }
            };
            nets.push(end);
            net_counters.push(counters);
        }
        let fs = config.fs.iter().flatten().map(|fs| vhost::open_fs(fs, sandbox));
        let others = config.generic_vhost_user.iter().flatten();
        let generic = others.map(|device| vhost::open_generic(device, sandbox));
        Ok(Self {
            disks: disks?,
            nets,
            net_counters,
            fs: fs.collect::<Result<_, _>>()?,
            generic: generic.collect::<Result<_, _>>()?,
            daemons: started,
        })
    }

    /// The daemon of our own that serves device `id` and takes orders, if there is one.
    pub(crate) fn daemon(&mut self, id: &str) -> Option<&mut Started> {
        self.daemons.iter_mut().find(|daemon| daemon.takes_orders_for(id))
    }
}

fn open_disk(config: &DiskConfig, sandbox: &Arc<dyn Sandbox>) -> Result<DiskEnd, MachineError> {
    if config.vhost_user {
        return vhost::open_disk(config, config.vhost_socket.as_deref(), sandbox).map(DiskEnd::Daemon);
    }
    if let (ImageType::Unknown, Some(path)) = (config.image_type, &config.path)
        && let Some(format) = foreign_format(path)
    {
        let path = path.clone();
        return Err(MachineError::device(&config.id, FormatError { path, format }));
    }
    let options = DiskOptions {
        path: config.path.clone().unwrap_or_default(),
        readonly: config.readonly,
        direct: config.direct,
        backend: if config.disable_io_uring {
            Backend::Sync
        } else {
            Backend::Auto
        },
        serial: config.serial.clone(),
        limits: None,
    };
    let disk = Disk::open(&options).map_err(|e| MachineError::device(&config.id, e))?;
    Ok(DiskEnd::File(disk))
}

/// The tap behind `fds`, which a client opened, one a queue pair. The client has set it up. Its addresses and MTU on the host are set by
/// its name, which may stand for another interface, or none, in our network namespace; and agents send default addresses (Kata:
/// 192.168.249.1) that nobody wants. Only the hardware address is set by descriptor.
pub(crate) fn handed_tap(config: &NetConfig, fds: Vec<OwnedFd>) -> Result<Arc<Tap>, TapError> {
    let mut tap = Tap::from_fds(fds)?;
    if let Some(mac) = config.host_mac {
        tap.set_mac(mac.0)?;
    }
    Ok(Arc::new(tap))
}

/// The image is of a format that we do not read.
#[derive(Debug, Error)]
#[error(
    "{} looks like {format}, which this version does not read; convert it, or give image_type Raw if its bytes are those of the disk",
    .path.display()
)]
struct FormatError {
    path: PathBuf,
    format: &'static str,
}

/// The format other than raw that the first or the last bytes of an image say it has, if any. What cannot be read is left to whoever opens
/// the image, who says why.
fn foreign_format(path: &Path) -> Option<&'static str> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .ok()?;
    let mut start = [0; 8];
    file.read_exact_at(&mut start, 0).ok()?;
    if start.starts_with(b"QFI\xfb") {
        return Some("qcow2");
    }
    if start == *b"vhdxfile" {
        return Some("VHDX");
    }
    let mut end = [0; 8];
    let footer = file.metadata().ok()?.len().checked_sub(512)?;
    file.read_exact_at(&mut end, footer).ok()?;
    (end == *b"conectix").then_some("VHD")
}

fn open_net(
    config: &NetConfig,
    handed: Option<&Arc<Tap>>,
    sandbox: &Arc<dyn Sandbox>,
) -> Result<(NetEnd, NetCounters), MachineError> {
    if config.vhost_user {
        return daemon_net(config, config.vhost_socket.as_deref(), sandbox);
    }
    let tap = match handed {
        Some(tap) => tap.clone(),
        None => open_tap(config)?,
    };
    let counters = NetCounters::new(tap.queues().len());
    Ok((NetEnd::Tap(tap), counters))
}

fn daemon_net(
    config: &NetConfig,
    socket: Option<&Path>,
    sandbox: &Arc<dyn Sandbox>,
) -> Result<(NetEnd, NetCounters), MachineError> {
    let counters = NetCounters::new(usize::from(config.num_queues / 2));
    let peer = vhost::open_net(config, socket, counters.clone(), sandbox)?;
    Ok((NetEnd::Daemon(peer), counters))
}

fn open_tap(config: &NetConfig) -> Result<Arc<Tap>, MachineError> {
    let id = &config.id;
    let mut tap = match &config.fds {
        Some(fds) => {
            let copies: Result<Vec<OwnedFd>, _> = fds.iter().map(|fd| inherited(*fd)).collect();
            Tap::from_fds(copies.map_err(|e| MachineError::device(id, e))?)
        }
        None => Tap::open(config.tap.as_deref(), usize::from(config.num_queues / 2)),
    }
    .map_err(|e| MachineError::device(id, e))?;
    set_up(&mut tap, config, config.fds.is_none()).map_err(|e| MachineError::device(id, e))?;
    Ok(Arc::new(tap))
}

/// `ours`: we opened it. Whoever hands over descriptors has set the interface up, and may have it in a namespace we cannot reach.
fn set_up(tap: &mut Tap, config: &NetConfig, ours: bool) -> Result<(), TapError> {
    if let Some(mac) = config.host_mac {
        tap.set_mac(mac.0)?;
    }
    if let Some(mtu) = config.mtu {
        tap.set_mtu(mtu)?;
    }
    if let (Some(ip), Some(mask)) = (config.ip, config.mask) {
        tap.set_address(ip, mask)?;
    }
    if ours {
        tap.bring_up()?;
    }
    Ok(())
}

/// A copy of a descriptor this process was started with.
fn inherited(fd: RawFd) -> Result<OwnedFd, InheritError> {
    let failed = |source| InheritError { fd, source };
    if fd < 0 {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    // SAFETY: the number came from the user and stands for a descriptor of theirs; it is only copied, and a number that is not open
    // gives an error. It is not -1, which no descriptor may be.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().map_err(failed)
}

/// A descriptor that whoever started this process did not hand over.
#[derive(Debug, Error)]
#[error("descriptor {fd} was not inherited; open the tap before starting this program and leave it open")]
struct InheritError {
    fd: RawFd,
    #[source]
    source: io::Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_of_unknown_type_is_looked_at() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("image");
        let mut vhd = vec![0; 4096];
        vhd[4096 - 512..][..8].copy_from_slice(b"conectix");
        for (bytes, format) in [
            (vec![0; 4096], None),
            (b"QFI\xfb\0\0\0\x03more".to_vec(), Some("qcow2")),
            (b"vhdxfile".to_vec(), Some("VHDX")),
            (vhd, Some("VHD")),
            (b"short".to_vec(), None),
            (Vec::new(), None),
        ] {
            std::fs::write(&path, bytes).expect("an image");
            assert_eq!(foreign_format(&path), format);
        }
        assert_eq!(foreign_format(&dir.path().join("missing")), None);
    }
}
