//! The host's ends of disks and network interfaces. They outlive resets of the guest: a disk stays locked, a tap keeps its place in
//! the host's network.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;
use triarch_api::{
    DeviceConfig as HostDeviceConfig, DiskBackend, DiskConfig, ImageType, NetBackend, NetConfig, VmConfig,
};
use triarch_block::{Backend, Disk, DiskOptions};
use triarch_device_core::Sandbox;
use triarch_net::{PacketBackend, Tap, TapError};
use triarch_pci::PciAddress;
use triarch_vfio::{HostDevice, Iommu};
use triarch_vhost_user::{Offer, Peer};
use triarch_virtio::net::NetCounters;

use crate::configured::DeviceConfig;
use crate::daemons::{Daemons, Started, start_disk, start_net};
use crate::{MachineError, vhost};

/// The host's ends of all devices of the configuration that have one, and what else of devices outlives a reset.
#[derive(Default)]
pub(crate) struct Backends {
    ends: BTreeMap<String, End>,
    /// Where the devices of the last guest sat, by their ids: those of the next one sit there as well.
    pub(crate) places: BTreeMap<String, PciAddress>,
}

/// The host's end of a device.
pub(crate) struct End {
    pub(crate) serves: Serves,
    /// A daemon of our own, which ends after everything above has let go of it.
    daemon: Option<Started>,
}

/// What serves a device.
pub(crate) enum Serves {
    /// This process, from a file or block device.
    File(Arc<Disk>),
    /// This process, from a tap; what goes through it is counted.
    Tap(Arc<Tap>, NetCounters),
    /// A daemon; what it does for a network interface is counted.
    Daemon(Arc<Peer>, Option<NetCounters>),
    /// A device of the host.
    Host(Arc<HostDevice>),
    /// The device itself, which opens what it needs anew with each guest.
    Itself,
}

/// What somebody else opened and handed over for a device.
#[derive(Clone)]
pub(crate) enum Handed {
    Tap(Arc<Tap>),
    Host(Arc<HostDevice>),
}

/// That of all devices, by their ids. It is kept as long as the device is configured.
pub(crate) type HandedEnds = BTreeMap<String, Handed>;

/// What devices are opened with.
#[derive(Clone, Copy)]
pub(crate) struct Opener<'a> {
    pub(crate) handed: &'a HandedEnds,
    /// Starts daemons, if somebody may.
    pub(crate) daemons: Option<&'a Arc<dyn Daemons>>,
    pub(crate) sandbox: &'a Arc<dyn Sandbox>,
    /// Opens devices of the host.
    pub(crate) iommu: &'a Iommu,
    /// All devices that can be are behind the guest's IOMMU.
    pub(crate) behind_iommu: bool,
    /// Of a guest that comes from another VMM: what it was shown of the devices that daemons serve. Disks are not locked then, since
    /// the other VMM still uses them; [`Backends::lock`] comes later.
    pub(crate) moved: Option<&'a BTreeMap<String, Offer>>,
}

impl Opener<'_> {
    fn locked(&self) -> bool {
        self.moved.is_none()
    }

    /// What was handed over for device `id`.
    fn handed(&self, id: &Option<String>) -> Option<&Handed> {
        self.handed.get(id.as_deref()?)
    }

    /// What a guest that comes was shown of device `id`.
    fn shown(&self, id: &Option<String>) -> Option<Offer> {
        self.moved?.get(id.as_deref()?).cloned()
    }
}

impl Backends {
    pub(crate) fn open(config: &VmConfig, opener: Opener<'_>) -> Result<Self, MachineError> {
        let mut backends = Self::default();
        for device in DeviceConfig::all(config) {
            backends.ends.insert(device.id().to_owned(), End::open(device, opener)?);
        }
        Ok(backends)
    }

    /// The end of device `id`.
    pub(crate) fn end(&self, id: &str) -> Option<&End> {
        self.ends.get(id)
    }

    /// Takes the end of a device that a guest was given while it ran.
    pub(crate) fn insert(&mut self, id: &str, end: End, place: PciAddress) {
        self.ends.insert(id.to_owned(), end);
        self.places.insert(id.to_owned(), place);
    }

    /// Gives the end of a device away that will not be there any more.
    pub(crate) fn remove(&mut self, id: &str) -> Option<End> {
        self.places.remove(id);
        self.ends.remove(id)
    }

    /// The disks that this process serves, by their ids.
    pub(crate) fn disks(&self) -> impl Iterator<Item = (&str, &Arc<Disk>)> {
        self.ends.iter().filter_map(|(id, end)| match &end.serves {
            Serves::File(disk) => Some((id.as_str(), disk)),
            Serves::Tap(..) | Serves::Daemon(..) | Serves::Host(_) | Serves::Itself => None,
        })
    }

