//! One disk, and the front end that uses it.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::SocketFlags;
use thiserror::Error;
use triarch_api::chain;
use triarch_api::server::{ListenError, Listener};
use triarch_block::{Disk, OpenError};
use triarch_device_core::{RateLimit, Sandbox, ThreadClass};
use triarch_virtio::{Block, BlockError, BlockHandle};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{ExportOptions, LimitOptions, LockTime, OptionsError};
use triarch_daemon::backend::{ChannelError, Session, SessionError, borrow};

/// How long a disk may be locked by somebody who is just ending, and how often it is tried.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_PERIOD: Duration = Duration::from_millis(5);

/// Why an export could not be made.
#[derive(Debug, Error)]
pub enum ExportError {
    /// There is one of that name.
    #[error("there is an export called {0} already")]
    Name(String),
    /// The disk cannot be used.
    #[error(transparent)]
    Disk(#[from] OpenError),
    /// The device cannot be made.
    #[error(transparent)]
    Device(#[from] BlockError),
    /// The socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// An event descriptor.
    #[error("cannot make an event descriptor")]
    Event(#[source] std::io::Error),
}

/// What an export did.
#[derive(Debug, Default)]
pub struct ExportCounters {
    /// Connections that were served.
    pub connections: AtomicU64,
    /// Connections that were refused, since there was one.
    pub refused: AtomicU64,
    /// Connections that ended because of what the front end sent.
    pub broken: AtomicU64,
    /// Requests that an earlier process had not finished, done again.
    pub resubmitted: AtomicU64,
}

/// A disk, the socket at which it is to be had, and who has it.
pub struct Export {
    options: ExportOptions,
    /// As they are now.
    limits: Mutex<LimitOptions>,
    listener: Listener,
    handle: BlockHandle,
    /// Whoever holds the lock serves it.
    device: Mutex<Block>,
    current: Mutex<Current>,
    stop: EventFd,
    counters: ExportCounters,
    log: RateLimit,
}

#[derive(Default)]
struct Current {
    /// The connection that is served, to see whether its front end is still there.
    socket: Option<OwnedFd>,
    /// Front ends wait at the socket.
    stopped: bool,
    threads: Vec<JoinHandle<()>>,
}

impl Export {
    /// Opens and locks the disk, unless that is left to front ends, and listens.
    ///
    /// # Errors
    /// See [`ExportError`]; nothing stays open.
    pub fn open(options: ExportOptions) -> Result<Arc<Self>, ExportError> {
        let disk = open_disk(&options)?;
        let listener = triarch_daemon::listen(&options.socket)?;
        Self::new(options, disk, listener)
    }

    /// An export of what another process had open and locked.
    ///
    /// # Errors
    /// See [`ExportError`].
    pub(crate) fn adopt(options: ExportOptions, file: File, listener: Listener) -> Result<Arc<Self>, ExportError> {
        let disk = Disk::from_file(file, &options.disk())?;
        Self::new(options, disk, listener)
    }

    fn new(options: ExportOptions, disk: Arc<Disk>, listener: Listener) -> Result<Arc<Self>, ExportError> {
        let mut device = Block::new(&options.name, disk, options.num_queues, options.queue_size)?;
        device.set_look(Duration::from_micros(options.poll_us.into()));
        Ok(Arc::new(Self {
            handle: device.handle(),
            device: Mutex::new(device),
            current: Mutex::default(),
            stop: EventFd::new(EFD_NONBLOCK).map_err(ExportError::Event)?,
            counters: ExportCounters::default(),
            log: RateLimit::default(),
            limits: Mutex::new(options.limits),
            options,
            listener,
        }))
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// As it would be described now.
    pub fn options(&self) -> ExportOptions {
        ExportOptions {
            limits: *self.limits.lock().unwrap_or_else(PoisonError::into_inner),
            ..self.options.clone()
        }
    }

    /// Changes how much it may do, at once.
    ///
    /// # Errors
    /// The limits make no sense; the old ones stay.
    pub fn set_limits(&self, limits: LimitOptions) -> Result<(), OptionsError> {
        let mut now = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        self.handle.disk().set_limits(&limits.limits()?);
        *now = limits;
        Ok(())
    }

    /// The socket for front ends.
    pub fn listener(&self) -> &Listener {
        &self.listener
    }

    /// The disk, and a way to tell the guest of its size.
    pub fn handle(&self) -> &BlockHandle {
        &self.handle
    }

    /// What it did.
    pub fn counters(&self) -> &ExportCounters {
        &self.counters
    }

    /// Whether a front end is connected.
    pub fn connected(&self) -> bool {
        self.current().socket.is_some()
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what waits at the socket. A front end gets the disk unless another one has it.
    pub fn accept(self: &Arc<Self>, sandbox: &Arc<dyn Sandbox>) -> std::io::Result<()> {
        let mut current = self.current();
        if current.stopped {
            return Ok(());
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = match rustix::net::accept_with(&self.listener, flags) {
            Ok(socket) => socket,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if current.socket.as_ref().is_some_and(|socket| !hung_up(socket)) {
            self.counters.refused.fetch_add(1, Relaxed);
            self.warn(&"a front end was refused, since another one is connected");
            return Ok(());
        }
        current.threads.retain(|thread| !thread.is_finished());
        let copy = socket.try_clone()?;
        let (export, confine) = (self.clone(), sandbox.clone());
        let body = move || {
            if let Err(error) = confine.enter(ThreadClass::BackEnd) {
                tracing::error!("cannot confine a thread: {error}");
                std::process::abort();
            }
            export.serve(socket, &confine);
        };
        let thread = sandbox.spawn(self.options.name.clone(), Box::new(body))?;
        current.threads.push(thread);
        current.socket = Some(copy);
        Ok(())
    }

    /// Serves one front end to its end.
    fn serve(&self, socket: OwnedFd, sandbox: &Arc<dyn Sandbox>) {
        // The one before may still be finishing what was in flight.
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        self.counters.connections.fetch_add(1, Relaxed);
        let name = &self.options.name;
        tracing::info!(export = name, "a front end is connected");
        let number = socket_number(&socket);
        let mut session = Session::new(socket, &mut *device, sandbox.clone());
        let end = session.run(borrow(&self.stop));
        self.counters
            .resubmitted
            .fetch_add(session.stats().resubmitted, Relaxed);
        drop(session);
        let stopped = matches!(end, SessionError::Channel(ChannelError::Stopped));
        if self.options.lock == LockTime::Late
            && !stopped
            && let Err(error) = device.handle().disk().release_lock()
        {
            self.warn(&format_args!("its disk stays locked: {error}"));
        }
        let mut current = self.current();
        if current.socket.as_ref().map(socket_number) == Some(number) {
            current.socket = None;
        }
        drop(current);
        match end {
            SessionError::Channel(ChannelError::Closed | ChannelError::Stopped) => {
                tracing::info!(export = name, "{end}");
            }
            error => {
                self.counters.broken.fetch_add(1, Relaxed);
                self.warn(&format_args!("the front end is disconnected: {}", chain(&error)));
            }
        }
    }

    /// Ends the connection once what is in flight is finished, and takes no other one: front ends wait at the socket.
    pub fn stop(&self) {
        self.current().stopped = true;
        // The counter cannot overflow.
        let _ = self.stop.write(1);
    }

    /// Takes connections again after a [`stop`](Self::stop).
    pub(crate) fn resume(&self) {
        self.current().stopped = false;
        let _ = self.stop.read();
    }

    /// Whether it was stopped.
    pub(crate) fn stopped(&self) -> bool {
        self.current().stopped
    }

    /// Waits until nothing is served any more.
    pub fn wait(&self) {
        let threads = std::mem::take(&mut self.current().threads);
        for thread in threads {
            // One that panicked is gone as well.
            let _ = thread.join();
        }
    }

    fn warn(&self, message: &dyn std::fmt::Display) {
        if let Some(held_back) = self.log.admit() {
            tracing::warn!(export = self.options.name, held_back, "{message}");
        }
    }
}

/// Opens the disk. A daemon that was killed a moment ago still holds its lock for as long as the kernel takes to end what it had submitted
/// to io_uring, so one that is locked is tried again for a while.
fn open_disk(options: &ExportOptions) -> Result<Arc<Disk>, OpenError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        let opened = match options.lock {
            LockTime::Early => Disk::open(&options.disk()),
            LockTime::Late => Disk::open_unlocked(&options.disk()),
        };
        match opened {
            Err(OpenError::Locked { .. }) if Instant::now() < deadline => std::thread::sleep(LOCK_PERIOD),
            result => return result,
        }
    }
}

/// The inode of a socket, by which its copies are known.
fn socket_number(socket: &OwnedFd) -> u64 {
    rustix::fs::fstat(socket).map_or(0, |stat| stat.st_ino)
}

/// Whether the other side is gone, so that its session is about to end.
fn hung_up(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    let now = Timespec::default();
    rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

impl AsFd for Export {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.listener.as_fd()
    }
}
