//! The PCI devices of a guest: made from the configuration, paused and resumed together.
//!
//! A new kind of device is one more call of [`Devices::add`].

mod host;
mod iommu;
mod make;
mod put;
mod slots;

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;

use triarch_api::events::EventLog;
use triarch_api::{DeviceLink, DeviceNode, DeviceTree, VmConfig};
use triarch_device_core::{IoEvents, MsiRouter, Sandbox};
use triarch_hypervisor::MemorySlots;
use triarch_memory::{Discarder, GuestMemoryHandle, GuestRegion};
use triarch_pci::{BarAllocator, PciAddress, PciRoot};
use triarch_state::{Payloads, SnapshotWriter};
use triarch_vfio::DmaMap;
use triarch_vhost_user::VhostUserHandle;
use triarch_virtio::balloon::BalloonHandle;
use triarch_virtio::net::NetCounters;
use triarch_virtio::vsock::VsockHandle;
use triarch_virtio::{Block, BlockHandle, ConsoleResizer, VirtioConsole, VirtioPci};
use vm_memory::GuestAddressSpace;

use host::Function;
use iommu::Iommu;
pub(crate) use make::offloads;
use make::{balloon, network, rng, vsock};

use crate::announce::Port;
use crate::backends::{Backends, End, Serves};
use crate::build::Report;
use crate::configured::DeviceConfig;
use crate::consoles::Consoles;
use crate::memory::virtio_mem::{self, Room};
use crate::metrics::DeviceMeters;
use crate::progress::Progress;
use crate::snapshot::{self, FunctionPlaceV1, PciStateV1, Saved, SavedDevices};
use crate::{MachineError, vhost};

/// What devices are built on.
pub(crate) struct Host {
    pub(crate) root: Arc<PciRoot>,
    pub(crate) memory: GuestMemoryHandle,
    pub(crate) discarder: Discarder,
    pub(crate) router: Arc<dyn MsiRouter>,
    pub(crate) io_events: Arc<dyn IoEvents>,
    pub(crate) sandbox: Arc<dyn Sandbox>,
    pub(crate) events: Arc<EventLog>,
    pub(crate) report: Report,
    /// Where memory devices have their memory.
    pub(crate) rooms: Vec<Room>,
    pub(crate) slots: MemorySlots,
    /// What of the memory devices of the host reach.
    pub(crate) reach: DmaMap,
    /// They reach each other's registers.
    pub(crate) peers: bool,
    /// There are wires for interrupt pins.
    pub(crate) wires: bool,
    /// The VM as those see it.
    pub(crate) vm: Arc<dyn triarch_vfio::Vm>,
}

/// The PCI devices of a guest.
pub(crate) struct Devices {
    host: Host,
    functions: Vec<Placed>,
    /// Where devices go that are not there yet and have been there before, by their ids.
    places: BTreeMap<String, PciAddress>,
    paused: bool,
    /// What those that are made continue from, while a guest is restored.
    saved: Option<SavedDevices>,
    disks: Vec<(String, BlockHandle)>,
    daemons: Vec<(String, VhostUserHandle)>,
    nics: Vec<(String, NetCounters)>,
    ports: Vec<Port>,
    vsocks: Vec<(String, VsockHandle)>,
    balloon: Option<(String, BalloonHandle)>,
    memories: Vec<virtio_mem::Named>,
    /// What keeps devices from memory, if the guest has one.
    iommu: Option<Iommu>,
    /// Where memory comes and goes, as daemons know it.
    rooms: Vec<Arc<GuestRegion>>,
    resizer: Option<ConsoleResizer>,
}

/// A device and where it is.
struct Placed {
    id: String,
    address: PciAddress,
    function: Function,
    /// It can be taken while the guest runs.
    removable: bool,
}

/// A device that was taken from the others: it works as long as [`remove`](Self::remove) was not called.
pub(crate) struct Taken {
    placed: Placed,
    root: Arc<PciRoot>,
}

impl Taken {
    /// Its slot.
    pub(crate) fn slot(&self) -> u8 {
        self.placed.address.slot()
    }

    /// Takes it from the guest, finishes what is in flight, and frees all it has.
    pub(crate) fn remove(self) {
        let Placed {
            id, address, function, ..
        } = self.placed;
        if let Err(error) = self.root.remove(address) {
            tracing::error!("cannot take the device {id} off the bus: {error}");
        }
        drop(function);
        tracing::debug!(id, %address, "device removed");
    }
}

type Made<T> = Result<T, Box<dyn Error + Send + Sync>>;

