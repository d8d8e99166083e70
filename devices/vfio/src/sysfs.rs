//! What sysfs tells of a device: its name, its driver, its IOMMU group.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, readlinkat};

use crate::OpenError;

/// A device as sysfs shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// Name on its bus: `0000:01:00.0`.
    pub(crate) name: String,
    /// Number of its IOMMU group.
    pub(crate) group: u32,
    /// It is a mediated one.
    pub(crate) mediated: bool,
    /// Name of its file in `/dev/vfio/devices`, if the kernel makes such.
    pub(crate) node: Option<String>,
    /// Its directory.
    path: PathBuf,
}

/// What a mediated device must be like (Documentation/driver-api/vfio-mediated-device.rst).
const PCI: &str = "vfio-pci";

/// Drivers of VFIO, which a device may belong to.
fn is_vfio(driver: &str) -> bool {
    driver.contains("vfio")
}

/// The last part of what a symbolic link points to.
pub(crate) fn link_name(path: &Path) -> Option<String> {
    // Not by the standard library, whose system call a confined thread may not make.
    let target = readlinkat(CWD, path, Vec::new()).ok()?;
    let target = target.into_string().ok()?;
    Some(target.rsplit('/').next()?.to_owned())
}

/// The device whose directory is `path` belongs to VFIO.
pub(crate) fn has_vfio(path: &Path) -> bool {
    link_name(&path.join("driver")).is_some_and(|driver| is_vfio(&driver))
}

/// Looks at the device whose directory is `path`, which must belong to VFIO.
pub(crate) fn find(path: &Path) -> Result<Found, OpenError> {
    let absent = || OpenError::Absent(path.to_owned());
    let own_name = path.file_name().and_then(|name| name.to_str());
    // In /sys/bus/pci/devices it is a link whose target has the same name, but others may point there, too.
    let name = link_name(path).or(own_name.map(str::to_owned)).ok_or_else(absent)?;
    let mediated = path.join("mdev_type").exists();
    if !path.join("vendor").exists() && !mediated {
        return Err(absent());
    }
    if mediated {
        let api = fs::read_to_string(path.join("mdev_type/device_api")).unwrap_or_default();
        if api.trim() != PCI {
            let api = api.trim().to_owned();
            return Err(OpenError::OtherKind { name, api });
        }
    }
    // First of all: on some hosts a device is in a group only while it has a driver.
    match link_name(&path.join("driver")) {
        // Whatever makes mediated devices is a driver of VFIO.
        Some(driver) if is_vfio(&driver) || mediated => {}
        None if mediated => return Err(OpenError::Idle(name)),
        driver => {
            let bound = driver.is_some();
            let owner = driver.map_or("has no driver".to_owned(), |driver| {
                format!("belongs to the host's driver {driver}")
            });
            return Err(OpenError::NotBound { name, owner, bound });
        }
    }
    let group = link_name(&path.join("iommu_group"));
    let Some(group) = group.and_then(|number| number.parse().ok()) else {
        return Err(OpenError::NoGroup(name));
    };
    let kind = fs::read_to_string(path.join("iommu_group/name")).unwrap_or_default();
    // The kernel gives a mediated device a group of that name, too, but it checks what that reaches, as an IOMMU does for others.
    if kind.trim() == "vfio-noiommu" && !mediated {
        return Err(OpenError::NoIommu(name));
    }
    Ok(Found {
        name,
        group,
        mediated,
        node: node(path),
        path: path.to_owned(),
    })
}

/// The name of the device's file, which VFIO shows below the device's directory (Documentation/driver-api/vfio.rst).
fn node(path: &Path) -> Option<String> {
    let mut entries = fs::read_dir(path.join("vfio-dev")).ok()?.flatten();
    let entry = entries.find(|entry| entry.file_name().to_string_lossy().starts_with("vfio"))?;
    // Kernels without such files have the directory all the same, without a device number.
    let numbered = entry.path().join("dev").exists();
    entry.file_name().into_string().ok().filter(|_| numbered)
}

impl Found {
    /// The other devices of its group that belong to a driver of the host, with it.
    pub(crate) fn others(&self) -> Vec<(String, String)> {
        let entries = fs::read_dir(self.path.join("iommu_group/devices"));
        let mut others: Vec<_> = entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let driver = link_name(&entry.path().join("driver"))?;
                (name != self.name && !is_vfio(&driver)).then_some((name, driver))
            })
            .collect();
        others.sort();
        others
    }
}
