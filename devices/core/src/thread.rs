//! Threads that devices run their work on, each confined to what its class of work needs.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What a thread does; the sandbox has one system call filter for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThreadClass {
    /// Device events, API requests and signals: the main thread.
    Control,
    /// Accepts and answers HTTP requests.
    Http,
    /// Runs a vCPU and dispatches its exits.
    Vcpu,
    /// Serves one queue of a disk.
    Disk,
    /// Serves one queue pair of a network interface.
    Net,
    /// Serves the sockets of a vsock device.
    Vsock,
    /// Serves console, entropy and other small queues.
    Device,
}

/// Confines the calling thread.
pub trait Sandbox: Send + Sync {
    /// Applies the filter of `class` to the calling thread, for good.
    fn enter(&self, class: ThreadClass) -> io::Result<()>;
}

/// A [`Sandbox`] that confines nothing: for tests and `--seccomp false`.
pub struct NoSandbox;

impl Sandbox for NoSandbox {
    fn enter(&self, _class: ThreadClass) -> io::Result<()> {
        Ok(())
    }
}

/// A thread that owns `T` while it runs and gives it back when stopped.
pub struct Worker<T> {
    thread: JoinHandle<T>,
    stop: EventFd,
}

impl<T: Send + 'static> Worker<T> {
    /// Runs `body` on a new thread called `name` (the kernel shows its first 15 bytes). `body` must return soon after the
    /// descriptor it is given becomes readable; it should wait on it beside its own. If the sandbox cannot be entered the
    /// process aborts: an unconfined thread must not serve a guest.
    pub fn spawn<F>(name: &str, class: ThreadClass, sandbox: &Arc<dyn Sandbox>, state: T, body: F) -> io::Result<Self>
    where
        F: FnOnce(&mut T, &EventFd) + Send + 'static,
    {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let sandbox = sandbox.clone();
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            let mut state = state;
            if let Err(error) = sandbox.enter(class) {
                tracing::error!("cannot confine a {class:?} thread: {error}");
                std::process::abort();
            }
            body(&mut state, &stopped);
            state
        })?;
        Ok(Self { thread, stop })
    }

    /// Asks the thread to end, waits for it and takes its state back; `None` if it panicked.
    pub fn stop(self) -> Option<T> {
        // The counter cannot overflow: this is its only write.
        let _ = self.stop.write(1);
        self.thread.join().ok()
    }
}
