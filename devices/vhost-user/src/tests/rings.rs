//! What a daemon can do with rings, and what comes after it.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use triarch_device_core::{NoSandbox, Sandbox};
use triarch_vhost_protocol::{BACKEND_CONFIG_CHANGE_MSG, Payload, Request, message};
use triarch_virtio::VirtioDevice;
use triarch_virtio::mock::{Desc, FakeDriver};

use super::fake::{Conversation, FakeDaemon, Received, disk};
use crate::{LinkState, Peer, VhostUser, VhostUserHandle};

/// A driver with its device.
struct Rig {
    driver: FakeDriver,
    device: VhostUser,
    handle: VhostUserHandle,
    notified: Arc<AtomicUsize>,
    // Last: the others talk to it until they end.
    _daemon: FakeDaemon,
    _dir: tempfile::TempDir,
}

impl Rig {
    /// A running queue. `enabled` is called when the daemon was given it.
    fn new(enabled: impl Fn(&mut Conversation) + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let daemon = FakeDaemon::start(dir.path(), move |talk: &mut Conversation, received: &Received| {
            if received.request != Request::SET_VRING_ENABLE as u32 {
                return false;
            }
            talk.enabled = true;
            talk.reply(received.request, &0u64.encode());
            enabled(talk);
            true
        });
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let peer = Peer::open("_disk0", daemon.options(), disk(), None, &sandbox).expect("a daemon");
        let notified = Arc::new(AtomicUsize::new(0));
        let count = notified.clone();
        let notify = Arc::new(move |_: &crate::LinkStatus| {
            count.fetch_add(1, SeqCst);
        });
        let mut device = VhostUser::new("_disk0", peer, &sandbox, notify).expect("a device");
        let driver = FakeDriver::sharing(64, true);
        device.activate(driver.context(0)).expect("activate");
        device.start_queue(driver.queue()).expect("start");
        Self {
            handle: device.handle(),
            driver,
            device,
            notified,
            _daemon: daemon,
            _dir: dir,
        }
    }

    /// Offers a request with a status byte.
    fn offer(&mut self, n: u64) -> u16 {
        let at = 0x8000 + 0x100 * n;
        let head = self.driver.add(&[Desc::readable(at, 16), Desc::writable(at + 0x40, 1)]);
        self.driver.kick();
        head
    }

