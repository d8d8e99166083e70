//! Devices from their configurations.

use std::sync::Arc;

use triarch_api::events::{EventLog, kind};
use triarch_api::{BalloonConfig, NetConfig, RngConfig, VsockConfig};
use triarch_memory::Discarder;
use triarch_net::Tap;
use triarch_virtio::balloon::{Balloon, BalloonOptions};
use triarch_virtio::net::{Net, NetCounters, NetOptions, OffloadGroups};
use triarch_virtio::vsock::{Vsock, VsockOptions};
use triarch_virtio::{DeviceEvent, EntropySource, Observer, VirtioDevice, VirtioRng};

use super::Made;
use crate::GuestEvent;
use crate::build::Report;

/// Makes what happens to the device called `id` an event.
pub(super) fn observer(events: &Arc<EventLog>, id: &str) -> Observer {
    let (events, id) = (events.clone(), id.to_owned());
    Box::new(move |event| {
        let kind = match event {
            DeviceEvent::Activated => &kind::DEVICE_ACTIVATED,
            DeviceEvent::Reset => &kind::DEVICE_RESET,
            DeviceEvent::Broken => &kind::DEVICE_BROKEN,
        };
        events.post_guest(&id, kind, &[("id", id.as_str().into())]);
    })
}

pub(super) fn network(id: &str, config: &NetConfig, tap: &Arc<Tap>, counters: &NetCounters) -> Made<Net> {
    let options = NetOptions {
        id: id.to_owned(),
        mac: config.mac.map(|m| m.0).unwrap_or_default(),
        mtu: config.mtu,
        queue_size: config.queue_size,
        offloads: offloads(config),
    };
    Ok(Net::counting(options, tap.clone(), counters.clone())?)
}

/// The offloads that an interface may have.
pub(crate) fn offloads(config: &NetConfig) -> OffloadGroups {
    OffloadGroups {
        csum: config.offload_csum,
        tso: config.offload_tso,
        ufo: config.offload_ufo,
    }
}

pub(super) fn rng(id: &str, config: &RngConfig) -> Made<Box<dyn VirtioDevice>> {
    Ok(Box::new(VirtioRng::new(id, EntropySource::open(&config.src)?)))
}

pub(super) fn balloon(id: &str, config: &BalloonConfig, discarder: Discarder, report: Report) -> Made<Balloon> {
    let options = BalloonOptions {
        size: config.size,
        deflate_on_oom: config.deflate_on_oom,
        free_page_reporting: config.free_page_reporting,
    };
    let observer = Box::new(move || report(GuestEvent::Balloon));
    Ok(Balloon::new(id, options, discarder, observer)?)
}

pub(super) fn vsock(id: &str, config: &VsockConfig) -> Made<Vsock> {
    let options = VsockOptions {
        id: id.to_owned(),
        cid: u32::try_from(config.cid)?,
        socket: config.socket.clone(),
        max_connections: VsockOptions::DEFAULT_CONNECTIONS,
    };
    Ok(Vsock::new(&options)?)
}
