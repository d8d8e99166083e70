//! Devices of the host that are passed through to the guest.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::flags::{FlagError, KeyValues};
use crate::{ConfigError, VmConfig};

/// A PCI device of the host that the guest has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct DeviceConfig {
    /// Its directory in sysfs: in /sys/bus/pci/devices if it is a whole one, which must belong to the driver vfio-pci, or in
    /// /sys/bus/mdev/devices if it is mediated.
    #[cfg_attr(feature = "openapi", schemars(length(min = 1)))]
    pub path: PathBuf,
    /// Name in the API; `_device3` and so on when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(regex(pattern = "^(_?[^_]|_$)")))]
    pub id: Option<String>,
    /// GPUs of NVIDIA's: its driver is told that those of the same clique, 0 to 15, reach each other directly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(range(max = 15)))]
    pub x_nv_gpudirect_clique: Option<u8>,
}

/// The last clique there can be.
const LAST_CLIQUE: u8 = 15;

/// `--device path=/sys/bus/pci/devices/0000:01:00.0[,id=ID][,x_nv_gpudirect_clique=N]`
pub fn device(text: &str) -> Result<DeviceConfig, FlagError> {
    let kv = KeyValues::parse(
        "--device",
        text,
        &["path", "id", "x_nv_gpudirect_clique"],
        &["iommu", "pci_segment", "pci_device_id"],
    )?;
    let Some(path) = kv.text("path") else {
        let problem = "it needs the device; write path=/sys/bus/pci/devices/0000:01:00.0, with its own address";
        return kv.refuse(problem.to_owned());
    };
    Ok(DeviceConfig {
        path: path.into(),
        id: kv.text("id").map(str::to_owned),
        x_nv_gpudirect_clique: kv.number("x_nv_gpudirect_clique")?,
    })
}

impl VmConfig {
    /// Checks devices of the host.
    pub(crate) fn validate_devices(&self) -> Result<(), ConfigError> {
        let mut before: Vec<&Path> = Vec::new();
        for (i, device) in self.devices.iter().flatten().enumerate() {
            if device.path.as_os_str().is_empty() {
                return Err(ConfigError::Missing(format!(
                    "devices[{i}].path is empty; give the directory of a device in /sys/bus/pci/devices"
                )));
            }
            if before.contains(&device.path.as_path()) {
                return Err(ConfigError::Conflict(format!(
                    "devices[{i}].path is {}, which another device has; a guest can have it once",
                    device.path.display()
                )));
            }
            if let Some(clique) = device.x_nv_gpudirect_clique.filter(|clique| *clique > LAST_CLIQUE) {
                return Err(ConfigError::Conflict(format!(
                    "devices[{i}].x_nv_gpudirect_clique is {clique}; it is at most {LAST_CLIQUE}"
                )));
            }
            before.push(&device.path);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_names_a_device() {
        let given = device("path=/sys/bus/pci/devices/0000:00:05.0,id=nvme,iommu=off").expect("a device");
        assert_eq!(given.path, Path::new("/sys/bus/pci/devices/0000:00:05.0"));
        assert_eq!(given.id.as_deref(), Some("nvme"));
        let gpu = device("path=/p,x_nv_gpudirect_clique=3").expect("a device");
        assert_eq!(gpu.x_nv_gpudirect_clique, Some(3));
        let text = |flag| device(flag).expect_err("refused").to_string();
        assert!(text("id=x").contains("write path="));
        assert!(text("path=/p,iommu=on").contains("iommu=on is not supported"));
    }

    #[test]
    fn a_device_is_given_once() {
        let path = |path: &str| DeviceConfig {
            path: path.into(),
            id: None,
            x_nv_gpudirect_clique: None,
        };
        let refusal = |devices| {
            let config = VmConfig {
                devices: Some(devices),
                ..VmConfig::default()
            };
            config.validate_devices().map_err(|error| error.to_string())
        };
        assert_eq!(refusal(vec![path("/a"), path("/b")]), Ok(()));
        assert!(refusal(vec![path("/a"), path("/a")]).is_err_and(|text| text.contains("devices[1].path is /a")));
        let clique = |number| DeviceConfig {
            x_nv_gpudirect_clique: Some(number),
            ..path("/a")
        };
        assert_eq!(refusal(vec![clique(15)]), Ok(()));
        assert!(refusal(vec![clique(16)]).is_err_and(|text| text.contains("it is at most 15")));
        assert!(refusal(vec![path("")]).is_err_and(|text| text.contains("devices[0].path is empty")));
    }
}
