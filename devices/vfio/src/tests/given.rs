//! Devices that come by descriptors of what somebody else opened.

use std::io::{PipeReader, Read, pipe};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::fake::{Fake, Sysfs, function_of};
use super::space::nvme;
use crate::{HostDevice, Iommu, Kind, OpenError, lock};

/// A host with devices, of which somebody else has opened what he passes on.
struct Host {
    fake: Fake,
    sysfs: Sysfs,
    iommu: Iommu,
}

/// The other end of a descriptor that was passed on.
struct Passed(PipeReader);

impl Passed {
    /// Nobody has it open any more.
    fn is_closed(&mut self) -> bool {
        rustix::io::ioctl_fionbio(&self.0, true).expect("a pipe");
        self.0.read(&mut [0]).is_ok_and(|count| count == 0)
    }
}

impl Host {
    fn new() -> Self {
        let fake = Fake::new(&nvme(), [0x4000, 0, 0, 0, 0, 0]);
        let sysfs = Sysfs::new();
        lock(&fake.world).groups = sysfs.groups();
        let iommu = fake.iommu();
        Self { fake, sysfs, iommu }
    }

    /// Passes on what sysfs shows at `directory`.
    fn pass(&self, directory: Option<PathBuf>) -> (OwnedFd, Passed) {
        let (reader, writer) = pipe().expect("a pipe");
        let writer: OwnedFd = writer.into();
        // What may be read and written, as a pipe may not.
        let both = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&writer));
        let both = std::fs::File::options()
            .read(true)
            .write(true)
            .open(both)
            .expect("it again");
        drop(writer);
        let file: OwnedFd = both.into();
        if let Some(directory) = directory {
            let inode = rustix::fs::fstat(file.as_fd()).expect("an inode").st_ino;
            lock(&self.fake.world).directories.insert(inode, directory);
        }
        (file, Passed(reader))
    }

    fn device(&self, name: &str, group: u32) -> PathBuf {
        self.sysfs.device(name, Some(group), Some("vfio-pci"))
    }

    /// A device that comes by its own file.
    fn node(&self, name: &str, node: &str) -> PathBuf {
        let device = self.device(name, 3);
        self.sysfs.node(&device, node);
        self.sysfs.character("vfio-dev", node, Some(&device))
    }

    fn take(&self, files: Vec<OwnedFd>, path: Option<&Path>) -> Result<Arc<HostDevice>, OpenError> {
        self.iommu.take(files, path, false)
    }

    /// What is told who passes these on.
    fn refused(&self, directories: &[&PathBuf], path: Option<&Path>) -> String {
        let (files, mut passed): (Vec<_>, Vec<_>) = directories
            .iter()
            .map(|directory| self.pass(Some((*directory).clone())))
            .unzip();
        let before = self.fake.open_files();
        let error = self.take(files, path).err().expect("refused");
        assert_eq!(self.fake.open_files(), before, "{error}");
        assert!(passed.iter_mut().all(Passed::is_closed), "{error}");
        error.to_string()
    }
}

#[test]
fn a_device_and_iommufd_come_by_descriptors_and_are_closed_with_it() {
    let host = Host::new();
    let (first, second) = (host.node("0000:00:05.0", "vfio0"), host.node("0000:00:06.0", "vfio1"));
    let iommu = host.sysfs.character("misc", "iommu", None);
    let ((file, mut end), (space, mut space_end)) = (host.pass(Some(first.clone())), host.pass(Some(iommu)));
    let device = host.take(vec![file, space], None).expect("a device");
    assert_eq!(device.name(), "0000:00:05.0");
    let one = ["bind", "attach", "set irqs", "set irqs"];
    assert_eq!(host.fake.calls(), [&["iommu", "take"], &one[..]].concat());
    let (file, mut other_end) = host.pass(Some(second));
    let other = host.take(vec![file], None).expect("a second device");
    assert_eq!(host.fake.calls(), one);
    assert!(Arc::ptr_eq(device.container(), other.container()));
    // A guest may have it, and another one after that.
    for _ in 0..2 {
        drop(function_of(&host.fake, &device).expect("a function"));
    }
    drop(device);
    assert!(end.is_closed() && !other_end.is_closed() && !space_end.is_closed());
    drop(other);
    assert!(other_end.is_closed());
    assert_eq!(host.fake.open_files(), 0);
    // The VM keeps what is for all devices for the next one.
    assert!(!space_end.is_closed());
    let (file, mut end) = host.pass(Some(first));
    drop(host.take(vec![file], None).expect("it comes again"));
    assert!(end.is_closed());
    host.iommu.forget();
    assert!(space_end.is_closed());
}

