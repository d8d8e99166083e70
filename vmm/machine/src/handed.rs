//! Devices of the host that somebody else opened, who handed their descriptors over.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use triarch_api::{DeviceConfig, VmConfig};
use triarch_vfio::{HostDevice, Kind};

use crate::backends::{Handed, close_inherited, inherited};
use crate::control::Controller;
use crate::{MachineError, identity};

impl Controller {
    /// As [`create`](Self::create), with a configuration whose descriptors this process inherited. It keeps those of devices of the host, and
    /// closes them with the device, so that the host has it back.
    ///
    /// # Errors
    /// As there. Descriptors that cannot be used stay open.
    pub fn create_inherited(&mut self, mut config: VmConfig) -> Result<(), MachineError> {
        let created = self.take_inherited(&mut config).and_then(|()| self.create(config));
        if created.is_err() {
            self.forget_handed_ends();
        }
        created
    }

    /// Takes the descriptors of devices of the host, which are then known by their paths.
    fn take_inherited(&mut self, config: &mut VmConfig) -> Result<(), MachineError> {
        config.validate()?;
        identity::complete(config)?;
        let for_all = config.platform.as_mut().and_then(|platform| {
            let fd = platform.iommufd_fd.take().map(|fd| (fd, Kind::Iommufd));
            fd.or(platform.container_fd.take().map(|fd| (fd, Kind::Container)))
        });
        if let Some((fd, kind)) = for_all {
            let copy = inherited(fd).map_err(|error| MachineError::Handed(error.into()))?;
            let given = self.iommu.give(copy, kind);
            given.map_err(|error| MachineError::Handed(error.into()))?;
            close_inherited(fd);
            if let Some(platform) = &mut config.platform {
                platform.iommufd = Some(kind == Kind::Iommufd);
            }
        }
        let behind_iommu = config.iommu_for_all();
        for device in config.devices.iter_mut().flatten() {
            let Some(fd) = device.fd.take() else { continue };
            let copy = inherited(fd).map_err(|error| MachineError::device(&device.id, error))?;
            let taken = self.take_device(device, vec![copy], behind_iommu)?;
            close_inherited(fd);
            self.handed.insert(device.id.clone().unwrap_or_default(), taken);
        }
        Ok(())
    }

    /// Opens `device` by descriptors, one of which is its own or its group's. It is known by its path then.
    pub(crate) fn take_device(
        &self,
        device: &mut DeviceConfig,
        files: Vec<OwnedFd>,
        behind_iommu: bool,
    ) -> Result<Handed, MachineError> {
        let apart = device.iommu || behind_iommu;
        let taken = self.iommu.take(files, device.path.as_deref(), apart);
        let taken = taken.map_err(|error| MachineError::device(&device.id, error))?;
        device.path.get_or_insert_with(|| path_of(&taken));
        Ok(Handed::Host(taken))
    }

    /// Closes what was handed over.
    pub(crate) fn forget_handed_ends(&mut self) {
        self.handed.clear();
        self.iommu.forget();
    }
}

/// The directory of a device in sysfs.
fn path_of(device: &Arc<HostDevice>) -> std::path::PathBuf {
    format!("/sys/bus/pci/devices/{}", device.name()).into()
}