impl Devices {
    pub(crate) fn build(
        config: &VmConfig,
        consoles: &Consoles,
        backends: &Backends,
        host: Host,
        mut saved: Option<&mut Saved>,
        progress: Progress<'_>,
    ) -> Result<Self, MachineError> {
        let mut devices = Self {
            host,
            functions: Vec::new(),
            places: backends.places.clone(),
            // A restored one stands still until it is told to go on.
            paused: saved.is_some(),
            saved: saved.as_mut().map(|saved| saved.devices()),
            disks: Vec::new(),
            daemons: Vec::new(),
            nics: Vec::new(),
            ports: Vec::new(),
            vsocks: Vec::new(),
            balloon: None,
            memories: Vec::new(),
            iommu: None,
            rooms: Vec::new(),
            resizer: None,
        };
        progress.note("devices");
        let rooms = std::mem::take(&mut devices.host.rooms);
        devices.rooms = virtio_mem::shared(&rooms)?;
        let total = count(config, consoles) + rooms.len();
        if let Some(saved) = &devices.saved {
            devices.places = saved.places(&devices.host.root)?;
        }
        devices.reserve(config);
        let mut rooms = rooms.into_iter();
        if let Some(saved) = saved {
            // Others may have their queues there.
            let before = devices.host.memory.memory();
            for room in rooms.by_ref() {
                devices.add_memory(progress, total, room)?;
            }
            saved.fill_rest(
                &devices.host.memory.memory(),
                &before,
                devices.host.discarder.backing(),
                progress,
            )?;
        }
        if config.has_iommu() {
            devices.add_iommu(progress, total, config.iommu_for_all())?;
        }
        let vsock = |device: &DeviceConfig<'_>| matches!(device, DeviceConfig::Vsock(_));
        let (last, first): (Vec<_>, Vec<_>) = DeviceConfig::all(config).partition(vsock);
        let with_end = |device: DeviceConfig<'_>| backends.end(device.id());
        for (device, end) in first.iter().filter_map(|device| Some((*device, with_end(*device)?))) {
            devices.add_configured(progress, total, device, end)?;
        }
        let behind = devices.endpoint(config.rng.iommu);
        devices.add_behind(progress, total, &Some("_rng".into()), behind, |id| rng(id, &config.rng))?;
        if let Some(console) = &consoles.console {
            let mut resizer = None;
            let behind = devices.endpoint(false);
            devices.add_behind(progress, total, &Some("_console".into()), behind, |id| {
                let device = VirtioConsole::new(id, console.clone());
                resizer = Some(device.resizer());
                Ok(Box::new(device))
            })?;
            devices.resizer = resizer;
        }
        for (device, end) in last.iter().filter_map(|device| Some((*device, with_end(*device)?))) {
            devices.add_configured(progress, total, device, end)?;
        }
        if let Some(config) = &config.balloon {
            let (discarder, report) = (devices.host.discarder.clone(), devices.host.report.clone());
            let mut handle = None;
            devices.add(progress, total, &config.id, |id| {
                let device = balloon(id, config, discarder, report)?;
                handle = Some((id.to_owned(), device.handle()));
                Ok(Box::new(device))
            })?;
            devices.balloon = handle;
        }
        for room in rooms {
            devices.add_memory(progress, total, room)?;
        }
        devices.places.clear();
        if let Some(saved) = devices.saved.take() {
            saved.finish(&devices.host.root)?;
        }
        Ok(devices)
    }

    fn add_memory(&mut self, progress: Progress<'_>, total: usize, room: Room) -> Result<(), MachineError> {
        let host = &self.host;
        let (memory, slots, report) = (host.memory.clone(), host.slots.clone(), host.report.clone());
        let reach = host.reach.clone();
        let mut handle = None;
        self.add(progress, total, &Some(room.id.clone()), |id| {
            let device = virtio_mem::device(room, &memory, &slots, &report, &reach)?;
            handle = Some((id.to_owned(), device.handle()));
            Ok(Box::new(device))
        })?;
        self.memories.extend(handle);
        Ok(())
    }

