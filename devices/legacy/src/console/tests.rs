use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::*;

fn socket() -> (tempfile::TempDir, PathBuf, Console) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let console = Console::open(&Backend::Socket(path.clone())).unwrap();
    (dir, path, console)
}

/// Services as an event loop does, until nothing happens for a while.
fn settle(console: &Console) -> Vec<u8> {
    let mut input = Vec::new();
    while readable(console, 30) {
        let mut buf = [0; 1000];
        let n = console.service(&mut buf);
        input.extend(&buf[..n]);
        console.room();
    }
    input
}

fn take(from: &mut impl Read, n: usize) -> Vec<u8> {
    let mut buf = vec![0; n];
    from.read_exact(&mut buf).unwrap();
    buf
}

fn client(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    client
}

#[test]
fn a_socket_keeps_the_newest_output_for_the_next_client() {
    let (_dir, path, console) = socket();
    let lost = 1000;
    let output: Vec<u8> = (0..BACKLOG + lost).map(|i| (i % 251) as u8).collect();
    for piece in output.chunks(100) {
        console.write(piece);
    }
    assert_eq!(console.dropped(), lost as u64);
    let mut client = client(&path);
    assert_eq!(settle(&console), b"");
    let reader = std::thread::spawn(move || take(&mut client, BACKLOG));
    settle(&console);
    assert!(reader.join().unwrap() == output[lost..]);
    console.write(&vec![1; 3 * BACKLOG]);
    assert_eq!(
        console.dropped(),
        lost as u64 + 2 * BACKLOG as u64,
        "one piece longer than the ring"
    );
}

#[test]
fn a_stalled_client_neither_blocks_nor_grows_us_and_goes_on_later() {
    let (_dir, path, console) = socket();
    let mut client = client(&path);
    settle(&console);
    let written = 4 << 20;
    for _ in 0..written / 1024 {
        console.write(&[b'x'; 1024]);
    }
    assert!(console.dropped() > 0);
    let expected = written - console.dropped() as usize;
    let reader = std::thread::spawn(move || take(&mut client, expected).len());
    settle(&console);
    assert_eq!(
        reader.join().unwrap(),
        expected,
        "what was kept arrives without another write"
    );
}

#[test]
fn one_client_at_a_time_and_then_the_next() {
    let (_dir, path, console) = socket();
    let mut first = client(&path);
    settle(&console);
    let mut second = client(&path);
    settle(&console);
    assert_eq!(second.read(&mut [0]).unwrap(), 0, "the second is turned away");
    first.write_all(b"still here").unwrap();
    assert_eq!(settle(&console), b"still here");
    drop(first);
    settle(&console);
    console.write(b"kept");
    let mut third = client(&path);
    settle(&console);
    assert_eq!(take(&mut third, 4), b"kept");
    assert_eq!(console.dropped(), 0);
}

#[test]
fn a_client_that_sends_and_leaves_is_heard_before_the_next() {
    let (_dir, path, console) = socket();
    let mut first = client(&path);
    first.write_all(b"one ").unwrap();
    drop(first);
    let mut second = client(&path);
    second.write_all(b"two").unwrap();
    let mut input = Vec::new();
    // Room for one byte at a time.
    while readable(&console, 30) {
        let mut byte = [0];
        if console.service(&mut byte) == 1 {
            input.push(byte[0]);
        }
        console.room();
    }
    assert_eq!(input, b"one two");
    console.write(b"!");
    assert_eq!(take(&mut second, 1), b"!");
}

#[test]
fn a_client_that_only_listens_on_still_gets_output() {
    let (_dir, path, console) = socket();
    let mut client = client(&path);
    client.write_all(b"uptime").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(settle(&console), b"uptime");
    console.write(b"3 days");
    assert_eq!(take(&mut client, 6), b"3 days");
}

#[test]
fn input_waits_for_room_and_the_descriptor_stays_quiet_meanwhile() {
    let (_dir, path, console) = socket();
    let mut client = client(&path);
    settle(&console);
    client.write_all(b"waiting").unwrap();
    assert!(readable(&console, 1000));
    assert_eq!(console.service(&mut []), 0);
    assert!(!readable(&console, 30), "a loop that watches it would spin");
    console.room();
    assert_eq!(settle(&console), b"waiting");
    console.room();
    assert!(!readable(&console, 0), "nothing was held back");
}

#[test]
fn sockets_come_and_go_with_the_console() {
    let (_dir, path, console) = socket();
    let busy = Console::open(&Backend::Socket(path.clone())).err().expect("in use");
    assert!(matches!(busy, OpenError::InUse(_)));
    drop(console);
    assert!(!path.exists());
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "left over by a process that died");
    Console::open(&Backend::Socket(path.clone())).unwrap();
    fs::write(&path, "precious").unwrap();
    Console::open(&Backend::Socket(path.clone()))
        .err()
        .expect("not a socket");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_file_is_emptied_and_written_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    fs::write(&path, "old").unwrap();
    let console = Console::open(&Backend::File(path.clone())).unwrap();
    console.write(b"a");
    assert_eq!(fs::read(&path).unwrap(), b"a");
    console.write(b"bc");
    assert_eq!(fs::read(&path).unwrap(), b"abc");
    let missing = Console::open(&Backend::File(dir.path().join("no/log")));
    assert!(matches!(missing.err(), Some(OpenError::File { .. })));
}

