//! Root buses beside bus 0.

use super::ports::{at, bar, with_bars};
use super::*;

fn guest() -> Guest {
    let windows = BarAllocator {
        mmio32: 0xc000_0000..0xcc00_0000,
        mmio64: 0x10_0000_0000..0x10_4000_0000,
        io: 0x1000..0x2000,
    };
    Guest::with_roots(windows.divided(3))
}

fn function(tag: u8) -> Arc<Fake> {
    with_bars(tag, &[(0, MEM64, 0x10_0000)])
}

fn decode(m: &Guest, address: PciAddress) {
    m.set(address, 4, u32::from(command::MEMORY));
}

#[test]
fn each_root_bus_has_its_slots_and_its_windows() {
    let m = guest();
    assert_eq!(m.root.buses(), 96);
    let (zero, two) = (function(1), function(2));
    assert_eq!(m.root.add(zero.clone(), None), Ok(at(0, 1, 0)));
    let place = m.root.free_place(2, false).expect("a slot");
    assert_eq!(place, at(64, 1, 0));
    assert_eq!(m.root.add(two.clone(), Some(place)), Ok(place));
    assert_eq!(*lock(&two.at), [(place, 65)], "its pin has the wires of slot 1");
    assert_eq!((m.config(place, 0), m.config(at(32, 1, 0), 0)), (0x0002_1234, u32::MAX));
    assert_eq!(m.config(at(64, 0, 0), 0), u32::MAX, "no host bridge");
    assert_eq!(m.ports(0x8040_0800, 4), 0x0002_1234);
    let mine = m.root.windows()[2].mmio64.clone();
    assert!(mine.contains(&bar(&two, 0)) && m.root.windows()[0].mmio64.contains(&bar(&zero, 0)));
    decode(&m, place);
    assert_eq!(m.who(bar(&two, 0)), Some(2));
    m.set(place, 0x10, mine.start as u32 - 0x10_0000);
    assert_eq!(m.who(mine.start - 0x10_0000), None, "another bus' window");
    m.set(place, 0x10, mine.start as u32 + 0x20_0000);
    assert_eq!(m.who(mine.start + 0x20_0000), Some(2));
    m.root.remove(place).expect("there");
    assert_eq!((m.config(place, 0), m.who(mine.start + 0x20_0000)), (u32::MAX, None));
}

#[test]
fn ports_are_on_root_buses_with_their_own_numbers_below() {
    let m = guest();
    let place = m.root.free_place(1, true).expect("a slot");
    assert_eq!(place, at(33, 0, 0));
    let fake = function(7);
    assert_eq!(m.root.add(fake.clone(), Some(place)), Ok(place));
    let port = at(32, 1, 0);
    assert_eq!((m.config(port, 0), m.config(port, 0x18)), (0x000c_1b36, 0x0021_2120));
    assert_eq!(m.config(place, 0), 0x0007_1234);
    assert!(m.root.windows()[1].mmio64.contains(&bar(&fake, 0)));
    decode(&m, place);
    assert_eq!(m.who(bar(&fake, 0)), Some(7));
    assert_eq!(m.root.remove(port).err(), Some(RemoveError::Absent(port)));
    let saved = m.root.ports();
    assert_eq!(saved.iter().map(|(slot, _)| *slot).collect::<Vec<_>>(), [33]);
    // The guest's numbers are its own.
    m.set(port, 0x18, 0x0028_2820);
    assert_eq!((m.config(at(40, 0, 0), 0), m.config(place, 0)), (0x0007_1234, u32::MAX));
    assert_eq!(lock(&fake.at).last(), Some(&(at(40, 0, 0), 33)));
    let other = guest();
    other.root.restore_port(33, &saved[0].1).expect("a port");
    assert_eq!(other.config(port, 0x18), 0x0021_2120);
    assert!(other.root.restore_port(64, &saved[0].1).is_err() && other.root.restore_port(97, &saved[0].1).is_err());
    m.root.remove(place).expect("there");
    assert_eq!(m.config(port, 0), u32::MAX);
}

#[test]
fn places_that_are_none_are_refused() {
    let m = guest();
    for wrong in [at(64, 0, 0), at(96, 1, 0), at(97, 0, 0), at(33, 1, 0)] {
        assert_eq!(m.root.add(function(1), Some(wrong)), Err(AddError::NoBus(wrong)));
    }
    m.root.reserve([33]);
    for slot in 2..32 {
        let place = m.root.free_place(1, false).expect("a slot");
        assert_eq!((place.bus(), place.device()), (32, slot));
        m.root.add(function(slot), Some(place)).expect("a function");
    }
    assert_eq!(m.root.free_place(1, false), Err(AddError::FullBus(32)));
    assert_eq!(m.root.free_place(2, true), Ok(at(65, 0, 0)));
}
