//! Root ports and what is below them.

use super::*;
use crate::root::ports::passes;

const BUSES: u64 = 0x18;
const MEMORY_WINDOW: u64 = 0x20;
const CONTROL: u64 = 0x3c;

fn guest() -> Guest {
    Guest::with(BarAllocator {
        mmio32: 0xc000_0000..0xc100_0000,
        mmio64: 0x10_0000_0000..0x10_1000_0000,
        io: 0x1000..0x2000,
    })
}

pub(super) fn at(bus: u8, device: u8, function: u8) -> PciAddress {
    PciAddress::new(0, bus, device, function).expect("address")
}

/// A function with a BAR of each kind.
pub(super) fn with_bars(tag: u8, bars: &[(usize, BarKind, u64)]) -> Arc<Fake> {
    let fake = Fake::new(tag);
    let mut config = ConfigSpace::new(&Identity {
        vendor: 0x1234,
        device: u16::from(tag),
        revision: 0,
        class: 0,
        subsystem_vendor: 0,
        subsystem: 0,
    });
    for (index, kind, size) in bars {
        config.add_bar(*index, *kind, *size).expect("bar");
    }
    *lock(&fake.config) = config;
    fake
}

pub(super) fn bar(fake: &Fake, index: usize) -> u64 {
    fake.bars()[index].expect("bar").address
}

#[test]
fn a_port_comes_with_what_is_below_it_and_goes_with_the_last_of_that() {
    let m = guest();
    m.add(1);
    let place = m.root.free_place(0, true).expect("a slot");
    assert_eq!(place, at(2, 0, 0));
    let fake = Fake::new(7);
    assert_eq!(m.root.add(fake.clone(), Some(place)), Ok(place));
    assert_eq!(
        *lock(&fake.at),
        [(place, 2)],
        "its pin has the wires of the port's slot"
    );
    assert_eq!(m.config(at(0, 2, 0), 0), 0x000c_1b36);
    assert_eq!(m.config(at(0, 2, 0), BUSES), 0x0002_0200);
    assert_eq!(m.config(place, 0), 0x0007_1234);
    assert_eq!(m.ports(0x8002_0000, 4), 0x0007_1234);
    assert_eq!(m.config(at(1, 0, 0), 0), u32::MAX, "no such bus");
    assert_eq!(m.config(at(2, 1, 0), 0), u32::MAX, "a link has one device");
    assert!(m.root.touched(place));
    // Slots are on bus 0 or below a port.
    for (wrong, error) in [
        (at(0, 2, 1), AddError::NoBus(at(0, 2, 1))),
        (at(1, 0, 0), AddError::NoBus(at(1, 0, 0))),
        (at(3, 1, 0), AddError::NoBus(at(3, 1, 0))),
        (at(32, 0, 0), AddError::NoBus(at(32, 0, 0))),
        (place, AddError::Taken(place)),
    ] {
        assert_eq!(m.root.add(Fake::new(8), Some(wrong)), Err(error));
    }
    let port = at(0, 2, 0);
    assert_eq!(m.root.remove(port).err(), Some(RemoveError::Absent(port)));
    let second = at(2, 0, 1);
    m.root.add(Fake::new(9), Some(second)).expect("a function");
    assert_eq!(m.config(place, 0x0c) & 0x80_0000, 0x80_0000);
    m.root.remove(place).expect("there");
    assert_eq!(m.config(port, 0) >> 16, 0x000c);
    m.root.remove(second).expect("there");
    assert_eq!(m.config(port, 0), u32::MAX);
    assert_eq!(m.root.free_place(0, true), Ok(place));
}

#[test]
fn what_is_below_is_found_by_the_number_that_the_guest_gives_the_bus() {
    let m = guest();
    let (one, two) = (Fake::new(1), Fake::new(2));
    m.root.add(one.clone(), Some(at(4, 0, 0))).expect("a port");
    m.root.add(two.clone(), Some(at(5, 0, 0))).expect("a port");
    // Linux may number anew: first none, then one after the other.
    m.set(at(0, 4, 0), BUSES, 0);
    m.set(at(0, 5, 0), BUSES, 0);
    assert_eq!(m.config(at(4, 0, 0), 0), u32::MAX);
    m.set(at(0, 4, 0), BUSES, 0x0001_0100);
    m.set(at(0, 5, 0), BUSES, 0x0004_0400);
    assert_eq!(m.config(at(1, 0, 0), 0) >> 16, 1);
    assert_eq!(m.config(at(4, 0, 0), 0) >> 16, 2, "not the one in slot 4");
    assert_eq!(lock(&one.at).last(), Some(&(at(1, 0, 0), 4)));
    assert_eq!(lock(&two.at).last(), Some(&(at(4, 0, 0), 5)));
    assert!(m.root.touched(at(5, 0, 0)), "for the VMM it is where it was");
    m.root.remove(at(5, 0, 0)).expect("there");
}

