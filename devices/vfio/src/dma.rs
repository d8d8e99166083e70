//! Guest memory as devices reach it.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};

use thiserror::Error;

use crate::{Container, lock};

/// Why devices cannot be given the guest's memory.
#[derive(Debug, Error)]
pub enum DmaError {
    /// Too much to lock.
    #[error(
        "devices of the host need all {} MiB of the guest's memory locked, and this process may lock {} MiB; allow it that much (ulimit -l \
         {}, LimitMEMLOCK={}M in systemd), or give the guest less memory",
        mib(*.needed), .limit >> 20, .needed.div_ceil(1024), mib(*.needed)
    )]
    Limit {
        /// Bytes needed.
        needed: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// The IOMMU does not reach it.
    #[error(
        "the host's IOMMU cannot have devices reach the guest's memory at {start:#x} to {end:#x}, since it takes only {reach}; give the \
         guest less memory, or fewer address bits (--cpus max_phys_bits)"
    )]
    Unreachable {
        /// First address.
        start: u64,
        /// Last address.
        end: u64,
        /// What it reaches.
        reach: String,
    },
    /// The kernel refuses.
    #[error("devices of the host cannot be given {len} bytes of the guest's memory at {at:#x}")]
    Map {
        /// GPA.
        at: u64,
        /// Bytes.
        len: u64,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// Bytes in MiB, enough of them.
fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

#[derive(Default)]
struct State {
    /// What devices are to reach: length and address in this process, by GPA.
    ranges: BTreeMap<u64, (u64, u64)>,
    container: Weak<Container>,
}

/// What of a guest's memory devices of the host reach: all of it, at its guest physical addresses. It knows what there is also while there
/// is no device, so that one can come.
#[derive(Clone, Default)]
pub struct DmaMap(Arc<Mutex<State>>);

impl DmaMap {
    /// Lets the devices of `container` reach everything there is and that comes, if they do not already.
    ///
    /// # Errors
    /// Not all of it can be had; then they reach nothing.
    pub fn attach(&self, container: &Arc<Container>) -> Result<(), DmaError> {
        let mut state = lock(&self.0);
        if state.is_attached() {
            return Ok(());
        }
        state.check_limit(container, 0)?;
        state
            .ranges
            .iter()
            .try_for_each(|(gpa, (len, _))| reach(container, *gpa, *len))?;
        for (done, (&at, &(len, host))) in state.ranges.iter().enumerate() {
            if let Err(source) = container.space().map(at, len, host) {
                for (at, (len, _)) in state.ranges.iter().take(done) {
                    undo(container, *at, *len);
                }
                return Err(DmaError::Map { at, len, source });
            }
        }
        state.container = Arc::downgrade(container);
        Ok(())
    }

    /// Has devices reach `len` bytes more at `gpa`, which are at `host` in this process and stay there until they are removed here.
    ///
    /// # Errors
    /// They cannot be had; then nothing changed.
    pub fn insert(&self, gpa: u64, len: u64, host: u64) -> Result<(), DmaError> {
        let mut state = lock(&self.0);
        if let Some(container) = state.container.upgrade() {
            state.check_limit(&container, len)?;
            reach(&container, gpa, len)?;
            let map = container.space().map(gpa, len, host);
            map.map_err(|source| DmaError::Map { at: gpa, len, source })?;
        }
        state.ranges.insert(gpa, (len, host));
        Ok(())
    }

    /// Has devices reach nothing in `range` any more: what was inserted there may go when this returns. It is returned: address, length, and
    /// where it is in this process.
    pub fn remove(&self, range: Range<u64>) -> Vec<(u64, u64, u64)> {
        let mut state = lock(&self.0);
        let inside = state.ranges.range(range.clone());
        let inside: Vec<_> = inside.map(|(gpa, (len, host))| (*gpa, *len, *host)).collect();
        let container = state.container.upgrade();
        for &(gpa, len, _) in &inside {
            state.ranges.remove(&gpa);
            if let Some(container) = &container {
                undo(container, gpa, len);
            }
        }
        inside
    }

    /// The same for everything.
    pub fn clear(&self) {
        self.remove(0..u64::MAX);
    }

    /// Whether devices reach the guest's memory.
    pub fn is_attached(&self) -> bool {
        lock(&self.0).is_attached()
    }
}

impl State {
    fn is_attached(&self) -> bool {
        self.container.strong_count() > 0
    }

    fn check_limit(&self, container: &Container, more: u64) -> Result<(), DmaError> {
        let lens = self.ranges.values().map(|(len, _)| *len);
        let needed = lens.fold(more, u64::saturating_add);
        match container.kernel.lock_limit() {
            Some(limit) if limit < needed => Err(DmaError::Limit { needed, limit }),
            _ => Ok(()),
        }
    }
}

/// Whether the IOMMU reaches `len` bytes at `gpa`.
fn reach(container: &Container, gpa: u64, len: u64) -> Result<(), DmaError> {
    let ranges = container.space().reachable().unwrap_or_default();
    let end = gpa.saturating_add(len.saturating_sub(1));
    if ranges.is_empty() || ranges.iter().any(|(first, last)| *first <= gpa && end <= *last) {
        return Ok(());
    }
    let reach: Vec<_> = ranges
        .iter()
        .map(|(first, last)| format!("{first:#x} to {last:#x}"))
        .collect();
    Err(DmaError::Unreachable {
        start: gpa,
        end,
        reach: reach.join(", "),
    })
}

fn undo(container: &Container, gpa: u64, len: u64) {
    if let Err(error) = container.space().unmap(gpa, len) {
        tracing::error!("devices of the host keep {len:#x} bytes of the guest's memory at {gpa:#x}: {error}");
    }
}