#[test]
fn a_group_and_a_container_come_by_descriptors() {
    let host = Host::new();
    let container = host.sysfs.character("misc", "vfio", None);
    let (file, mut container_end) = host.pass(Some(container));
    host.iommu.give(file, Kind::Container).expect("a container");
    let alone = host.device("0000:00:05.0", 5);
    host.sysfs.device("0000:00:05.1", Some(5), None);
    let group = host.sysfs.character("vfio", "5", None);
    for path in [None, Some(&*alone)] {
        let (file, mut end) = host.pass(Some(group.clone()));
        let device = host.take(vec![file], path).expect("a device");
        assert_eq!(device.name(), "0000:00:05.0");
        let calls = [
            "container",
            "take",
            "set container",
            "type1",
            "set type1",
            "device",
            "set irqs",
            "set irqs",
        ];
        assert_eq!(host.fake.calls(), calls);
        drop(device);
        assert!(end.is_closed());
    }
    // Of a group with two devices one is named, and the other one comes by its path: the VM has the group.
    let both = ["0000:00:06.0", "0000:00:06.1"].map(|name| host.device(name, 6));
    let group = host.sysfs.character("vfio", "6", None);
    let said = host.refused(&[&group], None);
    assert!(
        said.contains("[0000:00:06.0, 0000:00:06.1]; say which with path"),
        "{said}"
    );
    let (file, mut end) = host.pass(Some(group.clone()));
    let first = host.take(vec![file], Some(&both[0])).expect("a device");
    let said = host.refused(&[&group], Some(&both[1]));
    assert!(said.contains("the IOMMU group 6 of 0000:00:06.1 already"), "{said}");
    host.fake.calls();
    let second = host.iommu.open(&both[1], false).expect("its other device");
    assert!(!host.fake.calls().contains(&"group".to_owned()));
    drop(first);
    assert!(!end.is_closed());
    drop(second);
    assert!(end.is_closed() && !container_end.is_closed());
    drop(host.iommu);
    assert!(container_end.is_closed());
}

#[test]
fn what_came_for_all_devices_is_used_by_those_that_come_by_path() {
    let host = Host::new();
    let (device, iommu) = (
        host.device("0000:00:05.0", 3),
        host.sysfs.character("misc", "iommu", None),
    );
    host.sysfs.node(&device, "vfio0");
    let (file, mut end) = host.pass(Some(iommu));
    host.iommu.give(file, Kind::Iommufd).expect("iommufd");
    drop(host.iommu.open(&device, false).expect("a device"));
    assert_eq!(host.fake.calls()[..4], ["iommu", "take", "node", "bind"]);
    host.iommu.forget();
    assert!(end.is_closed());
}

#[test]
fn what_is_no_device_is_told_and_closed() {
    let host = Host::new();
    let node = host.node("0000:00:05.0", "vfio0");
    let group = host.sysfs.character("vfio", "3", None);
    let iommu = host.sysfs.character("misc", "iommu", None);
    let container = host.sysfs.character("misc", "vfio", None);
    let null = host.sysfs.character("mem", "null", None);
    let unsafe_group = host.sysfs.character("vfio", "noiommu-0", None);
    let gone = null.with_file_name("gone");
    let says = |directories: &[&PathBuf], words: &str| {
        let said = host.refused(directories, None);
        assert!(said.contains(words), "{directories:?}: {said}");
    };
    says(&[&null], "a descriptor is no device's");
    says(&[&node, &null], "a descriptor is no device's");
    says(&[&unsafe_group], "without an IOMMU");
    says(&[&gone], "let the VMM read /sys");
    says(&[&iommu], "there is no descriptor of a device");
    says(&[], "there is no descriptor of a device");
    says(&[&node, &group, &iommu], "several descriptors of the same kind");
    says(&[&node, &iommu, &iommu], "several descriptors of the same kind");
    says(&[&node], "the VM has no /dev/iommu");
    says(&[&group], "the VM has no /dev/vfio/vfio");
    says(
        &[&node, &container],
        "devices of this VM come by /dev/vfio/vfio, and a descriptor is for /dev/iommu",
    );
    says(
        &[&group, &iommu],
        "devices of this VM come by /dev/iommu, and a descriptor is for /dev/vfio/vfio",
    );
    // A file that is no character device, and a descriptor that may only be read.
    let (file, mut end) = host.pass(None);
    let error = host.take(vec![file], None).err().expect("refused");
    assert!(error.to_string().contains("is no device's") && end.is_closed());
    let (reader, _writer) = pipe().expect("a pipe");
    let inode = rustix::fs::fstat(reader.as_fd()).expect("an inode").st_ino;
    lock(&host.fake.world).directories.insert(inode, node.clone());
    let error = host.take(vec![reader.into()], None).err().expect("refused");
    assert!(error.to_string().contains("O_RDWR"), "{error}");
    // For all devices.
    let what = "the descriptor iommufd_fd is not /dev/iommu";
    for (directory, words) in [(&node, what), (&container, what), (&null, "is no device's")] {
        let (file, mut end) = host.pass(Some(directory.clone()));
        let error = host.iommu.give(file, Kind::Iommufd).expect_err("refused").to_string();
        assert!(error.contains(words) && end.is_closed(), "{error}");
    }
}

