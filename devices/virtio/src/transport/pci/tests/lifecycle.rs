//! The status register, resets, pause and resume, and the BAR moving under a running device.

use triarch_device_core::AccessError;
use triarch_pci::PciFunction;

use super::*;

#[test]
fn features_are_agreed_on_or_not() {
    for (features, agreed) in [
        (OFFERED, true),
        (feature::VERSION_1, true),
        (TYPE_FEATURE, false),
        (feature::VERSION_1 | 1 << 6, false),
        (feature::VERSION_1 | feature::RING_PACKED, false),
    ] {
        let guest = Guest::new(1);
        guest.set_status(3);
        guest.acknowledge(features);
        guest.set_status(11);
        assert_eq!(guest.status(), if agreed { 11 } else { 3 }, "{features:#x}");
    }
    let guest = Guest::new(1);
    guest.set_status(3);
    guest.acknowledge(feature::VERSION_1);
    guest.put(guest.common + 8, 4, 2);
    guest.put(guest.common + 12, 4, 1);
    guest.set_status(11);
    assert_eq!(guest.status(), 3, "a feature past bit 63");
}

#[test]
fn features_stay_as_agreed() {
    let guest = Guest::new(1);
    guest.negotiate(feature::VERSION_1);
    guest.acknowledge(OFFERED);
    guest.set_status(15);
    assert!(guest.calls().contains(&Call::Activate(feature::VERSION_1)));
}

#[test]
fn steps_cannot_be_left_out_or_taken_back() {
    let guest = Guest::new(1);
    guest.acknowledge(feature::VERSION_1);
    guest.set_status(8);
    assert_eq!(guest.status(), 0, "FEATURES_OK before DRIVER");
    guest.set_status(7);
    assert_eq!(guest.status(), 3, "DRIVER_OK before FEATURES_OK");
    guest.set_status(15);
    assert_eq!(guest.status(), 11, "or together with it");
    guest.set_status(1);
    assert_eq!(guest.status(), 11, "bits do not go");
    guest.calls();
    guest.set_status(12);
    assert_eq!(
        (guest.status(), guest.calls()),
        (11, vec![]),
        "nor does the rest of such a write count"
    );
    guest.calls();
    guest.set_status(15);
    guest.set_status(15);
    assert_eq!(guest.calls(), [Call::Activate(feature::VERSION_1)], "once");
    guest.set_status(0x8f);
    assert_eq!(guest.status(), 0x8f, "FAILED");
}

#[test]
fn reset_works_in_every_state() {
    let steps: [fn(&Guest); 6] = [
        |_| {},
        |g| g.set_status(1),
        |g| g.set_status(3),
        |g| g.negotiate(feature::VERSION_1),
        |g| {
            g.negotiate(feature::VERSION_1);
            g.set_up(0);
        },
        Guest::start,
    ];
    for (i, step) in steps.iter().enumerate() {
        let guest = Guest::new(2);
        step(&guest);
        guest.set_status(0);
        let c = guest.common;
        assert_eq!(guest.status(), 0, "step {i}");
        assert!(guest.doorbells().is_empty() && guest.log().queues.is_empty());
        assert_eq!(guest.calls().last(), Some(&Call::Reset));
        assert_eq!(guest.get(c + 0x10, 2), 0xffff);
        for queue in 0..2 {
            guest.put(c + 0x16, 2, queue);
            assert_eq!(guest.get(c + 0x18, 2), u64::from(QUEUE_SIZE));
            assert_eq!((guest.get(c + 0x1a, 2), guest.get(c + 0x1c, 2)), (0xffff, 0));
            assert_eq!(
                guest.get(c + 0x20, 8) | guest.get(c + 0x28, 8) | guest.get(c + 0x30, 8),
                0
            );
        }
        guest.start();
        guest.offer(0);
    }
}

#[test]
fn an_observer_hears_of_starts_resets_and_faults_once_each() {
    let guest = Guest::new(1);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let ears = heard.clone();
    guest
        .function
        .observe(Box::new(move |event| ears.lock().expect("lock").push(event)));
    let heard = || std::mem::take(&mut *heard.lock().expect("lock"));
    guest.set_status(0);
    guest.negotiate(feature::VERSION_1);
    guest.set_status(0);
    assert_eq!(heard(), [], "it was never started");
    guest.start();
    guest.set_status(15);
    assert_eq!(heard(), [DeviceEvent::Activated]);
    guest.function.pause();
    guest.function.resume();
    assert_eq!(heard(), []);
    let interrupt = guest.log().context.as_ref().expect("active").interrupt.clone();
    interrupt.needs_reset();
    interrupt.needs_reset();
    assert_eq!(heard(), [DeviceEvent::Broken]);
    guest.set_status(0);
    guest.set_status(0);
    assert_eq!(heard(), [DeviceEvent::Reset]);
    guest.log().refuse_activation = true;
    guest.negotiate(feature::VERSION_1);
    guest.set_status(15);
    assert_eq!(heard(), [DeviceEvent::Broken]);
}