    /// Waits until the device stands so with its daemon, and tells why.
    fn wait(&self, wanted: impl Fn(&crate::LinkStatus) -> bool) -> crate::LinkStatus {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let status = self.handle.status();
            if wanted(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "{status:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Completes the first `count` requests as they come.
fn complete(talk: &Conversation, count: u16) {
    talk.wait_offered(count);
    for n in 0..count {
        talk.put_used(n, talk.head(n).into());
    }
    talk.set_used(count);
}

/// The first daemon does this with the first request; the second one gets it again, and completes it.
fn misbehaves(first: impl Fn(&mut Conversation) + Send + Sync + 'static) -> String {
    let mut rig = Rig::new(move |talk| {
        talk.wait_offered(1);
        match talk.number {
            0 => first(talk),
            _ => complete(talk, 1),
        }
    });
    let head = rig.offer(0);
    assert_eq!(rig.driver.wait_used(), Some((head, 1)), "{:?}", rig.handle.status());
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.driver.used(), None, "completed twice");
    let status = rig.wait(|status| status.state == LinkState::Connected && status.reconnects > 0);
    assert_eq!((status.reconnects, status.resubmitted), (1, 1));
    assert!(rig.notified.load(SeqCst) >= 3, "connected, lost, connected");
    assert_eq!(rig.driver.interrupt.needs_reset_count(), 0);
    rig.device.stop_queue(0).expect("the queue");
    rig.device.reset();
    status.reason.unwrap_or_default()
}

#[test]
fn requests_without_an_answer_go_to_the_next_daemon_once() {
    let reason = misbehaves(|talk| talk.stream.shutdown(std::net::Shutdown::Both).expect("shutdown"));
    assert_eq!(reason, "the daemon closed the connection");
}

#[test]
fn completions_of_nothing_cost_the_connection_only() {
    assert!(misbehaves(|talk| talk.set_used(5)).contains("completed 5 requests of 1"));
    assert!(
        misbehaves(|talk| {
            talk.put_used(0, 63);
            talk.set_used(1);
        })
        .contains("completed request 63, which it does not have")
    );
    assert!(
        misbehaves(|talk| {
            talk.put_used(0, u32::MAX);
            talk.set_used(1);
        })
        .contains("completed request 4294967295")
    );
}

#[test]
fn messages_nobody_asked_for_cost_the_connection_only() {
    // Whether it comes while another answer is waited for or later, it is noticed.
    assert!(misbehaves(|talk| talk.reply(1, &[0; 8])).contains("does not keep to the protocol"));
    let back = |bytes: Vec<u8>| {
        misbehaves(move |talk| {
            let channel = talk.back.as_ref().expect("a channel");
            rustix::io::write(channel, &bytes).expect("write");
        })
    };
    assert!(back(vec![0; 5]).contains("5 bytes of a request"));
    let mut large = message(BACKEND_CONFIG_CHANGE_MSG, 0, &[]);
    large[8] = 200;
    assert!(back(large).contains("request 2 has the flags 0x1 and 200 bytes"));
}

#[test]
fn nobody_can_cut_the_memory_short() {
    let mut rig = Rig::new(|talk| {
        for file in &talk.files {
            assert!(file.set_len(0).is_err(), "cut short");
        }
        complete(talk, 1);
    });
    let head = rig.offer(0);
    assert_eq!(rig.driver.wait_used(), Some((head, 1)));
}

#[test]
fn what_was_completed_is_not_done_again_and_the_rest_keeps_its_order() {
    let mut rig = Rig::new(|talk| match talk.number {
        0 => {
            talk.wait_offered(4);
            // The second and the fourth, in the other order.
            talk.put_used(0, talk.head(3).into());
            talk.put_used(1, talk.head(1).into());
            talk.set_used(2);
            talk.stream.shutdown(std::net::Shutdown::Both).expect("shutdown");
        }
        _ => {
            talk.wait_offered(2);
            assert_eq!(talk.offered(), 2);
            assert_eq!([talk.head(0), talk.head(1)], [0, 4]);
            complete(talk, 2);
        }
    });
    let heads: Vec<u16> = (0..4).map(|n| rig.offer(n)).collect();
    assert_eq!(heads, [0, 2, 4, 6]);
    let used: Vec<u16> = (0..4).map(|_| rig.driver.wait_used().expect("used").0).collect();
    assert_eq!(used, [6, 2, 0, 4]);
    assert_eq!(rig.wait(|s| s.reconnects == 1).resubmitted, 2);
}

#[test]
fn a_queue_that_stops_without_a_daemon_keeps_its_requests() {
    let (stopped, is_stopped) = channel();
    let is_stopped = Mutex::new(is_stopped);
    let mut rig = Rig::new(move |talk| match talk.number {
        0 => {
            talk.wait_offered(2);
            talk.stream.shutdown(std::net::Shutdown::Both).expect("shutdown");
            // Nobody answers the next connection before that.
            let stopped = is_stopped.lock().expect("lock").recv_timeout(Duration::from_secs(5));
            stopped.expect("the queue does not stop");
        }
        _ => complete(talk, 2),
    });
    let heads = [rig.offer(0), rig.offer(1)];
    rig.wait(|status| status.state == LinkState::Disconnected);
    let queue = rig.device.stop_queue(0).expect("the queue");
    stopped.send(()).expect("the daemon waits");
    rig.wait(|status| status.state == LinkState::Connected);
    assert_eq!(rig.driver.used(), None);
    rig.device.start_queue(queue).expect("start");
    for head in heads {
        assert_eq!(rig.driver.wait_used(), Some((head, 1)));
    }
    // A queue that was reset meanwhile begins anew.
    rig.device.stop_queue(0).expect("the queue");
}

#[test]
fn an_order_that_comes_while_a_daemon_is_asked_is_carried_out() {
    let dir = tempfile::tempdir().expect("directory");
    let (asking, is_asked) = channel();
    let asking = Mutex::new(asking);
    let connections = Arc::new(AtomicUsize::new(0));
    let count = connections.clone();
    let daemon = FakeDaemon::start(dir.path(), move |talk: &mut Conversation, received: &Received| {
        count.fetch_max(talk.number + 1, SeqCst);
        if received.request == Request::SET_STATUS as u32 {
            // The last question of all; whoever orders something now finds the device's thread waiting for the answer.
            asking.lock().expect("lock").send(()).expect("the test listens");
            std::thread::sleep(Duration::from_millis(50));
        }
        false
    });
    let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
    let peer = Peer::open("_disk0", daemon.options(), disk(), None, &sandbox).expect("a daemon");
    let mut device = VhostUser::new("_disk0", peer, &sandbox, Arc::new(|_: &crate::LinkStatus| {})).expect("a device");
    let driver = FakeDriver::sharing(64, true);
    device.activate(driver.context(0)).expect("activate");
    device.start_queue(driver.queue()).expect("start");
    is_asked.recv_timeout(Duration::from_secs(5)).expect("a question");
    let (stopped, is_stopped) = channel();
    std::thread::spawn(move || {
        let queue = device.stop_queue(0);
        device.reset();
        stopped.send(queue.is_some())
    });
    assert_eq!(is_stopped.recv_timeout(Duration::from_secs(3)), Ok(true));
    assert_eq!(
        connections.load(SeqCst),
        1,
        "the daemon was not given the time for an answer"
    );
}
