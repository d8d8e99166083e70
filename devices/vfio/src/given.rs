//! Devices that come by descriptors of what somebody else opened, who has the rights that this process needs not have.
//!
//! What a descriptor is the kernel tells, by the number of the character device it is open on and what sysfs shows of that. From there on
//! a device is looked at as one that comes by its path.

use std::fmt;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl};

use crate::error::DescriptorError;
use crate::handle::Way;
use crate::host::{HostDevice, Iommu, Open};
use crate::kernel::{DeviceFile, Kernel};
use crate::sysfs::{self, Found, link_name};
use crate::{OpenError, lock};

/// What devices reach memory by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A container, for devices that come by their groups.
    Container,
    /// iommufd, for those that come by files of their own.
    Iommufd,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Container => "/dev/vfio/vfio",
            Self::Iommufd => "/dev/iommu",
        })
    }
}

/// What somebody opened for all devices of a guest. Each time that the first of them comes it is used anew.
#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) kind: Kind,
    pub(crate) file: OwnedFd,
}

/// What somebody opened for one device.
enum Source {
    /// The device's own file; its directory in sysfs.
    Node(OwnedFd, PathBuf),
    /// That of its group.
    Group(OwnedFd, u32),
}

impl Source {
    /// What there has to be for all devices when one comes this way.
    fn needs(&self) -> Kind {
        match self {
            Self::Node(..) => Kind::Iommufd,
            Self::Group(..) => Kind::Container,
        }
    }

    /// The device. Of those of a group `path` says which.
    fn find(&self, kernel: &dyn Kernel, path: Option<&Path>) -> Result<Found, OpenError> {
        let named = path.map(sysfs::find).transpose()?;
        let other = |named: &Found, is: String| DescriptorError::Other {
            path: named.name.clone(),
            is,
        };
        let found = match self {
            Self::Node(_, directory) => {
                let found = sysfs::find(&directory.join("device"))?;
                if let Some(named) = named.filter(|named| named.name != found.name) {
                    return Err(other(&named, found.name).into());
                }
                found
            }
            Self::Group(_, number) => match named {
                Some(named) if named.group != *number => {
                    return Err(other(&named, format!("of IOMMU group {number}")).into());
                }
                Some(named) => named,
                None => only_one(&kernel.members(*number), *number)?,
            },
        };
        match found.mediated {
            true => Err(DescriptorError::Mediated(found.name).into()),
            false => Ok(found),
        }
    }
}

/// The only device that VFIO has of the group whose devices are in `members`.
fn only_one(members: &Path, number: u32) -> Result<Found, OpenError> {
    let entries = fs::read_dir(members).map_err(|source| DescriptorError::Unseen {
        path: members.to_owned(),
        source,
    })?;
    let entries = entries.flatten().map(|entry| entry.path());
    let mut of_vfio: Vec<_> = entries.filter(|path| sysfs::has_vfio(path)).collect();
    of_vfio.sort();
    if let [one] = &of_vfio[..] {
        return sysfs::find(one);
    }
    let names = of_vfio.iter().filter_map(|path| link_name(path)).collect::<Vec<_>>();
    Err(DescriptorError::Several {
        group: number,
        names: names.join(", "),
    }
    .into())
}

/// One descriptor.
enum Given {
    One(Source),
    All(Space),
}

/// Looks what `file` is.
fn look(kernel: &dyn Kernel, file: OwnedFd) -> Result<Given, DescriptorError> {
    let flags = fcntl_getfl(&file).map_err(|error| DescriptorError::Unknown(error.into()))?;
    let directory = kernel.directory(file.as_fd()).map_err(DescriptorError::Unknown)?;
    let directory = directory.ok_or(DescriptorError::Strange)?;
    let unseen = |source| DescriptorError::Unseen {
        path: directory.clone(),
        source,
    };
    fs::metadata(&directory).map_err(unseen)?;
    let name = link_name(&directory).ok_or(DescriptorError::Strange)?;
    let class = link_name(&directory.join("subsystem")).unwrap_or_default();
    let space = |kind, file| Given::All(Space { kind, file });
    let given = match (&*class, &*name) {
        ("vfio-dev", _) => Given::One(Source::Node(file, directory)),
        ("vfio", name) => match name.parse() {
            Ok(number) => Given::One(Source::Group(file, number)),
            Err(_) => return Err(DescriptorError::NoIommu),
        },
        ("misc", "vfio") => space(Kind::Container, file),
        ("misc", "iommu") => space(Kind::Iommufd, file),
        _ => return Err(DescriptorError::Strange),
    };
    match flags & OFlags::RWMODE == OFlags::RDWR && !flags.contains(OFlags::PATH) {
        true => Ok(given),
        false => Err(DescriptorError::ReadOnly),
    }
}

