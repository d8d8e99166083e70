//! Devices of the host that are passed through to the guest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::flags::{FlagError, KeyValues};
use crate::{ConfigError, SlotAddress, VmConfig};

/// A PCI device of the host that the guest has.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct DeviceConfig {
    /// Its directory in sysfs: in /sys/bus/pci/devices if it is a whole one, which must belong to the driver vfio-pci, or in
    /// /sys/bus/mdev/devices if it is mediated. One that came by descriptors has it, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(length(min = 1)))]
    pub path: Option<PathBuf>,
    /// Descriptor of its file in /dev/vfio/devices, or of that of its group in /dev/vfio, inherited from whoever started the VMM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
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
    /// It is below a PCI Express root port: on a bus of its own, with a link. The port is in the slot, and has all
    /// functions of the slot below it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub root_port: bool,
    /// NUMA node of the guest that it is in, 0 to 7: it has a PCI root of that node above it. Node 0 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schemars(range(max = 7)))]
    pub guest_numa_id: Option<u32>,
}

impl DeviceConfig {
    /// The guest's node that it is in.
    pub fn node(&self) -> u32 {
        self.guest_numa_id.unwrap_or(0)
    }
}

/// The last clique there can be.
const LAST_CLIQUE: u8 = 15;

/// `--device path=/sys/bus/pci/devices/0000:01:00.0|fd=N[,id=ID][,iommu=on][,addr=SLOT.FUNCTION][,root_port=on][,guest_numa_id=N][,x_nv_gpudirect_clique=N]`
pub fn device(text: &str) -> Result<DeviceConfig, FlagError> {
    let kv = keys(text)?;
    if kv.text("path").or(kv.text("fd")).is_none() {
        let problem = "it needs the device; write path=/sys/bus/pci/devices/0000:01:00.0, with its own address, or fd=3, an inherited descriptor";
        return kv.refuse(problem.to_owned());
    }
    read(&kv)
}

/// The same of one whose descriptors may come beside it.
pub fn handed_device(text: &str) -> Result<DeviceConfig, FlagError> {
    read(&keys(text)?)
}

fn keys(text: &str) -> Result<KeyValues<'_>, FlagError> {
    KeyValues::parse(
        "--device",
        text,
        &[
            "path",
            "fd",
            "id",
            "iommu",
            "x_nv_gpudirect_clique",
            "addr",
            "root_port",
            "guest_numa_id",
        ],
        &["pci_segment", "pci_device_id"],
    )
}

