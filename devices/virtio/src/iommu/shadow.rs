//! Devices that reach memory by themselves.

use std::io;
use std::ops::RangeInclusive;

/// What a device reaches memory by that no queue of this VMM serves, such as the host's IOMMU for a device of the host. It is told of all that
/// the guest's IOMMU lets the device reach, and of each change before the driver's request is answered. At first it reaches nothing.
pub trait Shadow: Send + Sync {
    /// The device reaches all memory at its own addresses.
    ///
    /// # Errors
    /// It cannot be had; then it reaches nothing. Of the kind [`io::ErrorKind::OutOfMemory`] if there is too much.
    fn reach_all(&self) -> io::Result<()>;

    /// It reaches nothing.
    fn reach_nothing(&self);

    /// It reaches memory from the GPA `phys` on by `iovas`, too, which it did not before. Where there is no memory it does not.
    ///
    /// # Errors
    /// It cannot be had; then nothing changed. As with [`reach_all`](Self::reach_all).
    fn map(&self, iovas: RangeInclusive<u64>, phys: u64, writable: bool) -> io::Result<()>;

    /// It reaches nothing by `iovas` any more. Mappings are gone as a whole.
    fn unmap(&self, iovas: RangeInclusive<u64>);

    /// Addresses that nothing can be mapped at.
    fn gaps(&self) -> Vec<RangeInclusive<u64>>;
}
