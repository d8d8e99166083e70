//! What differs between the kinds of device that daemons serve. A new kind is one more module with one more implementation of [`Kind`];
//! connections, rings and what happens without a daemon are the same for all.

mod block;

pub use block::DaemonBlock;
use triarch_memory::GuestMemory;
use triarch_virtio::{Chain, DeviceId, feature};

use crate::LinkError;
use crate::message::PROTOCOL_FEATURES;

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

    /// How many bytes of its configuration space the daemon is asked for; 0 if the guest sees nothing of it.
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
    fn first_write(&self, known: &Offer, features: u64) -> Option<(usize, Vec<u8>)>;

    /// Whether a driver that agreed to `features` may write `data` to byte `at` of the configuration space.
    fn writable(&self, features: u64, at: usize, data: &[u8]) -> bool;

    /// Whether a daemon that works on the guest's rings must keep a record of the requests it has. Where it need not, the used ring tells:
    /// daemons complete requests in the order in which they came, and one that is lost or done twice is no harm.
    fn needs_record(&self) -> bool {
        true
    }

    /// Answers a request of queue `queue` in the daemon's place, when there is none for too long: the number of bytes written. `None` if
    /// it is no request that waits for an answer: it is kept.
    fn refuse(&self, queue: u16, request: &Chain, memory: &GuestMemory) -> Option<u32>;
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
        let text = format!("it no longer offers the features {missing:#x}");
        return Err(LinkError::Unfit(text));
    }
    kind.continues(known, now).map_err(LinkError::Unfit)
}

/// All features a guest is offered.
pub(crate) fn features(kind: &dyn Kind, offer: &Offer) -> u64 {
    kind.features(offer) | offer.features & RING_FEATURES | feature::VERSION_1
}
