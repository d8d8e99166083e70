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