#[test]
fn bars_below_lie_in_the_windows_and_are_decoded_only_there() {
    let m = guest();
    let mem32 = BarKind::Memory32 { prefetchable: false };
    let slow = BarKind::Memory64 { prefetchable: false };
    let fake = with_bars(
        1,
        &[
            (0, slow, 0x4000),
            (2, MEM64, 0x20_0000),
            (4, mem32, 0x10_0000),
            (5, BarKind::Io, 0x20),
        ],
    );
    let (place, port) = (at(1, 0, 0), at(0, 1, 0));
    m.root.add(fake.clone(), Some(place)).expect("room");
    // The larger first, both in the window for any memory.
    assert_eq!((bar(&fake, 4), bar(&fake, 0)), (0xc000_0000, 0xc010_0000));
    assert_eq!(m.config(port, MEMORY_WINDOW), 0xc010_c000);
    assert_eq!(bar(&fake, 2), 0x10_0000_0000);
    assert_eq!((m.config(port, 0x24), m.config(port, 0x28)), (0x0011_0001, 0x10));
    assert_eq!(bar(&fake, 5), 0, "no ports pass");
    m.set(place, 4, 7);
    assert_eq!(m.who(0xc010_0000), Some(1), "the port comes switched on");
    m.set(port, 4, 0);
    assert_eq!(m.who(0xc010_0000), None);
    m.set(port, 4, 6);
    assert_eq!((m.who(0xc010_0000), m.who(0x10_001f_ffff)), (Some(1), Some(1)));
    // A window that is too small, and one that comes back.
    m.set(port, MEMORY_WINDOW, 0xc000_c000);
    assert_eq!((m.who(0xc010_0000), m.who(0xc000_0000)), (None, Some(1)));
    m.set(port, MEMORY_WINDOW, 0xc010_c000);
    assert_eq!(m.who(0xc010_0000), Some(1));
    m.set(port, 4, 0);
    assert_eq!((m.who(0xc010_0000), m.who(0x10_0000_0000)), (None, None));
    // What comes to bus 0 stays out of the windows, also of those that a guest has moved.
    m.set(port, 0x24, 0x0041_0031);
    m.set(port, 4, 6);
    let (_, other) = m.add(2);
    assert_eq!(bar(&other, 0), 0x10_0020_0000);
    let large = with_bars(3, &[(0, MEM64, 0x20_0000)]);
    m.root.add(large.clone(), None).expect("room");
    assert_eq!(bar(&large, 0), 0x10_0060_0000);
}

#[test]
fn functions_of_a_slot_share_its_windows_and_what_has_no_room_leaves_nothing() {
    let m = guest();
    let audio = with_bars(1, &[(0, BarKind::Memory32 { prefetchable: false }, 0x4000)]);
    m.root.add(audio.clone(), Some(at(3, 0, 1))).expect("room");
    let gpu = with_bars(
        2,
        &[
            (0, BarKind::Memory32 { prefetchable: false }, 0x20_0000),
            (2, MEM64, 0x400_0000),
        ],
    );
    m.root.add(gpu.clone(), Some(at(3, 0, 0))).expect("room");
    assert_eq!((bar(&gpu, 0), bar(&audio, 0)), (0xc000_0000, 0xc020_0000));
    assert_eq!(m.config(at(0, 3, 0), MEMORY_WINDOW), 0xc020_c000);
    assert_eq!(m.config(at(3, 0, 1), 0) >> 16, 1);
    let huge = with_bars(4, &[(0, MEM64, 0x2000_0000)]);
    let error = m.root.add(huge, Some(at(4, 0, 0))).expect_err("no room");
    assert_eq!(
        error,
        AddError::NoRoom {
            bar: 0,
            size: 0x2000_0000
        }
    );
    assert_eq!(m.config(at(0, 4, 0), 0), u32::MAX, "and no port");
}

#[test]
fn a_reset_of_the_bus_below_is_one_of_what_is_there() {
    let m = guest();
    let fake = Fake::new(1);
    m.root.add(fake.clone(), Some(at(1, 0, 0))).expect("room");
    for (value, resets) in [(0x40_0000, 1), (0x40_0000, 1), (0, 1), (0x40_0000, 2)] {
        m.set(at(0, 1, 0), CONTROL, value);
        assert_eq!(*lock(&fake.resets), resets);
    }
}

#[test]
fn a_port_goes_on_with_what_was_saved() {
    let m = guest();
    let (place, port) = (at(6, 0, 0), at(0, 6, 0));
    let fake = Fake::new(1);
    m.root.add(fake.clone(), Some(place)).expect("room");
    m.set(port, BUSES, 0x0002_0200);
    m.set(port, 4, 6);
    m.set(at(2, 0, 0), 4, 6);
    let saved = m.root.ports();
    assert_eq!(saved.iter().map(|(slot, _)| *slot).collect::<Vec<_>>(), [6]);
    let there = guest();
    there.root.restore_port(6, &saved[0].1).expect("free");
    assert!(there.root.restore_port(6, &saved[0].1).is_err() && there.root.restore_port(0, &[]).is_err());
    let moved = Fake::new(1);
    let state = lock(&fake.config).save();
    lock(&moved.config).restore(&state).expect("the same function");
    there.root.add(moved.clone(), Some(place)).expect("room");
    assert_eq!(*lock(&moved.at), [(at(2, 0, 0), 6)], "as the guest calls the bus");
    assert_eq!(there.who(bar(&fake, 0)), Some(1));
    assert_eq!(there.root.ports(), saved);
    there.root.touch(place);
    assert!(there.root.touched(place));
}

proptest! {
    #[test]
    fn whatever_a_guest_writes_into_a_port_is_contained(
        writes in prop::collection::vec((0u64..0x44, any::<u32>(), any::<bool>()), 1..64)
    ) {
        let m = guest();
        let fake = Fake::new(1);
        m.root.add(fake.clone(), Some(at(1, 0, 0))).expect("room");
        m.add(2);
        for (register, value, port) in writes {
            let bus = (m.config(at(0, 1, 0), BUSES) >> 8) as u8;
            let target = if port { at(0, 1, 0) } else { at(bus & 31, 0, 0) };
            m.set(target, register & !3, value);
            let claimed = fake.bars()[0].expect("bar");
            if let Some((first, _)) = claimed.span() && m.who(first) == Some(1) {
                prop_assert!(claimed.decoded);
            }
        }
        prop_assert!(passes(None, &fake.bars()[0].expect("bar")));
        m.root.remove(at(1, 0, 0)).expect("there");
        prop_assert_eq!(m.config(at(0, 1, 0), 0), u32::MAX);
    }
}
