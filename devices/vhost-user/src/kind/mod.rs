//! What differs between the kinds of device that daemons serve. A new kind is one more module with one more implementation of [`Kind`];
//! connections, rings and what happens without a daemon are the same for all.

mod block;
mod fs;
mod generic;
mod net;

use std::io;
use std::sync::Arc;

pub use block::DaemonBlock;
pub use fs::DaemonFs;
pub use generic::DaemonGeneric;
pub use net::{DaemonNet, NetOptions};
use triarch_device_core::{Event, Sandbox};
use triarch_memory::GuestMemory;
use triarch_vhost_protocol::{PROTOCOL_FEATURES, Request};
use triarch_virtio::net::NetStateV1;
use triarch_virtio::{Chain, DeviceContext, DeviceId, VirtQueue, feature, feature_names};

use crate::{LinkError, LinkState};

/// Features of the rings.
const RING_FEATURES: u64 = feature::INDIRECT_DESC | feature::EVENT_IDX | feature::RING_RESET;

/// What a daemon said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Its virtio features; of those of rings, the ones that the device has with it.
    pub features: u64,
    /// How many queues it serves at most; for network interfaces pairs of queues.
    pub queues: u64,
    /// As much of its configuration space as was asked for; empty if it tells nothing of it.
    pub config: Vec<u8>,
}

impl Offer {
    /// The 32-bit number at byte `at` of the configuration space; 0 past its end.
    pub(crate) fn number(&self, at: usize) -> u32 {
        let bytes = self.config.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    }
}

/// A number that a daemon is told.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// The protocol feature that it must have for that.
    pub(crate) needs: u64,
    pub(crate) request: Request,
    pub(crate) value: u64,
}

/// A request that a daemon completed.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// Bytes that the driver gave.
    pub readable: u32,
    /// Where the first byte is that could be written (GPA); 0 if there is none.
    pub writable: u64,
    /// Bytes that the daemon says it wrote, no more than it could.
    pub written: u32,
}

/// A queue that the VMM serves itself: ends that, and gives the queue back.
pub type Own = Box<dyn FnOnce() -> Option<VirtQueue> + Send>;

/// A kind of device, and what the configuration of the VM asks of this one.
///
/// Sentences that say why a daemon cannot be taken begin with "it", the daemon, or "its".
pub trait Kind: Send + Sync {
    /// The type of device the guest sees.
    fn id(&self) -> DeviceId;

    /// What people call it, for sentences: "disk".
    fn noun(&self) -> &'static str;

    /// The largest size of each queue that the daemon serves.
    fn queue_sizes(&self) -> &[u16];

    /// How many queues it has, counted as daemons of this kind count those they serve.
    fn queues(&self) -> u64 {
        self.queue_sizes().len() as u64
    }

    /// Protocol features that are of use to it beside those that all devices have.
    fn protocol(&self) -> u64 {
        0
    }

    /// How many bytes of its configuration space a daemon is asked for beforehand; 0 for none.
    fn config_length(&self) -> usize;

    /// Whether such a device can be made of what a daemon offers; if not, why.
    fn check(&self, offer: &Offer) -> Result<(), String>;

    /// Features of the device type that a guest is offered. Those of rings are no matter of the kind.
    fn features(&self, offer: &Offer) -> u64;

    /// The configuration space as a guest reads it before it writes to it.
    fn config(&self, offer: &Offer) -> Vec<u8>;

    /// Whether a guest that was shown `known` can go on with a daemon that offers `now`; if not, why. That no feature is lacking was
    /// seen to.
    fn continues(&self, known: &Offer, now: &Offer) -> Result<(), String>;

    /// What is written into the daemon's configuration space for a driver that agreed to `features`, before it writes to it itself: bytes
    /// and where they begin.
    fn first_write(&self, _known: &Offer, _features: u64) -> Option<(usize, Vec<u8>)> {
        None
    }

    /// Whether a driver that agreed to `features` may write `data` to byte `at` of the configuration space.
    fn writable(&self, _features: u64, _at: usize, _data: &[u8]) -> bool {
        false
    }

    /// Whether each access of the driver to the configuration space goes to the daemon, as nobody else knows what it means.
    fn asks(&self) -> bool {
        false
    }

