//! Threads that devices run their work on, each confined to what its class of work needs.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What a thread does; the sandbox has one system call filter for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThreadClass {
    /// Device events, API requests and signals: the main thread.
    Control,
    /// Accepts and answers HTTP requests.
    Http,
    /// Writes events and audit lines for others.
    Report,
    /// Runs a vCPU and dispatches its exits.
    Vcpu,
    /// Serves one queue of a disk.
    Disk,
    /// Serves one queue pair of a network interface.
    Net,
    /// In a switch: moves packets between guests and interfaces of the host, packet sockets among them.
    Switch,
    /// Serves the sockets of a vsock device.
    Vsock,
    /// Talks to the daemon of a vhost-user device.
    VhostUser,
    /// In a daemon: accepts front ends and serves their requests, and starts the queues they describe.
    BackEnd,
    /// Gives guest memory back to the host, and takes it again: balloon, memory device.
    Memory,
    /// Moves a guest to another host, or takes it from there.
    Migration,
    /// Provides pages of guest memory that others wait for.
    Pager,
    /// Serves console, entropy and other small queues.
    Device,
}

/// Makes threads and confines them.
pub trait Sandbox: Send + Sync {
    /// Applies the filter of `class` to the calling thread, for good.
    fn enter(&self, class: ThreadClass) -> io::Result<()>;

    /// Starts a thread called `name` (the kernel shows its first 15 bytes) that is not confined like the caller: filters are
    /// inherited, and the thread of a device is often made while a vCPU handles a register.
    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        thread::Builder::new().name(name).spawn(body)
    }
}

/// A [`Sandbox`] that confines nothing: for tests and `--seccomp false`.
pub struct NoSandbox;

impl Sandbox for NoSandbox {
    fn enter(&self, _class: ThreadClass) -> io::Result<()> {
        Ok(())
    }
}

/// A thread that owns `T` while it runs and gives it back when stopped. `T` is kept when the thread ends by itself, and with it what others
/// have sent there: a channel whose senders wait for answers is to belong to the body, which is gone by then.
pub struct Worker<T> {
    thread: JoinHandle<()>,
    state: Receiver<T>,
    stop: EventFd,
}

impl<T: Send + 'static> Worker<T> {
    /// Runs `body` on a new thread called `name`. `body` must return soon after the descriptor it is given becomes readable; it
    /// should wait on it beside its own. If the sandbox cannot be entered the process aborts: an unconfined thread must not
    /// serve a guest.
    pub fn spawn<F>(name: &str, class: ThreadClass, sandbox: &Arc<dyn Sandbox>, state: T, body: F) -> io::Result<Self>
    where
        F: FnOnce(&mut T, &EventFd) + Send + 'static,
    {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let confine = sandbox.clone();
        let (give_back, returned) = sync_channel(1);
        let run = move || {
            let mut state = state;
            if let Err(error) = confine.enter(class) {
                tracing::error!("cannot confine a {class:?} thread: {error}");
                std::process::abort();
            }
            body(&mut state, &stopped);
            // Nobody receives only when the worker was dropped without being stopped.
            let _ = give_back.send(state);
        };
        let thread = sandbox.spawn(name.to_owned(), Box::new(run))?;
        Ok(Self {
            thread,
            state: returned,
            stop,
        })
    }

    /// Asks the thread to end, waits for it and takes its state back; `None` if it panicked.
    pub fn stop(self) -> Option<T> {
        // The counter cannot overflow: this is its only write.
        let _ = self.stop.write(1);
        let state = self.state.recv().ok();
        let _ = self.thread.join();
        state
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::SyncSender;

    use super::*;

    #[test]
    fn a_worker_gives_its_state_back() {
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let worker = Worker::spawn("_test", ThreadClass::Device, &sandbox, 1, |n, stop| {
            while stop.read().is_err() {
                thread::yield_now();
            }
            *n += 1;
        })
        .expect("spawn");
        assert_eq!(worker.stop(), Some(2));
    }

    #[test]
    fn whoever_waits_for_an_answer_waits_no_longer_than_the_body() {
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let (ask, asked) = sync_channel::<SyncSender<()>>(2);
        let worker = Worker::spawn("_test", ThreadClass::Device, &sandbox, 1, move |_, _| {
            // The first gets no answer, and the second comes too late.
            drop(asked.recv());
        });
        for _ in 0..2 {
            let (reply, answer) = sync_channel(1);
            let _ = ask.send(reply);
            assert!(answer.recv().is_err());
        }
        assert_eq!(worker.expect("spawn").stop(), Some(1));
    }

    #[test]
    fn a_worker_that_panicked_has_none() {
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let worker = Worker::spawn("_test", ThreadClass::Device, &sandbox, (), |_, _| panic!("on purpose"));
        assert_eq!(worker.expect("spawn").stop(), None);
    }
}