    /// The daemons that serve devices.
    pub(crate) fn peers(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.ends.values().filter_map(|end| match &end.serves {
            Serves::Daemon(peer, _) => Some(peer),
            Serves::File(_) | Serves::Tap(..) | Serves::Host(_) | Serves::Itself => None,
        })
    }

    /// The devices of the host, by their ids.
    pub(crate) fn of_host(&self) -> impl Iterator<Item = (&str, &Arc<HostDevice>)> {
        self.ends.iter().filter_map(|(id, end)| match &end.serves {
            Serves::Host(device) => Some((id.as_str(), device)),
            Serves::File(_) | Serves::Tap(..) | Serves::Daemon(..) | Serves::Itself => None,
        })
    }

    /// The device of the host called `name` there, by its id.
    pub(crate) fn host_device(&self, name: &str) -> Option<&str> {
        let found = |end: &End| matches!(&end.serves, Serves::Host(device) if device.name() == name);
        let mut ends = self.ends.iter();
        ends.find(|(_, end)| found(end)).map(|(id, _)| id.as_str())
    }

    /// Takes the locks of all disks.
    ///
    /// # Errors
    /// One cannot be had; then none is.
    pub(crate) fn lock(&self) -> Result<(), MachineError> {
        for (id, disk) in self.disks() {
            if let Err(error) = disk.take_lock() {
                // What cannot be unlocked stays locked until it is closed, which it will be.
                let _ = self.unlock();
                return Err(MachineError::device(&Some(id.to_owned()), error));
            }
        }
        Ok(())
    }

    /// Gives the locks of all disks up.
    ///
    /// # Errors
    /// The host's; then some may still be there.
    pub(crate) fn unlock(&self) -> Result<(), MachineError> {
        let unlocked = self.disks().map(|(_, disk)| disk.release_lock());
        unlocked
            .fold(Ok(()), io::Result::and)
            .map_err(MachineError::host("give up the locks of disks"))
    }

    /// The daemon of our own that serves device `id` and takes orders, if there is one.
    pub(crate) fn daemon(&mut self, id: &str) -> Option<&mut Started> {
        let daemon = self.ends.get_mut(id)?.daemon.as_mut();
        daemon.filter(|daemon| daemon.takes_orders())
    }
}

impl End {
    /// Opens what serves `device`. On error nothing stays open or locked, and no daemon runs.
    pub(crate) fn open(device: DeviceConfig<'_>, opener: Opener<'_>) -> Result<Self, MachineError> {
        let sandbox = opener.sandbox;
        let mut daemon = None;
        let serves = match device {
            DeviceConfig::Disk(disk) => match disk.backend {
                DiskBackend::Vmm => open_disk(disk, opener)?,
                DiskBackend::Blkd => {
                    let (started, socket) = start_disk(disk, opener.locked(), opener.daemons)?;
                    daemon = Some(started);
                    let shown = opener.shown(&disk.id);
                    Serves::Daemon(vhost::open_disk(disk, Some(&socket), shown, sandbox)?, None)
                }
            },
            DeviceConfig::Net(net) => match net.backend {
                NetBackend::Vmm => open_net(net, opener.handed(&net.id), opener)?,
                NetBackend::Netd => {
                    let (started, socket) = start_net(net, opener.daemons)?;
                    daemon = Some(started);
                    daemon_net(net, Some(&socket), opener)?
                }
            },
            DeviceConfig::Fs(fs) => Serves::Daemon(vhost::open_fs(fs, opener.shown(&fs.id), sandbox)?, None),
            DeviceConfig::Generic(device) => {
                let shown = opener.shown(&device.id);
                Serves::Daemon(vhost::open_generic(device, shown, sandbox)?, None)
            }
            DeviceConfig::Host(device) => Serves::Host(open_device(device, opener)?),
            DeviceConfig::Vsock(_) => Serves::Itself,
        };
        Ok(Self { serves, daemon })
    }

    /// Whether [`open`](Self::open) would find what this process serves `device` from, which is left as it is; the disk, if it is one.
    pub(crate) fn look(device: DeviceConfig<'_>, opener: Opener<'_>) -> Result<Option<Arc<Disk>>, MachineError> {
        match device {
            DeviceConfig::Disk(disk) if disk.backend == DiskBackend::Vmm && !disk.vhost_user => {
                match open_disk(disk, opener)? {
                    Serves::File(disk) => Ok(Some(disk)),
                    Serves::Tap(..) | Serves::Daemon(..) | Serves::Host(_) | Serves::Itself => Ok(None),
                }
            }
            DeviceConfig::Net(net) if net.backend == NetBackend::Vmm && !net.vhost_user => {
                match opener.handed(&net.id).is_some() {
                    true => Ok(None),
                    false => attach_tap(net).map(|_| None),
                }
            }
            _ => Ok(None),
        }
    }

