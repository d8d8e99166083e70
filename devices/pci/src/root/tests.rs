mod ports;
mod roots;

use proptest::prelude::*;

use super::*;
use crate::{Bars, ConfigPorts, ConfigSpace, Ecam, Identity, command};

const ECAM: u64 = 0xe800_0000;
const MEM64: BarKind = BarKind::Memory64 { prefetchable: true };

/// A function with a 64-bit memory BAR and an I/O BAR, that remembers where it was told they are.
struct Fake {
    config: Mutex<ConfigSpace>,
    tag: u8,
    told: Mutex<Vec<(u8, Option<u64>)>>,
    /// Where it sits, and whose wires it has.
    at: Mutex<Vec<(PciAddress, u8)>>,
    resets: Mutex<u32>,
    detached: Mutex<bool>,
}

impl Fake {
    fn new(tag: u8) -> Arc<Self> {
        let mut config = ConfigSpace::new(&Identity {
            vendor: 0x1234,
            device: u16::from(tag),
            revision: 0,
            class: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        config.add_bar(0, MEM64, 0x1000).expect("bar");
        config.add_bar(2, BarKind::Io, 0x20).expect("bar");
        Arc::new(Self {
            config: Mutex::new(config),
            tag,
            told: Mutex::default(),
            at: Mutex::default(),
            resets: Mutex::default(),
            detached: Mutex::default(),
        })
    }

    fn told(&self) -> Vec<(u8, Option<u64>)> {
        std::mem::take(&mut lock(&self.told))
    }
}

impl PciFunction for Fake {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4) && usize::from(offset).is_multiple_of(data.len()));
        lock(&self.config).read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4) && usize::from(offset).is_multiple_of(data.len()));
        lock(&self.config).write(offset, data);
    }
    fn bars(&self) -> Bars {
        lock(&self.config).bars()
    }
    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        data.fill(self.tag);
        Ok(())
    }
    fn bar_moved(&self, bar: u8, address: Option<u64>) {
        lock(&self.told).push((bar, address));
    }
    fn attach(&self, address: PciAddress, slot: u8) {
        lock(&self.at).push((address, slot));
    }
    fn reset(&self) {
        *lock(&self.resets) += 1;
    }
    fn detach(&self) {
        *lock(&self.detached) = true;
    }
}

struct Guest {
    root: Arc<PciRoot>,
    mmio: Arc<Bus>,
    io: Arc<Bus>,
}

impl Guest {
    fn new() -> Self {
        Self::with(BarAllocator {
            mmio32: 0xc000_0000..0xc010_0000,
            mmio64: 0x10_0000_0000..0x10_0010_0000,
            io: 0x1000..0x2000,
        })
    }

    fn with(windows: BarAllocator) -> Self {
        Self::with_roots(vec![windows])
    }

    fn with_roots(windows: Vec<BarAllocator>) -> Self {
        let (mmio, io) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let root = Arc::new(PciRoot::with_roots(0, mmio.clone(), io.clone(), windows));
        mmio.claim(ECAM, root.buses() * Ecam::BUS_LEN, Arc::new(Ecam::new(root.clone())))
            .expect("ecam");
        io.claim(
            ConfigPorts::BASE,
            ConfigPorts::LEN,
            Arc::new(ConfigPorts::new(root.clone())),
        )
        .expect("ports");
        Self { root, mmio, io }
    }

    fn add(&self, tag: u8) -> (PciAddress, Arc<Fake>) {
        let fake = Fake::new(tag);
        (self.root.add(fake.clone(), None).expect("slot"), fake)
    }

    fn config(&self, address: PciAddress, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio
            .read(ECAM + (u64::from(address.requester()) << 12) + offset, &mut data)
            .expect("ecam");
        u32::from_le_bytes(data)
    }

    fn set(&self, address: PciAddress, offset: u64, value: u32) {
        self.mmio
            .write(
                ECAM + (u64::from(address.requester()) << 12) + offset,
                &value.to_le_bytes(),
            )
            .expect("ecam");
    }

