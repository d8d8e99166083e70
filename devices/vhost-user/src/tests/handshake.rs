//! What a daemon can say to the first questions.

use std::sync::Arc;
use std::time::{Duration, Instant};

use triarch_device_core::{NoSandbox, Sandbox};
use triarch_vhost_protocol::{ConfigRange, NEED_REPLY, Payload, REPLY, Request, message};

use super::fake::{Conversation, FakeDaemon, Received, disk};
use crate::{Peer, PeerOptions};

fn open(options: PeerOptions) -> Result<Arc<Peer>, String> {
    let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
    Peer::open("_disk0", options, disk(), None, &sandbox)
        .map_err(|error| std::error::Error::source(&error).map_or_else(String::new, ToString::to_string))
}

/// Why a daemon that does this to `request` is not taken.
fn refusal(request: Request, twist: impl Fn(&mut Conversation) + Send + Sync + 'static) -> String {
    let dir = tempfile::tempdir().expect("directory");
    let daemon = FakeDaemon::start(dir.path(), move |talk: &mut Conversation, received: &Received| {
        let meant = received.request == request as u32;
        if meant {
            twist(talk);
        }
        meant
    });
    let result = open(daemon.options());
    result.map(|_| ()).expect_err("refused")
}

#[test]
fn a_good_one_is_taken() {
    let dir = tempfile::tempdir().expect("directory");
    let daemon = FakeDaemon::start(dir.path(), |_, _| false);
    let peer = open(daemon.options()).expect("taken");
    assert_eq!(u64::from(peer.known().number(0)) * 512, super::fake::SIZE);
}

#[test]
fn nonsense_is_named() {
    let features = |flags: u32, size: u32| {
        refusal(Request::GET_FEATURES, move |talk| {
            let mut bytes = message(1, flags, &[0; 8]);
            bytes[8..12].copy_from_slice(&size.to_le_bytes());
            talk.send(&bytes);
        })
    };
    assert!(features(0, 8).contains("GET_FEATURES has the flags 0x1"));
    // Version 3, where only 1 exists.
    assert!(features(REPLY | 2, 8).contains("flags 0x7"));
    assert!(features(REPLY, 1 << 31).contains("2147483648 bytes"));
    assert!(features(REPLY, 4).contains("4 bytes, not 8"));
    let other = refusal(Request::GET_FEATURES, |talk| talk.reply(99, &[0; 8]));
    assert!(other.contains("asked for GET_FEATURES it answered message 99"));
    let config = refusal(Request::GET_CONFIG, |talk| {
        talk.reply(24, &ConfigRange::encode_with(0, &[0; 4]));
    });
    assert!(config.contains("60 bytes of its configuration space it answered 4 bytes"));
    let failed = refusal(Request::SET_OWNER, |talk| {
        talk.reply(3, &[0; 7]);
        talk.send(&message(3, REPLY | NEED_REPLY, &[1]));
    });
    assert!(failed.contains("SET_OWNER has 7 bytes"));
}

#[test]
fn descriptors_nobody_asked_for_are_refused() {
    for count in [1, 8, 9, 60] {
        let text = refusal(Request::GET_FEATURES, move |talk| {
            talk.send_with(&message(1, REPLY, &[0; 8]), count);
        });
        assert!(text.contains("descriptors that nobody asked for"), "{count}: {text}");
    }
}

#[test]
fn one_that_ends_in_the_middle_is_not_taken() {
    let text = refusal(Request::GET_FEATURES, |talk| {
        talk.send(&message(1, REPLY, &[0; 8])[..15]);
        talk.stream.shutdown(std::net::Shutdown::Both).expect("shutdown");
    });
    assert_eq!(text, "the daemon closed the connection");
}

#[test]
fn one_that_is_silent_is_not_waited_for() {
    let asked = Instant::now();
    let text = refusal(Request::GET_FEATURES, |talk| talk.send(&[1, 0, 0]));
    assert!(text.contains("did not answer"), "{text}");
    assert!(asked.elapsed() < Duration::from_secs(8), "{:?}", asked.elapsed());
}

#[test]
fn what_it_fails_is_named() {
    let text = refusal(Request::SET_OWNER, |talk| talk.reply(3, &1u64.encode()));
    assert_eq!(text, "the daemon failed SET_OWNER");
}
