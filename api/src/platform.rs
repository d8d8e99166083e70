//! The machine itself, and which devices are behind its IOMMU.

use serde::{Deserialize, Serialize};

use crate::{ConfigError, VmConfig};

/// Identity of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct PlatformConfig {
    /// Serial number in SMBIOS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_number: Option<String>,
    /// UUID in SMBIOS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// OEM strings in SMBIOS; cloud-init and systemd read credentials from them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oem_strings: Option<Vec<String>>,
    /// ARM: describe the machine by a device tree instead of ACPI.
    pub dtb: bool,
    /// Devices of the host come by iommufd and device files, or, if it is off, by IOMMU groups; when absent by groups where the host has
    /// those.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommufd: Option<bool>,
    /// Descriptor of /dev/iommu, inherited from whoever started the VMM, for all devices of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommufd_fd: Option<i32>,
    /// Descriptor of /dev/vfio/vfio, inherited from whoever started the VMM, for all devices of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_fd: Option<i32>,
    /// Devices of the host reach each other's registers; on when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vfio_p2p_dma: Option<bool>,
    /// The guest has an IOMMU, whether devices are behind it or not.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub iommu: bool,
    /// PCI segments whose devices are all behind the guest's IOMMU, those that come later among them: none or 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(inner(range(max = 0))))]
    pub iommu_segments: Option<Vec<u16>>,
}

/// The one PCI segment there is.
const SEGMENT: u16 = 0;

impl VmConfig {
    /// Whether all devices are behind the guest's IOMMU, those that come later among them.
    pub fn iommu_for_all(&self) -> bool {
        let platform = self.platform.as_ref();
        platform
            .and_then(|platform| platform.iommu_segments.as_ref())
            .is_some_and(|segments| segments.contains(&SEGMENT))
    }

    /// Whether the guest has an IOMMU.
    pub fn has_iommu(&self) -> bool {
        let disks = self.disks.iter().flatten().any(|disk| disk.iommu);
        let nets = self.net.iter().flatten().any(|net| net.iommu);
        let vsock = self.vsock.iter().any(|vsock| vsock.iommu);
        let hosts = self.devices.iter().flatten().any(|device| device.iommu);
        let itself = self.platform.as_ref().is_some_and(|platform| platform.iommu);
        disks || nets || vsock || hosts || self.rng.iommu || itself || self.iommu_for_all()
    }

    /// Checks who is behind an IOMMU.
    pub(crate) fn validate_iommu(&self) -> Result<(), ConfigError> {
        let segments = self
            .platform
            .as_ref()
            .and_then(|platform| platform.iommu_segments.as_ref());
        if let Some(other) = segments.into_iter().flatten().find(|segment| **segment != SEGMENT) {
            return Err(crate::validate::range(
                "platform.iommu_segments",
                other,
                "0: guests have one PCI segment",
            ));
        }
        let all = self.iommu_for_all();
        let of_daemons = self.disks.iter().flatten().enumerate();
        let of_daemons = of_daemons.filter(|(_, disk)| disk.has_daemon() && (all || disk.iommu));
        let disks = of_daemons.map(|(i, _)| format!("disks[{i}]"));
        let of_daemons = self.net.iter().flatten().enumerate();
        let of_daemons = of_daemons.filter(|(_, net)| net.has_daemon() && (all || net.iommu));
        let nets = of_daemons.map(|(i, _)| format!("net[{i}]"));
        let fs = (0..self.fs.iter().flatten().count()).map(|i| format!("fs[{i}]"));
        let generic = (0..self.generic_vhost_user.iter().flatten().count()).map(|i| format!("generic_vhost_user[{i}]"));
        let served = disks.chain(nets).chain(fs.chain(generic).filter(|_| all)).next();
        if let Some(field) = served {
            let remedy = if all { "platform.iommu_segments" } else { "iommu" };
            return Err(ConfigError::Conflict(format!(
                "{field} is a daemon's, which cannot be behind the guest's IOMMU; leave {remedy} out"
            )));
        }
        self.validate_ports_and_iommu()
    }