    /// Adds a device that can be taken while the guest runs; `end` serves it.
    fn add_configured(
        &mut self,
        progress: Progress<'_>,
        total: usize,
        device: DeviceConfig<'_>,
        end: &End,
    ) -> Result<(), MachineError> {
        self.find_place(device)?;
        let name = Some(device.id().to_owned());
        let own = || device.id().to_owned();
        let behind = self.endpoint(device.is_behind_iommu());
        match (&end.serves, device) {
            (Serves::File(disk), DeviceConfig::Disk(config)) => {
                let mut handle = None;
                self.add_behind(progress, total, &name, behind, |id| {
                    let device = Block::new(id, disk.clone(), config.num_queues, config.queue_size)?;
                    handle = Some((id.to_owned(), device.handle()));
                    Ok(Box::new(device))
                })?;
                self.disks.extend(handle);
            }
            (Serves::Tap(tap, counters), DeviceConfig::Net(config)) => {
                let mut port = None;
                self.add_behind(progress, total, &name, behind, |id| {
                    let device = network(id, config, tap, counters)?;
                    port = Some(Port {
                        id: id.to_owned(),
                        device: device.handle(),
                        tap: tap.clone(),
                    });
                    Ok(Box::new(device))
                })?;
                self.ports.extend(port);
                self.nics.push((own(), counters.clone()));
            }
            (Serves::Daemon(peer, counters), _) => {
                self.add_served(progress, total, &name, peer)?;
                self.nics.extend(counters.clone().map(|counters| (own(), counters)));
            }
            (Serves::Host(device), DeviceConfig::Host(config)) => {
                self.add_host(progress, total, device.clone(), config)?;
            }
            (_, DeviceConfig::Vsock(config)) => {
                let mut handle = None;
                self.add_behind(progress, total, &name, behind, |id| {
                    let device = vsock(id, config)?;
                    handle = Some((id.to_owned(), device.handle()));
                    Ok(Box::new(device))
                })?;
                self.vsocks.extend(handle);
            }
            // Nothing opens such an end.
            (Serves::File(_) | Serves::Tap(..) | Serves::Host(_) | Serves::Itself, _) => {
                return Err(MachineError::device(&name, "nothing serves it"));
            }
        }
        if let Some(placed) = self.functions.last_mut() {
            placed.removable = true;
        }
        Ok(())
    }

    /// Gives a guest that is there one more device, at `place`; `end` serves it. On error it has not got it.
    pub(crate) fn plug(&mut self, device: DeviceConfig<'_>, end: &End, place: PciAddress) -> Result<(), MachineError> {
        self.places.insert(device.id().to_owned(), place);
        let result = self.add_configured(Progress::NONE, 0, device, end);
        self.places.clear();
        result
    }

    /// Takes a device that can be taken from the others.
    pub(crate) fn take(&mut self, id: &str) -> Option<Taken> {
        let at = self
            .functions
            .iter()
            .position(|placed| placed.id == id && placed.removable)?;
        let placed = self.functions.remove(at);
        self.disks.retain(|(name, _)| name != id);
        self.daemons.retain(|(name, _)| name != id);
        self.nics.retain(|(name, _)| name != id);
        self.ports.retain(|port| port.id != id);
        self.vsocks.retain(|(name, _)| name != id);
        let root = self.host.root.clone();
        Some(Taken { placed, root })
    }

    /// Where the device called `id` is, and whether it can be taken while the guest runs.
    pub(crate) fn find(&self, id: &str) -> Option<(PciAddress, bool)> {
        let placed = self.functions.iter().find(|placed| placed.id == id)?;
        Some((placed.address, placed.removable))
    }

    /// Whether the guest may have looked at the device at `address`.
    pub(crate) fn touched(&self, address: PciAddress) -> bool {
        self.host.root.touched(address)
    }

    /// Where all devices are, by their ids.
    pub(crate) fn places(&self) -> BTreeMap<String, PciAddress> {
        let place = |placed: &Placed| (placed.id.clone(), placed.address);
        self.functions.iter().map(place).collect()
    }

    /// How the guest's memory is made.
    pub(crate) fn backing(&self) -> &triarch_memory::Backing {
        self.host.discarder.backing()
    }

    /// Saves them all, which are paused, and returns how they are on the bus.
    /// What those of the host are that only their drivers know goes to `writer`; without one it goes its own way.
    pub(crate) fn save(
        &self,
        payloads: &mut Payloads,
        mut writer: Option<&mut SnapshotWriter>,
    ) -> Result<PciStateV1, MachineError> {
        let mut places = BTreeMap::new();
        for Placed {
            id, address, function, ..
        } in &self.functions
        {
            match function {
                Function::Virtio(function) => snapshot::save_function(id, function, payloads)?,
                Function::Host(function, _) => snapshot::save_host(id, function, payloads, writer.as_deref_mut())?,
            }
            let place = FunctionPlaceV1 {
                address: address.to_string(),
                touched: self.touched(*address),
            };
            places.insert(id.clone(), place);
        }
        Ok(PciStateV1::new(&self.host.root, places))
    }

    /// Interrupts the guest for each queue: it was restored, and interrupts may have been on their way when it was saved.
    pub(crate) fn renew_interrupts(&self) {
        self.functions
            .iter()
            .filter_map(|placed| placed.function.virtio())
            .for_each(VirtioPci::renew_interrupts);
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.functions.len()
    }

