//! Devices that daemons serve over vhost-user.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use triarch_api::events::{EventLog, kind};
use triarch_api::server::Listener;
use triarch_api::{
    DeviceLink, DiskConfig, FsConfig, GenericVhostUserConfig, LinkPath, LinkState, NetConfig, VhostMode,
};
use triarch_device_core::Sandbox;
use triarch_vhost_user::{
    self as vhost, DaemonBlock, DaemonFs, DaemonGeneric, DaemonNet, DataPath, Endpoint, Kind, LinkStatus, NetOptions,
    Offer, OnDisconnect, Peer, PeerOptions, VhostUser,
};
use triarch_virtio::net::NetCounters;

use crate::build::Report;
use crate::devices::offloads;
use crate::identity::random_mac;
use crate::{GuestEvent, MachineError};

/// Finds the daemon of a disk at `socket`. A guest that comes from another VMM was `shown` another one.
pub(crate) fn open_disk(
    config: &DiskConfig,
    socket: Option<&Path>,
    shown: Option<Offer>,
    sandbox: &Arc<dyn Sandbox>,
) -> Result<Arc<Peer>, MachineError> {
    let kind = DaemonBlock::new(config.num_queues, config.queue_size, config.readonly);
    let endpoint = endpoint(&config.id, socket, config.vhost_mode)?;
    let options = peer(endpoint, config.on_disconnect, config.datapath);
    open(&config.id, Arc::new(kind), options, shown, sandbox)
}

/// Finds the daemon of an interface at `socket`; its packets are counted in `counters`.
pub(crate) fn open_net(
    config: &NetConfig,
    socket: Option<&Path>,
    counters: NetCounters,
    shown: Option<Offer>,
    sandbox: &Arc<dyn Sandbox>,
) -> Result<Arc<Peer>, MachineError> {
    let options = NetOptions {
        pairs: config.num_queues / 2,
        queue_size: config.queue_size,
        mac: config.mac.map(|mac| mac.0),
        fallback_mac: random_mac()?.0,
        mtu: config.mtu,
        offloads: offloads(config),
    };
    let kind = DaemonNet::new(options, counters);
    let endpoint = endpoint(&config.id, socket, config.vhost_mode)?;
    let options = peer(endpoint, config.on_disconnect, config.datapath);
    open(&config.id, Arc::new(kind), options, shown, sandbox)
}

/// Finds the daemon of a file system.
pub(crate) fn open_fs(
    config: &FsConfig,
    shown: Option<Offer>,
    sandbox: &Arc<dyn Sandbox>,
) -> Result<Arc<Peer>, MachineError> {
    let kind = DaemonFs::new(&config.tag, config.num_queues, config.queue_size);
    let options = peer(config.socket.clone().into(), config.on_disconnect, config.datapath);
    open(&config.id, Arc::new(kind), options, shown, sandbox)
}

/// Finds the daemon of any other device.
pub(crate) fn open_generic(
    config: &GenericVhostUserConfig,
    shown: Option<Offer>,
    sandbox: &Arc<dyn Sandbox>,
) -> Result<Arc<Peer>, MachineError> {
    // A valid one is below 64.
    let id = u16::try_from(config.device_type).unwrap_or(u16::MAX);
    let kind = DaemonGeneric::new(id, config.queue_sizes.clone());
    let stall = triarch_api::OnDisconnect::Stall;
    let options = peer(config.socket.clone().into(), stall, config.datapath);
    open(&config.id, Arc::new(kind), options, shown, sandbox)
}

/// Where a daemon is met. A socket that the VMM listens on is there as long as the device is configured.
fn endpoint(id: &Option<String>, socket: Option<&Path>, mode: VhostMode) -> Result<Endpoint, MachineError> {
    let path = socket.map(Path::to_owned).unwrap_or_default();
    match mode {
        VhostMode::Client => Ok(path.into()),
        VhostMode::Server => {
            let listener = Listener::bind(&path).map_err(|error| MachineError::device(id, error))?;
            Ok(Endpoint::accept(path, Arc::new(listener)))
        }
    }
}

fn peer(endpoint: Endpoint, on_disconnect: triarch_api::OnDisconnect, datapath: triarch_api::DataPath) -> PeerOptions {
    PeerOptions {
        endpoint,
        data_path: match datapath {
            triarch_api::DataPath::Auto => DataPath::Auto,
            triarch_api::DataPath::Direct => DataPath::Direct,
            triarch_api::DataPath::Relay => DataPath::Relay,
        },
        on_disconnect: match on_disconnect {
            triarch_api::OnDisconnect::Stall => OnDisconnect::Stall,
            triarch_api::OnDisconnect::ErrorAfter(seconds) => {
                OnDisconnect::ErrorAfter(Duration::from_secs(seconds.into()))
            }
        },
    }
}

fn open(
    id: &Option<String>,
    kind: Arc<dyn Kind>,
    options: PeerOptions,
    shown: Option<Offer>,
    sandbox: &Arc<dyn Sandbox>,
) -> Result<Arc<Peer>, MachineError> {
    let name = id.as_deref().unwrap_or_default();
    Peer::open(name, options, kind, shown, sandbox).map_err(|error| MachineError::device(id, error))
}

/// The device that `peer` serves; what becomes of the connection is reported.
pub(crate) fn device(
    id: &str,
    peer: &Arc<Peer>,
    sandbox: &Arc<dyn Sandbox>,
    report: &Report,
    events: &Arc<EventLog>,
) -> Result<VhostUser, vhost::PeerError> {
    let (report, events, name) = (report.clone(), events.clone(), id.to_owned());
    let notify = move |status: &LinkStatus| {
        report(GuestEvent::Link);
        let id = ("id", name.as_str().into());
        let reason = ("reason", status.reason.as_deref().unwrap_or_default().into());
        // A daemon may come and go as fast as it likes.
        match status.state {
            vhost::LinkState::Connected => events.post_guest(&name, &kind::DEVICE_CONNECTED, &[id]),
            vhost::LinkState::Disconnected => events.post_guest(&name, &kind::DEVICE_DISCONNECTED, &[id, reason]),
            vhost::LinkState::Failing => events.post_guest(&name, &kind::DEVICE_FAILING, &[id, reason]),
        }
    };
    VhostUser::new(id, peer.clone(), sandbox, Arc::new(notify))
}

/// The same for clients.
pub(crate) fn link(status: LinkStatus) -> DeviceLink {
    let since = status.since.duration_since(UNIX_EPOCH).unwrap_or_default();
    DeviceLink {
        state: match status.state {
            vhost::LinkState::Connected => LinkState::Connected,
            vhost::LinkState::Disconnected => LinkState::Disconnected,
            vhost::LinkState::Failing => LinkState::Failing,
        },
        datapath: if status.direct {
            LinkPath::Direct
        } else {
            LinkPath::Relay
        },
        reason: status.reason,
        since: since.as_secs(),
        reconnects: status.reconnects,
        resubmitted: status.resubmitted,
    }
}
