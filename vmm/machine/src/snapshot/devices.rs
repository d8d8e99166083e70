//! What PCI devices save beside what their transport does.

use std::any::Any;
use std::collections::BTreeMap;
use std::error::Error;

use serde::{Deserialize, Serialize};
use triarch_arch::HexBytes;
use triarch_pci::{PciAddress, PciRoot};
use triarch_state::{DeviceFiles, Kind, PayloadError, Payloads};
use triarch_vhost_user::{LinkState, StateError, StateLimits, VhostUser};
use triarch_virtio::balloon::Balloon;
use triarch_virtio::iommu::VirtioIommu;
use triarch_virtio::mem::Mem;
use triarch_virtio::net::Net;
use triarch_virtio::vsock::Vsock;
use triarch_virtio::{Block, DeviceId, DeviceMemory, VirtioDevice, VirtioPci, VirtioPciStateV1};

use crate::MachineError;
use crate::devices::Host;

/// A virtio device's PCI function, by the device's id.
const FUNCTION: Kind = Kind::new("virtio-pci", 1);
const BLOCK: Kind = Kind::new("block", 1);
const NET: Kind = Kind::new("net", 1);
const BALLOON: Kind = Kind::new("balloon", 1);
const MEM: Kind = Kind::new("virtio-mem", 1);
const IOMMU: Kind = Kind::new("virtio-iommu", 1);
/// What a daemon knows of a device.
const DAEMON: Kind = Kind::new("daemon", 1);

/// Requests that no daemon has answered.
const UNANSWERED: Kind = Kind::new("unanswered", 1);

/// What a driver wrote into the configuration space of a device that a daemon serves: bytes by their offsets.
const WRITTEN: Kind = Kind::new("written", 1);

/// Most bytes of a daemon's state.
const DAEMON_BYTES: u64 = 64 << 20;
/// Bytes of the host bridge's configuration space that a guest may have written.
const BRIDGE: usize = 64;
/// Registers of it: command; cache line size and latency timer; interrupt line.
const BRIDGE_REGISTERS: [std::ops::Range<usize>; 3] = [4..6, 0xc..0xe, 0x3c..0x3d];

/// The PCI bus.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PciStateV1 {
    /// Begin of the host bridge's configuration space.
    pub(super) bridge: HexBytes,
    /// Where devices are, by their ids.
    pub(super) functions: BTreeMap<String, FunctionPlaceV1>,
    /// What a guest wrote into root ports, by their slots: the begin of their configuration space. Snapshots of former versions have none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) ports: BTreeMap<u8, HexBytes>,
}

/// Where a device is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FunctionPlaceV1 {
    /// As in `0000:00:04.0`.
    pub(crate) address: String,
    /// The guest may know of it.
    pub(crate) touched: bool,
}

/// What the devices of a guest continue from.
#[derive(Default)]
pub(crate) struct SavedDevices {
    pub(super) pci: PciStateV1,
    pub(super) payloads: Payloads,
    /// What devices of the host are. `None`: it came another way.
    pub(super) files: Option<DeviceFiles>,
}

type Carried<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// A daemon's note of its requests cannot be believed.
const UNKNOWN: &str =
    "which requests of it wait for its daemon, which is gone, is not known; let a daemon serve it again first";

/// Requests of a queue that no daemon has answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UnansweredV1 {
    queue: u16,
    /// Where their descriptor chains begin, in the order in which they came.
    heads: Vec<u16>,
}

/// Saves `function`, of the device `id`, which is paused.
pub(crate) fn save(id: &str, function: &VirtioPci, payloads: &mut Payloads) -> Result<(), MachineError> {
    let failed = |source| carry(id, source);
    let state = function.save().map_err(|error| failed(error.into()))?;
    function
        .with_device(|device| save_device(id, device, &state, payloads))
        .map_err(failed)?;
    Ok(payloads.put(FUNCTION, id, &state)?)
}

pub(super) fn carry(id: &str, source: Box<dyn Error + Send + Sync>) -> MachineError {
    MachineError::Carry {
        id: id.to_owned(),
        source,
    }
}