    /// Makes what the guest wrote durable and closes everything. The device must have let go of it.
    ///
    /// # Errors
    /// What was written may not be durable. It is closed all the same.
    pub(crate) fn close(self) -> io::Result<()> {
        match &self.serves {
            Serves::File(disk) if !disk.readonly() => disk.share_file()?.sync_all(),
            Serves::File(_) | Serves::Tap(..) | Serves::Daemon(..) | Serves::Host(_) | Serves::Itself => Ok(()),
        }
    }
}

fn open_disk(config: &DiskConfig, opener: Opener<'_>) -> Result<Serves, MachineError> {
    if config.vhost_user {
        let peer = vhost::open_disk(
            config,
            config.vhost_socket.as_deref(),
            opener.shown(&config.id),
            opener.sandbox,
        )?;
        return Ok(Serves::Daemon(peer, None));
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
    let opened = match opener.locked() {
        true => Disk::open(&options),
        false => Disk::open_unlocked(&options),
    };
    let disk = opened.map_err(|e| MachineError::device(&config.id, e))?;
    Ok(Serves::File(disk))
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

fn open_device(config: &HostDeviceConfig, opener: Opener<'_>) -> Result<Arc<HostDevice>, MachineError> {
    if let Some(Handed::Host(device)) = opener.handed(&config.id) {
        return Ok(device.clone());
    }
    let id = &config.id;
    let path = config.path.as_deref();
    let path = path.ok_or_else(|| MachineError::device(id, NotHanded))?;
    let opened = opener.iommu.open(path, config.iommu || opener.behind_iommu);
    opened.map_err(|error| MachineError::device(id, error))
}

/// A device whose descriptor is not there.
#[derive(Debug, Error)]
#[error("nobody handed over the descriptor of the device; give it with vm.add-device, or give its path")]
struct NotHanded;

fn open_net(config: &NetConfig, handed: Option<&Handed>, opener: Opener<'_>) -> Result<Serves, MachineError> {
    if config.vhost_user {
        return daemon_net(config, config.vhost_socket.as_deref(), opener);
    }
    let tap = match handed {
        Some(Handed::Tap(tap)) => tap.clone(),
        Some(Handed::Host(_)) | None => open_tap(config)?,
    };
    let counters = NetCounters::new(tap.queues().len());
    Ok(Serves::Tap(tap, counters))
}

fn daemon_net(config: &NetConfig, socket: Option<&Path>, opener: Opener<'_>) -> Result<Serves, MachineError> {
    let counters = NetCounters::new(usize::from(config.num_queues / 2));
    let peer = vhost::open_net(
        config,
        socket,
        counters.clone(),
        opener.shown(&config.id),
        opener.sandbox,
    )?;
    Ok(Serves::Daemon(peer, Some(counters)))
}

fn open_tap(config: &NetConfig) -> Result<Arc<Tap>, MachineError> {
    let mut tap = attach_tap(config)?;
    set_up(&mut tap, config, config.fds.is_none()).map_err(|e| MachineError::device(&config.id, e))?;
    Ok(Arc::new(tap))
}

/// The tap as it is.
fn attach_tap(config: &NetConfig) -> Result<Tap, MachineError> {
    let id = &config.id;
    let tap = match &config.fds {
        Some(fds) => {
            let copies: Result<Vec<OwnedFd>, _> = fds.iter().map(|fd| inherited(*fd)).collect();
            Tap::from_fds(copies.map_err(|e| MachineError::device(id, e))?)
        }
        None => Tap::open(config.tap.as_deref(), usize::from(config.num_queues / 2)),
    };
    tap.map_err(|e| MachineError::device(id, e))
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
pub(crate) fn inherited(fd: RawFd) -> Result<OwnedFd, InheritError> {
    let failed = |source| InheritError { fd, source };
    if fd < 0 {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    // SAFETY: the number came from the user and stands for a descriptor of theirs; it is only copied, and a number that is not open
    // gives an error. It is not -1, which no descriptor may be.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().map_err(failed)
}

/// Closes a descriptor this process was started with, of which there is a copy.
pub(crate) fn close_inherited(fd: RawFd) {
    // SAFETY: whoever started this program said that it is the file of a device of the host, and the copy showed that. Nothing here opens
    // such files before, and a number is given once, so nothing else owns it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}

/// A descriptor that whoever started this process did not hand over.
#[derive(Debug, Error)]
#[error("descriptor {fd} was not inherited; open it before starting this program and leave it open")]
pub(crate) struct InheritError {
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
