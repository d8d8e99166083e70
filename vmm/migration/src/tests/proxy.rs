//! Both engines with a network between them that loses the connection before or after any message.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use triarch_device_core::{NoSandbox, Sandbox};

use super::mock::{Fails, MockGuest, MockMemory, MockSink, World, destination_options, regions, source_options};
use crate::wire::{HEAD, Message, Role, decode};
use crate::{Address, Deadlines, Destination, DestinationOptions, Handle, Phase, Source, SourceOptions, Whereabouts};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

/// Where the control stream is lost.
#[derive(Debug, Clone, Copy)]
struct Cut {
    from: Side,
    /// Number of the message.
    message: usize,
    /// It still arrives.
    arrives: bool,
    /// Whether the source reaches the destination later; if not, one of them may as well be dead.
    heals: bool,
    /// Nobody hears of it: nothing more arrives.
    silent: bool,
}

fn frame(from: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; HEAD];
    from.read_exact(&mut bytes)?;
    let len = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
    bytes.resize(HEAD + len, 0);
    from.read_exact(&mut bytes[HEAD..])?;
    Ok(bytes)
}

fn role(hello: &[u8]) -> Role {
    let (head, body) = hello.split_first_chunk().expect("a head");
    let (kind, _) = decode::head(*head).expect("a kind");
    match decode::body(kind, body) {
        Ok(Message::Hello(hello)) => hello.role,
        other => panic!("{other:?} at first"),
    }
}