/// The descriptor of a device among `files`, and that for all devices, if there is one.
fn sort(kernel: &dyn Kernel, files: Vec<OwnedFd>) -> Result<(Source, Option<Space>), DescriptorError> {
    let (mut source, mut space) = (None, None);
    for file in files {
        let again = match look(kernel, file)? {
            Given::One(given) => source.replace(given).is_some(),
            Given::All(given) => space.replace(given).is_some(),
        };
        if again {
            return Err(DescriptorError::Many);
        }
    }
    Ok((source.ok_or(DescriptorError::NoDevice)?, space))
}

impl Open {
    /// Takes what somebody opened for all devices, of which there can be one.
    fn give(&mut self, space: Space) -> Result<(), DescriptorError> {
        match self.kind() {
            Some(kind) if kind == space.kind => Err(DescriptorError::Again(kind)),
            Some(kind) => Err(DescriptorError::OtherWay(kind)),
            None => {
                self.given = Some(space);
                Ok(())
            }
        }
    }
}

impl Iommu {
    /// Takes `file`, which is of this kind and somebody opened for all devices of the guest, until it is forgotten.
    ///
    /// # Errors
    /// It is something else.
    pub fn give(&self, file: OwnedFd, kind: Kind) -> Result<(), OpenError> {
        match look(&*self.kernel, file)? {
            Given::All(space) if space.kind == kind => Ok(lock(&self.open).give(space)?),
            Given::All(_) | Given::One(_) => Err(DescriptorError::NotForAll(kind).into()),
        }
    }

    /// Closes that. Devices that are there are left alone.
    pub fn forget(&self) {
        lock(&self.open).given = None;
    }

    /// Takes the device whose file, or that of its group, is among `files`. With it there may be `/dev/iommu` or `/dev/vfio/vfio`, if the
    /// guest has none yet. `path` is its directory in sysfs; it need not be given unless its group has others. One that is `apart` is as in
    /// [`open`](Self::open), and comes by iommufd only: a container is one.
    ///
    /// # Errors
    /// They are something else, or the device cannot be had. Then all of them are closed.
    pub fn take(&self, files: Vec<OwnedFd>, path: Option<&Path>, apart: bool) -> Result<Arc<HostDevice>, OpenError> {
        let (source, space) = sort(&*self.kernel, files)?;
        let found = source.find(&*self.kernel, path)?;
        let mut open = lock(&self.open);
        open.check(&found, apart)?;
        if apart && matches!(source, Source::Group(..)) {
            return Err(DescriptorError::Apart(found.name).into());
        }
        let brought = space.is_some();
        if let Some(space) = space {
            open.give(space)?;
        }
        let taken = self.take_one(&mut open, source, &found, apart);
        if taken.is_err() && brought {
            open.given = None;
        }
        taken
    }

    fn take_one(
        &self,
        open: &mut Open,
        source: Source,
        found: &Found,
        apart: bool,
    ) -> Result<Arc<HostDevice>, OpenError> {
        let needed = source.needs();
        match open.kind() {
            Some(kind) if kind == needed => {}
            Some(kind) => return Err(DescriptorError::Mixed { needed, kind }.into()),
            None => return Err(DescriptorError::NoSpace(needed).into()),
        }
        let mut node: Option<Box<dyn DeviceFile>> = None;
        let way = match source {
            Source::Node(file, directory) => {
                node = Some(self.kernel.take_node(file));
                Way::Node(link_name(&directory).unwrap_or_default(), self.iommufd(open, apart)?)
            }
            Source::Group(_, number) if open.group(number).is_some() => {
                let name = found.name.clone();
                return Err(DescriptorError::GroupAgain { name, group: number }.into());
            }
            Source::Group(file, _) => {
                let group = Arc::new(self.open_group(open, found, apart, Some(self.kernel.take_group(file)))?);
                open.groups.insert(found.group, Arc::downgrade(&group));
                Way::Group(group)
            }
        };
        self.enlist(open, way, found, apart, node)
    }
}
