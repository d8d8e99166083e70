//! Devices of the host that are passed through to the guest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::flags::{FlagError, KeyValues};
use crate::{ConfigError, SlotAddress, VmConfig};

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
    /// It reaches only what the guest's own IOMMU lets it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub iommu: bool,
    /// GPUs of NVIDIA's: its driver is told that those of the same clique, 0 to 15, reach each other directly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(range(max = 15)))]
    pub x_nv_gpudirect_clique: Option<u8>,
    /// Where the guest has it; the next slot that is free when absent. Devices can be functions of one slot, and function 0 of it must be there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addr: Option<SlotAddress>,
}

/// The last clique there can be.
const LAST_CLIQUE: u8 = 15;

/// `--device path=/sys/bus/pci/devices/0000:01:00.0[,id=ID][,iommu=on][,addr=SLOT.FUNCTION][,x_nv_gpudirect_clique=N]`
pub fn device(text: &str) -> Result<DeviceConfig, FlagError> {
    let kv = KeyValues::parse(
        "--device",
        text,
        &["path", "id", "iommu", "x_nv_gpudirect_clique", "addr"],
        &["pci_segment", "pci_device_id"],
    )?;
    let Some(path) = kv.text("path") else {
        let problem = "it needs the device; write path=/sys/bus/pci/devices/0000:01:00.0, with its own address";
        return kv.refuse(problem.to_owned());
    };
    Ok(DeviceConfig {
        path: path.into(),
        id: kv.text("id").map(str::to_owned),
        iommu: kv.switch("iommu")?.unwrap_or(false),
        x_nv_gpudirect_clique: kv.number("x_nv_gpudirect_clique")?,
        addr: kv.get("addr")?,
    })
}

impl VmConfig {
    /// Whether devices of the host reach each other's registers.
    pub fn has_peers(&self) -> bool {
        self.platform
            .as_ref()
            .and_then(|platform| platform.vfio_p2p_dma)
            .unwrap_or(true)
    }

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
        self.validate_addresses()
    }

    /// Checks that no two devices have the same place.
    fn validate_addresses(&self) -> Result<(), ConfigError> {
        let mut before = BTreeMap::new();
        for (i, device) in self.devices.iter().flatten().enumerate() {
            let Some(address) = device.addr else { continue };
            if let Some(other) = before.insert(address, i) {
                return Err(ConfigError::Conflict(format!(
                    "devices[{i}].addr is {address}, where devices[{other}] is; give each its own function, or leave addr out"
                )));
            }
        }
        Ok(())
    }

    /// Checks that slots with several devices have function 0, which a guest that starts looks at first: where it is not, there is nothing.
    /// While devices come one by one it may come last.
    pub fn check_functions(&self) -> Result<(), ConfigError> {
        let addresses = || self.devices.iter().flatten().filter_map(|device| device.addr);
        let has_first = |slot: u8| addresses().any(|address| (address.slot(), address.function()) == (slot, 0));
        match addresses().find(|address| !has_first(address.slot())) {
            Some(address) => Err(ConfigError::Missing(format!(
                "a device has addr {address}, and none has {:02x}.0, without which guests see nothing of that slot; give one of its devices \
                 function 0",
                address.slot()
            ))),
            None => Ok(()),
        }
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
        assert!(!gpu.iommu && device("path=/p,iommu=on").expect("a device").iommu);
        assert!(text("path=/p,pci_segment=1").contains("is not supported"));
    }

    #[test]
    fn a_device_is_given_once() {
        let path = |path: &str| DeviceConfig {
            path: path.into(),
            id: None,
            iommu: false,
            x_nv_gpudirect_clique: None,
            addr: None,
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

    #[test]
    fn devices_share_a_slot_that_has_function_0() {
        let at = |path: &str, addr: &str| DeviceConfig {
            path: path.into(),
            id: None,
            iommu: false,
            x_nv_gpudirect_clique: None,
            addr: addr.parse().ok(),
        };
        let config = |devices| VmConfig {
            devices: Some(devices),
            ..VmConfig::default()
        };
        let whole = config(vec![at("/audio", "06.1"), at("/gpu", "06.0"), at("/nvme", "")]);
        assert_eq!((whole.validate_devices(), whole.check_functions()), (Ok(()), Ok(())));
        let twice = config(vec![at("/a", "06"), at("/b", "06.0")]);
        let text = twice.validate_devices().expect_err("refused").to_string();
        assert!(
            text.starts_with("devices[1].addr is 06.0, where devices[0] is"),
            "{text}"
        );
        let headless = config(vec![at("/a", "05.0"), at("/b", "06.1")]);
        assert_eq!(headless.validate_devices(), Ok(()), "function 0 may come later");
        let text = headless.check_functions().expect_err("refused").to_string();
        assert!(text.contains("addr 06.1") && text.contains("none has 06.0"), "{text}");
        let given = device("path=/p,addr=1f.3").expect("a device").addr.expect("a place");
        assert_eq!((given.slot(), given.function()), (0x1f, 3));
        let text = device("path=/p,addr=0").expect_err("refused").to_string();
        assert!(text.contains("addr") && text.contains("from 01 to 1f"), "{text}");
    }
}
