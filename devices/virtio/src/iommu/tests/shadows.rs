//! Devices that reach memory by themselves follow.

use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};

use super::{RW, access, mapping, with};
use crate::iommu::domains::Domains;
use crate::iommu::request::{Request, ReservedRegion, Status};
use crate::iommu::shared::Shared;
use crate::iommu::{Shadow, VirtioIommuStateV1, bit};

/// What it reaches: everything, or these.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Reach {
    All,
    Mapped(Vec<(u64, u64, u64, bool)>),
}

struct Recorder {
    reach: Mutex<Reach>,
    /// How many more mappings there is room for.
    room: Mutex<usize>,
}

impl Recorder {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            reach: Mutex::new(Reach::Mapped(Vec::new())),
            room: Mutex::new(usize::MAX),
        })
    }

    fn reach(&self) -> Reach {
        self.reach.lock().unwrap().clone()
    }
}

impl Shadow for Recorder {
    fn reach_all(&self) -> io::Result<()> {
        *self.reach.lock().unwrap() = Reach::All;
        Ok(())
    }

    fn reach_nothing(&self) {
        *self.reach.lock().unwrap() = Reach::Mapped(Vec::new());
    }

    fn map(&self, iovas: RangeInclusive<u64>, phys: u64, writable: bool) -> io::Result<()> {
        let mut room = self.room.lock().unwrap();
        *room = room.checked_sub(1).ok_or(io::ErrorKind::OutOfMemory)?;
        match &mut *self.reach.lock().unwrap() {
            Reach::All => panic!("it reaches everything"),
            Reach::Mapped(mapped) => mapped.push((*iovas.start(), *iovas.end(), phys, writable)),
        }
        Ok(())
    }

    fn unmap(&self, iovas: RangeInclusive<u64>) {
        if let Reach::Mapped(mapped) = &mut *self.reach.lock().unwrap() {
            mapped.retain(|(first, last, ..)| !(iovas.contains(first) && iovas.contains(last)));
        }
    }

    fn gaps(&self) -> Vec<RangeInclusive<u64>> {
        vec![0xfee0_0000..=0xfeef_ffff, 1 << 39..=(1 << 48) - 1]
    }
}

fn nothing() -> Reach {
    Reach::Mapped(Vec::new())
}

fn shadowed(domains: &mut Domains, endpoint: u32) -> Arc<Recorder> {
    let recorder = Recorder::new();
    domains.add(endpoint, Some(recorder.clone())).expect("it follows");
    recorder
}

#[test]
fn what_reaches_memory_by_itself_follows_its_domain() {
    let mut domains = with(&[16]);
    let device = shadowed(&mut domains, 8);
    assert_eq!(device.reach(), Reach::All, "nobody has said anything");
    assert_eq!(domains.attach(8, 1, false), Ok(()));
    assert_eq!(device.reach(), nothing());
    assert_eq!(domains.map(1, &mapping(0x1000, 0x2fff, 0x5000, RW)), Ok(()));
    assert_eq!(domains.map(1, &mapping(0x8000, 0x8fff, 0, access::READ)), Ok(()));
    let both = vec![(0x1000, 0x2fff, 0x5000, true), (0x8000, 0x8fff, 0, false)];
    assert_eq!(device.reach(), Reach::Mapped(both.clone()));
    // What is refused changes nothing, and a domain of others neither.
    assert_eq!(domains.map(1, &mapping(0x1000, 0x1fff, 0, RW)), Err(Status::Invalid));
    assert_eq!(domains.unmap(1, 0x1000, 0x1fff), Err(Status::Range));
    assert_eq!(domains.attach(16, 2, false), Ok(()));
    assert_eq!(domains.map(2, &mapping(0x1000, 0x1fff, 0, RW)), Ok(()));
    assert_eq!(device.reach(), Reach::Mapped(both));
    assert_eq!(domains.unmap(1, 0, 0x2fff), Ok(()));
    assert_eq!(device.reach(), Reach::Mapped(vec![(0x8000, 0x8fff, 0, false)]));
    // From one domain to another, and to one that passes.
    assert_eq!(domains.attach(8, 2, false), Ok(()));
    assert_eq!(device.reach(), Reach::Mapped(vec![(0x1000, 0x1fff, 0, true)]));
    assert_eq!(domains.attach(8, 3, true), Ok(()));
    assert_eq!(device.reach(), Reach::All);
    domains.set_bypass(false);
    assert_eq!(device.reach(), Reach::All, "its domain passes");
    assert_eq!(domains.detach(8, 3), Ok(()));
    assert_eq!(device.reach(), nothing());
    domains.set_bypass(true);
    assert_eq!(device.reach(), Reach::All);
    domains.set_strict(true);
    assert_eq!(device.reach(), nothing());
    assert_eq!(domains.attach(8, 2, false), Ok(()));
    domains.reset();
    assert_eq!(device.reach(), Reach::All, "the driver is gone");
    domains.remove(8);
    assert_eq!(device.reach(), nothing());
}

