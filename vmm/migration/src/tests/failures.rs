use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use triarch_device_core::{NoSandbox, Sandbox};
use triarch_state::Payloads;

use super::mock::{
    End, Fails, MockGuest, MockMemory, MockSink, destination_options, migrate, regions, socket, source_options,
};
use crate::{
    Blocker, Cause, Destination, DestinationError, Handed, Handle, Offer, Sink, Source, Target, Whereabouts, sentence,
};

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

/// Somebody cancels one side just when the guest was restored, which has the time to tell the other.
struct CancelledLate<'a>(MockSink, &'a Handle);

impl Sink for CancelledLate<'_> {
    fn prepare(&mut self, offer: &Offer<'_>, handed: Option<Handed>) -> Result<Arc<dyn Target>, Cause> {
        self.0.prepare(offer, handed)
    }

    fn check(&mut self, offer: &Offer<'_>, handed: Option<Handed>) -> Vec<Blocker> {
        self.0.check(offer, handed)
    }

    fn restore(&mut self, state: Payloads) -> Result<(), Cause> {
        self.0.restore(state)?;
        assert!(self.1.cancel());
        thread::sleep(Duration::from_millis(500));
        Ok(())
    }

    fn take_locks_and_run(&mut self) -> Result<(), Cause> {
        self.0.take_locks_and_run()
    }

    fn abort(&mut self, why: &str) {
        self.0.abort(why);
    }
}

#[test]
fn a_source_that_knows_in_time_that_it_is_over_will_not_ask() {
    for by_source in [false, true] {
        let (_dir, address) = socket();
        let destination = Destination::bind(destination_options(&address)).expect("listens");
        let memory = MockMemory::new(&regions());
        let mut guest = MockGuest::new(&Arc::default(), Fails::Nothing);
        let world = guest.world.clone();
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let (here, there) = (Handle::new(None), Handle::new(None));
        let cancelled = if by_source { &here } else { &there };
        let source = Source::new(source_options(&address), memory, &here, &sandbox).expect("a source");
        let (kept, ended, waited) = thread::scope(|scope| {
            let takes = scope.spawn(|| {
                let mut sink = CancelledLate(MockSink::new(&world, Fails::Nothing), cancelled);
                let ended = destination.run(&mut sink, &there, &sandbox);
                (ended, Instant::now())
            });
            let kept = source.run(&mut guest, b"config", b"cpu");
            let at = Instant::now();
            let (ended, end) = takes.join().expect("no panic");
            (kept, ended, end.saturating_duration_since(at))
        });
        assert_eq!(kept.map_err(|error| error.guest), Err(Whereabouts::RunsHere));
        assert_eq!(
            matches!(ended, Err(DestinationError::Cancelled)),
            !by_source,
            "{ended:?}"
        );
        assert!(ended.is_err());
        assert_eq!(world.running(), (true, false));
        // Not for as long as somebody might ask.
        let long = super::mock::deadlines().outcome - Duration::from_secs(8);
        assert!(waited < long, "{by_source}: {waited:?}");
    }
}
