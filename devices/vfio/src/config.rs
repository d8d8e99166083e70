//! The configuration space that a guest sees of a device of the host.
//!
//! It is made of the device's own, register by register: what is not known to be harmless is not there. Registers are where the device has
//! them, since drivers of some devices look at fixed places.

mod clique;
mod link;
mod saved;

use std::ops::Range;

use triarch_pci::{Bar, BarKind, Bars, command};

pub use clique::CliqueError;

/// Bytes of a configuration space with extended capabilities.
pub(crate) const SIZE: usize = 0x1000;
const LEGACY_SIZE: usize = 0x100;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const STATUS_INTERRUPT: u8 = 1 << 3;
/// Bits of the control registers of MSI and MSI-X: the function sends messages.
const MSI_ENABLE: u16 = 1;
const MSIX_ENABLE: u16 = 1 << 15;
const CACHE_LINE: usize = 0x0c;
const BAR0: usize = 0x10;
const ROM: usize = 0x30;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;

/// Capabilities a guest may see (PCI Code and ID Assignment, 2).
mod id {
    pub(super) const PM: u8 = 0x01;
    pub(super) const MSI: u8 = 0x05;
    pub(super) const VENDOR: u8 = 0x09;
    pub(super) const EXPRESS: u8 = 0x10;
    pub(super) const MSIX: u8 = 0x11;
    /// Extended ones: what the vendor has there, and the serial number.
    pub(super) const EXTENDED: [u16; 2] = [0x0b, 0x03];
}

/// Bit of a ROM's BAR: it is decoded.
const ROM_ENABLE: u32 = 1;
/// Bit of the device control register of PCI Express that resets the function.
const FLR: u16 = 1 << 15;
/// Of the device capabilities: it can do that.
const FLR_CAPABLE: u32 = 1 << 28;
/// Type of a PCI Express function that is part of the root complex: it has no link.
const INTEGRATED: u16 = 9;

/// Where MSI-X is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MsiXPlace {
    /// Offset of the capability.
    pub(crate) at: u16,
    /// Number of vectors.
    pub(crate) count: u16,
    /// BAR and offset of the table.
    pub(crate) table: (u8, u64),
    /// BAR and offset of the pending bits.
    pub(crate) pending: (u8, u64),
}

/// Where MSI is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MsiPlace {
    /// Offset of the capability.
    pub(crate) at: u16,
    /// Vectors the device can have, a power of two.
    pub(crate) count: u16,
    /// Its address has 64 bits.
    pub(crate) wide: bool,
    /// Vectors can be masked.
    pub(crate) masks: bool,
}

impl MsiPlace {
    /// Where its data register is.
    pub(crate) fn data(self) -> u16 {
        self.at + if self.wide { 12 } else { 8 }
    }

    /// Where its mask bits are, if it has them.
    pub(crate) fn mask(self) -> Option<u16> {
        self.masks.then_some(self.at + if self.wide { 16 } else { 12 })
    }

    /// Its bytes.
    fn size(self) -> usize {
        match (self.wide, self.masks) {
            (false, false) => 10,
            (true, false) => 14,
            (false, true) => 20,
            (true, true) => 24,
        }
    }
}

/// What a write of the guest's means beside another value in a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Effects {
    /// COMMAND changed.
    pub(crate) command: bool,
    /// MSI's or MSI-X's registers changed.
    pub(crate) messages: bool,
    /// The function is to be reset.
    pub(crate) reset: bool,
}

/// The registers.
pub(crate) struct Config {
    bytes: Box<[u8; SIZE]>,
    /// Bits that the guest can change.
    writable: Box<[u8; SIZE]>,
    /// Bits whose value the device tells.
    live: Box<[u8; SIZE]>,
    bars: [Option<(BarKind, u64)>; 6],
    rom: Option<u64>,
    msix: Option<MsiXPlace>,
    msi: Option<MsiPlace>,
    express: Option<usize>,
    /// Where the device has capabilities, also those that are not seen.
    taken: Vec<usize>,
}

fn u16_of(bytes: &[u8], at: usize) -> u16 {
    let byte = |i| u16::from(bytes.get(at + i).copied().unwrap_or(0));
    byte(0) | byte(1) << 8
}

