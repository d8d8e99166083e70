//! Resets of buses (`vfio_pci_hot_reset_info`, `vfio_pci_hot_reset`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vfio_bindings::bindings::vfio as v;

use super::{DeviceFd, check, code};
use crate::kernel::BusMembers;

const GET_PCI_HOT_RESET_INFO: libc::Ioctl = code(12);
const PCI_HOT_RESET: libc::Ioctl = code(13);

/// Functions of a bus.
const MOST: usize = 256;
/// Size, flags, count.
const HEADER: usize = 3;
/// Words of a member: its group, or what iommufd calls it; segment, bus, device and function.
const MEMBER: usize = 2;

impl DeviceFd {
    pub(super) fn members(&self) -> io::Result<BusMembers> {
        let mut words = vec![0u32; HEADER + MEMBER * MOST];
        words[0] = 4 * words.len() as u32;
        // SAFETY: the kernel writes no more than the first word says, which is the size of what is there.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), GET_PCI_HOT_RESET_INFO, words.as_mut_ptr()) })?;
        Ok(members(&words))
    }

    pub(super) fn reset_all(&self, groups: &[BorrowedFd<'_>]) -> io::Result<()> {
        let size = 4 * (HEADER + groups.len());
        let header = [size as u32, 0, groups.len() as u32];
        let fds = groups.iter().map(|group| group.as_raw_fd() as u32);
        let mut words: Vec<u32> = header.into_iter().chain(fds).collect();
        // SAFETY: the kernel reads as many words as the third says after it, which are there, and writes none.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), PCI_HOT_RESET, words.as_mut_ptr()) }).map(drop)
    }
}

/// What VFIO_DEVICE_GET_PCI_HOT_RESET_INFO tells.
fn members(words: &[u32]) -> BusMembers {
    let word = |at: usize| words.get(at).copied().unwrap_or_default();
    let (flags, count) = (word(1), word(2) as usize);
    let by_iommufd = flags & v::VFIO_PCI_HOT_RESET_FLAG_DEV_ID != 0;
    let mut found = BusMembers {
        owned: by_iommufd.then_some(flags & v::VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED != 0),
        ..BusMembers::default()
    };
    for member in words.get(HEADER..).unwrap_or_default().chunks_exact(MEMBER).take(count) {
        let [low, high, bus, devfn] = member[1].to_ne_bytes();
        let segment = u16::from_ne_bytes([low, high]);
        found
            .names
            .push(format!("{segment:04x}:{bus:02x}:{:02x}.{}", devfn >> 3, devfn & 7));
        if !by_iommufd {
            found.groups.insert(member[0]);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_told_by_name_and_group() {
        let place = |bus: u8, devfn: u8| u32::from_ne_bytes([0, 0, bus, devfn]);
        let found = members(&[28, 0, 2, 7, place(1, 0), 9, place(1, 0x21), 8, place(2, 0)]);
        assert_eq!(found.names, ["0000:01:00.0", "0000:01:04.1"]);
        assert_eq!(Vec::from_iter(found.groups), [7, 9]);
        assert_eq!(found.owned, None);
        let found = members(&[20, 1 | 2, 1, 0, place(1, 0)]);
        assert_eq!((found.groups.len(), found.owned), (0, Some(true)));
        assert_eq!(members(&[20, 1, 1, 0xffff_ffff, place(1, 0)]).owned, Some(false));
        assert_eq!(members(&[12, 0, 100]).names, Vec::<String>::new(), "less than it says");
    }
}
