//! What the kernel does for VFIO, as the rest of this crate asks for it. [`Linux`](crate::Linux) asks the kernel.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

use vmm_sys_util::eventfd::EventFd;

use crate::Mapping;

/// Opens what VFIO has, or takes what somebody else opened.
pub trait Kernel: Send + Sync {
    /// Opens `/dev/vfio/vfio`: a container without groups.
    fn open_container(&self) -> io::Result<Box<dyn ContainerFile>>;
    /// Takes that.
    fn take_container(&self, file: OwnedFd) -> io::Result<Box<dyn ContainerFile>>;
    /// Opens `/dev/vfio/N`: the IOMMU group `number`.
    fn open_group(&self, number: u32) -> io::Result<Box<dyn GroupFile>>;
    /// Takes that. Others may have it open, so it leaves its container when this is closed (VFIO_GROUP_UNSET_CONTAINER).
    fn take_group(&self, file: OwnedFd) -> Box<dyn GroupFile>;
    /// There is `/dev/vfio/vfio`.
    fn has_containers(&self) -> bool;
    /// Opens `/dev/iommu` and makes an address space there (IOMMU_IOAS_ALLOC).
    fn open_iommu(&self) -> io::Result<Box<dyn IommuFile>>;
    /// Takes that.
    fn take_iommu(&self, file: OwnedFd) -> io::Result<Box<dyn IommuFile>>;
    /// Opens `/dev/vfio/devices/NODE`: a device, which can do nothing until it is bound.
    fn open_node(&self, node: &str) -> io::Result<Box<dyn DeviceFile>>;
    /// Takes that.
    fn take_node(&self, file: OwnedFd) -> Box<dyn DeviceFile>;
    /// The directory in sysfs of the character device that `file` is; `None` if it is none.
    fn directory(&self, file: BorrowedFd<'_>) -> io::Result<Option<PathBuf>>;
    /// Where sysfs shows the devices of the IOMMU group `number`.
    fn members(&self, number: u32) -> PathBuf;
    /// Bytes that this process may lock in memory; `None` if nobody counts.
    fn lock_limit(&self) -> Option<u64>;
    /// Bytes of the host's smallest page.
    fn page_size(&self) -> u64;
}

/// What devices reach: an address space of the IOMMU.
pub trait AddressSpace: Send + Sync {
    /// First and last address of what devices can reach; empty if the kernel does not tell (VFIO_IOMMU_GET_INFO, IOMMU_IOAS_IOVA_RANGES).
    fn reachable(&self) -> io::Result<Vec<(u64, u64)>>;
    /// `len` bytes at `host` in this process are at `iova` for devices, which read them, and write them if they are `writable`. The memory
    /// is locked (VFIO_IOMMU_MAP_DMA, IOMMU_IOAS_MAP).
    ///
    /// What is at `host` must stay mapped until it is unmapped here or this is closed.
    fn map(&self, iova: u64, len: u64, host: u64, writable: bool) -> io::Result<()>;
    /// Undoes all mappings that lie in the range (VFIO_IOMMU_UNMAP_DMA, IOMMU_IOAS_UNMAP).
    fn unmap(&self, iova: u64, len: u64) -> io::Result<()>;
}

/// One of iommufd's.
pub trait IommuFile: AddressSpace {
    /// One more address space of the same iommufd (IOMMU_IOAS_ALLOC).
    fn another(&self) -> io::Result<Box<dyn IommuFile>>;
    /// VFIO_DEVICE_BIND_IOMMUFD: `device` is this process' from now on.
    fn bind(&self, device: BorrowedFd<'_>) -> io::Result<()>;
    /// VFIO_DEVICE_ATTACH_IOMMUFD_PT: it reaches what is mapped here.
    fn attach(&self, device: BorrowedFd<'_>) -> io::Result<()>;
}

/// A container: groups that share one.
pub trait ContainerFile: AddressSpace {
    /// The descriptor.
    fn fd(&self) -> BorrowedFd<'_>;
    /// VFIO_CHECK_EXTENSION of the IOMMU type that is wanted (type 1, version 2).
    fn has_type1(&self) -> io::Result<bool>;
    /// VFIO_SET_IOMMU. There must be a group.
    fn set_type1(&self) -> io::Result<()>;
}

/// How a group stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupStatus {
    /// All its devices belong to VFIO or to nobody.
    pub viable: bool,
    /// It is in a container.
    pub contained: bool,
}

/// An IOMMU group.
pub trait GroupFile: Send + Sync {
    /// The descriptor.
    fn fd(&self) -> BorrowedFd<'_>;
    /// VFIO_GROUP_GET_STATUS.
    fn status(&self) -> io::Result<GroupStatus>;
    /// VFIO_GROUP_SET_CONTAINER.
    fn set_container(&self, container: BorrowedFd<'_>) -> io::Result<()>;
    /// VFIO_GROUP_GET_DEVICE_FD.
    fn open_device(&self, name: &str) -> io::Result<Box<dyn DeviceFile>>;
}

/// What a device is (VFIO_DEVICE_GET_INFO).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// It is a PCI function.
    pub pci: bool,
    /// It can be reset by itself.
    pub resets: bool,
    /// Number of its regions.
    pub regions: u32,
    /// Number of its kinds of interrupts.
    pub irqs: u32,
}

/// A region of a device: a BAR, its configuration space (VFIO_DEVICE_GET_REGION_INFO).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Region {
    /// Bytes; 0 if there is no such region.
    pub size: u64,
    /// Where it is in the device's descriptor.
    pub offset: u64,
    /// It can be mapped, as far as `sparse` says.
    pub mappable: bool,
    /// Offset and size of the parts that can be mapped, if not all of it can.
    pub sparse: Option<Vec<(u64, u64)>>,
}

/// A device's file.
pub trait DeviceFile: Moves + Send + Sync {
    /// The descriptor.
    fn fd(&self) -> BorrowedFd<'_>;
    /// What it is.
    fn info(&self) -> io::Result<DeviceInfo>;
    /// Its region `index`.
    fn region(&self, index: u32) -> io::Result<Region>;
    /// How many interrupts of the kind `index` it has.
    fn irq_count(&self, index: u32) -> io::Result<u32>;
    /// Has interrupts of the kind `index` from number `start` on ring these events, or nothing. The first time it makes them all
    /// ready: then the error is the number that could be had, if some could.
    fn set_irqs(&self, index: u32, start: u32, events: &[Option<&EventFd>]) -> Result<(), IrqError>;
    /// Has `event`, when it is rung, unmask the only interrupt of the kind `index`, which is masked since it was told last.
    fn unmask_by(&self, index: u32, event: &EventFd) -> io::Result<()>;
    /// Undoes that for all interrupts of the kind.
    fn disable_irqs(&self, index: u32) -> io::Result<()>;
    /// VFIO_DEVICE_RESET.
    fn reset(&self) -> io::Result<()>;
    /// Whom a reset of its bus resets (VFIO_DEVICE_GET_PCI_HOT_RESET_INFO).
    fn bus_members(&self) -> io::Result<BusMembers>;
    /// VFIO_DEVICE_PCI_HOT_RESET, with the groups of all members, or none for what came by iommufd.
    fn reset_bus(&self, groups: &[BorrowedFd<'_>]) -> io::Result<()>;
    /// Reads at `offset` of the descriptor.
    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;
    /// Writes there.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Maps `len` bytes from `offset` of the descriptor, both whole pages.
    fn map(&self, offset: u64, len: u64) -> io::Result<Mapping>;
}

/// Who is on a bus, or a part of it, that can only be reset as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BusMembers {
    /// The names of all devices, the one that was asked among them.
    pub names: Vec<String>,
    /// The numbers of their groups.
    pub groups: BTreeSet<u32>,
    /// For what came by iommufd, which does not tell of groups: all of them are this process' or nobody's.
    pub owned: Option<bool>,
}

/// Why interrupts cannot be had.
#[derive(Debug)]
pub enum IrqError {
    /// There are only so many.
    Only(u32),
    /// Another reason.
    Failed(io::Error),
}

/// States of a device that can be moved (vfio_device_mig_state, whose numbers these are).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MoveState {
    /// It does not work, and must be reset.
    Error = 0,
    /// It stands still: it writes no memory and rings nobody.
    Stop = 1,
    /// It works.
    Running = 2,
    /// It stands still, and what it is can be read.
    StopCopy = 3,
    /// It stands still, and becomes what is written.
    Resuming = 4,
    /// It does as it is told by other devices, and begins nothing.
    RunningP2p = 5,
    /// It works, and what it is can be read as far as that does not change.
    PreCopy = 6,
    /// Both.
    PreCopyP2p = 7,
}

impl MoveState {
    /// That of this number; those that nobody knows are errors.
    pub(crate) fn of(number: u32) -> Self {
        use MoveState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
        let all = [Stop, Running, StopCopy, Resuming, RunningP2p, PreCopy, PreCopyP2p];
        let found = all.into_iter().find(|state| *state as u32 == number);
        found.unwrap_or(Error)
    }

