//! File systems (virtio 1.2, 5.11).

use std::io::{Read, Write};

use triarch_memory::GuestMemory;
use triarch_virtio::{Chain, DeviceId};

use super::{Kind, Offer};

/// Bytes of a tag.
const TAG: usize = 36;
/// Bytes of the configuration space up to `num_request_queues` (5.11.4).
const CONFIG: usize = TAG + 4;
/// Linux' EIO, as FUSE tells it.
const EIO: i32 = -5;
/// Bytes of `fuse_in_header` and `fuse_out_header` (linux/fuse.h).
const IN_HEADER: usize = 40;
const OUT_HEADER: u32 = 16;

/// A file system that a daemon serves. The configuration space is the VMM's, as not all daemons have one.
#[derive(Debug, Clone)]
pub struct DaemonFs {
    sizes: Vec<u16>,
    config: [u8; CONFIG],
}

impl DaemonFs {
    /// One that guests mount by `tag`, of which the first 36 bytes count. It has `queues` queues for requests beside the one for urgent
    /// ones, each with `queue_size` descriptors.
    pub fn new(tag: &str, queues: u16, queue_size: u16) -> Self {
        let mut config = [0; CONFIG];
        for (field, byte) in config[..TAG].iter_mut().zip(tag.bytes()) {
            *field = byte;
        }
        config[TAG..].copy_from_slice(&u32::from(queues).to_le_bytes());
        Self {
            sizes: vec![queue_size; usize::from(queues) + 1],
            config,
        }
    }
}

impl Kind for DaemonFs {
    fn id(&self) -> DeviceId {
        DeviceId::Fs
    }

    fn noun(&self) -> &'static str {
        "file system"
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config_length(&self) -> usize {
        0
    }

    fn check(&self, _offer: &Offer) -> Result<(), String> {
        Ok(())
    }

    fn features(&self, _offer: &Offer) -> u64 {
        // The notification queue, the only feature there is, would be one more queue.
        0
    }

    fn config(&self, _offer: &Offer) -> Vec<u8> {
        self.config.to_vec()
    }

    fn continues(&self, _known: &Offer, _now: &Offer) -> Result<(), String> {
        Ok(())
    }

    fn refuse(&self, _queue: u16, request: &Chain, memory: &GuestMemory) -> u32 {
        let mut asked = [0; IN_HEADER];
        if request.reader(memory).read_exact(&mut asked).is_err() || request.writable_len() < OUT_HEADER {
            // Some requests have no answer (FORGET).
            return 0;
        }
        // The length of the answer, the error, and which request it is about.
        let mut answer = [0; OUT_HEADER as usize];
        answer[..4].copy_from_slice(&OUT_HEADER.to_le_bytes());
        answer[4..8].copy_from_slice(&EIO.to_le_bytes());
        answer[8..].copy_from_slice(&asked[8..16]);
        // The queue checked that it is guest memory.
        let _ = request.writer(memory).write_all(&answer);
        OUT_HEADER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_space_has_tag_and_queues() {
        let fs = DaemonFs::new("shared", 2, 128);
        assert_eq!(fs.queue_sizes(), [128, 128, 128]);
        assert_eq!(fs.config[..7], *b"shared\0");
        assert_eq!(fs.config[TAG..], [2, 0, 0, 0]);
        // A tag that is as long as the field has no zero behind it.
        let long = DaemonFs::new(&"x".repeat(50), 1, 128);
        assert_eq!(long.config[..TAG], [b'x'; TAG]);
        assert_eq!(long.config[TAG..], [1, 0, 0, 0]);
    }
}
