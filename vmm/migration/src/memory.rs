//! Guest memory as the engines see it.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::Cause;
use crate::hand_over::Handed;
use crate::wire::WireError;

/// Bytes of a page. Memory is moved in these, whatever the page size of the host is.
pub const PAGE: u64 = 4096;
/// Most regions of memory: more than KVM has slots.
pub(crate) const MAX_REGIONS: usize = 65_536;

static ZEROES: [u8; PAGE as usize] = [0; PAGE as usize];

/// A region of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Where it begins: at a page.
    pub gpa: u64,
    /// Bytes: whole pages.
    pub len: u64,
}

/// Guest memory at the source.
///
/// Reads race with the guest, which is fine: what it writes is in the log afterwards.
pub trait Memory: Send + Sync {
    /// The regions, in the order of their GPAs.
    fn regions(&self) -> Vec<Region>;

    /// Copies what is at `gpa`; it lies in one region.
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// The first run of pages in `range` that may hold anything; `None` if all of it was never touched. What is outside reads as
    /// zeroes. A file system calls it SEEK_DATA and SEEK_HOLE. `range` lies in one region.
    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(Some(range))
    }

    /// Tells in `zero` for each page from `gpa` on whether it is all zeroes; they lie in one region.
    fn zeroes(&self, gpa: u64, zero: &mut [bool]) -> io::Result<()> {
        let mut page = [0; PAGE as usize];
        for (gpa, zero) in (gpa..).step_by(page.len()).zip(zero) {
            self.read(gpa, &mut page)?;
            *zero = page == ZEROES;
        }
        Ok(())
    }

    /// For sockets without TLS.
    fn outlet(&self) -> Option<&dyn Outlet> {
        None
    }

    /// Begins to note which pages are written: by the guest, by devices, by daemons, and those given back to the host, which read
    /// as zeroes from then on.
    fn start_log(&self) -> io::Result<()>;

    /// Pages written since the log was started or fetched the last time, as runs of GPAs in order, and begins anew. Also called when
    /// the guest is paused, for the last time.
    fn fetch_log(&self) -> io::Result<Vec<Range<u64>>>;

    /// The files that have all of it, for a destination on this host; [`start_log`](Self::start_log) then says that these were taken, and
    /// nothing is noted.
    fn hand_over(&self) -> Result<Handed, Cause> {
        Err("it is in no files".into())
    }

    /// Notes no more.
    fn stop_log(&self);
}

/// Guest memory that the kernel takes from, so that it is copied once.
pub trait Outlet {
    /// Sends what is on `runs` (GPA and bytes, each in one region) by `socket`, as much of it as goes now, and returns how many bytes went.
    /// Reads race with the guest as with [`Memory::read`].
    fn send(&self, runs: &[(u64, u64)], socket: BorrowedFd<'_>) -> io::Result<usize>;
}

/// Guest memory that the kernel puts into what comes.
pub trait Inlet {
    /// `runs` (GPA and bytes, each in one region) are about to come as a whole.
    fn expect(&self, runs: &[(u64, u64)]);

    /// Puts what comes by `socket` on `runs`, one after the other, and returns how many bytes came; 0: no more will. Called from several
    /// threads, for different pages. They are inside the layout.
    fn receive(&self, runs: &[(u64, u64)], socket: BorrowedFd<'_>) -> io::Result<usize>;
}

/// Guest memory at the destination. All of it reads as zeroes at the beginning.
pub trait Target: Send + Sync {
    /// Puts `bytes`, whole pages, at `gpa`. Called from several threads, for different pages. They are inside the layout.
    fn write(&self, gpa: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes `len` bytes at `gpa` read as zeroes, if possible by giving them back to the host.
    fn zero(&self, gpa: u64, len: u64) -> io::Result<()>;

    /// For sockets without TLS.
    fn inlet(&self) -> Option<&dyn Inlet> {
        None
    }
}

/// Guest memory at the destination of which some is missing while the guest runs.
pub trait Lacking: Send + Sync {
    /// Pages that are missing, as runs of GPAs in order, each in one region. All for which somebody waits are told by
    /// [`wanted`](Self::wanted) again.
    fn missing(&self) -> io::Result<Vec<Range<u64>>>;

    /// Bytes that are missing. `None`: there is no guest any more, nor anybody who waits.
    fn remaining(&self) -> Option<u64>;

    /// Pages for which somebody waits and that were not told yet, `most` of them; waits for some for as long as `wait`, and returns
    /// early when nothing is missing any more.
    fn wanted(&self, most: usize, wait: Duration) -> Vec<u64>;

    /// Puts `bytes` at `gpa`, as far as pages are missing there; the others stay as they are. They are inside the layout. Called from
    /// several threads.
    fn provide(&self, gpa: u64, bytes: &[u8]) -> io::Result<()>;

    /// The same, with zeroes.
    fn provide_zeroes(&self, gpa: u64, len: u64) -> io::Result<()>;

    /// The guest will not run: whoever waits shall wait no more, whatever he finds then.
    fn abandon(&self);
}

/// Regions of guest memory that are in order and do not overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout(Vec<Region>);

impl Layout {
    /// Makes sure of it.
    pub fn new(regions: Vec<Region>) -> Result<Self, WireError> {
        if regions.len() > MAX_REGIONS {
            return Err(WireError::Invalid("more regions of memory than any guest has"));
        }
        let mut end = 0;
        for Region { gpa, len } in &regions {
            let whole = gpa.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && *len > 0;
            end = match gpa.checked_add(*len) {
                Some(next) if whole && *gpa >= end => next,
                _ => {
                    return Err(WireError::Invalid(
                        "regions of memory that overlap or are no whole pages",
                    ));
                }
            };
        }
        Ok(Self(regions))
    }

