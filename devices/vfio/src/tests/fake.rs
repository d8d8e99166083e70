//! A kernel with VFIO, an IOMMU and a device, all of which are not there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use triarch_device_core::mock::MockRouter;
use triarch_device_core::{MsiRouter, MsiVector};
use vmm_sys_util::eventfd::EventFd;

use super::fake_moves::FakeMoves;
use crate::kernel::{
    AddressSpace, BusMembers, ContainerFile, DeviceFile, DeviceInfo, GroupFile, GroupStatus, IommuFile, IrqError,
    Kernel, Region,
};
use crate::{DmaMap, HostDevice, Iommu, Mapping, Options, VfioPci, Vm, lock};

/// Where BARs begin in the device's file, and how much each has there.
pub(crate) const BAR_STEP: u64 = 1 << 20;
/// Where its configuration space is.
pub(crate) const CONFIG: u64 = 7 * BAR_STEP;

/// What happened.
#[derive(Default)]
pub(crate) struct World {
    /// What was asked of the kernel, in order.
    pub(crate) calls: Vec<String>,
    /// What devices reach: length, address, and whether they may write it, by address space and IOVA.
    pub(crate) maps: BTreeMap<(usize, u64), (u64, u64, bool)>,
    /// How many address spaces were made.
    pub(crate) spaces: usize,
    /// The call with this name fails with this number.
    pub(crate) fails: BTreeMap<&'static str, i32>,
    pub(crate) reachable: Vec<(u64, u64)>,
    pub(crate) limit: Option<u64>,
    pub(crate) not_viable: bool,
    /// It has no `/dev/vfio/vfio`.
    pub(crate) no_containers: bool,
    /// It tells of no errors and no requests.
    pub(crate) deaf: bool,
    /// Bytes of the ROM.
    pub(crate) rom: u64,
    /// Interrupts of MSI-X that the host has.
    pub(crate) vectors: u32,
    /// The events that vectors ring, by kind and number.
    pub(crate) wires: BTreeMap<(u32, u32), EventFd>,
    /// What unmasks interrupts, by their kind.
    pub(crate) unmasks: BTreeMap<u32, EventFd>,
    /// Both ends of the wires that the VM has for pins, by slot and pin.
    pub(crate) pins: BTreeMap<(u8, u8), [EventFd; 2]>,
    /// Where sysfs shows what descriptors are open on, by their inodes.
    pub(crate) directories: BTreeMap<u64, PathBuf>,
    /// Where it shows the devices of groups.
    pub(crate) groups: PathBuf,
    /// Groups are in a container.
    pub(crate) contained: bool,
    /// Devices cannot be reset by themselves.
    pub(crate) needs_bus: bool,
    /// Who is on their bus.
    pub(crate) bus: BusMembers,
    /// With how many groups the bus was reset, each time.
    pub(crate) bus_resets: Vec<usize>,
    pub(crate) sparse: Option<Vec<(u64, u64)>>,
    /// What the guest has mapped: length by GPA.
    pub(crate) mapped: BTreeMap<u64, u64>,
    /// Groups that KVM knows.
    pub(crate) admitted: usize,
    /// How it moves.
    pub(crate) moves: FakeMoves,
    /// Open files, by their names.
    pub(crate) open: BTreeMap<&'static str, usize>,
}

/// The kernel, and a device's file.
#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) world: Arc<Mutex<World>>,
    pub(crate) device: Arc<File>,
    pub(crate) sizes: [u64; 6],
}

pub(crate) struct Opened {
    pub(crate) fake: Fake,
    name: &'static str,
    /// Its number, if it is an address space.
    space: usize,
    file: File,
}

impl Drop for Opened {
    fn drop(&mut self) {
        let mut world = lock(&self.fake.world);
        if self.name == "container" || self.name == "iommu" {
            world.maps.retain(|(space, _), _| *space != self.space);
        }
        *world.open.entry(self.name).or_default() -= 1;
    }
}

