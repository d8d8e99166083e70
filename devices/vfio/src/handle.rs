//! A device's file, and how it was come by.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, OnceLock};

use thiserror::Error;
use vmm_sys_util::epoll::Epoll;

use crate::alarms::Alarms;
use crate::host::{Container, Group};
use crate::kernel::{DeviceFile, DeviceInfo, IommuFile, Kernel, MoveKinds};
use crate::mover::Moving;
use crate::{FunctionError, Vm, lock};

/// By which of the kernel's interfaces a device is had.
#[derive(Clone)]
pub(crate) enum Way {
    /// By its group, which is in a container.
    Group(Arc<Group>),
    /// By its own file in `/dev/vfio/devices`, and iommufd.
    Node(String, Arc<Container>),
}

impl Way {
    pub(crate) fn container(&self) -> &Arc<Container> {
        match self {
            Self::Group(group) => &group.container,
            Self::Node(_, container) => container,
        }
    }
}

/// What the kernel refuses.
#[derive(Debug, Error)]
#[error("cannot {what}")]
pub(crate) struct Refusal {
    pub(crate) what: &'static str,
    #[source]
    pub(crate) source: io::Error,
}

impl Refusal {
    /// [`OpenError::Kernel`](crate::OpenError) and the like, without the device's name.
    pub(crate) fn of(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self { what, source }
    }

    pub(crate) fn of_device(self, name: &str) -> FunctionError {
        FunctionError::Kernel {
            what: self.what,
            name: name.to_owned(),
            source: self.source,
        }
    }
}

/// What is asked of the kernel when a device becomes this process'.
pub(crate) const BIND: &str = "take possession";

/// A device's file, open: nobody else can have it.
pub(crate) struct Handle {
    pub(crate) info: DeviceInfo,
    pub(crate) alarms: Alarms,
    // First the device, then its group.
    pub(crate) file: Box<dyn DeviceFile>,
    way: Way,
    /// What it can beside standing still, once that was asked; `None`: not even that.
    pub(crate) kinds: OnceLock<Option<MoveKinds>>,
    /// How far it is, if it goes with its guest.
    pub(crate) moving: Mutex<Moving>,
}

impl Handle {
    /// Opens the device `name`, whose own file is `given` if somebody else opened that. Events of it join `set`. If there is a VM, the
    /// hypervisor hears of it before its driver does: some mediated devices need to know whose they are.
    pub(crate) fn open(
        kernel: &dyn Kernel,
        way: &Way,
        name: &str,
        set: &Arc<Epoll>,
        vm: Option<&dyn Vm>,
        given: Option<Box<dyn DeviceFile>>,
    ) -> Result<Self, Refusal> {
        let describe = Refusal::of("ask the kernel for the description");
        let (file, info) = match way {
            Way::Group(group) => admitted(vm, group.file.fd(), || {
                let file = group.file.open_device(name);
                let file = file.map_err(Refusal::of("open the descriptor"))?;
                let info = file.info().map_err(&describe)?;
                Ok((file, info))
            })?,
            Way::Node(node, container) => {
                let opened = given.map_or_else(|| kernel.open_node(node), Ok);
                let file = opened.map_err(Refusal::of("open the device file"))?;
                let info = admitted(vm, file.fd(), || {
                    container.adopt(|iommu| bind(iommu, &*file))?;
                    file.info().map_err(&describe)
                })?;
                (file, info)
            }
        };
        Ok(Self {
            info,
            alarms: Alarms::listen(name, &*file, set),
            file,
            way: way.clone(),
            kinds: OnceLock::new(),
            moving: Mutex::default(),
        })
    }

    /// What the hypervisor knows the device by.
    pub(crate) fn known_by(&self) -> BorrowedFd<'_> {
        match &self.way {
            Way::Group(group) => group.file.fd(),
            Way::Node(..) => self.file.fd(),
        }
    }

    /// Stops whatever it does, and forgets what it was told, as far as the device can be reset at all.
    pub(crate) fn reset(&self) -> io::Result<()> {
        if self.info.resets {
            // Whoever carries it stands aside.
            let mut moving = lock(&self.moving);
            self.file.reset()?;
            moving.was_reset();
        }
        Ok(())
    }
}

fn bind(iommu: &dyn IommuFile, file: &dyn DeviceFile) -> Result<(), Refusal> {
    iommu.bind(file.fd()).map_err(Refusal::of(BIND))?;
    iommu.attach(file.fd()).map_err(Refusal::of("have the IOMMU take care"))
}

/// Does `work` while the hypervisor knows of the device by `fd`, and still does after success.
fn admitted<T>(
    vm: Option<&dyn Vm>,
    fd: BorrowedFd<'_>,
    work: impl FnOnce() -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    if let Some(vm) = vm {
        vm.admit(fd).map_err(Refusal::of("tell KVM"))?;
    }
    let done = work();
    if let (Err(_), Some(vm)) = (&done, vm) {
        // The error that is told came before.
        let _ = vm.dismiss(fd);
    }
    done
}

/// A device that the hypervisor knows of as long as this is there.
pub(crate) struct Admission {
    vm: Arc<dyn Vm>,
    handle: Arc<Handle>,
    name: String,
}

impl Admission {
    /// Of a device that it was told of.
    pub(crate) fn given(vm: &Arc<dyn Vm>, handle: &Arc<Handle>, name: &str) -> Self {
        Self {
            vm: vm.clone(),
            handle: handle.clone(),
            name: name.to_owned(),
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        if let Err(error) = self.vm.dismiss(self.handle.known_by()) {
            tracing::warn!("KVM keeps the device {}: {error}", self.name);
        }
    }
}
