//! Interrupts by vector: the architecture's handlers count them, the rest waits for counts.
//!
//! A vector is a number below 256 that stands for one source. Which sources have which, the architecture decides.

use crate::arch::interrupts as arch;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

const FIRST_DEVICE_VECTOR: u8 = 0x40;
const LAST_DEVICE_VECTOR: u8 = 0xdf;
/// The vector that wakes a processor for a job.
pub const WAKE_VECTOR: u8 = 0xe0;

#[unsafe(no_mangle)]
static vector_counts: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];

static NEXT_VECTOR: AtomicU8 = AtomicU8::new(FIRST_DEVICE_VECTOR);

/// A message-signalled interrupt.
#[derive(Clone, Copy)]
pub struct Message {
    /// What is counted when it comes.
    pub vector: u8,
    /// Where the device writes to.
    pub address: u64,
    /// What it writes.
    pub data: u32,
}

/// How often `vector` has been taken, on any processor.
pub fn count(vector: u8) -> u64 {
    vector_counts[usize::from(vector)].load(Ordering::SeqCst)
}

/// Sleeps until an interrupt comes, at most `nanoseconds` (0: no limit); returns at once when `vector` has already
/// been counted past `seen`.
pub fn sleep(vector: u8, seen: u64, nanoseconds: u32) {
    arch::wait(&vector_counts[usize::from(vector)], seen, nanoseconds);
}

/// The next free vector for a device; when all are used up, starts over (vectors are then shared).
pub fn new_vector() -> u8 {
    let vector = NEXT_VECTOR.fetch_add(1, Ordering::Relaxed);
    if vector == LAST_DEVICE_VECTOR {
        NEXT_VECTOR.store(FIRST_DEVICE_VECTOR, Ordering::Relaxed);
    }
    vector
}
