//! Opening devices: their groups, and the container that those of one guest share.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use vmm_sys_util::epoll::Epoll;

use crate::alarms::Alarm;
use crate::error::DescriptorError;
use crate::given::{Kind, Space as Given};
use crate::handle::{Admission, BIND, Handle, Refusal, Way};
use crate::kernel::{AddressSpace, ContainerFile, DeviceFile, GroupFile, IommuFile, Kernel};
use crate::sysfs::{self, Found};
use crate::{FunctionError, Immovable, Mover, OpenError, Reached, Vm, lock};

/// A part of the host's IOMMU that is one guest's: what some of its devices reach. It is closed, and with that all mappings are undone, when
/// the last of those is.
pub struct Container {
    space: Space,
    pub(crate) kernel: Arc<dyn Kernel>,
    /// What devices of all of the guest's containers reach.
    reached: Arc<Reached>,
    /// What those of this one do.
    held: Reached,
}

impl Container {
    /// How much devices of the guest reach.
    pub fn reached(&self) -> &Arc<Reached> {
        &self.reached
    }

    /// Has devices reach `len` bytes at `iova` that are at `host` in this process.
    pub(crate) fn map(&self, iova: u64, len: u64, host: u64, writable: bool) -> io::Result<()> {
        self.space().map(iova, len, host, writable)?;
        self.reached.add(len);
        self.held.add(len);
        Ok(())
    }

    /// Undoes that.
    pub(crate) fn unmap(&self, iova: u64, len: u64) -> io::Result<()> {
        self.space().unmap(iova, len)?;
        self.reached.remove(len);
        self.held.remove(len);
        Ok(())
    }

    /// What its devices reach.
    pub(crate) fn space(&self) -> &dyn AddressSpace {
        match &self.space {
            Space::Container(file) => &**file,
            Space::Iommufd(file) => &**file,
        }
    }

    fn kind(&self) -> Kind {
        match &self.space {
            Space::Container(_) => Kind::Container,
            Space::Iommufd(_) => Kind::Iommufd,
        }
    }

    /// One more address space beside this, if it is iommufd's.
    fn another(&self) -> Option<io::Result<Box<dyn IommuFile>>> {
        match &self.space {
            Space::Container(_) => None,
            Space::Iommufd(file) => Some(file.another()),
        }
    }

    /// Has a device reach it, if that is how devices come here.
    pub(crate) fn adopt(&self, work: impl FnOnce(&dyn IommuFile) -> Result<(), Refusal>) -> Result<(), Refusal> {
        match &self.space {
            Space::Container(_) => Ok(()),
            Space::Iommufd(file) => work(&**file),
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.reached.subtract(&self.held);
    }
}

/// By which of the kernel's interfaces.
enum Space {
    Container(Box<dyn ContainerFile>),
    Iommufd(Box<dyn IommuFile>),
}

/// A group of devices that the IOMMU cannot tell apart.
pub(crate) struct Group {
    pub(crate) file: Box<dyn GroupFile>,
    /// A group leaves its container before that is closed.
    pub(crate) container: Arc<Container>,
}

/// A device of the host: nobody else can have it.
pub struct HostDevice {
    name: String,
    /// Its IOMMU group.
    group: u32,
    /// No other device has its container.
    apart: bool,
    way: Way,
    kernel: Arc<dyn Kernel>,
    alarms: Arc<Epoll>,
    /// Its file. That of a mediated device is opened when a guest gets it, and closed with that guest.
    kept: Option<Arc<Handle>>,
    open: Mutex<Weak<Handle>>,
    /// The guest's others.
    family: Weak<Mutex<Open>>,
    /// A guest has it.
    live: AtomicBool,
}

#[derive(Default)]
pub(crate) struct Open {
    iommufd: Option<bool>,
    /// What somebody else opened for all devices.
    pub(crate) given: Option<Given>,
    container: Weak<Container>,
    pub(crate) groups: BTreeMap<u32, Weak<Group>>,
    devices: Vec<Weak<HostDevice>>,
}

impl Open {
    /// Refuses a device that is there already, or cannot be `apart` from those that are.
    pub(crate) fn check(&mut self, found: &Found, apart: bool) -> Result<(), OpenError> {
        self.devices.retain(|device| device.strong_count() > 0);
        let mut devices = self.devices.iter().filter_map(Weak::upgrade);
        if devices.any(|device| device.name == found.name) {
            return Err(OpenError::Twice(found.name.clone()));
        }
        let mut devices = self.devices.iter().filter_map(Weak::upgrade);
        match devices.any(|device| device.group == found.group && (apart || device.apart)) {
            true => Err(OpenError::NotApart {
                name: found.name.clone(),
                group: found.group,
            }),
            false => Ok(()),
        }
    }

