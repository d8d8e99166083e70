//! Opening devices: their groups, and the container that those of one guest share.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use vmm_sys_util::epoll::Epoll;

use crate::alarms::{Alarm, Alarms};
use crate::kernel::{ContainerFile, DeviceFile, DeviceInfo, GroupFile, Kernel};
use crate::sysfs::{self, Found};
use crate::{OpenError, lock};

/// The part of the host's IOMMU that is one guest's: what its devices reach. It is closed, and with that all mappings are undone, when the
/// last of its devices is.
pub struct Container {
    pub(crate) file: Box<dyn ContainerFile>,
    pub(crate) kernel: Arc<dyn Kernel>,
}

/// A group of devices that the IOMMU cannot tell apart.
struct Group {
    file: Box<dyn GroupFile>,
    /// A group leaves its container before that is closed.
    container: Arc<Container>,
}

/// A device of the host, open: nobody else can have it.
pub struct HostDevice {
    name: String,
    pub(crate) info: DeviceInfo,
    alarms: Alarms,
    // First the device, then its group.
    pub(crate) file: Box<dyn DeviceFile>,
    group: Arc<Group>,
}

#[derive(Default)]
struct Open {
    container: Weak<Container>,
    groups: BTreeMap<u32, Weak<Group>>,
    devices: Vec<Weak<HostDevice>>,
}

/// Opens the devices of one guest.
#[derive(Clone)]
pub struct Iommu {
    kernel: Arc<dyn Kernel>,
    open: Arc<Mutex<Open>>,
    /// What the host tells of its devices.
    alarms: Arc<Epoll>,
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
        })
    }

    /// What the host told of its devices since the last time, by their names. When there is something, the descriptor is readable.
    pub fn alarms(&self) -> Vec<(String, Alarm)> {
        let devices: Vec<_> = lock(&self.open).devices.iter().filter_map(Weak::upgrade).collect();
        let told = devices.iter().flat_map(|device| {
            let told = device.alarms.take();
            told.map(|alarm| (device.name.clone(), alarm))
        });
        told.collect()
    }

    /// Opens the device whose directory in sysfs is `path`. It does not do anything until somebody makes a function of it.
    ///
    /// # Errors
    /// It is not there, belongs to somebody else, or cannot be kept from the host's memory. Then nothing stays open.
    pub fn open(&self, path: &Path) -> Result<Arc<HostDevice>, OpenError> {
        let found = sysfs::find(path)?;
        let mut open = lock(&self.open);
        open.devices.retain(|device| device.strong_count() > 0);
        let mut devices = open.devices.iter().filter_map(Weak::upgrade);
        if devices.any(|device| device.name == found.name) {
            return Err(OpenError::Twice(found.name));
        }
        let group = match open.groups.get(&found.group).and_then(Weak::upgrade) {
            Some(group) => group,
            None => {
                let group = Arc::new(self.open_group(&mut open, &found)?);
                open.groups.insert(found.group, Arc::downgrade(&group));
                group
            }
        };
        let failed = |what| kernel(what, &found);
        let file = group
            .file
            .open_device(&found.name)
            .map_err(failed("open the descriptor"))?;
        let info = file.info().map_err(failed("ask the kernel for the description"))?;
        if !info.pci {
            return Err(OpenError::NotPci(found.name));
        }
        let alarms = Alarms::listen(&found.name, &*file, &self.alarms);
        let device = Arc::new(HostDevice {
            name: found.name,
            info,
            alarms,
            file,
            group,
        });
        open.devices.push(Arc::downgrade(&device));
        Ok(device)
    }

    fn open_group(&self, open: &mut Open, found: &Found) -> Result<Group, OpenError> {
        let container = match open.container.upgrade() {
            Some(container) => container,
            None => Arc::new(self.open_container()?),
        };
        let number = found.group;
        let file = self
            .kernel
            .open_group(number)
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
        if !file
            .status()
            .map_err(failed("learn the state of the IOMMU group"))?
            .viable
        {
            return Err(shared(found));
        }
        let first = open.container.strong_count() == 0;
        let file_of_container = &container.file;
        file.set_container(file_of_container.fd())
            .map_err(failed("put the IOMMU group into the container"))?;
        if first {
            if !file_of_container.has_type1().unwrap_or(false) {
                return Err(OpenError::NoType1);
            }
            file_of_container
                .set_type1()
                .map_err(|source| match source.raw_os_error() {
                    Some(libc::EPERM) => OpenError::UnsafeInterrupts(found.name.clone()),
                    _ => kernel("use the IOMMU", found)(source),
                })?;
            open.container = Arc::downgrade(&container);
        }
        Ok(Group { file, container })
    }

    fn open_container(&self) -> Result<Container, OpenError> {
        let file = self.kernel.open_container().map_err(|source| OpenError::NoVfio {
            path: "/dev/vfio/vfio".to_owned(),
            source,
        })?;
        let kernel = self.kernel.clone();
        Ok(Container { file, kernel })
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

    /// The descriptor of its group.
    pub fn group(&self) -> BorrowedFd<'_> {
        self.group.file.fd()
    }

    /// What it reaches memory by.
    pub fn container(&self) -> &Arc<Container> {
        &self.group.container
    }

    pub(crate) fn page_size(&self) -> u64 {
        self.group.container.kernel.page_size()
    }

    /// Stops whatever it does, and forgets what it was told, as far as the device can be reset at all.
    pub(crate) fn reset(&self) -> io::Result<()> {
        match self.info.resets {
            true => self.file.reset(),
            false => Ok(()),
        }
    }
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
