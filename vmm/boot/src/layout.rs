//! Where things go in guest memory, and what of it a kernel may use.

use thiserror::Error;

/// Bytes in a page, the granularity of everything placed by this crate.
pub(crate) const PAGE: u64 = 4096;

/// A range of guest physical addresses. `start + size` never overflows in a [`MemoryLayout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemRange {
    /// First guest physical address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
}

impl MemRange {
    /// The range from `start` up to, not including, `end`; empty when `end` is below `start`.
    pub const fn from_bounds(start: u64, end: u64) -> Self {
        Self {
            start,
            size: end.saturating_sub(start),
        }
    }

    /// First address behind the range, saturating at the end of the address space.
    pub const fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }

    /// Whether the two ranges share a byte.
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    /// Whether all of `other` lies inside.
    pub const fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }
}

/// Use of a range in the memory map, with the numbers of the ACPI specification (table 15.1 in 6.5) that
/// E820 and PVH share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemKind {
    /// Free for the guest.
    Ram = 1,
    /// Never to be touched as memory.
    Reserved = 2,
    /// ACPI tables, free after they were read.
    Acpi = 3,
    /// ACPI memory that firmware needs over sleep.
    AcpiNvs = 4,
    /// Persistent memory.
    Pmem = 7,
}

/// One line of the memory map told to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemMapEntry {
    /// The addresses.
    pub range: MemRange,
    /// Their use.
    pub kind: MemKind,
}

/// Why a set of RAM and reserved ranges is no memory layout.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// There is no RAM at all.
    #[error("the guest has no memory")]
    NoRam,
    /// A range is empty or wraps around the address space.
    #[error("the memory range at {start:#x} with {size:#x} bytes is empty or wraps around")]
    BadRange {
        /// Its first address.
        start: u64,
        /// Its length in bytes.
        size: u64,
    },
    /// Two RAM ranges share addresses.
    #[error("the memory ranges at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Start of the lower range.
        first: u64,
        /// Start of the higher range.
        second: u64,
    },
}

/// The guest's RAM and what of the address space is reserved, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLayout {
    ram: Vec<MemRange>,
    reserved: Vec<MemMapEntry>,
}

impl MemoryLayout {
    /// A layout of `ram` in any order; where a `reserved` range lies over RAM or over a later reserved one, it wins.
    pub fn new(mut ram: Vec<MemRange>, reserved: Vec<MemMapEntry>) -> Result<Self, LayoutError> {
        if ram.is_empty() {
            return Err(LayoutError::NoRam);
        }
        for range in ram.iter().chain(reserved.iter().map(|entry| &entry.range)) {
            if range.size == 0 || range.start.checked_add(range.size).is_none() {
                return Err(LayoutError::BadRange {
                    start: range.start,
                    size: range.size,
                });
            }
        }
        ram.sort_unstable();
        for pair in ram.windows(2) {
            if pair[0].overlaps(&pair[1]) {
                return Err(LayoutError::Overlap {
                    first: pair[0].start,
                    second: pair[1].start,
                });
            }
        }
        Ok(Self { ram, reserved })
    }

    /// The guest's RAM, ascending.
    pub fn ram(&self) -> &[MemRange] {
        &self.ram
    }

    /// The map for the guest: ascending, without overlaps, neighbours of one kind joined.
    pub fn map(&self) -> Vec<MemMapEntry> {
        // Every kind is constant between two neighbouring edges, and there are only a handful of edges.
        let mut edges: Vec<u64> = self
            .ram
            .iter()
            .chain(self.reserved.iter().map(|entry| &entry.range))
            .flat_map(|range| [range.start, range.end()])
            .collect();
        edges.sort_unstable();
        edges.dedup();

        let mut map: Vec<MemMapEntry> = Vec::new();
        for pair in edges.windows(2) {
            let range = MemRange::from_bounds(pair[0], pair[1]);
            let Some(kind) = self.kind_of(&range) else {
                continue;
            };
            match map.last_mut() {
                Some(last) if last.kind == kind && last.range.end() == range.start => {
                    last.range.size += range.size;
                }
                _ => map.push(MemMapEntry { range, kind }),
            }
        }
        map
    }

    fn kind_of(&self, range: &MemRange) -> Option<MemKind> {
        self.reserved
            .iter()
            .find(|entry| entry.range.contains(range))
            .map(|entry| entry.kind)
            .or_else(|| self.ram.iter().any(|ram| ram.contains(range)).then_some(MemKind::Ram))
    }

