//! The library against the API's server, over real sockets.

#[path = "../../tests/server/common.rs"]
#[allow(dead_code, reason = "the server's own tests need more of it")]
mod common;

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Duration;

use common::Running;
use triarch_api::events::kind;
use triarch_api::server::{Limits, Method};
use triarch_api::{ApiError, NetConfig, Operation, PayloadConfig, Phase, Reply, Resize, ResizeDisk, VmConfig};
use triarch_client::{Client, ConnectError, Error, Event};

fn config() -> VmConfig {
    VmConfig {
        payload: Some(PayloadConfig {
            kernel: Some("/k".into()),
            ..PayloadConfig::default()
        }),
        ..VmConfig::default()
    }
}

#[test]
fn a_vm_goes_through_its_life() {
    let (server, _vm) = Running::api(Limits::default());
    let mut client = Client::new(&server.path);
    assert_eq!(client.ping().expect("an answer").pid, 42);
    match client.info() {
        Err(Error::Refused { status: 404, message }) => assert!(message.contains("there is no VM"), "{message}"),
        other => panic!("{other:?}"),
    }
    client.create(&config()).expect("created");
    client
        .resize(&Resize {
            desired_vcpus: Some(2),
            ..Resize::default()
        })
        .expect("resized");
    client.add_disk(&Default::default()).expect("added");
    client.remove_device("_disk0").expect("removed");
    for (operation, phase) in [
        (Operation::Boot, Phase::Running),
        (Operation::Pause, Phase::Paused),
        (Operation::Resume, Phase::Running),
    ] {
        client.run(operation).expect("done");
        let info = client.info().expect("an answer");
        assert_eq!((info.state, info.config), (phase, config()));
    }
    client
        .resize_disk(&ResizeDisk {
            id: "_disk0".into(),
            desired_size: 512,
        })
        .expect("resized");
    let refused = client.run(Operation::Resume).expect_err("refused");
    assert!(!refused.is_unanswered());
    assert_eq!(refused.to_string(), "vm.resume: the VM is Running, it must be Paused");
    let metrics = client.metrics().expect("figures");
    assert_eq!(metrics.sum("triarch_vm_state", &[("state", "Running")]), Some(1.0));
}

#[test]
fn a_connection_that_the_vmm_closed_is_made_anew() {
    let limits = Limits {
        idle: Duration::from_millis(30),
        ..Limits::default()
    };
    let (server, _vm) = Running::api(limits);
    let mut client = Client::new(&server.path);
    for _ in 0..3 {
        client.ping().expect("an answer");
        thread::sleep(Duration::from_millis(120));
    }
    client.create(&config()).expect("created");
}

#[test]
fn descriptors_go_along_in_their_order() {
    let (server, vm) = Running::api(Limits::default());
    vm.create(VmConfig::default());
    let files: Vec<_> = (0..3).map(|_| tempfile::tempfile().expect("a file")).collect();
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let net = NetConfig {
        num_queues: 6,
        ..NetConfig::default()
    };
    Client::new(&server.path).add_net(&net, &fds).expect("added");
    let (_, got) = vm.handed.lock().unwrap().take().expect("an interface");
    let inode = |fd: &dyn AsFd| rustix::fs::fstat(fd.as_fd()).expect("fstat").st_ino;
    let got: Vec<_> = got.iter().map(|fd| inode(fd)).collect();
    assert_eq!(got, files.iter().map(|file| inode(file)).collect::<Vec<_>>());
    let many = vec![fds[0]; 254];
    let refused = Client::new(&server.path).add_net(&net, &many);
    assert!(matches!(refused, Err(Error::Request(_))), "{refused:?}");
}