    /// The device's first daemon offers this, and was taken.
    fn adopt(&self, _offer: &Offer) {}

    /// A driver came. Whoever has something new for a daemon rings `wake`.
    fn attach(&self, _context: &DeviceContext, _wake: &Event) {}

    /// The driver is gone.
    fn detach(&self) {}

    /// How the device stands with its daemon now.
    fn link(&self, _state: LinkState) {}

    /// Whether the daemon works on queue `queue`. It has its ring all the same.
    fn enabled(&self, _queue: u16) -> bool {
        true
    }

    /// What each daemon is told once the driver has agreed to `features`.
    fn settings(&self, _features: u64) -> Vec<Setting> {
        Vec::new()
    }

    /// What the VMM itself keeps of it for the driver, for a snapshot.
    fn port(&self) -> Option<NetStateV1> {
        None
    }

    /// The next driver continues from that.
    fn restore_port(&self, _state: NetStateV1) {}

    /// The guest's place in the network is another one: it is told.
    fn announce(&self) {}

    /// A daemon took over from another one while a driver was there: what it is told beside that.
    fn returned(&self) -> Vec<Setting> {
        Vec::new()
    }

    /// Which queue the VMM serves itself for a driver that agreed to `features`. It comes behind those that the daemon serves; drivers may
    /// know of fewer of these.
    fn own_queue(&self, _features: u64) -> Option<u16> {
        None
    }

    /// Descriptors of that queue.
    fn own_queue_size(&self) -> Option<u16> {
        None
    }

    /// Serves it, for the device called `id`.
    fn serve(&self, _id: &str, _queue: VirtQueue, _sandbox: &Arc<dyn Sandbox>) -> io::Result<Own> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Whether requests of queue `queue` are answered by and by. If not, they are buffers that wait for what the daemon has to say: nobody
    /// waits for them, and they never fail.
    fn answers(&self, _queue: u16) -> bool {
        true
    }

    /// Whether a daemon that works on the guest's rings must keep a record of the requests it has. Where it need not, the used ring tells:
    /// daemons complete requests in the order in which they came, and one that is lost or done twice is no harm.
    fn needs_record(&self) -> bool {
        true
    }

    /// Answers a request of queue `queue` in the daemon's place, when there is none for too long: the number of bytes written.
    fn refuse(&self, queue: u16, request: &Chain, memory: &GuestMemory) -> u32;

    /// Takes note of a request of queue `queue` that a daemon completed.
    fn done(&self, _queue: u16, _request: &Done, _memory: &GuestMemory) {}
}

/// Whether a device of this kind can be made of what a daemon offers; if not, why.
pub(crate) fn check(kind: &dyn Kind, offer: &Offer) -> Result<(), LinkError> {
    let unfit = |text: &str| Err(LinkError::Unfit(text.into()));
    if offer.features & feature::VERSION_1 == 0 {
        return unfit("it does not offer VIRTIO_F_VERSION_1");
    }
    if offer.features & PROTOCOL_FEATURES == 0 {
        return unfit("it does not know protocol features (VHOST_USER_F_PROTOCOL_FEATURES)");
    }
    if offer.queues < kind.queues() {
        return Err(LinkError::Unfit(format!(
            "it serves {} queues, the {} has {}; set num_queues on one of the sides",
            offer.queues,
            kind.noun(),
            kind.queues()
        )));
    }
    kind.check(offer).map_err(LinkError::Unfit)
}

/// Whether a guest that was shown `known` can go on with a daemon that offers `now`; if not, why.
pub(crate) fn continues(kind: &dyn Kind, known: &Offer, now: &Offer) -> Result<(), LinkError> {
    check(kind, now)?;
    let missing = features(kind, known) & !features(kind, now);
    if missing != 0 {
        let text = format!("it no longer offers {}", feature_names(kind.id(), missing));
        return Err(LinkError::Unfit(text));
    }
    kind.continues(known, now).map_err(LinkError::Unfit)
}

/// All features a guest is offered.
pub(crate) fn features(kind: &dyn Kind, offer: &Offer) -> u64 {
    kind.features(offer) | offer.features & RING_FEATURES | feature::VERSION_1
}
