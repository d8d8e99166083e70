//! Daemons that connect to the VMM.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use triarch_device_core::{NoSandbox, Sandbox};
use triarch_vhost_protocol::Request;

use super::fake::{Visitor, disk};
use crate::{DataPath, Endpoint, LinkState, LinkStatus, OnDisconnect, Peer, PeerOptions, VhostUser};

/// A listening socket, and where it is.
fn door(dir: &tempfile::TempDir) -> (PathBuf, Endpoint) {
    let path = dir.path().join("door");
    let listener = UnixListener::bind(&path).expect("bind");
    listener.set_nonblocking(true).expect("non-blocking");
    (path.clone(), Endpoint::accept(path, Arc::new(listener)))
}

fn device(endpoint: Endpoint) -> VhostUser {
    let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
    let options = PeerOptions {
        endpoint,
        on_disconnect: OnDisconnect::Stall,
        data_path: DataPath::Auto,
    };
    let peer = Peer::open("_disk0", options, disk(), None, &sandbox).expect("a daemon");
    VhostUser::new("_disk0", peer, &sandbox, Arc::new(|_: &LinkStatus| {})).expect("a device")
}

fn wait(device: &VhostUser, wanted: impl Fn(&LinkStatus) -> bool) -> LinkStatus {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let status = device.handle().status();
        if wanted(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "{status:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_daemon_may_connect_late_and_again() {
    let dir = tempfile::tempdir().expect("directory");
    let (path, endpoint) = door(&dir);
    let visitor = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        Visitor::start(path, |talk, received| {
            // The first two hang up as soon as they are asked again.
            let config = received.request == Request::GET_CONFIG as u32;
            if config && talk.number < 2 {
                talk.stream.shutdown(std::net::Shutdown::Both).expect("shutdown");
            }
            config && talk.number < 2
        })
    });
    let device = device(endpoint);
    let visitor = visitor.join().expect("a visitor");
    wait(&device, |status| status.state == LinkState::Connected);
    drop(device);
    drop(visitor);
}

#[test]
fn the_next_one_takes_its_place_and_a_second_one_is_sent_away() {
    let dir = tempfile::tempdir().expect("directory");
    let (path, endpoint) = door(&dir);
    let ends = Arc::new(std::sync::Mutex::new(Vec::new()));
    let streams = ends.clone();
    let visitor = Visitor::start(path.clone(), move |talk, received| {
        if received.request == Request::GET_FEATURES as u32 {
            let stream = talk.stream.try_clone().expect("stream");
            streams.lock().expect("lock").push(stream);
        }
        false
    });
    let device = device(endpoint);
    wait(&device, |status| status.state == LinkState::Connected);
    let mut second = UnixStream::connect(&path).expect("connect");
    second.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    assert_eq!(second.read(&mut [0; 8]).expect("an end"), 0, "it was asked something");
    assert_eq!(device.handle().status().state, LinkState::Connected);
    let first = ends.lock().expect("lock").pop().expect("a stream");
    first.shutdown(std::net::Shutdown::Both).expect("shutdown");
    wait(&device, |status| {
        status.reconnects == 1 && status.state == LinkState::Connected
    });
    drop(device);
    drop(visitor);
}
