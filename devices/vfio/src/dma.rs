//! Guest memory as devices reach it.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};

use thiserror::Error;

use triarch_device_core::RateLimit;

use crate::translated::Translated;
use crate::{Container, Mapping, lock};

/// Why devices cannot be given the guest's memory.
#[derive(Debug, Error)]
pub enum DmaError {
    /// Too much to lock.
    #[error(
        "devices of the host need {} MiB of memory locked: all of the guest's, once for those that are not behind its IOMMU, and once for \
         each that is; this process may lock {} MiB; allow it that much (ulimit -l {}, LimitMEMLOCK={}M in systemd), or give the guest less \
         memory",
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
pub(crate) struct State {
    /// What devices are to reach: length and address in this process, by GPA.
    pub(crate) ranges: BTreeMap<u64, (u64, u64)>,
    container: Weak<Container>,
    /// What those behind the guest's IOMMU reach.
    behind: Vec<Weak<Translated>>,
    /// Bytes that this process may lock, `None` if nobody counts: as it was when the last device came. Threads that map memory may not ask.
    limit: Option<u64>,
    /// Registers of devices, where the guest has them.
    windows: BTreeMap<u64, Window>,
    /// How many devices reach those of others.
    peers: usize,
}

/// Registers that other devices reach.
struct Window {
    len: u64,
    host: u64,
    /// They do: the IOMMU knows.
    mapped: bool,
}

/// What of a guest's memory devices of the host reach: all of it, at its guest physical addresses. It knows what there is also while there
/// is no device, so that one can come.
#[derive(Clone, Default)]
pub struct DmaMap(pub(crate) Arc<Mutex<State>>);

impl DmaMap {
    /// Lets the devices of `container` reach everything there is and that comes, if they do not already.
    ///
    /// # Errors
    /// Not all of it can be had; then they reach nothing.
    pub fn attach(&self, container: &Arc<Container>) -> Result<(), DmaError> {
        let mut state = lock(&self.0);
        state.limit = container.kernel.lock_limit();
        if state.is_attached() {
            return Ok(());
        }
        state.map_all(container)?;
        state.container = Arc::downgrade(container);
        // What was mapped went with the last one.
        state.windows.values_mut().for_each(|window| window.mapped = false);
        Ok(())
    }

    /// What the devices of `container` reach from now on, which are behind the guest's IOMMU: nothing at first.
    pub fn behind(&self, container: &Arc<Container>) -> Arc<Translated> {
        let translated = Arc::new(Translated::new(self, container));
        let mut state = lock(&self.0);
        state.limit = container.kernel.lock_limit();
        state.behind.retain(|other| other.strong_count() > 0);
        state.behind.push(Arc::downgrade(&translated));
        translated
    }

    /// Has devices reach `len` bytes more at `gpa`, which are at `host` in this process and stay there until they are removed here.
    ///
    /// # Errors
    /// They cannot be had; then nothing changed.
    pub fn insert(&self, gpa: u64, len: u64, host: u64) -> Result<(), DmaError> {
        let mut state = lock(&self.0);
        let all = state.reaching_all();
        if let Some(container) = all.first() {
            state.check_limit(container, len.saturating_mul(all.len() as u64))?;
        }
        for (done, container) in all.iter().enumerate() {
            let given = reach(container, gpa, len).and_then(|()| give(container, gpa, len, host));
            if let Err(error) = given {
                all.iter().take(done).for_each(|container| take(container, gpa, len));
                return Err(error);
            }
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
        let (all, behind) = (state.reaching_all(), state.behind());
        for &(gpa, len, _) in &inside {
            state.ranges.remove(&gpa);
            all.iter().for_each(|container| take(container, gpa, len));
            behind.iter().for_each(|translated| translated.lose(gpa, len));
        }
        inside
    }

    /// The same for everything.
    pub fn clear(&self) {
        self.remove(0..u64::MAX);
    }

    /// One more device whose registers others reach, and that reaches theirs.
    pub(crate) fn join(&self) -> Peer {
        let mut state = lock(&self.0);
        state.peers += 1;
        // Nothing is there for a device alone.
        if state.peers == 2 {
            state.show_windows();
        }
        let map = self.clone();
        let log = RateLimit::default();
        Peer { map, log }
    }

    /// Whether devices reach the guest's memory.
    pub fn is_attached(&self) -> bool {
        lock(&self.0).is_attached()
    }
}

/// A device that reaches the registers of others, as long as this is there.
pub(crate) struct Peer {
    map: DmaMap,
    log: RateLimit,
}

impl Peer {
    /// Others reach `registers` at `gpa` from now on. Where the host cannot do that they do not.
    pub(crate) fn show(&self, gpa: u64, registers: &Mapping) {
        let window = Window {
            len: registers.size(),
            host: registers.address(),
            mapped: false,
        };
        let mut state = lock(&self.map.0);
        state.windows.insert(gpa, window);
        let shown = match state.peers > 1 {
            true => state.show_window(gpa),
            false => Ok(()),
        };
        if let Err(error) = shown
            && let Some(held_back) = self.log.admit()
        {
            tracing::warn!(
                held_back,
                "other devices do not reach the registers at {gpa:#x}: {error}"
            );
        }
    }

