//! PCI configuration space by ports 0xcf8 and 0xcfc (PCI 3.0 §3.2.2.3.2).

use super::io::{inb, inl, inw, outb, outl, outw};

/// Registers of PCI devices that come and go.
pub const SLOTS: u64 = 0xfe02_0000;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;

/// The ports.
#[derive(Clone, Copy)]
pub struct Ports(());

impl Ports {
    /// They are always there.
    pub fn find() -> Option<Self> {
        Some(Self(()))
    }

    fn select(bdf: u16, register: u16) -> u16 {
        outl(ADDRESS, 1 << 31 | u32::from(bdf) << 8 | u32::from(register & 0xfc));
        DATA + (register & 3)
    }

    /// Reads 8 bits.
    pub fn read8(self, bdf: u16, register: u16) -> u8 {
        inb(Self::select(bdf, register))
    }

    /// Reads 16 bits.
    pub fn read16(self, bdf: u16, register: u16) -> u16 {
        inw(Self::select(bdf, register))
    }

    /// Reads 32 bits.
    pub fn read32(self, bdf: u16, register: u16) -> u32 {
        inl(Self::select(bdf, register))
    }

    /// Writes 16 bits.
    pub fn write16(self, bdf: u16, register: u16, value: u16) {
        outw(Self::select(bdf, register), value);
    }

    /// Writes 32 bits.
    pub fn write32(self, bdf: u16, register: u16, value: u32) {
        outl(Self::select(bdf, register), value);
    }

    /// Writes 8 bits.
    pub fn write8(self, bdf: u16, register: u16, value: u8) {
        outb(Self::select(bdf, register), value);
    }
}