    /// By which of the kernel's interfaces devices come, if there are some, or somebody opened one of the two for them.
    pub(crate) fn kind(&self) -> Option<Kind> {
        let mut devices = self.devices.iter().filter_map(Weak::upgrade);
        let there = devices.next().map(|device| device.container().kind());
        there.or(self.given.as_ref().map(|given| given.kind))
    }

    /// The group `number`, if it is open.
    pub(crate) fn group(&self, number: u32) -> Option<Arc<Group>> {
        self.groups.get(&number).and_then(Weak::upgrade)
    }

    /// What somebody else opened for all devices, if that is of this kind.
    fn given(&self, kind: Kind) -> io::Result<Option<OwnedFd>> {
        let given = self.given.as_ref().filter(|given| given.kind == kind);
        given.map(|given| given.file.try_clone()).transpose()
    }
}

/// Opens the devices of one guest.
#[derive(Clone)]
pub struct Iommu {
    pub(crate) kernel: Arc<dyn Kernel>,
    pub(crate) open: Arc<Mutex<Open>>,
    /// What the host tells of its devices.
    alarms: Arc<Epoll>,
    reached: Arc<Reached>,
}

impl Iommu {
    /// By what `kernel` has.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(kernel: Arc<dyn Kernel>) -> io::Result<Self> {
        Ok(Self {
            kernel,
            open: Arc::default(),
            alarms: Arc::new(Epoll::new()?),
            reached: Arc::default(),
        })
    }

    /// Devices come by iommufd and device files from now on, or by groups and a container; `None`: by groups where the host has those.
    /// While there are devices, more come the same way.
    pub fn by_iommufd(&self, choice: Option<bool>) {
        lock(&self.open).iommufd = choice;
    }

    /// What the host told of its devices since the last time, by their names. When there is something, the descriptor is readable.
    pub fn alarms(&self) -> Vec<(String, Alarm)> {
        let devices: Vec<_> = lock(&self.open).devices.iter().filter_map(Weak::upgrade).collect();
        let told = devices.iter().flat_map(|device| {
            let handle = lock(&device.open).upgrade();
            let told: Vec<_> = handle.iter().flat_map(|handle| handle.alarms.take()).collect();
            told.into_iter().map(|alarm| (device.name.clone(), alarm))
        });
        told.collect()
    }

    /// How much memory the devices reach that it opened.
    pub fn reached(&self) -> &Arc<Reached> {
        &self.reached
    }

    /// Opens the device whose directory in sysfs is `path`. It does not do anything until somebody makes a function of it. One that is
    /// `apart` has a container of its own, so that it can reach other memory than the guest's other devices.
    ///
    /// # Errors
    /// It is not there, belongs to somebody else, or cannot be kept from the host's memory. Then nothing stays open.
    pub fn open(&self, path: &Path, apart: bool) -> Result<Arc<HostDevice>, OpenError> {
        let found = sysfs::find(path)?;
        let mut open = lock(&self.open);
        open.check(&found, apart)?;
        let way = self.way(&mut open, &found, apart)?;
        self.enlist(&mut open, way, &found, apart, None)
    }

    /// Opens the device `found`, whose own file is `given` if somebody else opened that, and keeps it in mind.
    pub(crate) fn enlist(
        &self,
        open: &mut Open,
        way: Way,
        found: &Found,
        apart: bool,
        given: Option<Box<dyn DeviceFile>>,
    ) -> Result<Arc<HostDevice>, OpenError> {
        let was_given = given.is_some();
        let mut device = HostDevice {
            name: found.name.clone(),
            group: found.group,
            apart,
            way,
            kernel: self.kernel.clone(),
            alarms: self.alarms.clone(),
            kept: None,
            open: Mutex::default(),
            family: Arc::downgrade(&self.open),
            live: AtomicBool::new(false),
        };
        if !found.mediated {
            let handle = device.open(None, given);
            let handle = handle.map_err(|refusal| refused(refusal, found, was_given))?;
            if !handle.info.pci {
                return Err(OpenError::NotPci(found.name.clone()));
            }
            device.kept = Some(handle);
        }
        let device = Arc::new(device);
        open.devices.push(Arc::downgrade(&device));
        Ok(device)
    }

