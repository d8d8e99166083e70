//! The program as it is shipped, confined, with front ends that are scripted (rust-vmm's `vhost`).

mod front;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use front::{Guest, mac};

const SOON: Duration = Duration::from_secs(5);

/// A running daemon.
struct Daemon(Child);

impl Daemon {
    fn start(dir: &Path, ports: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_triarch-netd"));
        command.current_dir(dir).args(["--control-socket", "control.sock"]);
        for port in ports {
            command.args(["--port", port]);
        }
        let log = std::fs::File::create(dir.join("log")).expect("log");
        let child = command.stdin(Stdio::null()).stderr(log).spawn().expect("start");
        let daemon = Self(child);
        until("it listens", || UnixStream::connect(dir.join("control.sock")).is_ok());
        // It answers when its ports listen too.
        self::ports(dir);
        daemon
    }

    fn kill(&mut self) {
        self.0.kill().expect("kill");
        self.0.wait().expect("wait");
    }

    fn terminate(mut self) -> bool {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signal");
        self.0.wait().expect("wait").success()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Calls the control socket; status and body.
fn call(dir: &Path, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(dir.join("control.sock")).expect("connect");
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .expect("send");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("receive");
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    (head[9..12].parse().expect("a status"), body.to_owned())
}

fn ports(dir: &Path) -> Vec<serde_json::Value> {
    let (status, body) = call(dir, "GET", "/api/v1/ports", "");
    assert_eq!(status, 200, "{body}");
    let value: serde_json::Value = serde_json::from_str(&body).expect("JSON");
    value["ports"].as_array().expect("a list").clone()
}

fn port(dir: &Path, name: &str) -> serde_json::Value {
    ports(dir)
        .into_iter()
        .find(|port| port["name"] == name)
        .expect("a port")
}

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().expect("directory")
}

#[test]
fn guests_talk_and_go_on_after_a_kill() {
    let dir = dir();
    let described = ["name=a,socket=a.sock", "name=b,socket=b.sock,num_queues=2"];
    let mut daemon = Daemon::start(dir.path(), &described);
    let (mut a, mut b) = (Guest::new(1), Guest::new(2));
    for round in 0..5u32 {
        a.connect(&dir.path().join("a.sock"));
        b.connect(&dir.path().join("b.sock"));
        for n in 0..100u32 {
            let payload = [round.to_le_bytes(), n.to_le_bytes()].concat();
            a.send(&mac(2), &payload.repeat(50));
            assert_eq!(
                b.receive(SOON),
                Some((mac(1), payload.repeat(50))),
                "round {round}, packet {n}"
            );
            b.send(&mac(1), &payload);
            assert_eq!(a.receive(SOON), Some((mac(2), payload)));
        }
        daemon.kill();
        a.disconnect();
        b.disconnect();
        daemon = Daemon::start(dir.path(), &described);
    }
    assert!(daemon.terminate());
    assert!(!dir.path().join("a.sock").exists() && !dir.path().join("control.sock").exists());
}

#[test]
fn it_has_no_privileges() {
    let dir = dir();
    let daemon = Daemon::start(dir.path(), &["name=a,socket=a.sock"]);
    until("all threads are confined", || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.0.id())).expect("tasks");
        let states: Vec<String> = tasks
            .map(|task| std::fs::read_to_string(task.expect("task").path().join("status")).unwrap_or_default())
            .collect();
        states.len() >= 5
            && states.iter().all(|state| {
                [
                    "CapPrm:\t0000000000000000",
                    "CapEff:\t0000000000000000",
                    "NoNewPrivs:\t1",
                    "Seccomp:\t2",
                ]
                .iter()
                .all(|line| state.contains(line))
            })
    });
}

#[test]
fn nonsense_costs_only_its_own_port() {
    let dir = dir();
    let daemon = Daemon::start(
        dir.path(),
        &[
            "name=a,socket=a.sock",
            "name=b,socket=b.sock",
            "name=bad,socket=bad.sock",
        ],
    );
    let (mut a, mut b) = (Guest::new(1), Guest::new(2));
    a.connect(&dir.path().join("a.sock"));
    b.connect(&dir.path().join("b.sock"));
    let mut connections = 0;
    let mut random = 1u64;
    for round in 0..60u8 {
        let mut bad = UnixStream::connect(dir.path().join("bad.sock")).expect("connect");
        let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 56) as u8
        })
        .take(200)
        .collect();
        // A request that exists, of the right version, with a size that is there.
        bytes[..12].copy_from_slice(&[
            round % 45,
            0,
            0,
            0,
            1 + 8 * (round % 2),
            0,
            0,
            0,
            (round * 3) % 180,
            0,
            0,
            0,
        ]);
        let _ = bad.write_all(&bytes);
        let _ = bad.shutdown(std::net::Shutdown::Write);
        let _ = bad.read_to_end(&mut Vec::new());
        connections += 1;
        a.send(&mac(2), &[round; 60]);
        assert_eq!(b.receive(SOON), Some((mac(1), vec![round; 60])));
    }
    assert_eq!(port(dir.path(), "bad")["connections"], connections);
    assert!(daemon.terminate());
}

