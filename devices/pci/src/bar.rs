//! Base address registers and the windows their addresses come from.

use std::ops::Range;

/// Which address space a BAR decodes, and how wide it is (PCI Local Bus 3.0, 6.2.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Memory below 4 GiB.
    Memory32 {
        /// Reads have no side effects and writes may be merged.
        prefetchable: bool,
    },
    /// Memory anywhere; takes two registers.
    Memory64 {
        /// Reads have no side effects and writes may be merged.
        prefetchable: bool,
    },
    /// I/O ports.
    Io,
}

/// One BAR as it stands now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Address space.
    pub kind: BarKind,
    /// Size in bytes, a power of two.
    pub size: u64,
    /// Address in the register: a GPA or a port. Zero until someone placed it.
    pub address: u64,
    /// Whether COMMAND enables the address space.
    pub decoded: bool,
}

impl Bar {
    /// Whether the register holds what a guest writes to learn its size: then the address is not meant.
    pub(crate) fn is_being_sized(&self) -> bool {
        (self.address | (self.size - 1)) as u32 == u32::MAX
    }

    /// First and last address.
    pub(crate) fn span(&self) -> Option<(u64, u64)> {
        Some((self.address, self.address.checked_add(self.size - 1)?))
    }
}

/// The BARs of a function by register number; the second register of a 64-bit BAR is `None`.
pub type Bars = [Option<Bar>; 6];

/// Finds addresses for BARs inside the windows the machine forwards to PCI. A BAR outside of them is not decoded.
///
/// It keeps no list of what it gave: what is taken is what the functions' registers say, so addresses the guest chose itself count,
/// and those of a removed function are free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BarAllocator {
    /// GPAs for 32-bit memory BARs.
    pub mmio32: Range<u64>,
    /// GPAs for 64-bit memory BARs; those fall back to `mmio32` when it is full.
    pub mmio64: Range<u64>,
    /// I/O ports.
    pub io: Range<u16>,
}

impl BarAllocator {
    /// The lowest aligned place for `size` bytes (a power of two) that overlaps nothing in `taken`, which lists first and last
    /// addresses in the same address space. `None` when there is none.
    pub(crate) fn place(&self, kind: BarKind, size: u64, taken: &[(u64, u64)]) -> Option<u64> {
        self.place_aligned(kind, size, size, taken)
    }

    /// The same for any `size`, at a multiple of `align`.
    pub(crate) fn place_aligned(&self, kind: BarKind, size: u64, align: u64, taken: &[(u64, u64)]) -> Option<u64> {
        self.windows(kind)
            .into_iter()
            .find_map(|window| first_fit(&window, size, align, taken))
    }

    /// The windows of `count` root buses, one beside the other, of which the first has all I/O ports. Below 4 GiB the others have the upper parts, as
    /// large as the first's or a little smaller. Above, they have parts of a power of two of bytes, at a multiple of it, one behind the other: 4 TiB at
    /// most, so that they are not beyond what IOMMUs translate.
    pub fn divided(&self, count: usize) -> Vec<Self> {
        const STEP: u64 = 32 << 20;
        const MOST_BITS: u32 = 42;
        let parts = (count as u64).max(1);
        let size = |window: &Range<u64>| window.end.saturating_sub(window.start) / parts;
        let narrow = size(&self.mmio32) / STEP * STEP;
        let most = size(&self.mmio64)
            .checked_ilog2()
            .map_or(0, |bits| 1 << bits.min(MOST_BITS));
        // What is not used of the first multiple may be missing at the end.
        let fits = |wide: u64| -> Option<u64> {
            let first = self.mmio64.start.checked_next_multiple_of(wide)?;
            let last = first.checked_add(wide.checked_mul(parts - 1)?)?;
            (last + (wide >> 1) < self.mmio64.end).then_some(first)
        };
        let place = (0..u64::BITS)
            .map(|halved| most >> halved)
            .find_map(|wide| Some((fits(wide)?, wide)));
        let narrow = |part| {
            let end = self.mmio32.end - narrow * (parts - 1 - part);
            if part == 0 {
                self.mmio32.start..end
            } else {
                end - narrow..end
            }
        };
        let wide = |part| match (place, part) {
            _ if parts == 1 => self.mmio64.clone(),
            (Some((first, wide)), 0) => self.mmio64.start..first + wide,
            (Some((first, wide)), _) => first + part * wide..(first + (part + 1) * wide).min(self.mmio64.end),
            (None, _) => self.mmio64.start..self.mmio64.start,
        };
        let part = |part| Self {
            mmio32: narrow(part),
            mmio64: wide(part),
            io: if part == 0 { self.io.clone() } else { 0..0 },
        };
        (0..parts).map(part).collect()
    }

    /// Whether `[first, last]` lies in a window for this kind of BAR.
    pub(crate) fn forwards(&self, kind: BarKind, first: u64, last: u64) -> bool {
        self.windows(kind)
            .iter()
            .any(|w| !w.is_empty() && w.start <= first && last < w.end)
    }

    fn windows(&self, kind: BarKind) -> [Range<u64>; 2] {
        match kind {
            BarKind::Memory32 { .. } => [self.mmio32.clone(), 0..0],
            BarKind::Memory64 { .. } => [self.mmio64.clone(), self.mmio32.clone()],
            BarKind::Io => [u64::from(self.io.start)..u64::from(self.io.end), 0..0],
        }
    }
}