    /// Whether data go to or from a device there.
    pub(crate) fn has_data(self) -> bool {
        matches!(self, Self::StopCopy | Self::Resuming | Self::PreCopy | Self::PreCopyP2p)
    }

    /// Whether a device stands still there.
    pub(crate) fn is_still(self) -> bool {
        matches!(self, Self::Stop | Self::StopCopy | Self::Resuming)
    }
}

/// What a device can beside standing still and telling what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoveKinds {
    /// Be told to begin nothing before others stand still ([`MoveState::RunningP2p`]).
    pub p2p: bool,
    /// Tell some of what it is while it works ([`MoveState::PreCopy`]).
    pub pre_copy: bool,
}

/// VFIO's migration protocol, version 2 (include/uapi/linux/vfio.h), of a device's file.
pub trait Moves {
    /// VFIO_DEVICE_FEATURE_MIGRATION; `None`: it has no such protocol.
    fn can_move(&self) -> io::Result<Option<MoveKinds>>;
    /// VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE: has it get there, by way of other states if need be; with its data if they begin on that way.
    fn enter(&self, state: MoveState) -> io::Result<Option<Box<dyn DataFile>>>;
    /// The same: where it is.
    fn state(&self) -> io::Result<MoveState>;
    /// VFIO_DEVICE_FEATURE_MIG_DATA_SIZE: how many bytes it would have in [`MoveState::StopCopy`], about.
    fn data_size(&self) -> io::Result<u64>;
    /// Whether it can log what memory it writes (VFIO_DEVICE_FEATURE_DMA_LOGGING_START).
    fn can_log(&self) -> bool;
    /// Has it log that for these ranges: address and length.
    fn start_log(&self, page: u64, ranges: &[(u64, u64)]) -> io::Result<()>;
    /// Ends that.
    fn stop_log(&self) -> io::Result<()>;
    /// Sets a bit of `bitmap` for each page of `len` bytes at `iova` that it wrote since this was asked the last time
    /// (VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT).
    fn take_log(&self, page: u64, iova: u64, len: u64, bitmap: &mut [u64]) -> io::Result<()>;
}

/// What a device is: bytes that only its driver understands.
pub trait DataFile: Send {
    /// The next of them; 0 at the end. ENOMSG: no more while it works. EAGAIN: none yet.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Takes some of `bytes`. EAGAIN: none yet.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// How many bytes it has to tell while it works (VFIO_MIG_GET_PRECOPY_INFO).
    fn ahead(&self) -> io::Result<u64>;
}
