//! Address spaces that route guest accesses to devices.

use std::sync::Arc;

use arc_swap::ArcSwap;
use thiserror::Error;

/// Why a device did not serve an access. The bus never hides one: reads then see all ones, writes go nowhere, and the caller
/// decides what to log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum AccessError {
    /// No device claims the address.
    #[error("no device claims this address")]
    Unclaimed,
    /// The device has no register of this size at this offset.
    #[error("the device has no register of this size here")]
    BadAccess,
}

/// A device that answers guest loads and stores. Accesses come from any vCPU thread at any time, so the device locks what it
/// needs and nothing more.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` (bytes from the start of the claimed range).
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError>;
    /// Writes `data` at `offset` (bytes from the start of the claimed range).
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError>;
}

/// A [`BusDevice`] whose registers are single bytes: accesses of any other size, or beyond the last one, are refused before it
/// sees them.
pub trait ByteRegisters: Send + Sync {
    /// How many there are: the bytes to claim.
    const COUNT: u64;
    /// Reads the register at `offset` (bytes from the start of the claimed range).
    ///
    /// # Errors
    /// [`AccessError::BadAccess`]: there is none.
    fn read_byte(&self, offset: u64) -> Result<u8, AccessError>;
    /// Writes the register at `offset` (bytes from the start of the claimed range).
    ///
    /// # Errors
    /// [`AccessError::BadAccess`]: there is none.
    fn write_byte(&self, offset: u64, value: u8) -> Result<(), AccessError>;
}

impl<T: ByteRegisters> BusDevice for T {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let (true, [value]) = (offset < T::COUNT, data) else {
            return Err(AccessError::BadAccess);
        };
        *value = self.read_byte(offset)?;
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let (true, &[value]) = (offset < T::COUNT, data) else {
            return Err(AccessError::BadAccess);
        };
        self.write_byte(offset, value)
    }
}

/// Why a range could not be claimed or moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BusError {
    /// The range overlaps another device's.
    #[error("the range {base:#x}+{len:#x} overlaps the one claimed at {other:#x}")]
    Overlap {
        /// First address asked for.
        base: u64,
        /// Length asked for, in bytes.
        len: u64,
        /// First address of the range already claimed.
        other: u64,
    },
    /// The range is empty or passes the end of the address space.
    #[error("the range {base:#x}+{len:#x} is empty or passes the end of the address space")]
    Invalid {
        /// First address asked for.
        base: u64,
        /// Length asked for, in bytes.
        len: u64,
    },
    /// Nothing is claimed there.
    #[error("no range is claimed at {base:#x}")]
    NotClaimed {
        /// First address of the range looked for.
        base: u64,
    },
}

#[derive(Clone)]
struct Claim {
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// One address space: MMIO (GPAs) or port I/O. Look-ups take no lock, so a vCPU never waits for another that plugs a device.
#[derive(Default)]
pub struct Bus {
    claims: ArcSwap<Vec<Claim>>,
}

impl Bus {
    /// An empty address space.
    pub fn new() -> Self {
        Self::default()
    }

    /// Routes `[base, base + len)` to `device`.
    pub fn claim(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        self.change(|claims| {
            insert(
                claims,
                Claim {
                    base,
                    len,
                    device: device.clone(),
                },
            )
        })
    }

    /// Gives up the range that starts at `base`.
    pub fn release(&self, base: u64) -> Result<(), BusError> {
        self.change(|claims| take(claims, base).map(|_| ()))
    }

    /// Moves the range that starts at `from` to `to`, as one step: no access sees it gone. On error nothing changes.
    pub fn relocate(&self, from: u64, to: u64) -> Result<(), BusError> {
        self.change(|claims| {
            let claim = take(claims, from)?;
            insert(claims, Claim { base: to, ..claim })
        })
    }

    /// Reads at an absolute address; `data` is all ones when no device serves the access.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let outcome = match self.find(addr, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => Err(AccessError::Unclaimed),
        };
        if outcome.is_err() {
            data.fill(0xff);
        }
        outcome
    }

    /// Writes at an absolute address.
    pub fn write(&self, addr: u64, data: &[u8]) -> Result<(), AccessError> {
        match self.find(addr, data.len()) {
            Some((device, offset)) => device.write(offset, data),
            None => Err(AccessError::Unclaimed),
        }
    }

    fn find(&self, addr: u64, len: usize) -> Option<(Arc<dyn BusDevice>, u64)> {
        let claims = self.claims.load();
        let next = claims.partition_point(|c| c.base <= addr);
        let claim = claims.get(next.checked_sub(1)?)?;
        let offset = addr - claim.base;
        let end = offset.checked_add(len as u64)?;
        (end <= claim.len).then(|| (claim.device.clone(), offset))
    }

    /// Applies `edit` to a copy and publishes it, again from the start when another thread was faster.
    fn change(&self, edit: impl Fn(&mut Vec<Claim>) -> Result<(), BusError>) -> Result<(), BusError> {
        loop {
            let old = self.claims.load_full();
            let mut new = Vec::clone(&old);
            edit(&mut new)?;
            let seen = self.claims.compare_and_swap(&old, Arc::new(new));
            if Arc::ptr_eq(&seen, &old) {
                return Ok(());
            }
        }
    }
}

