//! How a guest reaches configuration space.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use triarch_device_core::{AccessError, BusDevice};

use crate::{PciAddress, PciRoot};

/// Configuration mechanism 1: address in port 0xcf8, data at 0xcfc to 0xcff (PCI Local Bus 3.0, 3.2.2.3.2). Claim 8 ports at
/// [`ConfigPorts::BASE`]. It reaches the first 256 bytes of the functions on bus 0 of segment 0.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// First port.
    pub const BASE: u64 = 0xcf8;
    /// Number of ports.
    pub const LEN: u64 = 8;

    /// The ports of `root`.
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self {
            root,
            address: AtomicU32::new(0),
        }
    }

    /// The address port, as the guest left it.
    pub fn address(&self) -> u32 {
        self.address.load(Ordering::Relaxed)
    }

    /// Sets the address port: to what was saved.
    pub fn set_address(&self, address: u32) {
        self.address.store(address, Ordering::Relaxed);
    }

    /// The register a data access at `offset` bytes from the first port means; `None` while the address is not enabled.
    fn register(&self, offset: u64) -> Option<(PciAddress, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        let [register, devfn, bus, enable] = address.to_le_bytes();
        let function = PciAddress::from_devfn(self.root.segment(), bus, devfn);
        let register = u16::from(register & !3) | (offset & 3) as u16;
        (enable & 0x80 != 0).then_some((function, register))
    }
}

/// Whether an access is to the data ports and stays in them; an error when it is to nothing that exists.
fn is_data(offset: u64, len: usize) -> Result<bool, AccessError> {
    match (offset, len) {
        (0, 4) => Ok(false),
        (4..8, 1 | 2 | 4) if offset + len as u64 <= 8 => Ok(true),
        _ => Err(AccessError::BadAccess),
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        if !is_data(offset, data.len())? {
            data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
            return Ok(());
        }
        match self.register(offset) {
            Some((function, register)) => self.root.config_read(function, register, data),
            None => data.fill(0xff),
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        if is_data(offset, data.len())? {
            if let Some((function, register)) = self.register(offset) {
                self.root.config_write(function, register, data);
            }
        } else if let Ok(address) = data.try_into() {
            self.address.store(u32::from_le_bytes(address), Ordering::Relaxed);
        }
        Ok(())
    }
}

/// The enhanced configuration access mechanism: 1 MiB of memory for a bus, 4 KiB for a function (PCI Express 4.0, 7.2.2).
pub struct Ecam {
    root: Arc<PciRoot>,
}

impl Ecam {
    /// Bytes one bus takes.
    pub const BUS_LEN: u64 = 1 << 20;

    /// The window of `root`, from bus 0 on.
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root }
    }

    fn register(&self, offset: u64, len: usize) -> Result<(PciAddress, u16), AccessError> {
        let register = (offset & 0xfff) as u16;
        let bus = u8::try_from(offset >> 20).map_err(|_| AccessError::BadAccess)?;
        if !matches!(len, 1 | 2 | 4 | 8) || usize::from(register) + len > 0x1000 {
            return Err(AccessError::BadAccess);
        }
        let function = PciAddress::from_devfn(self.root.segment(), bus, (offset >> 12) as u8);
        Ok((function, register))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let (function, register) = self.register(offset, data.len())?;
        self.root.config_read(function, register, data);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let (function, register) = self.register(offset, data.len())?;
        self.root.config_write(function, register, data);
        Ok(())
    }
}

/// Splits an access of `len` bytes at `offset` into naturally aligned ones of 1, 2 or 4 bytes: position in the access and size.
pub(crate) fn split(offset: u16, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let alignment = (usize::from(offset) + at).trailing_zeros().min(2);
        let left = len.checked_sub(at)?.checked_ilog2()?;
        let piece = (at, 1 << alignment.min(left));
        at += piece.1;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_and_cover_the_access() {
        let pieces = |offset, len| split(offset, len).collect::<Vec<_>>();
        assert_eq!(pieces(0, 4), [(0, 4)]);
        assert_eq!(pieces(0, 8), [(0, 4), (4, 4)]);
        assert_eq!(pieces(3, 2), [(0, 1), (1, 1)]);
        assert_eq!(pieces(1, 4), [(0, 1), (1, 2), (3, 1)]);
        assert_eq!(pieces(2, 2), [(0, 2)]);
        assert_eq!(pieces(0, 0), []);
    }
}
