//! Compression of pages, where it pays.

use std::time::{Duration, Instant};

use lz4_flex::block::{compress_into, get_maximum_output_size};

/// How many batches go uncompressed after one for which it did not pay.
const PAUSE: u32 = 32;

/// Decides and compresses, for one stream.
pub(super) struct Packer {
    enabled: bool,
    packed: Vec<u8>,
    /// Batches until it is tried again.
    wait: u32,
    /// Seconds that a byte takes on the wire, as measured lately.
    per_byte: Option<f64>,
}

impl Packer {
    pub(super) fn new(enabled: bool) -> Self {
        Self {
            enabled,
            packed: Vec::new(),
            wait: 0,
            per_byte: None,
        }
    }

    /// Sending so many bytes took so long.
    pub(super) fn sent(&mut self, bytes: usize, time: Duration) {
        let now = time.as_secs_f64() / bytes.max(1) as f64;
        self.per_byte = Some(self.per_byte.map_or(now, |before| before * 0.75 + now * 0.25));
    }

    /// What `bytes` are packed to, unless sending them as they are is faster.
    pub(super) fn pack(&mut self, bytes: &[u8]) -> Option<&[u8]> {
        // Without a measurement nobody knows.
        let per_byte = self.per_byte.filter(|_| self.enabled)?;
        if self.wait > 0 {
            self.wait -= 1;
            return None;
        }
        let began = Instant::now();
        self.packed.resize(get_maximum_output_size(bytes.len()), 0);
        let len = compress_into(bytes, &mut self.packed).ok()?;
        if !pays(bytes.len(), len, began.elapsed(), per_byte) {
            self.wait = PAUSE;
        }
        // It is done: what is shorter now is sent so.
        (len < bytes.len()).then(|| &self.packed[..len])
    }
}

/// Whether the bytes saved would have taken longer than compressing did.
fn pays(plain: usize, packed: usize, time: Duration, per_byte: f64) -> bool {
    plain.saturating_sub(packed) as f64 * per_byte > time.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_pays_where_the_wire_is_slower() {
        let ms = Duration::from_millis(1);
        // Half of a MiB saved: 5 ms at 100 MB/s, 50 µs at 10 GB/s.
        assert!(pays(1 << 20, 1 << 19, ms, 1e-8));
        assert!(!pays(1 << 20, 1 << 19, ms, 1e-10));
        assert!(!pays(1 << 20, 2 << 20, ms, 1.0));
    }

    #[test]
    fn what_does_not_pay_is_tried_again_later() {
        let mut packer = Packer::new(true);
        let text = vec![7; 64 << 10];
        assert!(packer.pack(&text).is_none(), "before anything is known of the wire");
        // A wire that takes no time at all.
        packer.sent(1, Duration::ZERO);
        assert!(packer.pack(&text).is_some_and(|packed| packed.len() < 1000));
        for _ in 0..PAUSE {
            assert!(packer.pack(&text).is_none());
        }
        assert!(packer.pack(&text).is_some());
        // A wire that is slow: from now on it pays.
        packer.wait = 0;
        packer.sent(1, Duration::from_secs(1));
        for _ in 0..3 * PAUSE {
            assert!(packer.pack(&text).is_some());
        }
        assert!(Packer::new(false).pack(&text).is_none());
    }
}
