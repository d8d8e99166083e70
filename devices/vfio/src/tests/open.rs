//! Which devices can be had, and what those are told who want others.

use super::fake::{Fake, Sysfs, function_of, ring};
use super::space::nvme;
use crate::{OpenError, lock};

fn fake() -> Fake {
    Fake::new(&nvme(), [0x4000, 0, 0, 0, 0, 0])
}

fn text(error: &OpenError) -> String {
    error.to_string()
}

#[test]
fn a_device_takes_its_group_and_a_container_and_gives_them_back() {
    let (fake, sysfs) = (fake(), Sysfs::new());
    let path = sysfs.device("0000:00:05.0", Some(3), Some("vfio-pci"));
    let device = fake.iommu().open(&path, false).expect("a device");
    assert_eq!(device.name(), "0000:00:05.0");
    assert_eq!(
        fake.calls(),
        [
            "container",
            "group",
            "set container",
            "type1",
            "set type1",
            "device",
            "set irqs",
            "set irqs"
        ]
    );
    assert_eq!(fake.open_files(), 3);
    drop(device);
    assert_eq!(fake.open_files(), 0);
}

#[test]
fn devices_of_a_guest_share_what_they_can() {
    let (fake, sysfs) = (fake(), Sysfs::new());
    let iommu = fake.iommu();
    let paths = [("0000:00:06.0", 3), ("0000:00:06.1", 3), ("0000:00:07.0", 4)];
    let paths = paths.map(|(name, group)| sysfs.device(name, Some(group), Some("vfio-pci")));
    let devices = paths.each_ref().map(|path| iommu.open(path, false).expect("a device"));
    assert_eq!(fake.open_files(), 1 + 2 + 3);
    assert_eq!(fake.calls().iter().filter(|call| *call == "set type1").count(), 1);
    let again = iommu.open(&paths[1], false).err().expect("refused");
    assert_eq!(text(&again), "0000:00:06.1 is passed through to this guest already");
    drop(devices);
    assert_eq!(fake.open_files(), 0);
    iommu.open(&paths[1], false).expect("free again");
}

#[test]
fn whose_it_is_and_how_to_get_it_is_told() {
    let (fake, sysfs) = (fake(), Sysfs::new());
    let iommu = fake.iommu();
    let refused = |path| text(&iommu.open(path, false).err().expect("refused"));
    let nvme = sysfs.device("0000:00:05.0", None, Some("nvme"));
    assert_eq!(
        refused(&nvme),
        "0000:00:05.0 belongs to the host's driver nvme; give it to vfio-pci: echo vfio-pci > \
         /sys/bus/pci/devices/0000:00:05.0/driver_override; echo 0000:00:05.0 > /sys/bus/pci/devices/0000:00:05.0/driver/unbind; echo \
         0000:00:05.0 > /sys/bus/pci/drivers_probe"
    );
    let free = sysfs.device("0000:00:06.0", None, None);
    let said = refused(&free);
    assert!(
        said.contains("has no driver; give it to vfio-pci") && !said.contains("unbind"),
        "{said}"
    );
    let alone = sysfs.device("0000:00:07.0", None, Some("vfio-pci"));
    assert!(refused(&alone).starts_with("0000:00:07.0 is in no IOMMU group"));
    let missing = free.with_file_name("0000:00:1f.0");
    assert!(refused(&missing).contains("there is no device at"));
    let unsafe_one = sysfs.device("0000:00:08.0", Some(8), Some("vfio-pci"));
    sysfs.group_file(8, "name", "vfio-noiommu\n");
    assert!(refused(&unsafe_one).contains("has no IOMMU behind it"));
    assert!(fake.calls().is_empty(), "nothing was opened");
}

