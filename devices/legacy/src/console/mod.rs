//! Where a guest's console leads on the host: the terminal, a pseudo-terminal, a file, a socket.
//!
//! One [`Console`] serves a serial port or a virtio-console. It outlives the device, so a guest that resets keeps its terminal.
//!
//! **Output never makes a vCPU wait.** Every byte is handed to the host at once; what the host does not take now is kept in a ring
//! of [`BACKLOG`] bytes and follows when it can. When the ring is full its oldest bytes are lost and counted
//! ([`Console::dropped`]). Only writes to a regular file are left to the kernel's page cache, which may slow a writer down
//! when the host's disk cannot keep up, as it does for any process.
//!
//! **Input is never lost.** It stays with the host until the device has room: the device calls [`Console::service`] with the room it
//! has, and [`Console::room`] when there is room again.

mod channel;
mod open;
mod port;
mod sys;
mod terminal;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use triarch_device_core::RateLimit;
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;

pub use open::OpenError;
pub use terminal::restore_terminal;

use port::Port;

/// Bytes of output kept for a reader that is slow or not there yet.
pub const BACKLOG: usize = 64 << 10;

/// What to connect a console to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Backend {
    /// stdin, in raw mode if it is a terminal, and stdout.
    Tty,
    /// A new pseudo-terminal ([`Console::path`]). Output is dropped while nobody has it open.
    Pty,
    /// A file for the output, emptied first; a named pipe works too. No input.
    File(PathBuf),
    /// A listening unix socket for one client at a time. Output is kept for the next client while there is none.
    Socket(PathBuf),
    /// Output goes nowhere, no input.
    Null,
    /// No device at all. A console opened so behaves as [`Null`](Self::Null).
    #[default]
    Off,
}

/// An open [`Backend`].
///
/// Its descriptor ([`AsFd`]) becomes readable when there is something to do; the thread that watches it then calls
/// [`service`](Self::service), directly or through the device. All other methods may be called from any thread.
pub struct Console {
    epoll: Epoll,
    wake: EventFd,
    port: Mutex<Port>,
    path: Option<PathBuf>,
    /// The last `service` filled its buffer, so input may be waiting without a new event.
    starved: AtomicBool,
    dropped: AtomicU64,
    log: RateLimit,
}

impl Console {
    /// The path of the pseudo-terminal, file or socket.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Columns and rows of the terminal Triarch runs on; `None` for the other backends.
    pub fn size(&self) -> Option<(u16, u16)> {
        self.lock().terminal_size()
    }

    /// Bytes of output lost so far.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Puts out `bytes` without waiting for anyone.
    pub fn write(&self, bytes: &[u8]) {
        let mut port = self.lock();
        let lost = port.write(bytes);
        if port.wants_watch() {
            self.wake();
        }
        drop(port);
        self.lose(lost);
    }

    /// Does whatever became possible since the last call: takes clients in and out, writes kept output, reads input into `buf`.
    /// Returns the bytes read.
    ///
    /// Once a call has filled its buffer no event announces the rest of the input: call again, or [`room`](Self::room) as soon as there
    /// is room for more.
    pub fn service(&self, buf: &mut [u8]) -> usize {
        // Empties the descriptor: every source is edge-triggered and looked at below, whatever woke us.
        let _ = self.wake.read();
        let mut events = [EpollEvent::default(); 4];
        while matches!(self.epoll.wait(0, &mut events), Ok(n) if n == events.len()) {}

        let mut port = self.lock();
        let mut lost = port.flush();
        let read = port.read(buf);
        // What a new client has sent already comes with an event of its own.
        lost += port.change_client(&self.epoll);
        if let Err(error) = port.watch(&self.epoll) {
            self.warn(&format_args!("cannot wait for room for output: {error}"));
        }
        self.starved.store(read == buf.len(), Ordering::SeqCst);
        drop(port);
        self.lose(lost);
        read
    }

    /// Says that the device can take input again. Cheap when no input was held back.
    pub fn room(&self) {
        if self.starved.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Makes the descriptor readable, so that [`service`](Self::service) is called.
    pub fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            self.warn(&format_args!("cannot wake the console: {error}"));
        }
    }

    /// Waits until kept output has been taken by the host, at most `timeout`. Returns whether all of it was. For the end of a VM.
    pub fn drain(&self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        loop {
            let mut port = self.lock();
            let lost = port.flush();
            self.lose(lost);
            let left = end.saturating_duration_since(Instant::now());
            if !port.has_kept() || !port.connected() || left.is_zero() {
                return !port.has_kept();
            }
            port.wait_for_room(left.min(Duration::from_millis(20)));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lose(&self, bytes: usize) {
        if bytes > 0 {
            self.dropped.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    fn warn(&self, what: &dyn std::fmt::Display) {
        if let Some(held_back) = self.log.admit() {
            tracing::warn!("{what} ({held_back} such messages held back)");
        }
    }
}

impl AsFd for Console {
    fn as_fd(&self) -> BorrowedFd<'_> {
        sys::epoll_fd(&self.epoll)
    }
}

impl AsRawFd for Console {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

/// A [`Console`] as a writer that takes everything at once.
pub struct ConsoleWriter(pub std::sync::Arc<Console>);

impl io::Write for ConsoleWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether the console's descriptor becomes readable within `ms` milliseconds.
#[cfg(test)]
pub(crate) fn readable(console: &Console, ms: u64) -> bool {
    sys::poll(console.as_fd(), libc::POLLIN, Duration::from_millis(ms)) & libc::POLLIN != 0
}

#[cfg(test)]
mod tests;