    fn ports(&self, address: u32, len: usize) -> u32 {
        self.io.write(0xcf8, &address.to_le_bytes()).expect("address");
        let mut data = [0; 4];
        self.io
            .read(0xcfc + u64::from(address & 3), &mut data[..len])
            .expect("data");
        u32::from_le_bytes(data)
    }

    fn who(&self, at: u64) -> Option<u8> {
        let mut data = [0];
        self.mmio.read(at, &mut data).ok().map(|()| data[0])
    }
}

#[test]
fn functions_answer_by_both_mechanisms_and_absent_ones_are_all_ones() {
    let guest = Guest::new();
    let (address, _) = guest.add(0x42);
    assert_eq!(address.to_string(), "0000:00:01.0");
    assert_eq!(guest.config(PciAddress::from_devfn(0, 0, 0), 0), 0x0d57_8086);
    assert_eq!(guest.config(address, 0), 0x0042_1234);
    assert_eq!(guest.config(PciAddress::from_devfn(0, 0, 16), 0), u32::MAX);
    assert_eq!(guest.ports(0x8000_0800, 4), 0x0042_1234);
    assert_eq!(guest.ports(0x8000_0802, 2), 0x42);
    assert_eq!(guest.ports(0x8001_0800, 4), u32::MAX, "bus 1");
    assert_eq!(guest.ports(0x0000_0800, 4), u32::MAX, "not enabled");
    let mut data = [0; 1];
    assert_eq!(guest.io.read(0xcf9, &mut data), Err(AccessError::BadAccess));
    assert_eq!(guest.config(address, 0x100), 0, "no extended capabilities");
}

#[test]
fn the_last_slot_is_like_the_others_and_the_guests_first_look_is_noted() {
    let m = Guest::new();
    let all: Vec<_> = (1..32).map(|tag| m.add(tag).0).collect();
    let last = all[30];
    assert_eq!(last.device(), 31);
    assert!(!m.root.touched(last));
    assert_eq!(m.config(last, 0) >> 16, 31);
    assert!(m.root.touched(last) && !m.root.touched(all[29]));
    let full = m.root.add(Fake::new(99), None).expect_err("full");
    assert_eq!(full, AddError::Full(0));
}

#[test]
fn reserved_slots_go_to_who_wants_them_and_functions_share_one() {
    let guest = Guest::new();
    guest.root.reserve([1, 3]);
    assert_eq!((guest.add(1).0.device(), guest.add(2).0.device()), (2, 4));
    let place = |function| PciAddress::new(0, 0, 3, function).expect("address");
    // In whatever order they come.
    assert_eq!(guest.root.add(Fake::new(4), Some(place(1))), Ok(place(1)));
    assert_eq!(guest.config(place(1), 0x0c) & 0x80_0000, 0);
    assert_eq!(guest.root.add(Fake::new(3), Some(place(0))), Ok(place(0)));
    assert_eq!(
        guest.config(place(0), 0x0c) & 0x80_0000,
        0x80_0000,
        "it says that it has more"
    );
    assert_eq!(guest.config(place(1), 0) >> 16, 4);
    guest.root.remove(place(1)).expect("present");
    assert_eq!(guest.config(place(0), 0x0c) & 0x80_0000, 0);
}

#[test]
fn slots_are_given_and_taken() {
    let guest = Guest::new();
    let wanted = PciAddress::new(0, 0, 5, 0).expect("address");
    assert_eq!(guest.root.add(Fake::new(1), Some(wanted)), Ok(wanted));
    assert_eq!(guest.root.add(Fake::new(1), Some(wanted)), Err(AddError::Taken(wanted)));
    let other = PciAddress::new(0, 1, 5, 0).expect("address");
    assert_eq!(guest.root.add(Fake::new(1), Some(other)), Err(AddError::NoBus(other)));
    let given: Vec<_> = (0..30).map(|i| guest.add(i).0.device()).collect();
    assert!(!given.contains(&5) && !given.contains(&0));
    assert_eq!(guest.root.add(Fake::new(1), None), Err(AddError::Full(0)));
    guest.root.remove(wanted).expect("present");
    assert_eq!(guest.root.remove(wanted).err(), Some(RemoveError::Absent(wanted)));
    assert_eq!(guest.root.add(Fake::new(1), None), Ok(wanted));
    let bridge = PciAddress::from_devfn(0, 0, 0);
    assert_eq!(guest.root.remove(bridge).err(), Some(RemoveError::Absent(bridge)));
}

