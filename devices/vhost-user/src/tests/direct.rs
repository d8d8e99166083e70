//! A daemon that works on the guest's rings, and what comes after it.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use triarch_device_core::{Event, NoSandbox, Sandbox};
use triarch_vhost_protocol::{Payload, REPLY, Request, message};
use triarch_virtio::mock::{Desc, FakeDriver};
use triarch_virtio::{VirtioDevice, feature};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::fake::{Conversation, FakeDaemon, RECORD, Received, disk, shape};
use crate::{
    DataPath, LinkError, LinkState, LinkStatus, Offer, OnDisconnect, PageLog, Peer, PeerOptions, VhostUser,
    VhostUserHandle,
};

pub struct Rig {
    pub driver: FakeDriver,
    pub device: VhostUser,
    pub handle: VhostUserHandle,
    _daemon: FakeDaemon,
    _dir: tempfile::TempDir,
}

/// What is done to a message, before the usual answer.
pub type Twist = dyn Fn(&mut Conversation, &Received) -> bool + Send + Sync;

impl Rig {
    pub fn with(twist: Box<Twist>, edit: impl Fn(&mut PeerOptions)) -> Self {
        Self::shown(twist, edit, None)
    }

    /// The same of a guest that was shown another daemon.
    pub fn shown(twist: Box<Twist>, edit: impl Fn(&mut PeerOptions), shown: Option<Offer>) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let daemon = FakeDaemon::start(dir.path(), move |talk, received| twist(talk, received));
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let mut options = daemon.options();
        edit(&mut options);
        let peer = Peer::open("_disk0", options, disk(), shown, &sandbox).expect("a daemon");
        let mut device = VhostUser::new("_disk0", peer, &sandbox, Arc::new(|_: &LinkStatus| {})).expect("a device");
        let driver = FakeDriver::sharing(64, true);
        device.activate(driver.context(0)).expect("activate");
        device.start_queue(driver.queue()).expect("start");
        Self {
            handle: device.handle(),
            driver,
            device,
            _daemon: daemon,
            _dir: dir,
        }
    }

    /// A daemon that keeps a record. `enabled` is called when it was given the queue.
    fn new(enabled: impl Fn(&mut Conversation) + Send + Sync + 'static) -> Self {
        Self::with(direct(enabled), |_| {})
    }

    /// Has daemons log what they write.
    pub fn log(&self, written: Option<Event>) -> Result<Arc<PageLog>, LinkError> {
        let log = Arc::new(PageLog::new(&self.driver.context(0).memory.memory(), &[], written)?);
        self.handle.start_log(&log).map(|()| log)
    }

    fn offer(&mut self, n: u64) -> u16 {
        let at = 0x8000 + 0x100 * n;
        let head = self.driver.add(&[Desc::readable(at, 16), Desc::writable(at + 0x40, 1)]);
        self.driver.kick();
        head
    }

    pub fn wait(&self, wanted: impl Fn(&LinkStatus) -> bool) -> LinkStatus {
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

/// A daemon that keeps a record.
pub fn direct(enabled: impl Fn(&mut Conversation) + Send + Sync + 'static) -> Box<Twist> {
    Box::new(move |talk, received| talk.offer_record(received) || is_enabled(talk, received, &enabled))
}

/// Calls `enabled` when the daemon is given the queue.
fn is_enabled(talk: &mut Conversation, received: &Received, enabled: &impl Fn(&mut Conversation)) -> bool {
    if received.request != Request::SET_VRING_ENABLE as u32 {
        return false;
    }
    talk.reply(received.request, &0u64.encode());
    enabled(talk);
    true
}

/// Takes all requests of the ring from `from` to `to`, and completes them.
fn complete(talk: &mut Conversation, from: u16, to: u16) {
    talk.wait_offered(to);
    for n in from..to {
        talk.put_used(n, talk.head(n).into());
    }
    talk.taken = to;
    talk.set_used(to);
}

fn close(talk: &Conversation) {
    talk.stream.shutdown(std::net::Shutdown::Both).expect("shutdown");
}

#[test]
fn a_daemon_works_on_the_guests_rings() {
    let mut rig = Rig::new(|talk| {
        assert_ne!(talk.features & feature::EVENT_IDX, 0, "it needs to know");
        complete(talk, 0, 2);
    });
    let heads = [rig.offer(0), rig.offer(1)];
    for head in heads {
        assert_eq!(rig.driver.wait_used(), Some((head, 1)));
    }
    assert!(rig.wait(|status| status.state == LinkState::Connected).direct);
    // There is no event behind the interrupt here, so it comes from the device's thread.
    rig.wait(|_| rig.driver.interrupt.queue_count(0) > 0);
    let queue = rig.device.stop_queue(0).expect("the queue");
    assert_eq!((queue.state().next_avail, queue.state().next_used), (2, 2));
    rig.device.reset();
}

#[test]
fn interrupts_go_past_the_vmm() {
    let calls = Arc::new(AtomicU64::new(0));
    let seen = calls.clone();
    let mut rig = Rig::with(
        Box::new(move |talk, received| {
            let done = talk.offer_record(received);
            if received.request == Request::SET_VRING_CALL as u32 {
                seen.fetch_add(1, SeqCst);
            }
            done || is_enabled(talk, received, &|_| {})
        }),
        |_| {},
    );
    // One that the ring was announced with, and its own.
    rig.wait(|_| calls.load(SeqCst) == 2);
    let event = EventFd::new(EFD_NONBLOCK).expect("event");
    rig.driver
        .interrupt
        .set_event(Some(event.try_clone().expect("descriptor")));
    let before = rig.driver.interrupt.queue_count(0);
    rig.device.interrupts_changed();
    rig.wait(|_| calls.load(SeqCst) == 3);
    // One that was on its way is not lost.
    rig.wait(|_| rig.driver.interrupt.queue_count(0) > before);
}

#[test]
fn the_event_of_the_interrupt_is_the_daemons() {
    let mut rig = Rig::new(|talk| match talk.number {
        0 => close(talk),
        _ => complete(talk, 0, 1),
    });
    let event = EventFd::new(EFD_NONBLOCK).expect("event");
    rig.driver
        .interrupt
        .set_event(Some(event.try_clone().expect("descriptor")));
    rig.wait(|s| s.state == LinkState::Connected && s.reason.is_some());
    let head = rig.offer(0);
    assert_eq!(rig.driver.wait_used(), Some((head, 1)));
    let before = rig.driver.interrupt.queue_count(0);
    // The second daemon may have had the old one, when it was told of this.
    if event.read().is_err() {
        assert!(before > 1, "nobody was told");
    }
}

#[test]
fn the_next_daemon_gets_the_record_and_goes_on_behind_the_used_ring() {
    let mut rig = Rig::new(|talk| match talk.number {
        0 => {
            talk.wait_offered(4);
            (0..4).for_each(|n| talk.note(talk.head(n), n.into()));
            // The third overtakes, and was struck out; the first was completed and is not struck out yet.
            talk.put_used(0, talk.head(2).into());
            talk.set_used(1);
            talk.strike(talk.head(2), 1);
            close(talk);
        }
        _ => {
            assert_eq!(talk.base, 1, "as the used ring tells");
            assert_eq!(talk.noted(), [(0, 0), (2, 1), (6, 3)]);
            for (n, (head, _)) in (1..).zip(talk.noted()) {
                talk.put_used(n, head.into());
            }
            talk.set_used(4);
        }
    });
    let heads: Vec<u16> = (0..4).map(|n| rig.offer(n)).collect();
    assert_eq!(heads, [0, 2, 4, 6]);
    let used: Vec<u16> = (0..4).map(|_| rig.driver.wait_used().expect("used").0).collect();
    assert_eq!(used, [4, 0, 2, 6]);
    let status = rig.wait(|s| s.state == LinkState::Connected && s.reason.is_some());
    assert_eq!(status.resubmitted, 3);
    assert!(rig.driver.interrupt.wait_queue(0));
}

/// The first daemon leaves three requests in its record, the last of which came first.
fn leaves_three(talk: &mut Conversation) {
    talk.wait_offered(4);
    for (head, counter) in [(talk.head(3), 1), (talk.head(0), 2), (talk.head(2), 3)] {
        talk.note(head, counter);
    }
    talk.put_used(0, talk.head(1).into());
    talk.set_used(1);
    talk.strike(talk.head(1), 1);
    close(talk);
}

#[test]
fn what_it_left_is_known_while_the_next_one_hangs() {
    let asked = Arc::new(AtomicU64::new(0));
    let seen = asked.clone();
    let serve = direct(leaves_three);
    let twist = move |talk: &mut Conversation, received: &Received| {
        let hangs = talk.number > 0;
        if hangs {
            seen.fetch_add(1, SeqCst);
        }
        hangs || serve(talk, received)
    };
    let mut rig = Rig::with(Box::new(twist), |_| {});
    (0..4).for_each(|n| _ = rig.offer(n));
    rig.wait(|_| asked.load(SeqCst) == 1);
    rig.device.stop_queue(0).expect("the queue");
    // To stop it ended that try, and there is another.
    rig.wait(|_| asked.load(SeqCst) == 2);
    assert_eq!(rig.device.unanswered(0, 64).expect("a record"), [6, 0, 4]);
    let reason = rig.handle.status().reason.expect("the first is gone");
    assert!(!reason.contains("in time"), "{reason}");
}

#[test]
fn a_daemon_without_a_record_gets_them_through_the_relay() {
    let twist = |talk: &mut Conversation, received: &Received| {
        talk.number == 0 && talk.offer_record(received)
            || is_enabled(talk, received, &|talk| match talk.number {
                0 => leaves_three(talk),
                _ => {
                    assert_eq!(talk.features & feature::EVENT_IDX, 0, "the relay's rings have none");
                    talk.wait_offered(3);
                    assert_eq!([talk.head(0), talk.head(1), talk.head(2)], [6, 0, 4]);
                    complete(talk, 0, 3);
                }
            })
    };
    let mut rig = Rig::with(Box::new(twist), |_| {});
    (0..4).for_each(|n| _ = rig.offer(n));
    let used: Vec<u16> = (0..4).map(|_| rig.driver.wait_used().expect("used").0).collect();
    assert_eq!(used, [2, 6, 0, 4]);
    let status = rig.wait(|s| s.state == LinkState::Connected && s.reason.is_some());
    assert_eq!((status.resubmitted, status.direct), (3, false));
    assert_eq!(rig.driver.interrupt.needs_reset_count(), 0);
}

#[test]
fn a_record_of_garbage_costs_the_device_only() {
    let twist = |talk: &mut Conversation, received: &Received| {
        talk.number == 0 && talk.offer_record(received)
            || is_enabled(talk, received, &|talk| {
                if talk.number == 0 {
                    let record = talk.record.as_ref().expect("a record");
                    record.write_all_at(&[0xff; RECORD as usize], 0).expect("garbage");
                    assert!(record.set_len(0).is_err(), "cut short");
                    close(talk);
                }
            })
    };
    let mut rig = Rig::with(Box::new(twist), |_| {});
    rig.wait(|s| s.state == LinkState::Connected && s.reason.is_some());
    assert_eq!(rig.driver.interrupt.needs_reset_count(), 1);
    rig.device.stop_queue(0).expect("the queue");
    rig.device.reset();
}

#[test]
fn lies_about_the_record_cost_the_connection_only() {
    let refused = |twist: fn(&mut Conversation)| {
        let twist = move |talk: &mut Conversation, received: &Received| {
            let asked = received.request == Request::GET_INFLIGHT_FD as u32 && talk.number == 0;
            if asked {
                twist(talk);
            }
            asked || talk.offer_record(received) || is_enabled(talk, received, &|talk| complete(talk, 0, 1))
        };
        let mut rig = Rig::with(Box::new(twist), |_| {});
        let head = rig.offer(0);
        assert_eq!(rig.driver.wait_used(), Some((head, 1)), "the next daemon serves it");
        rig.handle.status().reason.expect("a reason")
    };
    assert!(refused(|talk| talk.send(&message(31, REPLY, &[0; 24]))).contains("has no memory"));
    assert!(refused(|talk| talk.reply(31, &[])).contains("has no memory"));
    assert!(
        refused(|talk| {
            let bytes = message(31, REPLY, &shape(1 << 30).encode());
            talk.send_with(&bytes, 1);
        })
        .contains("1073741824 bytes for 1 queues of 64")
    );
    assert!(
        refused(|talk| {
            let bytes = message(31, REPLY, &shape(RECORD).encode());
            talk.send_with(&bytes, 1);
        })
        .contains("is no memory")
    );
    assert!(
        refused(|talk| {
            let bytes = message(31, REPLY, &shape(RECORD).encode());
            talk.send_with(&bytes, 2);
        })
        .contains("2 descriptors")
    );
}

#[test]
fn requests_fail_after_a_time_with_those_that_were_in_flight() {
    let twist = |talk: &mut Conversation, received: &Received| {
        // Nobody answers a second time.
        if talk.number > 0 {
            close(talk);
            return true;
        }
        talk.offer_record(received) || is_enabled(talk, received, &|talk| leaves_three(talk))
    };
    let mut rig = Rig::with(Box::new(twist), |options| {
        options.on_disconnect = OnDisconnect::ErrorAfter(Duration::from_millis(100));
    });
    (0..4).for_each(|n| _ = rig.offer(n));
    rig.wait(|s| s.state == LinkState::Failing);
    let late = rig.offer(4);
    let used: Vec<u16> = (0..5).map(|_| rig.driver.wait_used().expect("used").0).collect();
    assert_eq!(used, [2, 6, 0, 4, late]);
    for n in [0, 2, 3, 4] {
        let status: u8 = rig
            .driver
            .ram()
            .read_obj(GuestAddress(0x8040 + 0x100 * n))
            .expect("status");
        assert_eq!(status, 1, "request {n}");
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.driver.used(), None, "completed twice");
}

#[test]
fn a_queue_that_stops_without_a_daemon_keeps_its_record() {
    let serve = direct(|talk| match talk.number {
        0 => leaves_three(talk),
        _ => {
            assert_eq!((talk.base, talk.noted().len()), (1, 3));
            for (n, (head, _)) in (1..).zip(talk.noted()) {
                talk.put_used(n, head.into());
                talk.strike(head, n + 1);
            }
            talk.taken = 4;
            talk.set_used(4);
        }
    });
    let twist = move |talk: &mut Conversation, received: &Received| {
        // Some time without a daemon.
        if (1..4).contains(&talk.number) {
            close(talk);
            return true;
        }
        serve(talk, received)
    };
    let mut rig = Rig::with(Box::new(twist), |_| {});
    (0..4).for_each(|n| _ = rig.offer(n));
    rig.wait(|s| s.state == LinkState::Disconnected && s.reason.is_some());
    let queue = rig.device.stop_queue(0).expect("the queue");
    assert_eq!((queue.state().next_avail, queue.state().next_used), (4, 1));
    rig.wait(|s| s.state == LinkState::Connected);
    rig.device.start_queue(queue).expect("start");
    let used: Vec<u16> = (0..4).map(|_| rig.driver.wait_used().expect("used").0).collect();
    assert_eq!(used, [2, 0, 4, 6]);
    let queue = rig.device.stop_queue(0).expect("the queue");
    assert_eq!((queue.state().next_avail, queue.state().next_used), (4, 4));
}

#[test]
fn a_new_driver_gets_a_new_record() {
    let mut rig = Rig::new(|talk| {
        assert_eq!(talk.noted(), []);
        if talk.offered() == 0 {
            talk.wait_offered(1);
            talk.note(talk.head(0), 1);
            talk.taken = 1;
        }
    });
    rig.offer(0);
    rig.wait(|s| s.state == LinkState::Connected);
    std::thread::sleep(Duration::from_millis(20));
    rig.device.stop_queue(0).expect("the queue");
    rig.device.reset();
    rig.device.activate(rig.driver.context(0)).expect("activate");
    rig.device.start_queue(rig.driver.queue()).expect("start");
    rig.wait(|s| s.state == LinkState::Connected);
    rig.device.stop_queue(0).expect("the queue");
    assert_eq!(rig.handle.status().reconnects, 0, "{:?}", rig.handle.status());
}

#[test]
fn a_broken_ring_is_not_handed_over() {
    let has_it = Arc::new(AtomicU64::new(0));
    let seen = has_it.clone();
    let mut rig = Rig::new(move |talk| {
        assert_eq!(talk.number, 0, "it got a ring that is broken");
        seen.store(1, SeqCst);
        talk.wait_offered(200);
        close(talk);
    });
    rig.wait(|_| has_it.load(SeqCst) == 1);
    rig.driver.set_avail_index(200);
    rig.driver.kick();
    rig.wait(|s| s.state == LinkState::Connected && s.reason.is_some());
    assert_eq!(rig.driver.interrupt.needs_reset_count(), 1);
    rig.device.stop_queue(0).expect("the queue");
    rig.device.reset();
}

#[test]
fn the_relay_can_be_asked_for_and_so_can_the_direct_way() {
    let mut rig = Rig::with(direct(|talk| complete(talk, 0, 1)), |options| {
        options.data_path = DataPath::Relay;
    });
    let head = rig.offer(0);
    assert_eq!(rig.driver.wait_used(), Some((head, 1)));
    assert!(!rig.wait(|s| s.state == LinkState::Connected).direct);
    let dir = tempfile::tempdir().expect("directory");
    let daemon = FakeDaemon::start(dir.path(), |_, _| false);
    let options = PeerOptions {
        data_path: DataPath::Direct,
        ..daemon.options()
    };
    let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
    let error = Peer::open("_disk0", options, disk(), None, &sandbox)
        .map(|_| ())
        .expect_err("refused");
    let why = std::error::Error::source(&error).expect("a cause").to_string();
    assert!(why.contains("INFLIGHT_SHMFD"), "{why}");
}
