//! Memory that is handed over, and descriptors that are none of it.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use triarch_device_core::{NoSandbox, Sandbox};

use super::hostile::{connect, destination, offer, welcomed};
use super::mock::{Fails, MockGuest, MockSink, World, destination_options, regions, socket, source_options};
use crate::hand_over::{CHUNK, MAX_FILES};
use crate::stream::Stream;
use crate::wire::{Kind, Message, Role};
use crate::{
    Address, Cause, Check, Destination, DestinationError, Handed, Handle, Memory, Phase, Region, Source, SourceError,
    SourceOptions, Whereabouts, sentence,
};

/// Memory in files, which is never read here.
struct InFiles(Vec<File>);

impl InFiles {
    fn new(count: usize) -> Arc<Self> {
        let file = |n: usize| {
            let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).expect("a memory file"));
            file.write_all_at(&[n as u8], 0).expect("written");
            file
        };
        Arc::new(Self((0..count).map(file).collect()))
    }

    fn handed(&self) -> Handed {
        let files = self.0.iter().map(|file| file.try_clone().expect("a copy").into());
        Handed {
            files: files.collect(),
            places: places(),
        }
    }
}

/// Where the regions are.
fn places() -> Vec<(u64, u64)> {
    vec![(0, 0), (0, 1024 * crate::PAGE), (1, 0)]
}

impl Memory for InFiles {
    fn regions(&self) -> Vec<Region> {
        regions()
    }

    fn read(&self, _gpa: u64, _buffer: &mut [u8]) -> io::Result<()> {
        Err(io::Error::other("it was read"))
    }

    fn start_log(&self) -> io::Result<()> {
        Ok(())
    }

    fn fetch_log(&self) -> io::Result<Vec<Range<u64>>> {
        Ok(Vec::new())
    }

    fn hand_over(&self) -> Result<Handed, Cause> {
        Ok(self.handed())
    }

    fn stop_log(&self) {}
}

fn options(address: &Address) -> SourceOptions {
    SourceOptions {
        streams: 1,
        hand_over: true,
        ..source_options(address)
    }
}

#[test]
fn memory_is_there_and_nothing_of_it_was_sent() {
    // In one message, and in several.
    for count in [2, 3 * CHUNK + 1] {
        let (_dir, address) = socket();
        let listens = Destination::bind(destination_options(&address)).expect("listens");
        let world = Arc::<World>::default();
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let theirs = (world.clone(), sandbox.clone());
        let takes = thread::spawn(move || {
            let mut sink = MockSink::new(&theirs.0, Fails::Nothing);
            let taken = listens.run(&mut sink, &Handle::new(None), &theirs.1);
            taken.map(|taken| (taken, sink.handed))
        });
        let memory = InFiles::new(count);
        let mut guest = MockGuest::new(&world, Fails::Nothing);
        let source = Source::new(options(&address), memory.clone(), &Handle::new(None), &sandbox).expect("a source");
        let moved = source.run(&mut guest, b"config", b"cpu").expect("moved");
        let (taken, handed) = takes.join().expect("no panic").expect("taken");
        assert_eq!((world.running(), taken.bytes), ((false, true), 0));
        assert_eq!((moved.progress.pages, moved.progress.rounds), (0, 1));
        assert!(moved.progress.wire_bytes < 1000, "{:?}", moved.progress);
        let handed = handed.expect("files");
        assert_eq!(handed.places, places());
        let number = |file: &File| file.metadata().expect("a file").ino();
        let came: Vec<_> = handed.files.into_iter().map(|file| number(&file.into())).collect();
        assert_eq!(came, memory.0.iter().map(number).collect::<Vec<_>>());
    }
}

#[test]
fn a_guest_that_is_refused_runs_on() {
    for fails in [Fails::Prepare, Fails::Restore, Fails::Run] {
        let (_dir, address) = socket();
        let listens = Destination::bind(destination_options(&address)).expect("listens");
        let world = Arc::<World>::default();
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let theirs = (world.clone(), sandbox.clone());
        let takes = thread::spawn(move || {
            let mut sink = MockSink::new(&theirs.0, fails);
            listens.run(&mut sink, &Handle::new(None), &theirs.1)
        });
        let mut guest = MockGuest::new(&world, Fails::Nothing);
        let source = Source::new(options(&address), InFiles::new(2), &Handle::new(None), &sandbox).expect("a source");
        let error = source.run(&mut guest, b"config", b"cpu").expect_err("refused");
        assert_eq!(error.guest, Whereabouts::RunsHere, "{fails:?}");
        assert!(takes.join().expect("no panic").is_err());
        assert_eq!(world.running(), (true, false), "{fails:?}");
    }
}

#[test]
fn a_network_is_no_way_for_descriptors() {
    for address in ["tcp-plain:127.0.0.1:1", "tcp:127.0.0.1:1"] {
        let address: Address = address.parse().expect("an address");
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let source = Source::new(options(&address), InFiles::new(2), &Handle::new(None), &sandbox);
        assert!(matches!(source, Err(SourceError::Options(why)) if why.contains("unix:")));
        assert!(Check::new(options(&address), regions(), None).is_err());
    }
}

