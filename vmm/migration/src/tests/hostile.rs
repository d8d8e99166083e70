//! Destinations with sources that are none.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use proptest::prelude::*;
use triarch_device_core::{NoSandbox, Sandbox};

use super::mock::{
    Fails, MockGuest, MockMemory, MockSink, World, destination_options, migrate, regions, socket, source_options,
};
use crate::connect::Dialer;
use crate::stream::{Answer, Interrupt, Stream, StreamError};
use crate::wire::{Hello, Kind, Message, Pages, Role, Runs, Token, encode};
use crate::{
    Address, Check, Destination, DestinationError, Handle, Layout, MAX_BLOCKERS, Offer, PAGE, fuzzing, sentence,
};

const WAIT: Duration = Duration::from_secs(20);

pub(super) type Taken = JoinHandle<(Result<crate::Taken, DestinationError>, bool)>;

pub(super) fn destination(address: &Address, world: &Arc<World>) -> Taken {
    let destination = Destination::bind(destination_options(address)).expect("listens");
    let world = world.clone();
    thread::spawn(move || {
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let mut sink = MockSink::new(&world, Fails::Nothing);
        let taken = destination.run(&mut sink, &Handle::new(None), &sandbox);
        (taken, sink.memory.is_some())
    })
}

pub(super) fn connect(address: &Address, token: Token, role: Role) -> Stream {
    let dialer = Dialer::new(address, None, super::mock::deadlines()).expect("an address");
    let mut stream = dialer.connect(&Interrupt::default()).expect("connected");
    let hello = Hello {
        token,
        role,
        streams: 1,
        vmm: "evil".into(),
    };
    stream.send(&Message::Hello(hello)).expect("sent");
    stream
}

pub(super) fn welcomed(stream: &mut Stream) {
    let found = stream.receive(WAIT, "answer").expect("an answer");
    assert!(matches!(found, Message::Welcome(_)), "{found:?}");
}

pub(super) fn offer() -> Offer<'static> {
    Offer {
        layout: Layout::new(regions()).expect("a layout"),
        config: b"config",
        cpu: b"cpu",
        post_copy: false,
    }
}

/// A session in which memory is awaited.
fn session(address: &Address) -> (Stream, Stream) {
    let token = [9; 16];
    let mut control = connect(address, token, Role::Control);
    welcomed(&mut control);
    let mut data = connect(address, token, Role::Data(0));
    welcomed(&mut data);
    control.send(&Message::Offer(offer())).expect("sent");
    assert!(control.expect(Kind::Accepted, WAIT, "accept").is_ok());
    (control, data)
}

fn at(gpa: u64) -> Runs {
    let mut runs = Runs::default();
    runs.push(gpa, PAGE, false);
    runs
}

/// What the source is told, and the destination says, when one of these comes.
fn told(on_control: bool, messages: &[Message]) -> (String, DestinationError) {
    let (_dir, address) = socket();
    let world = Arc::<World>::default();
    let taken = destination(&address, &world);
    let (mut control, mut data) = session(&address);
    for message in messages {
        let stream = if on_control { &mut control } else { &mut data };
        // It may have been closed by then.
        let _ = stream.send(message);
    }
    let why = match control.expect(Kind::Running, WAIT, "say no") {
        Err(Answer::Abort(why)) => why,
        other => panic!("{messages:?}: {other:?}"),
    };
    drop((control, data));
    let (taken, has_memory) = taken.join().expect("no panic");
    assert!(!has_memory && world.aborted.load(Ordering::SeqCst));
    assert_eq!(world.running(), (false, false));
    let error = taken.expect_err("no guest");
    assert_eq!(sentence(&error), why);
    (why, error)
}

#[test]
fn memory_that_is_none_is_refused() {
    let page = [1; PAGE as usize];
    let pages = |gpa, packed, bytes| {
        let runs = at(gpa);
        Message::Pages(Pages { runs, packed, bytes })
    };
    for gpa in [1536 * PAGE, 1 << 40, 0_u64.wrapping_sub(2 * PAGE)] {
        let (_, error) = told(false, &[pages(0, false, &page), pages(gpa, false, &page)]);
        assert!(
            matches!(error, DestinationError::Outside { gpa: found } if found == gpa),
            "{error:?}"
        );
        let (_, error) = told(false, &[Message::Zeroes(at(gpa))]);
        assert!(matches!(error, DestinationError::Outside { .. }), "{error:?}");
    }
    let (why, error) = told(false, &[pages(0, true, &page[..100])]);
    assert!(matches!(error, DestinationError::Damaged), "{error:?}");
    assert!(why.contains("compression"), "{why}");
}