    /// RAM that is not reserved, ascending.
    pub fn usable(&self) -> Vec<MemRange> {
        self.map()
            .into_iter()
            .filter(|entry| entry.kind == MemKind::Ram)
            .map(|entry| entry.range)
            .collect()
    }

    /// Whether `range` is one piece of RAM of which nothing is reserved.
    pub fn is_usable(&self, range: &MemRange) -> bool {
        self.usable().iter().any(|free| free.contains(range))
    }

    /// The highest page-aligned address at which `size` bytes fit into usable RAM inside `window` without
    /// touching any of `avoid`.
    pub fn highest_fit(&self, size: u64, window: &MemRange, avoid: &[MemRange]) -> Option<u64> {
        self.gaps(window, avoid)
            .into_iter()
            .rev()
            .filter_map(|gap| {
                let start = gap.end().checked_sub(size)? & !(PAGE - 1);
                (start >= gap.start).then_some(start)
            })
            .next()
    }

    /// Bytes that could be placed at most by [`Self::highest_fit`] with the same arguments.
    pub fn largest_fit(&self, window: &MemRange, avoid: &[MemRange]) -> u64 {
        self.gaps(window, avoid)
            .iter()
            .map(|gap| {
                let aligned = gap.start.next_multiple_of(PAGE);
                gap.end().saturating_sub(aligned)
            })
            .max()
            .unwrap_or(0)
    }

    /// Usable RAM inside `window` less `avoid`, ascending.
    fn gaps(&self, window: &MemRange, avoid: &[MemRange]) -> Vec<MemRange> {
        let mut gaps: Vec<MemRange> = self
            .usable()
            .iter()
            .map(|free| MemRange::from_bounds(free.start.max(window.start), free.end().min(window.end())))
            .collect();
        for hole in avoid {
            gaps = gaps
                .iter()
                .flat_map(|gap| {
                    if gap.overlaps(hole) {
                        [
                            MemRange::from_bounds(gap.start, hole.start),
                            MemRange::from_bounds(hole.end(), gap.end()),
                        ]
                    } else {
                        [*gap, MemRange::from_bounds(0, 0)]
                    }
                })
                .collect();
        }
        gaps.retain(|gap| gap.size > 0);
        gaps
    }
}

/// Addresses of the boot structures, all in RAM below [`BootLayout::kernel_start`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootLayout {
    /// Global descriptor table, [`BootLayout::GDT_SIZE`] bytes.
    pub gdt: u64,
    /// PVH start info, module list and memory map: one page.
    pub start_info: u64,
    /// `boot_params` of the Linux protocol: one page.
    pub zero_page: u64,
    /// Page tables for the long-mode entry, [`BootLayout::PAGE_TABLES_SIZE`] bytes, page aligned.
    pub page_tables: u64,
    /// Kernel command line.
    pub cmdline: u64,
    /// Bytes for the command line with its terminating NUL.
    pub cmdline_size: u32,
    /// Lowest address for the kernel; a bzImage is loaded here.
    pub kernel_start: u64,
    /// First address of the 32-bit device hole: the initramfs ends below it.
    pub device_hole_start: u64,
}

impl BootLayout {
    /// Bytes of the descriptor table: null, unused, code, data and a task state segment of two entries.
    pub const GDT_SIZE: u64 = 6 * 8;
    /// Bytes of the page tables: one top level, one second level, four third levels of 2 MiB pages.
    pub const PAGE_TABLES_SIZE: u64 = 6 * PAGE;

    /// The usual places on x86-64: everything below 1 MiB, the device hole from 3 GiB.
    pub const X86_64: Self = Self {
        gdt: 0x500,
        start_info: 0x6000,
        zero_page: 0x7000,
        page_tables: 0x9000,
        cmdline: 0x2_0000,
        cmdline_size: 0x1_0000,
        kernel_start: 0x10_0000,
        device_hole_start: 0xC000_0000,
    };
}

