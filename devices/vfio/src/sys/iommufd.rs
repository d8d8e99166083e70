//! The ioctls of linux/iommufd.h (Documentation/userspace-api/iommufd.rst), and those of VFIO that go with them.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use super::{code, on, v};
use crate::kernel::{AddressSpace, IommuFile};

/// `_IO(';', 0x80 + nr)`.
const fn iommu(nr: u32) -> libc::Ioctl {
    ((v::VFIO_TYPE as u32) << 8 | (0x80 + nr)) as libc::Ioctl
}

const DESTROY: libc::Ioctl = iommu(0);
const IOAS_ALLOC: libc::Ioctl = iommu(1);
const IOAS_IOVA_RANGES: libc::Ioctl = iommu(4);
const IOAS_MAP: libc::Ioctl = iommu(5);
const IOAS_UNMAP: libc::Ioctl = iommu(6);
const DEVICE_BIND_IOMMUFD: libc::Ioctl = code(18);
const DEVICE_ATTACH_IOMMUFD_PT: libc::Ioctl = code(19);

/// IOMMU_IOAS_MAP_FIXED_IOVA and _READABLE.
const FIXED_AND_READABLE: u32 = 0b101;
/// IOMMU_IOAS_MAP_WRITEABLE.
const WRITABLE: u32 = 0b010;
/// The most ranges of addresses that the kernel is asked for.
const RANGES: usize = 256;

#[repr(C)]
struct Destroy {
    size: u32,
    id: u32,
}

#[repr(C)]
struct IoasAlloc {
    size: u32,
    flags: u32,
    id: u32,
}

#[repr(C)]
struct IovaRanges {
    size: u32,
    id: u32,
    count: u32,
    reserved: u32,
    ranges: u64,
    alignment: u64,
}

#[repr(C)]
struct IoasMap {
    size: u32,
    flags: u32,
    id: u32,
    reserved: u32,
    host: u64,
    len: u64,
    iova: u64,
}

#[repr(C)]
struct IoasUnmap {
    size: u32,
    id: u32,
    iova: u64,
    len: u64,
}

/// The part of vfio_device_bind_iommufd that all kernels know.
#[repr(C)]
struct Bind {
    size: u32,
    flags: u32,
    iommufd: i32,
    id: u32,
}

/// The same of vfio_device_attach_iommufd_pt.
#[repr(C)]
struct Attach {
    size: u32,
    flags: u32,
    table: u32,
}

/// An address space of `/dev/iommu`.
pub(super) struct IommuFd {
    file: Arc<File>,
    space: u32,
}

impl IommuFd {
    pub(super) fn of(file: Arc<File>) -> io::Result<Self> {
        let mut made = IoasAlloc {
            size: size_of::<IoasAlloc>() as u32,
            flags: 0,
            id: 0,
        };
        on(file.as_fd(), IOAS_ALLOC, &mut made)?;
        Ok(Self { file, space: made.id })
    }
}

impl Drop for IommuFd {
    /// Its devices are closed. The file may stay open for other address spaces.
    fn drop(&mut self) {
        let mut destroy = Destroy {
            size: size_of::<Destroy>() as u32,
            id: self.space,
        };
        if let Err(error) = on(self.file.as_fd(), DESTROY, &mut destroy) {
            tracing::error!("an address space of the host's IOMMU stays until this process ends: {error}");
        }
    }
}

impl AddressSpace for IommuFd {
    fn reachable(&self) -> io::Result<Vec<(u64, u64)>> {
        let mut words = vec![0u64; 2 * RANGES];
        let mut asked = IovaRanges {
            size: size_of::<IovaRanges>() as u32,
            id: self.space,
            count: RANGES as u32,
            reserved: 0,
            ranges: words.as_mut_ptr() as u64,
            alignment: 0,
        };
        // The kernel writes no more than `count` ranges, which there is room for in `words`.
        on(self.file.as_fd(), IOAS_IOVA_RANGES, &mut asked)?;
        let ranges = words.chunks_exact(2).take(asked.count as usize);
        Ok(ranges.map(|range| (range[0], range[1])).collect())
    }

    fn map(&self, iova: u64, len: u64, host: u64, writable: bool) -> io::Result<()> {
        let write = if writable { WRITABLE } else { 0 };
        let mut map = IoasMap {
            size: size_of::<IoasMap>() as u32,
            flags: FIXED_AND_READABLE | write,
            id: self.space,
            reserved: 0,
            host,
            len,
            iova,
        };
        on(self.file.as_fd(), IOAS_MAP, &mut map).map(drop)
    }

    fn unmap(&self, iova: u64, len: u64) -> io::Result<()> {
        let mut unmap = IoasUnmap {
            size: size_of::<IoasUnmap>() as u32,
            id: self.space,
            iova,
            len,
        };
        on(self.file.as_fd(), IOAS_UNMAP, &mut unmap).map(drop)
    }
}

impl IommuFile for IommuFd {
    fn another(&self) -> io::Result<Box<dyn IommuFile>> {
        Ok(Box::new(Self::of(self.file.clone())?))
    }

    fn bind(&self, device: BorrowedFd<'_>) -> io::Result<()> {
        let mut bind = Bind {
            size: size_of::<Bind>() as u32,
            flags: 0,
            iommufd: self.file.as_raw_fd(),
            id: 0,
        };
        on(device, DEVICE_BIND_IOMMUFD, &mut bind).map(drop)
    }

    fn attach(&self, device: BorrowedFd<'_>) -> io::Result<()> {
        let mut attach = Attach {
            size: size_of::<Attach>() as u32,
            flags: 0,
            table: self.space,
        };
        on(device, DEVICE_ATTACH_IOMMUFD_PT, &mut attach).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_codes_and_sizes_are_those_of_the_kernel() {
        let space = (IOAS_ALLOC, IOAS_IOVA_RANGES, IOAS_MAP, IOAS_UNMAP);
        assert_eq!(space, (0x3b81, 0x3b84, 0x3b85, 0x3b86));
        assert_eq!((DEVICE_BIND_IOMMUFD, DEVICE_ATTACH_IOMMUFD_PT), (0x3b76, 0x3b77));
        let sizes = (size_of::<IoasAlloc>(), size_of::<IovaRanges>(), size_of::<IoasMap>());
        assert_eq!(sizes, (12, 32, 40));
        let sizes = (size_of::<IoasUnmap>(), size_of::<Bind>(), size_of::<Attach>());
        assert_eq!(sizes, (24, 16, 12));
        assert_eq!((DESTROY, size_of::<Destroy>()), (0x3b80, 8));
    }
}
