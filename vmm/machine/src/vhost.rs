//! Devices that daemons serve over vhost-user.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use triarch_api::events::{EventLog, kind};
use triarch_api::{DeviceLink, DiskConfig, LinkState};
use triarch_device_core::Sandbox;
use triarch_vhost_user::{self as vhost, DiskOptions, DiskPeer, LinkStatus, OnDisconnect, VhostUserBlock};

use crate::build::Report;
use crate::{GuestEvent, MachineError};

/// Finds the daemon of a disk.
pub(crate) fn open_disk(config: &DiskConfig, sandbox: &Arc<dyn Sandbox>) -> Result<Arc<DiskPeer>, MachineError> {
    let options = DiskOptions {
        socket: config.vhost_socket.clone().unwrap_or_default(),
        queues: config.num_queues,
        queue_size: config.queue_size,
        readonly: config.readonly,
        on_disconnect: match config.on_disconnect {
            triarch_api::OnDisconnect::Stall => OnDisconnect::Stall,
            triarch_api::OnDisconnect::ErrorAfter(seconds) => {
                OnDisconnect::ErrorAfter(Duration::from_secs(seconds.into()))
            }
        },
    };
    let id = config.id.as_deref().unwrap_or_default();
    DiskPeer::open(id, options, sandbox).map_err(|error| MachineError::device(&config.id, error))
}

/// A disk that `peer` serves; what becomes of the connection is reported.
pub(crate) fn disk(
    id: &str,
    peer: &Arc<DiskPeer>,
    sandbox: &Arc<dyn Sandbox>,
    report: &Report,
    events: &Arc<EventLog>,
) -> Result<VhostUserBlock, vhost::PeerError> {
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
    VhostUserBlock::new(id, peer.clone(), sandbox, Arc::new(notify))
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
        reason: status.reason,
        since: since.as_secs(),
        reconnects: status.reconnects,
        resubmitted: status.resubmitted,
    }
}