#[test]
fn memory_that_is_cut_short_costs_only_its_own_port() {
    let dir = dir();
    let daemon = Daemon::start(
        dir.path(),
        &["name=a,socket=a.sock", "name=b,socket=b.sock", "name=c,socket=c.sock"],
    );
    let (mut a, mut b, mut cut) = (Guest::new(1), Guest::new(2), Guest::unsealed(3));
    a.connect(&dir.path().join("a.sock"));
    b.connect(&dir.path().join("b.sock"));
    cut.connect(&dir.path().join("c.sock"));
    cut.send(&mac(1), b"still whole");
    for guest in [&mut a, &mut b] {
        assert_eq!(guest.receive(SOON), Some((mac(3), b"still whole".to_vec())));
    }
    cut.cut_memory();
    // It is touched by the next broadcast.
    a.send(&[0xff; 6], &[7; 60]);
    assert_eq!(b.receive(SOON), Some((mac(1), vec![7; 60])));
    until("the front end is disconnected", || {
        port(dir.path(), "c")["state"] == "down"
    });
    assert_eq!(port(dir.path(), "c")["broken_connections"], 1);
    b.send(&mac(1), &[8; 60]);
    assert_eq!(a.receive(SOON), Some((mac(2), vec![8; 60])));
    assert!(daemon.terminate());
}

#[test]
fn ports_change_while_they_are_in_use() {
    let dir = dir();
    let daemon = Daemon::start(dir.path(), &["name=a,socket=a.sock", "name=b,socket=b.sock"]);
    let set = |body: &str| call(dir.path(), "PUT", "/api/v1/ports.set", body).0;
    let (mut a, mut b) = (Guest::new(1), Guest::new(2));
    a.connect(&dir.path().join("a.sock"));
    b.connect(&dir.path().join("b.sock"));
    b.send(&mac(1), b"here");
    assert!(a.receive(SOON).is_some());
    assert_eq!(set(r#"{"name":"b","vlan":7}"#), 204);
    a.send(&mac(2), b"lost");
    assert_eq!(b.receive(Duration::from_millis(50)), None);
    assert_eq!(set(r#"{"name":"a","vlan":7}"#), 204);
    a.send(&mac(2), b"found");
    assert_eq!(b.receive(SOON), Some((mac(1), b"found".to_vec())));
    assert_eq!(set(r#"{"name":"a","mac":"02:00:00:00:00:09","anti_spoof":true}"#), 204);
    a.send(&mac(2), b"a lie");
    assert_eq!(b.receive(Duration::from_millis(50)), None);
    assert_eq!(port(dir.path(), "a")["drops"]["spoofed_mac"], 1);
    for (body, status) in [
        (r#"{"name":"z","vlan":7}"#, 404),
        (r#"{"name":"a","vlan":0}"#, 400),
        (r#"{"name":"a","vlam":7}"#, 400),
        (r#"{"name":"b","mac":"02:00:00:00:00:09"}"#, 400),
        ("[]", 400),
    ] {
        assert_eq!(set(body), status, "{body}");
    }
    let put = |path: &str, body: &str| call(dir.path(), "PUT", path, body).0;
    let add = r#"{"name":"c","socket":"c.sock","anti_spoof":false}"#;
    assert_eq!(
        (put("/api/v1/ports.add", add), put("/api/v1/ports.add", add)),
        (204, 400)
    );
    let mut c = Guest::new(3);
    c.connect(&dir.path().join("c.sock"));
    assert_eq!(put("/api/v1/ports.remove", r#"{"name":"c"}"#), 204);
    assert!(!dir.path().join("c.sock").exists());
    assert_eq!(put("/api/v1/ports.remove", r#"{"name":"c"}"#), 404);
    let (status, metrics) = call(dir.path(), "GET", "/metrics", "");
    assert!(status == 200 && metrics.contains("triarch_netd_port_drops_total{port=\"a\",reason=\"spoofed_mac\"} 1\n"));
    assert_eq!(call(dir.path(), "GET", "/api/v1/ports.set", "").0, 405);
    assert!(daemon.terminate());
}

#[test]
fn announcements_are_sent_for_who_moved_here() {
    let dir = dir();
    let known = "name=a,socket=a.sock,mac=02:00:00:00:00:01";
    let daemon = Daemon::start(dir.path(), &[known, "name=b,socket=b.sock", "name=c,socket=c.sock"]);
    let (mut a, mut b, mut c) = (Guest::new(1), Guest::new(2), Guest::new(3));
    b.connect(&dir.path().join("b.sock"));
    let heard = |guest: &mut Guest| {
        guest
            .receive_raw(SOON)
            .map(|frame| (frame[6..12].to_vec(), frame[12..14].to_vec()))
    };
    a.connect(&dir.path().join("a.sock"));
    assert_eq!(heard(&mut b), Some((mac(1).to_vec(), vec![0x80, 0x35])), "it connected");
    c.connect(&dir.path().join("c.sock"));
    c.send_rarp(&mac(3));
    assert_eq!(
        heard(&mut b),
        Some((mac(3).to_vec(), vec![0x80, 0x35])),
        "it was told to"
    );
    assert!(daemon.terminate());
}

#[test]
fn it_connects_to_front_ends_that_listen() {
    let dir = dir();
    let daemon = Daemon::start(
        dir.path(),
        &["name=a,socket=a.sock,mode=client", "name=b,socket=b.sock"],
    );
    let (mut a, mut b) = (Guest::new(1), Guest::new(2));
    b.connect(&dir.path().join("b.sock"));
    let listener = std::os::unix::net::UnixListener::bind(dir.path().join("a.sock")).expect("bind");
    for _ in 0..3 {
        let (stream, _) = listener.accept().expect("accept");
        a.attach(stream);
        a.send(&mac(2), b"hello");
        assert_eq!(b.receive(SOON), Some((mac(1), b"hello".to_vec())));
        a.disconnect();
    }
    assert!(daemon.terminate());
}
