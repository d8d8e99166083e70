//! The thread of the plane, and how others reach it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::thread::JoinHandle;

use thiserror::Error;
use triarch_device_core::{Sandbox, ThreadClass};
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{EVENTS, MAILBOX, Plane, PlaneOptions, TIMER};

type Errand = Box<dyn FnOnce(&mut Plane) + Send>;

/// The plane has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the switch has ended")]
pub struct PlaneGone;

/// A way to the plane, for any thread.
#[derive(Clone)]
pub struct PlaneHandle {
    errands: Sender<Option<Errand>>,
    wake: Arc<EventFd>,
}

impl PlaneHandle {
    /// Starts the plane on a thread of its own.
    pub fn start(options: PlaneOptions, sandbox: &Arc<dyn Sandbox>) -> io::Result<(Self, JoinHandle<()>)> {
        let (errands, inbox) = channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let mut plane = Plane::new(&options)?;
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, MAILBOX);
        plane.epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
        let confine = sandbox.clone();
        // A descriptor that its last owner closes says nothing any more, not even what was said before.
        let open = wake.clone();
        let body = move || {
            if let Err(error) = confine.enter(ThreadClass::Switch) {
                tracing::error!("cannot confine the switch: {error}");
                std::process::abort();
            }
            run(&mut plane, &inbox);
            drop(open);
        };
        let thread = sandbox.spawn("switch".to_owned(), Box::new(body))?;
        Ok((Self { errands, wake }, thread))
    }

    /// Has `errand` done on the thread of the plane, between two packets, and waits for it.
    pub fn call<T: Send + 'static>(
        &self,
        errand: impl FnOnce(&mut Plane) -> T + Send + 'static,
    ) -> Result<T, PlaneGone> {
        let (reply, answer) = sync_channel(1);
        let errand = Box::new(move |plane: &mut Plane| {
            // The one who asked waits.
            let _ = reply.send(errand(plane));
        });
        self.errands.send(Some(errand)).map_err(|_| PlaneGone)?;
        self.ring();
        answer.recv().map_err(|_| PlaneGone)
    }

    /// Ends the plane.
    pub fn end(&self) {
        if self.errands.send(None).is_ok() {
            self.ring();
        }
    }

    fn ring(&self) {
        // A counter that is full wakes as well.
        let _ = self.wake.write(1);
    }
}

fn run(plane: &mut Plane, inbox: &Receiver<Option<Errand>>) {
    let mut events = [EpollEvent::default(); EVENTS];
    loop {
        let timeout = if plane.ready.is_empty() { -1 } else { 0 };
        let count = match plane.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                tracing::error!("the switch cannot wait for events: {error}");
                std::process::abort();
            }
        };
        for event in &events[..count] {
            match event.data() {
                MAILBOX => {
                    for errand in inbox.try_iter() {
                        match errand {
                            Some(errand) => errand(plane),
                            None => return,
                        }
                    }
                }
                TIMER => plane.alarm = None,
                source => plane.make_ready(source),
            }
        }
        plane.turn();
    }
}