    /// Where the devices of each root bus may have their BARs.
    pub(crate) fn windows(&self) -> &[BarAllocator] {
        self.host.root.windows()
    }

    /// A disk by its id.
    pub(crate) fn disk(&self, id: &str) -> Option<&BlockHandle> {
        self.disks.iter().find(|(name, _)| name == id).map(|(_, disk)| disk)
    }

    /// The balloon, if there is one.
    pub(crate) fn balloon(&self) -> Option<&BalloonHandle> {
        self.balloon.as_ref().map(|(_, balloon)| balloon)
    }

    /// The memory devices.
    pub(crate) fn memories(&self) -> &[virtio_mem::Named] {
        &self.memories
    }

    /// The devices, each behind the PCI function that presents it.
    pub(crate) fn tree(&self) -> DeviceTree {
        let nodes = self.functions.iter().flat_map(|placed| {
            let Placed { id, address, .. } = placed;
            if placed.function.virtio().is_none() {
                let node = DeviceNode {
                    id: id.clone(),
                    parent: None,
                    children: Vec::new(),
                    pci_bdf: Some(address.to_string()),
                };
                return vec![node];
            }
            let function = format!("_virtio-pci-{id}");
            let device = DeviceNode {
                id: id.clone(),
                parent: Some(function.clone()),
                children: Vec::new(),
                pci_bdf: None,
            };
            let function = DeviceNode {
                id: function,
                parent: None,
                children: vec![id.clone()],
                pci_bdf: Some(address.to_string()),
            };
            vec![function, device]
        });
        let mut tree = nodes.map(|node| (node.id.clone(), node)).collect();
        self.show_ports(&mut tree);
        tree
    }

    /// How devices stand with their daemons, by their ids.
    pub(crate) fn links(&self) -> BTreeMap<String, DeviceLink> {
        let link = |(id, handle): &(String, VhostUserHandle)| (id.clone(), vhost::link(handle.status()));
        self.daemons.iter().map(link).collect()
    }

    /// What tells of the daemon of device `id`, if it has one.
    pub(crate) fn daemon(&self, id: &str) -> Option<&VhostUserHandle> {
        self.daemons
            .iter()
            .find(|(name, _)| name == id)
            .map(|(_, handle)| handle)
    }

    /// The devices that daemons serve, by their ids.
    pub(crate) fn served(&self) -> &[(String, VhostUserHandle)] {
        &self.daemons
    }

    /// Tells the network where the guest is now, at each interface; how many there are.
    pub(crate) fn announce(&self) -> usize {
        self.ports.iter().for_each(Port::announce);
        let served = self.daemons.iter().filter(|(_, device)| device.announce());
        self.ports.len() + served.count()
    }

    /// Where memory comes and goes in parts, all of which daemons have.
    pub(crate) fn rooms(&self) -> &[Arc<GuestRegion>] {
        &self.rooms
    }

    /// What the devices count.
    pub(crate) fn meters(&self) -> DeviceMeters {
        let disk = |(id, handle): &(String, BlockHandle)| (id.clone(), handle.disk().counters().clone());
        DeviceMeters {
            disks: self.disks.iter().map(disk).collect(),
            nics: self.nics.clone(),
            vsocks: self.vsocks.clone(),
            balloon: self.balloon.clone(),
            memories: self.memories.clone(),
            daemons: self.daemons.clone(),
            hosts: self.hosts(),
        }
    }

    /// Tells the guest of its console's new size, if it has one.
    pub(crate) fn terminal_resized(&self) {
        if let Some(resizer) = &self.resizer {
            resizer.resized();
        }
    }

    /// Finishes what is in flight and stops the devices.
    pub(crate) fn pause(&mut self) {
        self.paused = true;
        let virtio = self.functions.iter().filter_map(|placed| placed.function.virtio());
        virtio.for_each(VirtioPci::pause);
    }

    /// Lets the devices go on.
    pub(crate) fn resume(&mut self) {
        self.paused = false;
        let virtio = self.functions.iter().filter_map(|placed| placed.function.virtio());
        virtio.for_each(VirtioPci::resume);
    }
}

/// How many devices there will be.
fn count(config: &VmConfig, consoles: &Consoles) -> usize {
    let own = config.disks.iter().flatten().count() + config.net.iter().flatten().count();
    let served = config.fs.iter().flatten().count() + config.generic_vhost_user.iter().flatten().count();
    // The entropy device is always there.
    let single = [
        consoles.console.is_some(),
        config.vsock.is_some(),
        config.balloon.is_some(),
    ];
    let host = config.devices.iter().flatten().count();
    let iommu = usize::from(config.has_iommu());
    own + served + host + iommu + 1 + single.into_iter().filter(|there| *there).count()
}