fn u32_of(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_of(bytes, at)) | u32::from(u16_of(bytes, at + 2)) << 16
}

impl Config {
    /// What a guest sees of the device with the registers `device`, whose BARs have `sizes` bytes; `ports`: it can have BARs of I/O ports.
    pub(crate) fn new(device: &[u8; SIZE], sizes: &[u64; 6], ports: bool) -> Self {
        let mut config = Self {
            bytes: Box::new([0; SIZE]),
            writable: Box::new([0; SIZE]),
            live: Box::new([0; SIZE]),
            bars: [None; 6],
            rom: None,
            msix: None,
            msi: None,
            express: None,
            taken: Vec::new(),
        };
        // Vendor and device; revision and class; the subsystem's.
        for range in [0x00..0x04, 0x08..0x0c, 0x2c..0x30] {
            config.bytes[range.clone()].copy_from_slice(&device[range]);
        }
        let bits = command::IO | command::MEMORY | command::BUS_MASTER | command::INTX_DISABLE | 1 << 6 | 1 << 8;
        config.writable[COMMAND..COMMAND + 2].copy_from_slice(&bits.to_le_bytes());
        config.writable[CACHE_LINE] = 0xff;
        config.writable[INTERRUPT_LINE] = 0xff;
        config.lay_out_bars(device, sizes, ports);
        config.take_capabilities(device);
        config.take_extended(device);
        config
    }

    fn lay_out_bars(&mut self, device: &[u8; SIZE], sizes: &[u64; 6], ports: bool) {
        let mut index = 0;
        while index < 6 {
            let (at, size) = (BAR0 + 4 * index, sizes[index]);
            let register = u32_of(device, at);
            let prefetchable = register & 0x8 != 0;
            let kind = match register & 0x7 {
                bits if bits & 1 != 0 => BarKind::Io,
                0b100 => BarKind::Memory64 { prefetchable },
                _ => BarKind::Memory32 { prefetchable },
            };
            let wide = matches!(kind, BarKind::Memory64 { .. });
            let most = match kind {
                BarKind::Io => 1 << 16,
                BarKind::Memory32 { .. } => 1 << 31,
                BarKind::Memory64 { .. } => 1 << 62,
            };
            let usable = size.is_power_of_two() && (16..=most).contains(&size) || kind == BarKind::Io && size >= 4;
            if usable && size.is_power_of_two() && (ports || kind != BarKind::Io) && !(wide && index == 5) {
                let low = register & if kind == BarKind::Io { 0x1 } else { 0xf };
                self.bytes[at..at + 4].copy_from_slice(&low.to_le_bytes());
                let mask = !(size - 1);
                let low_mask = mask as u32 & if kind == BarKind::Io { !0x3 } else { !0xf };
                self.writable[at..at + 4].copy_from_slice(&low_mask.to_le_bytes());
                if wide {
                    self.writable[at + 4..at + 8].copy_from_slice(&((mask >> 32) as u32).to_le_bytes());
                }
                self.bars[index] = Some((kind, size));
            }
            index += 1 + usize::from(wide);
        }
    }

    /// The capabilities that a guest may see, in the order the device has them.
    fn take_capabilities(&mut self, device: &[u8; SIZE]) {
        if u16_of(device, STATUS) & STATUS_CAPABILITIES == 0 {
            return;
        }
        let mut link = CAPABILITIES;
        let mut at = usize::from(device[CAPABILITIES] & !3);
        // Each takes 4 bytes at least: a chain that is longer loops.
        for _ in 0..(LEGACY_SIZE - FIRST_CAPABILITY) / 4 {
            if at < FIRST_CAPABILITY {
                break;
            }
            self.taken.push(at);
            if let Some(size) = self.take_capability(device, at) {
                debug_assert!(at + size <= LEGACY_SIZE);
                self.bytes[at] = device[at];
                self.bytes[at + 1] = 0;
                self.bytes[link] = at as u8;
                link = at + 1;
            }
            at = usize::from(device[at + 1] & !3);
        }
        if link != CAPABILITIES {
            self.bytes[STATUS] |= STATUS_CAPABILITIES as u8;
        }
    }