/// Guest memory and how it is laid out: what every loader works on.
#[derive(Debug)]
pub struct BootTarget<'a, M: ?Sized> {
    /// The memory itself.
    pub mem: &'a M,
    /// What of it may be used.
    pub memory: &'a MemoryLayout,
    /// Where boot structures go.
    pub layout: &'a BootLayout,
    /// Whether the memory is known to be all zero. If not (a reboot in place), the zero-initialised parts of the
    /// kernel are cleared; on fresh memory that would only touch pages for nothing.
    pub memory_is_zero: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn reserved(start: u64, end: u64) -> MemMapEntry {
        MemMapEntry {
            range: MemRange::from_bounds(start, end),
            kind: MemKind::Reserved,
        }
    }

    fn pc(size: u64) -> MemoryLayout {
        MemoryLayout::new(vec![MemRange { start: 0, size }], vec![reserved(0x9_FC00, MIB)]).unwrap()
    }

    #[test]
    fn map_of_a_pc() {
        let map = pc(512 * MIB).map();
        let plain: Vec<_> = map.iter().map(|e| (e.range.start, e.range.end(), e.kind)).collect();
        assert_eq!(
            plain,
            [
                (0, 0x9_FC00, MemKind::Ram),
                (0x9_FC00, MIB, MemKind::Reserved),
                (MIB, 512 * MIB, MemKind::Ram),
            ]
        );
    }

    #[test]
    fn rejects_what_is_no_layout() {
        assert_eq!(MemoryLayout::new(vec![], vec![]), Err(LayoutError::NoRam));
        let empty = MemRange { start: 5, size: 0 };
        assert!(matches!(
            MemoryLayout::new(vec![empty], vec![]),
            Err(LayoutError::BadRange { start: 5, size: 0 })
        ));
        let wraps = MemRange {
            start: u64::MAX,
            size: 2,
        };
        assert!(MemoryLayout::new(vec![wraps], vec![]).is_err());
        let low = MemRange { start: 0, size: 8192 };
        let high = MemRange {
            start: 4096,
            size: 8192,
        };
        assert!(matches!(
            MemoryLayout::new(vec![high, low], vec![]),
            Err(LayoutError::Overlap { first: 0, second: 4096 })
        ));
    }

    #[test]
    fn fits_stay_clear_of_what_is_avoided() {
        let layout = pc(64 * MIB);
        let window = MemRange::from_bounds(MIB, 48 * MIB);
        assert_eq!(layout.highest_fit(MIB, &window, &[]), Some(47 * MIB));
        let kernel = MemRange::from_bounds(16 * MIB, 48 * MIB);
        assert_eq!(layout.highest_fit(MIB, &window, &[kernel]), Some(15 * MIB));
        assert_eq!(layout.largest_fit(&window, &[kernel]), 15 * MIB);
        assert_eq!(layout.highest_fit(15 * MIB + 1, &window, &[kernel]), None);
    }

    proptest! {
        #[test]
        fn map_agrees_with_every_page(
            ram_pages in proptest::collection::vec((0u64..64, 1u64..8), 1..5),
            reserved_pages in proptest::collection::vec((0u64..80, 1u64..8), 0..5),
        ) {
            let ram: Vec<_> = ram_pages.iter().map(|&(s, n)| MemRange { start: s * PAGE, size: n * PAGE }).collect();
            let reserved: Vec<_> = reserved_pages
                .iter()
                .map(|&(s, n)| reserved(s * PAGE, (s + n) * PAGE))
                .collect();
            if let Ok(layout) = MemoryLayout::new(ram.clone(), reserved.clone()) {
                let map = layout.map();
                for pair in map.windows(2) {
                    prop_assert!(pair[0].range.end() <= pair[1].range.start);
                    prop_assert!(pair[0].range.end() < pair[1].range.start || pair[0].kind != pair[1].kind);
                }
                for page in 0..100 {
                    let at = MemRange { start: page * PAGE, size: PAGE };
                    let told = map.iter().find(|e| e.range.overlaps(&at)).map(|e| e.kind);
                    let expected = if reserved.iter().any(|e| e.range.overlaps(&at)) {
                        Some(MemKind::Reserved)
                    } else if ram.iter().any(|r| r.overlaps(&at)) {
                        Some(MemKind::Ram)
                    } else {
                        None
                    };
                    prop_assert_eq!(told, expected);
                }
            }
        }

        #[test]
        fn largest_fit_is_the_limit(
            size_mib in 2u64..64,
            window_end in 1u64..(64 << 20),
            hole in (0u64..(64 << 20), 0u64..(8 << 20)),
        ) {
            let layout = pc(size_mib * MIB);
            let window = MemRange::from_bounds(MIB, window_end);
            let avoid = [MemRange { start: hole.0, size: hole.1 }];
            let most = layout.largest_fit(&window, &avoid);
            prop_assert_eq!(layout.highest_fit(most + 1, &window, &avoid), None);
            if most > 0 {
                let at = layout.highest_fit(most, &window, &avoid).unwrap();
                let placed = MemRange { start: at, size: most };
                prop_assert_eq!(at % PAGE, 0);
                prop_assert!(window.contains(&placed) && layout.is_usable(&placed));
                prop_assert!(!placed.overlaps(&avoid[0]));
            }
        }
    }
}
