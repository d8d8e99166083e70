//! Disks (virtio 1.2, 5.2).

use std::io::Write;

use triarch_memory::GuestMemory;
use triarch_virtio::{Chain, DeviceId, block_feature};

use super::{Kind, Offer};

/// Bytes of the configuration space that are shown to guests (5.2.4, up to write_zeroes_may_unmap).
pub(crate) const CONFIG: usize = 60;
/// Offset of `seg_max`.
const SEG_MAX: usize = 12;
/// Offset of `blk_size`.
const BLK_SIZE: usize = 20;
/// Offset of `writeback`.
const WRITEBACK: usize = 32;
/// Offset of `num_queues`.
const NUM_QUEUES: usize = 34;
/// VIRTIO_BLK_S_IOERR (5.2.6).
const IO_ERROR: u8 = 1;

/// Features that need nothing of the front end.
const FEATURES: u64 = block_feature::SIZE_MAX
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

/// A disk that a daemon serves.
#[derive(Debug, Clone)]
pub struct DaemonBlock {
    sizes: Vec<u16>,
    readonly: bool,
}

impl DaemonBlock {
    /// A disk of `queues` queues, each with `queue_size` descriptors: a power of two from 4 to 1024. With `readonly` the daemon must not
    /// let it be written.
    pub fn new(queues: u16, queue_size: u16, readonly: bool) -> Self {
        Self {
            sizes: vec![queue_size; queues.into()],
            readonly,
        }
    }
}

/// Bytes of the disk.
fn capacity(offer: &Offer) -> u64 {
    u64::from(offer.number(0)) << 9 | u64::from(offer.number(4)) << 41
}

impl Kind for DaemonBlock {
    fn id(&self) -> DeviceId {
        DeviceId::Block
    }

    fn noun(&self) -> &'static str {
        "disk"
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config_length(&self) -> usize {
        CONFIG
    }

    fn check(&self, offer: &Offer) -> Result<(), String> {
        let unfit = |text: &str| Err(text.to_owned());
        if offer.config.len() < CONFIG {
            return unfit("it does not tell its configuration space (protocol feature CONFIG)");
        }
        if self.sizes.len() > 1 && offer.features & block_feature::MQ == 0 {
            return unfit("it does not offer VIRTIO_BLK_F_MQ, which a disk with several queues needs");
        }
        if self.readonly && offer.features & block_feature::RO == 0 {
            return unfit("it offers a disk that can be written, and readonly=on was asked for");
        }
        Ok(())
    }

    fn features(&self, offer: &Offer) -> u64 {
        let features = offer.features & FEATURES;
        match self.sizes.len() {
            1 => features & !block_feature::MQ,
            _ => features,
        }
    }

    fn config(&self, offer: &Offer) -> Vec<u8> {
        let mut config = offer.config.clone();
        config.truncate(CONFIG);
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(field) = config.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        };
        put(NUM_QUEUES, &(self.sizes.len() as u16).to_le_bytes());
        // A request has a header and a status beside its data.
        let size = self.sizes.first().copied().unwrap_or(0);
        let most = u32::from(size.saturating_sub(2).max(1));
        put(SEG_MAX, &offer.number(SEG_MAX).clamp(1, most).to_le_bytes());
        config
    }

    fn continues(&self, known: &Offer, now: &Offer) -> Result<(), String> {
        if self.features(now) & !self.features(known) & block_feature::RO != 0 {
            return Err("its disk can no longer be written".into());
        }
        if capacity(now) < capacity(known) {
            return Err(format!(
                "its disk has {} bytes, the guest knows one of {}",
                capacity(now),
                capacity(known)
            ));
        }
        let sized = self.features(known) & block_feature::BLK_SIZE != 0;
        if sized && now.number(BLK_SIZE) != known.number(BLK_SIZE) {
            return Err(format!(
                "its blocks have {} bytes, the guest knows ones of {}",
                now.number(BLK_SIZE),
                known.number(BLK_SIZE)
            ));
        }
        Ok(())
    }

    fn first_write(&self, known: &Offer, features: u64) -> Option<(usize, Vec<u8>)> {
        // Without a way to flush or to choose, every write has to be durable (5.2.6.2).
        let durable = features & (block_feature::FLUSH | block_feature::CONFIG_WCE) == 0;
        let cached = known.config.get(WRITEBACK).is_some_and(|byte| *byte != 0);
        let can = known.features & block_feature::CONFIG_WCE != 0;
        can.then(|| (WRITEBACK, vec![u8::from(cached && !durable)]))
    }

    fn writable(&self, features: u64, at: usize, data: &[u8]) -> bool {
        at == WRITEBACK && matches!(data, [0 | 1]) && features & block_feature::CONFIG_WCE != 0
    }

    fn refuse(&self, _queue: u16, request: &Chain, memory: &GuestMemory) -> u32 {
        let Some(before) = request.writable_len().checked_sub(1) else {
            // A request without room for a status has none to be told.
            return 0;
        };
        let mut end = request.writer(memory);
        // The queue checked that it is guest memory.
        let _ = end.take_segments(before);
        let _ = end.write_all(&[IO_ERROR]);
        // Only what was written without a gap counts (2.7.8.2).
        u32::from(before == 0)
    }
}

#[cfg(test)]
mod tests {
    use triarch_virtio::feature;

    use super::*;
    use crate::kind::{check, continues, features};
    use triarch_vhost_protocol::PROTOCOL_FEATURES;

    fn disk(queues: u16) -> DaemonBlock {
        DaemonBlock::new(queues, 64, false)
    }

    fn offer() -> Offer {
        let mut config = vec![0; CONFIG];
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
        continues(&disk(2), &offer(), &again).expect_err("refused").to_string()
    }

    #[test]
    fn what_a_guest_sees_fits_its_queues() {
        let config = disk(2).config(&offer());
        assert_eq!(config[NUM_QUEUES..NUM_QUEUES + 2], [2, 0]);
        assert_eq!(config[SEG_MAX..SEG_MAX + 4], [62, 0, 0, 0]);
        assert_eq!(capacity(&offer()), 1 << 20);
        assert_eq!(features(&disk(1), &offer()) & block_feature::MQ, 0);
        check(&DaemonBlock::new(1, 64, true), &offer()).expect_err("it can be written");
    }

    #[test]
    fn the_same_or_more_goes_on() {
        continues(&disk(2), &offer(), &offer()).expect("the same");
        let mut more = offer();
        more.features |= block_feature::DISCARD;
        more.queues = 9;
        more.config[..8].copy_from_slice(&4096u64.to_le_bytes());
        continues(&disk(2), &offer(), &more).expect("more");
    }

    #[test]
    fn less_is_refused_by_name() {
        assert!(refusal(|o| o.queues = 1).contains("serves 1 queues, the disk has 2"));
        assert!(refusal(|o| o.config[..8].copy_from_slice(&2047u64.to_le_bytes())).contains("1048064 bytes"));
        assert!(refusal(|o| o.features &= !block_feature::FLUSH).contains("no longer offers VIRTIO_BLK_F_FLUSH"));
        assert!(refusal(|o| o.features |= block_feature::RO).contains("no longer be written"));
        assert!(refusal(|o| o.config[BLK_SIZE + 1] = 16).contains("blocks have 4096 bytes"));
        assert!(refusal(|o| o.features &= !feature::VERSION_1).contains("VERSION_1"));
        assert!(refusal(|o| o.config.clear()).contains("CONFIG"));
        assert!(refusal(|o| o.features &= !block_feature::MQ).contains("VIRTIO_BLK_F_MQ"));
    }
}
