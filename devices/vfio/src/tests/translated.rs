//! Devices behind the guest's IOMMU.

use std::sync::Arc;

use super::fake::{Fake, Sysfs};
use super::space::nvme;
use crate::{DmaError, DmaMap, HostDevice, Iommu, OpenError, Translated, lock};

const MIB: u64 = 1 << 20;

/// A guest with memory, and a device behind its IOMMU.
struct Setup {
    fake: Fake,
    sysfs: Sysfs,
    iommu: Iommu,
    guest: DmaMap,
    device: Arc<HostDevice>,
    translated: Arc<Translated>,
}

fn setup() -> Setup {
    let fake = Fake::new(&nvme(), [0x4000, 0, 0, 0, 0, 0]);
    let (iommu, sysfs, guest) = (fake.iommu(), Sysfs::new(), DmaMap::default());
    guest.insert(0, 64 * MIB, 0x7000_0000).expect("memory");
    guest.insert(1 << 32, 16 * MIB, 0x8000_0000).expect("memory");
    let path = sysfs.device("0000:01:00.0", Some(7), Some("vfio-pci"));
    let device = iommu.open(&path, true).expect("a device");
    let translated = guest.behind(device.container());
    Setup {
        fake,
        sysfs,
        iommu,
        guest,
        device,
        translated,
    }
}

/// What is mapped in address space `space` of those that have anything, in order of their making.
fn maps(fake: &Fake, space: usize) -> Vec<(u64, u64, u64, bool)> {
    let world = lock(&fake.world);
    let mut spaces: Vec<_> = world.maps.keys().map(|(space, _)| *space).collect();
    spaces.dedup();
    let of = |(number, _): &(usize, u64)| spaces.get(space) == Some(number);
    let maps = world.maps.iter().filter(|(key, _)| of(key));
    maps.map(|((_, at), (len, host, writable))| (*at, *len, *host, *writable))
        .collect()
}

#[test]
fn nothing_is_reached_until_the_guest_says_so() {
    let setup = setup();
    assert!(maps(&setup.fake, 0).is_empty());
    setup.translated.map(0x10_0000, 0x3000, 0x5000, true).expect("mapped");
    setup.translated.map(0x20_0000, 0x1000, 1 << 32, false).expect("mapped");
    let both = [
        (0x10_0000, 0x3000, 0x7000_5000, true),
        (0x20_0000, 0x1000, 0x8000_0000, false),
    ];
    assert_eq!(maps(&setup.fake, 0), both);
    let counted = setup.device.container().reached().clone();
    assert_eq!((counted.bytes(), counted.ranges()), (0x4000, 2));
    setup.translated.unmap(0x10_0000..=0x10_2fff);
    assert_eq!(maps(&setup.fake, 0), both[1..]);
    setup.translated.reach_nothing();
    assert!(maps(&setup.fake, 0).is_empty());
    assert_eq!((counted.bytes(), counted.ranges()), (0, 0));
}

#[test]
fn all_there_is_and_all_that_comes_is_reached_while_the_iommu_is_passed_by() {
    let setup = setup();
    setup.translated.reach_all().expect("memory");
    setup.guest.insert(2 << 32, MIB, 0x9000_0000).expect("memory");
    assert_eq!(maps(&setup.fake, 0).len(), 3);
    setup.translated.reach_all().expect("once is enough");
    setup.guest.remove(2 << 32..(2 << 32) + MIB);
    assert_eq!(maps(&setup.fake, 0).len(), 2);
    setup.translated.map(0x10_0000, 0x1000, 0, true).expect("mapped");
    assert_eq!(maps(&setup.fake, 0), [(0x10_0000, 0x1000, 0x7000_0000, true)]);
}

#[test]
fn memory_that_goes_is_reached_no_more_and_none_is_reached_where_there_is_none() {
    let setup = setup();
    for block in 0..4 {
        let at = (8 << 32) + 2 * MIB * block;
        setup
            .guest
            .insert(at, 2 * MIB, 0xa000_0000 + 2 * MIB * block)
            .expect("a block");
    }
    // From the last MiB before the blocks to the first of the third, in four pieces, the first of which is nothing.
    setup.translated.map(0, 6 * MIB, (8 << 32) - MIB, true).expect("mapped");
    let piece = |at, len, host| (at * MIB, len * MIB, 0xa000_0000 + host * MIB, true);
    let three = [piece(1, 2, 0), piece(3, 2, 2), piece(5, 1, 4)];
    assert_eq!(maps(&setup.fake, 0), three);
    setup.guest.remove((8 << 32) + 2 * MIB..(8 << 32) + 4 * MIB);
    assert_eq!(maps(&setup.fake, 0), [three[0], three[2]]);
    setup.translated.unmap(0..=6 * MIB - 1);
    assert!(maps(&setup.fake, 0).is_empty());
}

