//! Events as a stream, jobs, and who follows them.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use triarch_api::audit::{AuditRecord, AuditSink};
use triarch_api::events::{EventLog, kind};
use triarch_api::server::{Identity, Limits, Router};
use triarch_api::{ApiError, Reply, VmConfig};

use crate::common::{Client, FakeVm, Running, put};

/// A client that follows the events.
struct Follower(BufReader<UnixStream>);

impl Follower {
    /// Asks for the stream and reads the head of the response.
    fn new(server: &Running, query: &str) -> Self {
        let mut client = server.connect();
        client.send(format!(
            "GET /api/v1/vm.events{query} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        ));
        let mut reader = BufReader::new(client.stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(reader.read_line(&mut head).expect("a head"), 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.1 200 \r\n"), "{head}");
        assert!(head.contains("\r\nConnection: close\r\n"), "{head}");
        assert!(
            !head.contains("Content-Length") && !head.contains("Transfer-Encoding"),
            "{head}"
        );
        Self(reader)
    }

    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line).expect("a line") {
            0 => None,
            _ => Some(serde_json::from_str(&line).expect("JSON")),
        }
    }

    fn id(&mut self) -> u64 {
        self.next().expect("an event")["id"].as_u64().expect("a number")
    }
}

fn post(log: &EventLog, count: usize) {
    for _ in 0..count {
        log.post(&kind::VM_PAUSED, &[]);
    }
}

#[test]
fn a_stream_replays_and_follows() {
    let (server, vm) = Running::api(Limits::default());
    post(&vm.events, 3);
    let mut all = Follower::new(&server, "?since=0");
    let mut some = Follower::new(&server, "?since=2");
    let mut new = Follower::new(&server, "");
    assert_eq!((all.id(), all.id(), all.id()), (1, 2, 3));
    assert_eq!(some.id(), 3);
    post(&vm.events, 2);
    for follower in [&mut all, &mut some, &mut new] {
        assert_eq!((follower.id(), follower.id()), (4, 5));
    }
    // What it got last is enough to go on later.
    drop(some);
    post(&vm.events, 1);
    assert_eq!(Follower::new(&server, "?since=5").id(), 6);
}

#[test]
fn an_array_is_an_ordinary_response() {
    let (server, vm) = Running::api(Limits::default());
    let mut client = server.connect();
    assert_eq!(client.get("vm.events?follow=false").body, "[]");
    post(&vm.events, 4);
    let ids = |got: &str| -> Vec<u64> {
        let events: Vec<Value> = serde_json::from_str(got).expect("an array");
        events.iter().filter_map(|event| event["id"].as_u64()).collect()
    };
    assert_eq!(ids(&client.get("vm.events?follow=false").body), [1, 2, 3, 4]);
    assert_eq!(ids(&client.get("vm.events?follow=false&since=3").body), [4]);
    for bad in ["since=5", "since=x", "follow=maybe", "from=1"] {
        let got = client.get(&format!("vm.events?{bad}"));
        assert_eq!(got.status, 400, "{bad}: {}", got.body);
    }
    assert_eq!(client.put("vm.events", "").status, 405);
    assert_eq!(client.get("vmm.ping").status, 200);
}

#[test]
fn a_reader_that_stops_delays_nobody_and_is_told_what_it_missed() {
    let limits = Limits {
        unread: Duration::from_millis(50),
        ..Limits::default()
    };
    let (server, vm) = Running::api(limits);
    let mut slow = Follower::new(&server, "?since=0");
    let mut quick = Follower::new(&server, "?since=0");
    let start = Instant::now();
    // Far more than sockets and the log hold.
    for round in 0..40 {
        post(&vm.events, 500);
        for n in 0..500 {
            assert_eq!(quick.id(), round * 500 + n + 1);
        }
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    // It is not closed for being slow either.
    thread::sleep(Duration::from_millis(150));
    assert_eq!(server.connect().get("vmm.ping").status, 200);
    let (mut seen, mut lost, mut last) = (0, 0, 0);
    while last < 20_000 {
        let event = slow.next().expect("an event");
        match event["properties"]["count"].as_u64() {
            Some(count) => lost += count,
            None => seen += 1,
        }
        let id = event["id"].as_u64().expect("a number");
        assert_eq!(id, seen + lost, "{event}");
        last = id;
    }
    assert!(lost > 0 && seen >= 1024, "{lost} lost, {seen} seen");
    post(&vm.events, 1);
    assert_eq!(slow.id(), 20_001);
}

#[test]
fn streams_are_limited_and_end_with_their_client() {
    let limits = Limits {
        streams: 3,
        ..Limits::default()
    };
    let (server, vm) = Running::api(limits);
    for _ in 0..50 {
        let mut followers: Vec<_> = (0..3).map(|_| Follower::new(&server, "")).collect();
        let mut client = server.connect();
        let refused = client.get("vm.events");
        assert_eq!(refused.status, 429, "{}", refused.body);
        // It may go on with something else.
        assert_eq!(client.get("vmm.ping").status, 200);
        post(&vm.events, 1);
        let ids: Vec<_> = followers.iter_mut().map(Follower::id).collect();
        assert!(ids.windows(2).all(|pair| pair[0] == pair[1]), "{ids:?}");
        drop(followers);
        wait_until_free(&server);
    }
}

/// Waits until the server has noticed that a stream ended.
fn wait_until_free(server: &Running) {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut client = server.connect();
    loop {
        client.send("GET /api/v1/vm.events HTTP/1.1\r\n\r\n");
        let mut start = [0; 12];
        client.stream.read_exact(&mut start).expect("a response");
        if start.ends_with(b"200") {
            return;
        }
        assert!(Instant::now() < deadline, "streams do not end");
        client = server.connect();
    }
}

#[test]
fn a_reader_that_is_stuck_makes_room_for_another() {
    let limits = Limits {
        streams: 1,
        unread: Duration::from_millis(50),
        ..Limits::default()
    };
    let (server, vm) = Running::api(limits);
    let stuck = Follower::new(&server, "?since=0");
    assert_eq!(server.connect().get("vm.events").status, 429);
    let ping = |server: &Running| assert_eq!(server.connect().get("vmm.ping").status, 200);
    // The socket takes some hundred KiB.
    for _ in 0..200 {
        post(&vm.events, 500);
        ping(&server);
    }
    thread::sleep(Duration::from_millis(100));
    let mut next = Follower::new(&server, "");
    post(&vm.events, 1);
    assert_eq!(next.id(), 100_001);
    drop(stuck);
}

#[test]
fn many_requests_for_a_stream_one_behind_the_other_are_refused_one_by_one() {
    let limits = Limits {
        streams: 0,
        ..Limits::default()
    };
    let (server, _vm) = Running::api(limits);
    let mut client = server.connect();
    client.send("GET /api/v1/vm.events HTTP/1.1\r\n\r\n".repeat(1000));
    for _ in 0..1000 {
        assert_eq!(client.response().expect("a response").status, 429);
    }
}

#[test]
fn what_a_follower_sends_later_is_ignored() {
    let (server, vm) = Running::api(Limits::default());
    let mut client = server.connect();
    client.send("GET /api/v1/vm.events HTTP/1.1\r\n\r\n".repeat(2));
    client.send(put("vm.create", r#"{"payload": {"kernel": "/k"}}"#));
    let mut reader = BufReader::new(client.stream.try_clone().expect("a copy"));
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line).expect("a head");
    }
    post(&vm.events, 1);
    line.clear();
    reader.read_line(&mut line).expect("an event");
    assert!(line.starts_with(r#"{"id":1,"#), "{line}");
    assert_eq!(
        server.connect().get("vm.info").status,
        404,
        "the request behind the stream was carried out"
    );
}

#[test]
fn the_last_event_reaches_followers_before_the_server_ends() {
    let (server, vm) = Running::api(Limits::default());
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let mut follower = Follower::new(&server, "");
            thread::spawn(move || std::iter::from_fn(|| follower.next()).collect::<Vec<_>>())
        })
        .collect();
    // More than goes out in one turn.
    post(&vm.events, 1000);
    vm.events.post(&kind::VMM_SHUTDOWN, &[]);
    drop(server.stop());
    for reader in readers {
        let events = reader.join().expect("no panic");
        assert_eq!(events.len(), 1001);
        assert_eq!(events[1000]["event"], "shutdown");
    }
}

#[test]
fn what_a_stream_has_begun_to_replay_is_sent_before_the_server_ends() {
    for _ in 0..30 {
        let (server, vm) = Running::api(Limits::default());
        let text = "x".repeat(60);
        for _ in 0..1000 {
            vm.events.post(&kind::VM_FAILED, &[("error", text.as_str().into())]);
        }
        // It goes out in several turns, and the end comes between them.
        let mut follower = Follower::new(&server, "?since=0");
        let reader = thread::spawn(move || std::iter::from_fn(|| follower.next()).count());
        drop(server.stop());
        assert_eq!(reader.join().expect("no panic"), 1000);
    }
}

#[test]
fn what_was_held_back_comes_without_another_event() {
    let (server, vm) = Running::api(Limits::default());
    let mut follower = Follower::new(&server, "?since=0");
    let id = [("id", "_disk0".into())];
    let mut seen = 0;
    for _ in 0..100 {
        vm.events.post_guest("_disk0", &kind::DEVICE_RESET, &id);
    }
    loop {
        let event = follower.next().expect("an event");
        seen += 1;
        if let Some(suppressed) = event["properties"]["suppressed"].as_u64() {
            assert_eq!(seen + suppressed, 100);
            return;
        }
        let patience = Some(Duration::from_secs(30));
        follower.0.get_ref().set_read_timeout(patience).expect("a timeout");
    }
}

#[test]
fn jobs_are_read_while_they_run() {
    let (server, vm) = Running::api(Limits::default());
    vm.create(VmConfig::default());
    vm.hold_boots();
    let mut booting = server.connect();
    booting.send(put("vm.boot", ""));
    vm.wait_for_boot();
    let job = vm.jobs.begin("vm.boot");
    job.note("devices");
    job.progress(1, 3, "devices");
    let mut client = server.connect();
    let get = |client: &mut Client, name: &str| -> Value {
        let got = client.get(name);
        assert_eq!(got.status, 200, "{name}: {}", got.body);
        serde_json::from_str(&got.body).expect("JSON")
    };
    for done in 1..4 {
        job.progress(done, 3, "devices");
        let seen = get(&mut client, "vm.job/1");
        assert_eq!((&seen["state"], &seen["phase"]), (&"running".into(), &"devices".into()));
        assert_eq!(
            seen["progress"],
            serde_json::json!({"done": done, "total": 3, "unit": "devices"})
        );
        assert_eq!(get(&mut client, "vm.jobs"), serde_json::json!([seen]));
    }
    job.finish(Err("no such device"));
    vm.finish(|answer| answer.send(Err(ApiError::Failed("no such device".into()))));
    assert_eq!(booting.response().expect("a response").status, 500);
    let seen = get(&mut client, "vm.job/1");
    assert_eq!(
        (&seen["state"], &seen["error"]),
        (&"failed".into(), &"no such device".into())
    );
    for missing in ["vm.job/2", "vm.job/", "vm.job/x", "vm.job/-1", "vm.job/{id}", "vm.job"] {
        assert_eq!(client.get(missing).status, 404, "{missing}");
    }
}

#[derive(Default)]
struct Kept(Mutex<Vec<AuditRecord>>);

impl AuditSink for Kept {
    fn record(&self, record: &AuditRecord) {
        self.0.lock().unwrap().push(record.clone());
    }
}

/// A server whose calls are on record.
fn audited() -> (Running, Arc<FakeVm>, Arc<Kept>) {
    let (vm, kept) = (Arc::new(FakeVm::default()), Arc::new(Kept::default()));
    let identity = Identity {
        build_version: "v1".into(),
        version: "1".into(),
        pid: 1,
        features: vec![],
    };
    let router = Router::new(vm.clone(), &identity).with_audit(kept.clone());
    (Running::start(Box::new(router), Limits::default()), vm, kept)
}

#[test]
fn every_call_for_a_change_is_on_record_before_it_is_answered_and_no_question_is() {
    let (server, _vm, kept) = audited();
    let mut client = server.connect();
    let create = r#"{"payload": {"kernel": "/k", "cmdline": "secret"}, "disks": [{"path": "/d"}]}"#;
    let calls = [
        ("vm.create", "{"),
        ("vm.create", create),
        ("vm.boot", ""),
        ("vm.boot", ""),
        ("vm.coredump", ""),
        ("vm.remove-device", r#"{"id": "_disk0"}"#),
        ("vm.delete", ""),
    ];
    for (count, (name, body)) in calls.into_iter().enumerate() {
        let got = client.put(name, body);
        client.get("vm.info");
        client.get("vm.jobs");
        assert_eq!(client.get("vmm.cpu-features").status, 200);
        let records = kept.0.lock().unwrap();
        assert_eq!(records.len(), count + 1, "after {name}");
        let record = records.last().expect("one");
        assert_eq!((record.request.as_str(), record.status), (name, got.status));
        assert_eq!(record.pid, std::process::id());
        let error = serde_json::from_str::<Value>(&got.body).ok();
        let error = error.and_then(|body| body["error"].as_str().map(str::to_owned));
        assert_eq!(record.error, error, "{name}");
    }
    let records = kept.0.lock().unwrap();
    let parameters = records[1].parameters.as_ref().expect("parameters");
    assert_eq!(
        (&parameters["boots"], &parameters["disks"]),
        (&"/k".into(), &serde_json::json!(["/d"]))
    );
    assert!(records.iter().all(|record| !record.to_json().contains("secret")));
}

#[test]
fn an_answer_that_nobody_gives_is_on_record_too() {
    let (server, vm, kept) = audited();
    vm.create(VmConfig::default());
    vm.hold_boots();
    let mut client = server.connect();
    client.send(put("vm.boot", ""));
    vm.wait_for_boot();
    vm.finish(drop);
    assert_eq!(client.response().expect("a response").status, 500);
    vm.hold_boots();
    let other = server.connect();
    drop(other);
    let statuses: Vec<u16> = kept.0.lock().unwrap().iter().map(|record| record.status).collect();
    assert_eq!(statuses, [500]);
    // A client that is gone has been heard all the same.
    server.connect().send(put("vm.boot", ""));
    vm.wait_for_boot();
    vm.finish(|answer| answer.send(Ok(Reply::Done)));
    assert_eq!(kept.0.lock().unwrap().last().map(|record| record.status), Some(204));
}
