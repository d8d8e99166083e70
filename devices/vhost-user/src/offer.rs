//! What a daemon offers, and whether one that came back is still the guest's.

use triarch_virtio::{block_feature, feature};

use crate::LinkError;
use crate::message::PROTOCOL_FEATURES;

/// Bytes of a block device's configuration space that are shown to guests (virtio 1.2, 5.2.4, up to write_zeroes_may_unmap).
pub(crate) const BLOCK_CONFIG: usize = 60;
/// Offset of `seg_max`.
const SEG_MAX: usize = 12;
/// Offset of `blk_size`.
const BLK_SIZE: usize = 20;
/// Offset of `writeback`.
pub(crate) const WRITEBACK: usize = 32;
/// Offset of `num_queues`.
const NUM_QUEUES: usize = 34;

/// Features of disks that need nothing of the front end.
const BLOCK_FEATURES: u64 = block_feature::SIZE_MAX
    | block_feature::SEG_MAX
    | block_feature::GEOMETRY
    | block_feature::RO
    | block_feature::BLK_SIZE
    | block_feature::FLUSH
    | block_feature::TOPOLOGY
    | block_feature::CONFIG_WCE
    | block_feature::MQ
    | block_feature::DISCARD
    | block_feature::WRITE_ZEROES;

/// What a daemon said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Offer {
    /// Its virtio features.
    pub(crate) features: u64,
    /// Rings it serves at most.
    pub(crate) queues: u64,
    /// Its configuration space.
    pub(crate) config: Vec<u8>,
}

/// What the configuration of the VM asks of a disk's daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Demand {
    pub(crate) queues: u16,
    pub(crate) queue_size: u16,
    pub(crate) readonly: bool,
}

impl Offer {
    /// Whether a disk as `demand` asks can be made of it; if not, why.
    pub(crate) fn check(&self, demand: &Demand) -> Result<(), LinkError> {
        let unfit = |text: String| Err(LinkError::Unfit(text));
        if self.features & feature::VERSION_1 == 0 {
            return unfit("it does not offer VIRTIO_F_VERSION_1".into());
        }
        if self.features & PROTOCOL_FEATURES == 0 || self.config.len() < BLOCK_CONFIG {
            return unfit("it does not tell its configuration space (protocol feature CONFIG)".into());
        }
        if self.queues < u64::from(demand.queues) {
            return unfit(format!(
                "it serves {} queues, the disk has {}; set num_queues on one of the sides",
                self.queues, demand.queues
            ));
        }
        if demand.queues > 1 && self.features & block_feature::MQ == 0 {
            return unfit("it does not offer VIRTIO_BLK_F_MQ, which a disk with several queues needs".into());
        }
        if demand.readonly && self.features & block_feature::RO == 0 {
            return unfit("it offers a disk that can be written, and readonly=on was asked for".into());
        }
        Ok(())
    }

    /// Features a guest is offered.
    pub(crate) fn guest_features(&self, demand: &Demand) -> u64 {
        let mut features = self.features & (BLOCK_FEATURES | feature::INDIRECT_DESC);
        if demand.queues == 1 {
            features &= !block_feature::MQ;
        }
        // These the relay does itself, whatever the daemon can.
        features | feature::VERSION_1 | feature::EVENT_IDX | feature::RING_RESET
    }

