//! Configuration space: registers, the capability list and what of them a guest may write.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{Bar, BarKind, Bars, Bridge};

/// Bits of the COMMAND register (PCI Local Bus 3.0, 6.2.2).
pub mod command {
    /// I/O BARs are decoded.
    pub const IO: u16 = 1 << 0;
    /// Memory BARs are decoded.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may access memory and send messages.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// The function must not use its interrupt pin.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CACHE_LINE: usize = 0x0c;
const HEADER_TYPE: usize = 0x0e;
const BAR0: usize = 0x10;
/// Registers of a bridge (PCI-to-PCI Bridge Architecture 1.2, 3.2.5): numbers of the buses; memory window; prefetchable memory window, with its
/// upper halves; control.
const BUSES: usize = 0x18;
const MEMORY_WINDOW: usize = 0x20;
const PREFETCHABLE_WINDOW: usize = 0x24;
const WINDOW_UPPER: usize = 0x28;
const BRIDGE_CONTROL: usize = 0x3e;
/// Bits of it: parity and SERR, which do nothing; reset of the bus below.
const BRIDGE_ERRORS: u8 = 0x3;
const BUS_RESET: u8 = 1 << 6;
/// Base above limit: nothing passes.
const CLOSED: u32 = 0x0000_fff0;
/// The base has 64 bits, and so has the limit.
const WIDE: u32 = 0x0001_0001;
/// Bits of base and limit that can be written.
const WINDOW_BITS: u32 = 0xfff0_fff0;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;
const LEGACY_SIZE: usize = 0x100;
const EXTENDED_SIZE: usize = 0x1000;

/// Who a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Base class, sub-class and programming interface, in 24 bits.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// A function that cannot be laid out as asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// There is no room for another capability.
    #[error("a capability of {0} bytes does not fit into the configuration space any more")]
    CapabilitySpace(usize),
    /// The BAR register does not exist or is in use.
    #[error("BAR {0} does not exist or is taken")]
    BarTaken(usize),
    /// The size is not a power of two, too small or does not fit the kind of BAR.
    #[error("{0:#x} bytes is no size a BAR of this kind can have")]
    BarSize(u64),
}

/// A saved configuration space: every byte of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigStateV1 {
    /// The registers from offset 0 on.
    pub bytes: Vec<u8>,
}

/// A saved configuration space that belongs to another kind of function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ConfigStateError {
    /// Its size differs.
    #[error("the saved configuration space has {saved} bytes, this function's has {here}")]
    Size {
        /// Bytes saved.
        saved: usize,
        /// Bytes this function has.
        here: usize,
    },
    /// A read-only register differs.
    #[error("the saved read-only register at {0:#x} differs from this function's")]
    Register(usize),
}

/// A configuration space of 256 bytes, or of 4096 once an extended capability was added. Reads past its end are zero.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    writable: Vec<u8>,
    bars: [Option<(BarKind, u64)>; 6],
    link: usize,
    free: usize,
    extended_link: Option<usize>,
    extended_free: usize,
}

