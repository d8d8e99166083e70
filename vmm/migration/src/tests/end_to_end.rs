use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::mock::{
    Dirtier, End, Fails, MockGuest, MockMemory, P, World, deadlines, destination_options, migrate, regions, socket,
    source_options,
};
use crate::{
    Address, Deadlines, Destination, DestinationOptions, Handle, Limits, Memory, OnTimeOut, PAGE, Phase, SourceError,
    SourceOptions, Whereabouts,
};

fn moved(end: &End, memory: &MockMemory) {
    let source = end.source.as_ref().unwrap_or_else(|error| panic!("{error:?}"));
    let destination = end.destination.as_ref().unwrap_or_else(|error| panic!("{error:?}"));
    assert!(destination.confirmed);
    assert_eq!(end.world.running(), (false, true));
    assert!(memory.equals(end.memory.as_ref().expect("memory")), "memory differs");
    assert_eq!(source.progress.phase, Phase::Over);
    assert_eq!(source.progress.remaining, 0);
}

fn moves(address: &Address, change: impl FnOnce(&mut SourceOptions)) {
    let destination = Destination::bind(destination_options(address)).expect("listens");
    let memory = MockMemory::new(&regions());
    memory.fill(300);
    let world = Arc::<World>::default();
    let mut guest = MockGuest::new(&world, Fails::Nothing);
    let dirtier = Dirtier::start(&memory, &guest, Duration::from_micros(200), |n| {
        // Some become zeroes, some at the seam of two regions.
        ((n * 7 % 1536) * PAGE, (n % 5) as u8)
    });
    let mut options = source_options(destination.address());
    change(&mut options);
    let handle = Handle::new(None);
    let end = migrate(destination, Fails::Nothing, options, &memory, &mut guest, &handle);
    dirtier.stop();
    moved(&end, &memory);
    // Each was looked at once at least. How many of them were something then is a matter of who came first.
    let progress = end.source.expect("moved").progress;
    assert!(
        progress.pages > 0 && progress.pages + progress.zero_pages >= 2048,
        "{progress:?}"
    );
}

#[test]
fn a_guest_moves_over_a_unix_socket() {
    for streams in [1, 3, 16] {
        let (_dir, address) = socket();
        moves(&address, |options| options.streams = streams);
    }
}

#[test]
fn a_guest_moves_over_tcp() {
    for address in ["tcp-plain:127.0.0.1:0", "tcp-plain:[::1]:0"] {
        moves(&address.parse().expect("an address"), |options| options.streams = 4);
    }
}

#[test]
fn a_guest_moves_with_its_pages_packed() {
    let (_dir, address) = socket();
    let destination = Destination::bind(destination_options(&address)).expect("listens");
    let memory = MockMemory::new(&regions());
    memory.fill(500);
    let mut guest = MockGuest::new(&Arc::default(), Fails::Nothing);
    let options = SourceOptions {
        compress: true,
        streams: 1,
        ..source_options(&address)
    };
    // A slow wire. Whether it pays after the first batch is a matter of this machine; that one is packed to see.
    let handle = Handle::new(Some(2 << 20));
    let end = migrate(destination, Fails::Nothing, options, &memory, &mut guest, &handle);
    moved(&end, &memory);
    let progress = end.source.expect("moved").progress;
    assert_eq!(progress.pages, 1500);
    assert!(progress.wire_bytes < 1500 * PAGE, "{} bytes", progress.wire_bytes);
}

#[test]
fn what_was_never_touched_is_not_sent() {
    let (_dir, address) = socket();
    let destination = Destination::bind(destination_options(&address)).expect("listens");
    let memory = MockMemory::new(&regions());
    memory.fill(3);
    // Touched, and zeroes.
    memory.store(100 * PAGE, &[0; 50 * P]);
    let mut guest = MockGuest::new(&Arc::default(), Fails::Nothing);
    let handle = Handle::new(None);
    let end = migrate(
        destination,
        Fails::Nothing,
        source_options(&address),
        &memory,
        &mut guest,
        &handle,
    );
    moved(&end, &memory);
    let progress = end.source.expect("moved").progress;
    assert_eq!((progress.pages, progress.zero_pages), (9, 2048 - 9));
    assert!(progress.wire_bytes < 9 * PAGE + 2000, "{} bytes", progress.wire_bytes);
    assert_eq!(progress.total, 2048 * PAGE);
}

