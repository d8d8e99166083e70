//! A daemon's state is saved and loaded.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use triarch_vhost_protocol::{Payload, REPLY, Reader, Request, StateAnswer, StateTransfer, message, protocol};
use triarch_virtio::VirtioDevice;

use super::direct::{Rig, direct};
use super::fake::{Conversation, Received};
use crate::{LinkError, LinkState, StateError, StateLimits};

/// What the daemon does with the channel it is given: it answers, and moves bytes on a thread of its own.
type Act = dyn Fn(&mut Conversation, File) + Send + Sync;

/// A state that is larger than a pipe.
fn state() -> Vec<u8> {
    (0..300_000u32).map(|n| (n / 251 + n) as u8).collect()
}

fn limits() -> StateLimits {
    StateLimits {
        bytes: 1 << 20,
        stall: Duration::from_secs(5),
        total: Duration::from_secs(5),
    }
}

/// A daemon that was asked for its state, and one queue that has stopped. The daemon's verdict is `verdict`.
fn rig(direction: u32, verdict: u64, act: impl Fn(&mut Conversation, File) + Send + Sync + 'static) -> Rig {
    let act: Box<Act> = Box::new(act);
    let serve = direct(|_| {});
    let twist = move |talk: &mut Conversation, received: &Received| {
        let is = |request: Request| received.request == request as u32;
        if is(Request::GET_PROTOCOL_FEATURES) {
            let offered = protocol::COMMON & !protocol::CONFIGURE_MEM_SLOTS | protocol::DEVICE_STATE;
            talk.reply(received.request, &offered.encode());
        } else if is(Request::SET_DEVICE_STATE_FD) {
            let asked = StateTransfer::read(&mut Reader::new(&received.payload));
            let stopped = StateTransfer {
                direction,
                phase: StateTransfer::STOPPED,
            };
            assert_eq!((asked, received.fds.len()), (Some(stopped), 1));
            act(talk, received.fds[0].try_clone().expect("a descriptor").into());
        } else if is(Request::CHECK_DEVICE_STATE) {
            assert!(received.payload.is_empty() && received.fds.is_empty());
            talk.reply(received.request, &verdict.encode());
        } else {
            return serve(talk, received);
        }
        true
    };
    let mut rig = Rig::with(Box::new(twist), |_| {});
    rig.wait(|s| s.state == LinkState::Connected);
    rig.device.stop_queue(0).expect("the queue");
    rig
}

fn saving(verdict: u64, act: impl Fn(&mut Conversation, File) + Send + Sync + 'static) -> Rig {
    rig(StateTransfer::SAVE, verdict, act)
}

fn loading(verdict: u64, act: impl Fn(&mut Conversation, File) + Send + Sync + 'static) -> Rig {
    rig(StateTransfer::LOAD, verdict, act)
}

/// It takes what it was given.
fn accept(talk: &mut Conversation) {
    let answer = StateAnswer { error: 0, none: true };
    talk.reply(Request::SET_DEVICE_STATE_FD as u32, &answer.encode());
}

/// It has another channel.
fn offer(talk: &mut Conversation, end: impl Into<OwnedFd>) {
    let answer = StateAnswer { error: 0, none: false };
    let bytes = message(Request::SET_DEVICE_STATE_FD as u32, REPLY, &answer.encode());
    talk.send_fds(&bytes, &[end.into().as_fd()]);
}

fn send(mut file: impl Write + Send + 'static) {
    thread::spawn(move || file.write_all(&state()));
}

/// What a daemon was given, in the end.
#[derive(Clone, Default)]
struct Loaded(Arc<Mutex<Option<Vec<u8>>>>);

impl Loaded {
    fn take_from(&self, mut file: impl Read + Send + 'static) {
        let loaded = self.0.clone();
        thread::spawn(move || {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).expect("read");
            *loaded.lock().expect("lock") = Some(bytes);
        });
    }

    /// Waits for the end.
    fn wait(&self) -> Vec<u8> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            if let Some(bytes) = self.0.lock().expect("lock").take() {
                return bytes;
            }
            assert!(Instant::now() < deadline, "it has not seen the end");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The connection was given up, for this reason, and there is another one.
fn is_back(rig: &Rig, why: &str) {
    let status = rig.wait(|s| s.reconnects == 1 && s.state == LinkState::Connected);
    let reason = status.reason.expect("a reason");
    assert!(reason.contains(why), "{reason}");
}

