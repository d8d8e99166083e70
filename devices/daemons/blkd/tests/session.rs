//! Sessions with front ends that behave, that die, and that do not behave.

mod front_end;

use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use front_end::{BackEnd, MEMORY, fds, image, memory, message, ring, words};
use triarch_daemon::backend::{ChannelError, SessionError, borrow};

const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;

/// Where the front end sees the memory that guests see at 0.
const USER: u64 = 0x7000_0000_0000;
/// VERSION_1 and the protocol's own bit.
const FEATURES: u64 = 1 << 32 | 1 << 30;
/// INFLIGHT_SHMFD and what goes with it.
const PROTOCOL: u64 = 1 << 0 | 1 << 3 | 1 << 9 | 1 << 12;

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const SIZE: u16 = 8;

/// Writes request `head`: a write of 512 bytes of `fill` to sector `sector`, made of three descriptors.
fn offer(file: &File, slot: u16, head: u16, sector: u64, fill: u8) {
    let base = 0x10000 + u64::from(head) * 0x1000;
    let mut header = [0; 16];
    header[0] = 1;
    header[8..].copy_from_slice(&sector.to_le_bytes());
    file.write_all_at(&header, base).expect("write");
    file.write_all_at(&[fill; 512], base + 512).expect("write");
    file.write_all_at(&[0xff], base + 2048).expect("write");
    for (n, (at, len, flags)) in [(base, 16u32, 1u16), (base + 512, 512, 1), (base + 2048, 1, 2)]
        .into_iter()
        .enumerate()
    {
        let mut descriptor = at.to_le_bytes().to_vec();
        descriptor.extend(len.to_le_bytes());
        descriptor.extend(flags.to_le_bytes());
        descriptor.extend((head + n as u16 + 1).to_le_bytes());
        let place = DESCRIPTORS + 16 * (u64::from(head) + n as u64);
        file.write_all_at(&descriptor, place).expect("write");
    }
    file.write_all_at(&head.to_le_bytes(), AVAILABLE + 4 + 2 * u64::from(slot % SIZE))
        .expect("write");
    file.write_all_at(&(slot + 1).to_le_bytes(), AVAILABLE + 2)
        .expect("write");
}

fn half(file: &File, at: u64) -> u16 {
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, at).expect("read");
    u16::from_le_bytes(bytes)
}