impl Fake {
    pub(crate) fn new(config: &[u8], sizes: [u64; 6]) -> Self {
        let device = tempfile::tempfile().expect("a file");
        device.set_len(8 * BAR_STEP).expect("its length");
        device.write_all_at(config, CONFIG).expect("registers");
        let world = World {
            vectors: 2048,
            ..World::default()
        };
        Self {
            world: Arc::new(Mutex::new(world)),
            device: Arc::new(device),
            sizes,
        }
    }

    pub(crate) fn call(&self, name: &'static str) -> io::Result<()> {
        let mut world = lock(&self.world);
        world.calls.push(name.to_owned());
        match world.fails.get(name) {
            Some(number) => Err(io::Error::from_raw_os_error(*number)),
            None => Ok(()),
        }
    }

    fn open(&self, name: &'static str) -> io::Result<Opened> {
        self.call(name)?;
        Ok(self.opened(name, tempfile::tempfile()?))
    }

    fn opened(&self, name: &'static str, file: File) -> Opened {
        let mut world = lock(&self.world);
        *world.open.entry(name).or_default() += 1;
        world.spaces += 1;
        Opened {
            fake: self.clone(),
            name,
            space: world.spaces,
            file,
        }
    }

    /// Takes what somebody else opened.
    fn take(&self, name: &'static str, file: OwnedFd) -> io::Result<Opened> {
        self.call(name)?;
        self.call("take")?;
        Ok(self.opened(name, file.into()))
    }

    /// Makes a call fail from now on.
    pub(crate) fn fail(&self, name: &'static str, number: i32) {
        lock(&self.world).fails.insert(name, number);
    }

    /// Takes the names of the calls since the last time.
    pub(crate) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.world).calls)
    }

    /// How many files are open.
    pub(crate) fn open_files(&self) -> usize {
        lock(&self.world).open.values().sum()
    }

    /// A register of the device.
    pub(crate) fn register(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read_exact_at(&mut bytes, at).expect("a register");
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn iommu(&self) -> Iommu {
        Iommu::new(Arc::new(self.clone())).expect("descriptors")
    }
}

impl Kernel for Fake {
    fn open_container(&self) -> io::Result<Box<dyn ContainerFile>> {
        Ok(Box::new(self.open("container")?))
    }
    fn take_container(&self, file: OwnedFd) -> io::Result<Box<dyn ContainerFile>> {
        Ok(Box::new(self.take("container", file)?))
    }
    fn open_group(&self, _number: u32) -> io::Result<Box<dyn GroupFile>> {
        Ok(Box::new(self.open("group")?))
    }
    fn take_group(&self, file: OwnedFd) -> Box<dyn GroupFile> {
        Box::new(self.opened("group", file.into()))
    }
    fn has_containers(&self) -> bool {
        !lock(&self.world).no_containers
    }
    fn open_iommu(&self) -> io::Result<Box<dyn IommuFile>> {
        Ok(Box::new(self.open("iommu")?))
    }
    fn take_iommu(&self, file: OwnedFd) -> io::Result<Box<dyn IommuFile>> {
        Ok(Box::new(self.take("iommu", file)?))
    }
    fn open_node(&self, _node: &str) -> io::Result<Box<dyn DeviceFile>> {
        Ok(Box::new(self.open("node")?))
    }
    fn take_node(&self, file: OwnedFd) -> Box<dyn DeviceFile> {
        Box::new(self.opened("node", file.into()))
    }
    fn directory(&self, file: BorrowedFd<'_>) -> io::Result<Option<PathBuf>> {
        let inode = rustix::fs::fstat(file)?.st_ino;
        Ok(lock(&self.world).directories.get(&inode).cloned())
    }
    fn members(&self, number: u32) -> PathBuf {
        lock(&self.world).groups.join(format!("{number}/devices"))
    }
    fn lock_limit(&self) -> Option<u64> {
        let mut world = lock(&self.world);
        world.calls.push("limit".to_owned());
        world.limit
    }
    fn page_size(&self) -> u64 {
        4096
    }
}

