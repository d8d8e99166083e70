//! Resets of devices that only their bus can reset.

use std::sync::Arc;

use super::fake::{Fake, Sysfs, function_of};
use super::space::nvme;
use crate::{HostDevice, Iommu, lock};

const NAMES: [&str; 2] = ["0000:01:00.0", "0000:01:00.1"];

/// Two devices in two groups of one bus, which cannot be reset by themselves.
fn pair() -> (Fake, Iommu, [Arc<HostDevice>; 2]) {
    let (fake, sysfs) = (Fake::new(&nvme(), [0x4000, 0, 0, 0, 0, 0]), Sysfs::new());
    {
        let mut world = lock(&fake.world);
        world.needs_bus = true;
        world.bus.names = NAMES.map(str::to_owned).to_vec();
        world.bus.groups = [3, 4].into();
    }
    let iommu = fake.iommu();
    let opened = [(NAMES[0], 3), (NAMES[1], 4)].map(|(name, group)| {
        let path = sysfs.device(name, Some(group), Some("vfio-pci"));
        iommu.open(&path, false).expect("a device")
    });
    (fake, iommu, opened)
}

fn resets(fake: &Fake) -> Vec<usize> {
    std::mem::take(&mut lock(&fake.world).bus_resets)
}

#[test]
fn a_bus_that_is_all_the_guests_is_reset_while_no_device_is_in_use() {
    let (fake, _iommu, [first, second]) = pair();
    let one = function_of(&fake, &first).expect("a function");
    assert_eq!(resets(&fake), [2], "with both groups");
    let other = function_of(&fake, &second).expect("a function");
    assert!(
        resets(&fake).is_empty(),
        "the guest has the first one, and this was reset with it"
    );
    one.stop();
    assert!(resets(&fake).is_empty());
    other.stop();
    assert_eq!(resets(&fake), [2]);
    assert!(!fake.calls().contains(&"reset".to_owned()));
}

#[test]
fn a_bus_of_which_somebody_else_has_a_part_is_left_alone() {
    let (fake, _iommu, [first, second]) = pair();
    drop(second);
    function_of(&fake, &first).expect("a function").stop();
    assert!(resets(&fake).is_empty(), "one group is not the guest's");
    lock(&fake.world).bus.groups = [3].into();
    function_of(&fake, &first).expect("a function").stop();
    assert_eq!(resets(&fake), [1, 1]);
}

#[test]
fn with_iommufd_the_kernel_knows_whose_devices_are() {
    let (fake, _iommu, [first, _second]) = pair();
    {
        let mut world = lock(&fake.world);
        world.bus.groups.clear();
        world.bus.owned = Some(false);
    }
    function_of(&fake, &first).expect("a function").stop();
    assert!(resets(&fake).is_empty());
    lock(&fake.world).bus.owned = Some(true);
    function_of(&fake, &first).expect("a function").stop();
    assert_eq!(resets(&fake), [0, 0]);
}

#[test]
fn a_bus_that_cannot_be_reset_keeps_nobody_from_its_devices() {
    let (fake, _iommu, [first, _second]) = pair();
    fake.fail("reset bus", libc::EINVAL);
    function_of(&fake, &first).expect("a function");
    fake.fail("bus members", libc::ENODEV);
    function_of(&fake, &first).expect("a function");
}