#[test]
fn the_bandwidth_is_kept_and_can_be_changed() {
    let (_dir, address) = socket();
    let destination = Destination::bind(destination_options(&address)).expect("listens");
    let memory = MockMemory::new(&regions());
    memory.fill(512);
    let mut guest = MockGuest::new(&Arc::default(), Fails::Nothing);
    // Six MiB, of which the first messages are free: four of each stream.
    let handle = Handle::new(Some(1 << 20));
    let other = handle.clone();
    let began = Instant::now();
    let lifts = thread::spawn(move || {
        thread::sleep(Duration::from_secs(2));
        let sent = other.progress().wire_bytes;
        other.set_cap(None);
        sent
    });
    let end = migrate(
        destination,
        Fails::Nothing,
        source_options(&address),
        &memory,
        &mut guest,
        &handle,
    );
    let sent = lifts.join().expect("no panic");
    moved(&end, &memory);
    // In two seconds: two MiB, and a message of each stream that may go before the account is empty.
    assert!((1 << 20..=4 << 20).contains(&sent), "{sent} bytes");
    assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(handle.cap(), None);
}

#[test]
fn a_cancelled_guest_runs_on() {
    let (_dir, address) = socket();
    let destination = Destination::bind(destination_options(&address)).expect("listens");
    let memory = MockMemory::new(&regions());
    memory.fill(512);
    let mut guest = MockGuest::new(&Arc::default(), Fails::Nothing);
    let handle = Handle::new(Some(1 << 20));
    let other = handle.clone();
    let cancels = thread::spawn(move || {
        while other.progress().phase == Phase::Connecting {
            thread::sleep(Duration::from_millis(10));
        }
        assert!(other.cancel());
    });
    let end = migrate(
        destination,
        Fails::Nothing,
        source_options(&address),
        &memory,
        &mut guest,
        &handle,
    );
    cancels.join().expect("no panic");
    let error = end.source.expect_err("cancelled");
    assert!(matches!(error.why, SourceError::Cancelled), "{error:?}");
    assert_eq!(error.guest, Whereabouts::RunsHere);
    assert_eq!(end.world.running(), (true, false));
    assert!(end.memory.is_none() && end.destination.is_err());
    assert!(!memory.is_logging(), "the log was left on");
    assert_eq!(end.world.pauses.load(std::sync::atomic::Ordering::SeqCst), 0);
}

/// A guest that writes all of 2 MiB again and again, over 2 MiB a second.
fn writes_too_fast(limits: Limits) -> (End, Arc<MockMemory>) {
    writes_too_fast_for(limits, deadlines())
}

/// The same with a destination that waits for so long.
fn writes_too_fast_for(limits: Limits, patience: Deadlines) -> (End, Arc<MockMemory>) {
    let (_dir, address) = socket();
    let waits = DestinationOptions {
        deadlines: patience,
        ..destination_options(&address)
    };
    let destination = Destination::bind(waits).expect("listens");
    let memory = MockMemory::new(&regions());
    memory.fill(200);
    let mut guest = MockGuest::new(&Arc::default(), Fails::Nothing);
    let dirtier = Dirtier::start(&memory, &guest, Duration::from_micros(100), |n| {
        (n % 512 * PAGE, n as u8 | 1)
    });
    let options = SourceOptions {
        limits,
        deadlines: patience,
        ..source_options(&address)
    };
    let handle = Handle::new(Some(2 << 20));
    let end = migrate(destination, Fails::Nothing, options, &memory, &mut guest, &handle);
    dirtier.stop();
    (end, memory)
}