#[test]
fn a_named_pipe_that_nobody_reads_does_not_block() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success() && fs::metadata(&path).unwrap().file_type().is_fifo());
    let console = Console::open(&Backend::File(path.clone())).unwrap();
    for _ in 0..300 {
        console.write(&[b'x'; 1024]);
    }
    assert!(console.dropped() > 0);
    assert!(!console.drain(Duration::from_millis(30)), "nobody takes it");
    let expected = 300 * 1024 - console.dropped() as usize;
    let mut reader = fs::File::open(&path).unwrap();
    let reader = std::thread::spawn(move || take(&mut reader, expected).len());
    assert!(console.drain(Duration::from_secs(5)));
    assert_eq!(reader.join().unwrap(), expected);
}

#[test]
fn a_pty_carries_every_byte_both_ways() {
    let console = Console::open(&Backend::Pty).unwrap();
    console.write(b"nobody is there");
    assert_eq!(console.dropped(), 15);
    settle(&console);
    assert!(!readable(&console, 30), "a closed terminal must not spin the loop");
    let open = || {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NOCTTY);
        options.open(console.path().unwrap()).unwrap()
    };
    for _ in 0..2 {
        let mut user = open();
        let all: Vec<u8> = (0..=255).collect();
        console.write(&all);
        assert!(
            take(&mut user, 256) == all,
            "no byte is special, and nothing old comes first"
        );
        user.write_all(&all).unwrap();
        assert!(settle(&console) == all, "not even an echo");
        drop(user);
        settle(&console);
        let before = console.dropped();
        console.write(b"gone");
        assert_eq!(console.dropped(), before + 4);
        assert!(!readable(&console, 30));
    }
}

#[test]
fn a_slow_pty_reader_gets_what_was_kept() {
    let console = Console::open(&Backend::Pty).unwrap();
    let mut user = fs::File::open(console.path().unwrap()).unwrap();
    let output: Vec<u8> = (0..60_000u32).map(|i| (i % 253) as u8).collect();
    console.write(&output);
    assert_eq!(console.dropped(), 0);
    let reader = std::thread::spawn(move || take(&mut user, 60_000));
    while !reader.is_finished() && readable(&console, 1000) {
        console.service(&mut [0; 8]);
    }
    assert!(reader.is_finished(), "kept output follows by itself");
    assert!(reader.join().unwrap() == output);
}

#[test]
fn null_swallows() {
    let console = Console::open(&Backend::Null).unwrap();
    console.write(&[0; 100_000]);
    assert_eq!((console.dropped(), console.service(&mut [0; 8])), (0, 0));
    assert!(console.drain(Duration::ZERO));
}

/// What [`tty_child`] runs as: the name of the way it ends.
const CHILD: &str = "TRIARCH_TEST_TTY_ENDS_BY";

/// Not a test by itself: the process with the terminal in [`a_terminal_is_raw_while_used_and_then_as_before`].
#[test]
#[ignore = "started by another test"]
fn tty_child() {
    let Ok(end) = std::env::var(CHILD) else { return };
    let console = Console::open(&Backend::Tty).unwrap();
    console.write(b"<open>");
    let mut input = Vec::<u8>::new();
    while input.len() < 4 && readable(&console, 5000) {
        let mut buf = [0; 16];
        let n = console.service(&mut buf);
        input.extend(&buf[..n]);
    }
    let size = format!("<{input:?} {:?}>", console.size());
    console.write(size.as_bytes());
    match end.as_str() {
        "exit" => std::process::exit(0),
        "panic" => panic!("on purpose"),
        _ => drop(console),
    }
}

#[test]
fn a_terminal_is_raw_while_used_and_then_as_before() {
    for end in ["drop", "exit", "panic"] {
        let (master, slave, _) = sys::open_pty().unwrap();
        let before = sys::attributes(slave.as_fd()).unwrap();
        assert_ne!(before.c_lflag & libc::ECHO, 0);
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "console::tests::tty_child", "--ignored", "--nocapture"])
            .env(CHILD, end)
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut seen = String::new();
        let mut read_until = |mark: &str| {
            while !seen.contains(mark) && sys::poll(master.as_fd(), libc::POLLIN, Duration::from_secs(10)) != 0 {
                let mut buf = [0; 256];
                let n = (&master).read(&mut buf).unwrap();
                seen.push_str(&String::from_utf8_lossy(&buf[..n]));
            }
            assert!(seen.contains(mark), "{end}: {mark:?} is not in {seen:?}");
        };
        read_until("<open>");
        let raw = sys::attributes(slave.as_fd()).unwrap();
        assert_eq!(raw.c_lflag & (libc::ECHO | libc::ICANON | libc::ISIG), 0);
        assert_eq!(raw.c_oflag, before.c_oflag);
        (&master).write_all(b"\x03\r\x04a").unwrap();
        read_until("<[3, 13, 4, 97] None>");
        let status = child.wait().unwrap();
        assert_eq!(status.success(), end != "panic");
        let after = sys::attributes(slave.as_fd()).unwrap();
        assert_eq!(
            (after.c_lflag, after.c_iflag),
            (before.c_lflag, before.c_iflag),
            "{end}"
        );
    }
}

#[test]
fn a_channel_that_cannot_be_made_non_blocking_still_never_waits() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let polled = channel::Channel::Polled {
        file: fs::File::from(std::os::fd::OwnedFd::from(ours)),
        at_once: 1000,
    };
    let would_block = |outcome: io::Result<usize>| outcome.unwrap_err().kind() == io::ErrorKind::WouldBlock;
    assert!(would_block(polled.read(&mut [0; 8])));
    (&theirs).write_all(b"x").unwrap();
    assert_eq!(polled.read(&mut [0; 8]).unwrap(), 1);
    let full = std::iter::repeat_with(|| polled.write(&[b'y'; 2000]))
        .take(1 << 22)
        .find(Result::is_err);
    assert!(would_block(full.expect("the socket fills up")));
}