#[test]
fn what_is_not_due_is_refused() {
    let state = |total, part| Message::State { total, part };
    for (on_control, messages, words) in [
        (true, vec![Message::Go], "Go"),
        (true, vec![Message::Ready], "Ready"),
        (true, vec![Message::Complete], "another length"),
        (true, vec![state(4, b"abc"), Message::Complete], "another length"),
        (true, vec![state(4, b"abc"), state(4, b"de")], "another length"),
        (true, vec![state(4, b"abc"), state(5, b"de")], "another length"),
        (true, vec![Message::Zeroes(at(0))], "Zeroes"),
        (true, vec![Message::Abort("changed my mind")], "changed my mind"),
        (false, vec![Message::Go], "Go"),
        (false, vec![Message::Switch], "Switch"),
    ] {
        let (why, _) = told(on_control, &messages);
        assert!(why.contains(words), "{messages:?}: {why}");
    }
}

#[test]
fn a_state_that_is_none_is_refused() {
    for state in [
        &b"{}"[..],
        b"[]",
        br#"[{"kind":"mock","id":"first","version":2,"state":[]}]"#,
    ] {
        let (_dir, address) = socket();
        let world = Arc::<World>::default();
        let taken = destination(&address, &world);
        let (mut control, mut data) = session(&address);
        data.send(&Message::End).expect("sent");
        let total = state.len() as u64;
        control.send(&Message::State { total, part: state }).expect("sent");
        control.send(&Message::Complete).expect("sent");
        let answer = control.expect(Kind::Ready, WAIT, "restore");
        assert!(matches!(answer, Err(Answer::Abort(_))), "{answer:?}");
        drop(control);
        assert!(taken.join().expect("no panic").0.is_err());
        assert!(world.aborted.load(Ordering::SeqCst));
    }
}

#[test]
fn strangers_do_not_disturb_a_migration() {
    let (_dir, address) = socket();
    let destination = Destination::bind(destination_options(&address)).expect("listens");
    let Address::Unix(path) = &address else {
        panic!("a path")
    };
    let mut garbage = UnixStream::connect(path).expect("connected");
    garbage
        .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .expect("sent");
    let _gone = UnixStream::connect(path).expect("connected");
    let _data = connect(&address, [1; 16], Role::Data(0));
    let _ask = connect(&address, [1; 16], Role::Ask);
    let memory = MockMemory::new(&regions());
    memory.fill(20);
    let mut guest = MockGuest::new(&Arc::default(), Fails::Nothing);
    let end = migrate(
        destination,
        Fails::Nothing,
        source_options(&address),
        &memory,
        &mut guest,
        &Handle::new(None),
    );
    assert!(end.source.is_ok(), "{:?}", end.source);
}

#[test]
fn who_says_who_he_is_byte_by_byte_is_not_waited_for() {
    let (_dir, address) = socket();
    let destination = Destination::bind(destination_options(&address)).expect("listens");
    let Address::Unix(path) = &address else {
        panic!("a path")
    };
    let mut slow = UnixStream::connect(path).expect("connected");
    slow.write_all(&[1]).expect("sent");
    let mut guest = MockGuest::new(&Arc::default(), Fails::Nothing);
    let end = migrate(
        destination,
        Fails::Nothing,
        source_options(&address),
        &MockMemory::new(&regions()),
        &mut guest,
        &Handle::new(None),
    );
    assert!(end.source.is_ok(), "{:?}", end.source);
    drop(slow);
}

#[test]
fn a_stream_without_the_token_is_not_of_the_session() {
    let (_dir, address) = socket();
    let taken = destination(&address, &Arc::default());
    let mut control = connect(&address, [9; 16], Role::Control);
    welcomed(&mut control);
    let mut wrong = connect(&address, [8; 16], Role::Data(0));
    let found = wrong.receive(WAIT, "answer").map(|_| ());
    assert!(matches!(found, Err(StreamError::Closed)), "{found:?}");
    let mut right = connect(&address, [9; 16], Role::Data(0));
    welcomed(&mut right);
    drop((control, right));
    assert!(taken.join().expect("no panic").0.is_err());
}

#[test]
fn another_version_is_refused_by_name() {
    let (_dir, address) = socket();
    let taken = destination(&address, &Arc::default());
    let Address::Unix(path) = &address else {
        panic!("a path")
    };
    let mut bytes = Vec::new();
    let hello = Hello {
        token: [0; 16],
        role: Role::Control,
        streams: 1,
        vmm: String::new(),
    };
    encode::message(&Message::Hello(hello), &mut bytes);
    bytes[16] = 77;
    let socket = UnixStream::connect(path).expect("connected");
    (&socket).write_all(&bytes).expect("sent");
    let mut answer = vec![0; 8];
    std::io::Read::read_exact(&mut &socket, &mut answer).expect("an answer");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut &socket, &mut text).expect("text");
    assert!(text.contains("format 77"), "{text}");
    // It waits for another one.
    assert!(!taken.is_finished());
    let mut control = connect(&address, [9; 16], Role::Control);
    welcomed(&mut control);
    let mut data = connect(&address, [9; 16], Role::Data(0));
    welcomed(&mut data);
    drop((control, data));
    assert!(taken.join().expect("no panic").0.is_err());
}

