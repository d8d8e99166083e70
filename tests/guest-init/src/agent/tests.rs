//! The agent, driven over a socket pair on this machine.

use super::*;
use crate::proto::Exit;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Instant;

struct Client {
    stream: BufReader<UnixStream>,
    agent: Option<JoinHandle<io::Result<()>>>,
}

impl Client {
    fn new() -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let writer = theirs.try_clone().unwrap();
        let agent = thread::spawn(move || serve(theirs, writer));
        Self {
            stream: BufReader::new(ours),
            agent: Some(agent),
        }
    }

    fn send(&mut self, request: &Request, data: &[u8]) {
        proto::write(self.stream.get_mut(), request, data).unwrap();
    }

    fn receive(&mut self) -> (Reply, Vec<u8>) {
        let (reply, size) = proto::read(&mut self.stream).unwrap().unwrap();
        let mut data = Vec::new();
        self.stream.by_ref().take(size).read_to_end(&mut data).unwrap();
        (reply, data)
    }

    fn exec(&mut self, id: u64, script: &str, input: &[u8]) {
        let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
        self.send(
            &Request::Exec {
                id,
                command: Command {
                    argv,
                    ..Command::default()
                },
            },
            input,
        );
    }

    /// Collects a command's output up to its end.
    fn finish(&mut self, wanted: u64) -> (Vec<u8>, Vec<u8>, Exit) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        loop {
            match self.receive() {
                (Reply::Stdout { id }, data) if id == wanted => out.extend(data),
                (Reply::Stderr { id }, data) if id == wanted => err.extend(data),
                (Reply::Exit { id, exit }, _) if id == wanted => return (out, err, exit),
                other => panic!("{other:?}"),
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stream.get_ref().shutdown(std::net::Shutdown::Both).unwrap();
        let _ = self.agent.take().map(JoinHandle::join);
    }
}

fn code(code: i32) -> Exit {
    Exit {
        code: Some(code),
        signal: None,
        timed_out: false,
    }
}

#[test]
fn says_hello_after_noise() {
    let mut client = Client::new();
    client.stream.get_mut().write_all(b"garbage \xff\n").unwrap();
    client.send(&Request::Hello { token: "abc".into() }, b"");
    let (reply, _) = client.receive();
    assert!(matches!(reply, Reply::Hello { token, machine } if token == "abc" && machine.cpus > 0));
}

#[test]
fn runs_a_command_with_input_and_both_outputs() {
    let mut client = Client::new();
    // More than a pipe holds, each way: the agent must not block on one of them.
    let input = vec![b'x'; 1 << 20];
    client.exec(1, "cat; echo oops >&2; exit 3", &input);
    let (out, err, exit) = client.finish(1);
    assert_eq!(
        (out == input, err.as_slice(), exit),
        (true, b"oops\n".as_slice(), code(3))
    );
}

#[test]
fn a_command_that_ignores_its_input_is_no_trouble() {
    let mut client = Client::new();
    client.exec(1, "exec <&-; echo done", &vec![0; 1 << 20]);
    assert_eq!(client.finish(1), (b"done\n".to_vec(), vec![], code(0)));
}

#[test]
fn a_missing_program_is_an_error() {
    let mut client = Client::new();
    let command = Command {
        argv: vec!["/no/such".into()],
        ..Command::default()
    };
    client.send(&Request::Exec { id: 4, command }, b"input");
    let (reply, _) = client.receive();
    assert!(
        matches!(&reply, Reply::Error { id: 4, message } if message.contains("/no/such")),
        "{reply:?}"
    );
    client.send(
        &Request::Exec {
            id: 5,
            command: Command::default(),
        },
        b"",
    );
    assert!(matches!(client.receive().0, Reply::Error { id: 5, .. }));
}