    /// The configuration space as a guest reads it.
    pub(crate) fn guest_config(&self, demand: &Demand) -> Vec<u8> {
        let mut config = self.config.clone();
        config.truncate(BLOCK_CONFIG);
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(field) = config.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        };
        put(NUM_QUEUES, &demand.queues.to_le_bytes());
        // A request has a header and a status beside its data.
        let most = u32::from(demand.queue_size.saturating_sub(2).max(1));
        put(SEG_MAX, &self.number(SEG_MAX).clamp(1, most).to_le_bytes());
        config
    }

    /// Bytes of the disk.
    pub(crate) fn capacity(&self) -> u64 {
        u64::from(self.number(0)) << 9 | u64::from(self.number(4)) << 41
    }

    /// Whether writes may stay in the daemon's cache.
    pub(crate) fn writeback(&self) -> bool {
        self.config.get(WRITEBACK).is_some_and(|byte| *byte != 0)
    }

    /// Whether a guest that was shown `known` can go on with this daemon; if not, why.
    pub(crate) fn continues(&self, known: &Self, demand: &Demand) -> Result<(), LinkError> {
        self.check(demand)?;
        let unfit = |text: String| Err(LinkError::Unfit(text));
        let shown = known.guest_features(demand);
        let missing = shown & !self.guest_features(demand);
        if missing != 0 {
            return unfit(format!("it no longer offers the features {missing:#x}"));
        }
        if self.guest_features(demand) & !shown & block_feature::RO != 0 {
            return unfit("its disk can no longer be written".into());
        }
        if self.capacity() < known.capacity() {
            return unfit(format!(
                "its disk has {} bytes, the guest knows one of {}",
                self.capacity(),
                known.capacity()
            ));
        }
        if shown & block_feature::BLK_SIZE != 0 && self.number(BLK_SIZE) != known.number(BLK_SIZE) {
            return unfit(format!(
                "its blocks have {} bytes, the guest knows ones of {}",
                self.number(BLK_SIZE),
                known.number(BLK_SIZE)
            ));
        }
        Ok(())
    }

    fn number(&self, at: usize) -> u32 {
        let bytes = self.config.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMAND: Demand = Demand {
        queues: 2,
        queue_size: 64,
        readonly: false,
    };

    fn offer() -> Offer {
        let mut config = vec![0; BLOCK_CONFIG];
        config[..8].copy_from_slice(&2048u64.to_le_bytes());
        config[SEG_MAX..SEG_MAX + 4].copy_from_slice(&126u32.to_le_bytes());
        config[BLK_SIZE..BLK_SIZE + 4].copy_from_slice(&512u32.to_le_bytes());
        Offer {
            features: PROTOCOL_FEATURES
                | feature::VERSION_1
                | block_feature::MQ
                | block_feature::FLUSH
                | block_feature::BLK_SIZE,
            queues: 4,
            config,
        }
    }

    fn refusal(edit: impl Fn(&mut Offer)) -> String {
        let mut again = offer();
        edit(&mut again);
        again.continues(&offer(), &DEMAND).expect_err("refused").to_string()
    }

    #[test]
    fn what_a_guest_sees_fits_its_queues() {
        let config = offer().guest_config(&DEMAND);
        assert_eq!(config[NUM_QUEUES..NUM_QUEUES + 2], [2, 0]);
        assert_eq!(config[SEG_MAX..SEG_MAX + 4], [62, 0, 0, 0]);
        assert_eq!(offer().capacity(), 1 << 20);
        let one = Demand { queues: 1, ..DEMAND };
        assert_eq!(offer().guest_features(&one) & block_feature::MQ, 0);
    }

    #[test]
    fn the_same_or_more_goes_on() {
        offer().continues(&offer(), &DEMAND).expect("the same");
        let mut more = offer();
        more.features |= block_feature::DISCARD;
        more.queues = 9;
        more.config[..8].copy_from_slice(&4096u64.to_le_bytes());
        more.continues(&offer(), &DEMAND).expect("more");
    }

    #[test]
    fn less_is_refused_by_name() {
        assert!(refusal(|o| o.queues = 1).contains("serves 1 queues, the disk has 2"));
        assert!(refusal(|o| o.config[..8].copy_from_slice(&2047u64.to_le_bytes())).contains("1048064 bytes"));
        assert!(refusal(|o| o.features &= !block_feature::FLUSH).contains("features 0x200"));
        assert!(refusal(|o| o.features |= block_feature::RO).contains("no longer be written"));
        assert!(refusal(|o| o.config[BLK_SIZE + 1] = 16).contains("blocks have 4096 bytes"));
        assert!(refusal(|o| o.features &= !feature::VERSION_1).contains("VERSION_1"));
        assert!(refusal(|o| o.config.clear()).contains("CONFIG"));
        assert!(refusal(|o| o.features &= !block_feature::MQ).contains("VIRTIO_BLK_F_MQ"));
    }
}
