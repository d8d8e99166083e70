//! How the socket comes and goes.

use std::fs;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use triarch_api::server::{Limits, ListenError, Listener, Server};

use crate::common::Client;

#[test]
fn only_its_user_can_connect() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("s");
    let _listener = Listener::bind(&path).expect("a socket");
    let mode = fs::metadata(&path).expect("a file").permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
}

#[test]
fn it_is_removed_at_the_end() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("s");
    let listener = Listener::bind(&path).expect("a socket");
    assert!(path.exists());
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn one_that_somebody_else_put_there_is_not_removed() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("s");
    let ours = Listener::bind(&path).expect("a socket");
    fs::remove_file(&path).expect("remove");
    let _theirs = UnixListener::bind(&path).expect("another socket");
    drop(ours);
    assert!(path.exists());
}

#[test]
fn an_abandoned_socket_is_replaced() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("s");
    // A listener of the standard library leaves its file.
    drop(UnixListener::bind(&path).expect("a socket"));
    assert!(path.exists());
    let _listener = Listener::bind(&path).expect("a socket in its place");
    UnixStream::connect(&path).expect("connect");
}

#[test]
fn a_socket_in_use_and_other_files_are_left_alone() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("s");
    let _first = UnixListener::bind(&path).expect("a socket");
    let error = Listener::bind(&path).expect_err("in use");
    assert!(matches!(error, ListenError::InUse(_)), "{error}");
    UnixStream::connect(&path).expect("the first one still listens");

    let file = directory.path().join("f");
    fs::write(&file, "precious").expect("write");
    assert!(matches!(Listener::bind(&file), Err(ListenError::NoSocket(_))));
    assert_eq!(fs::read(&file).expect("read"), b"precious");

    let link = directory.path().join("l");
    std::os::unix::fs::symlink(&file, &link).expect("link");
    assert!(matches!(Listener::bind(&link), Err(ListenError::NoSocket(_))));
}

#[test]
fn a_place_that_cannot_be_is_named() {
    for path in ["/nonexistent/s".to_owned(), format!("/tmp/{}", "x".repeat(200))] {
        let error = Listener::bind(path.as_ref()).expect_err("no such place");
        assert!(matches!(error, ListenError::Make { .. }));
        assert!(error.to_string().contains(&path), "{error}");
    }
}

#[test]
fn an_inherited_socket_is_served() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("s");
    let fd = UnixListener::bind(&path).expect("a socket").into_raw_fd();
    let listener = Listener::inherit(fd).expect("a listener");
    let (vm, identity) = (
        std::sync::Arc::new(crate::common::FakeVm::default()),
        triarch_api::server::Identity {
            build_version: String::new(),
            version: String::new(),
            pid: 1,
            features: vec![],
        },
    );
    let router = Box::new(triarch_api::server::Router::new(vm, &identity));
    let mut server = Server::new(listener, router, Limits::default()).expect("a server");
    let stopper = server.stopper();
    let thread = std::thread::spawn(move || server.run());
    assert_eq!(Client::connect(&path).get("vmm.ping").status, 200);
    stopper.stop();
    thread.join().expect("no panic").expect("the loop");
    // It was not made by the server, which leaves it.
    assert!(path.exists());
}

#[test]
fn other_descriptors_are_not_served() {
    assert!(matches!(Listener::inherit(-1), Err(ListenError::Inherit { .. })));
    assert!(matches!(Listener::inherit(99_999), Err(ListenError::Inherit { .. })));
    let (connected, _other) = UnixStream::pair().expect("a pair");
    let file = tempfile::tempfile().expect("a file");
    for fd in [connected.into_raw_fd(), file.into_raw_fd()] {
        assert!(matches!(Listener::inherit(fd), Err(ListenError::NotListening(_))));
    }
}