/// Passes messages on until the one at which the connection is lost.
fn pass(mut from: UnixStream, mut to: UnixStream, first: usize, lost_at: Option<(usize, bool)>, silent: bool) {
    for number in first.. {
        let Ok(bytes) = frame(&mut from) else { break };
        let lost = lost_at.filter(|(at, _)| *at == number);
        if lost.is_none_or(|(_, arrives)| arrives) && to.write_all(&bytes).is_err() {
            break;
        }
        if lost.is_some() {
            // As long as somebody has the other end open.
            while silent && frame(&mut from).is_ok() {}
            // A message that was passed on is read before the end of the stream is.
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn serve(mut source: UnixStream, to: &Path, cut: Cut) {
    let Ok(hello) = frame(&mut source) else { return };
    let role = role(&hello);
    if role == Role::Ask && !cut.heals {
        return;
    }
    let at = move |from| (role == Role::Control && cut.from == from).then_some((cut.message, cut.arrives));
    let lost = at(Side::Source).filter(|(message, _)| *message == 0);
    if lost.is_some_and(|(_, arrives)| !arrives) {
        return;
    }
    let mut destination = UnixStream::connect(to).expect("the destination listens");
    destination.write_all(&hello).expect("it takes a hello");
    if lost.is_some() {
        return;
    }
    let pairs = (
        source.try_clone().expect("a copy"),
        destination.try_clone().expect("a copy"),
    );
    let back = thread::spawn(move || pass(pairs.1, pairs.0, 0, at(Side::Destination), cut.silent));
    pass(source, destination, 1, at(Side::Source), cut.silent);
    back.join().expect("no panic");
}

fn proxy(listener: UnixListener, to: PathBuf, cut: Cut, stop: Arc<AtomicBool>) {
    let mut served = Vec::new();
    while let Ok((source, _)) = listener.accept() {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let to = to.clone();
        served.push(thread::spawn(move || serve(source, &to, cut)));
    }
    for one in served {
        one.join().expect("no panic");
    }
}

/// What came of it: whether the source says that it moved, or where the guest is.
fn migrate_through(cut: Cut) -> (Result<(), Whereabouts>, (bool, bool)) {
    let outcome = if cut.heals { 5 } else { 1 };
    migrate_with(cut, Duration::from_secs(8), Duration::from_secs(outcome))
}

/// The same, with these deadlines for silence and the outcome.
fn migrate_with(cut: Cut, silence: Duration, outcome: Duration) -> (Result<(), Whereabouts>, (bool, bool)) {
    let dir = tempfile::tempdir().expect("a directory");
    let (front, back) = (dir.path().join("front"), dir.path().join("back"));
    let deadlines = Deadlines {
        connect: Duration::from_secs(8),
        message: Duration::from_secs(8),
        silence,
        outcome,
    };
    let options = DestinationOptions {
        deadlines,
        ..destination_options(&Address::Unix(back.clone()))
    };
    let destination = Destination::bind(options).expect("listens");
    let listener = UnixListener::bind(&front).expect("listens");
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let proxies = thread::spawn(move || proxy(listener, back, cut, stopped));

    let world = Arc::<World>::default();
    let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
    let takers = Handle::new(None);
    let (theirs, their_handle, their_sandbox) = (world.clone(), takers.clone(), sandbox.clone());
    let takes = thread::spawn(move || {
        let mut sink = MockSink::new(&theirs, Fails::Nothing);
        let taken = destination.run(&mut sink, &their_handle, &their_sandbox);
        assert_eq!(taken.is_ok(), sink.memory.is_some());
        taken.map(|_| ())
    });
    let memory = MockMemory::new(&regions());
    memory.fill(3);
    let mut guest = MockGuest::new(&world, Fails::Nothing);
    let options = SourceOptions {
        deadlines,
        ..source_options(&Address::Unix(front.clone()))
    };
    let handle = Handle::new(None);
    let source = Source::new(options, memory, &handle, &sandbox).expect("a source");
    let moved = source.run(&mut guest, b"config", b"cpu");
    // A destination that heard of nobody waits for ever.
    if takers.progress().phase == Phase::Connecting {
        takers.cancel();
    }
    let taken = takes.join().expect("no panic");
    assert_eq!(taken.is_ok(), world.running().1, "{cut:?}: {taken:?}");
    stop.store(true, Ordering::SeqCst);
    let _ = UnixStream::connect(&front);
    proxies.join().expect("no panic");
    (moved.map(|_| ()).map_err(|error| error.guest), world.running())
}

#[test]
fn wherever_the_connection_is_lost_one_guest_runs() {
    let mut cuts = Vec::new();
    // Of the source: hello, offer, switch, state, complete, go, end. Of the destination: welcome, accepted, ready, running.
    for (from, messages) in [(Side::Source, 0..8), (Side::Destination, 0..5)] {
        for message in messages {
            for (arrives, heals) in [(false, false), (false, true), (true, false), (true, true)] {
                cuts.push(Cut {
                    from,
                    message,
                    arrives,
                    heals,
                    silent: false,
                });
            }
        }
    }
    let ends: Vec<_> = thread::scope(|scope| {
        let tried: Vec<_> = cuts
            .iter()
            .map(|cut| scope.spawn(|| (*cut, migrate_through(*cut))))
            .collect();
        tried.into_iter().map(|one| one.join().expect("no panic")).collect()
    });
    let mut seen = Vec::new();
    for (cut, (moved, running)) in ends {
        let expected = match moved {
            Ok(()) => (false, true),
            Err(Whereabouts::RunsHere) => (true, false),
            // Nobody can know, and the source has it paused.
            Err(Whereabouts::Unknown) if !cut.heals => (false, running.1),
            Err(other) => panic!("{cut:?}: {other:?}"),
        };
        assert_eq!(running, expected, "{cut:?}");
        seen.push((moved, running));
    }
    for end in [
        (Ok(()), (false, true)),
        (Err(Whereabouts::RunsHere), (true, false)),
        (Err(Whereabouts::Unknown), (false, true)),
        (Err(Whereabouts::Unknown), (false, false)),
    ] {
        assert!(seen.contains(&end), "{end:?} was not seen");
    }
}

#[test]
fn who_heard_nothing_after_the_guest_was_given_away_asks_while_somebody_answers() {
    // That it runs is said, and lost on the way; the connection stands on both sides.
    let cut = Cut {
        from: Side::Destination,
        message: 3,
        arrives: false,
        heals: true,
        silent: true,
    };
    // The destination answers for 5 and 6 s after that.
    let end = migrate_with(cut, Duration::from_secs(15), Duration::from_secs(6));
    assert_eq!(end, (Ok(()), (false, true)));
}
