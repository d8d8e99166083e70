//! What a PCI function is to the root.

use triarch_device_core::AccessError;

use crate::{Bar, Bars, Bridge, PciAddress};

/// The number of an expansion ROM's BAR: the one after all others.
pub const ROM_BAR: u8 = 6;

/// A PCI function. Accesses come from any vCPU thread at any time.
///
/// The root calls [`attach`](Self::attach) first, then writes the addresses of unplaced BARs into their registers as firmware would;
/// after every guest write that may matter it compares [`bars`](Self::bars) with what it claimed and reports the difference by
/// [`bar_moved`](Self::bar_moved). None of the methods may call back into the root.
pub trait PciFunction: Send + Sync {
    /// Reads 1, 2 or 4 bytes of configuration space at `offset` (bytes, below 4096), aligned to their size.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes 1, 2 or 4 bytes of it, aligned to their size.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// The BARs as the registers stand now.
    fn bars(&self) -> Bars {
        Bars::default()
    }
    /// The expansion ROM's BAR as its register stands now: memory of 32 bits, decoded if COMMAND and the register enable it. Its number is [`ROM_BAR`].
    fn rom(&self) -> Option<Bar> {
        None
    }
    /// Reads at `offset` bytes into BAR `bar`.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let _ = (bar, offset, data);
        Err(AccessError::BadAccess)
    }
    /// Writes at `offset` bytes into BAR `bar`.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let _ = (bar, offset, data);
        Err(AccessError::BadAccess)
    }
    /// BAR `bar` is reachable at `address` (GPA or port) from now on, or nowhere: doorbells and mappings must follow.
    fn bar_moved(&self, bar: u8, address: Option<u64>) {
        let _ = (bar, address);
    }
    /// What it lets through to the bus below as its registers stand now, if it is a bridge.
    fn bridge(&self) -> Option<Bridge> {
        None
    }
    /// The function sits at `address` from now on, which it sends with its messages. Its interrupt pin has the wires of slot `slot`.
    fn attach(&self, address: PciAddress, slot: u8) {
        let _ = (address, slot);
    }
    /// The bus it is on was reset: it decodes nothing, and does nothing, until it is set up again.
    fn reset(&self) {}
    /// The function was removed. Accesses already on their way may still arrive and must find it idle.
    fn detach(&self) {}
}
