//! Pages that daemons write are logged.

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use triarch_vhost_protocol::{LOG_ALL, Payload, Request, protocol};

use super::direct::{Rig, direct};
use super::fake::{Conversation, Received};
use crate::{LinkState, PageLog};

fn taken(log: &PageLog) -> Vec<u64> {
    let mut pages = Vec::new();
    log.take(|page| pages.push(page));
    pages
}

fn number(received: &Received, at: usize) -> u64 {
    u64::from_le_bytes(received.payload[at..at + 8].try_into().expect("8 bytes"))
}

#[test]
fn a_daemon_logs_and_so_does_the_next() {
    let rings: Arc<Mutex<Vec<(u8, u64)>>> = Arc::default();
    let streams: Arc<Mutex<Vec<UnixStream>>> = Arc::default();
    let (seen, ends) = (rings.clone(), streams.clone());
    let serve = direct(|_| {});
    let twist = move |talk: &mut Conversation, received: &Received| {
        let is = |request: Request| received.request == request as u32;
        if is(Request::SET_OWNER) {
            ends.lock()
                .expect("lock")
                .push(talk.stream.try_clone().expect("stream"));
        }
        if is(Request::SET_VRING_ADDR) {
            seen.lock()
                .expect("lock")
                .push((received.payload[4], number(received, 32)));
        }
        if is(Request::SET_FEATURES) && number(received, 0) & LOG_ALL != 0 {
            let log = talk.log.as_ref().expect("a log");
            log.write_all_at(&[1 << 5, 0, 0x81], 8 * talk.number as u64)
                .expect("mark");
            assert!(log.set_len(0).is_err(), "cut short");
        }
        serve(talk, received)
    };
    let mut rig = Rig::with(Box::new(twist), |_| {});
    rig.wait(|s| s.state == LinkState::Connected);
    let log = rig.device.start_log().expect("it can").expect("there is a driver");
    assert_eq!(taken(&log), [5, 16, 23]);
    assert!(taken(&log).is_empty(), "once");
    streams.lock().expect("lock")[0]
        .shutdown(std::net::Shutdown::Both)
        .expect("shutdown");
    rig.wait(|s| s.reconnects == 1 && s.state == LinkState::Connected);
    assert_eq!(taken(&log), [64 + 5, 64 + 16, 64 + 23]);
    rig.device.stop_log();
    // The used ring, too, while there is a log.
    assert_eq!(*rings.lock().expect("lock"), [(0, 0), (1, 0x3000), (1, 0x3000), (0, 0)]);
}

#[test]
fn one_that_cannot_log_is_named() {
    let serve = direct(|_| {});
    let twist = move |talk: &mut Conversation, received: &Received| {
        if received.request == Request::GET_PROTOCOL_FEATURES as u32 {
            let offered = protocol::COMMON & !(protocol::CONFIGURE_MEM_SLOTS | protocol::LOG_SHMFD);
            talk.reply(received.request, &offered.encode());
            return true;
        }
        assert_ne!(received.request, Request::SET_LOG_BASE as u32);
        serve(talk, received)
    };
    let mut rig = Rig::with(Box::new(twist), |_| {});
    rig.wait(|s| s.state == LinkState::Connected);
    let error = rig.device.start_log().map(|_| ()).expect_err("it cannot");
    assert!(error.to_string().contains("cannot log"), "{error}");
    assert_eq!(rig.handle.status().state, LinkState::Connected, "it goes on without");
}