/// It was not: the device goes on with the daemon it had.
fn goes_on(rig: &Rig) {
    let status = rig.handle.status();
    assert_eq!(
        (status.state, status.reconnects),
        (LinkState::Connected, 0),
        "{status:?}"
    );
}

#[test]
fn a_state_is_saved_whole() {
    let mut rig = saving(0, |talk, file| {
        accept(talk);
        send(file);
    });
    for _ in 0..2 {
        let mut saved = Vec::new();
        assert_eq!(rig.device.save_state(&mut saved, &limits()).expect("saved"), 300_000);
        assert!(saved == state(), "it is another one");
    }
    goes_on(&rig);
}

#[test]
fn a_state_is_loaded_whole() {
    let loaded = Loaded::default();
    let taken = loaded.clone();
    let mut rig = loading(0, move |talk, file| {
        accept(talk);
        taken.take_from(file);
    });
    for _ in 0..2 {
        let bytes = rig.device.load_state(&mut &state()[..], &limits()).expect("loaded");
        assert_eq!(bytes, 300_000);
        assert!(loaded.wait() == state(), "it is another one");
    }
    goes_on(&rig);
}

#[test]
fn an_empty_state_is_one() {
    let mut rig = saving(0, |talk, _| accept(talk));
    assert_eq!(rig.device.save_state(&mut Vec::new(), &limits()).expect("saved"), 0);
}

#[test]
fn a_daemon_may_bring_its_own_channel() {
    let mut rig = saving(0, |talk, _| {
        let (theirs, ours) = io::pipe().expect("pipe");
        offer(talk, theirs);
        send(ours);
    });
    let mut saved = Vec::new();
    rig.device.save_state(&mut saved, &limits()).expect("saved by a pipe");
    assert!(saved == state());
    let mut rig = saving(0, |talk, _| {
        let (theirs, ours) = UnixStream::pair().expect("sockets");
        offer(talk, theirs);
        send(ours);
    });
    saved.clear();
    rig.device.save_state(&mut saved, &limits()).expect("saved by a socket");
    assert!(saved == state());
    let (loaded, kept) = (Loaded::default(), Arc::new(Mutex::new(Vec::new())));
    let (taken, keep) = (loaded.clone(), kept.clone());
    let mut rig = loading(0, move |talk, _| {
        let (theirs, ours) = UnixStream::pair().expect("sockets");
        // The end shows all the same.
        keep.lock().expect("lock").push(theirs.try_clone().expect("a socket"));
        offer(talk, theirs);
        taken.take_from(ours);
    });
    rig.device
        .load_state(&mut &state()[..], &limits())
        .expect("loaded by a socket");
    assert!(loaded.wait() == state());
    let taken = loaded.clone();
    let mut rig = loading(0, move |talk, _| {
        let (ours, theirs) = io::pipe().expect("pipe");
        offer(talk, theirs);
        taken.take_from(ours);
    });
    rig.device
        .load_state(&mut &state()[..], &limits())
        .expect("loaded by a pipe");
    assert!(loaded.wait() == state());
}

#[test]
fn what_a_daemon_does_with_its_own_channel_makes_nobody_wait() {
    let brief = StateLimits {
        stall: Duration::from_millis(100),
        ..limits()
    };
    // Nobody writes, and a read would wait; nobody reads, and a write would.
    let kept: Arc<Mutex<Vec<OwnedFd>>> = Arc::default();
    for socket in [false, true] {
        let keep = kept.clone();
        let ends = move |save: bool| -> (OwnedFd, OwnedFd) {
            let (a, b) = match socket {
                true => UnixStream::pair().map(|(a, b)| (a.into(), b.into())).expect("sockets"),
                false => io::pipe().map(|(a, b)| (a.into(), b.into())).expect("pipe"),
            };
            if save { (a, b) } else { (b, a) }
        };
        let mut rig = saving(0, move |talk, _| {
            let (theirs, ours) = ends(true);
            keep.lock().expect("lock").push(ours);
            offer(talk, theirs);
        });
        let error = rig
            .device
            .save_state(&mut Vec::new(), &brief)
            .expect_err("nothing comes");
        assert!(matches!(error, StateError::Stalled(_)), "{error}");
        is_back(&rig, "has not gone on with its state for 100 ms");
        let keep = kept.clone();
        let mut rig = loading(0, move |talk, _| {
            let (theirs, ours) = ends(false);
            keep.lock().expect("lock").push(ours);
            offer(talk, theirs);
        });
        let error = rig.device.load_state(&mut &state()[..], &brief).expect_err("full");
        assert!(matches!(error, StateError::Stalled(_)), "{error}");
        is_back(&rig, "has not gone on with its state for 100 ms");
    }
}