    /// Takes over what follows the header of the capability at `at`, if it may be seen and is whole. Returns its bytes.
    fn take_capability(&mut self, device: &[u8; SIZE], at: usize) -> Option<usize> {
        let fits = |size: usize| (at + size <= LEGACY_SIZE).then_some(size);
        let seen = self.bytes[at] != 0;
        match device[at] {
            _ if seen => None,
            id::PM => {
                let size = fits(8)?;
                // No wake-up events; the states are the guest's own: the host keeps the device awake.
                let capabilities = u16_of(device, at + 2) & 0x07ff;
                self.bytes[at + 2..at + 4].copy_from_slice(&capabilities.to_le_bytes());
                self.bytes[at + 4] = device[at + 4] & 0x08;
                self.writable[at + 4] = 0x03;
                Some(size)
            }
            id::MSI if self.msi.is_none() => {
                let control = u16_of(device, at + 2);
                let place = MsiPlace {
                    at: at as u16,
                    count: 1 << (control >> 1 & 7).min(5),
                    wide: control & 1 << 7 != 0,
                    masks: control & 1 << 8 != 0,
                };
                let size = fits(place.size())?;
                let seen = control & (0x7 << 1 | 1 << 7 | 1 << 8);
                self.bytes[at + 2..at + 4].copy_from_slice(&seen.to_le_bytes());
                self.writable[at + 2] = 0x71;
                self.writable[at + 4..at + 8].copy_from_slice(&[0xfc, 0xff, 0xff, 0xff]);
                if place.wide {
                    self.writable[at + 8..at + 12].fill(0xff);
                }
                let data = usize::from(place.data());
                self.writable[data..data + 2].fill(0xff);
                if let Some(mask) = place.mask().map(usize::from) {
                    self.writable[mask..mask + 4].fill(0xff);
                }
                self.msi = Some(place);
                Some(size)
            }
            id::MSIX if self.msix.is_none() => {
                let size = fits(12)?;
                let place = |register: u32| ((register & 7) as u8, u64::from(register & !7));
                self.bytes[at + 2..at + 12].copy_from_slice(&device[at + 2..at + 12]);
                let count = u16_of(device, at + 2) & 0x7ff;
                self.bytes[at + 2..at + 4].copy_from_slice(&count.to_le_bytes());
                self.writable[at + 3] = 0xc0;
                self.msix = Some(MsiXPlace {
                    at: at as u16,
                    count: count + 1,
                    table: place(u32_of(device, at + 4)),
                    pending: place(u32_of(device, at + 8)),
                });
                Some(size)
            }
            id::VENDOR => {
                let size = fits(usize::from(device[at + 2]).max(3))?;
                self.bytes[at + 2] = device[at + 2];
                self.live[at + 3..at + size].fill(0xff);
                Some(size)
            }
            id::EXPRESS if self.express.is_none() => self.take_express(device, at),
            _ => None,
        }
    }

    /// PCI Express (PCI Express 4.0, 7.5.3). On a bus without a port above, a function is part of the root complex and has no link; see
    /// `link.rs` for the others.
    fn take_express(&mut self, device: &[u8; SIZE], at: usize) -> Option<usize> {
        let flags = u16_of(device, at + 2);
        let version = flags & 0xf;
        let size = if version >= 2 { 0x3c } else { 0x14 };
        if at + size > LEGACY_SIZE {
            return None;
        }
        let flags = version | INTEGRATED << 4;
        self.bytes[at + 2..at + 4].copy_from_slice(&flags.to_le_bytes());
        let capabilities = u32_of(device, at + 4) & (FLR_CAPABLE | 0x8fff);
        self.bytes[at + 4..at + 8].copy_from_slice(&capabilities.to_le_bytes());
        // Device control: what it says has no effect on the device, which the host has set up, but for the reset.
        self.bytes[at + 8..at + 10].copy_from_slice(&(u16_of(device, at + 8) & !FLR).to_le_bytes());
        self.writable[at + 8..at + 10].copy_from_slice(&0x7fffu16.to_le_bytes());
        // Transactions pending.
        self.live[at + 10] = 1 << 5;
        if version >= 2 {
            // Completion time-outs: the device's own are what counts.
            let capabilities = u32_of(device, at + 0x24) & 0x1f;
            self.bytes[at + 0x24..at + 0x28].copy_from_slice(&capabilities.to_le_bytes());
            self.writable[at + 0x28] = 0x1f;
        }
        self.express = Some(at);
        Some(size)
    }