/// Waits until the used ring's index is `wanted`.
fn wait_used(file: &File, wanted: u16) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while half(file, USED + 2) != wanted {
        assert!(
            Instant::now() < deadline,
            "the used index is {}, not {wanted}",
            half(file, USED + 2)
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// All but the ring's start.
fn prepare(back: &BackEnd, file: &File) {
    back.tell(SET_FEATURES, &words(&[FEATURES]), &[]);
    back.tell(SET_PROTOCOL_FEATURES, &words(&[PROTOCOL]), &[]);
    back.tell(SET_MEM_TABLE, &words(&[1, 0, MEMORY, USER, 0]), &fds([file]));
}

fn start(back: &BackEnd, kick: &EventFd, call: &EventFd) {
    back.tell(SET_VRING_NUM, &ring(0, SIZE.into()), &[]);
    back.tell(SET_VRING_BASE, &ring(0, 0), &[]);
    let mut addresses = ring(0, 0);
    addresses.extend(words(&[USER + DESCRIPTORS, USER + USED, USER + AVAILABLE, 0]));
    back.tell(SET_VRING_ADDR, &addresses, &[]);
    back.tell(SET_VRING_CALL, &words(&[0]), &[borrow(call)]);
    back.tell(SET_VRING_KICK, &words(&[0]), &[borrow(kick)]);
    back.tell(SET_VRING_ENABLE, &ring(0, 1), &[]);
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("event")
}

#[test]
fn a_request_is_carried_out() {
    let (image, file, kick, call) = (image(), memory(true), event(), event());
    let back = BackEnd::start(image.path());
    prepare(&back, &file);
    start(&back, &kick, &call);
    offer(&file, 0, 0, 5, 0xab);
    kick.write(1).expect("kick");
    wait_used(&file, 1);
    assert_eq!(back.ask(GET_VRING_BASE, &ring(0, 0)), ring(0, 1));
    assert!(call.read().is_ok(), "no call");
    let mut data = [0; 512];
    image.as_file().read_exact_at(&mut data, 5 * 512).expect("read");
    assert_eq!(data, [0xab; 512]);
    assert!(matches!(back.end().0, SessionError::Channel(ChannelError::Closed)));
}

/// The region says that request 0 was begun and that request 3 was finished, though not written down: the process was killed in between.
#[test]
fn what_a_killed_process_had_is_done_again_once() {
    let (image, file) = (image(), memory(true));
    let region = {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        File::from(rustix::fs::memfd_create("region", flags).expect("memfd"))
    };
    region.set_len(4096).expect("size");
    rustix::fs::fcntl_add_seals(&region, rustix::fs::SealFlags::SHRINK).expect("seal");
    offer(&file, 0, 0, 5, 0x11);
    offer(&file, 1, 3, 6, 0x22);
    // Request 3 is in the used ring.
    file.write_all_at(&3u32.to_le_bytes(), USED + 4).expect("write");
    file.write_all_at(&1u16.to_le_bytes(), USED + 2).expect("write");
    // Version 1, 8 entries, last batch head 3, used index 0; requests 0 and 3 in flight.
    let header = [1u16, 8, 3, 0].map(u16::to_le_bytes).concat();
    region.write_all_at(&header, 8).expect("write");
    for (head, counter) in [(0u64, 1u64), (3, 2)] {
        region.write_all_at(&[1], 16 + 16 * head).expect("write");
        region
            .write_all_at(&counter.to_le_bytes(), 16 + 16 * head + 8)
            .expect("write");
    }
    let (kick, call) = (event(), event());
    let back = BackEnd::start(image.path());
    prepare(&back, &file);
    let mut shape = words(&[4096, 0]);
    shape.extend([1u16, SIZE, 0, 0].map(u16::to_le_bytes).concat());
    back.tell(SET_INFLIGHT_FD, &shape, &fds([&region]));
    start(&back, &kick, &call);
    wait_used(&file, 2);
    assert_eq!(back.ask(GET_VRING_BASE, &ring(0, 0)), ring(0, 2));
    let (_, stats) = back.end();
    assert_eq!(stats.resubmitted, 1);
    assert_eq!(half(&file, USED + 2), 2);
    assert_eq!(half(&file, USED + 4 + 8), 0, "request 0 is completed");
    let mut data = [0; 1024];
    image.as_file().read_exact_at(&mut data, 5 * 512).expect("read");
    assert_eq!(data[..512], [0x11; 512]);
    assert_ne!(data[512..], [0x22; 512], "request 3 was done twice");
}

#[test]
fn a_region_is_made_when_asked_for() {
    let (image, file) = (image(), memory(true));
    let back = BackEnd::start(image.path());
    prepare(&back, &file);
    let mut shape = words(&[0, 0]);
    shape.extend([2u16, SIZE, 0, 0].map(u16::to_le_bytes).concat());
    let answer = back.ask(GET_INFLIGHT_FD, &shape);
    assert_eq!(answer[..8], (2u64 * 192).to_le_bytes());
    assert_eq!(answer[16..20], shape[16..20]);
}

/// A front end that has no driver yet, or none any more, answers its guest's questions from what it was told.
#[test]
fn another_size_is_told_while_there_is_no_driver() {
    let (image, file) = (image(), memory(true));
    let back = BackEnd::start(image.path());
    back.tell(SET_PROTOCOL_FEATURES, &words(&[PROTOCOL | 1 << 5]), &[]);
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    ours.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
    back.tell(SET_BACKEND_REQ_FD, &[], &fds([&theirs]));
    for grown in 2..5 {
        // The first time without a driver, then with one, then after its reset.
        back.ask(
            GET_CONFIG,
            &[0u32, 8, 0]
                .map(u32::to_le_bytes)
                .concat()
                .into_iter()
                .chain([0; 8])
                .collect::<Vec<_>>(),
        );
        back.handle.resize(grown << 20).expect("resize");
        let mut message = [0; 12];
        (&ours).read_exact(&mut message).expect("a message");
        assert_eq!(message[..4], [2, 0, 0, 0], "CONFIG_CHANGE_MSG");
        match grown {
            2 => prepare(&back, &file),
            _ => back.tell(SET_FEATURES, &words(&[FEATURES ^ 1 << 32]), &[]),
        }
    }
}

#[test]
fn memory_that_is_taken_away_ends_the_session() {
    let (image, file, kick, call) = (image(), memory(false), event(), event());
    let back = BackEnd::start(image.path());
    prepare(&back, &file);
    start(&back, &kick, &call);
    offer(&file, 0, 0, 5, 0xab);
    kick.write(1).expect("kick");
    wait_used(&file, 1);
    file.set_len(0).expect("cut short");
    kick.write(1).expect("kick");
    // It ends by itself; the socket tells.
    std::thread::sleep(Duration::from_millis(200));
    let (end, _) = back.end();
    assert!(matches!(end, SessionError::Channel(ChannelError::Lost)), "{end}");
}

#[test]
fn half_a_message_is_not_waited_for_for_ever() {
    let image = image();
    let back = BackEnd::start(image.path());
    assert!(back.send(&message(1, 1, &[])[..7], &[]));
    let asked = Instant::now();
    std::thread::sleep(Duration::from_millis(5300));
    let (end, _) = back.end();
    assert!(
        matches!(end, SessionError::Channel(ChannelError::Hangs)),
        "{end} after {:?}",
        asked.elapsed()
    );
}

/// What a message can have with it.
#[derive(Debug, Clone, Copy)]
enum With {
    Nothing,
    Memory,
    Event,
    Both,
}

fn messages() -> impl Strategy<Value = (u32, Vec<u64>, usize, With)> {
    let value = prop_oneof![
        0u64..3,
        Just(8),
        Just(MEMORY),
        Just(USER),
        (0u64..0x8000).prop_map(|at| USER + at),
        Just(FEATURES),
        Just(PROTOCOL),
        (0u64..1024).prop_map(|n| n << 32),
        any::<u64>(),
    ];
    let with = prop_oneof![
        Just(With::Nothing),
        Just(With::Memory),
        Just(With::Event),
        Just(With::Both)
    ];
    (1u32..46, proptest::collection::vec(value, 0..6), 0usize..8, with)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever comes after a sound beginning, the session ends when the front end does, and nothing panics.
    #[test]
    fn nonsense_ends_one_session(list in proptest::collection::vec(messages(), 1..12), content: [u8; 32]) {
        let (image, file, kick, call) = (image(), memory(false), event(), event());
        // Rings of nonsense.
        for at in (DESCRIPTORS..USED + 0x1000).step_by(32) {
            file.write_all_at(&content, at).expect("write");
        }
        let back = BackEnd::start(image.path());
        prepare(&back, &file);
        start(&back, &kick, &call);
        kick.write(1).expect("kick");
        for (request, values, cut, with) in &list {
            let mut payload = words(values);
            payload.truncate(payload.len().saturating_sub(*cut));
            let borrowed: Vec<BorrowedFd<'_>> = match with {
                With::Nothing => vec![],
                With::Memory => fds([&file]).to_vec(),
                With::Event => vec![borrow(&kick)],
                With::Both => vec![fds([&file])[0], borrow(&call)],
            };
            if !back.send(&message(*request, 1, &payload), &borrowed) {
                break;
            }
        }
        back.end();
    }
}