    /// Nobody reaches those at `gpa` any more.
    pub(crate) fn hide(&self, gpa: u64) {
        let mut state = lock(&self.map.0);
        state.hide_window(gpa);
        state.windows.remove(&gpa);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let mut state = lock(&self.map.0);
        state.peers -= 1;
        if state.peers == 1 {
            let all: Vec<u64> = state.windows.keys().copied().collect();
            all.into_iter().for_each(|gpa| state.hide_window(gpa));
        }
    }
}

impl State {
    fn show_windows(&mut self) {
        let all: Vec<u64> = self.windows.keys().copied().collect();
        for gpa in all {
            if let Err(error) = self.show_window(gpa) {
                tracing::warn!("other devices do not reach the registers at {gpa:#x}: {error}");
            }
        }
    }

    fn show_window(&mut self, gpa: u64) -> io::Result<()> {
        let (container, window) = (self.container.upgrade(), self.windows.get_mut(&gpa));
        if let (Some(container), Some(window)) = (container, window)
            && !window.mapped
        {
            container.space().map(gpa, window.len, window.host, true)?;
            window.mapped = true;
        }
        Ok(())
    }

    fn hide_window(&mut self, gpa: u64) {
        let (container, window) = (self.container.upgrade(), self.windows.get_mut(&gpa));
        if let Some(window) = window
            && std::mem::take(&mut window.mapped)
            && let Some(container) = container
        {
            told(container.space().unmap(gpa, window.len), gpa, window.len);
        }
    }

    fn is_attached(&self) -> bool {
        self.container.strong_count() > 0
    }

    fn behind(&self) -> Vec<Arc<Translated>> {
        self.behind.iter().filter_map(Weak::upgrade).collect()
    }

    /// The containers whose devices reach everything.
    fn reaching_all(&self) -> Vec<Arc<Container>> {
        let behind = self.behind();
        let behind = behind.iter().filter_map(|translated| translated.reaching_all());
        self.container.upgrade().into_iter().chain(behind).collect()
    }

    /// Has the devices of `container`, which reach nothing, reach everything there is.
    ///
    /// # Errors
    /// Not all of it can be had; then they still reach nothing.
    pub(crate) fn map_all(&self, container: &Container) -> Result<(), DmaError> {
        let lens = self.ranges.values().map(|(len, _)| *len);
        self.check_limit(container, lens.fold(0, u64::saturating_add))?;
        self.ranges
            .iter()
            .try_for_each(|(gpa, (len, _))| reach(container, *gpa, *len))?;
        for (done, (&at, &(len, host))) in self.ranges.iter().enumerate() {
            if let Err(error) = give(container, at, len, host) {
                let given = self.ranges.iter().take(done);
                given.for_each(|(at, (len, _))| take(container, *at, *len));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Whether `more` bytes can be locked for the devices of `container` beside what all devices reach.
    pub(crate) fn check_limit(&self, container: &Container, more: u64) -> Result<(), DmaError> {
        let needed = container.reached().bytes().saturating_add(more);
        match self.limit {
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

fn give(container: &Container, at: u64, len: u64, host: u64) -> Result<(), DmaError> {
    let given = container.map(at, len, host, true);
    given.map_err(|source| DmaError::Map { at, len, source })
}

/// Undoes it.
pub(crate) fn take(container: &Container, at: u64, len: u64) {
    told(container.unmap(at, len), at, len);
}

/// Logs what could not be undone.
fn told(undone: io::Result<()>, gpa: u64, len: u64) {
    if let Err(error) = undone {
        tracing::error!("devices of the host keep {len:#x} bytes of the guest's at {gpa:#x}: {error}");
    }
}