#[test]
fn who_only_asks_takes_nothing_away() {
    let (_dir, address) = socket();
    let taken = destination(&address, &Arc::default());
    // One that says nothing, one that says something else, one that goes before the answer.
    let silent = connect(&address, [1; 16], Role::Check);
    let mut wrong = connect(&address, [2; 16], Role::Check);
    welcomed(&mut wrong);
    wrong.send(&Message::Go).expect("sent");
    assert!(matches!(
        wrong.receive(WAIT, "answer"),
        Err(StreamError::Closed | StreamError::Io(_))
    ));
    let mut gone = connect(&address, [3; 16], Role::Check);
    welcomed(&mut gone);
    gone.send(&Message::Offer(offer())).expect("sent");
    drop((silent, gone));
    let ask = || {
        let check = Check::new(source_options(&address), regions(), None).expect("a question");
        check.run(b"config", b"cpu").expect("an answer")
    };
    assert_eq!((ask(), ask()), (vec![], vec![]));
    // A session is taken as before; who asks meanwhile is told so.
    let token = [9; 16];
    let mut control = connect(&address, token, Role::Control);
    welcomed(&mut control);
    let mut late = connect(&address, [4; 16], Role::Check);
    let told = late.receive(WAIT, "answer");
    assert!(
        matches!(told, Ok(Message::Abort(why)) if why.contains("another guest")),
        "{told:?}"
    );
    let mut data = connect(&address, token, Role::Data(0));
    welcomed(&mut data);
    control.send(&Message::Offer(offer())).expect("sent");
    assert!(control.expect(Kind::Accepted, WAIT, "accept").is_ok());
    drop((control, data));
    assert!(taken.join().expect("no panic").0.is_err());
}

#[test]
fn all_that_is_in_the_way_is_told() {
    let (_dir, address) = socket();
    let destination = Destination::bind(destination_options(&address)).expect("listens");
    let memory = MockMemory::new(&regions());
    let handle = Handle::new(None);
    let asks = thread::spawn({
        let options = source_options(&address);
        move || {
            Check::new(options, regions(), None)
                .expect("a question")
                .run(b"config", b"cpu")
        }
    });
    let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
    let theirs = handle.clone();
    let waits = thread::spawn(move || {
        let mut sink = MockSink::new(&Arc::default(), Fails::Prepare);
        destination.run(&mut sink, &theirs, &sandbox)
    });
    let found = asks.join().expect("no panic").expect("an answer");
    let expected: Vec<_> = (0..MAX_BLOCKERS).map(super::mock::blocker).collect();
    assert_eq!(found, expected);
    assert!(!waits.is_finished() && !memory.is_logging());
    assert!(handle.cancel());
    let end = waits.join().expect("no panic");
    assert!(matches!(end, Err(DestinationError::Cancelled)), "{end:?}");
}

#[test]
fn the_seeds_of_the_fuzz_target_are_understood() {
    let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fuzz/seeds/migration");
    for entry in std::fs::read_dir(seeds).expect("seeds") {
        let path = entry.expect("an entry").path();
        let bytes = std::fs::read(&path).expect("a file");
        let understood = if path.ends_with("post_copy") { 0 } else { bytes.len() };
        assert_eq!(fuzzing::stream(&bytes), understood, "{}", path.display());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn the_fuzz_target_takes_anything(
        kinds in prop::collection::vec((prop_oneof![0..22_u16, 63..70_u16], prop::collection::vec(any::<u8>(), 0..64)), 0..8),
        pages in prop::collection::vec((0..80_u64, any::<bool>(), any::<u8>()), 0..8),
    ) {
        let mut input = Vec::new();
        for (page, packed, byte) in pages {
            let plain = [byte; PAGE as usize];
            let small = lz4_flex::block::compress(&plain);
            let bytes = if packed { &small[..] } else { &plain };
            let mut head = Vec::new();
            let tail = encode::message(&Message::Pages(Pages { runs: at(page * PAGE), packed, bytes }), &mut head);
            input.extend_from_slice(&head);
            input.extend_from_slice(tail);
        }
        for (kind, body) in kinds {
            input.extend_from_slice(&kind.to_le_bytes());
            input.extend_from_slice(&[0, 0]);
            input.extend_from_slice(&(body.len() as u32).to_le_bytes());
            input.extend_from_slice(&body);
        }
        fuzzing::stream(&input);
    }
}