    /// The extended capabilities that a guest may see.
    fn take_extended(&mut self, device: &[u8; SIZE]) {
        if self.express.is_none() {
            return;
        }
        let mut at = LEGACY_SIZE;
        let mut last = None;
        for _ in 0..(SIZE - LEGACY_SIZE) / 8 {
            let header = u32_of(device, at);
            let (id, next) = (header as u16, (header >> 20) as usize & !3);
            let size = match id {
                0x0b => (u32_of(device, at + 4) >> 20) as usize,
                _ => 12,
            };
            let whole = size >= 8 && at + size <= SIZE;
            if id::EXTENDED.contains(&id) && whole && self.bytes[at] == 0 {
                self.bytes[at..at + 8].copy_from_slice(&device[at..at + 8]);
                self.bytes[at + 2] &= 0x0f;
                self.bytes[at + 3] = 0;
                self.live[at + 8..at + size].fill(0xff);
                self.link_extended(last, at);
                last = Some(at);
            }
            if next < LEGACY_SIZE || next + 8 > SIZE {
                break;
            }
            at = next;
        }
    }

    /// Makes the extended capability at `at` the one after `last`. The chain begins at 0x100 whatever is there.
    fn link_extended(&mut self, last: Option<usize>, at: usize) {
        let from = match last {
            Some(last) => last,
            None if at == LEGACY_SIZE => return,
            None => {
                self.bytes[LEGACY_SIZE..LEGACY_SIZE + 2].fill(0xff);
                LEGACY_SIZE
            }
        };
        self.bytes[from + 2] = self.bytes[from + 2] & 0x0f | (at as u8) << 4;
        self.bytes[from + 3] = (at >> 4) as u8;
    }

    /// Reads `data.len()` bytes at `offset`; `device` reads what the device tells.
    pub(crate) fn read(&self, offset: u16, data: &mut [u8], device: impl FnOnce(&mut [u8]) -> bool) {
        let at = usize::from(offset);
        let Some(bytes) = self.bytes.get(at..at + data.len()) else {
            return data.fill(0xff);
        };
        data.copy_from_slice(bytes);
        let live = &self.live[at..at + data.len()];
        if live.iter().all(|bits| *bits == 0) {
            return;
        }
        let mut told = [0; 8];
        if let Some(told) = told.get_mut(..data.len())
            && device(told)
        {
            for ((byte, bits), told) in data.iter_mut().zip(live).zip(told) {
                *byte = *byte & !bits | *told & bits;
            }
        }
    }

    /// Writes what the guest may change, and tells what else that means.
    pub(crate) fn write(&mut self, offset: u16, data: &[u8]) -> Effects {
        let at = usize::from(offset);
        let end = at + data.len();
        let touches = |place: Option<usize>, len: usize| place.is_some_and(|place| at < place + len && place < end);
        let msix = self.msix.map(|place| usize::from(place.at));
        let msi = self.msi.map(|place| (usize::from(place.at), place.size()));
        let flr = self
            .express
            .filter(|at| u32_of(&self.bytes[..], at + 4) & FLR_CAPABLE != 0);
        let flr = flr.map(|at| at + 9);
        let reset = touches(flr, 1) && flr.is_some_and(|at| data[at - usize::from(offset)] & (FLR >> 8) as u8 != 0);
        let before = self.command();
        let registers = self.bytes.iter_mut().zip(self.writable.iter()).skip(at);
        for ((byte, mask), new) in registers.zip(data) {
            *byte = *byte & !mask | new & mask;
        }
        Effects {
            command: before != self.command(),
            messages: touches(msix, 4) || msi.is_some_and(|(at, size)| touches(Some(at), size)),
            reset,
        }
    }

    /// As after a reset of the function: it decodes nothing and sends no messages. BARs stay: whoever resets writes them again.
    pub(crate) fn reset(&mut self) {
        self.bytes[COMMAND..COMMAND + 2].fill(0);
        if let Some(place) = self.msix {
            self.bytes[usize::from(place.at) + 3] &= !0xc0;
        }
        if let Some(place) = self.msi {
            self.bytes[usize::from(place.at) + 2] &= !0x71;
        }
    }