fn first_fit(window: &Range<u64>, size: u64, align: u64, taken: &[(u64, u64)]) -> Option<u64> {
    // Address zero means "not placed" in a BAR.
    let mut at = window.start.max(1).checked_next_multiple_of(align)?;
    loop {
        let last = at.checked_add(size - 1)?;
        if last >= window.end {
            return None;
        }
        match taken.iter().filter(|(first, end)| *first <= last && at <= *end).max() {
            None => return Some(at),
            Some((_, end)) => at = end.checked_add(1)?.checked_next_multiple_of(align)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEM32: BarKind = BarKind::Memory32 { prefetchable: false };
    const MEM64: BarKind = BarKind::Memory64 { prefetchable: true };

    fn windows() -> BarAllocator {
        BarAllocator {
            mmio32: 0xc000_0000..0xc000_4000,
            mmio64: 0x1_0000_1000..0x1_0000_8000,
            io: 0..0x100,
        }
    }

    #[test]
    fn places_are_aligned_and_free() {
        let w = windows();
        assert_eq!(w.place(MEM64, 0x1000, &[]), Some(0x1_0000_1000));
        assert_eq!(w.place(MEM64, 0x4000, &[]), Some(0x1_0000_4000));
        let taken = [(0x1_0000_1000, 0x1_0000_1fff), (0x1_0000_3000, 0x1_0000_3fff)];
        assert_eq!(w.place(MEM64, 0x1000, &taken), Some(0x1_0000_2000));
        assert_eq!(w.place(MEM64, 0x2000, &taken), Some(0x1_0000_4000));
    }

    #[test]
    fn wide_bars_fall_back_and_narrow_ones_do_not() {
        let w = windows();
        let full = [(0x1_0000_0000, 0x1_0000_ffff)];
        assert_eq!(w.place(MEM64, 0x1000, &full), Some(0xc000_0000));
        assert_eq!(w.place(MEM32, 0x1000, &[(0xc000_0000, 0xc000_3fff)]), None);
        assert_eq!(w.place(MEM32, 0x8000, &[]), None);
    }

    #[test]
    fn a_bar_is_never_placed_at_zero() {
        assert_eq!(windows().place(BarKind::Io, 0x20, &[]), Some(0x20));
    }

    #[test]
    fn root_buses_have_their_own_parts_of_the_windows() {
        let all = BarAllocator {
            mmio32: 0xc000_0000..0xe800_0000,
            mmio64: 0x1_0000_0000..0xff_ffff_0000,
            io: 0x1000..0xf000,
        };
        assert_eq!(all.divided(1), std::slice::from_ref(&all));
        let two = all.divided(2);
        assert_eq!(
            (two[0].mmio32.clone(), two[1].mmio32.clone()),
            (0xc000_0000..0xd400_0000, 0xd400_0000..0xe800_0000)
        );
        assert_eq!(two[0].mmio64, 0x1_0000_0000..0x80_0000_0000);
        assert_eq!(two[1].mmio64, 0x80_0000_0000..0xc0_0000_0000);
        assert_eq!((two[0].io.clone(), two[1].io.clone()), (0x1000..0xf000, 0..0));
        let three = all.divided(3);
        assert_eq!(
            three[2].mmio64,
            0xc0_0000_0000..0xff_ffff_0000,
            "less what is missing above"
        );
        let eight = all.divided(8);
        assert_eq!(
            (eight[1].mmio32.clone(), eight[7].mmio32.end),
            (0xcc00_0000..0xd000_0000, 0xe800_0000)
        );
        for (one, next) in eight.iter().zip(&eight[1..]) {
            assert_eq!((one.mmio32.end, one.mmio64.end), (next.mmio32.start, next.mmio64.start));
            assert!(next.mmio64.start.is_multiple_of(64 << 30), "{next:x?}");
        }
        let wide = BarAllocator {
            mmio64: 0x1_0000_0000..1 << 52,
            ..all.clone()
        };
        assert_eq!(wide.divided(8)[7].mmio64, 8 << 42..9 << 42);
        for size in [1u64 << 20, 3 << 30, 60 << 30] {
            let small = BarAllocator {
                mmio64: 0x1_4000_0000..0x1_4000_0000 + size,
                ..all.clone()
            };
            for count in 2..=8 {
                let parts = small.divided(count);
                assert!(parts.iter().all(|part| !part.mmio64.is_empty()), "{parts:x?}");
                assert!(
                    parts.windows(2).all(|two| two[0].mmio64.end == two[1].mmio64.start),
                    "{parts:x?}"
                );
                assert!(parts[count - 1].mmio64.end <= small.mmio64.end, "{parts:x?}");
            }
        }
        let none = BarAllocator {
            mmio64: u64::MAX..u64::MAX,
            ..all
        };
        assert!(
            none.divided(8)
                .iter()
                .all(|windows| windows.mmio64.is_empty() && !windows.mmio32.is_empty())
        );
    }

    #[test]
    fn the_end_of_the_address_space_is_no_trap() {
        let w = BarAllocator {
            mmio64: u64::MAX - 0xfff..u64::MAX,
            ..windows()
        };
        assert_eq!(first_fit(&w.mmio64, 0x1000, 0x1000, &[]), None);
        assert!(!w.forwards(MEM64, u64::MAX - 0xfff, u64::MAX));
        assert!(w.forwards(MEM32, 0xc000_0000, 0xc000_0fff));
        assert!(!w.forwards(MEM32, 0xc000_3000, 0xc000_4000));
    }
}
