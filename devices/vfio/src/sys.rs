//! The ioctls of linux/vfio.h, in safe clothes.

mod bus;
mod iommufd;
mod moves;

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, fstat, major, minor};

use vfio_bindings::bindings::vfio as v;
use vmm_sys_util::eventfd::EventFd;

use crate::kernel::{
    AddressSpace, BusMembers, ContainerFile, DeviceFile, DeviceInfo, GroupFile, GroupStatus, IommuFile, IrqError,
    Kernel, Region,
};
use crate::limit;

/// `_IO(';', 100 + nr)`.
const fn code(nr: u32) -> libc::Ioctl {
    ((v::VFIO_TYPE as u32) << 8 | (v::VFIO_BASE + nr)) as libc::Ioctl
}

const GET_API_VERSION: libc::Ioctl = code(0);
const CHECK_EXTENSION: libc::Ioctl = code(1);
const SET_IOMMU: libc::Ioctl = code(2);
const GROUP_GET_STATUS: libc::Ioctl = code(3);
const GROUP_SET_CONTAINER: libc::Ioctl = code(4);
const GROUP_UNSET_CONTAINER: libc::Ioctl = code(5);
const GROUP_GET_DEVICE_FD: libc::Ioctl = code(6);
const DEVICE_GET_INFO: libc::Ioctl = code(7);
const DEVICE_GET_REGION_INFO: libc::Ioctl = code(8);
const DEVICE_GET_IRQ_INFO: libc::Ioctl = code(9);
const DEVICE_SET_IRQS: libc::Ioctl = code(10);
const DEVICE_RESET: libc::Ioctl = code(11);
const IOMMU_GET_INFO: libc::Ioctl = code(12);
const IOMMU_MAP_DMA: libc::Ioctl = code(13);
const IOMMU_UNMAP_DMA: libc::Ioctl = code(14);

/// The most that the kernel is believed about the length of what it tells, in bytes.
const MOST: u32 = 64 << 10;

fn check(result: libc::c_int) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// An ioctl whose argument is a number, or nothing.
fn by_value(fd: BorrowedFd<'_>, code: libc::Ioctl, value: libc::c_ulong) -> io::Result<u32> {
    // SAFETY: the codes this is called with take their argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), code, value) })
}

/// An ioctl on a number, or on a structure that tells its own size in its first field.
fn on<T>(fd: BorrowedFd<'_>, code: libc::Ioctl, argument: &mut T) -> io::Result<u32> {
    // SAFETY: the codes this is called with take a pointer to the type they are called with, of which the kernel reads and writes no
    // more than the first field says; it outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), code, std::ptr::from_mut(argument)) })
}