#[test]
fn a_second_function_shows_in_the_header_type() {
    let guest = Guest::new();
    let (first, _) = guest.add(1);
    assert_eq!(guest.config(first, 0x0c) >> 16, 0);
    let second = PciAddress::from_devfn(0, 0, first.devfn() + 1);
    guest.root.add(Fake::new(2), Some(second)).expect("function 1");
    assert_eq!(guest.config(first, 0x0c) >> 16, 0x80);
    assert_eq!(guest.config(second, 0x0c) >> 16, 0);
}

#[test]
fn bars_follow_command_and_registers() {
    let guest = Guest::new();
    let (address, fake) = guest.add(7);
    let home = 0x10_0000_0000;
    assert_eq!(guest.config(address, 0x14), 0x10);
    assert_eq!(guest.who(home), None);
    guest.set(address, 4, u32::from(command::MEMORY | command::IO));
    assert_eq!(guest.who(home + 0xfff), Some(7));
    assert_eq!(fake.told(), [(0, Some(home)), (2, Some(0x1000))]);
    let mut port = [0];
    guest.io.read(0x101f, &mut port).expect("I/O BAR");
    guest.set(address, 0x10, 0x8000);
    assert_eq!((guest.who(home), guest.who(home + 0x8000)), (None, Some(7)));
    assert_eq!(fake.told(), [(0, Some(home + 0x8000))]);
    guest.set(address, 4, 0);
    assert_eq!(guest.who(home + 0x8000), None);
    assert_eq!(guest.io.read(0x1000, &mut port), Err(AccessError::Unclaimed));
    assert_eq!(fake.told(), [(0, None), (2, None)]);
}

#[test]
fn sizing_with_decoding_on_leaves_the_bar_where_it_was() {
    let guest = Guest::new();
    let (address, _) = guest.add(7);
    guest.set(address, 4, u32::from(command::MEMORY));
    let (low, high) = (guest.config(address, 0x10), guest.config(address, 0x14));
    guest.set(address, 0x10, u32::MAX);
    assert_eq!(guest.config(address, 0x10), 0xffff_f00c);
    guest.set(address, 0x10, low);
    guest.set(address, 0x14, u32::MAX);
    assert_eq!(guest.config(address, 0x14), u32::MAX);
    assert_eq!(guest.who(0x10_0000_0000), None);
    guest.set(address, 0x14, high);
    assert_eq!(guest.who(0x10_0000_0000), Some(7));
}

#[test]
fn overlaps_and_strange_places_are_not_decoded_until_they_are_free() {
    let guest = Guest::new();
    let ((a, _), (b, fake)) = (guest.add(1), guest.add(2));
    let (at_a, at_b) = (0x10_0000_0000, 0x10_0000_1000);
    for address in [a, b] {
        guest.set(address, 4, u32::from(command::MEMORY));
    }
    assert_eq!((guest.who(at_a), guest.who(at_b)), (Some(1), Some(2)));
    fake.told();
    guest.set(b, 0x10, at_a as u32);
    assert_eq!((guest.who(at_a), guest.who(at_b)), (Some(1), None));
    assert_eq!(fake.told(), [(0, None)]);
    guest.set(a, 0x10, 0x5000);
    assert_eq!(
        (guest.who(at_a), guest.who(at_a + 0x5000)),
        (Some(2), Some(1)),
        "the place became free"
    );
    guest.set(b, 0x14, 0);
    assert_eq!(guest.who(0), None, "outside of the windows");
    guest.set(b, 0x10, ECAM as u32);
    assert_eq!(guest.config(a, 0), 0x0001_1234, "ECAM cannot be taken over");
    guest.set(b, 0x10, 0xc000_0000);
    assert_eq!(guest.who(0xc000_0000), Some(2), "a 64-bit BAR may sit below 4 GiB");
    guest.set(b, 0x14, (at_a >> 32) as u32);
    guest.set(b, 0x10, 0x5000);
    assert_eq!(guest.who(at_a + 0x5000), Some(1));
    guest.root.remove(a).expect("present");
    assert_eq!(guest.who(at_a + 0x5000), Some(2), "removal makes place too");
}