fn insert(claims: &mut Vec<Claim>, claim: Claim) -> Result<(), BusError> {
    let (base, len) = (claim.base, claim.len);
    let last = len
        .checked_sub(1)
        .and_then(|l| base.checked_add(l))
        .ok_or(BusError::Invalid { base, len })?;
    let at = claims.partition_point(|c| c.base <= base);
    let before = at
        .checked_sub(1)
        .map(|i| &claims[i])
        .filter(|c| c.base + (c.len - 1) >= base);
    let after = claims.get(at).filter(|c| c.base <= last);
    if let Some(other) = before.or(after) {
        return Err(BusError::Overlap {
            base,
            len,
            other: other.base,
        });
    }
    claims.insert(at, claim);
    Ok(())
}

fn take(claims: &mut Vec<Claim>, base: u64) -> Result<Claim, BusError> {
    let at = claims
        .binary_search_by_key(&base, |c| c.base)
        .map_err(|_| BusError::NotClaimed { base })?;
    Ok(claims.remove(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Id(u8);

    impl BusDevice for Id {
        fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
            if data.len() != 1 {
                return Err(AccessError::BadAccess);
            }
            data[0] = self.0 + offset as u8;
            Ok(())
        }
        fn write(&self, _: u64, _: &[u8]) -> Result<(), AccessError> {
            Ok(())
        }
    }

    fn read(bus: &Bus, addr: u64) -> Result<u8, AccessError> {
        let mut data = [0];
        bus.read(addr, &mut data).map(|()| data[0])
    }

    #[test]
    fn routes_by_range_and_reports_the_rest() {
        let bus = Bus::new();
        bus.claim(0x100, 0x10, Arc::new(Id(1))).unwrap();
        bus.claim(0x110, 0x10, Arc::new(Id(100))).unwrap();
        assert_eq!(read(&bus, 0x10f), Ok(16));
        assert_eq!(read(&bus, 0x110), Ok(100));
        assert_eq!(read(&bus, 0xff), Err(AccessError::Unclaimed));
        assert_eq!(read(&bus, 0x120), Err(AccessError::Unclaimed));
        let mut wide = [0; 4];
        assert_eq!(bus.read(0x100, &mut wide), Err(AccessError::BadAccess));
        assert_eq!(wide, [0xff; 4]);
        assert_eq!(
            bus.read(0x11e, &mut wide),
            Err(AccessError::Unclaimed),
            "across the end of a range"
        );
        assert_eq!(bus.read(u64::MAX, &mut wide), Err(AccessError::Unclaimed));
    }

    #[test]
    fn overlaps_are_refused_and_change_nothing() {
        let bus = Bus::new();
        bus.claim(0x100, 0x10, Arc::new(Id(1))).unwrap();
        bus.claim(0x200, 0x10, Arc::new(Id(2))).unwrap();
        for (base, len) in [(0x100, 1), (0xf8, 9), (0x10f, 1), (0x0, 0x1000), (0x1ff, 2)] {
            assert!(
                matches!(bus.claim(base, len, Arc::new(Id(3))), Err(BusError::Overlap { .. })),
                "{base:#x}"
            );
        }
        for (base, len) in [(0x300, 0), (u64::MAX, 2)] {
            assert!(matches!(
                bus.claim(base, len, Arc::new(Id(3))),
                Err(BusError::Invalid { .. })
            ));
        }
        assert!(matches!(bus.relocate(0x100, 0x208), Err(BusError::Overlap { .. })));
        assert_eq!(read(&bus, 0x100), Ok(1), "a failed move leaves the range where it was");
    }

    #[test]
    fn ranges_move_and_go() {
        let bus = Bus::new();
        bus.claim(0x100, 0x10, Arc::new(Id(1))).unwrap();
        bus.relocate(0x100, 0x108).unwrap();
        assert_eq!(read(&bus, 0x117), Ok(16));
        assert_eq!(read(&bus, 0x107), Err(AccessError::Unclaimed));
        bus.release(0x108).unwrap();
        assert_eq!(read(&bus, 0x108), Err(AccessError::Unclaimed));
        assert_eq!(bus.release(0x108), Err(BusError::NotClaimed { base: 0x108 }));
    }
}
