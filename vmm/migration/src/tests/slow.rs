//! What takes long for a good reason.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use triarch_device_core::{NoSandbox, Sandbox};
use triarch_state::Payloads;

use super::mock::{
    Fails, MockGuest, MockMemory, World, deadlines, destination_options, migrate, regions, socket, source_options,
};
use crate::{
    Blocker, Cause, Deadlines, Destination, DestinationOptions, Handed, Handle, Limits, Memory, Moved, NotMoved, Offer,
    OnTimeOut, Region, Sink, Source, SourceError, SourceOptions, Target,
};

const SILENCE: Duration = Duration::from_secs(4);
const LONGER: Duration = Duration::from_secs(7);

fn patience() -> Deadlines {
    Deadlines {
        silence: SILENCE,
        ..deadlines()
    }
}

#[test]
fn a_source_that_writes_its_disks_out_is_waited_for() {
    let (_dir, address) = socket();
    let options = DestinationOptions {
        deadlines: patience(),
        ..destination_options(&address)
    };
    let destination = Destination::bind(options).expect("listens");
    let memory = MockMemory::new(&regions());
    memory.fill(20);
    let mut guest = MockGuest::new(&Arc::default(), Fails::Nothing);
    guest.writes_out = LONGER;
    let options = SourceOptions {
        deadlines: patience(),
        ..source_options(&address)
    };
    let end = migrate(
        destination,
        Fails::Nothing,
        options,
        &memory,
        &mut guest,
        &Handle::new(None),
    );
    assert!(end.source.is_ok(), "{:?}", end.source);
    assert_eq!(end.world.running(), (false, true));
}

/// What comes of a guest that takes longer to pause than it may stand still.
fn slow_to_pause(on_time_out: OnTimeOut) -> (Result<(), SourceError>, u64) {
    let (_dir, address) = socket();
    let destination = Destination::bind(destination_options(&address)).expect("listens");
    let memory = MockMemory::new(&regions());
    memory.fill(20);
    let mut guest = MockGuest::new(&Arc::default(), Fails::Nothing);
    guest.stops = Duration::from_millis(400);
    let options = SourceOptions {
        limits: Limits {
            downtime: Duration::from_millis(300),
            time: Some(Duration::from_secs(4)),
            on_time_out,
            ..Limits::default()
        },
        ..source_options(&address)
    };
    let handle = Handle::new(None);
    let theirs = handle.clone();
    let (done, ended) = channel::<()>();
    let watches = thread::spawn(move || {
        if ended.recv_timeout(Duration::from_secs(30)) == Err(RecvTimeoutError::Timeout) {
            theirs.cancel();
        }
    });
    let end = migrate(destination, Fails::Nothing, options, &memory, &mut guest, &handle);
    drop(done);
    watches.join().expect("no panic");
    let moved = end.source.map(drop).map_err(|error| error.why);
    (moved, end.world.pauses.load(Ordering::SeqCst))
}

#[test]
fn a_guest_that_is_slow_to_pause_is_not_paused_again_and_again() {
    let (moved, pauses) = slow_to_pause(OnTimeOut::Fail);
    assert!(
        matches!(moved, Err(SourceError::TimedOut { expected_ms: 400.., .. })),
        "{moved:?}"
    );
    assert!((1..=2).contains(&pauses), "{pauses} times");
    let (moved, pauses) = slow_to_pause(OnTimeOut::Switch);
    assert!(moved.is_ok(), "{moved:?}");
    assert!((2..=3).contains(&pauses), "{pauses} times");
}

/// 4 GiB in which nothing is, and which nobody has.
struct Empty;

impl Memory for Empty {
    fn regions(&self) -> Vec<Region> {
        vec![Region { gpa: 0, len: 4 << 30 }]
    }

    fn read(&self, _gpa: u64, _buffer: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn data(&self, _range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(None)
    }

    fn start_log(&self) -> io::Result<()> {
        Ok(())
    }

    fn fetch_log(&self) -> io::Result<Vec<Range<u64>>> {
        Ok(Vec::new())
    }

    fn stop_log(&self) {}
}

impl Target for Empty {
    fn write(&self, _gpa: u64, _bytes: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn zero(&self, _gpa: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A destination that takes all memory of its host before it answers, or for its devices.
struct Prefaults {
    prepares: Duration,
    restores: Duration,
}

impl Sink for Prefaults {
    fn prepare(&mut self, _offer: &Offer<'_>, _handed: Option<Handed>) -> Result<Arc<dyn Target>, Cause> {
        thread::sleep(self.prepares);
        Ok(Arc::new(Empty))
    }

    fn check(&mut self, _offer: &Offer<'_>, _handed: Option<Handed>) -> Vec<Blocker> {
        Vec::new()
    }

    fn load_device(&mut self, _device: u16, _begins: bool, _part: &[u8]) -> Result<(), Cause> {
        Ok(())
    }

    fn restore(&mut self, _state: Payloads) -> Result<(), Cause> {
        thread::sleep(self.restores);
        Ok(())
    }

    fn take_locks_and_run(&mut self) -> Result<(), Cause> {
        Ok(())
    }

    fn abort(&mut self, _why: &str) {}
}

/// What comes of `guest` with 4 GiB, and such a destination.
fn large(mut takes: Prefaults, guest: &mut MockGuest) -> Result<Moved, NotMoved> {
    let (_dir, address) = socket();
    let destination = Destination::bind(destination_options(&address)).expect("listens");
    let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
    let theirs = sandbox.clone();
    let took = thread::spawn(move || destination.run(&mut takes, &Handle::new(None), &theirs));
    let options = SourceOptions {
        deadlines: patience(),
        // No page is sent by which anybody knew how fast that goes.
        limits: Limits {
            time: Some(Duration::from_secs(1)),
            on_time_out: OnTimeOut::Switch,
            ..Limits::default()
        },
        ..source_options(&address)
    };
    let source = Source::new(options, Arc::new(Empty), &Handle::new(None), &sandbox).expect("a source");
    let moved = source.run(guest, b"config", b"cpu");
    let took = took.join().expect("no panic");
    assert_eq!(took.is_ok(), moved.is_ok(), "{took:?}");
    moved
}

#[test]
fn a_destination_may_take_the_longer_the_more_memory_it_makes() {
    let mut guest = MockGuest::new(&Arc::<World>::default(), Fails::Nothing);
    let takes = Prefaults {
        prepares: LONGER,
        restores: Duration::ZERO,
    };
    let moved = large(takes, &mut guest);
    assert!(moved.is_ok(), "{moved:?}");
}

#[test]
fn a_destination_may_take_the_longer_the_more_memory_its_devices_reach() {
    let takes = Prefaults {
        prepares: Duration::ZERO,
        restores: LONGER,
    };
    let mut guest = MockGuest::new(&Arc::<World>::default(), Fails::Nothing);
    guest.paused_devices = vec![super::devices::part(0, true, b"state")];
    let moved = large(takes, &mut guest);
    assert!(moved.is_ok(), "{moved:?}");
}