#[test]
fn a_mediated_device_is_one_by_its_uuid() {
    const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    let (fake, sysfs) = (fake(), Sysfs::new());
    let iommu = fake.iommu();
    let path = sysfs.mediated(UUID, 9, Some("intel_vgpu_mdev"), "vfio-pci");
    let device = iommu.open(&path, false).expect("a device");
    assert_eq!(device.name(), UUID);
    let there = sysfs.device("0000:00:05.0", Some(3), Some("vfio-pci"));
    iommu.open(&there, false).expect("beside a device that is whole");
    let again = iommu.open(&path.canonicalize().expect("its directory"), false);
    assert!(matches!(again.err(), Some(OpenError::Twice(name)) if name == UUID));
    let refused = |path| text(&iommu.open(path, false).err().expect("refused"));
    let other = sysfs.mediated("c0b26072-dd1b-4340-84fe-bf338c510818", 10, Some("vfio_mdev"), "vfio-ap");
    let said = refused(&other);
    assert!(
        said.contains("c0b26072-dd1b-4340-84fe-bf338c510818 is a mediated device of the kind 'vfio-ap'"),
        "{said}"
    );
    let idle = sysfs.mediated("5f8bd9a6-7c7c-4f1e-93a5-6b2d8a7c0e01", 11, None, "vfio-pci");
    assert!(refused(&idle).contains("has no driver"));
}

#[test]
fn a_device_has_many_names() {
    let (fake, sysfs) = (fake(), Sysfs::new());
    let path = sysfs.device("0000:00:05.0", Some(3), Some("mlx5_vfio_pci"));
    let link = path.with_file_name("gpu");
    std::os::unix::fs::symlink(&path, &link).expect("a link");
    for path in [path.clone(), link, path.join("")] {
        assert_eq!(
            fake.iommu().open(&path, false).expect("a device").name(),
            "0000:00:05.0",
            "{path:?}"
        );
    }
}

#[test]
fn a_group_that_is_shared_with_the_host_is_refused_by_name() {
    let (fake, sysfs) = (fake(), Sysfs::new());
    lock(&fake.world).not_viable = true;
    let path = sysfs.device("0000:00:06.0", Some(3), Some("vfio-pci"));
    sysfs.device("0000:00:06.1", Some(3), Some("nvme"));
    sysfs.device("0000:00:06.2", Some(3), None);
    let error = fake.iommu().open(&path, false).err().expect("refused");
    assert_eq!(
        text(&error),
        "0000:00:06.0 cannot be separated from 0000:00:06.1, which belongs to the host's driver nvme, in its IOMMU group 3; give those to \
         vfio-pci as well, or take their driver away"
    );
    assert_eq!(fake.open_files(), 0);
}

#[test]
fn what_the_kernel_refuses_is_explained_and_leaves_nothing_open() {
    let cases = [
        (
            "container",
            libc::ENOENT,
            "load the modules vfio-pci and vfio_iommu_type1",
        ),
        (
            "group",
            libc::EBUSY,
            "is in use: another process has its IOMMU group 3 open",
        ),
        ("group", libc::EACCES, "/dev/vfio/3 cannot be opened"),
        ("type1", libc::EINVAL, "no VFIO for this IOMMU"),
        ("set type1", libc::EPERM, "no interrupt remapping"),
        ("set type1", libc::ENODEV, "cannot use the IOMMU of 0000:00:05.0"),
        (
            "set container",
            libc::EINVAL,
            "cannot put the IOMMU group into the container",
        ),
        ("device", libc::EIO, "cannot open the descriptor of 0000:00:05.0"),
        ("pci", 1, "is no PCI device"),
    ];
    for (call, number, words) in cases {
        let (fake, sysfs) = (fake(), Sysfs::new());
        fake.fail(call, number);
        let path = sysfs.device("0000:00:05.0", Some(3), Some("vfio-pci"));
        let error = fake.iommu().open(&path, false).err().expect("refused");
        assert!(text(&error).contains(words), "{call}: {error}");
        assert_eq!(fake.open_files(), 0, "{call}");
    }
}

/// A device with a file of its own.
fn with_node(sysfs: &Sysfs, name: &str, group: u32, node: &str) -> std::path::PathBuf {
    let path = sysfs.device(name, Some(group), Some("vfio-pci"));
    sysfs.node(&path, node);
    path
}

