//! Guest memory follows.

use std::sync::Arc;

use super::fake::{Fake, Sysfs, host};
use super::space::nvme;
use crate::{DmaError, DmaMap, HostDevice, lock};

const MIB: u64 = 1 << 20;

fn setup() -> (Fake, Arc<HostDevice>, DmaMap) {
    let fake = Fake::new(&nvme(), [0x4000, 0, 0, 0, 0, 0]);
    let device = host(&fake);
    let map = DmaMap::default();
    map.insert(0, 64 * MIB, 0x7000_0000).expect("memory");
    map.insert(1 << 32, 16 * MIB, 0x8000_0000).expect("memory");
    fake.calls();
    (fake, device, map)
}

#[test]
fn the_same_goes_for_iommufd() {
    let fake = Fake::new(&nvme(), [0x4000, 0, 0, 0, 0, 0]);
    let (iommu, sysfs) = (fake.iommu(), Sysfs::new());
    iommu.by_iommufd(Some(true));
    let path = sysfs.device("0000:01:00.0", Some(7), Some("vfio-pci"));
    sysfs.node(&path, "vfio0");
    let device = iommu.open(&path, false).expect("a device");
    let map = DmaMap::default();
    map.insert(0, 64 * MIB, 0x7000_0000).expect("memory");
    map.attach(device.container()).expect("memory");
    map.insert(2 << 32, MIB, 0x9000_0000).expect("memory");
    assert_eq!(maps(&fake), [(0, 64 * MIB, 0x7000_0000), (2 << 32, MIB, 0x9000_0000)]);
    map.remove(0..MIB);
    assert_eq!(maps(&fake).len(), 1);
    drop(device);
    assert!(!map.is_attached() && maps(&fake).is_empty());
}

fn maps(fake: &Fake) -> Vec<(u64, u64, u64)> {
    let world = lock(&fake.world);
    world
        .maps
        .iter()
        .map(|((_, at), (len, host, _))| (*at, *len, *host))
        .collect()
}

#[test]
fn all_there_is_and_all_that_comes_is_reached_until_it_goes() {
    let (fake, device, map) = setup();
    assert!(fake.calls().is_empty(), "without a device nothing is locked");
    map.attach(device.container()).expect("memory");
    assert!(map.is_attached());
    let both = [(0, 64 * MIB, 0x7000_0000), (1 << 32, 16 * MIB, 0x8000_0000)];
    assert_eq!(maps(&fake), both);
    map.attach(device.container()).expect("once is enough");
    assert_eq!(fake.calls(), ["limit", "map", "map", "limit"]);
    map.insert(2 << 32, MIB, 0x9000_0000).expect("memory");
    // Threads that have memory come and go may not ask for limits.
    assert_eq!(fake.calls(), ["map"]);
    assert_eq!(maps(&fake).len(), 3);
    let counted = device.container().reached();
    assert_eq!((counted.bytes(), counted.ranges()), (81 * MIB, 3));
    assert_eq!(map.remove(2 << 32..(2 << 32) + MIB), [(2 << 32, MIB, 0x9000_0000)]);
    assert_eq!(maps(&fake), both);
    map.clear();
    assert!(maps(&fake).is_empty());
}

#[test]
fn the_last_device_takes_its_mappings_along_and_another_can_come() {
    let (fake, device, map) = setup();
    map.attach(device.container()).expect("memory");
    let counted = device.container().reached().clone();
    drop(device);
    assert!(!map.is_attached() && maps(&fake).is_empty());
    assert_eq!((counted.bytes(), counted.ranges()), (0, 0));
    map.insert(2 << 32, MIB, 0x9000_0000).expect("memory");
    let device = host(&fake);
    map.attach(device.container()).expect("memory");
    assert_eq!(maps(&fake).len(), 3);
}

#[test]
fn blocks_of_a_range_go_together_and_others_stay() {
    let (fake, device, map) = setup();
    map.attach(device.container()).expect("memory");
    for block in 0..8 {
        map.insert((8 << 32) + 2 * MIB * block, 2 * MIB, 0xa000_0000 + 2 * MIB * block)
            .expect("a block");
    }
    let gone = map.remove((8 << 32) + 4 * MIB..(8 << 32) + 8 * MIB);
    assert_eq!(gone.len(), 2);
    assert_eq!(maps(&fake).len(), 2 + 6);
}

#[test]
fn too_much_to_lock_is_told_before_anything_is_locked() {
    let (fake, device, map) = setup();
    lock(&fake.world).limit = Some(80 * MIB - 1);
    let error = map.attach(device.container()).expect_err("refused");
    assert!(matches!(error, DmaError::Limit { needed, .. } if needed == 80 * MIB));
    let text = error.to_string();
    assert!(
        text.contains("need 80 MiB of memory locked") && text.contains("ulimit -l 81920"),
        "{text}"
    );
    assert_eq!(fake.calls(), ["limit"]);
    assert!(!map.is_attached());
    lock(&fake.world).limit = Some(80 * MIB);
    map.attach(device.container()).expect("enough");
    let error = map.insert(2 << 32, MIB, 0).expect_err("refused");
    assert!(matches!(error, DmaError::Limit { .. }));
    assert_eq!(maps(&fake).len(), 2);
}

#[test]
fn what_the_iommu_does_not_reach_is_told() {
    let (fake, device, map) = setup();
    lock(&fake.world).reachable = vec![(0, 0xfedf_ffff), (0xfef0_0000, (1 << 32) + MIB)];
    let error = map.attach(device.container()).expect_err("refused").to_string();
    assert!(error.contains("at 0x100000000 to 0x100ffffff"), "{error}");
    assert!(
        error.contains("0x0 to 0xfedfffff, 0xfef00000 to 0x100100000"),
        "{error}"
    );
    assert!(maps(&fake).is_empty());
}

#[test]
fn memory_of_arm_guests_is_beside_what_an_smmu_keeps_for_interrupts() {
    let fake = Fake::new(&nvme(), [0x4000, 0, 0, 0, 0, 0]);
    let (device, map) = (host(&fake), DmaMap::default());
    // As an SMMUv3 tells on Linux 6.1: without 1 MiB at 0x0800_0000.
    lock(&fake.world).reachable = vec![(0, 0x7ff_ffff), (0x810_0000, (1 << 48) - 1)];
    map.insert(0x4000_0000, 64 * MIB, 0x7000_0000).expect("memory");
    map.attach(device.container()).expect("memory");
    let error = map.insert(0x7f0_0000, 2 * MIB, 0x9000_0000).expect_err("refused");
    assert!(error.to_string().contains("at 0x7f00000 to 0x80fffff"), "{error}");
    assert_eq!(maps(&fake), [(0x4000_0000, 64 * MIB, 0x7000_0000)]);
}

#[test]
fn what_the_kernel_refuses_is_undone() {
    let (fake, device, map) = setup();
    map.attach(device.container()).expect("memory");
    fake.fail("map", libc::ENOMEM);
    assert!(matches!(map.insert(2 << 32, MIB, 0), Err(DmaError::Map { .. })));
    assert_eq!(maps(&fake).len(), 2);
    map.clear();
    map.insert(0, MIB, 0).expect_err("refused");
    assert!(maps(&fake).is_empty());
}
