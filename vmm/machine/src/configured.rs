//! The devices of a configuration that can come and go, whatever their kind.

use triarch_api::{
    DeviceConfig as HostDeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, VmConfig, VsockConfig,
};
use triarch_pci::{BUSES_OF_ROOT, PciAddress};

/// One of them.
#[derive(Debug, Clone, Copy)]
pub(crate) enum DeviceConfig<'a> {
    Disk(&'a DiskConfig),
    Net(&'a NetConfig),
    Fs(&'a FsConfig),
    Generic(&'a GenericVhostUserConfig),
    Host(&'a HostDeviceConfig),
    Vsock(&'a VsockConfig),
}

impl<'a> DeviceConfig<'a> {
    /// All of `config`, those of one kind after those of another.
    pub(crate) fn all(config: &'a VmConfig) -> impl Iterator<Item = Self> {
        let disks = config.disks.iter().flatten().map(Self::Disk);
        let nets = config.net.iter().flatten().map(Self::Net);
        let fs = config.fs.iter().flatten().map(Self::Fs);
        let generic = config.generic_vhost_user.iter().flatten().map(Self::Generic);
        let host = config.devices.iter().flatten().map(Self::Host);
        let vsock = config.vsock.iter().map(Self::Vsock);
        disks.chain(nets).chain(fs).chain(generic).chain(host).chain(vsock)
    }

    /// The one called `id`.
    pub(crate) fn find(config: &'a VmConfig, id: &str) -> Option<Self> {
        Self::all(config).find(|device| device.id() == id)
    }

    /// Its id; one that has none yet is called by the empty name.
    pub(crate) fn id(self) -> &'a str {
        let id = match self {
            Self::Disk(disk) => &disk.id,
            Self::Net(net) => &net.id,
            Self::Fs(fs) => &fs.id,
            Self::Generic(device) => &device.id,
            Self::Host(device) => &device.id,
            Self::Vsock(vsock) => &vsock.id,
        };
        id.as_deref().unwrap_or_default()
    }

    /// Where it has to be on the guest's buses, if anywhere.
    pub(crate) fn place(self) -> Option<PciAddress> {
        match self {
            Self::Host(device) => device.addr.map(|at| {
                let slot = self.root() * BUSES_OF_ROOT + at.slot();
                PciAddress::in_slot(0, slot, at.function(), device.root_port)
            }),
            Self::Disk(_) | Self::Net(_) | Self::Fs(_) | Self::Generic(_) | Self::Vsock(_) => None,
        }
    }

    /// The NUMA node of the guest that it is in, if it says so.
    pub(crate) fn node(self) -> Option<u32> {
        match self {
            Self::Host(device) => device.guest_numa_id,
            Self::Disk(disk) => disk.guest_numa_id,
            Self::Net(net) => net.guest_numa_id,
            Self::Fs(_) | Self::Generic(_) | Self::Vsock(_) => None,
        }
    }

    /// The root bus that leads to it: that of its node.
    pub(crate) fn root(self) -> u8 {
        // The configuration was checked.
        self.node().map_or(0, |node| node as u8 % (u8::MAX / BUSES_OF_ROOT + 1))
    }

    /// Whether it asks for the guest's IOMMU itself.
    pub(crate) fn is_behind_iommu(self) -> bool {
        match self {
            Self::Disk(disk) => disk.iommu,
            Self::Net(net) => net.iommu,
            Self::Vsock(vsock) => vsock.iommu,
            Self::Host(device) => device.iommu,
            Self::Fs(_) | Self::Generic(_) => false,
        }
    }

    /// Whether it has a root port above it.
    pub(crate) fn below_port(self) -> bool {
        match self {
            Self::Host(device) => device.root_port,
            Self::Disk(disk) => disk.root_port,
            Self::Net(_) | Self::Fs(_) | Self::Generic(_) | Self::Vsock(_) => false,
        }
    }
}

/// Takes the device called `id` out of `config`. Returns whether there was one. The guest keeps its IOMMU and its PCI roots.
pub(crate) fn take(config: &mut VmConfig, id: &str) -> bool {
    let found = DeviceConfig::find(config, id);
    let (there, behind) = (found.is_some(), found.is_some_and(DeviceConfig::is_behind_iommu));
    let node = found.and_then(DeviceConfig::node);
    if behind {
        config.platform.get_or_insert_default().iommu = true;
    }
    if let Some(node) = node {
        config.keep_pci_root(node);
    }
    let other = |name: &Option<String>| name.as_deref() != Some(id);
    if let Some(disks) = &mut config.disks {
        disks.retain(|disk| other(&disk.id));
    }
    if let Some(nets) = &mut config.net {
        nets.retain(|net| other(&net.id));
    }
    if let Some(list) = &mut config.fs {
        list.retain(|fs| other(&fs.id));
    }
    if let Some(list) = &mut config.generic_vhost_user {
        list.retain(|device| other(&device.id));
    }
    if let Some(list) = &mut config.devices {
        list.retain(|device| other(&device.id));
    }
    config.vsock = config.vsock.take().filter(|vsock| other(&vsock.id));
    there
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_found_and_taken_and_the_others_stay() {
        let id = |id: &str| Some(id.to_owned());
        let mut config = VmConfig {
            disks: Some(vec![
                DiskConfig {
                    id: id("a"),
                    ..DiskConfig::default()
                },
                DiskConfig {
                    id: id("b"),
                    ..DiskConfig::default()
                },
            ]),
            net: Some(vec![NetConfig {
                id: id("n"),
                ..NetConfig::default()
            }]),
            vsock: Some(VsockConfig {
                cid: 3,
                socket: "s".into(),
                iommu: false,
                id: id("v"),
            }),
            ..VmConfig::default()
        };
        let ids = |config: &VmConfig| {
            DeviceConfig::all(config)
                .map(|device| device.id().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(ids(&config), ["a", "b", "n", "v"]);
        assert!(matches!(DeviceConfig::find(&config, "n"), Some(DeviceConfig::Net(_))));
        assert!(take(&mut config, "a") && !take(&mut config, "a") && take(&mut config, "v"));
        assert_eq!(ids(&config), ["b", "n"]);
        assert!(!config.has_iommu());
        config.net.iter_mut().flatten().for_each(|net| net.iommu = true);
        assert!(take(&mut config, "n") && config.has_iommu());
    }
}
