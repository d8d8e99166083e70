//! What the host tells of a device that a guest has.

use super::fake::{Fake, Sysfs, host, ring};
use super::space::nvme;
use crate::{Alarm, Iommu, lock};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const ERROR: u32 = 3;
const REQUEST: u32 = 4;

fn fake() -> Fake {
    Fake::new(&nvme(), [0x4000, 0, 0, 0, 0, 0])
}

/// Whether somebody who waits for `iommu` is woken.
fn wakes(iommu: &Iommu) -> bool {
    use std::os::fd::AsRawFd;
    let waiting = Epoll::new().expect("a set");
    let readable = EpollEvent::new(EventSet::IN, 0);
    let added = waiting.ctl(ControlOperation::Add, iommu.as_raw_fd(), readable);
    added.expect("a set in a set");
    let mut woken = [EpollEvent::default()];
    waiting.wait(0, &mut woken).expect("a look") == 1
}

#[test]
fn requests_and_errors_are_told_once_each_and_by_name() {
    let (fake, sysfs) = (fake(), Sysfs::new());
    let iommu = fake.iommu();
    let path = sysfs.device("0000:00:05.0", Some(3), Some("vfio-pci"));
    let device = iommu.open(&path, false).expect("a device");
    assert!(!wakes(&iommu) && iommu.alarms().is_empty());
    assert!(ring(&fake, REQUEST, 0));
    assert!(wakes(&iommu));
    let told = |alarm| ("0000:00:05.0".to_owned(), alarm);
    assert_eq!(iommu.alarms(), [told(Alarm::Wanted)]);
    assert!(!wakes(&iommu) && iommu.alarms().is_empty(), "once");
    assert!(ring(&fake, ERROR, 0) && ring(&fake, REQUEST, 0) && ring(&fake, REQUEST, 0));
    assert_eq!(iommu.alarms(), [told(Alarm::Wanted), told(Alarm::Failed)]);
    assert!(ring(&fake, REQUEST, 0));
    drop(device);
    assert!(!wakes(&iommu) && iommu.alarms().is_empty(), "it is nobody's any more");
}

#[test]
fn a_device_of_which_nothing_is_told_works_as_well() {
    let fake = fake();
    lock(&fake.world).deaf = true;
    drop(host(&fake));
    assert!(!fake.calls().contains(&"set irqs".to_owned()));
    lock(&fake.world).deaf = false;
    fake.fail("set irqs", libc::EINVAL);
    let device = host(&fake);
    assert!(!ring(&fake, REQUEST, 0));
    drop(device);
    assert_eq!(fake.open_files(), 0);
}
