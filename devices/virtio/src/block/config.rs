//! Features and configuration space (virtio 1.2, 5.2.3 and 5.2.4).

use triarch_block::Disk;

/// Bytes of a sector, the unit of positions in requests whatever the block size is.
pub(super) const SECTOR: u64 = 512;

/// Most sectors one discard may name. It bounds how long a device that discards slowly keeps a worker.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Most sectors one write-zeroes may name. Less, because on some file systems the zeroes are really written.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 18;

/// Feature bits of the block device.
pub mod feature {
    /// `size_max` is valid.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << 2;
    /// `geometry` is valid.
    pub const GEOMETRY: u64 = 1 << 4;
    /// The disk is read-only.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// There is a write cache to flush.
    pub const FLUSH: u64 = 1 << 9;
    /// `topology` is valid.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The driver may switch the write cache.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// More than one queue.
    pub const MQ: u64 = 1 << 12;
    /// Discards are understood.
    pub const DISCARD: u64 = 1 << 13;
    /// Write-zeroes are understood.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Offset of `writeback`, the only field a driver may write.
pub(super) const WRITEBACK: u64 = 32;
const LEN: usize = 60;

/// What a disk with `queues` queues offers beside the common features.
pub(super) fn features(disk: &Disk, queues: usize) -> u64 {
    use feature::{BLK_SIZE, CONFIG_WCE, DISCARD, FLUSH, MQ, RO, SEG_MAX, TOPOLOGY, WRITE_ZEROES};
    let mut features = SEG_MAX | BLK_SIZE | TOPOLOGY | FLUSH | CONFIG_WCE;
    if queues > 1 {
        features |= MQ;
    }
    if disk.readonly() {
        features |= RO;
    } else {
        features |= WRITE_ZEROES;
        if disk.geometry().discard_granularity > 0 {
            features |= DISCARD;
        }
    }
    features
}

/// The configuration space as it is now: the capacity follows the disk's size.
pub(super) fn space(disk: &Disk, queue_sizes: &[u16], writeback: bool) -> [u8; LEN] {
    let geometry = disk.geometry();
    let block = geometry.logical_block;
    let exponent = (geometry.physical_block / block).checked_ilog2().unwrap_or(0);
    let minimum = u16::try_from(geometry.minimum_io / block).unwrap_or(u16::MAX);
    let alignment = (geometry.discard_granularity.max(block) / SECTOR as u32).max(1);
    // A request has a header and a status beside its data.
    let size = queue_sizes.first().copied().unwrap_or(0);
    let segments = u32::from(size.saturating_sub(2).clamp(1, 1022));

    let mut space = [0; LEN];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(disk.size() / SECTOR).to_le_bytes());
    put(12, &segments.to_le_bytes());
    put(20, &block.to_le_bytes());
    put(24, &[exponent as u8, 0]);
    put(26, &minimum.to_le_bytes());
    put(28, &(geometry.optimal_io / block).to_le_bytes());
    put(WRITEBACK as usize, &[u8::from(writeback)]);
    put(34, &(queue_sizes.len() as u16).to_le_bytes());
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &1u32.to_le_bytes());
    put(44, &alignment.to_le_bytes());
    put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    put(56, &[1]);
    space
}