    /// By what the device comes.
    fn way(&self, open: &mut Open, found: &Found, apart: bool) -> Result<Way, OpenError> {
        let iommufd = match (open.kind(), open.iommufd) {
            (Some(kind), _) => kind == Kind::Iommufd,
            (None, Some(choice)) => choice,
            (None, None) => !self.kernel.has_containers() && found.node.is_some(),
        };
        if iommufd {
            let node = found
                .node
                .clone()
                .ok_or_else(|| OpenError::NoNode(found.name.clone()))?;
            return Ok(Way::Node(node, self.iommufd(open, apart)?));
        }
        let group = match open.group(found.group) {
            Some(group) => group,
            None => {
                let group = Arc::new(self.open_group(open, found, apart, None)?);
                open.groups.insert(found.group, Arc::downgrade(&group));
                group
            }
        };
        Ok(Way::Group(group))
    }

    /// What a device that comes by iommufd reaches.
    pub(crate) fn iommufd(&self, open: &mut Open, apart: bool) -> Result<Arc<Container>, OpenError> {
        if let Some(container) = open.container.upgrade().filter(|_| !apart) {
            return Ok(container);
        }
        let mut others = open.devices.iter().filter_map(Weak::upgrade);
        let file = match others.find_map(|other| other.container().another()) {
            Some(file) => file,
            None => match open.given(Kind::Iommufd) {
                Ok(Some(given)) => self.kernel.take_iommu(given),
                Ok(None) => self.kernel.open_iommu(),
                Err(error) => Err(error),
            },
        };
        let file = file.map_err(OpenError::NoIommufd)?;
        let container = Arc::new(self.container(Space::Iommufd(file)));
        if !apart {
            open.container = Arc::downgrade(&container);
        }
        Ok(container)
    }

    /// Opens the group of `found`, or takes what somebody else opened.
    pub(crate) fn open_group(
        &self,
        open: &mut Open,
        found: &Found,
        apart: bool,
        given: Option<Box<dyn GroupFile>>,
    ) -> Result<Group, OpenError> {
        let shared_container = open.container.upgrade().filter(|_| !apart);
        let first = shared_container.is_none();
        let container = match shared_container {
            Some(container) => container,
            None => Arc::new(self.open_container(open, apart)?),
        };
        let Space::Container(file_of_container) = &container.space else {
            return Err(OpenError::NoType1);
        };
        let number = found.group;
        let was_given = given.is_some();
        let file = given
            .map_or_else(|| self.kernel.open_group(number), Ok)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EBUSY) => OpenError::InUse {
                    name: found.name.clone(),
                    group: number,
                },
                _ => OpenError::NoVfio {
                    path: format!("/dev/vfio/{number}"),
                    source,
                },
            })?;
        let failed = |what| kernel(what, found);
        let status = file.status().map_err(failed("learn the state of the IOMMU group"))?;
        if !status.viable {
            return Err(shared(found));
        }
        if was_given && status.contained {
            return Err(DescriptorError::Used(found.name.clone()).into());
        }
        file.set_container(file_of_container.fd())
            .map_err(failed("put the IOMMU group into the container"))?;
        if first {
            if !file_of_container.has_type1().unwrap_or(false) {
                return Err(OpenError::NoType1);
            }
            file_of_container
                .set_type1()
                .map_err(|source| match source.raw_os_error() {
                    Some(libc::EPERM) => unsafe_interrupts(found, "vfio_iommu_type1"),
                    _ => kernel("use the IOMMU", found)(source),
                })?;
            if !apart {
                open.container = Arc::downgrade(&container);
            }
        }
        Ok(Group { file, container })
    }

    fn open_container(&self, open: &Open, apart: bool) -> Result<Container, OpenError> {
        // What somebody else opened is one container, which those that are apart do not share.
        let file = match open.given(Kind::Container).map(|given| given.filter(|_| !apart)) {
            Ok(Some(given)) => self.kernel.take_container(given),
            Ok(None) => self.kernel.open_container(),
            Err(error) => Err(error),
        };
        let file = file.map_err(|source| OpenError::NoVfio {
            path: "/dev/vfio/vfio".to_owned(),
            source,
        })?;
        Ok(self.container(Space::Container(file)))
    }

    fn container(&self, space: Space) -> Container {
        Container {
            space,
            kernel: self.kernel.clone(),
            reached: self.reached.clone(),
            held: Reached::default(),
        }
    }
}

impl AsRawFd for Iommu {
    fn as_raw_fd(&self) -> RawFd {
        self.alarms.as_raw_fd()
    }
}

impl HostDevice {
    /// Its name on the host: `0000:01:00.0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it has a container of its own.
    pub fn is_apart(&self) -> bool {
        self.apart
    }

    /// What it reaches memory by.
    pub fn container(&self) -> &Arc<Container> {
        self.way.container()
    }

    /// A guest has it from now on, or has it no more.
    pub(crate) fn set_live(&self, live: bool) {
        self.live.store(live, Ordering::Release);
    }

