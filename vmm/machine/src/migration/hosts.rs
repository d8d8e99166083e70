//! Devices of the host that go with their guest, and those that cannot.

use std::collections::BTreeMap;

use triarch_api::VmConfig;
use triarch_migration::{Blocker, Part};
use triarch_vfio::{Fleet, Immovable, Mover};

use crate::MachineError;
use crate::backends::Backends;

/// The devices of the host with which the guest can neither be moved nor saved.
pub(crate) fn bound_to_host(backends: &Backends, vm: &VmConfig) -> Vec<Blocker> {
    let (mut movers, mut found) = (Vec::new(), Vec::new());
    for (id, device) in backends.of_host() {
        if device.is_apart() {
            found.push(shadowed(id));
            continue;
        }
        match device.mover() {
            Ok(mover) => movers.push(mover),
            Err(error) => found.push(blocker(id, &error)),
        }
    }
    if let Err(error) = Fleet::check_together(&movers, vm.has_peers()) {
        let id = match &error {
            Immovable::Peers(name) => backends.host_device(name),
            _ => None,
        };
        found.push(blocker(id.unwrap_or_default(), &error));
    }
    found
}

/// What it writes it logs by addresses that are not the guest's memory's.
fn shadowed(id: &str) -> Blocker {
    Blocker {
        what: Part::Device,
        name: id.to_owned(),
        reason: format!("'{id}' is a device of this host behind the guest's IOMMU, which cannot be moved or saved yet"),
        remedy: "remove the device, or start the guest without iommu and platform.iommu_segments".to_owned(),
    }
}

fn blocker(id: &str, error: &Immovable) -> Blocker {
    Blocker {
        what: Part::Device,
        name: id.to_owned(),
        reason: format!("'{id}' is a device of this host: {}", triarch_api::chain(error)),
        remedy: "remove the device".to_owned(),
    }
}

/// Those that keep the guest from running before all of its memory is there: they cannot wait for it.
pub(super) fn late(backends: &Backends) -> Vec<Blocker> {
    let device = |id: &str| Blocker {
        what: Part::Device,
        name: id.to_owned(),
        reason: format!("'{id}' is a device of this host, which cannot wait for memory that comes later"),
        remedy: "leave post_copy out, or remove the device".to_owned(),
    };
    backends.of_host().map(|(id, _)| device(id)).collect()
}

/// Those that go with the guest, in the order in which both sides number them: that of their ids.
pub(super) fn fleet(backends: &Backends) -> Fleet {
    let movers = backends.of_host().filter_map(|(_, device)| device.mover().ok());
    Fleet::new(movers.collect())
}

/// Of what kind they are, by their ids.
pub(super) fn kinds(backends: &Backends) -> Result<BTreeMap<String, String>, MachineError> {
    let kind = |mover: &Mover, id: &str| {
        let kind = mover.kind();
        kind.map_err(|error| MachineError::device(&Some(id.to_owned()), error))
    };
    let movers = backends
        .of_host()
        .filter_map(|(id, device)| Some((id, device.mover().ok()?)));
    movers
        .map(|(id, mover)| Ok((id.to_owned(), kind(&mover, id)?)))
        .collect()
}

/// Whether the devices of `backends` can become those of these kinds, which the guest has.
pub(super) fn same_kinds(backends: &Backends, theirs: &BTreeMap<String, String>) -> Result<(), MachineError> {
    compare(kinds(backends)?, theirs)
}

fn compare(ours: BTreeMap<String, String>, theirs: &BTreeMap<String, String>) -> Result<(), MachineError> {
    for (id, kind) in ours {
        match theirs.get(&id) {
            Some(wanted) if *wanted == kind => {}
            wanted => {
                let wanted = wanted.map_or("none", String::as_str);
                let text =
                    format!("the guest has {wanted}, and here it is {kind}; give the path of a device of that kind");
                return Err(MachineError::device(&Some(id), text));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_becomes_one_of_its_kind() {
        let kinds = |list: &[(&str, &str)]| {
            list.iter()
                .map(|(id, kind)| ((*id).to_owned(), (*kind).to_owned()))
                .collect()
        };
        let theirs = kinds(&[("gpu", "10de:2330"), ("nic", "15b3:101e")]);
        compare(kinds(&[("nic", "15b3:101e")]), &theirs).expect("the same");
        let refused = |ours| triarch_api::chain(&compare(ours, &theirs).expect_err("refused"));
        let other = refused(kinds(&[("gpu", "10de:2330"), ("nic", "8086:1889")]));
        assert!(
            other.contains("nic") && other.contains("the guest has 15b3:101e, and here it is 8086:1889"),
            "{other}"
        );
        let none = refused(kinds(&[("disk", "1b36:0010")]));
        assert!(none.contains("disk") && none.contains("the guest has none"), "{none}");
    }

    #[test]
    fn a_device_that_stays_is_named_with_its_reason() {
        let Blocker { what, name, reason, .. } = blocker("nic", &Immovable::Driver("0000:01:00.0".to_owned()));
        assert_eq!((what, name.as_str()), (Part::Device, "nic"));
        assert_eq!(
            reason,
            "'nic' is a device of this host: the driver of the device 0000:01:00.0 on this host cannot tell its state (VFIO's migration protocol)"
        );
    }
}