#[test]
fn what_does_not_converge_is_throttled_and_then_given_up() {
    let limits = Limits {
        downtime: Duration::from_millis(30),
        max_throttle: 35,
        time: Some(Duration::from_secs(5)),
        ..Limits::default()
    };
    let (end, memory) = writes_too_fast(limits);
    let error = end.source.expect_err("too fast");
    assert!(
        matches!(error.why, SourceError::TimedOut { limit_ms: 30, .. }),
        "{error:?}"
    );
    assert_eq!(end.world.running(), (true, false));
    let throttled = end.world.throttled.lock().expect("a list").clone();
    // Once at least, never more than told, and let go in the end.
    assert!(
        throttled.len() > 1 && throttled.iter().all(|percent| *percent <= 35),
        "{throttled:?}"
    );
    assert_eq!(throttled.last(), Some(&0));
    assert!(!memory.is_logging());
}

#[test]
fn what_does_not_converge_is_switched_if_told() {
    let limits = Limits {
        downtime: Duration::from_millis(30),
        time: Some(Duration::from_secs(3)),
        on_time_out: OnTimeOut::Switch,
        ..Limits::default()
    };
    let (end, memory) = writes_too_fast(limits);
    moved(&end, &memory);
}

#[test]
fn many_short_rounds_are_no_silence() {
    let patience = Deadlines {
        silence: Duration::from_secs(6),
        ..deadlines()
    };
    let limits = Limits {
        downtime: Duration::from_millis(30),
        time: Some(Duration::from_secs(9)),
        on_time_out: OnTimeOut::Switch,
        ..Limits::default()
    };
    let (end, memory) = writes_too_fast_for(limits, patience);
    moved(&end, &memory);
    let rounds = end.source.expect("moved").progress.rounds;
    assert!(rounds > 3, "{rounds} rounds");
}

/// Memory whose log tells nothing until the guest is paused.
struct Late(Arc<MockMemory>, Arc<World>);

impl Memory for Late {
    fn regions(&self) -> Vec<crate::Region> {
        self.0.regions()
    }

    fn read(&self, gpa: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.0.read(gpa, buffer)
    }

    fn start_log(&self) -> std::io::Result<()> {
        self.0.start_log()
    }

    fn fetch_log(&self) -> std::io::Result<Vec<std::ops::Range<u64>>> {
        // The first time it is paused, it has written everything.
        let pauses = self.1.pauses.load(std::sync::atomic::Ordering::SeqCst);
        let (running, _) = self.1.running();
        match (pauses, running) {
            (1, false) => Ok(self
                .regions()
                .iter()
                .map(|region| region.gpa..region.gpa + region.len)
                .collect()),
            _ => self.0.fetch_log(),
        }
    }

    fn stop_log(&self) {
        self.0.stop_log();
    }
}

#[test]
fn a_promise_that_would_be_broken_is_found_out_in_time() {
    let (_dir, address) = socket();
    let destination = Destination::bind(destination_options(&address)).expect("listens");
    let memory = MockMemory::new(&regions());
    memory.fill(512);
    let world = Arc::<World>::default();
    let mut guest = MockGuest::new(&world, Fails::Nothing);
    let options = SourceOptions {
        limits: Limits {
            downtime: Duration::from_millis(900),
            ..Limits::default()
        },
        ..source_options(&address)
    };
    // Eight MiB at four a second: not within the promise.
    let handle = Handle::new(Some(4 << 20));
    let sandbox: Arc<dyn triarch_device_core::Sandbox> = Arc::new(triarch_device_core::NoSandbox);
    let (theirs, other) = (world.clone(), sandbox.clone());
    let takes = thread::spawn(move || {
        let mut sink = super::mock::MockSink::new(&theirs, Fails::Nothing);
        let taken = destination.run(&mut sink, &Handle::new(None), &other);
        (taken, sink.memory)
    });
    let late = Arc::new(Late(memory.clone(), world.clone()));
    let source = crate::Source::new(options, late, &handle, &sandbox).expect("a source");
    let source = source.run(&mut guest, b"config", b"cpu");
    let (destination, theirs) = takes.join().expect("no panic");
    assert_eq!(
        source.as_ref().map(|moved| moved.progress.retreats).ok(),
        Some(1),
        "{source:?}"
    );
    let end = End {
        source,
        destination,
        world,
        memory: theirs,
    };
    moved(&end, &memory);
    assert_eq!(end.world.pauses.load(std::sync::atomic::Ordering::SeqCst), 2);
}
