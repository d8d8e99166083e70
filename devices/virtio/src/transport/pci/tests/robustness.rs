//! Whatever a guest does, the function survives and can be used afterwards.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone, Copy)]
enum Place {
    Bar,
    Config,
    Ports,
}

fn any_access() -> impl Strategy<Value = (Place, u64, usize, bool, u64)> {
    let place = prop_oneof![4 => Just(Place::Bar), 2 => Just(Place::Config), 1 => Just(Place::Ports)];
    let offset = prop_oneof![
        6 => 0u64..0x40,
        2 => 0x40u64..0x100,
        1 => 0x1000u64..0x1004,
        1 => 0x2000u64..0x2010,
        1 => 0x3000u64..0x3010,
        2 => 0x4000u64..0x4040,
        1 => 0x7000u64..0x7010,
        1 => 0u64..0x8000,
    ];
    let len = prop::sample::select(vec![1usize, 2, 4, 8, 3, 0]);
    let value = prop_oneof![
        0u64..16,
        Just(u64::MAX),
        Just(OFFERED),
        any::<u64>(),
        (0u64..0x20).prop_map(|n| n << 12)
    ];
    (place, offset, len, any::<bool>(), value)
}

proptest! {
    #[test]
    fn no_access_panics_or_spoils_the_device(running in any::<bool>(), accesses in prop::collection::vec(any_access(), 1..128)) {
        let mut guest = Guest::new(3);
        if running {
            guest.start();
        }
        for (place, offset, len, write, value) in accesses {
            let (mmio, io) = (&guest.machine.mmio, &guest.machine.io);
            let data = &mut value.to_le_bytes()[..len];
            let at = match place {
                Place::Bar => guest.bar + offset,
                Place::Config => guest.ecam() + offset % 0x1000,
                Place::Ports => {
                    io.write(0xcf8, &(0x8000_0800 | offset as u32 & 0xfc).to_le_bytes()).expect("address");
                    let at = 0xcfc + (offset & 3);
                    let _ = if write { io.write(at, data) } else { io.read(at, data) };
                    continue;
                }
            };
            let _ = if write { mmio.write(at, data) } else { mmio.read(at, data) };
        }
        // Put back what a driver relies on; then everything works.
        guest.set_config(4, 2, 0);
        guest.set_config(0x10, 4, 0);
        guest.set_config(0x14, 4, WINDOW >> 32);
        guest.set_config(4, 2, 6);
        guest.find_bar();
        guest.set_config(guest.msix + 2, 2, 0x8000);
        guest.machine.memory.memory().write_slice(&[0; 0x4_0000], GuestAddress(0x1_0000)).expect("rings");
        guest.start();
        for vector in guest.vectors() {
            vector.take();
        }
        guest.offer(2);
        prop_assert_eq!(guest.serve(2), 1);
        prop_assert_eq!(guest.vectors().iter().map(|v| v.take()).sum::<u64>(), 1);
        prop_assert_eq!(guest.doorbells().len(), 3);
    }
}