    /// Stops whatever it does, and forgets what it was told, as far as it can be reset: by itself, or else with all of its bus, if no guest has
    /// another of those and nobody else does.
    pub(crate) fn reset(&self, handle: &Handle) -> io::Result<()> {
        if handle.info.resets {
            return handle.reset();
        }
        let name = &self.name;
        match self.reset_bus(handle) {
            Ok(true) => {}
            Ok(false) => tracing::warn!(
                "{name} cannot be reset by itself, and its bus not as long as others there are in use; it stays as it is"
            ),
            Err(error) => {
                tracing::warn!("{name} cannot be reset by itself, and its bus neither: {error}; it stays as it is");
            }
        }
        Ok(())
    }

    fn reset_bus(&self, handle: &Handle) -> io::Result<bool> {
        let members = handle.file.bus_members()?;
        let Some(family) = self.family.upgrade() else {
            return Ok(false);
        };
        let family = lock(&family);
        let mut others = family.devices.iter().filter_map(Weak::upgrade);
        let in_use = |other: &HostDevice| {
            other.name != self.name && other.live.load(Ordering::Acquire) && members.names.contains(&other.name)
        };
        if others.any(|other| in_use(&other)) || members.owned == Some(false) {
            return Ok(false);
        }
        let group = |number| family.groups.get(number)?.upgrade();
        let groups: Option<Vec<_>> = members.groups.iter().map(group).collect();
        let Some(groups) = groups else {
            return Ok(false);
        };
        let files: Vec<_> = groups.iter().map(|group| group.file.fd()).collect();
        handle.file.reset_bus(&files)?;
        Ok(true)
    }

    /// Bytes of the host's smallest page.
    pub fn page_size(&self) -> u64 {
        self.kernel.page_size()
    }

    /// How it goes with its guest.
    ///
    /// # Errors
    /// It cannot.
    pub fn mover(&self) -> Result<Mover, Immovable> {
        match &self.kept {
            Some(handle) => Mover::of(&self.name, handle),
            None => Err(Immovable::Mediated(self.name.clone())),
        }
    }

    fn open(&self, vm: Option<&dyn Vm>, given: Option<Box<dyn DeviceFile>>) -> Result<Arc<Handle>, Refusal> {
        let handle = Handle::open(&*self.kernel, &self.way, &self.name, &self.alarms, vm, given)?;
        let handle = Arc::new(handle);
        *lock(&self.open) = Arc::downgrade(&handle);
        Ok(handle)
    }

    /// Its file, for `vm`, which knows of it as long as the admission is there.
    pub(crate) fn enter(&self, vm: &Arc<dyn Vm>) -> Result<(Arc<Handle>, Admission), FunctionError> {
        let entered = match &self.kept {
            Some(handle) => {
                let told = vm.admit(handle.known_by()).map_err(Refusal::of("tell KVM"));
                told.map(|()| handle.clone())
            }
            None => self.open(Some(&**vm), None),
        };
        let handle = entered.map_err(|refusal| refusal.of_device(&self.name))?;
        let admission = Admission::given(vm, &handle, &self.name);
        Ok((handle, admission))
    }
}

/// Why a device cannot be opened.
fn refused(refusal: Refusal, found: &Found, was_given: bool) -> OpenError {
    let Refusal { what, source } = refusal;
    match (what, source.raw_os_error()) {
        // It can be bound once.
        (BIND, Some(libc::EINVAL)) if was_given => DescriptorError::Used(found.name.clone()).into(),
        (BIND, Some(libc::EBUSY)) if !found.others().is_empty() => shared(found),
        (BIND, Some(libc::EBUSY)) => OpenError::InUse {
            name: found.name.clone(),
            group: found.group,
        },
        (_, Some(libc::EPERM)) if found.node.is_some() => unsafe_interrupts(found, "iommufd"),
        _ => kernel(what, found)(source),
    }
}

fn unsafe_interrupts(found: &Found, module: &'static str) -> OpenError {
    let name = found.name.clone();
    OpenError::UnsafeInterrupts { name, module }
}

fn shared(found: &Found) -> OpenError {
    let others = found.others().into_iter();
    let others: Vec<_> = others
        .map(|(name, driver)| format!("{name}, which belongs to the host's driver {driver},"))
        .collect();
    OpenError::Shared {
        name: found.name.clone(),
        group: found.group,
        others: match others.is_empty() {
            true => "others".to_owned(),
            false => others.join(" and "),
        },
    }
}

fn kernel(what: &'static str, found: &Found) -> impl Fn(io::Error) -> OpenError {
    let name = found.name.clone();
    move |source| OpenError::Kernel {
        what,
        name: name.clone(),
        source,
    }
}