    /// Checks that what is below a root port is not behind an IOMMU: that knows devices by numbers which a guest may
    /// change with those of its buses.
    fn validate_ports_and_iommu(&self) -> Result<(), ConfigError> {
        let all = self.iommu_for_all();
        let disks = self.disks.iter().flatten().enumerate();
        let mut disks = disks.filter(|(_, disk)| disk.root_port && (all || disk.iommu));
        let hosts = self.devices.iter().flatten().enumerate();
        let mut hosts = hosts.filter(|(_, device)| device.root_port && (all || device.iommu));
        let disk = disks.next().map(|(i, _)| format!("disks[{i}]"));
        match disk.or_else(|| hosts.next().map(|(i, _)| format!("devices[{i}]"))) {
            Some(field) => Err(ConfigError::Conflict(format!(
                "{field} is below a root port, where nothing can be behind the guest's IOMMU; leave root_port out, or {}",
                if all { "platform.iommu_segments" } else { "iommu" }
            ))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DeviceConfig, DiskBackend, DiskConfig, FsConfig};

    fn config(segments: &[u16], edit: impl Fn(&mut VmConfig)) -> VmConfig {
        let mut config = VmConfig {
            platform: Some(PlatformConfig {
                iommu_segments: Some(segments.to_vec()),
                ..PlatformConfig::default()
            }),
            ..VmConfig::default()
        };
        edit(&mut config);
        config
    }

    fn refusal(segments: &[u16], edit: impl Fn(&mut VmConfig)) -> String {
        let refused = config(segments, edit).validate_iommu().expect_err("refused");
        refused.to_string()
    }

    #[test]
    fn a_guest_has_one_if_a_device_is_behind_it() {
        assert!(!config(&[], |_| ()).has_iommu());
        let plain = config(&[], |c| {
            c.platform.iter_mut().for_each(|platform| platform.iommu = true);
        });
        assert!(plain.has_iommu() && !plain.iommu_for_all());
        assert!(config(&[0], |_| ()).has_iommu() && config(&[0], |_| ()).iommu_for_all());
        let one = config(&[], |c| c.rng.iommu = true);
        assert!(one.has_iommu() && !one.iommu_for_all());
        assert_eq!(one.validate_iommu(), Ok(()));
        let host = |iommu| DeviceConfig {
            path: Some("/d".into()),
            iommu,
            ..DeviceConfig::default()
        };
        let with = |segments: &[u16], iommu| config(segments, |c| c.devices = Some(vec![host(iommu)]));
        assert!(with(&[], true).has_iommu() && !with(&[], false).has_iommu());
        assert_eq!(with(&[0], false).validate_iommu(), Ok(()));
    }

    #[test]
    fn what_cannot_be_behind_it_is_refused_by_name() {
        assert!(refusal(&[1], |_| ()).contains("platform.iommu_segments is 1"));
        let disk = |iommu| DiskConfig {
            backend: DiskBackend::Blkd,
            iommu,
            ..DiskConfig::default()
        };
        assert!(refusal(&[], |c| c.disks = Some(vec![DiskConfig::default(), disk(true)])).contains("disks[1]"));
        assert!(refusal(&[0], |c| c.disks = Some(vec![disk(false)])).contains("leave platform.iommu_segments out"));
        assert_eq!(
            config(&[], |c| c.disks = Some(vec![disk(false)])).validate_iommu(),
            Ok(())
        );
        let below = |iommu| DiskConfig {
            root_port: true,
            iommu,
            ..DiskConfig::default()
        };
        assert!(
            refusal(&[], |c| c.disks = Some(vec![below(false), below(true)])).contains("disks[1] is below a root port")
        );
        assert!(refusal(&[0], |c| c.disks = Some(vec![below(false)])).contains("or platform.iommu_segments"));
        assert_eq!(
            config(&[], |c| c.disks = Some(vec![below(false)])).validate_iommu(),
            Ok(())
        );
        assert!(refusal(&[0], |c| c.fs = Some(vec![FsConfig::new("t", "/s")])).contains("fs[0]"));
    }
}
