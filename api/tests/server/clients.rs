//! Good, slow, dead and greedy clients.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use triarch_api::server::{Call, Later, Limits, Response, Served, Service};
use triarch_api::{ApiError, Reply, VmConfig};

use crate::common::{Client, Running, put};

fn short() -> Limits {
    Limits {
        idle: Duration::from_millis(150),
        request: Duration::from_millis(150),
        unread: Duration::from_millis(150),
        ..Limits::default()
    }
}

#[test]
fn a_connection_serves_a_thousand_requests_and_many_connections_one() {
    let (server, _vm) = Running::api(Limits::default());
    let mut client = server.connect();
    for _ in 0..1000 {
        assert_eq!(client.get("vmm.ping").status, 200);
    }
    for _ in 0..300 {
        assert_eq!(server.connect().get("vmm.ping").status, 200);
    }
}

#[test]
fn requests_sent_together_are_answered_in_order() {
    let (server, _vm) = Running::api(Limits::default());
    let mut client = server.connect();
    let one = "GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n";
    let create = put("vm.create", r#"{"payload": {"kernel": "/k"}}"#);
    let info = "GET /api/v1/vm.info HTTP/1.1\r\n\r\n";
    client.send([one.repeat(50), create, put("vm.boot", ""), info.into(), one.repeat(50)].concat());
    let statuses: Vec<u16> = (0..103)
        .map(|_| client.response().expect("a response").status)
        .collect();
    let expected = [[200; 50].as_slice(), &[204, 204, 200], &[200; 50]].concat();
    assert_eq!(statuses, expected);
}

#[test]
fn a_request_may_come_byte_by_byte() {
    let (server, _vm) = Running::api(Limits::default());
    let mut client = server.connect();
    for byte in put("vm.create", r#"{"payload": {"kernel": "/k"}}"#).bytes() {
        client.send([byte]);
    }
    assert_eq!(client.response().expect("a response").status, 204);
}

#[test]
fn a_stalled_client_delays_nobody() {
    let (server, _vm) = Running::api(Limits::default());
    let mut stalled = server.connect();
    stalled.send("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 100\r\n\r\n{\"pay");
    let mut deaf = server.connect();
    deaf.stream.set_nonblocking(true).expect("non-blocking");
    // Asks and never listens, until the server stops reading.
    while deaf
        .stream
        .write(&b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n".repeat(100))
        .is_ok()
    {}
    let start = Instant::now();
    let mut client = server.connect();
    for _ in 0..100 {
        assert_eq!(client.get("vmm.ping").status, 200);
    }
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    stalled.send([b' '; 95]);
    assert_eq!(stalled.response().expect("a response").status, 400);
}

#[test]
fn a_long_request_delays_nobody_and_is_answered_in_the_end() {
    let (server, vm) = Running::api(Limits::default());
    vm.create(VmConfig::default());
    vm.hold_boots();
    let mut booting = server.connect();
    booting.send(put("vm.boot", ""));
    // The next one on the same connection waits its turn.
    booting.send("GET /api/v1/vm.info HTTP/1.1\r\n\r\n");
    vm.wait_for_boot();
    let mut client = server.connect();
    for _ in 0..100 {
        assert!(client.get("vm.info").body.contains(r#""state":"Created""#));
    }
    vm.finish(|answer| answer.send(Err(ApiError::Failed("no".into()))));
    let got = booting.response().expect("a response");
    assert_eq!((got.status, got.body.as_str()), (500, r#"{"error":"no"}"#));
    assert_eq!(booting.response().expect("a response").status, 200);
}

#[test]
fn who_waits_for_an_answer_is_not_read_any_further() {
    let (server, vm) = Running::api(Limits::default());
    vm.create(VmConfig::default());
    vm.hold_boots();
    let mut client = server.connect();
    client.send(put("vm.boot", ""));
    vm.wait_for_boot();
    let patience = Some(Duration::from_millis(100));
    client.stream.set_write_timeout(patience).expect("a timeout");
    // The socket holds some hundred KiB, the server nothing.
    let sent = (0..4096)
        .take_while(|_| client.stream.write_all(&[b'\n'; 1024]).is_ok())
        .count();
    assert!(sent < 4096, "{sent} KiB were taken");
}

#[test]
fn a_client_that_went_away_does_not_disturb_its_request() {
    let (server, vm) = Running::api(Limits::default());
    vm.create(VmConfig::default());
    vm.hold_boots();
    for _ in 0..3 {
        server.connect().send(put("vm.boot", ""));
        vm.wait_for_boot();
        vm.finish(|answer| answer.send(Ok(Reply::Done)));
    }
    assert_eq!(server.connect().get("vmm.ping").status, 200);
}

#[test]
fn a_client_that_sends_no_more_still_gets_its_answer() {
    let (server, vm) = Running::api(Limits::default());
    vm.create(VmConfig::default());
    vm.hold_boots();
    let mut client = server.connect();
    client.send(put("vm.boot", ""));
    client.stream.shutdown(std::net::Shutdown::Write).expect("shutdown");
    vm.wait_for_boot();
    std::thread::sleep(Duration::from_millis(20));
    vm.finish(drop);
    let got = client.response().expect("a response");
    assert_eq!(
        (got.status, got.body.as_str()),
        (500, r#"{"error":"the VMM is shutting down"}"#)
    );
    assert_eq!(client.response(), None);
}

#[test]
fn what_is_too_large_is_refused_and_the_response_arrives() {
    let (server, _vm) = Running::api(Limits::default());
    let mut client = server.connect();
    client.send(format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(9000)));
    let got = client.response().expect("a response");
    assert_eq!(got.status, 431);
    assert!(got.head.contains("Connection: close"));
    assert_eq!(client.response(), None);

    let mut client = server.connect();
    client.send(format!(
        "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
        2 << 20
    ));
    // The client may be in the middle of sending: it is heard out.
    client.send(vec![b' '; 2 << 20]);
    assert_eq!(client.response().expect("a response").status, 413);

    let mut client = server.connect();
    let largest = format!("{{\"unknown\":\"{}\"}}", "a".repeat((512 << 10) - 14));
    assert_eq!(largest.len(), 512 << 10);
    assert_eq!(client.put("vm.create", &largest).status, 400);
    assert_eq!(client.get("vmm.ping").status, 200);
}

#[test]
fn curl_is_told_to_continue() {
    let (server, _vm) = Running::api(Limits::default());
    let mut client = server.connect();
    client.send("PUT /api/v1/vm.create HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    assert_eq!(
        client.response().expect("a response").head,
        "HTTP/1.1 100 Continue\r\n\r\n"
    );
    client.send("{}");
    assert_eq!(client.response().expect("a response").status, 400);
}

#[test]
fn a_connection_ends_when_the_client_wants_it() {
    let (server, _vm) = Running::api(Limits::default());
    for request in ["HTTP/1.1\r\nConnection: close\r\n\r\n", "HTTP/1.0\r\n\r\n"] {
        let mut client = server.connect();
        client.send(format!("GET /api/v1/vmm.ping {request}"));
        assert_eq!(client.response().expect("a response").status, 200);
        assert_eq!(client.response(), None);
    }
}

#[test]
fn patience_ends() {
    let (server, vm) = Running::api(short());
    vm.create(VmConfig::default());
    vm.hold_boots();
    let mut waiting = server.connect();
    waiting.send(put("vm.boot", ""));
    let mut idle = server.connect();
    assert_eq!(idle.get("vmm.ping").status, 200);
    let mut slow = server.connect();
    slow.send("GET /api");
    let start = Instant::now();
    assert_eq!(slow.response().expect("a response").status, 408);
    assert!(start.elapsed() >= Duration::from_millis(100), "{:?}", start.elapsed());
    assert_eq!(slow.response(), None);
    assert_eq!(idle.response(), None);
    // The VM has all the time it needs.
    vm.finish(|answer| answer.send(Ok(Reply::Done)));
    assert_eq!(waiting.response().expect("a response").status, 204);
}

#[test]
fn a_trickle_does_not_buy_time() {
    let (server, _vm) = Running::api(short());
    let mut client = server.connect();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) && client.stream.write_all(b"G").is_ok() {
        std::thread::sleep(Duration::from_millis(10));
        let mut buffer = [0; 12];
        client.stream.set_nonblocking(true).expect("non-blocking");
        if client.stream.read(&mut buffer).is_ok() {
            assert_eq!(&buffer, b"HTTP/1.1 408");
            return;
        }
    }
    panic!("not told off after {:?}", start.elapsed());
}

#[test]
fn a_client_that_does_not_listen_is_left() {
    let (server, _vm) = Running::api(short());
    let mut client = server.connect();
    let request = b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n".repeat(100);
    // Fails when the server closed the connection.
    while client.stream.write(&request).is_ok() {}
    // A write that just ran out of patience is told apart by its duration.
    assert!(client.stream.peer_addr().is_ok());
    assert_eq!(
        client.stream.write(b"x").expect_err("closed").kind(),
        std::io::ErrorKind::BrokenPipe
    );
}

#[test]
fn one_client_too_many_takes_the_place_of_the_idlest() {
    let limits = Limits {
        connections: 3,
        ..Limits::default()
    };
    let (server, vm) = Running::api(limits);
    vm.create(VmConfig::default());
    vm.hold_boots();
    let mut clients: Vec<Client> = (0..3).map(|_| server.connect()).collect();
    for client in &mut clients {
        assert_eq!(client.get("vmm.ping").status, 200);
    }
    assert_eq!(clients[0].get("vmm.ping").status, 200);
    let mut fourth = server.connect();
    assert_eq!(fourth.get("vmm.ping").status, 200);
    assert_eq!(clients[1].response(), None);
    // Who waits for an answer keeps its place.
    fourth.send(put("vm.boot", ""));
    clients[0].send("GET");
    clients[2].send("GET");
    vm.wait_for_boot();
    std::thread::sleep(Duration::from_millis(50));
    let mut fifth = server.connect();
    assert_eq!(fifth.response().expect("a response").status, 503);
    assert_eq!(fifth.response(), None);
}

#[test]
fn what_was_answered_is_sent_before_the_end() {
    let (server, vm) = Running::api(Limits::default());
    vm.create(VmConfig::default());
    vm.hold_boots();
    let mut client = server.connect();
    client.send(put("vm.boot", ""));
    vm.wait_for_boot();
    vm.finish(|answer| answer.send(Ok(Reply::Done)));
    drop(server.stop());
    assert_eq!(client.response().expect("a response").status, 204);
    assert_eq!(client.response(), None);
}

/// Answers with the contents of the files it got.
struct Files;

impl Service for Files {
    fn serve(&mut self, call: Call<'_>, later: &dyn Fn() -> Later) -> Served {
        if call.path == "/forget" {
            let _ = later();
            return Served::Later;
        }
        assert_eq!(call.peer.pid, std::process::id());
        let mut contents = String::new();
        for fd in call.fds {
            let mut file = File::from(fd);
            file.rewind().expect("rewind");
            file.read_to_string(&mut contents).expect("read");
        }
        let body = format!("{:?}", format!("{}:{contents}", call.path));
        Served::Now(Response::json(body.into_bytes().into()))
    }
}

fn file(text: &str) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(text.as_bytes()).expect("write");
    file
}

#[test]
fn descriptors_stay_with_their_request_in_order() {
    let server = Running::start(Box::new(Files), Limits::default());
    let mut client = server.connect();
    let files: Vec<File> = ["a", "b", "c", "d", "e"].into_iter().map(file).collect();
    let fd = |i: usize| files[i].as_fd();
    // With the head, with the body, one after the other, and one request without between them.
    client.send_fds(b"PUT /1 HTTP/1.1\r\nContent-Length: 2\r\n\r\n", &[fd(0), fd(1)]);
    client.send_fds(b"{}", &[fd(2)]);
    client.send("GET /2 HTTP/1.1\r\n\r\n");
    client.send_fds(b"GET /3 HTTP/1.1\r\n\r\n", &[fd(3)]);
    client.send_fds(b"GET /4 HTTP/1.1\r\n\r\n", &[fd(4), fd(0)]);
    let bodies: Vec<String> = (0..4).map(|_| client.response().expect("a response").body).collect();
    assert_eq!(bodies, [r#""/1:abc""#, r#""/2:""#, r#""/3:d""#, r#""/4:ea""#]);
}

/// Answers with more than a socket holds, and counts.
struct Large(Arc<AtomicUsize>);

const LARGE: usize = 4 << 20;

impl Service for Large {
    fn serve(&mut self, _call: Call<'_>, _later: &dyn Fn() -> Later) -> Served {
        self.0.fetch_add(1, Ordering::SeqCst);
        Served::Now(Response::json(vec![b'1'; LARGE].into()))
    }
}

#[test]
fn a_response_is_read_before_the_next_is_made() {
    let calls = Arc::new(AtomicUsize::new(0));
    let server = Running::start(Box::new(Large(calls.clone())), Limits::default());
    let mut client = server.connect();
    client.send("GET / HTTP/1.1\r\n\r\n".repeat(20));
    while calls.load(Ordering::SeqCst) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Time to go wrong in.
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    for _ in 0..20 {
        assert_eq!(client.response().expect("a response").body.len(), LARGE);
    }
    assert_eq!(calls.load(Ordering::SeqCst), 20);
}

#[test]
fn the_end_waits_a_moment_for_who_is_reading() {
    let calls = Arc::new(AtomicUsize::new(0));
    let server = Running::start(Box::new(Large(calls.clone())), Limits::default());
    let mut client = server.connect();
    client.send("GET / HTTP/1.1\r\n\r\n");
    while calls.load(Ordering::SeqCst) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let reader = std::thread::spawn(move || {
        // Part of it is sent when the server is told to end.
        std::thread::sleep(Duration::from_millis(20));
        client.response().expect("a response").body.len()
    });
    drop(server.stop());
    assert_eq!(reader.join().expect("the whole response"), LARGE);
}

#[test]
fn a_forgotten_request_is_answered() {
    let server = Running::start(Box::new(Files), Limits::default());
    let mut client = server.connect();
    client.send("GET /forget HTTP/1.1\r\n\r\nGET /next HTTP/1.1\r\n\r\n");
    assert_eq!(client.response().expect("a response").status, 500);
    assert_eq!(client.response().expect("a response").status, 200);
}

#[test]
fn more_descriptors_than_a_request_may_have_are_refused() {
    let server = Running::start(Box::new(Files), Limits::default());
    let mut client = server.connect();
    let file = file("x");
    let many = [file.as_fd(); 200];
    client.send_fds(b"GET", &many);
    client.send_fds(b" / ", &many);
    assert_eq!(client.response().expect("a response").status, 400);
}
