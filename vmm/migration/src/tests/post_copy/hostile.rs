//! What is no part of post-copy.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use triarch_device_core::{NoSandbox, Sandbox};

use super::super::mock::{
    Fails, MockSink, World, blocker, deadlines, destination_options, regions, socket, source_options,
};
use super::lazy::{LazySink, MockLacking, Seen};
use crate::connect::Dialer;
use crate::stream::{Interrupt, Stream};
use crate::wire::{Hello, Kind, MAX_WANTED, Message, Pages, Role, Runs, Token, encode};
use crate::{
    Address, Check, Destination, DestinationError, Handle, Lacking, Layout, Offer, PAGE, PostCopy, SourceOptions, Taken,
};

const WAIT: Duration = Duration::from_secs(20);
const TOKEN: Token = [5; 16];

fn connect(address: &Address, role: Role) -> Stream {
    let dialer = Dialer::new(address, None, deadlines()).expect("an address");
    let mut stream = dialer.connect(&Interrupt::default()).expect("connected");
    let hello = Hello {
        token: TOKEN,
        role,
        streams: 1,
        vmm: "evil".into(),
    };
    stream.send(&Message::Hello(hello)).expect("sent");
    let found = stream.receive(WAIT, "answer").expect("an answer");
    assert!(matches!(found, Message::Welcome(_)), "{found:?}");
    stream
}

fn pages(gpa: u64, count: u64) -> Runs {
    let mut runs = Runs::default();
    runs.push(gpa * PAGE, count * PAGE, false);
    runs
}

type Ended = thread::JoinHandle<Result<Taken, DestinationError>>;

/// A session that has all its streams. Control, memory, what is wanted, what is pushed.
fn begun() -> (tempfile::TempDir, Address, Ended, Arc<Seen>, [Stream; 4]) {
    let (dir, address, ended, seen) = waits(false);
    let streams = [Role::PostCopy, Role::Data(0), Role::Demand, Role::Push].map(|role| connect(&address, role));
    (dir, address, ended, seen, streams)
}

/// A destination.
fn waits(no_faults: bool) -> (tempfile::TempDir, Address, Ended, Arc<Seen>) {
    let (dir, address) = socket();
    let destination = Destination::bind(destination_options(&address)).expect("listens");
    let (world, seen) = (Arc::<World>::default(), Arc::<Seen>::default());
    let theirs = seen.clone();
    let ended = thread::spawn(move || {
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let mut sink = LazySink {
            sink: MockSink::new(&world, Fails::Nothing),
            seen: theirs,
            no_faults,
        };
        destination.run(&mut sink, &Handle::new(None), &sandbox)
    });
    (dir, address, ended, seen)
}

/// A session that said `missing` and then all of the state. Control, what is wanted, what is pushed.
fn session(missing: Runs) -> (tempfile::TempDir, Address, Ended, Arc<Seen>, [Stream; 3]) {
    let (dir, address, ended, seen, [mut control, mut data, demand, push]) = begun();
    let offer = Offer {
        layout: Layout::new(regions()).expect("a layout"),
        config: b"config",
        cpu: b"cpu",
        post_copy: true,
    };
    control.send(&Message::Offer(offer)).expect("sent");
    assert!(control.expect(Kind::Accepted, WAIT, "accept").is_ok());
    control.send(&Message::Switch).expect("sent");
    control.send(&Message::Missing(missing)).expect("sent");
    let mut payloads = triarch_state::Payloads::default();
    payloads
        .put(super::super::mock::KIND, "first", &vec![7; 100])
        .expect("a payload");
    let state = payloads.into_bytes().expect("bytes");
    let total = state.len() as u64;
    // What was missing may be refused by now.
    let _ = control.send(&Message::State { total, part: &state });
    let _ = data.send(&Message::End);
    let _ = control.send(&Message::Complete);
    (dir, address, ended, seen, [control, demand, push])
}

#[test]
fn memory_that_is_handed_over_does_not_come_later() {
    let (_dir, _address, ended, _seen, [mut control, _data, _demand, _push]) = begun();
    let files = Message::Files {
        count: 1,
        places: vec![(0, 0); regions().len()],
    };
    control.send(&files).expect("sent");
    let told = control.receive(WAIT, "refuse it");
    assert!(
        matches!(told, Ok(Message::Abort(why)) if why.contains("handed over")),
        "{told:?}"
    );
    let _ = control.send(&Message::End);
    assert!(ended.join().expect("no panic").is_err());
}

#[test]
fn who_asks_is_told_whether_memory_may_come_later() {
    let (_dir, address, ended, _seen) = waits(true);
    let ask = |post_copy: Option<PostCopy>| {
        let options = SourceOptions {
            post_copy,
            ..source_options(&address)
        };
        let check = Check::new(options, regions(), None).expect("a question");
        check.run(b"config", b"cpu").expect("an answer")
    };
    assert_eq!(ask(None), []);
    assert_eq!(ask(Some(PostCopy::default())), [blocker(0)]);
    let mut control = connect(&address, Role::PostCopy);
    let _ = control.send(&Message::Abort("enough"));
    drop(control);
    assert!(ended.join().expect("no panic").is_err());
}

fn lacks(demand: &mut Stream) -> Vec<(u64, u64)> {
    let mut all = Vec::new();
    loop {
        match demand.receive(WAIT, "say what is lacking").expect("an answer") {
            Message::Lacks(runs) => all.extend(runs.iter().map(|(gpa, len)| (gpa / PAGE, len / PAGE))),
            Message::Serve => return all,
            other => panic!("{other:?}"),
        }
    }
}