fn read(kv: &KeyValues<'_>) -> Result<DeviceConfig, FlagError> {
    Ok(DeviceConfig {
        path: kv.text("path").map(PathBuf::from),
        fd: kv.number("fd")?,
        id: kv.text("id").map(str::to_owned),
        iommu: kv.switch("iommu")?.unwrap_or(false),
        x_nv_gpudirect_clique: kv.number("x_nv_gpudirect_clique")?,
        addr: kv.get("addr")?,
        root_port: kv.switch("root_port")?.unwrap_or(false),
        guest_numa_id: kv.number("guest_numa_id")?,
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
        self.validate_given()?;
        let mut before: Vec<&Path> = Vec::new();
        for (i, device) in self.devices.iter().flatten().enumerate() {
            let path = device.path.as_deref();
            if path.is_some_and(|path| path.as_os_str().is_empty()) || path.is_none() && device.fd.is_none() {
                return Err(ConfigError::Missing(format!(
                    "devices[{i}].path is {}; give the directory of a device in /sys/bus/pci/devices, or its descriptor with vm.add-device",
                    if path.is_some() { "empty" } else { "missing" }
                )));
            }
            if let Some(path) = path.filter(|path| before.contains(path)) {
                return Err(ConfigError::Conflict(format!(
                    "devices[{i}].path is {}, which another device has; a guest can have it once",
                    path.display()
                )));
            }
            if let Some(clique) = device.x_nv_gpudirect_clique.filter(|clique| *clique > LAST_CLIQUE) {
                return Err(ConfigError::Conflict(format!(
                    "devices[{i}].x_nv_gpudirect_clique is {clique}; it is at most {LAST_CLIQUE}"
                )));
            }
            before.extend(path);
        }
        self.validate_addresses()
    }

    /// Checks the descriptors of devices, which this process inherited.
    fn validate_given(&self) -> Result<(), ConfigError> {
        let platform = self.platform.as_ref();
        let for_all = [
            ("iommufd_fd", platform.and_then(|platform| platform.iommufd_fd)),
            ("container_fd", platform.and_then(|platform| platform.container_fd)),
        ];
        let by = platform.and_then(|platform| platform.iommufd);
        let problem = match (for_all.map(|(_, fd)| fd.is_some()), by) {
            ([true, true], _) => {
                "both iommufd_fd and container_fd, and all devices come the same way; give one of them"
            }
            ([true, _], Some(false)) => "iommufd_fd and iommufd=off, which contradict each other; leave one out",
            ([_, true], Some(true)) => "container_fd and iommufd=on, which contradict each other; leave one out",
            _ => "",
        };
        if !problem.is_empty() {
            return Err(ConfigError::Conflict(format!("platform has {problem}")));
        }
        let devices = self.devices.iter().flatten().enumerate();
        let devices = devices.map(|(i, device)| (format!("devices[{i}].fd"), device.fd));
        let for_all = for_all.map(|(name, fd)| (format!("platform.{name}"), fd));
        let taps = self
            .net
            .iter()
            .flatten()
            .flat_map(|net| net.fds.iter().flatten().copied());
        let mut before: Vec<i32> = taps.collect();
        for (field, fd) in for_all.into_iter().chain(devices) {
            let Some(fd) = fd else { continue };
            if fd < 0 {
                return Err(ConfigError::Conflict(format!(
                    "{field} is {fd}; it must be the number of an inherited descriptor"
                )));
            }
            if before.contains(&fd) {
                return Err(ConfigError::Conflict(format!(
                    "{field} is {fd}, which something else has; each descriptor is given once"
                )));
            }
            before.push(fd);
        }
        Ok(())
    }

    /// Checks that no two devices have the same place.
    fn validate_addresses(&self) -> Result<(), ConfigError> {
        let mut before = BTreeMap::new();
        for (i, device) in self.devices.iter().flatten().enumerate() {
            let Some(address) = device.addr else { continue };
            if let Some(other) = before.insert((device.node(), address), i) {
                return Err(ConfigError::Conflict(format!(
                    "devices[{i}].addr is {address}, where devices[{other}] is; give each its own function, or leave addr out"
                )));
            }
        }
        self.validate_ports()
    }

    /// Checks that a slot is below a root port or not, with all of its devices.
    fn validate_ports(&self) -> Result<(), ConfigError> {
        let mut before = BTreeMap::new();
        for (i, device) in self.devices.iter().flatten().enumerate() {
            let Some(address) = device.addr else { continue };
            let (other, port) = *before
                .entry((device.node(), address.slot()))
                .or_insert((i, device.root_port));
            if port != device.root_port {
                return Err(ConfigError::Conflict(format!(
                    "devices[{i}].addr is {address}, in the same slot as devices[{other}], and one of them is to be below a root port and the other \
                     not; give root_port to both or to none"
                )));
            }
        }
        Ok(())
    }

    /// Checks that slots with several devices have function 0, which a guest that starts looks at first: where it is not, there is nothing.
    /// While devices come one by one it may come last.
    pub fn check_functions(&self) -> Result<(), ConfigError> {
        let devices = self.devices.iter().flatten();
        let addresses = || devices.clone().filter_map(|device| Some((device.node(), device.addr?)));
        let has_first = |node: u32, slot: u8| {
            addresses().any(|(of, address)| (of, address.slot(), address.function()) == (node, slot, 0))
        };
        match addresses().find(|(node, address)| !has_first(*node, address.slot())) {
            Some((_, address)) => Err(ConfigError::Missing(format!(
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
        assert_eq!(
            given.path.as_deref(),
            Some(Path::new("/sys/bus/pci/devices/0000:00:05.0"))
        );
        assert_eq!(given.id.as_deref(), Some("nvme"));
        let gpu = device("path=/p,x_nv_gpudirect_clique=3").expect("a device");
        assert_eq!(gpu.x_nv_gpudirect_clique, Some(3));
        let text = |flag| device(flag).expect_err("refused").to_string();
        let opened = device("fd=5,id=nvme").expect("a device");
        assert_eq!((opened.fd, opened.path), (Some(5), None));
        assert!(text("id=x").contains("write path="));
        assert!(text("fd=five").contains("fd"));
        assert!(!gpu.iommu && device("path=/p,iommu=on").expect("a device").iommu);
        assert!(text("path=/p,pci_segment=1").contains("is not supported"));
    }

    #[test]
    fn a_device_is_given_once() {
        let path = |path: &str| DeviceConfig {
            path: Some(path.into()),
            ..DeviceConfig::default()
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
    fn descriptors_are_given_once() {
        let device = |fd| DeviceConfig {
            fd,
            ..DeviceConfig::default()
        };
        let refusal = |devices: &[Option<i32>], platform: &str| {
            let config = VmConfig {
                devices: Some(devices.iter().map(|fd| device(*fd)).collect()),
                platform: Some(crate::flags::platform(platform).expect("a platform")),
                net: Some(vec![crate::flags::net("fd=9").expect("an interface")]),
                ..VmConfig::default()
            };
            config.validate_devices().err().map(|error| error.to_string())
        };
        assert_eq!(refusal(&[Some(5), Some(6)], "iommufd_fd=4"), None);
        assert_eq!(refusal(&[Some(5)], "container_fd=4,iommufd=off"), None);
        let says = |devices: &[Option<i32>], platform: &str, words: &str| {
            let said = refusal(devices, platform).expect("refused");
            assert!(said.contains(words), "{said}");
        };
        says(&[None], "dtb=off", "devices[0].path is missing");
        says(&[Some(-1)], "dtb=off", "devices[0].fd is -1");
        says(
            &[Some(5), Some(5)],
            "dtb=off",
            "devices[1].fd is 5, which something else has",
        );
        says(&[Some(4)], "iommufd_fd=4", "devices[0].fd is 4");
        says(&[Some(9)], "dtb=off", "devices[0].fd is 9");
        says(
            &[Some(5)],
            "iommufd_fd=4,container_fd=3",
            "both iommufd_fd and container_fd",
        );
        says(&[Some(5)], "iommufd_fd=4,iommufd=off", "contradict each other");
        says(&[Some(5)], "container_fd=4,iommufd=on", "contradict each other");
    }

    #[test]
    fn devices_share_a_slot_that_has_function_0() {
        let at = |path: &str, addr: &str| DeviceConfig {
            path: Some(path.into()),
            addr: addr.parse().ok(),
            ..DeviceConfig::default()
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
        let below = |path: &str, addr: &str| DeviceConfig {
            root_port: true,
            ..at(path, addr)
        };
        let whole = config(vec![below("/gpu", "06.0"), below("/audio", "06.1"), at("/nvme", "07")]);
        assert_eq!(whole.validate_devices(), Ok(()));
        let far = DeviceConfig {
            guest_numa_id: Some(1),
            ..at("/far", "06.0")
        };
        let nodes = config(vec![below("/gpu", "06.0"), far.clone()]);
        assert_eq!((nodes.validate_devices(), nodes.check_functions()), (Ok(()), Ok(())));
        let twice = config(vec![
            far.clone(),
            DeviceConfig {
                path: Some("/b".into()),
                ..far
            },
        ]);
        assert!(twice.validate_devices().is_err());
        let mixed = config(vec![below("/gpu", "06.0"), at("/audio", "06.1")]);
        let text = mixed.validate_devices().expect_err("refused").to_string();
        assert!(text.contains("give root_port to both or to none"), "{text}");
        assert!(device("path=/p,root_port=on").expect("a device").root_port);
        let given = device("path=/p,addr=1f.3").expect("a device").addr.expect("a place");
        assert_eq!((given.slot(), given.function()), (0x1f, 3));
        let text = device("path=/p,addr=0").expect_err("refused").to_string();
        assert!(text.contains("addr") && text.contains("from 01 to 1f"), "{text}");
    }
}