#[test]
fn one_queue_is_reset_and_used_again() {
    let guest = Guest::new(2);
    guest.start();
    let c = guest.common;
    guest.put(c + 0x16, 2, 1);
    guest.put(c + 0x3a, 2, 1);
    assert_eq!((guest.get(c + 0x3a, 2), guest.get(c + 0x1c, 2)), (0, 0));
    assert_eq!(guest.calls(), [Call::Stop(1)]);
    assert_eq!(guest.doorbells(), [guest.bar + guest.notify]);
    guest.put(guest.notify + guest.multiplier, 2, 1);
    guest.offer(0);
    assert_eq!(guest.serve(0), 1, "the other one runs on");
    guest.set_up(1);
    assert_eq!(guest.calls(), [Call::Start(1)]);
    guest.offer(1);
    assert_eq!(guest.serve(1), 1);
}

#[test]
fn a_queue_reset_must_be_negotiated() {
    let guest = Guest::new(1);
    guest.negotiate(feature::VERSION_1);
    guest.set_up(0);
    guest.set_status(15);
    guest.calls();
    guest.put(guest.common + 0x3a, 2, 1);
    assert_eq!(guest.calls(), []);
    assert_eq!(guest.get(guest.common + 0x1c, 2), 1);
}

#[test]
fn the_bar_moves_under_a_running_device() {
    let mut guest = Guest::new(2);
    guest.start();
    let bells = |g: &Guest| [0, 1].map(|i| g.bar + g.notify + i * g.multiplier);
    assert_eq!(guest.doorbells(), bells(&guest));
    let old = guest.bar;
    guest.set_config(0x10, 4, (WINDOW + 0x10_0000) & 0xffff_ffff);
    guest.find_bar();
    assert_eq!(guest.bar, WINDOW + 0x10_0000);
    assert_eq!(guest.doorbells(), bells(&guest));
    assert_eq!(guest.machine.mmio.read(old, &mut [0; 4]), Err(AccessError::Unclaimed));
    guest.offer(1);
    assert_eq!(guest.serve(1), 1);
    guest.set_config(4, 2, 4);
    assert!(guest.doorbells().is_empty());
    assert_eq!(
        guest.machine.mmio.read(guest.bar, &mut [0; 4]),
        Err(AccessError::Unclaimed)
    );
    guest.set_config(4, 2, 6);
    assert_eq!(guest.doorbells(), bells(&guest));
    guest.offer(0);
    assert_eq!(guest.serve(0), 1);
    assert_eq!(guest.calls(), [], "the device saw nothing of it");
}

#[test]
fn pause_takes_the_queues_and_resume_gives_them_back() {
    let guest = Guest::new(2);
    guest.start();
    guest.offer(0);
    guest.serve(0);
    guest.function.pause();
    guest.function.pause();
    assert_eq!(guest.calls(), [Call::Stop(0), Call::Stop(1)]);
    assert!(guest.log().queues.is_empty());
    assert_eq!(guest.doorbells().len(), 2, "notifications are kept meanwhile");
    // Comes the long way here, as no kernel watches the doorbell.
    guest.offer(1);
    guest.function.resume();
    guest.function.resume();
    assert_eq!(guest.calls(), [Call::Start(0), Call::Start(1)]);
    assert_eq!((guest.serve(0), guest.serve(1)), (0, 1));
    guest.offer(0);
    assert_eq!((guest.serve(0), guest.used(0)), (1, 2), "it goes on where it was");
}

#[test]
fn resume_kicks_every_queue() {
    let guest = Guest::new(1);
    guest.start();
    guest.offer(0);
    let kick = guest.log().queues[&0].kick().try_clone().expect("clone");
    kick.read().expect("the worker took it and was stopped");
    guest.function.pause();
    guest.function.resume();
    assert_eq!(guest.serve(0), 1);
}

#[test]
fn what_a_driver_does_while_paused_takes_effect_later() {
    let guest = Guest::new(1);
    guest.start();
    guest.function.pause();
    guest.calls();
    guest.start();
    assert!(guest.log().queues.is_empty());
    guest.function.resume();
    assert_eq!(guest.calls(), [Call::Start(0)]);
    guest.function.pause();
    guest.calls();
    guest.set_status(0);
    assert_eq!(guest.calls(), [Call::Reset], "held queues are dropped");
    guest.function.resume();
    assert_eq!(guest.calls(), []);
    assert!(guest.log().queues.is_empty());
}

#[test]
fn a_removed_function_is_idle() {
    let guest = Guest::new(1);
    guest.start();
    guest.machine.root.remove(guest.address).expect("present");
    assert_eq!(guest.calls(), [Call::Stop(0), Call::Reset]);
    assert!(guest.doorbells().is_empty());
    // An access that was on its way.
    guest.function.bar_write(0, 0x14, &[15]).expect("write");
    assert_eq!(guest.function.status(), 0);
    assert_eq!(guest.calls(), []);
}

#[test]
fn a_machine_that_is_dropped_stops_its_devices() {
    let guest = Guest::new(1);
    guest.start();
    let (log, doorbells) = (guest.machine.log.clone(), guest.machine.doorbells.clone());
    drop(guest);
    assert_eq!(log.lock().expect("lock").calls, [Call::Stop(0), Call::Reset]);
    assert!(doorbells.attached.lock().expect("lock").is_empty());
}
