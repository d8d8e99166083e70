//! The guest goes to another process, or comes from one.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use triarch_device_core::{NoSandbox, Sandbox};
use triarch_vhost_protocol::{LOG_ALL, NEED_REPLY, Payload, Request};
use triarch_virtio::VirtioDevice;

use super::direct::{Rig, direct};
use super::fake::{Conversation, FakeDaemon, Received, SIZE, disk};
use crate::{LinkState, Offer, Peer};

/// A daemon that notes each status it is told, and refuses DRIVER_OK as long as `refuses`.
fn noting(told: &Arc<Mutex<Vec<u8>>>, refuses: &Arc<AtomicBool>) -> Box<super::direct::Twist> {
    let (serve, told, refuses) = (direct(|_| {}), told.clone(), refuses.clone());
    Box::new(move |talk: &mut Conversation, received: &Received| {
        if received.request == Request::SET_STATUS as u32 {
            assert_ne!(received.flags & NEED_REPLY, 0, "it has to know");
            let status = received.payload[0];
            told.lock().expect("lock").push(status);
            if status & 4 != 0 && refuses.load(SeqCst) {
                talk.reply(received.request, &1u64.encode());
                return true;
            }
        }
        serve(talk, received)
    })
}

fn shown(rig: &Rig) -> Offer {
    rig.handle.shown()
}

#[test]
fn a_disk_is_let_go_and_taken_back() {
    let (told, refuses): (Arc<Mutex<Vec<u8>>>, _) = (Arc::default(), Arc::default());
    let mut rig = Rig::with(noting(&told, &refuses), |_| {});
    rig.wait(|s| s.state == LinkState::Connected && s.logs);
    rig.handle.check_movable().expect("it can log");
    // The status is told a moment after the connection.
    while told.lock().expect("lock").is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let queue = rig.device.stop_queue(0).expect("the queue");
    rig.handle.let_go().expect("it does");
    refuses.store(true, SeqCst);
    let error = rig.handle.take().expect_err("somebody has it").to_string();
    assert_eq!(error, "the daemon failed SET_STATUS");
    assert_eq!(rig.handle.status().reconnects, 0, "the connection stays");
    refuses.store(false, SeqCst);
    rig.handle.take().expect("it is free");
    rig.device.start_queue(queue).expect("start");
    rig.handle.announce();
    assert_eq!(*told.lock().expect("lock"), [15, 15, 11, 15, 15]);
}

#[test]
fn a_guest_that_comes_takes_nothing_before_it_is_told() {
    let (told, refuses): (Arc<Mutex<Vec<u8>>>, _) = (Arc::default(), Arc::default());
    let first = Rig::with(direct(|_| {}), |_| {});
    let rig = Rig::shown(noting(&told, &refuses), |_| {}, Some(shown(&first)));
    rig.wait(|s| s.state == LinkState::Connected);
    rig.handle.stop_log();
    assert_eq!(rig.device.features(), first.device.features());
    assert!(told.lock().expect("lock").is_empty());
    rig.handle.take().expect("it is free");
    assert_eq!(told.lock().expect("lock")[0], 15);
}

#[test]
fn what_a_guest_was_shown_must_be_there() {
    let first = Rig::with(direct(|_| {}), |_| {});
    let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
    let dir = tempfile::tempdir().expect("directory");
    let daemon = FakeDaemon::start(dir.path(), |_, _| false);
    let refusal = |offer: Offer| {
        let opened = Peer::open("_disk0", daemon.options(), disk(), Some(offer), &sandbox);
        let error = opened.err().expect("refused");
        std::error::Error::source(&error).expect("a reason").to_string()
    };
    let mut larger = shown(&first);
    larger.config[..8].copy_from_slice(&(SIZE / 512 + 1).to_le_bytes());
    assert!(refusal(larger).contains("the guest knows one of"));
    let mut more = shown(&first);
    more.features |= 1 << 13;
    assert!(refusal(more).contains("no longer offers VIRTIO_BLK_F_DISCARD"));
}

#[test]
fn a_driver_that_begins_anew_is_logged_as_well() {
    let logs: Arc<Mutex<Vec<bool>>> = Arc::default();
    let (serve, seen) = (direct(|_| {}), logs.clone());
    let twist = move |talk: &mut Conversation, received: &Received| {
        if received.request == Request::SET_FEATURES as u32 {
            let features = u64::from_le_bytes(received.payload[..8].try_into().expect("8 bytes"));
            seen.lock().expect("lock").push(features & LOG_ALL != 0);
        }
        serve(talk, received)
    };
    let mut rig = Rig::with(Box::new(twist), |_| {});
    rig.wait(|s| s.state == LinkState::Connected);
    let log = rig.log(None).expect("it can");
    rig.device.stop_queue(0).expect("the queue");
    rig.device.reset();
    rig.device.activate(rig.driver.context(0)).expect("activate");
    rig.device.start_queue(rig.driver.queue()).expect("start");
    rig.handle.let_go().expect("heard");
    assert!(!log.has_gaps(), "nothing was lost");
    assert_eq!(*logs.lock().expect("lock"), [false, true, true]);
}