#[test]
fn a_question_has_the_descriptors_too() {
    let (_dir, address) = socket();
    let taken = destination(&address, &Arc::default());
    let check = Check::new(options(&address), regions(), Some(InFiles::new(2).handed())).expect("a question");
    assert_eq!(check.run(b"config", b"cpu").expect("an answer"), []);
    let _ = connect(&address, [9; 16], Role::Control);
    assert!(taken.join().expect("no panic").0.is_err());
}

/// What a destination says of a source that does this behind its greeting, and whether it kept any of the descriptors.
fn said_of(act: impl FnOnce(&mut Stream, &[BorrowedFd<'_>])) -> (String, bool) {
    let (_dir, address) = socket();
    let taken = destination(&address, &Arc::default());
    let mut control = connect(&address, [9; 16], Role::Control);
    welcomed(&mut control);
    let mut data = connect(&address, [9; 16], Role::Data(0));
    welcomed(&mut data);
    let (mut read, written) = io::pipe().expect("a pipe");
    let written = OwnedFd::from(written);
    let many = vec![written.as_fd(); CHUNK];
    act(&mut control, &many);
    drop(many);
    drop(written);
    let mut kept = Vec::new();
    rustix::fs::fcntl_setfl(&read, rustix::fs::OFlags::NONBLOCK).expect("a pipe");
    while let Ok(message) = control.receive(Duration::from_secs(20), "say why") {
        if matches!(message, Message::Abort(_)) {
            break;
        }
    }
    // It need not wait for us to have heard that.
    let _ = control.send(&Message::End);
    let (end, _) = taken.join().expect("no panic");
    // As long as anybody has its other end, reading would wait.
    let kept = read.read_to_end(&mut kept).is_err();
    drop((control, data));
    (sentence(&end.expect_err("refused")), kept)
}

fn files(count: usize, places: Vec<(u64, u64)>) -> Message<'static> {
    Message::Files {
        count: count as u32,
        places,
    }
}

#[test]
fn what_is_not_as_it_was_said_is_refused_and_closed() {
    // The message itself.
    for (message, expected) in [
        (files(0, places()), "or none"),
        (files(MAX_FILES + 1, places()), "more files"),
        (files(1, places()), "does not come"),
    ] {
        let (said, kept) = said_of(|control, _| drop(control.send(&message)));
        assert!(said.contains(expected) && !kept, "{said}");
    }
    // Fewer, more, none, and another number of regions.
    for (count, sent, expected) in [
        (3, 2, "another number of descriptors"),
        (2, 3, "another number of descriptors"),
        (2, CHUNK, "another number of descriptors"),
    ] {
        let (said, kept) = said_of(|control, many| {
            control.send(&files(count, places())).expect("sent");
            control.send_files(&many[..sent]).expect("sent");
        });
        assert!(said.contains(expected) && !kept, "{count}, {sent}: {said}");
    }
    let (said, kept) = said_of(|control, many| {
        control.send(&files(2, vec![(0, 0)])).expect("sent");
        control.send_files(&many[..2]).expect("sent");
        control.send(&Message::Offer(offer())).expect("sent");
    });
    assert!(said.contains("another number of regions") && !kept, "{said}");
    let (said, kept) = said_of(|control, many| {
        control.send(&files(2, places())).expect("sent");
        control.send_files(&many[..2]).expect("sent");
        control.send(&files(2, places())).expect("sent");
        control.send_files(&many[..2]).expect("sent");
    });
    assert!(said.contains("Files where an offer is due") && !kept, "{said}");
    // A message where descriptors should be, and descriptors where none should be.
    let (said, kept) = said_of(|control, _| {
        control.send(&files(2, places())).expect("sent");
        control.send(&Message::Offer(offer())).expect("sent");
    });
    assert!(said.contains("another number of descriptors") && !kept, "{said}");
    // They come with bytes that are zeroes, which is the head of no message.
    let (said, kept) = said_of(|control, many| (0..8).for_each(|_| control.send_files(many).expect("sent")));
    assert!(said.contains("unknown kind 0") && !kept, "{said}");
}

#[test]
fn a_destination_tells_that_memory_was_handed_over() {
    let (_dir, address) = socket();
    let listens = Destination::bind(destination_options(&address)).expect("listens");
    let handle = Handle::new(None);
    let theirs = handle.clone();
    let takes = thread::spawn(move || {
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let mut sink = MockSink::new(&Arc::default(), Fails::Nothing);
        listens.run(&mut sink, &theirs, &sandbox)
    });
    let mut control = connect(&address, [9; 16], Role::Control);
    welcomed(&mut control);
    let mut data = connect(&address, [9; 16], Role::Data(0));
    welcomed(&mut data);
    let handed = InFiles::new(2).handed();
    crate::hand_over::send(&mut control, &handed).expect("sent");
    control.send(&Message::Offer(offer())).expect("sent");
    assert!(
        control
            .expect(Kind::Accepted, Duration::from_secs(20), "accept")
            .is_ok()
    );
    for _ in 0..1000 {
        if handle.progress().phase == Phase::HandingOver {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(handle.progress().phase, Phase::HandingOver);
    assert!(handle.cancel());
    let end = takes.join().expect("no panic");
    assert!(matches!(end, Err(DestinationError::Cancelled)), "{end:?}");
}