/// An ioctl on such a structure with capabilities behind it. Returns all of its bytes.
fn with_capabilities<T>(fd: BorrowedFd<'_>, code: libc::Ioctl, mut argument: T) -> io::Result<Vec<u8>> {
    on(fd, code, &mut argument)?;
    // SAFETY: all structures this is called with begin with a 32-bit number, their size.
    let size = unsafe { std::ptr::from_ref(&argument).cast::<u32>().read() };
    let size = (size.min(MOST) as usize).max(size_of::<T>());
    // Of words, so that it is aligned for every field.
    let mut words = vec![0u64; size.div_ceil(8)];
    // SAFETY: there is room for the structure, which is plain numbers.
    unsafe { words.as_mut_ptr().cast::<T>().write_unaligned(argument) };
    // SAFETY: the kernel is told the size of what it may fill, which there is room for.
    unsafe { words.as_mut_ptr().cast::<u32>().write(size as u32) };
    // SAFETY: as in `on`; the first field is at most the size of what is there.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), code, words.as_mut_ptr()) })?;
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.truncate(size);
    Ok(bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// The capability `id` of those that begin at `first` in `bytes`: its offset.
fn capability(bytes: &[u8], first: u32, id: u16) -> Option<usize> {
    let mut at = first as usize;
    // Each takes 8 bytes at least: a chain that is longer loops.
    for _ in 0..bytes.len() / 8 {
        if at == 0 {
            return None;
        }
        let header = u32_at(bytes, at)?;
        if header as u16 == id {
            return Some(at);
        }
        at = u32_at(bytes, at + 4)? as usize;
    }
    None
}

/// The kernel this runs on.
#[derive(Debug, Default, Clone, Copy)]
pub struct Linux;

fn open(path: &str) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

impl Kernel for Linux {
    fn open_container(&self) -> io::Result<Box<dyn ContainerFile>> {
        self.take_container(open("/dev/vfio/vfio")?.into())
    }

    fn take_container(&self, file: OwnedFd) -> io::Result<Box<dyn ContainerFile>> {
        let version = by_value(file.as_fd(), GET_API_VERSION, 0)?;
        if version != v::VFIO_API_VERSION {
            return Err(io::Error::other(format!(
                "it speaks version {version} of the interface, version {} is needed",
                v::VFIO_API_VERSION
            )));
        }
        Ok(Box::new(ContainerFd(file.into())))
    }

    fn open_group(&self, number: u32) -> io::Result<Box<dyn GroupFile>> {
        let file = open(&format!("/dev/vfio/{number}"))?;
        Ok(Box::new(GroupFd { file, shared: false }))
    }

    fn take_group(&self, file: OwnedFd) -> Box<dyn GroupFile> {
        let file = file.into();
        Box::new(GroupFd { file, shared: true })
    }

    fn has_containers(&self) -> bool {
        Path::new("/dev/vfio/vfio").exists()
    }

    fn open_iommu(&self) -> io::Result<Box<dyn IommuFile>> {
        self.take_iommu(open("/dev/iommu")?.into())
    }

    fn take_iommu(&self, file: OwnedFd) -> io::Result<Box<dyn IommuFile>> {
        Ok(Box::new(iommufd::IommuFd::of(Arc::new(file.into()))?))
    }

    fn open_node(&self, node: &str) -> io::Result<Box<dyn DeviceFile>> {
        Ok(self.take_node(open(&format!("/dev/vfio/devices/{node}"))?.into()))
    }

    fn take_node(&self, file: OwnedFd) -> Box<dyn DeviceFile> {
        Box::new(DeviceFd(file.into()))
    }

    fn directory(&self, file: BorrowedFd<'_>) -> io::Result<Option<PathBuf>> {
        let stat = fstat(file)?;
        let character = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
        let number = stat.st_rdev;
        Ok(character.then(|| format!("/sys/dev/char/{}:{}", major(number), minor(number)).into()))
    }

    fn members(&self, number: u32) -> PathBuf {
        format!("/sys/kernel/iommu_groups/{number}/devices").into()
    }

    fn lock_limit(&self) -> Option<u64> {
        limit::lockable()
    }

    fn page_size(&self) -> u64 {
        // SAFETY: the call takes no pointers and changes nothing.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        u64::try_from(page).unwrap_or(4096)
    }
}

/// RLIMIT_MEMLOCK in bytes, `None` if it is unlimited.
pub(crate) fn memlock_limit() -> Option<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to an `rlimit` that outlives the call.
    let done = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
    Some(limit.rlim_cur).filter(|bytes| done == 0 && *bytes != libc::RLIM_INFINITY)
}

struct ContainerFd(File);

impl ContainerFile for ContainerFd {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn has_type1(&self) -> io::Result<bool> {
        Ok(by_value(self.fd(), CHECK_EXTENSION, v::VFIO_TYPE1v2_IOMMU.into())? == 1)
    }

    fn set_type1(&self) -> io::Result<()> {
        by_value(self.fd(), SET_IOMMU, v::VFIO_TYPE1v2_IOMMU.into()).map(drop)
    }
}

impl AddressSpace for ContainerFd {
    fn reachable(&self) -> io::Result<Vec<(u64, u64)>> {
        let info = v::vfio_iommu_type1_info {
            argsz: size_of::<v::vfio_iommu_type1_info>() as u32,
            flags: 0,
            iova_pgsizes: 0,
            cap_offset: 0,
            pad: 0,
        };
        let bytes = with_capabilities(self.fd(), IOMMU_GET_INFO, info)?;
        Ok(iova_ranges(&bytes).unwrap_or_default())
    }

    fn map(&self, iova: u64, len: u64, host: u64, writable: bool) -> io::Result<()> {
        let write = if writable { v::VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
        let mut map = v::vfio_iommu_type1_dma_map {
            argsz: size_of::<v::vfio_iommu_type1_dma_map>() as u32,
            flags: v::VFIO_DMA_MAP_FLAG_READ | write,
            vaddr: host,
            iova,
            size: len,
        };
        on(self.fd(), IOMMU_MAP_DMA, &mut map).map(drop)
    }

    fn unmap(&self, iova: u64, len: u64) -> io::Result<()> {
        let mut unmap = v::vfio_iommu_type1_dma_unmap {
            argsz: size_of::<v::vfio_iommu_type1_dma_unmap>() as u32,
            flags: 0,
            iova,
            size: len,
            data: v::__IncompleteArrayField::new(),
        };
        on(self.fd(), IOMMU_UNMAP_DMA, &mut unmap).map(drop)
    }
}

/// What VFIO_IOMMU_GET_INFO tells of the addresses that can be mapped.
fn iova_ranges(bytes: &[u8]) -> Option<Vec<(u64, u64)>> {
    let flags = u32_at(bytes, 4)?;
    let first = u32_at(bytes, 16).filter(|_| flags & v::VFIO_IOMMU_INFO_CAPS != 0)?;
    let at = capability(bytes, first, v::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE as u16)?;
    let count = u32_at(bytes, at + 8)? as usize;
    let range = |i: usize| Some((u64_at(bytes, at + 16 + 16 * i)?, u64_at(bytes, at + 24 + 16 * i)?));
    (0..count.min(bytes.len() / 16)).map(range).collect()
}

struct GroupFd {
    file: File,
    /// Others have the file open, too.
    shared: bool,
}

impl Drop for GroupFd {
    fn drop(&mut self) {
        // Otherwise it leaves its container with the file. One that is in none has nothing to leave.
        if self.shared {
            let _ = by_value(self.file.as_fd(), GROUP_UNSET_CONTAINER, 0);
        }
    }
}

impl GroupFile for GroupFd {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn status(&self) -> io::Result<GroupStatus> {
        let mut status = v::vfio_group_status {
            argsz: size_of::<v::vfio_group_status>() as u32,
            flags: 0,
        };
        on(self.fd(), GROUP_GET_STATUS, &mut status)?;
        Ok(GroupStatus {
            viable: status.flags & v::VFIO_GROUP_FLAGS_VIABLE != 0,
            contained: status.flags & v::VFIO_GROUP_FLAGS_CONTAINER_SET != 0,
        })
    }

    fn set_container(&self, container: BorrowedFd<'_>) -> io::Result<()> {
        let mut number: libc::c_int = container.as_raw_fd();
        on(self.fd(), GROUP_SET_CONTAINER, &mut number).map(drop)
    }

    fn open_device(&self, name: &str) -> io::Result<Box<dyn DeviceFile>> {
        let name = std::ffi::CString::new(name)?;
        // SAFETY: the kernel reads a C string that outlives the call, and returns a new descriptor.
        let fd = unsafe { libc::ioctl(self.file.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr()) };
        check(fd)?;
        // SAFETY: the descriptor is new and owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        // VFIO leaves it open for programs that this one starts.
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::CLOEXEC)?;
        Ok(Box::new(DeviceFd(file)))
    }
}

struct DeviceFd(File);

impl DeviceFile for DeviceFd {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn info(&self) -> io::Result<DeviceInfo> {
        let mut info = v::vfio_device_info {
            argsz: size_of::<v::vfio_device_info>() as u32,
            flags: 0,
            num_regions: 0,
            num_irqs: 0,
            cap_offset: 0,
            pad: 0,
        };
        on(self.0.as_fd(), DEVICE_GET_INFO, &mut info)?;
        Ok(DeviceInfo {
            pci: info.flags & v::VFIO_DEVICE_FLAGS_PCI != 0,
            resets: info.flags & v::VFIO_DEVICE_FLAGS_RESET != 0,
            regions: info.num_regions,
            irqs: info.num_irqs,
        })
    }

    fn region(&self, index: u32) -> io::Result<Region> {
        let info = v::vfio_region_info {
            argsz: size_of::<v::vfio_region_info>() as u32,
            flags: 0,
            index,
            cap_offset: 0,
            size: 0,
            offset: 0,
        };
        let bytes = with_capabilities(self.0.as_fd(), DEVICE_GET_REGION_INFO, info)?;
        region(&bytes).ok_or_else(|| io::Error::other("the kernel's description of a region is cut short"))
    }

    fn irq_count(&self, index: u32) -> io::Result<u32> {
        let mut info = v::vfio_irq_info {
            argsz: size_of::<v::vfio_irq_info>() as u32,
            flags: 0,
            index,
            count: 0,
        };
        on(self.0.as_fd(), DEVICE_GET_IRQ_INFO, &mut info)?;
        Ok(if info.flags & v::VFIO_IRQ_INFO_EVENTFD != 0 {
            info.count
        } else {
            0
        })
    }

    fn set_irqs(&self, index: u32, start: u32, events: &[Option<&EventFd>]) -> Result<(), IrqError> {
        let flags = v::VFIO_IRQ_SET_DATA_EVENTFD | v::VFIO_IRQ_SET_ACTION_TRIGGER;
        let fds = events.iter().map(|event| event.map_or(-1, |event| event.as_raw_fd()));
        match self.irqs(flags, index, start, fds.collect()) {
            Ok(0) => Ok(()),
            Ok(left) => Err(IrqError::Only(left)),
            Err(error) => Err(IrqError::Failed(error)),
        }
    }

    fn unmask_by(&self, index: u32, event: &EventFd) -> io::Result<()> {
        let flags = v::VFIO_IRQ_SET_DATA_EVENTFD | v::VFIO_IRQ_SET_ACTION_UNMASK;
        self.irqs(flags, index, 0, vec![event.as_raw_fd()]).map(drop)
    }

    fn disable_irqs(&self, index: u32) -> io::Result<()> {
        let flags = v::VFIO_IRQ_SET_DATA_NONE | v::VFIO_IRQ_SET_ACTION_TRIGGER;
        self.irqs(flags, index, 0, Vec::new()).map(drop)
    }

    fn reset(&self) -> io::Result<()> {
        by_value(self.0.as_fd(), DEVICE_RESET, 0).map(drop)
    }

    fn bus_members(&self) -> io::Result<BusMembers> {
        self.members()
    }

    fn reset_bus(&self, groups: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.reset_all(groups)
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(data, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }

    fn map(&self, offset: u64, len: u64) -> io::Result<Mapping> {
        Mapping::new(self.0.as_fd(), offset, len)
    }
}

impl DeviceFd {
    /// VFIO_DEVICE_SET_IRQS: a header of five numbers, and the descriptors.
    fn irqs(&self, flags: u32, index: u32, start: u32, fds: Vec<i32>) -> io::Result<u32> {
        let size = 20 + 4 * fds.len();
        let header = [size as u32, flags, index, start, fds.len() as u32];
        let mut words: Vec<u32> = header.into_iter().chain(fds.into_iter().map(|fd| fd as u32)).collect();
        // SAFETY: the kernel reads as many bytes as the first word says, which are there, and writes none.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), DEVICE_SET_IRQS, words.as_mut_ptr()) })
    }
}

/// What VFIO_DEVICE_GET_REGION_INFO tells.
fn region(bytes: &[u8]) -> Option<Region> {
    let flags = u32_at(bytes, 4)?;
    let first = u32_at(bytes, 12).filter(|_| flags & v::VFIO_REGION_INFO_FLAG_CAPS != 0);
    let sparse = first.and_then(|first| capability(bytes, first, v::VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16));
    let area = |at: usize, i: usize| Some((u64_at(bytes, at + 16 + 16 * i)?, u64_at(bytes, at + 24 + 16 * i)?));
    let sparse = match sparse {
        Some(at) => {
            let count = (u32_at(bytes, at + 8)? as usize).min(bytes.len() / 16);
            Some((0..count).map(|i| area(at, i)).collect::<Option<Vec<_>>>()?)
        }
        None => None,
    };
    Some(Region {
        size: u64_at(bytes, 16)?,
        offset: u64_at(bytes, 24)?,
        mappable: flags & v::VFIO_REGION_INFO_FLAG_MMAP != 0,
        sparse,
    })
}

/// Registers of a device, mapped into this process so that the guest can be given them. Nothing here reads or writes them.
#[derive(Debug)]
pub struct Mapping {
    start: *mut libc::c_void,
    len: usize,
}

// SAFETY: it is an address and a length; what is there is never accessed by this process.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `len` bytes from `offset` of `file`, shared.
    pub fn new(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<Self> {
        let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let (len, offset) = (
            usize::try_from(len).map_err(wrong)?,
            i64::try_from(offset).map_err(wrong)?,
        );
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { libc::mmap64(std::ptr::null_mut(), len, access, flags, file.as_raw_fd(), offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start, len })
    }

    /// Where it is.
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// Its bytes.
    pub fn size(&self) -> u64 {
        self.len as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and whoever was given its address has been told by now that it goes.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn the_codes_are_those_of_the_kernel() {
        assert_eq!(
            (GROUP_UNSET_CONTAINER, DEVICE_SET_IRQS, IOMMU_UNMAP_DMA),
            (0x3b69, 0x3b6e, 0x3b72)
        );
    }

    #[test]
    fn what_can_be_mapped_of_a_region_is_read() {
        let plain = bytes(&[32, 0x7, 0, 0, 0x4000, 0, 0, 1]);
        let expected = Region {
            size: 0x4000,
            offset: 1 << 32,
            mappable: true,
            sparse: None,
        };
        assert_eq!(region(&plain), Some(expected.clone()));
        // MSI-X can be mapped (3), then two areas (1).
        let head = [80u32, 0xf, 0, 32, 0x4000, 0, 0, 1, 1 << 16 | 3, 40];
        let areas = [1 << 16 | 1, 0, 2, 0, 0, 0, 0x1000, 0, 0x3000, 0, 0x1000, 0];
        let sparse = Some(vec![(0, 0x1000), (0x3000, 0x1000)]);
        let all = [&head[..], &areas[..]].concat();
        assert_eq!(region(&bytes(&all)), Some(Region { sparse, ..expected }));
        let mut looping = head;
        looping[9] = 32;
        assert!(region(&bytes(&looping)).is_some_and(|region| region.sparse.is_none()));
        assert_eq!(region(&bytes(&all[..12])), None, "cut short");
    }

    #[test]
    fn what_devices_can_reach_is_read() {
        let head = [72u32, 2, 0, 0, 24, 0];
        let ranges = [
            1 << 16 | 1,
            0,
            2,
            0,
            0,
            0,
            0xfedf_ffff,
            0,
            0xfef0_0000,
            0,
            0xffff_ffff,
            0x7f,
        ];
        let all = bytes(&[&head[..], &ranges[..]].concat());
        assert_eq!(
            iova_ranges(&all),
            Some(vec![(0, 0xfedf_ffff), (0xfef0_0000, 0x7f_ffff_ffff)])
        );
        assert_eq!(iova_ranges(&bytes(&[24, 0, 0, 0, 0, 0])), None);
    }
}