#[test]
fn events_are_followed_until_the_vmm_ends() {
    let (server, vm) = Running::api(Limits::default());
    vm.events.post(&kind::VM_CREATED, &[]);
    let client = Client::new(&server.path);
    let mut events = client.follow("vm.events?since=0").expect("a stream");
    let mut next = || {
        let line = events.line(Duration::from_secs(10)).expect("a line");
        line.map(|line| Event::parse(&line).expect("an event"))
    };
    assert_eq!(next().expect("an event").event, "created");
    vm.events.post(&kind::DEVICE_RESET, &[("id", "_disk0".into())]);
    let reset = next().expect("an event");
    assert_eq!(
        (reset.id, reset.properties.expect("some")["id"].as_str()),
        (Some(2), Some("_disk0"))
    );
    server.stop();
    assert!(next().is_none());
}

#[test]
fn a_stream_without_news_can_be_asked_again_and_a_refusal_is_none() {
    let (server, vm) = Running::api(Limits::default());
    let client = Client::new(&server.path);
    let mut events = client.follow("vm.events").expect("a stream");
    let silent = events.line(Duration::from_millis(20));
    assert!(matches!(silent, Err(Error::Timeout { .. })), "{silent:?}");
    vm.events.post(&kind::VM_CREATED, &[]);
    assert!(events.line(Duration::from_secs(10)).expect("a line").is_some());
    let refused = client.follow("vm.events?since=x").expect_err("refused");
    assert!(matches!(refused, Error::Refused { status: 400, .. }), "{refused:?}");
    let finite = client.follow("vmm.ping").expect_err("no stream");
    assert!(matches!(finite, Error::Malformed { .. }), "{finite:?}");
}

#[test]
fn a_long_request_is_given_up_in_time_and_the_client_goes_on() {
    let (server, vm) = Running::api(Limits::default());
    vm.create(config());
    vm.hold_boots();
    let mut client = Client::new(&server.path).limit(Duration::from_millis(500));
    let late = client.run(Operation::Boot).expect_err("late");
    assert!(late.is_unanswered());
    assert_eq!(
        late.to_string(),
        "vm.boot: no answer within 500 ms; it may still be carried out"
    );
    // The late answer does not become that of the next request.
    vm.finish(|answer| answer.send(Err(ApiError::Failed("no".into()))));
    assert_eq!(client.ping().expect("an answer").pid, 42);
    let waiting = thread::spawn(move || client.limit(Duration::ZERO).run(Operation::Boot));
    vm.wait_for_boot();
    vm.finish(|answer| answer.send(Ok(Reply::Done)));
    waiting.join().expect("no panic").expect("booted");
}

#[test]
fn a_body_that_is_too_large_is_refused_in_words() {
    let (server, _vm) = Running::api(Limits::default());
    let body = "x".repeat(4 << 20);
    let mut client = Client::new(&server.path);
    let refused = client.call(Method::Put, "vm.create", Some(&body)).expect_err("refused");
    assert!(matches!(refused, Error::Refused { status: 413, .. }), "{refused:?}");
    assert_eq!(client.ping().expect("an answer").pid, 42);
}

#[test]
fn why_there_is_no_connection_is_told_apart() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("api.sock");
    let why = || match Client::new(&socket).ping() {
        Err(Error::Connect { source, .. }) => source,
        other => panic!("{other:?}"),
    };
    assert!(matches!(why(), ConnectError::Missing));
    drop(UnixListener::bind(&socket).expect("bind"));
    assert!(matches!(why(), ConnectError::Dead));
    // A VMM that is just being started is waited for.
    std::fs::remove_file(&socket).expect("remove");
    let patient = Client::new(&socket).patience(Duration::from_secs(10));
    let late = thread::spawn(move || patient.follow("vmm.ping"));
    thread::sleep(Duration::from_millis(30));
    let (_other, _vm) = Running::api(Limits::default());
    std::os::unix::fs::symlink(&_other.path, &socket).expect("a link");
    let answered = late.join().expect("no panic").expect_err("no stream");
    assert!(matches!(answered, Error::Malformed { .. }), "{answered:?}");
}
