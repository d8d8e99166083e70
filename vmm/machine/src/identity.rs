//! Names and addresses nobody gave: fixed once, when a VM is created, so that they survive its resets.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;

use triarch_api::{MacAddress, VmConfig};

use crate::MachineError;

/// First byte of an address that is local and unicast.
const LOCAL_UNICAST: u8 = 0x02;

/// Gives every device an id and every network interface an address. What has one keeps it.
pub(crate) fn complete(config: &mut VmConfig) -> Result<(), MachineError> {
    let taken: BTreeSet<String> = config.ids().map(str::to_owned).collect();
    let mut number = 0;
    let mut name = |id: &mut Option<String>, kind: &str| {
        while id.is_none() {
            *id = Some(format!("_{kind}{number}")).filter(|name| !taken.contains(name));
            number += u32::from(id.is_none());
        }
        number += 1;
    };
    for disk in config.disks.iter_mut().flatten() {
        name(&mut disk.id, "disk");
    }
    for net in config.net.iter_mut().flatten() {
        name(&mut net.id, "net");
        // A daemon may know the address better.
        if net.mac.is_none() && !net.vhost_user {
            net.mac = Some(random_mac()?);
        }
    }
    for fs in config.fs.iter_mut().flatten() {
        name(&mut fs.id, "fs");
    }
    for device in config.generic_vhost_user.iter_mut().flatten() {
        name(&mut device.id, "generic_vhost_user");
    }
    for device in config.devices.iter_mut().flatten() {
        name(&mut device.id, "device");
    }
    if let Some(vsock) = &mut config.vsock {
        name(&mut vsock.id, "vsock");
    }
    if let Some(balloon) = &mut config.balloon {
        name(&mut balloon.id, "balloon");
    }
    Ok(())
}

/// An address for an interface that has none.
pub(crate) fn random_mac() -> Result<MacAddress, MachineError> {
    let mut bytes = [0; 6];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(MachineError::host("read /dev/urandom for a MAC address"))?;
    bytes[0] = bytes[0] & 0xfc | LOCAL_UNICAST;
    Ok(MacAddress(bytes))
}

#[cfg(test)]
mod tests {
    use triarch_api::{DiskConfig, NetConfig};

    use super::*;

    #[test]
    fn what_is_missing_is_filled_in_and_what_is_there_stays() {
        let mac = MacAddress([2, 0, 0, 0, 0, 1]);
        let named = DiskConfig {
            id: Some("root".into()),
            ..DiskConfig::default()
        };
        let addressed = NetConfig {
            mac: Some(mac),
            ..NetConfig::default()
        };
        let mut config = VmConfig {
            disks: Some(vec![DiskConfig::default(), named]),
            net: Some(vec![NetConfig::default(), addressed]),
            ..VmConfig::default()
        };
        complete(&mut config).expect("complete");
        let ids: Vec<_> = config
            .disks
            .iter()
            .flatten()
            .map(|d| d.id.clone().unwrap_or_default())
            .collect();
        assert_eq!(ids, ["_disk0", "root"]);
        let nets = config.net.unwrap_or_default();
        assert_eq!(nets[0].id.as_deref(), Some("_net2"));
        assert_eq!(nets[0].mac.map(|m| m.0[0] & 3), Some(LOCAL_UNICAST));
        assert_eq!(nets[1].mac, Some(mac));
    }

    #[test]
    fn a_device_added_later_gets_a_name_of_its_own() {
        let named = |id: &str| DiskConfig {
            id: Some(id.into()),
            ..DiskConfig::default()
        };
        let mut config = VmConfig {
            disks: Some(vec![named("_disk1"), DiskConfig::default(), DiskConfig::default()]),
            ..VmConfig::default()
        };
        complete(&mut config).expect("complete");
        let ids: Vec<_> = config.ids().collect();
        assert_eq!(ids, ["_disk1", "_disk2", "_disk3"]);
    }
}