fn save_device(
    id: &str,
    device: &mut (dyn VirtioDevice + 'static),
    state: &VirtioPciStateV1,
    payloads: &mut Payloads,
) -> Carried<()> {
    let kind = device.id();
    let device: &mut dyn Any = device;
    if let Some(disk) = device.downcast_ref::<Block>() {
        payloads.put(BLOCK, id, &disk.state())?;
    } else if let Some(net) = device.downcast_ref::<Net>() {
        payloads.put(NET, id, &net.handle().state())?;
    } else if let Some(balloon) = device.downcast_ref::<Balloon>() {
        payloads.put(BALLOON, id, &balloon.handle().state())?;
    } else if let Some(mem) = device.downcast_ref::<Mem>() {
        payloads.put(MEM, id, &mem.handle().state())?;
    } else if let Some(iommu) = device.downcast_ref::<VirtioIommu>() {
        payloads.put(IOMMU, id, &iommu.state())?;
    } else if let Some(served) = device.downcast_mut::<VhostUser>() {
        if let Some(port) = served.port() {
            payloads.put(NET, id, &port)?;
        }
        let written = served.written();
        if !written.is_empty() {
            payloads.put(WRITTEN, id, &written)?;
        }
        let open = unanswered(served, state)?;
        if !open.is_empty() {
            payloads.put(UNANSWERED, id, &open)?;
        }
        save_daemon(id, kind, served, payloads)?;
    }
    Ok(())
}

/// What of `served` waits for a daemon. With one that serves it, nothing of a disk does: a pause waits for it.
fn unanswered(served: &VhostUser, state: &VirtioPciStateV1) -> Carried<Vec<UnansweredV1>> {
    let mut all = Vec::new();
    for queue in &state.queues {
        let Some(progress) = &queue.progress else { continue };
        let open = progress.next_avail.wrapping_sub(progress.next_used);
        if open == 0 {
            continue;
        }
        let heads = served.unanswered(progress.index, queue.size)?;
        if heads.len() != usize::from(open) {
            return Err(UNKNOWN.into());
        }
        all.push(UnansweredV1 {
            queue: progress.index,
            heads,
        });
    }
    Ok(all)
}

/// Disks and interfaces have all their state in what the guest negotiated; daemons of other devices have to tell theirs.
fn save_daemon(id: &str, kind: DeviceId, served: &mut VhostUser, payloads: &mut Payloads) -> Carried<()> {
    let needed = !matches!(kind, DeviceId::Block | DeviceId::Net);
    if !needed && served.handle().status().state != LinkState::Connected {
        // The guest stands still: a daemon that hangs is not tried again now.
        return Ok(());
    }
    let limits = StateLimits {
        bytes: DAEMON_BYTES,
        ..StateLimits::default()
    };
    let mut bytes = Vec::new();
    match served.save_state(&mut bytes, &limits) {
        Ok(_) => Ok(payloads.put(DAEMON, id, &HexBytes(bytes))?),
        Err(StateError::Unable | StateError::NoDaemon) if !needed => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl SavedDevices {
    /// Makes the root ports that were there, before anything is below them, and tells where devices were, by their ids.
    pub(crate) fn places(&self, root: &PciRoot) -> Result<BTreeMap<String, PciAddress>, MachineError> {
        for (slot, bytes) in &self.pci.ports {
            let port = root.restore_port(*slot, &bytes.0);
            port.map_err(|source| MachineError::Slot {
                id: format!("_root-port-{slot:02x}"),
                source,
            })?;
        }
        let place = |(id, place): (&String, &FunctionPlaceV1)| match place.address.parse() {
            Ok(address) => Ok((id.clone(), address)),
            Err(_) => Err(carry(
                id,
                format!("it was at '{}', which is no place", place.address).into(),
            )),
        };
        self.pci.functions.iter().map(place).collect()
    }

    /// Makes `device`, which is new and called `id`, the function that was saved.
    pub(crate) fn function(
        &mut self,
        id: &str,
        mut device: Box<dyn VirtioDevice>,
        memory: DeviceMemory,
        host: &Host,
    ) -> Result<VirtioPci, MachineError> {
        let state: VirtioPciStateV1 = self.payloads.take(FUNCTION, id)?;
        let failed = |source| carry(id, source);
        restore_before(id, &mut *device, &mut self.payloads).map_err(failed)?;
        let function = VirtioPci::restore(
            device,
            memory,
            host.router.clone(),
            host.io_events.clone(),
            host.sandbox.clone(),
            &state,
        );
        let function = function.map_err(|error| failed(error.into()))?;
        function
            .with_device(|device| restore_after(id, device, &mut self.payloads))
            .map_err(failed)?;
        Ok(function)
    }

    /// Ends with the bus itself. Nothing saved may be left.
    pub(crate) fn finish(self, root: &PciRoot) -> Result<(), PayloadError> {
        let bridge = PciAddress::from_devfn(root.segment(), 0, 0);
        for register in BRIDGE_REGISTERS {
            if let Some(bytes) = self.pci.bridge.0.get(register.clone()) {
                root.config_write(bridge, register.start as u16, bytes);
            }
        }
        for place in self.pci.functions.values().filter(|place| place.touched) {
            if let Ok(address) = place.address.parse() {
                root.touch(address);
            }
        }
        self.payloads.finish()
    }
}

/// The host bridge's registers.
pub(crate) fn bridge(root: &PciRoot) -> HexBytes {
    let mut bytes = [0; BRIDGE];
    root.config_read(PciAddress::from_devfn(root.segment(), 0, 0), 0, &mut bytes);
    HexBytes(bytes.to_vec())
}

impl PciStateV1 {
    pub(crate) fn new(root: &PciRoot, functions: BTreeMap<String, FunctionPlaceV1>) -> Self {
        Self {
            bridge: bridge(root),
            functions,
            ports: root
                .ports()
                .into_iter()
                .map(|(slot, bytes)| (slot, HexBytes(bytes)))
                .collect(),
        }
    }
}

/// What a device has to know before its driver is there.
fn restore_before(id: &str, device: &mut (dyn VirtioDevice + 'static), payloads: &mut Payloads) -> Carried<()> {
    let device: &mut dyn Any = device;
    if let Some(net) = device.downcast_mut::<Net>() {
        net.restore(payloads.take(NET, id)?);
    } else if let Some(balloon) = device.downcast_mut::<Balloon>() {
        balloon.restore(&payloads.take(BALLOON, id)?);
    } else if let Some(mem) = device.downcast_mut::<Mem>() {
        mem.restore(&payloads.take(MEM, id)?)?;
    } else if let Some(iommu) = device.downcast_mut::<VirtioIommu>() {
        iommu.restore(&payloads.take(IOMMU, id)?)?;
    } else if let Some(served) = device.downcast_ref::<VhostUser>() {
        // Snapshots of former versions have none.
        if let Some(port) = payloads.take_if_there(NET, id)? {
            served.restore_port(port);
        }
    } else if let Some(vsock) = device.downcast_mut::<Vsock>() {
        vsock.restore();
    }
    Ok(())
}

/// What it can take over once the driver is, and before its queues start.
fn restore_after(id: &str, device: &mut (dyn VirtioDevice + 'static), payloads: &mut Payloads) -> Carried<()> {
    let device: &mut dyn Any = device;
    if let Some(disk) = device.downcast_mut::<Block>() {
        disk.restore(&payloads.take(BLOCK, id)?)?;
    } else if let Some(served) = device.downcast_mut::<VhostUser>() {
        if let Some(written) = payloads.take_if_there(WRITTEN, id)? {
            served.write_again(&written);
        }
        if let Some(HexBytes(bytes)) = payloads.take_if_there(DAEMON, id)? {
            served.load_state(&mut bytes.as_slice(), &StateLimits::default())?;
        }
        let open: Option<Vec<UnansweredV1>> = payloads.take_if_there(UNANSWERED, id)?;
        for UnansweredV1 { queue, heads } in open.into_iter().flatten() {
            served.reopen(queue, heads);
        }
    }
    Ok(())
}
