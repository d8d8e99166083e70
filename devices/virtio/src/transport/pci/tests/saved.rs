//! Saving and restoring.

use super::*;
use crate::{RestoreError, SaveError, VirtioPciStateV1};

fn restore(from: &Guest, queues: usize, state: &VirtioPciStateV1) -> Result<(Machine, VirtioPci), RestoreError> {
    let machine = Machine {
        memory: from.machine.memory.clone(),
        ..Machine::new()
    };
    machine.log.lock().expect("lock").refuse_activation = from.log().refuse_activation;
    let function = VirtioPci::restore(
        machine.device(queues),
        machine.memory.clone(),
        machine.router.clone(),
        machine.doorbells.clone(),
        Arc::new(NoSandbox),
        state,
    )?;
    Ok((machine, function))
}

/// A running guest with one request done and one waiting in queue 1, a pending vector, and a moved BAR; paused.
fn busy() -> Guest {
    let mut guest = Guest::new(2);
    guest.start();
    guest.set_config(0x10, 4, 0x8_0000);
    guest.find_bar();
    guest.offer(1);
    assert_eq!(guest.serve(1), 1);
    guest.offer(1);
    guest.put(guest.table + 12, 4, 1);
    let raise = guest.log().context.as_ref().expect("active").interrupt.clone();
    raise.config().expect("config");
    guest.function.pause();
    guest
}

#[test]
fn a_running_device_goes_on_elsewhere() {
    let guest = busy();
    let state = guest.function.save().expect("paused");
    let (machine, function) = restore(&guest, 2, &state).expect("the same device");
    assert_eq!(
        machine.log.lock().expect("lock").calls,
        [Call::Activate(OFFERED & !feature::EVENT_IDX)]
    );
    assert_eq!(function.save().expect("still paused"), state);
    let function = Arc::new(function);
    let slot = machine.root.add(function.clone(), None).expect("slot");
    let there = Guest {
        machine,
        function,
        address: slot,
        ..guest
    };
    assert_eq!(get(&there.machine.mmio, there.bar + there.common + 0x14, 1), 15);
    assert_eq!(there.doorbells().len(), 2);
    let live: Vec<_> = there.vectors().iter().map(|v| v.message().map(|m| m.data)).collect();
    assert_eq!(live, [Some(0x41), Some(0x42)], "vector 0 is masked");
    assert_eq!(there.get(there.pending, 8), 1, "and pending");
    there.function.resume();
    assert_eq!((there.serve(0), there.serve(1)), (0, 1), "the waiting request, once");
    assert_eq!(there.used(1), 2);
    assert_eq!(there.vectors()[1].take(), 1);
    there.put(there.table + 12, 4, 0);
    assert_eq!(there.vectors()[2].take(), 1);
}

#[test]
fn an_idle_device_is_restored_idle() {
    let guest = Guest::new(1);
    guest.function.pause();
    let state = guest.function.save().expect("paused");
    let (machine, function) = restore(&guest, 1, &state).expect("the same device");
    assert_eq!(function.status(), 0);
    assert!(machine.log.lock().expect("lock").calls.is_empty());
}

#[test]
fn a_running_device_is_not_saved() {
    let guest = Guest::new(1);
    guest.start();
    assert_eq!(guest.function.save(), Err(SaveError::NotPaused));
}

#[test]
fn another_device_or_a_damaged_state_is_refused() {
    let guest = busy();
    let good = guest.function.save().expect("paused");
    let refused = |change: fn(&mut VirtioPciStateV1)| {
        let mut state = good.clone();
        change(&mut state);
        restore(&guest, 2, &state).err().expect("refused")
    };
    assert!(matches!(restore(&guest, 1, &good).err(), Some(RestoreError::Config(_))));
    assert!(matches!(refused(|s| s.config.bytes[2] = 0), RestoreError::Config(_)));
    assert!(matches!(refused(|s| s.msix.pending.push(3)), RestoreError::MsiX(_)));
    assert!(
        matches!(refused(|s| s.driver_features |= 2), RestoreError::Features(names) if names == "VIRTIO_BLK_F_SIZE_MAX")
    );
    assert!(matches!(refused(|s| s.queues.truncate(1)), RestoreError::Queues));
    assert!(matches!(refused(|s| s.queues[0].size = 32), RestoreError::Queues));
    assert!(matches!(refused(|s| s.queues[0].enabled = false), RestoreError::Queues));
    assert!(matches!(
        refused(|s| s.queues[1].progress = s.queues[0].progress),
        RestoreError::Queues
    ));
    assert!(matches!(refused(|s| s.status = 11), RestoreError::Queues));
    assert!(matches!(
        refused(|s| s.queues[1].driver = 1 << 40),
        RestoreError::Refused
    ));
}

#[test]
fn a_broken_device_stays_broken() {
    let guest = Guest::new(1);
    guest.log().refuse_activation = true;
    guest.negotiate(feature::VERSION_1);
    guest.set_status(15);
    guest.function.pause();
    let state = guest.function.save().expect("paused");
    let (_machine, function) = restore(&guest, 1, &state).expect("restored");
    assert_eq!(function.status(), 15 | 64);
    // On a host that has what was missing it is broken all the same, until its driver resets it.
    guest.log().refuse_activation = false;
    let (_machine, function) = restore(&guest, 1, &state).expect("restored");
    assert_eq!(function.status(), 15 | 64);
    // And one that worked does not come back broken.
    let guest = busy();
    guest.log().refuse_activation = true;
    let state = guest.function.save().expect("paused");
    assert!(matches!(restore(&guest, 2, &state).err(), Some(RestoreError::Refused)));
}