#[test]
fn commands_run_side_by_side_and_can_be_killed() {
    let mut client = Client::new();
    client.exec(1, "sleep 60", b"");
    client.exec(2, "echo second", b"");
    assert_eq!(client.finish(2).0, b"second\n");
    client.send(&Request::Kill { id: 3, exec: 1 }, b"");
    let replies = [client.receive().0, client.receive().0];
    let exit = Exit {
        code: None,
        signal: Some(9),
        timed_out: false,
    };
    assert!(replies.contains(&Reply::Done { id: 3 }), "{replies:?}");
    assert!(replies.contains(&Reply::Exit { id: 1, exit }), "{replies:?}");
}

#[test]
fn time_runs_out_for_a_command_and_its_children() {
    let mut client = Client::new();
    let argv = ["sh", "-c", "sleep 60 & echo child $!; sleep 60"]
        .map(str::to_owned)
        .to_vec();
    let command = Command {
        argv,
        timeout_ms: Some(300),
        ..Command::default()
    };
    client.send(&Request::Exec { id: 1, command }, b"");
    let (out, _, exit) = client.finish(1);
    assert_eq!(
        exit,
        Exit {
            code: None,
            signal: Some(9),
            timed_out: true
        }
    );
    let child = String::from_utf8(out).unwrap();
    let child = child.trim().strip_prefix("child ").unwrap();
    let gone = (0..100).any(|_| {
        thread::sleep(Duration::from_millis(10));
        let state = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        state.is_empty() || state.contains(" Z ")
    });
    assert!(gone, "process {child} still runs");
}

#[test]
fn a_daemon_left_behind_does_not_hold_the_command() {
    let mut client = Client::new();
    let start = Instant::now();
    client.exec(1, "sleep 4 & echo started", b"");
    assert_eq!(client.finish(1), (b"started\n".to_vec(), vec![], code(0)));
    assert!(start.elapsed() < Duration::from_secs(3));
}

#[test]
fn detached_commands_outlive_the_session_and_others_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let mut client = Client::new();
    let script = format!("sleep 0.4; touch {}", file("detached").display());
    let argv = ["sh", "-c", &script].map(str::to_owned).to_vec();
    let command = Command {
        argv,
        detach: true,
        ..Command::default()
    };
    client.send(&Request::Exec { id: 1, command }, b"");
    assert!(matches!(client.receive().0, Reply::Started { id: 1, .. }));
    client.exec(2, &format!("sleep 0.4; touch {}", file("attached").display()), b"");
    drop(client);
    thread::sleep(Duration::from_millis(1500));
    assert_eq!((file("detached").exists(), file("attached").exists()), (true, false));
}

#[test]
fn files_travel_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/file");
    let name = path.to_str().unwrap().to_owned();
    let content: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut client = Client::new();
    for id in [1, 2] {
        client.send(
            &Request::Put {
                id,
                path: name.clone(),
                mode: 0o751,
            },
            &content,
        );
        assert_eq!(client.receive().0, Reply::Done { id });
    }
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o751);
    client.send(&Request::Get { id: 3, path: name }, b"");
    let mut received = Vec::new();
    loop {
        match client.receive() {
            (Reply::Data { id: 3 }, data) => received.extend(data),
            (reply, _) => break assert_eq!(reply, Reply::Done { id: 3 }),
        }
    }
    assert!(received == content);
}

#[test]
fn a_failed_put_swallows_its_data() {
    let mut client = Client::new();
    // Data that would be a request if it were taken for one.
    let mut data = Vec::new();
    proto::write(&mut data, &Request::Kill { id: 9, exec: 9 }, b"").unwrap();
    let path = "/proc/no/such".to_owned();
    client.send(
        &Request::Put {
            id: 1,
            path: path.clone(),
            mode: 0o644,
        },
        &data,
    );
    assert!(matches!(client.receive().0, Reply::Error { id: 1, .. }));
    client.send(&Request::Get { id: 2, path }, b"");
    let (reply, _) = client.receive();
    assert!(
        matches!(&reply, Reply::Error { id: 2, message } if message.starts_with("/proc/no/such: ")),
        "{reply:?}"
    );
}