impl ContainerFile for Opened {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
    fn has_type1(&self) -> io::Result<bool> {
        self.fake.call("type1").map(|()| true)
    }
    fn set_type1(&self) -> io::Result<()> {
        self.fake.call("set type1")
    }
}

impl IommuFile for Opened {
    fn another(&self) -> io::Result<Box<dyn IommuFile>> {
        self.fake.call("another")?;
        Ok(Box::new(self.fake.open("iommu")?))
    }
    fn bind(&self, _device: BorrowedFd<'_>) -> io::Result<()> {
        self.fake.call("bind")
    }
    fn attach(&self, _device: BorrowedFd<'_>) -> io::Result<()> {
        self.fake.call("attach")
    }
}

impl AddressSpace for Opened {
    fn reachable(&self) -> io::Result<Vec<(u64, u64)>> {
        Ok(lock(&self.fake.world).reachable.clone())
    }
    fn map(&self, iova: u64, len: u64, host: u64, writable: bool) -> io::Result<()> {
        self.fake.call("map")?;
        let mut world = lock(&self.fake.world);
        world.maps.insert((self.space, iova), (len, host, writable));
        Ok(())
    }
    fn unmap(&self, iova: u64, len: u64) -> io::Result<()> {
        self.fake.call("unmap")?;
        lock(&self.fake.world)
            .maps
            .retain(|(space, at), (size, ..)| *space != self.space || *at < iova || *at + *size > iova + len);
        Ok(())
    }
}

impl GroupFile for Opened {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
    fn status(&self) -> io::Result<GroupStatus> {
        let world = lock(&self.fake.world);
        Ok(GroupStatus {
            viable: !world.not_viable,
            contained: world.contained,
        })
    }
    fn set_container(&self, _container: BorrowedFd<'_>) -> io::Result<()> {
        self.fake.call("set container")
    }
    fn open_device(&self, _name: &str) -> io::Result<Box<dyn DeviceFile>> {
        Ok(Box::new(self.fake.open("device")?))
    }
}

impl DeviceFile for Opened {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
    fn info(&self) -> io::Result<DeviceInfo> {
        let world = lock(&self.fake.world);
        Ok(DeviceInfo {
            pci: !world.fails.contains_key("pci"),
            resets: !world.needs_bus,
            regions: 9,
            irqs: 5,
        })
    }
    fn region(&self, index: u32) -> io::Result<Region> {
        let bar = self.fake.sizes.get(index as usize).copied();
        Ok(Region {
            size: bar.unwrap_or(match index {
                6 => lock(&self.fake.world).rom,
                7 => 4096,
                _ => 0,
            }),
            offset: u64::from(index) * BAR_STEP,
            mappable: bar.is_some_and(|size| size >= 4096),
            sparse: lock(&self.fake.world).sparse.clone().filter(|_| index == 0),
        })
    }
    fn irq_count(&self, index: u32) -> io::Result<u32> {
        let deaf = lock(&self.fake.world).deaf;
        match index {
            0 => Ok(1),
            1 | 2 => Ok(2048),
            3 | 4 if !deaf => Ok(1),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }
    fn set_irqs(&self, index: u32, start: u32, events: &[Option<&EventFd>]) -> Result<(), IrqError> {
        self.fake.call("set irqs").map_err(IrqError::Failed)?;
        let mut world = lock(&self.fake.world);
        if events.len() as u32 > world.vectors {
            return Err(IrqError::Only(world.vectors));
        }
        for (number, event) in (start..).zip(events) {
            match event {
                Some(event) => drop(
                    world
                        .wires
                        .insert((index, number), event.try_clone().expect("an event")),
                ),
                None => drop(world.wires.remove(&(index, number))),
            }
        }
        Ok(())
    }
    fn unmask_by(&self, index: u32, event: &EventFd) -> io::Result<()> {
        self.fake.call("unmask by")?;
        let event = event.try_clone().expect("an event");
        lock(&self.fake.world).unmasks.insert(index, event);
        Ok(())
    }
    fn disable_irqs(&self, index: u32) -> io::Result<()> {
        self.fake.call("disable irqs")?;
        lock(&self.fake.world).unmasks.remove(&index);
        lock(&self.fake.world).wires.retain(|(kind, _), _| *kind != index);
        Ok(())
    }
    fn reset(&self) -> io::Result<()> {
        self.fake.call("reset")?;
        lock(&self.fake.world).moves.state = None;
        Ok(())
    }
    fn bus_members(&self) -> io::Result<BusMembers> {
        self.fake.call("bus members")?;
        Ok(lock(&self.fake.world).bus.clone())
    }
    fn reset_bus(&self, groups: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.fake.call("reset bus")?;
        lock(&self.fake.world).bus_resets.push(groups.len());
        Ok(())
    }
    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.fake.call("read")?;
        self.fake.device.read_exact_at(data, offset)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.fake.call("write")?;
        self.fake.device.write_all_at(data, offset)
    }
    fn map(&self, offset: u64, len: u64) -> io::Result<Mapping> {
        self.fake.call("map registers")?;
        Mapping::new(self.fake.device.as_fd(), offset, len)
    }
}

