//! What devices behind the guest's own IOMMU reach.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, Weak};

use crate::dma::{State, take};
use crate::{Container, DmaError, DmaMap, lock};

/// Guest memory that the devices of one container reach, at the addresses and as far as the guest's IOMMU says. The host's IOMMU holds them
/// to it.
pub struct Translated {
    guest: DmaMap,
    container: Weak<Container>,
    /// Taken only while `guest` is.
    reach: Mutex<Reach>,
}

enum Reach {
    /// All of the guest's memory, also what comes, at its own addresses.
    All,
    /// What is mapped, by its IOVA.
    Mapped(BTreeMap<u64, Piece>),
}

impl Reach {
    /// Nothing is reached any more.
    fn clear(&mut self, guest: &State, container: &Container) {
        match std::mem::replace(self, Self::Mapped(BTreeMap::new())) {
            Self::All => guest
                .ranges
                .iter()
                .for_each(|(gpa, (len, _))| take(container, *gpa, *len)),
            Self::Mapped(pieces) => pieces.iter().for_each(|(at, piece)| take(container, *at, piece.len)),
        }
    }
}

/// A mapping, as the host's IOMMU has it: of one range of the guest's memory.
struct Piece {
    len: u64,
    gpa: u64,
}

impl Translated {
    /// What is reached of `guest`'s memory: nothing yet.
    pub(crate) fn new(guest: &DmaMap, container: &Arc<Container>) -> Self {
        Self {
            guest: guest.clone(),
            container: Arc::downgrade(container),
            reach: Mutex::new(Reach::Mapped(BTreeMap::new())),
        }
    }

    /// They reach all of the guest's memory at its own addresses.
    ///
    /// # Errors
    /// Not all of it can be had; then they reach nothing.
    pub fn reach_all(&self) -> Result<(), DmaError> {
        let guest = lock(&self.guest.0);
        let mut reach = lock(&self.reach);
        let Some(container) = self.container.upgrade() else {
            return Ok(());
        };
        if matches!(*reach, Reach::All) {
            return Ok(());
        }
        reach.clear(&guest, &container);
        guest.map_all(&container)?;
        *reach = Reach::All;
        Ok(())
    }

    /// They reach nothing any more.
    pub fn reach_nothing(&self) {
        let guest = lock(&self.guest.0);
        if let Some(container) = self.container.upgrade() {
            lock(&self.reach).clear(&guest, &container);
        }
    }

    /// They reach the `len` bytes at `gpa` by `iova`, as far as memory is there now, and may write it if it is `writable`. What reaches
    /// everything reaches only this from now on.
    ///
    /// # Errors
    /// Not all of that can be had; then none of it is reached.
    pub fn map(&self, iova: u64, len: u64, gpa: u64, writable: bool) -> Result<(), DmaError> {
        let guest = lock(&self.guest.0);
        let mut reach = lock(&self.reach);
        let Some(container) = self.container.upgrade() else {
            return Ok(());
        };
        if matches!(*reach, Reach::All) {
            reach.clear(&guest, &container);
        }
        let Reach::Mapped(pieces) = &mut *reach else {
            return Ok(());
        };
        let end = gpa.saturating_add(len);
        let before = guest.ranges.range(..=gpa).next_back().map_or(gpa, |(start, _)| *start);
        let mut given = Vec::new();
        for (&start, &(size, host)) in guest.ranges.range(before..end) {
            let (first, last) = (start.max(gpa), start.saturating_add(size).min(end));
            if first >= last {
                continue;
            }
            let (at, len) = (iova + (first - gpa), last - first);
            let mapped = guest.check_limit(&container, len).and_then(|()| {
                match container.map(at, len, host + (first - start), writable) {
                    Ok(()) => Ok(()),
                    Err(source) => Err(DmaError::Map { at: first, len, source }),
                }
            });
            if let Err(error) = mapped {
                for (at, len) in given {
                    take(&container, at, len);
                    pieces.remove(&at);
                }
                return Err(error);
            }
            given.push((at, len));
            pieces.insert(at, Piece { len, gpa: first });
        }
        Ok(())
    }

    /// They reach nothing in `iovas` any more, where no mapping is cut.
    pub fn unmap(&self, iovas: RangeInclusive<u64>) {
        let _guest = lock(&self.guest.0);
        let mut reach = lock(&self.reach);
        let (Some(container), Reach::Mapped(pieces)) = (self.container.upgrade(), &mut *reach) else {
            return;
        };
        let inside: Vec<_> = pieces.range(iovas).map(|(at, piece)| (*at, piece.len)).collect();
        for (at, len) in inside {
            pieces.remove(&at);
            take(&container, at, len);
        }
    }

    /// The addresses up to `last` that the host's IOMMU cannot have devices use.
    ///
    /// # Errors
    /// The kernel's.
    pub fn gaps(&self, last: u64) -> std::io::Result<Vec<RangeInclusive<u64>>> {
        let Some(container) = self.container.upgrade() else {
            return Ok(Vec::new());
        };
        let mut reachable = container.space().reachable()?;
        reachable.sort_unstable();
        let mut gaps = Vec::new();
        // Whoever tells nothing has no gaps.
        let mut next = if reachable.is_empty() { None } else { Some(0) };
        for (first, end) in reachable {
            if let Some(at) = next.filter(|at| *at < first && *at <= last) {
                gaps.push(at..=(first - 1).min(last));
            }
            next = next.and_then(|at: u64| Some(at.max(end.checked_add(1)?)));
        }
        gaps.extend(next.filter(|at| *at <= last).map(|at| at..=last));
        Ok(gaps)
    }

    /// Its container, if its devices reach everything.
    pub(crate) fn reaching_all(&self) -> Option<Arc<Container>> {
        match &*lock(&self.reach) {
            Reach::All => self.container.upgrade(),
            Reach::Mapped(_) => None,
        }
    }

    /// The `len` bytes of memory at `gpa` go: what is mapped of them is reached no more.
    pub(crate) fn lose(&self, gpa: u64, len: u64) {
        let mut reach = lock(&self.reach);
        let (Some(container), Reach::Mapped(pieces)) = (self.container.upgrade(), &mut *reach) else {
            return;
        };
        pieces.retain(|at, piece| {
            let goes = piece.gpa < gpa + len && gpa < piece.gpa + piece.len;
            if goes {
                take(&container, *at, piece.len);
            }
            !goes
        });
    }
}
