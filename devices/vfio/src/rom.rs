//! A device's expansion ROM, which the guest gets a copy of.

use std::sync::OnceLock;

use vfio_bindings::bindings::vfio::VFIO_PCI_ROM_REGION_INDEX;

use crate::kernel::{DeviceFile, Region};

/// The most that is copied, in bytes: ROMs are of at most 16 MiB (PCI Local Bus 3.0, 6.2.5.2).
const MOST: u64 = 16 << 20;
/// The least that a ROM's BAR takes.
const LEAST: u64 = 2 << 10;

/// A ROM. Some devices do not like theirs to be read, so it is read when a guest looks at it, once.
pub(crate) struct Rom {
    region: Region,
    copy: OnceLock<Vec<u8>>,
}

impl Rom {
    /// That of the device `file`, if it has one.
    pub(crate) fn of(file: &dyn DeviceFile) -> Option<Self> {
        let region = file.region(VFIO_PCI_ROM_REGION_INDEX).ok()?;
        (1..=MOST).contains(&region.size).then(|| Self {
            region,
            copy: OnceLock::new(),
        })
    }

    /// Bytes of its BAR.
    pub(crate) fn size(&self) -> u64 {
        self.region.size.next_power_of_two().max(LEAST)
    }

    /// Reads at `offset`. Where nothing is all bits are set.
    pub(crate) fn read(&self, file: &dyn DeviceFile, offset: u64, data: &mut [u8]) {
        let copy = self.copy.get_or_init(|| {
            let mut copy = vec![0xff; self.region.size as usize];
            if let Err(error) = file.read_at(self.region.offset, &mut copy) {
                tracing::warn!("a device's ROM cannot be read, so the guest finds it empty: {error}");
                copy.clear();
            }
            copy
        });
        data.fill(0xff);
        let there = usize::try_from(offset).ok().and_then(|offset| copy.get(offset..));
        for (byte, own) in data.iter_mut().zip(there.unwrap_or_default()) {
            *byte = *own;
        }
    }
}