#[test]
fn a_mapping_that_one_cannot_have_none_has() {
    let mut domains = with(&[]);
    let (first, second) = (shadowed(&mut domains, 8), shadowed(&mut domains, 16));
    for endpoint in [8, 16] {
        assert_eq!(domains.attach(endpoint, 1, false), Ok(()));
    }
    *second.room.lock().unwrap() = 1;
    assert_eq!(domains.map(1, &mapping(0, 0xfff, 0, RW)), Ok(()));
    assert_eq!(domains.map(1, &mapping(0x1000, 0x1fff, 0, RW)), Err(Status::NoMemory));
    let one = Reach::Mapped(vec![(0, 0xfff, 0, true)]);
    assert_eq!((first.reach(), second.reach()), (one.clone(), one.clone()));
    assert_eq!(domains.count().2, 1);
    assert!(domains.translate(8, 0x1000, 1, false, 1).is_err());
    // Who cannot follow into a domain is not in it, and reaches nothing while nobody passes.
    assert_eq!(domains.attach(16, 2, false), Ok(()));
    domains.set_bypass(false);
    assert_eq!(domains.attach(16, 1, false), Err(Status::NoMemory));
    assert_eq!((first.reach(), second.reach()), (one, nothing()));
    assert_eq!(domains.detach(16, 1), Err(Status::Invalid));
    *second.room.lock().unwrap() = 1;
    assert_eq!(domains.attach(16, 1, false), Ok(()));
}

#[test]
fn one_that_comes_to_saved_domains_follows() {
    let mut before = with(&[8]);
    assert_eq!(before.attach(8, 1, false), Ok(()));
    assert_eq!(before.map(1, &mapping(0x1000, 0x1fff, 0x7000, RW)), Ok(()));
    let saved = VirtioIommuStateV1 {
        bypass: before.bypass(),
        domains: before.save(),
    };
    let mut after = Domains::new();
    after.restore(saved.bypass, &saved.domains).expect("as it was");
    let device = shadowed(&mut after, 8);
    assert_eq!(device.reach(), Reach::Mapped(vec![(0x1000, 0x1fff, 0x7000, true)]));
}

#[test]
fn the_driver_is_told_what_a_device_cannot_use() {
    let messages = ReservedRegion::Messages(0xfee0_0000..=0xfeef_ffff);
    let shared = Shared::new(vec![messages]).expect("an event");
    shared.change().add(8, None).expect("nothing follows");
    shadowed(&mut shared.change(), 16);
    let probe = |endpoint| {
        let told = shared.serve(Request::Probe { endpoint }, bit::ALL).expect("properties");
        let told = told.expect("properties");
        let regions = told.chunks_exact(24).take_while(|region| region[0] != 0);
        let region = |at: &[u8]| (at[4], u64::from_le_bytes(at[8..16].try_into().expect("8 bytes")));
        regions.map(region).collect::<Vec<_>>()
    };
    assert_eq!(probe(8), [(1, 0xfee0_0000)]);
    assert_eq!(probe(16), [(1, 0xfee0_0000), (0, 1 << 39)], "once each");
}