    /// COMMAND as the guest set it.
    pub(crate) fn command(&self) -> u16 {
        u16_of(&self.bytes[..], COMMAND)
    }

    /// The 16-bit register at `offset`, as the guest set it.
    pub(crate) fn u16_at(&self, offset: u16) -> u16 {
        u16_of(&self.bytes[..], offset.into())
    }

    /// The 32-bit register at `offset`, as the guest set it.
    pub(crate) fn u32_at(&self, offset: u16) -> u32 {
        u32_of(&self.bytes[..], offset.into())
    }

    /// Where MSI-X is, if the device has it.
    pub(crate) fn msix(&self) -> Option<MsiXPlace> {
        self.msix
    }

    /// Has MSI-X of no more than `most` vectors: those of which the host has interrupts at all.
    pub(crate) fn limit_msix(&mut self, most: u16) {
        let Some(place) = &mut self.msix else { return };
        place.count = place.count.min(most.max(1));
        let at = usize::from(place.at) + 2;
        let control = u16_of(&self.bytes[..], at) & !0x7ff | (place.count - 1);
        self.bytes[at..at + 2].copy_from_slice(&control.to_le_bytes());
    }

    /// Parts of BAR `bar` that the guest must not reach by itself: the table of MSI-X and its pending bits.
    pub(crate) fn trapped(&self, bar: u8) -> Vec<Range<u64>> {
        let Some(place) = self.msix else { return Vec::new() };
        let (count, (table, pending)) = (u64::from(place.count), (place.table, place.pending));
        let parts = [(table, 16 * count), (pending, count.div_ceil(64) * 8)];
        let mine = parts.into_iter().filter(|((place, _), _)| *place == bar);
        mine.map(|((_, at), len)| at..at + len).collect()
    }

    /// Where MSI is, if the device has it.
    pub(crate) fn msi(&self) -> Option<MsiPlace> {
        self.msi
    }

    /// Shows that the device interrupts by pin `number` (1: INTA).
    pub(crate) fn show_pin(&mut self, number: u8) {
        self.bytes[INTERRUPT_PIN] = number;
        self.live[STATUS] |= STATUS_INTERRUPT;
    }

    /// Whether the guest may be interrupted by the pin: the function was switched on, sends no messages, and the pin is not switched off.
    pub(crate) fn uses_pin(&self) -> bool {
        let command = self.command();
        let enabled = |at: u16, bit: u16| self.u16_at(at + 2) & bit != 0;
        let msi = self.msi.is_some_and(|place| enabled(place.at, MSI_ENABLE));
        let msix = self.msix.is_some_and(|place| enabled(place.at, MSIX_ENABLE));
        command & (command::IO | command::MEMORY) != 0 && command & command::INTX_DISABLE == 0 && !msi && !msix
    }

    /// Shows a ROM of `size` bytes, a power of two.
    pub(crate) fn show_rom(&mut self, size: u64) {
        let mask = !(size - 1) as u32 | ROM_ENABLE;
        self.writable[ROM..ROM + 4].copy_from_slice(&mask.to_le_bytes());
        self.rom = Some(size);
    }

    /// Its BAR as it stands.
    pub(crate) fn rom(&self) -> Option<Bar> {
        let register = u32_of(&self.bytes[..], ROM);
        self.rom.map(|size| Bar {
            kind: BarKind::Memory32 { prefetchable: false },
            size,
            address: u64::from(register & !ROM_ENABLE),
            decoded: self.command() & command::MEMORY != 0 && register & ROM_ENABLE != 0,
        })
    }

    /// The BARs as they stand.
    pub(crate) fn bars(&self) -> Bars {
        let command = self.command();
        let mut bars = Bars::default();
        for (i, (bar, layout)) in bars.iter_mut().zip(&self.bars).enumerate() {
            let Some((kind, size)) = *layout else { continue };
            let at = BAR0 + 4 * i;
            let low = u64::from(u32_of(&self.bytes[..], at));
            let (address, enable) = match kind {
                BarKind::Io => (low & !0x3, command::IO),
                BarKind::Memory32 { .. } => (low & !0xf, command::MEMORY),
                BarKind::Memory64 { .. } => {
                    let high = u64::from(u32_of(&self.bytes[..], at + 4));
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
}