#[test]
fn a_device_is_trusted_no_more_than_by_its_path() {
    let host = Host::new();
    let iommu = host.sysfs.character("misc", "iommu", None);
    let (file, _end) = host.pass(Some(iommu.clone()));
    host.iommu.give(file, Kind::Iommufd).expect("iommufd");
    let foreign = host.sysfs.device("0000:00:07.0", Some(7), Some("nvme"));
    let foreign = host.sysfs.character("vfio-dev", "vfio7", Some(&foreign));
    assert!(
        host.refused(&[&foreign], None)
            .contains("belongs to the host's driver nvme")
    );
    let alone = host.sysfs.device("0000:00:08.0", None, Some("vfio-pci"));
    let alone = host.sysfs.character("vfio-dev", "vfio8", Some(&alone));
    assert!(host.refused(&[&alone], None).contains("is in no IOMMU group"));
    let part = host
        .sysfs
        .mediated("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", 9, Some("nvidia"), "vfio-pci");
    let part = host.sysfs.character("vfio-dev", "vfio9", Some(&part));
    assert!(host.refused(&[&part], None).contains("cannot come by a descriptor"));
    let node = host.node("0000:00:05.0", "vfio0");
    let other = host.device("0000:00:04.0", 4);
    let said = host.refused(&[&node], Some(&other));
    assert!(
        said.contains("the path is that of 0000:00:04.0, and the descriptor is 0000:00:05.0"),
        "{said}"
    );
    let said = host.refused(&[&node, &iommu], None);
    assert!(said.contains("the VM has /dev/iommu already"), "{said}");
    let (file, _end) = host.pass(Some(node.clone()));
    let device = host.take(vec![file], None).expect("a device");
    assert!(
        host.refused(&[&node], None)
            .contains("passed through to this guest already")
    );
    let group = host.sysfs.character("vfio", "4", None);
    assert!(
        host.refused(&[&group], None)
            .contains("give that of the device's own file")
    );
    drop(device);
    for (call, number, words) in [
        ("bind", libc::EINVAL, "the descriptor of 0000:00:05.0 was used before"),
        ("bind", libc::EBUSY, "0000:00:05.0 is in use"),
        (
            "attach",
            libc::ENOMEM,
            "cannot have the IOMMU take care of 0000:00:05.0",
        ),
        ("pci", 1, "is no PCI device"),
    ] {
        host.fake.fail(call, number);
        let said = host.refused(&[&node], None);
        assert!(said.contains(words), "{said}");
        lock(&host.fake.world).fails.clear();
    }
}

#[test]
fn what_comes_with_a_device_that_cannot_be_had_is_not_kept() {
    let host = Host::new();
    let node = host.node("0000:00:05.0", "vfio0");
    let iommu = host.sysfs.character("misc", "iommu", None);
    host.fake.fail("bind", libc::EINVAL);
    host.refused(&[&node, &iommu], None);
    lock(&host.fake.world).fails.clear();
    let said = host.refused(&[&node], None);
    assert!(said.contains("the VM has no /dev/iommu"), "{said}");
    let group = host.sysfs.character("vfio", "3", None);
    let container = host.sysfs.character("misc", "vfio", None);
    lock(&host.fake.world).contained = true;
    assert!(host.refused(&[&group, &container], None).contains("was used before"));
}

#[test]
fn those_behind_the_guests_iommu_have_spaces_of_their_own() {
    let host = Host::new();
    let iommu = host.sysfs.character("misc", "iommu", None);
    let (file, mut end) = host.pass(Some(iommu));
    host.iommu.give(file, Kind::Iommufd).expect("iommufd");
    let shared = host.node("0000:00:05.0", "vfio0");
    let (file, _end) = host.pass(Some(shared));
    let shared = host.take(vec![file], None).expect("a device");
    let apart = host.device("0000:00:06.0", 4);
    host.sysfs.node(&apart, "vfio1");
    let apart = host.sysfs.character("vfio-dev", "vfio1", Some(&apart));
    let (file, _end) = host.pass(Some(apart));
    let apart = host.iommu.take(vec![file], None, true).expect("another");
    assert!(!Arc::ptr_eq(shared.container(), apart.container()));
    drop((shared, apart));
    assert_eq!(host.fake.open_files(), 0);
    host.iommu.forget();
    assert!(end.is_closed());
    // A container is one.
    let container = host.sysfs.character("misc", "vfio", None);
    let (file, _end) = host.pass(Some(container));
    host.iommu.give(file, Kind::Container).expect("a container");
    let path = host.device("0000:00:07.0", 7);
    let (file, mut end) = host.pass(Some(host.sysfs.character("vfio", "7", None)));
    let error = host
        .iommu
        .take(vec![file], None, true)
        .err()
        .expect("refused")
        .to_string();
    assert!(error.contains("a container of its own") && end.is_closed(), "{error}");
    host.fake.calls();
    drop(host.iommu.open(&path, true).expect("by its path"));
    assert!(
        !host.fake.calls().contains(&"take".to_owned()),
        "it has what is for all"
    );
}