#[test]
fn what_the_kernel_refuses_is_undone() {
    let setup = setup();
    let may_lock = |bytes| {
        lock(&setup.fake.world).limit = Some(bytes);
        // As another device that comes.
        setup.guest.behind(setup.device.container());
    };
    may_lock(80 * MIB - 1);
    let error = setup.translated.reach_all().expect_err("refused");
    assert!(matches!(error, DmaError::Limit { needed, .. } if needed == 80 * MIB));
    may_lock(64 * MIB);
    setup.translated.map(0, MIB, 0, true).expect("that much is allowed");
    let beyond = setup.translated.map(4 << 32, 64 * MIB, 0, true);
    assert!(matches!(beyond, Err(DmaError::Limit { .. })));
    setup.fake.fail("map", libc::ENOSPC);
    let full = setup.translated.map(1 << 32, MIB, 0, true);
    assert!(matches!(full, Err(DmaError::Map { .. })));
    assert_eq!(maps(&setup.fake, 0), [(0, MIB, 0x7000_0000, true)]);
}

#[test]
fn it_has_an_address_space_of_its_own_by_both_interfaces() {
    for iommufd in [false, true] {
        let fake = Fake::new(&nvme(), [0x4000, 0, 0, 0, 0, 0]);
        let (iommu, sysfs, guest) = (fake.iommu(), Sysfs::new(), DmaMap::default());
        iommu.by_iommufd(Some(iommufd));
        guest.insert(0, 64 * MIB, 0x7000_0000).expect("memory");
        let [plain, first, second] =
            [("0000:01:00.0", 7), ("0000:02:00.0", 8), ("0000:03:00.0", 9)].map(|(name, group)| {
                let path = sysfs.device(name, Some(group), Some("vfio-pci"));
                sysfs.node(&path, &format!("vfio{group}"));
                path
            });
        let first = iommu.open(&first, true).expect("a device");
        let plain = iommu.open(&plain, false).expect("a device");
        let second = iommu.open(&second, true).expect("a device");
        guest.attach(plain.container()).expect("memory");
        let [first_reach, second_reach] = [&first, &second].map(|device| guest.behind(device.container()));
        first_reach.map(0x1000, 0x1000, 0, true).expect("mapped");
        second_reach.reach_all().expect("memory");
        let all = (0, 64 * MIB, 0x7000_0000, true);
        assert_eq!(maps(&fake, 0), [(0x1000, 0x1000, 0x7000_0000, true)]);
        assert_eq!((maps(&fake, 1), maps(&fake, 2)), (vec![all], vec![all]), "{iommufd}");
        let opened = fake.calls().iter().filter(|call| *call == "another").count();
        assert_eq!(
            opened,
            if iommufd { 2 } else { 0 },
            "the descriptor of the first serves all"
        );
        guest.insert(1 << 32, MIB, 0x9000_0000).expect("memory");
        assert_eq!(
            (maps(&fake, 0).len(), maps(&fake, 1).len(), maps(&fake, 2).len()),
            (1, 2, 2)
        );
        let counted = plain.container().reached().clone();
        drop(plain);
        assert_eq!(
            (counted.bytes(), counted.ranges()),
            (65 * MIB + 0x1000, 3),
            "the others' stay"
        );
        drop((first, second));
        assert_eq!((counted.bytes(), fake.open_files()), (0, 0));
        first_reach
            .map(0x8000, 0x1000, 0, true)
            .expect("nobody is there any more");
        second_reach.reach_nothing();
    }
}

#[test]
fn devices_that_the_host_cannot_tell_apart_are_not_kept_apart() {
    let setup = setup();
    let path = setup.sysfs.device("0000:01:00.1", Some(7), Some("vfio-pci"));
    for apart in [true, false] {
        let refused = setup.iommu.open(&path, apart).err().expect("refused");
        let text = refused.to_string();
        assert!(
            matches!(refused, OpenError::NotApart { group: 7, .. }) && text.contains("leave iommu"),
            "{text}"
        );
    }
    drop(setup.device);
    let first = setup.iommu.open(&path, false).expect("alone");
    let path = setup.sysfs.device("0000:01:00.2", Some(7), Some("vfio-pci"));
    assert!(setup.iommu.open(&path, true).is_err());
    setup.iommu.open(&path, false).expect("together");
    drop(first);
}

#[test]
fn what_the_host_does_not_reach_is_known_beforehand() {
    let setup = setup();
    let gaps = |ranges: &[(u64, u64)]| {
        lock(&setup.fake.world).reachable = ranges.to_vec();
        setup.translated.gaps((1 << 48) - 1).expect("ranges")
    };
    assert!(gaps(&[]).is_empty(), "the host does not tell");
    let vtd = [(0, 0xfedf_ffff), (0xfef0_0000, (1 << 39) - 1)];
    assert_eq!(gaps(&vtd), [0xfee0_0000..=0xfeef_ffff, 1 << 39..=(1 << 48) - 1]);
    assert_eq!(gaps(&[(0x1000, u64::MAX)]), [0..=0xfff]);
    assert_eq!(gaps(&[(0, 1 << 50)]), []);
    assert_eq!(gaps(&[(0, 0xfff), (1 << 50, u64::MAX)]), [0x1000..=(1 << 48) - 1]);
}
