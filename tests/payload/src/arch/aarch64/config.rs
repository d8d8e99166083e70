//! There are no ports on this architecture, so ECAM is the only way to PCI configuration space.

/// Registers of PCI devices that come and go.
pub const SLOTS: u64 = 0x0907_0000;

/// What cannot be had.
#[derive(Clone, Copy)]
pub enum Ports {}

impl Ports {
    /// There are none.
    pub fn find() -> Option<Self> {
        None
    }

    /// Never called, as is all of the rest.
    pub fn read8(self, _: u16, _: u16) -> u8 {
        match self {}
    }

    /// Reads 16 bits.
    pub fn read16(self, _: u16, _: u16) -> u16 {
        match self {}
    }

    /// Reads 32 bits.
    pub fn read32(self, _: u16, _: u16) -> u32 {
        match self {}
    }

    /// Writes 8 bits.
    pub fn write8(self, _: u16, _: u16, _: u8) {
        match self {}
    }

    /// Writes 16 bits.
    pub fn write16(self, _: u16, _: u16, _: u16) {
        match self {}
    }

    /// Writes 32 bits.
    pub fn write32(self, _: u16, _: u16, _: u32) {
        match self {}
    }
}