/// Serves what is wanted with pages of `byte`, once.
fn serve(demand: &mut Stream, byte: u8) -> u64 {
    loop {
        let gpa = match demand.receive(WAIT, "want").expect("a wish") {
            Message::Alive => continue,
            Message::Want(runs) => runs.iter().next().expect("a page").0,
            other => panic!("{other:?}"),
        };
        send(demand, gpa / PAGE, 1, byte);
        demand.send(&Message::Served).expect("sent");
        return gpa / PAGE;
    }
}

fn send(stream: &mut Stream, gpa: u64, count: u64, byte: u8) {
    let bytes = vec![byte; (count * PAGE) as usize];
    let pages = Pages {
        runs: pages(gpa, count),
        packed: false,
        bytes: &bytes,
    };
    let _ = stream.send(&Message::Pages(pages));
}

fn lacking(seen: &Seen) -> Arc<MockLacking> {
    seen.lacking.lock().unwrap().clone().expect("memory is lacking")
}

#[test]
fn pages_that_there_are_not_cannot_be_missing() {
    let (_dir, _, ended, seen, streams) = session(pages(1536, 1));
    let error = ended.join().expect("no panic").expect_err("refused");
    assert!(matches!(error, DestinationError::Outside { .. }), "{error:?}");
    assert!(seen.lacking.lock().unwrap().is_none());
    drop(streams);
}

#[test]
fn what_came_twice_or_nobody_lacks_is_not_written() {
    let (_dir, address, ended, seen, [mut control, mut demand, mut push]) = session(pages(10, 4));
    assert_eq!(lacks(&mut demand), [(10, 1), (11, 1), (12, 1), (13, 1)]);
    // Restoring it touches the first.
    assert_eq!(serve(&mut demand, 1), 10);
    assert!(control.expect(Kind::Ready, WAIT, "restore").is_ok());
    control.send(&Message::Go).expect("sent");
    assert!(control.expect(Kind::Running, WAIT, "run").is_ok());
    control.send(&Message::End).expect("sent");
    // The page that is there, others that nobody lacks, one that is lacking, and that one again.
    send(&mut push, 10, 1, 9);
    send(&mut push, 40, 20, 9);
    send(&mut push, 11, 1, 2);
    send(&mut push, 11, 1, 9);
    push.send(&Message::Zeroes(pages(10, 3))).expect("sent");
    let lacking = lacking(&seen);
    super::until("pages", || lacking.remaining() == Some(PAGE));
    let byte = |page: u64| {
        let mut byte = [0; 1];
        crate::Memory::read(&*lacking.memory, page * PAGE, &mut byte).expect("memory");
        byte[0]
    };
    assert_eq!([10, 11, 12, 40, 59].map(byte), [1, 2, 0, 0, 0]);
    assert_eq!(lacking.ignored.load(Ordering::SeqCst), 24);
    // A page that there is not ends the connection, and not the guest.
    send(&mut push, 1536, 1, 9);
    super::until("the loss", || seen.turns.lock().unwrap().len() == 2);
    drop((push, demand));
    let (mut demand, mut push) = (connect(&address, Role::Demand), connect(&address, Role::Push));
    assert_eq!(lacks(&mut demand), [(13, 1)]);
    send(&mut push, 13, 1, 3);
    loop {
        match demand.receive(WAIT, "end").expect("an end") {
            Message::Alive => {}
            Message::End => break,
            other => panic!("{other:?}"),
        }
    }
    demand.send(&Message::End).expect("sent");
    assert!(ended.join().expect("no panic").expect("taken").confirmed);
    assert_eq!([10, 11, 12, 13].map(byte), [1, 2, 0, 3]);
}

#[test]
fn nobody_else_gets_in_between() {
    let (_dir, address, ended, seen, [mut control, mut demand, push]) = session(pages(10, 1));
    lacks(&mut demand);
    assert_eq!(serve(&mut demand, 1), 10);
    // Nothing is lacking any more: who confirms that is the source.
    loop {
        match demand.receive(WAIT, "end").expect("an end") {
            Message::Alive => {}
            Message::End => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(control.expect(Kind::Ready, WAIT, "restore").is_ok());
    control.send(&Message::Go).expect("sent");
    assert!(control.expect(Kind::Running, WAIT, "run").is_ok());
    control.send(&Message::End).expect("sent");
    drop((demand, push));
    let dialer = Dialer::new(&address, None, deadlines()).expect("an address");
    let mut stranger = dialer.connect(&Interrupt::default()).expect("connected");
    let hello = Hello {
        token: [6; 16],
        role: Role::Demand,
        streams: 1,
        vmm: "evil".into(),
    };
    stranger.send(&Message::Hello(hello)).expect("sent");
    assert!(stranger.receive(WAIT, "answer").is_err());
    let (mut demand, _push) = (connect(&address, Role::Demand), connect(&address, Role::Push));
    assert!(lacks(&mut demand).is_empty());
    assert!(demand.expect(Kind::End, WAIT, "end").is_ok());
    demand.send(&Message::End).expect("sent");
    assert!(ended.join().expect("no panic").expect("taken").confirmed);
    assert_eq!(lacking(&seen).remaining(), Some(0));
}

#[test]
fn wishes_are_bounded() {
    let mut runs = Runs::default();
    (0..MAX_WANTED as u64 + 1).for_each(|page| runs.push(2 * page * PAGE, PAGE, false));
    for message in [Message::Want(runs), Message::Want(pages(0, 2))] {
        let mut bytes = Vec::new();
        encode::message(&message, &mut bytes);
        let (head, body) = bytes.split_first_chunk().expect("a head");
        let read = crate::wire::decode::head(*head).and_then(|(kind, _)| crate::wire::decode::body(kind, body));
        assert!(read.is_err(), "{read:?}");
    }
}
