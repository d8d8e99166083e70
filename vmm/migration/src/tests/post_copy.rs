//! Guests that run at the destination before all of their memory is there.

mod hostile;
mod lazy;
mod network;

use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use triarch_device_core::{NoSandbox, Sandbox};

use super::mock::{
    Dirtier, Fails, MockGuest, MockMemory, MockSink, World, destination_options, regions, source_options,
};
use crate::{
    Address, Deadlines, Destination, DestinationError, DestinationOptions, Handle, Lacking, Limits, Moved, NotMoved,
    OnTimeOut, PAGE, Phase, PostCopy, Source, SourceError, SourceOptions, Taken, Whereabouts,
};
use lazy::{LazyGuest, LazySink, MockLacking, Seen};
use network::Network;

/// Waits for it.
fn until(what: &str, mut until: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !until() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// What the destination says, and its memory.
type Arrived = (Result<Taken, DestinationError>, Option<Arc<MockMemory>>);

/// A migration under way.
struct Under {
    _dir: tempfile::TempDir,
    network: Network,
    handle: Handle,
    there: Handle,
    world: Arc<World>,
    memory: Arc<MockMemory>,
    seen: Arc<Seen>,
    turns: Arc<Mutex<Vec<String>>>,
    source: JoinHandle<Result<Moved, NotMoved>>,
    destination: JoinHandle<Arrived>,
    dirtier: Dirtier,
}

fn deadlines() -> Deadlines {
    Deadlines {
        outcome: Duration::from_secs(4),
        ..super::mock::deadlines()
    }
}

fn begin(change: impl FnOnce(&mut SourceOptions), no_faults: bool, cap: u64) -> Under {
    let dir = tempfile::tempdir().expect("a directory");
    let (front, back) = (dir.path().join("front"), dir.path().join("back"));
    let destination = Destination::bind(DestinationOptions {
        deadlines: deadlines(),
        ..destination_options(&Address::Unix(back.clone()))
    });
    let destination = destination.expect("listens");
    let network = Network::new(front, back);
    let world = Arc::<World>::default();
    let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
    let (seen, there) = (Arc::<Seen>::default(), Handle::new(None));
    let mut sink = LazySink {
        sink: MockSink::new(&world, Fails::Nothing),
        seen: seen.clone(),
        no_faults,
    };
    let (theirs, their_sandbox) = (there.clone(), sandbox.clone());
    let destination = thread::spawn(move || {
        let taken = destination.run(&mut sink, &theirs, &their_sandbox);
        (taken, sink.sink.memory)
    });
    let memory = MockMemory::new(&regions());
    memory.fill(2048);
    let mut options = SourceOptions {
        deadlines: deadlines(),
        post_copy: Some(PostCopy { recover: None }),
        limits: Limits {
            // It does not come to an end by itself.
            downtime: Duration::from_nanos(1),
            ..Limits::default()
        },
        ..source_options(&Address::Unix(network.front.clone()))
    };
    change(&mut options);
    let turns = Arc::<Mutex<Vec<String>>>::default();
    let mut guest = LazyGuest {
        guest: MockGuest::new(&world, Fails::Nothing),
        turns: turns.clone(),
    };
    let dirtier = Dirtier::start(&memory, &guest.guest, Duration::from_micros(50), |n| {
        ((n * 7 % 1500) * PAGE, n as u8)
    });
    let handle = Handle::new(Some(cap));
    let source = Source::new(options, memory.clone(), &handle, &sandbox).expect("a source");
    let source = thread::spawn(move || source.run(&mut guest, b"config", b"cpu"));
    Under {
        _dir: dir,
        network,
        handle,
        there,
        world,
        memory,
        seen,
        turns,
        source,
        destination,
        dirtier,
    }
}

impl Under {
    fn wait(&self, what: &str, mut until: impl FnMut(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(60);
        while !until(self) {
            assert!(
                Instant::now() < end,
                "{what}: {:?}, {:?}",
                self.handle.progress(),
                self.there.progress()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn phase(&self, phase: Phase) {
        self.wait(&format!("{phase:?}"), |this| this.handle.progress().phase == phase);
    }

    fn lacking(&self) -> Arc<MockLacking> {
        self.seen.lacking.lock().unwrap().clone().expect("memory is lacking")
    }

    fn end(
        mut self,
    ) -> (
        Result<Moved, NotMoved>,
        Result<Taken, DestinationError>,
        Arc<World>,
        Ends,
    ) {
        let source = self.source.join().expect("no panic");
        let (taken, memory) = self.destination.join().expect("no panic");
        self.dirtier.stop();
        self.network.stop.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(&self.network.front);
        self.network.thread.take().map(JoinHandle::join);
        let equal = memory.as_ref().is_some_and(|memory| memory.equals(&self.memory));
        let (turns, theirs) = (
            self.turns.lock().unwrap().clone(),
            self.seen.turns.lock().unwrap().clone(),
        );
        let lacking = self.seen.lacking.lock().unwrap().clone();
        let ends = Ends {
            equal,
            turns,
            theirs,
            lacking,
            logs: self.memory.is_logging(),
        };
        (source, taken, self.world, ends)
    }
}

struct Ends {
    /// Both sides have the same memory.
    equal: bool,
    turns: Vec<String>,
    theirs: Vec<String>,
    lacking: Option<Arc<MockLacking>>,
    logs: bool,
}

/// Half a second.
const FAST: u64 = 16 << 20;
/// Three seconds for all of it.
const SLOW: u64 = 3 << 20;

#[test]
fn it_runs_there_before_all_of_its_memory_came() {
    let under = begin(|_| {}, false, SLOW);
    under.phase(Phase::Copying);
    under.wait("a page", |under| under.handle.progress().pages > 0);
    assert!(under.handle.switch_to_post_copy() && !under.handle.recover() && !under.handle.abandon());
    under.phase(Phase::PostCopy);
    assert_eq!(under.world.running(), (false, true));
    let (lacking, progress) = (under.lacking(), under.handle.progress());
    assert!(lacking.remaining() > Some(100 * PAGE), "{progress:?}");
    assert!(!under.handle.cancel() && !under.handle.switch_to_post_copy());
    // The last comes long before its turn.
    let last = lacking.state.lock().unwrap().missing.last().copied().expect("a page");
    assert!(lacking.touch(last));
    assert!(lacking.remaining() > Some(100 * PAGE));
    under.handle.set_cap(None);
    let (moved, taken, world, ends) = under.end();
    moved.expect("moved");
    assert!(taken.expect("taken").confirmed);
    assert!(ends.equal && world.running() == (false, true));
    assert_eq!(
        (ends.turns, ends.theirs),
        (vec!["Begun".to_owned()], vec!["Begun".to_owned()])
    );
}

#[test]
fn time_that_is_over_makes_it_post_copy() {
    let late = |options: &mut SourceOptions| {
        options.limits.time = Some(Duration::from_millis(1500));
        options.limits.on_time_out = OnTimeOut::PostCopy;
    };
    let under = begin(late, false, SLOW);
    under.phase(Phase::PostCopy);
    assert!(under.handle.progress().elapsed >= Duration::from_millis(1500));
    under.handle.set_cap(None);
    let (moved, taken, _, ends) = under.end();
    assert!(moved.is_ok() && taken.is_ok() && ends.equal && ends.lacking.is_some());
}

#[test]
fn who_may_not_never_does() {
    let never = |options: &mut SourceOptions| {
        options.post_copy = None;
        options.limits.downtime = Duration::from_secs(30);
    };
    let dir = tempfile::tempdir().expect("a directory");
    let address = Address::Unix(dir.path().join("socket"));
    let destination = Destination::bind(destination_options(&address)).expect("listens");
    let world = Arc::<World>::default();
    let mut guest = MockGuest::new(&world, Fails::Nothing);
    let memory = MockMemory::new(&regions());
    let mut options = source_options(&address);
    never(&mut options);
    let handle = Handle::new(None);
    handle.switch_to_post_copy();
    let end = super::mock::migrate(destination, Fails::Nothing, options, &memory, &mut guest, &handle);
    assert!(end.source.is_ok() && end.destination.is_ok());
}

#[test]
fn without_memory_that_faults_the_guest_stays() {
    let under = begin(|_| {}, true, SLOW);
    under.wait("a page", |under| under.handle.progress().pages > 0);
    under.handle.switch_to_post_copy();
    let (moved, taken, world, ends) = under.end();
    let error = moved.expect_err("kept");
    assert_eq!(error.guest, Whereabouts::RunsHere);
    assert!(crate::sentence(&error).contains("no faults here"), "{error:?}");
    assert!(taken.is_err() && world.running() == (true, false) && ends.lacking.is_none() && !ends.logs);
}

#[test]
fn a_connection_lost_before_it_was_given_away_leaves_it_where_it_was() {
    for bytes in [0, 3000, 30_000] {
        let under = begin(|_| {}, false, SLOW);
        under.wait("a page", |under| under.handle.progress().pages > 0);
        under.handle.switch_to_post_copy();
        // The switch itself may be over before anybody looks.
        under.wait("the switch", |under| {
            matches!(
                under.handle.progress().phase,
                Phase::Switching | Phase::Committed | Phase::PostCopy
            )
        });
        under.network.fuse.store(bytes, Ordering::SeqCst);
        let waited = Instant::now();
        loop {
            let progress = under.handle.progress().phase;
            if under.source.is_finished() || progress == Phase::PostCopy || waited.elapsed() > Duration::from_secs(50) {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        under.handle.set_cap(None);
        let (moved, taken, world, ends) = under.end();
        match moved {
            // It was faster.
            Ok(_) => assert!(taken.is_ok() && ends.equal && world.running() == (false, true)),
            Err(error) => {
                assert_eq!(error.guest, Whereabouts::RunsHere, "{error:?}");
                assert!(taken.is_err() && world.running() == (true, false), "{bytes}");
            }
        }
    }
}

#[test]
fn wherever_the_connection_is_lost_every_page_arrives() {
    let tried: Vec<_> = (0..8_u64)
        .map(|round| {
            thread::spawn(move || {
                let under = begin(|_| {}, false, FAST);
                under.wait("pages", |under| under.handle.progress().pages > 200);
                under.handle.set_cap(Some(8 << 20));
                under.handle.switch_to_post_copy();
                under.phase(Phase::PostCopy);
                let lacking = under.lacking();
                // Somebody always waits for something.
                let touches = thread::spawn(move || {
                    let mut at = round;
                    loop {
                        let next = {
                            let state = lacking.state.lock().unwrap();
                            let missing = state.missing.len();
                            state.missing.iter().nth(at as usize % missing.max(1)).copied()
                        };
                        let Some(gpa) = next else { return };
                        assert!(lacking.touch(gpa));
                        at = at.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    }
                });
                let mut cuts = 0;
                for cut in 1..6_u64 {
                    let fuse = (round * 7919 + cut * 104_729) % 300_000;
                    under.network.fuse.store(fuse, Ordering::SeqCst);
                    let end = Instant::now() + Duration::from_millis(400);
                    while Instant::now() < end && !under.source.is_finished() {
                        let now = under.handle.progress();
                        if now.phase == Phase::PostCopyPaused {
                            assert!(now.trouble.is_some());
                            cuts += 1;
                            break;
                        }
                        thread::sleep(Duration::from_millis(2));
                    }
                    under.wait("recovery", |under| {
                        under.source.is_finished() || under.handle.progress().phase == Phase::PostCopy
                    });
                }
                under.network.fuse.store(u64::MAX, Ordering::SeqCst);
                under.handle.set_cap(None);
                touches.join().expect("no panic");
                let (moved, taken, world, ends) = under.end();
                moved.expect("moved");
                taken.expect("taken");
                assert!(ends.equal && world.running() == (false, true));
                let recovered = ends.turns.iter().filter(|turn| *turn == "Recovered").count();
                let lost = ends.turns.iter().filter(|turn| turn.starts_with("Lost")).count();
                assert_eq!(recovered, lost, "{:?}", ends.turns);
                cuts
            })
        })
        .collect();
    let cuts: u64 = tried.into_iter().map(|one| one.join().expect("no panic")).sum();
    assert!(cuts > 8, "{cuts} connections were lost");
}

#[test]
fn a_destination_that_is_gone_is_waited_for_until_it_is_given_up() {
    let patient = |options: &mut SourceOptions| {
        options.post_copy = Some(PostCopy {
            recover: Some(Duration::from_millis(1)),
        });
    };
    let under = begin(patient, false, SLOW);
    under.wait("a page", |under| under.handle.progress().pages > 0);
    under.handle.switch_to_post_copy();
    under.phase(Phase::PostCopy);
    under.network.open.store(false, Ordering::SeqCst);
    under.network.cut();
    under.phase(Phase::PostCopyPaused);
    under.wait("its word", |under| {
        let trouble = under.there.progress().trouble.unwrap_or_default();
        under.there.progress().phase == Phase::PostCopyPaused && trouble.contains("source")
    });
    thread::sleep(Duration::from_millis(1500));
    // Nobody tries any more, unless he is told to.
    under.network.open.store(true, Ordering::SeqCst);
    thread::sleep(Duration::from_millis(1500));
    let paused = under.handle.progress();
    assert_eq!(paused.phase, Phase::PostCopyPaused);
    assert!(paused.trouble.expect("why").contains("the guest is lost"));
    assert!(!under.handle.cancel() && under.handle.recover());
    under.phase(Phase::PostCopy);
    assert_eq!(under.handle.progress().trouble, None);
    under.network.open.store(false, Ordering::SeqCst);
    under.network.cut();
    under.phase(Phase::PostCopyPaused);
    assert!(under.handle.abandon());
    let error = under.source.join().expect("no panic").expect_err("lost");
    assert!(matches!(error.why, SourceError::Lost) && error.guest == Whereabouts::Lost);
    assert!(under.memory.is_logging(), "the guest is touched");
    assert_eq!(under.world.running(), (false, true));
    under.dirtier.stop();
}