impl ConfigSpace {
    /// The registers of a function (type 0) without BARs, capabilities or interrupt pin.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self::header(identity);
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        space
    }

    /// The registers of a bridge (type 1) without capabilities, with windows for memory, all of which are closed, and none for I/O
    /// ports. It shows no subsystem.
    pub fn bridge(identity: &Identity) -> Self {
        let mut space = Self::header(identity);
        space.set(HEADER_TYPE, &[1]);
        space.allow(BUSES, &[0xff; 3]);
        for (at, kind) in [(MEMORY_WINDOW, 0), (PREFETCHABLE_WINDOW, WIDE)] {
            space.set(at, &(CLOSED | kind).to_le_bytes());
            space.allow(at, &WINDOW_BITS.to_le_bytes());
        }
        space.allow(WINDOW_UPPER, &[0xff; 8]);
        space.allow(BRIDGE_CONTROL, &[BRIDGE_ERRORS | BUS_RESET]);
        space
    }

    fn header(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: vec![0; LEGACY_SIZE],
            writable: vec![0; LEGACY_SIZE],
            bars: [None; 6],
            link: CAPABILITIES,
            free: FIRST_CAPABILITY,
            extended_link: None,
            extended_free: LEGACY_SIZE,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision]);
        space.set(0x09, &identity.class.to_le_bytes()[..3]);
        // Parity and SERR enable do nothing, but drivers expect them to stick.
        let command = command::IO | command::MEMORY | command::BUS_MASTER | command::INTX_DISABLE | 1 << 6 | 1 << 8;
        space.allow(COMMAND, &command.to_le_bytes());
        space.allow(CACHE_LINE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Adds BAR `index` of `size` bytes, not placed yet.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64) -> Result<(), LayoutError> {
        let (flags, low_bits, registers, most) = match kind {
            BarKind::Io => (0b01u32, 0b11u32, 1, 1 << 16),
            BarKind::Memory32 { prefetchable } => (u32::from(prefetchable) << 3, 0xf, 1, 1 << 31),
            BarKind::Memory64 { prefetchable } => (0b100 | u32::from(prefetchable) << 3, 0xf, 2, 1 << 63),
        };
        // A 64-bit BAR needs the next register too.
        let second_taken = |i: usize| matches!(self.bars.get(i), Some(Some((BarKind::Memory64 { .. }, _))));
        let taken = index + registers > self.bars.len()
            || self.bars[index..index + registers].iter().any(Option::is_some)
            || index.checked_sub(1).is_some_and(second_taken);
        if taken {
            return Err(LayoutError::BarTaken(index));
        }
        if !size.is_power_of_two() || size <= u64::from(low_bits) || size > most {
            return Err(LayoutError::BarSize(size));
        }
        let mask = !(size - 1);
        let at = BAR0 + 4 * index;
        self.set(at, &flags.to_le_bytes());
        self.allow(at, &(mask as u32 & !low_bits).to_le_bytes());
        if registers == 2 {
            self.allow(at + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        self.bars[index] = Some((kind, size));
        Ok(())
    }

    /// Appends a capability: `body` is what follows its id and next pointer, `writable` the bits of it a guest may change (missing
    /// bytes: none). Returns the offset of the capability.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, LayoutError> {
        let at = self.free;
        let end = at + 2 + body.len();
        if end > LEGACY_SIZE || writable.len() > body.len() {
            return Err(LayoutError::CapabilitySpace(body.len() + 2));
        }
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        self.set(self.link, &[at as u8]);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.link = at + 1;
        self.free = end.next_multiple_of(4);
        Ok(at as u16)
    }

    /// Appends an extended capability (PCI Express 4.0, 7.6.3): `body` is what follows its 4-byte header. Returns its offset.
    pub fn add_extended_capability(
        &mut self,
        id: u16,
        version: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, LayoutError> {
        let at = self.extended_free;
        let end = at + 4 + body.len();
        if end > EXTENDED_SIZE || writable.len() > body.len() {
            return Err(LayoutError::CapabilitySpace(body.len() + 4));
        }
        self.bytes.resize(EXTENDED_SIZE, 0);
        self.writable.resize(EXTENDED_SIZE, 0);
        let header = u32::from(id) | u32::from(version & 0xf) << 16;
        self.set(at, &header.to_le_bytes());
        self.set(at + 4, body);
        self.allow(at + 4, writable);
        if let Some(link) = self.extended_link.replace(at) {
            let next = [self.bytes[link + 2] & 0x0f | (at as u8) << 4, (at >> 4) as u8];
            self.set(link + 2, &next);
        }
        self.extended_free = end.next_multiple_of(4);
        Ok(at as u16)
    }

    /// Reads from `offset`; what is past the end is zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let have = self.bytes.get(usize::from(offset)..).unwrap_or_default();
        let n = have.len().min(data.len());
        data[..n].copy_from_slice(&have[..n]);
        data[n..].fill(0);
    }

    /// Writes the bits a guest may change and ignores the others.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let registers = self.bytes.iter_mut().zip(&self.writable).skip(usize::from(offset));
        for ((byte, mask), new) in registers.zip(data) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// The 16-bit register at `offset`.
    pub fn u16_at(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// The 32-bit register at `offset`.
    pub fn u32_at(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The BARs as they stand.
    pub fn bars(&self) -> Bars {
        let command = self.u16_at(COMMAND as u16);
        let mut bars = Bars::default();
        for (i, (bar, layout)) in bars.iter_mut().zip(&self.bars).enumerate() {
            let Some((kind, size)) = *layout else { continue };
            let low = u64::from(self.u32_at((BAR0 + 4 * i) as u16));
            let (address, enable) = match kind {
                BarKind::Io => (low & !0x3, command::IO),
                BarKind::Memory32 { .. } => (low & !0xf, command::MEMORY),
                BarKind::Memory64 { .. } => {
                    let high = u64::from(self.u32_at((BAR0 + 4 * i + 4) as u16));
                    (high << 32 | low & !0xf, command::MEMORY)
                }
            };
            *bar = Some(Bar {
                kind,
                size,
                address,
                decoded: command & enable != 0,
            });
        }
        bars
    }

    /// What a bridge lets through as it stands.
    pub(crate) fn forwards(&self) -> Bridge {
        let on = self.u16_at(COMMAND as u16) & command::MEMORY != 0;
        let upper = |at: usize| u64::from(self.u32_at(at as u16)) << 32;
        let window = |at: usize, (base, limit): (u64, u64)| {
            let both = u64::from(self.u32_at(at as u16) & WINDOW_BITS);
            let (first, last) = (base | (both & 0xffff) << 16, limit | both & 0xffff_0000 | 0xf_ffff);
            (on && first <= last).then_some((first, last))
        };
        let upper = (upper(WINDOW_UPPER), upper(WINDOW_UPPER + 4));
        Bridge {
            secondary: self.bytes[BUSES + 1],
            windows: [window(MEMORY_WINDOW, (0, 0)), window(PREFETCHABLE_WINDOW, upper)],
            reset: self.bytes[BRIDGE_CONTROL] & BUS_RESET != 0,
        }
    }

    /// Every register, for a snapshot.
    pub fn save(&self) -> ConfigStateV1 {
        ConfigStateV1 {
            bytes: self.bytes.clone(),
        }
    }

    /// Takes over saved registers. Those a guest cannot write must be the same here: they are what its driver saw.
    pub fn restore(&mut self, state: &ConfigStateV1) -> Result<(), ConfigStateError> {
        let (saved, here) = (state.bytes.len(), self.bytes.len());
        if saved != here {
            return Err(ConfigStateError::Size { saved, here });
        }
        let differs = |i: &usize| (state.bytes[*i] ^ self.bytes[*i]) & !self.writable[*i] != 0;
        if let Some(offset) = (0..here).find(differs) {
            return Err(ConfigStateError::Register(offset));
        }
        self.bytes.copy_from_slice(&state.bytes);
        Ok(())
    }

    fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MEM32: BarKind = BarKind::Memory32 { prefetchable: false };
    const MEM64: BarKind = BarKind::Memory64 { prefetchable: true };

    fn space() -> ConfigSpace {
        ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_23_45,
            subsystem_vendor: 0xaaaa,
            subsystem: 0xbbbb,
        })
    }

    #[test]
    fn the_header_says_who_it_is() {
        let mut s = space();
        s.write(0, &[0xff; 64]);
        assert_eq!(s.u32_at(0), 0x1042_1af4);
        assert_eq!(s.u32_at(8), 0x0123_4501);
        assert_eq!(s.u32_at(0x2c), 0xbbbb_aaaa);
        assert_eq!(s.u16_at(4), 0x0547, "command bits that exist stick");
        assert_eq!(s.u32_at(0x3c), 0xff, "line sticks, pin is none");
    }

    #[test]
    fn bars_are_sized_by_all_ones() {
        let mut s = space();
        s.add_bar(0, MEM64, 0x8000).expect("bar");
        s.add_bar(2, MEM32, 0x1000).expect("bar");
        s.add_bar(3, BarKind::Io, 0x20).expect("bar");
        for (at, ones) in [
            (0x10, 0xffff_800c),
            (0x14, 0xffff_ffff),
            (0x18, 0xffff_f000),
            (0x1c, 0xffff_ffe1),
            (0x20, 0),
        ] {
            s.write(at, &[0xff; 4]);
            assert_eq!(s.u32_at(at), ones, "{at:#x}");
        }
        s.write(0x10, &0x1234_8000u32.to_le_bytes());
        s.write(0x14, &0x56u32.to_le_bytes());
        s.write(4, &[2]);
        let bars = s.bars();
        let bar = bars[0].expect("bar");
        assert_eq!((bar.address, bar.size, bar.decoded), (0x56_1234_8000, 0x8000, true));
        assert!(bars[1].is_none());
        assert!(bars[3].is_some_and(|b| !b.decoded && b.is_being_sized()));
    }

    #[test]
    fn huge_bars_are_sized_in_the_upper_register() {
        let mut s = space();
        s.add_bar(4, MEM64, 1 << 34).expect("bar");
        s.write(0x20, &[0xff; 8]);
        assert_eq!((s.u32_at(0x20), s.u32_at(0x24)), (0xc, 0xffff_fffc));
    }

    #[test]
    fn impossible_bars_are_refused() {
        let mut s = space();
        s.add_bar(0, MEM64, 0x1000).expect("bar");
        for index in [0, 1, 6, 7] {
            assert_eq!(s.add_bar(index, MEM32, 0x1000), Err(LayoutError::BarTaken(index)));
        }
        assert_eq!(s.add_bar(5, MEM64, 0x1000), Err(LayoutError::BarTaken(5)));
        for size in [0, 8, 0x1001, 1 << 32] {
            assert_eq!(s.add_bar(5, MEM32, size), Err(LayoutError::BarSize(size)));
        }
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut s = space();
        assert_eq!(s.u16_at(6) & 0x10, 0);
        let first = s.add_capability(9, &[1, 2, 3], &[0, 0xf0]).expect("room");
        let second = s.add_capability(0x11, &[0; 10], &[]).expect("room");
        assert_eq!(s.u16_at(6) & 0x10, 0x10);
        assert_eq!(s.u16_at(0x34), first);
        assert_eq!(s.u32_at(first), 0x0201_0009 | u32::from(second) << 8);
        assert_eq!(s.u16_at(second), 0x11);
        s.write(first, &[0xff; 8]);
        assert_eq!(s.u32_at(first), 0xf201_0009 | u32::from(second) << 8);
        assert_eq!(
            s.add_capability(9, &[0; 200], &[]),
            Err(LayoutError::CapabilitySpace(202))
        );
    }

    #[test]
    fn extended_capabilities_make_it_4_kib() {
        let mut s = space();
        let mut word = [0xaa; 4];
        s.read(0x100, &mut word);
        assert_eq!(word, [0; 4]);
        assert_eq!(s.add_extended_capability(0x0b, 1, &[7; 4], &[]), Ok(0x100));
        assert_eq!(s.add_extended_capability(0x18, 2, &[8; 4], &[0xff]), Ok(0x108));
        assert_eq!(s.u32_at(0x100), 0x1081_000b);
        assert_eq!(s.u32_at(0x108), 0x0002_0018);
        s.write(0x10c, &[0x55; 4]);
        assert_eq!(s.u32_at(0x10c), 0x0808_0855);
        assert!(s.add_extended_capability(1, 1, &[0; 0x1000], &[]).is_err());
    }

    #[test]
    fn state_fits_only_the_same_function() {
        let mut s = space();
        s.add_bar(0, MEM64, 0x1000).expect("bar");
        let mut other = s.clone();
        s.write(4, &[6]);
        s.write(0x10, &[0, 0, 0x10, 0xc0]);
        other.restore(&s.save()).expect("same function");
        assert_eq!(other.bars(), s.bars());
        let mut state = s.save();
        state.bytes[2] ^= 1;
        assert_eq!(other.restore(&state), Err(ConfigStateError::Register(2)));
        state.bytes.pop();
        assert!(matches!(other.restore(&state), Err(ConfigStateError::Size { .. })));
    }

    proptest! {
        #[test]
        fn any_access_is_safe_and_read_only_bits_stay(
            writes in prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 0..9)), 1..32)
        ) {
            let mut s = space();
            s.add_bar(0, MEM64, 0x8000).expect("bar");
            s.add_capability(9, &[0; 14], &[]).expect("room");
            let before = s.clone();
            for (offset, data) in writes {
                s.write(offset % 0x1100, &data);
                s.read(offset, &mut vec![0; data.len()]);
            }
            for i in 0..s.bytes.len() {
                prop_assert_eq!((s.bytes[i] ^ before.bytes[i]) & !s.writable[i], 0);
            }
            let bar = s.bars()[0].expect("bar");
            prop_assert_eq!(bar.address % bar.size, 0);
        }
    }
}