impl Vm for Fake {
    fn map(&self, gpa: u64, registers: &Mapping) -> io::Result<()> {
        self.call("show")?;
        lock(&self.world).mapped.insert(gpa, registers.size());
        Ok(())
    }
    fn unmap(&self, gpa: u64) -> io::Result<()> {
        lock(&self.world).mapped.remove(&gpa).ok_or(io::ErrorKind::NotFound)?;
        Ok(())
    }
    fn admit(&self, _group: BorrowedFd<'_>) -> io::Result<()> {
        self.call("admit")?;
        lock(&self.world).admitted += 1;
        Ok(())
    }
    fn dismiss(&self, _group: BorrowedFd<'_>) -> io::Result<()> {
        lock(&self.world).admitted -= 1;
        Ok(())
    }
    fn wire(&self, slot: u8, pin: u8, raised: &EventFd, lowered: &EventFd) -> io::Result<()> {
        self.call("wire")?;
        let ends = [raised, lowered].map(|event| event.try_clone().expect("an event"));
        lock(&self.world).pins.insert((slot, pin), ends);
        Ok(())
    }
    fn unwire(&self, slot: u8, pin: u8, _raised: &EventFd) -> io::Result<()> {
        let mut world = lock(&self.world);
        world.pins.remove(&(slot, pin)).ok_or(io::ErrorKind::NotFound)?;
        Ok(())
    }
}

/// Directories as sysfs has them.
pub(crate) struct Sysfs(TempDir);

impl Sysfs {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    /// A device, with its group and its driver.
    pub(crate) fn device(&self, name: &str, group: Option<u32>, driver: Option<&str>) -> PathBuf {
        let root = self.0.path();
        let path = root.join("devices").join(name);
        fs::create_dir_all(&path).expect("a device");
        fs::write(path.join("vendor"), "0x1b36\n").expect("its vendor");
        if let Some(group) = group {
            let members = root.join(format!("iommu_groups/{group}/devices"));
            fs::create_dir_all(&members).expect("a group");
            symlink(members.parent().expect("its directory"), path.join("iommu_group")).expect("its group");
            symlink(&path, members.join(name)).expect("the group's device");
        }
        if let Some(driver) = driver {
            symlink(root.join("drivers").join(driver), path.join("driver")).expect("its driver");
        }
        path
    }

    /// Gives a device a file of its own.
    pub(crate) fn node(&self, path: &Path, node: &str) {
        let shown = path.join("vfio-dev").join(node);
        fs::create_dir_all(&shown).expect("its node");
        fs::write(shown.join("dev"), "511:0\n").expect("its number");
    }

