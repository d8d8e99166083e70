//! Pages that daemons write are logged.

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use triarch_device_core::Event;
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
    let rig = Rig::with(Box::new(twist), |_| {});
    rig.wait(|s| s.state == LinkState::Connected);
    let log = rig.log(None).expect("it can");
    assert_eq!(taken(&log), [5, 16, 23]);
    assert!(taken(&log).is_empty(), "once");
    assert!(!log.has_gaps(), "all of it was logged");
    streams.lock().expect("lock")[0]
        .shutdown(std::net::Shutdown::Both)
        .expect("shutdown");
    rig.wait(|s| s.reconnects == 1 && s.state == LinkState::Connected);
    assert_eq!(taken(&log), [64 + 5, 64 + 16, 64 + 23]);
    assert!(log.has_gaps(), "nobody knows what the first one wrote last");
    assert!(!log.has_gaps(), "once");
    rig.handle.stop_log();
    // The daemon hears of the end a moment later.
    let told = || rings.lock().expect("lock").clone();
    let late = Instant::now() + Duration::from_secs(10);
    while told().len() < 4 && Instant::now() < late {
        thread::sleep(Duration::from_millis(2));
    }
    // The used ring, too, while there is a log.
    assert_eq!(told(), [(0, 0), (1, 0x3000), (1, 0x3000), (0, 0)]);
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
    let rig = Rig::with(Box::new(twist), |_| {});
    rig.wait(|s| s.state == LinkState::Connected);
    let error = rig.log(None).map(|_| ()).expect_err("it cannot");
    assert!(error.to_string().contains("cannot log"), "{error}");
    assert_eq!(rig.handle.status().state, LinkState::Connected, "it goes on without");
}

/// A daemon that marks a page when it is to log, and rings; it is told of the event so often, and does `this` then.
fn ringing(
    told: &Arc<AtomicUsize>,
    this: impl Fn(&mut Conversation, &Received) -> bool + Send + Sync + 'static,
) -> Box<super::direct::Twist> {
    let (serve, told) = (direct(|_| {}), told.clone());
    Box::new(move |talk, received| {
        let is = |request: Request| received.request == request as u32;
        if is(Request::SET_LOG_FD) {
            told.fetch_add(1, SeqCst);
            assert_eq!((received.payload.len(), received.fds.len()), (0, 1));
            return this(talk, received);
        }
        if is(Request::SET_FEATURES) && number(received, 0) & LOG_ALL != 0 {
            let log = talk.log.as_ref().expect("a log");
            log.write_all_at(&[1], 0).expect("mark");
            if let Some(event) = &talk.log_event {
                rustix::io::write(event, &1u64.to_ne_bytes()).expect("ring");
            }
        }
        serve(talk, received)
    })
}

/// Has a daemon log that is [`ringing`], with an event, which is given back with the log.
fn logged(
    told: &Arc<AtomicUsize>,
    this: impl Fn(&mut Conversation, &Received) -> bool + Send + Sync + 'static,
) -> (Rig, Event, Arc<PageLog>) {
    let rig = Rig::with(ringing(told, this), |_| {});
    rig.wait(|s| s.state == LinkState::Connected);
    let event = Event::new().expect("an event");
    let log = rig.log(Some(event.clone())).expect("it can");
    (rig, event, log)
}

#[test]
fn a_daemon_rings_when_it_marked_pages() {
    let told = Arc::default();
    let (_rig, event, log) = logged(&told, |_, _| false);
    assert!(event.clear(), "rung");
    assert_eq!(taken(&log), [0]);
    assert_eq!(told.load(SeqCst), 1);
}

#[test]
fn one_that_does_not_ring_logs_all_the_same() {
    let told = Arc::default();
    let (rig, event, log) = logged(&told, |talk, received| {
        talk.reply(received.request, &1u64.encode());
        true
    });
    assert_eq!((taken(&log), event.clear()), (vec![0], false));
    assert_eq!(rig.handle.status().reconnects, 0);
}

#[test]
fn one_that_leaves_over_the_event_is_not_told_again() {
    let told = Arc::default();
    let (rig, _event, log) = logged(&told, |talk, _| {
        talk.stream.shutdown(std::net::Shutdown::Both).expect("shutdown");
        true
    });
    rig.wait(|s| s.reconnects == 1 && s.state == LinkState::Connected);
    assert_eq!(taken(&log), [0], "it logs");
    assert_eq!(told.load(SeqCst), 1);
}