#[test]
fn iommufd_takes_a_device_by_its_own_file() {
    let (fake, sysfs) = (fake(), Sysfs::new());
    let iommu = fake.iommu();
    let path = with_node(&sysfs, "0000:00:05.0", 3, "vfio0");
    let plain = iommu.open(&path, false).expect("a device");
    assert!(
        fake.calls().contains(&"container".to_owned()),
        "by groups, where there are"
    );
    iommu.by_iommufd(Some(true));
    let second = with_node(&sysfs, "0000:00:06.0", 4, "vfio1");
    drop(iommu.open(&second, false).expect("a device"));
    assert!(!fake.calls().contains(&"iommu".to_owned()), "as those that are there");
    drop(plain);
    fake.calls();
    let devices = [&path, &second].map(|path| iommu.open(path, false).expect("a device"));
    let one = ["iommu", "node", "bind", "attach", "set irqs", "set irqs"];
    assert_eq!(fake.calls(), [&one[..], &one[1..]].concat());
    assert!(std::sync::Arc::ptr_eq(devices[0].container(), devices[1].container()));
    assert_eq!(fake.open_files(), 3);
    drop(devices);
    assert_eq!(fake.open_files(), 0);
    iommu.by_iommufd(None);
    lock(&fake.world).no_containers = true;
    iommu.open(&path, false).expect("a device");
    assert!(
        fake.calls().contains(&"iommu".to_owned()),
        "where there is nothing else"
    );
}

#[test]
fn what_iommufd_refuses_is_told() {
    let (fake, sysfs) = (fake(), Sysfs::new());
    let iommu = fake.iommu();
    iommu.by_iommufd(Some(true));
    let refused = |path| text(&iommu.open(path, false).err().expect("refused"));
    let without = sysfs.device("0000:00:04.0", Some(2), Some("vfio-pci"));
    assert!(refused(&without).contains("no device file for 0000:00:04.0"));
    let path = with_node(&sysfs, "0000:00:06.0", 3, "vfio0");
    fake.fail("bind", libc::EBUSY);
    assert!(refused(&path).contains("0000:00:06.0 is in use"));
    sysfs.device("0000:00:06.1", Some(3), Some("nvme"));
    assert!(refused(&path).contains("cannot be separated from 0000:00:06.1"));
    lock(&fake.world).fails.clear();
    fake.fail("attach", libc::EPERM);
    let said = refused(&path);
    assert!(
        said.contains("allow_unsafe_interrupts=1 of the module iommufd"),
        "{said}"
    );
    fake.fail("iommu", libc::ENOENT);
    assert!(refused(&path).contains("/dev/iommu cannot be opened"));
    assert_eq!(fake.open_files(), 0);
}

#[test]
fn a_mediated_device_is_opened_when_the_hypervisor_knows_of_it() {
    let (fake, sysfs) = (fake(), Sysfs::new());
    let iommu = fake.iommu();
    let path = sysfs.mediated("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", 9, Some("nvidia"), "vfio-pci");
    sysfs.node(&path, "vfio3");
    for iommufd in [false, true] {
        iommu.by_iommufd(Some(iommufd));
        fake.calls();
        let device = iommu.open(&path, false).expect("a device");
        let calls = fake.calls();
        assert!(
            !calls.iter().any(|call| call == "device" || call == "bind"),
            "{calls:?}"
        );
        for _ in 0..2 {
            let function = function_of(&fake, &device).expect("a function");
            let calls = fake.calls();
            let at = |name: &str| calls.iter().position(|call| call == name);
            let opened = at(if iommufd { "bind" } else { "device" });
            assert!(at("admit").is_some() && at("admit") < opened, "{calls:?}");
            assert!(ring(&fake, 4, 0) && !iommu.alarms().is_empty());
            drop(function);
            assert_eq!(lock(&fake.world).admitted, 0);
        }
        fake.fail(if iommufd { "attach" } else { "device" }, libc::ESRCH);
        assert!(function_of(&fake, &device).is_err());
        assert_eq!(lock(&fake.world).admitted, 0);
        lock(&fake.world).fails.clear();
        drop(device);
        assert_eq!(fake.open_files(), 0);
    }
}