    /// A character device of `class`, which belongs to the device at `of`, if to any, as it is found by its number.
    pub(crate) fn character(&self, class: &str, name: &str, of: Option<&Path>) -> PathBuf {
        let root = self.0.path();
        let (directory, numbers) = (root.join(format!("class/{class}/{name}")), root.join("char"));
        fs::create_dir_all(&directory).expect("its directory");
        fs::create_dir_all(&numbers).expect("a directory of numbers");
        symlink(root.join("class").join(class), directory.join("subsystem")).expect("its class");
        if let Some(of) = of {
            symlink(of, directory.join("device")).expect("its device");
        }
        let link = numbers.join(format!("{class}:{name}"));
        symlink(directory, &link).expect("a link");
        link
    }

    /// Where groups are.
    pub(crate) fn groups(&self) -> PathBuf {
        self.0.path().join("iommu_groups")
    }

    /// A mediated device, like `api`, as its bus has it: a link to where it is.
    pub(crate) fn mediated(&self, name: &str, group: u32, driver: Option<&str>, api: &str) -> PathBuf {
        let path = self.device(name, Some(group), driver);
        fs::remove_file(path.join("vendor")).expect("no vendor");
        let kind = self.0.path().join("types").join(name);
        fs::create_dir_all(&kind).expect("a type");
        fs::write(kind.join("device_api"), format!("{api}\n")).expect("what it is like");
        symlink(kind, path.join("mdev_type")).expect("its type");
        self.group_file(group, "name", "vfio-noiommu\n");
        let bus = self.0.path().join("bus");
        fs::create_dir_all(&bus).expect("a bus");
        symlink(&path, bus.join(name)).expect("its place there");
        bus.join(name)
    }

    /// Writes a file of a group.
    pub(crate) fn group_file(&self, group: u32, name: &str, text: &str) {
        let path = self.0.path().join(format!("iommu_groups/{group}")).join(name);
        fs::write(path, text).expect("a file");
    }
}

/// Opens the device that `fake` has.
pub(crate) fn host(fake: &Fake) -> Arc<HostDevice> {
    let sysfs = Sysfs::new();
    let path = sysfs.device("0000:01:00.0", Some(7), Some("vfio-pci"));
    fake.iommu().open(&path, false).expect("a device")
}

/// How functions are had, on a bus with ports.
pub(crate) fn options(peers: Option<DmaMap>) -> Options {
    Options {
        ports: true,
        wires: true,
        peers,
        ..Options::default()
    }
}

/// Makes a function of `device`.
pub(crate) fn function_of(fake: &Fake, device: &Arc<HostDevice>) -> Result<VfioPci, crate::FunctionError> {
    let router: Arc<dyn MsiRouter> = Arc::new(MockRouter::default());
    VfioPci::new(device, Arc::new(fake.clone()), &router, options(None))
}

/// Makes a function of it.
pub(crate) fn function(fake: &Fake) -> (VfioPci, Arc<MockRouter>) {
    let router = Arc::new(MockRouter::default());
    let dynamic: Arc<dyn MsiRouter> = router.clone();
    let function = VfioPci::new(&host(fake), Arc::new(fake.clone()), &dynamic, options(None));
    (function.expect("a function"), router)
}

/// Rings what vector `number` of the kind `index` is connected to; whether it is.
pub(crate) fn ring(fake: &Fake, index: u32, number: u32) -> bool {
    let world = lock(&fake.world);
    world
        .wires
        .get(&(index, number))
        .is_some_and(|event| event.write(1).is_ok())
}

/// The message that a vector delivers.
pub(crate) fn message(router: &MockRouter, number: usize) -> Option<(u64, u32)> {
    let vectors = lock(&router.vectors);
    let message = vectors.get(number)?.message()?;
    Some((message.address, message.data))
}

/// Takes how often a vector was rung.
pub(crate) fn rung(router: &MockRouter, number: usize) -> u64 {
    let vectors = lock(&router.vectors);
    vectors.get(number).map_or(0, |vector| {
        let _ = vector.event_fd();
        vector.take()
    })
}