#[test]
fn a_channel_that_could_be_anything_is_not_used() {
    let mut rig = saving(0, |talk, _| offer(talk, File::open("/dev/zero").expect("/dev/zero")));
    let error = rig.device.save_state(&mut Vec::new(), &limits()).expect_err("refused");
    assert!(error.to_string().contains("neither a pipe nor a socket"), "{error}");
    is_back(&rig, "neither a pipe nor a socket");
}

#[test]
fn a_refusal_is_named_and_harms_nothing() {
    let mut rig = saving(0, |talk, _| {
        let answer = StateAnswer { error: 1, none: true };
        talk.reply(Request::SET_DEVICE_STATE_FD as u32, &answer.encode());
    });
    let error = rig.device.save_state(&mut Vec::new(), &limits()).expect_err("refused");
    assert_eq!(error.to_string(), "the daemon refused to transfer its state");
    goes_on(&rig);
    let loaded = Loaded::default();
    let mut rig = loading(7, move |talk, file| {
        accept(talk);
        loaded.take_from(file);
    });
    let error = rig
        .device
        .load_state(&mut &b"not its own"[..], &limits())
        .expect_err("failed");
    assert_eq!(error.to_string(), "the daemon failed to transfer its state");
    goes_on(&rig);
}

#[test]
fn nonsense_costs_the_connection() {
    let refused = |act: fn(&mut Conversation, File)| {
        let mut rig = saving(0, act);
        let error = rig.device.save_state(&mut Vec::new(), &limits()).expect_err("nonsense");
        assert!(matches!(error, StateError::Link(LinkError::Nonsense(_))), "{error}");
        is_back(&rig, "does not keep to the protocol");
        error.to_string()
    };
    assert!(refused(|talk, _| talk.reply(42, &[0; 7])).contains("has 7 bytes, not 8"));
    // It has no descriptor with it, and says that it has one; and the other way round.
    assert!(refused(|talk, _| talk.reply(42, &[0; 8])).contains("contradict"));
    assert!(refused(|talk, _| talk.send_with(&message(42, REPLY, &0x100u64.encode()), 1)).contains("contradict"));
    assert!(refused(|talk, _| talk.send_with(&message(42, REPLY, &1u64.encode()), 1)).contains("contradict"));
    assert!(refused(|talk, _| talk.send_with(&message(42, REPLY, &[0; 8]), 2)).contains("has 2 descriptors"));
    assert!(refused(|talk, _| talk.reply(43, &[0; 8])).contains("it answered message 43"));
}

#[test]
fn no_more_is_taken_than_may_be() {
    let written = Arc::new(AtomicUsize::new(0));
    let count = written.clone();
    let mut rig = saving(1, move |talk, mut file| {
        accept(talk);
        let count = count.clone();
        thread::spawn(move || {
            while file.write_all(&[1; 4096]).is_ok() {
                count.fetch_add(4096, SeqCst);
            }
            count.fetch_or(1, SeqCst);
        });
    });
    let mut saved = Vec::new();
    let error = rig.device.save_state(&mut saved, &limits()).expect_err("endless");
    assert_eq!(error.to_string(), "the daemon's state has more than 1048576 bytes");
    assert!(saved.len() <= 1 << 20, "{}", saved.len());
    // It hears of it, and serves on.
    let deadline = Instant::now() + Duration::from_secs(5);
    while written.load(SeqCst) & 1 == 0 {
        assert!(Instant::now() < deadline, "it still writes");
        thread::sleep(Duration::from_millis(1));
    }
    goes_on(&rig);
}