    /// The regions.
    pub fn regions(&self) -> &[Region] {
        &self.0
    }

    /// Bytes of all regions.
    pub fn len(&self) -> u64 {
        self.0.iter().fold(0, |sum: u64, region| sum.saturating_add(region.len))
    }

    /// Whether there is no memory.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `len` bytes at `gpa` are whole pages in one region.
    pub(crate) fn holds(&self, gpa: u64, len: u64) -> bool {
        let before = self.0.partition_point(|region| region.gpa <= gpa);
        let region = before.checked_sub(1).and_then(|at| self.0.get(at));
        let whole = gpa.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0;
        let inside = |region: &Region| gpa.checked_add(len).is_some_and(|end| end <= region.gpa + region.len);
        whole && region.is_some_and(inside)
    }

    /// The parts of `runs` that are memory, widened to whole pages.
    pub(crate) fn clip(&self, runs: &[Range<u64>]) -> Vec<Range<u64>> {
        let mut clipped: Vec<Range<u64>> = Vec::new();
        let mut first = 0;
        for run in runs {
            let run = run.start - run.start % PAGE..run.end.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
            // Runs are in order mostly: regions before this one's are not looked at again.
            if self.0.get(first).is_some_and(|region| region.gpa > run.start) {
                first = self.0.partition_point(|region| region.gpa + region.len <= run.start);
            }
            while self
                .0
                .get(first)
                .is_some_and(|region| region.gpa + region.len <= run.start)
            {
                first += 1;
            }
            for region in self.0[first..].iter().take_while(|region| region.gpa < run.end) {
                let part = run.start.max(region.gpa)..run.end.min(region.gpa + region.len);
                match clipped.last_mut() {
                    _ if part.is_empty() => {}
                    // What was widened may overlap. Runs do not cross regions, even those that touch.
                    Some(last) if last.start >= region.gpa && last.start <= part.start && part.start <= last.end => {
                        last.end = last.end.max(part.end);
                    }
                    _ => clipped.push(part),
                }
            }
        }
        clipped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(regions: &[(u64, u64)]) -> Result<Layout, WireError> {
        let page = |(gpa, len): &(u64, u64)| Region {
            gpa: gpa * PAGE,
            len: len * PAGE,
        };
        Layout::new(regions.iter().map(page).collect())
    }

    #[test]
    fn a_layout_is_in_order_and_does_not_overlap() {
        assert_eq!(layout(&[(0, 4), (4, 1), (9, 2)]).expect("a layout").len(), 7 * PAGE);
        for bad in [
            &[(0, 0)][..],
            &[(0, 2), (1, 2)],
            &[(4, 1), (0, 1)],
            &[(u64::MAX / PAGE, 1)],
        ] {
            assert!(layout(bad).is_err(), "{bad:?}");
        }
        assert!(Layout::new(vec![Region { gpa: 1, len: PAGE }]).is_err());
        assert!(Layout::new(vec![Region { gpa: 0, len: 1 }]).is_err());
    }

    #[test]
    fn only_whole_pages_of_one_region_are_held() {
        let layout = layout(&[(2, 4), (6, 1), (9, 2)]).expect("a layout");
        let holds = |gpa: u64, len: u64| layout.holds(gpa * PAGE, len * PAGE);
        assert!(holds(2, 4) && holds(3, 1) && holds(6, 1) && holds(10, 1));
        assert!(!holds(1, 1) && !holds(5, 2) && !holds(7, 1) && !holds(10, 2) && !holds(11, 1) && !holds(3, 0));
        assert!(!layout.holds(2 * PAGE + 1, PAGE) && !layout.holds(2 * PAGE, 1));
        assert!(!layout.holds(u64::MAX - PAGE + 1, PAGE));
    }

    #[test]
    fn runs_are_clipped_to_memory() {
        let layout = layout(&[(0, 4), (8, 4)]).expect("a layout");
        let clip = |runs: &[(u64, u64)]| -> Vec<_> {
            let runs: Vec<_> = runs.iter().map(|(start, end)| *start..*end).collect();
            let clipped = layout.clip(&runs);
            clipped
                .iter()
                .map(|run| (run.start / PAGE, run.end / PAGE))
                .collect::<Vec<_>>()
        };
        assert_eq!(clip(&[(0, u64::MAX)]), [(0, 4), (8, 12)]);
        assert_eq!(clip(&[(1, 2)]), [(0, 1)]);
        assert_eq!(clip(&[(PAGE - 1, PAGE + 1)]), [(0, 2)]);
        assert_eq!(clip(&[(1, 5), (6, PAGE + 1)]), [(0, 2)]);
        assert_eq!(clip(&[(5 * PAGE, 6 * PAGE), (9 * PAGE, 10 * PAGE)]), [(9, 10)]);
        assert_eq!(clip(&[(9 * PAGE, 10 * PAGE), (PAGE, 2 * PAGE)]), [(9, 10), (1, 2)]);
        assert_eq!(clip(&[(3 * PAGE, 9 * PAGE)]), [(3, 4), (8, 9)]);
    }
}
