use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::mock::{End, Fails, MockGuest, MockMemory, destination_options, migrate, regions, socket, source_options};
use crate::{Destination, Handle, Whereabouts, sentence};

fn fails(what: Fails) -> (End, String) {
    let (_dir, address) = socket();
    let destination = Destination::bind(destination_options(&address)).expect("listens");
    let memory = MockMemory::new(&regions());
    memory.fill(20);
    let mut guest = MockGuest::new(&Arc::default(), what);
    let handle = Handle::new(None);
    let end = migrate(
        destination,
        what,
        source_options(&address),
        &memory,
        &mut guest,
        &handle,
    );
    assert!(!memory.is_logging(), "{what:?}");
    assert!(end.destination.is_err() && end.memory.is_none(), "{what:?}");
    let why = sentence(end.source.as_ref().expect_err("it failed"));
    (end, why)
}

#[test]
fn whatever_fails_the_guest_runs_where_it_was() {
    for (what, words, pauses) in [
        (Fails::Prepare, "this host has no avx512_vnni", 0),
        (Fails::Save, "a device has no state", 1),
        (Fails::Restore, "a device is missing", 1),
        (Fails::ReleaseLocks, "a lock is stuck", 1),
        (Fails::Run, "the lock is somebody else's", 1),
    ] {
        let (end, why) = fails(what);
        assert!(
            why.contains(words) && why.contains("runs here as before"),
            "{what:?}: {why}"
        );
        assert_eq!(
            end.source.map_err(|error| error.guest),
            Err(Whereabouts::RunsHere),
            "{what:?}"
        );
        assert_eq!(end.world.running(), (true, false), "{what:?}");
        assert_eq!(end.world.pauses.load(Ordering::SeqCst), pauses, "{what:?}");
        assert!(
            end.world.aborted.load(Ordering::SeqCst),
            "{what:?}: what there was of it stays"
        );
    }
}

#[test]
fn a_guest_whose_locks_are_lost_stays_paused_and_that_is_told() {
    let (end, why) = fails(Fails::RunAndTakeLocks);
    assert!(
        why.contains("paused here") && why.contains("somebody else has the lock"),
        "{why}"
    );
    assert_eq!(end.source.map_err(|error| error.guest), Err(Whereabouts::PausedHere));
    assert_eq!(end.world.running(), (false, false));
}