#[test]
fn one_that_stalls_or_trickles_is_given_up() {
    let kept: Arc<Mutex<Vec<File>>> = Arc::default();
    let keep = kept.clone();
    let mut rig = saving(0, move |talk, file| {
        accept(talk);
        keep.lock().expect("lock").push(file);
    });
    let brief = StateLimits {
        stall: Duration::from_millis(100),
        ..limits()
    };
    let error = rig.device.save_state(&mut Vec::new(), &brief).expect_err("silent");
    assert_eq!(
        error.to_string(),
        "the daemon has not gone on with its state for 100 ms"
    );
    is_back(&rig, "has not gone on");
    let mut rig = saving(0, |talk, mut file| {
        accept(talk);
        thread::spawn(move || {
            while file.write_all(&[1]).is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
    });
    let slow = StateLimits {
        total: Duration::from_millis(300),
        ..limits()
    };
    let asked = Instant::now();
    let error = rig.device.save_state(&mut Vec::new(), &slow).expect_err("slow");
    assert_eq!(error.to_string(), "the daemon's state took longer than 300 ms");
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    is_back(&rig, "took longer");
}

#[test]
fn one_that_dies_in_the_middle_has_no_state() {
    /// Takes bytes, and ends the daemon that sent them.
    struct Ends(Vec<u8>, Arc<Mutex<Vec<(UnixStream, File)>>>);
    impl Write for Ends {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.extend(bytes);
            for (stream, _) in self.1.lock().expect("lock").drain(..) {
                stream.shutdown(std::net::Shutdown::Both)?;
            }
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let kept: Arc<Mutex<Vec<(UnixStream, File)>>> = Arc::default();
    let keep = kept.clone();
    let mut rig = saving(0, move |talk, mut file| {
        file.write_all(&[1; 1000]).expect("a part");
        let stream = talk.stream.try_clone().expect("a stream");
        keep.lock().expect("lock").push((stream, file));
        accept(talk);
    });
    let mut saved = Ends(Vec::new(), kept);
    let error = rig.device.save_state(&mut saved, &limits()).expect_err("a part");
    let lost = matches!(error, StateError::Lost | StateError::Link(LinkError::Closed));
    assert!(lost, "{error}");
    assert_eq!(saved.0.len(), 1000);
    is_back(&rig, "closed the connection");
}

#[test]
fn one_with_half_a_state_is_given_up() {
    /// What breaks after some bytes.
    struct Breaks(usize);
    impl Read for Breaks {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match std::mem::take(&mut self.0) {
                0 => Err(io::Error::other("it is gone")),
                n => {
                    buffer[..n].fill(1);
                    Ok(n)
                }
            }
        }
    }
    let loaded = Loaded::default();
    let mut rig = loading(0, move |talk, file| {
        accept(talk);
        loaded.take_from(file);
    });
    let error = rig.device.load_state(&mut Breaks(100), &limits()).expect_err("a part");
    assert_eq!(error.to_string(), "cannot fetch the daemon's state: it is gone");
    is_back(&rig, "it is gone");
    // The daemon reads no further.
    let mut rig = loading(0, |talk, _| accept(talk));
    let error = rig.device.load_state(&mut &state()[..], &limits()).expect_err("closed");
    assert!(matches!(error, StateError::Channel(_)), "{error}");
    is_back(&rig, "cannot be transferred");
}

#[test]
fn where_it_cannot_be_stored_the_device_goes_on() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut rig = saving(1, |talk, file| {
        accept(talk);
        send(file);
    });
    let error = rig.device.save_state(&mut Full, &limits()).expect_err("full");
    assert!(error.to_string().contains("cannot store the daemon's state"), "{error}");
    goes_on(&rig);
}

#[test]
fn it_is_not_asked_for_what_cannot_be() {
    let serve = direct(|_| {});
    let twist = move |talk: &mut Conversation, received: &Received| {
        assert_ne!(received.request, Request::SET_DEVICE_STATE_FD as u32);
        serve(talk, received)
    };
    let mut rig = Rig::with(Box::new(twist), |_| {});
    rig.wait(|s| s.state == LinkState::Connected);
    let save = |rig: &mut Rig| {
        rig.device
            .save_state(&mut Vec::new(), &limits())
            .expect_err("it cannot be")
    };
    assert!(matches!(save(&mut rig), StateError::Running));
    rig.device.stop_queue(0).expect("the queue");
    assert!(matches!(save(&mut rig), StateError::Unable));
    goes_on(&rig);
}
