//! Hand-overs that fail: the process that has the disks goes on with them, and says in a sentence why.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, sockopt,
};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(10);
const DAEMON: &str = env!("CARGO_BIN_EXE_triarch-blkd");

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        thread::sleep(Duration::from_millis(2));
    }
}

fn stream_to(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("connect");
    stream.set_read_timeout(Some(SOON)).expect("timeout");
    stream
}

/// Sends bytes with descriptors.
fn send(socket: &impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    Ok(rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).map(drop)?)
}

/// Receives bytes with descriptors; none at the end.
fn receive(socket: &impl AsFd) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut bytes = vec![0; 64 << 10];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let count = match rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
        Ok(received) => received.bytes,
        Err(rustix::io::Errno::CONNRESET) => 0,
        Err(error) => panic!("receive: {error}"),
    };
    let fds = control.drain().filter_map(|item| match item {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = fds.flatten().collect();
    bytes.truncate(count);
    (bytes, fds)
}

/// A daemon with one export, and a front end that is connected to it.
struct Old {
    child: Child,
    front: UnixStream,
    dir: tempfile::TempDir,
}

impl Old {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let image = File::create(dir.path().join("image")).expect("image");
        image.set_len(1 << 20).expect("size");
        let at = |name: &str| dir.path().join(name).display().to_string();
        let child = Command::new(DAEMON)
            .arg("--export")
            .arg(format!("name=disk,path={},socket={}", at("image"), at("disk.sock")))
            .args(["--control-socket", &at("ctl")])
            .stderr(File::create(dir.path().join("log")).expect("log"))
            .spawn()
            .expect("start");
        wait_for("it listens", || UnixStream::connect(dir.path().join("ctl")).is_ok());
        let front = stream_to(&dir.path().join("disk.sock"));
        let old = Self { child, front, dir };
        assert!(serves(&old.front));
        old
    }

    fn control(&self) -> PathBuf {
        self.dir.path().join("ctl")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).expect("log")
    }

    /// What it tells of its export.
    fn info(&self) -> Value {
        let mut stream = stream_to(&self.control());
        let request = b"GET /api/v1/blkd.info HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        stream.write_all(request).expect("ask");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        let (_, body) = text.split_once("\r\n\r\n").expect("a body");
        let info: Value = serde_json::from_str(body).expect("JSON");
        assert_eq!(info["pid"], self.child.id());
        info["exports"][0].clone()
    }

    /// Nothing has happened to its front end, and others can ask it.
    fn goes_on_as_ever(&self) {
        assert!(serves(&self.front), "the front end was disconnected:\n{}", self.log());
        let info = self.info();
        assert_eq!((&info["connected"], &info["connections"]), (&json!(true), &json!(1)));
    }

    /// Starts another process that is to take its place. Returns what it says in the end, which is one line.
    fn fails_to_hand_over_to(&self, command: &mut Command) -> String {
        let ended = command.stderr(Stdio::piped()).output().expect("start");
        let text = String::from_utf8(ended.stderr).expect("text");
        assert_eq!(ended.status.code(), Some(1), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        text
    }

    fn successor(&self) -> Command {
        let mut command = Command::new(DAEMON);
        command.arg("--take-over").arg(self.control());
        command
    }
}

impl Drop for Old {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a back end answers GET_FEATURES.
fn serves(mut front: &UnixStream) -> bool {
    let request = [1u32, 1, 0].map(u32::to_le_bytes).concat();
    let mut answer = [0; 20];
    front.write_all(&request).is_ok() && front.read_exact(&mut answer).is_ok() && answer[0] == 1
}

/// A process that says it takes over.
struct New {
    /// The conversation.
    socket: OwnedFd,
    /// Where the other process answers in the end.
    control: UnixStream,
}

impl New {
    fn ask(old: &Old) -> Self {
        let control = stream_to(&old.control());
        let flags = SocketFlags::CLOEXEC;
        let (socket, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("sockets");
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(SOON)).expect("timeout");
        let request = b"PUT /api/v1/blkd.hand-over HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";
        send(&control, request, &[theirs.as_fd()]).expect("ask");
        Self { socket, control }
    }

