//! What a driver finds.

use triarch_device_core::AccessError;

use super::*;

#[test]
fn identity_is_that_of_a_modern_device() {
    let guest = Guest::new(1);
    assert_eq!(guest.config(0, 4), 0x1042_1af4);
    assert_eq!(guest.config(8, 4), 0x0100_0001, "class and revision");
    assert_eq!(guest.config(0x2c, 4), 0x1042_1af4);
    assert_eq!(guest.config(0x3d, 1), 0, "no interrupt pin");
    assert_eq!(guest.config(0x10, 4) & 0xf, 0xc, "64-bit and prefetchable");
    assert_eq!(guest.bar, WINDOW);
    assert_eq!(guest.config(guest.msix + 2, 2), 0x8001, "two vectors");
}

#[test]
fn both_configuration_mechanisms_reach_it() {
    let guest = Guest::new(1);
    put(&guest.machine.io, 0xcf8, 4, 0x8000_0800);
    assert_eq!(get(&guest.machine.io, 0xcfc, 4), 0x1042_1af4);
}

#[test]
fn the_whole_way_to_a_working_queue() {
    let guest = Guest::new(2);
    let c = guest.common;
    guest.set_status(0);
    guest.set_status(1);
    guest.set_status(3);
    let mut features = 0;
    for half in 0..2 {
        guest.put(c, 4, half);
        features |= guest.get(c + 4, 4) << (32 * half);
    }
    assert_eq!(features, OFFERED);
    guest.put(c, 4, 2);
    assert_eq!(guest.get(c + 4, 4), 0, "nothing past bit 63");
    let chosen = feature::VERSION_1 | TYPE_FEATURE;
    guest.acknowledge(chosen);
    guest.set_status(11);
    assert_eq!(guest.status(), 11);
    assert_eq!(guest.get(c + 0x12, 2), 2, "queues");
    guest.put(c + 0x16, 2, 1);
    assert_eq!(guest.get(c + 0x18, 2), u64::from(QUEUE_SIZE));
    assert_eq!(guest.get(c + 0x1c, 2), 0);
    assert_eq!(guest.get(c + 0x1e, 2), 1, "notify offset");
    guest.put(c + 0x16, 2, 2);
    assert_eq!(guest.get(c + 0x18, 2), 0, "no such queue");
    guest.set_up(1);
    assert_eq!(guest.get(c + 0x20, 8), ring(1));
    assert_eq!((guest.get(c + 0x18, 2), guest.get(c + 0x1c, 2)), (8, 1));
    assert!(guest.doorbells().is_empty());
    guest.unmask(2);
    assert_eq!(guest.calls(), [Call::Reset], "nothing starts before DRIVER_OK");
    guest.set_status(15);
    assert_eq!(guest.calls(), [Call::Activate(chosen), Call::Start(1)]);
    assert_eq!(guest.doorbells(), [guest.bar + guest.notify + guest.multiplier]);
    guest.offer(1);
    assert_eq!(guest.serve(1), 1);
    assert_eq!(guest.used(1), 1);
    assert_eq!(guest.vectors().len(), 1, "only the vector in use was made");
    assert_eq!(guest.vectors()[0].take(), 1);
    assert_eq!(guest.get(guest.isr, 1), 0, "MSI-X does not touch the ISR");
}

#[test]
fn the_device_has_its_own_configuration() {
    let guest = Guest::new(1);
    guest.log().config = [1, 2, 3, 4, 5, 6, 7, 8];
    assert_eq!(guest.get(guest.device, 8), 0x0807_0605_0403_0201);
    assert_eq!(guest.get(guest.device + 6, 4), 0x0807, "zero past its end");
    guest.put(guest.device + 1, 2, 0xaabb);
    assert_eq!(guest.log().config[..4], [1, 0xbb, 0xaa, 4]);
}

#[test]
fn the_access_capability_reaches_the_bar_without_decoding() {
    let guest = Guest::new(1);
    guest.set_config(4, 2, 0);
    let aim = |bar, offset, length| {
        guest.set_config(guest.access + 4, 1, bar);
        guest.set_config(guest.access + 8, 4, offset);
        guest.set_config(guest.access + 12, 4, length);
    };
    aim(0, guest.common + 0x14, 1);
    guest.set_config(guest.access + 16, 1, 3);
    assert_eq!(guest.function.status(), 3);
    guest.set_config(guest.access + 16, 1, 7);
    assert_eq!(
        guest.config(guest.access + 16, 1),
        3,
        "reads the register, not what was written"
    );
    aim(0, guest.common + 0x18, 2);
    assert_eq!(guest.config(guest.access + 16, 2), u64::from(QUEUE_SIZE));
    aim(0, guest.common, 4);
    guest.set_config(guest.access + 16, 4, 1);
    aim(0, guest.common + 4, 4);
    assert_eq!(guest.config(guest.access + 16, 4), OFFERED >> 32);
    aim(0, 0x7ffc, 4);
    assert_eq!(guest.config(guest.access + 16, 4), 0xffff_ffff, "nothing there");
    // None of these is an access.
    guest.set_config(guest.access + 16, 4, 0);
    for (bar, offset, length) in [
        (1, 0x14, 1),
        (0, 0x15, 2),
        (0, 0x14, 3),
        (0, 0x14, 0),
        (0, u32::MAX.into(), 4),
    ] {
        aim(bar, offset, length);
        guest.set_config(guest.access + 16, 4, 0);
        assert_eq!(guest.config(guest.access + 16, 4), 0);
        assert_eq!(guest.function.status(), 3);
    }
}

#[test]
fn registers_keep_what_a_driver_cannot_set() {
    let guest = Guest::new(1);
    let c = guest.common;
    guest.put(c + 0x16, 2, 0);
    for size in [0, 3, 32, 0xffff] {
        guest.put(c + 0x18, 2, size);
        assert_eq!(guest.get(c + 0x18, 2), u64::from(QUEUE_SIZE), "size {size}");
    }
    guest.put(c + 0x1a, 2, 2);
    assert_eq!(guest.get(c + 0x1a, 2), 0xffff, "no such vector");
    guest.put(c + 0x10, 2, 7);
    assert_eq!(guest.get(c + 0x10, 2), 0xffff);
    guest.put(c + 0x20, 8, 0x1234_5678_9abc_def0);
    assert_eq!(guest.get(c + 0x24, 4), 0x1234_5678);
    guest.put(c + 0x1c, 2, 0);
    guest.set_up(0);
    guest.put(c + 0x18, 2, 4);
    guest.put(c + 0x20, 4, 0x5000);
    guest.put(c + 0x1c, 2, 0);
    assert_eq!(
        (guest.get(c + 0x18, 2), guest.get(c + 0x20, 8), guest.get(c + 0x1c, 2)),
        (8, ring(0), 1),
        "an enabled queue does not change"
    );
    for (offset, len) in [(0x14, 4), (0x16, 1), (0x38, 8), (0x3c, 4), (0x800, 2)] {
        let refused = guest.machine.mmio.write(guest.bar + c + offset, &[0xff; 8][..len]);
        assert_eq!(refused, Err(AccessError::BadAccess), "{offset:#x}+{len}");
    }
}

#[test]
fn more_queues_than_vectors_are_refused() {
    let machine = Machine::new();
    assert!(machine.function(767).is_ok());
    let refused = machine.function(768).err().expect("refused");
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
}