#[test]
fn removal_frees_addresses_and_a_moved_bar_is_respected() {
    let guest = Guest::new();
    let (a, fake) = guest.add(1);
    guest.set(a, 4, u32::from(command::MEMORY));
    guest.set(a, 0x10, 0x1000);
    let (b, _) = guest.add(2);
    assert_eq!(
        guest.config(b, 0x10) & !0xf,
        0x2000,
        "neither the first place of the other nor its present one"
    );
    fake.told();
    guest.root.remove(a).expect("present");
    assert_eq!(guest.who(0x10_0000_1000), None);
    assert_eq!(fake.told(), [(0, None)]);
    assert!(*lock(&fake.detached));
    let (c, _) = guest.add(3);
    assert_eq!(guest.config(c, 0x10) & !0xf, 0);
}

#[test]
fn a_function_may_bring_its_addresses() {
    let guest = Guest::new();
    let restored = |tag| {
        let fake = Fake::new(tag);
        fake.config_write(0x10, &0x9000u32.to_le_bytes());
        fake.config_write(0x14, &0x10u32.to_le_bytes());
        fake.config_write(4, &[2]);
        fake
    };
    guest.root.add(restored(1), None).expect("free");
    assert_eq!(guest.who(0x10_0000_9000), Some(1));
    let late = restored(2);
    late.config_write(4, &[3]);
    let again = guest.root.add(late.clone(), None);
    let address = 0x10_0000_9000;
    let ports = late.bars()[2].expect("I/O BAR").address;
    assert_eq!(
        guest.io.read(ports, &mut [0]),
        Err(AccessError::Unclaimed),
        "nothing is left of it"
    );
    assert!(*lock(&late.detached));
    assert_eq!(again, Err(AddError::Decode { bar: 0, address }));
    assert_eq!(guest.who(address), Some(1));
}

#[test]
fn full_windows_are_an_error() {
    let guest = Guest::new();
    let huge = Fake::new(1);
    lock(&huge.config).add_bar(4, MEM64, 0x40_0000).expect("bar");
    let refused = guest.root.add(huge, None);
    assert_eq!(
        refused,
        Err(AddError::NoRoom {
            bar: 4,
            size: 0x40_0000
        })
    );
    assert_eq!(guest.add(2).0.device(), 1);
}

proptest! {
    #[test]
    fn nothing_a_guest_does_to_configuration_space_panics_or_leaves_two_claims(
        accesses in prop::collection::vec(
            (0u64..4, prop_oneof![0u64..0x30, 0u64..0x1000], prop::sample::select(vec![1usize, 2, 3, 4, 8]), any::<u64>()), 1..64)
    ) {
        let guest = Guest::new();
        let fakes = [guest.add(1), guest.add(2)];
        for (device, offset, len, value) in accesses {
            let at = ECAM + (device << 15) + offset;
            let _ = guest.mmio.write(at, &value.to_le_bytes()[..len]);
            let _ = guest.mmio.read(at, &mut vec![0; len]);
            let _ = guest.io.write(0xcf8, &(0x8000_0000 | (device as u32) << 11 | offset as u32).to_le_bytes());
            let _ = guest.io.write(0xcfc + (offset & 3), &value.to_le_bytes()[..len]);
        }
        for (address, _) in fakes {
            guest.root.remove(address).expect("present");
        }
        // Everything was given back: both buses take claims over the whole windows.
        let claim = Arc::new(Ecam::new(guest.root.clone()));
        guest.mmio.claim(0xc000_0000, 0x10_0000, claim.clone()).expect("mmio32 is free");
        guest.mmio.claim(0x10_0000_0000, 0x10_0000, claim.clone()).expect("mmio64 is free");
        guest.io.claim(0x1000, 0x1000, claim).expect("io is free");
    }
}