    fn say(&self, text: &str) {
        send(&self.socket, text.as_bytes(), &[]).expect("say");
    }

    /// What the other process says, without its descriptors.
    fn hear(&self) -> Value {
        serde_json::from_slice(&receive(&self.socket).0).expect("a packet")
    }

    /// Comes until where it has everything.
    fn until_it_has_everything(old: &Old) -> Self {
        let new = Self::ask(old);
        new.say(HELLO);
        assert_eq!(new.hear()["export"]["options"]["name"], "disk");
        assert_eq!(new.hear()["control"]["path"], json!(old.control()));
        new
    }

    /// The conversation is over for it; what the other process answers.
    fn end(self) -> String {
        drop(self.socket);
        let mut control = self.control;
        let mut answer = [0; 4096];
        let count = control.read(&mut answer).expect("an answer");
        let text = String::from_utf8_lossy(&answer[..count]).into_owned();
        assert!(text.starts_with("HTTP/1.1 500 "), "{text}");
        text
    }
}

const HELLO: &str = r#"{"hello":{"version":1,"program":"9.9"}}"#;

#[test]
fn what_fails_before_the_end_is_not_noticed() {
    let old = Old::start();
    let new = New::ask(&old);
    assert!(new.end().contains("ended, or gave up"));
    old.goes_on_as_ever();

    let new = New::ask(&old);
    new.say(&HELLO.replace(":1,", ":2,"));
    let answer = new.end();
    assert!(answer.contains("version 9.9 hands over in another way (2)"), "{answer}");
    old.goes_on_as_ever();

    for nonsense in ["{", r#"{"farewell":1}"#, r#""ready""#, r#""taken""#] {
        let new = New::ask(&old);
        new.say(nonsense);
        new.end();
        old.goes_on_as_ever();
    }

    let new = New::ask(&old);
    new.say(HELLO);
    // With what it was given still on its way.
    new.end();
    old.goes_on_as_ever();

    new_that_is_not_ready(&old, None);
    new_that_is_not_ready(&old, Some(r#""taken""#));
    let log = old.log();
    assert_eq!(log.matches("cannot hand over, going on").count(), 9, "{log}");
}

/// One that has everything and then says something else, or nothing.
fn new_that_is_not_ready(old: &Old, says: Option<&str>) {
    let new = New::until_it_has_everything(old);
    // Until now nobody noticed anything.
    assert!(serves(&old.front));
    if let Some(says) = says {
        new.say(says);
    }
    new.end();
    old.goes_on_as_ever();
}

#[test]
fn one_that_does_not_take_what_it_wanted_costs_a_moment() {
    let mut old = Old::start();
    for (connections, hangs) in [(2, false), (3, true)] {
        let new = New::until_it_has_everything(&old);
        new.say(r#""ready""#);
        assert_eq!(new.hear(), "yours");
        // Nobody is served now, and front ends wait at the socket.
        assert!(!serves(&old.front));
        old.front = stream_to(&old.dir.path().join("disk.sock"));
        if hangs {
            let begun = Instant::now();
            assert!(serves(&old.front));
            let took = begun.elapsed();
            assert!(took > Duration::from_secs(1), "it was not waited for: {took:?}");
            // Too late.
            assert!(send(&new.socket, br#""taken""#, &[]).is_err());
        }
        let answer = new.end();
        assert_eq!(answer.contains("does not answer"), hangs, "{answer}");
        assert!(serves(&old.front));
        let info = old.info();
        assert_eq!(
            (&info["connected"], &info["connections"]),
            (&json!(true), &json!(connections))
        );
    }
    // And a good one still can.
    let new = old.successor().stderr(Stdio::null()).spawn();
    let mut new = new.expect("start");
    let status = old.child.wait().expect("wait");
    assert!(status.success(), "{status}");
    assert!(serves(&stream_to(&old.dir.path().join("disk.sock"))));
    new.kill().expect("kill");
    new.wait().expect("wait");
}

#[test]
fn a_new_process_says_why_it_cannot() {
    let old = Old::start();
    let text = old.fails_to_hand_over_to(old.successor().arg("--export").arg(format!(
        "name=disk,path={0},socket={0}.sock",
        old.dir.path().join("other").display()
    )));
    assert!(text.contains("other"), "{text}");
    File::create(old.dir.path().join("other"))
        .and_then(|file| file.set_len(4096))
        .expect("image");
    let text = old.fails_to_hand_over_to(old.successor().arg("--export").arg(format!(
        "name=disk,path={0},socket={0}.sock",
        old.dir.path().join("other").display()
    )));
    assert!(
        text.starts_with("triarch-blkd: cannot take over: there is an export called disk in both processes"),
        "{text}"
    );
    old.goes_on_as_ever();

    // As many descriptors as it has before it is given any, found by trying: each way to fail is one line.
    let mut told = String::new();
    for limit in 4..40 {
        let mut shell = Command::new("sh");
        let script = format!("ulimit -n {limit}; exec \"$0\" --take-over \"$1\"");
        shell.args(["-c", &script, DAEMON]).arg(old.control());
        let ended = shell.stderr(Stdio::piped()).stdout(Stdio::null());
        let mut child = ended.spawn().expect("start");
        let deadline = Instant::now() + SOON;
        let status = loop {
            if let Some(status) = child.try_wait().expect("wait") {
                break Some(status);
            }
            // It has taken over, or is about to.
            if !serves(&old.front) {
                break None;
            }
            assert!(Instant::now() < deadline, "neither failed nor taken over");
            thread::sleep(Duration::from_millis(1));
        };
        if status.is_none() {
            child.kill().expect("kill");
            child.wait().expect("wait");
            break;
        }
        let mut text = String::new();
        child
            .stderr
            .take()
            .expect("pipe")
            .read_to_string(&mut text)
            .expect("text");
        assert_eq!(status.and_then(|status| status.code()), Some(1), "{limit}: {text}");
        old.goes_on_as_ever();
        told += &text;
    }
    assert!(told.contains("RLIMIT_NOFILE"), "{told}");
}

/// A process with a control socket that is asked to hand over.
fn false_old(says: impl FnOnce(&OwnedFd, &UnixStream) + Send + 'static) -> String {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("ctl");
    let listener = UnixListener::bind(&path).expect("listen");
    let other = thread::spawn(move || {
        let (control, _) = listener.accept().expect("accept");
        let (request, mut fds) = receive(&control);
        assert!(request.starts_with(b"PUT /api/v1/blkd.hand-over "));
        let socket = fds.pop().expect("a socket");
        assert!(receive(&socket).0.starts_with(br#"{"hello":{"version":1,"#));
        says(&socket, &control);
    });
    let ended = Command::new(DAEMON)
        .arg("--take-over")
        .arg(&path)
        .output()
        .expect("start");
    other.join().expect("no panic");
    let text = String::from_utf8(ended.stderr).expect("text");
    assert_eq!(ended.status.code(), Some(1), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("triarch-blkd: cannot take over: "), "{text}");
    text
}

#[test]
fn a_new_process_believes_not_everything() {
    let export = |options: &str| format!(r#"{{"export":{{"options":{options},"path":null}}}}"#);
    let text = false_old(|_, mut control| {
        let body = r#"{"error":"no, I go on"}"#;
        write!(
            control,
            "HTTP/1.1 500 No\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .expect("answer");
    });
    assert!(text.ends_with("the other process refuses: no, I go on\n"), "{text}");

    let text = false_old(|_, _| {});
    assert!(text.contains("ended, or gave up"), "{text}");

    let options = r#"{"name":"a","path":"/a","socket":"/s"}"#;
    let packet = export(options);
    let text = false_old(move |socket, _| send(socket, packet.as_bytes(), &[]).expect("send"));
    assert!(text.contains("leaves something out"), "{text}");

    // What it is given is no disk, or one with options of a later version.
    for (options, why) in [
        (options.to_owned(), "export a"),
        (options.replace(r#""/s""#, r#""/s","colour":"red""#), "colour"),
    ] {
        let packet = export(&options);
        let text = false_old(move |socket, _| {
            let (one, _other) = UnixStream::pair().expect("sockets");
            send(socket, packet.as_bytes(), &[one.as_fd(), one.as_fd()]).expect("send");
        });
        assert!(text.contains(why), "{text}");
    }
}
