//! Socket device (virtio 1.2, 5.10): streams between programs of the guest and of the host, without a network.
//!
//! The host's side is a unix socket. A program of the host connects to it and writes `CONNECT 1234\n`; when the guest accepts on
//! port 1234 it reads `OK 1073741824\n` (the port the guest sees) and then has the stream. A guest that connects to port 1234 of
//! the host (CID 2) reaches the program that listens on the socket's path with `_1234` behind it.
//!
//! Each stream buffers 64 KiB towards the host at most, and nothing towards the guest: what the guest does not take stays in the
//! socket.

mod connection;
mod engine;
mod packet;
mod socket;
mod stats;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;
use triarch_device_core::Worker;

use self::engine::{Engine, Limits};
use self::socket::Listener;
use self::stats::Counters;
pub use self::stats::VsockStats;
use crate::{ActivateError, DeviceContext, DeviceId, VirtQueue, VirtioDevice, feature, read_config_bytes};

/// Descriptors of each queue: what Linux' driver fills.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;

/// What a socket device is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockOptions {
    /// What its thread is called, such as `_vsock`.
    pub id: String,
    /// The guest's address: 3 to 4294967294.
    pub cid: u32,
    /// Path of the unix socket.
    pub socket: PathBuf,
    /// Streams at a time; more are refused.
    pub max_connections: usize,
}

impl VsockOptions {
    /// Streams at a time unless something else is asked for.
    pub const DEFAULT_CONNECTIONS: usize = 1024;
}

/// Why a socket device cannot be made as asked.
#[derive(Debug, Error)]
pub enum VsockError {
    /// The address is one of those with a meaning of their own.
    #[error("CID {0} is reserved; use 3 to 4294967294")]
    Cid(u32),
    /// The path, with a port behind it, does not fit into a socket's address.
    #[error("the socket path {} is too long; use one of at most 96 bytes", .0.display())]
    PathTooLong(PathBuf),
    /// Another program listens there.
    #[error("another process listens on the socket {}; stop it or choose another path", .0.display())]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{} exists and is no socket; remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("cannot {what} {}", .path.display())]
    Socket {
        /// What was being done with the socket.
        what: &'static str,
        /// Path of the socket.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// The engine, wherever it is.
enum Place {
    Idle(Box<Engine>),
    Running(Worker<Engine>),
    /// Its thread died, or could not be started.
    Lost,
}

/// A socket device. See the [module](self).
pub struct Vsock {
    cid: u64,
    place: Place,
    context: Option<DeviceContext>,
    counters: Arc<Counters>,
}

/// A way to a socket device that its transport has taken in.
#[derive(Clone)]
pub struct VsockHandle(Arc<Counters>);

impl VsockHandle {
    /// What it counted since it was made.
    pub fn stats(&self) -> VsockStats {
        self.0.snapshot()
    }
}

impl Vsock {
    /// A device that listens at its path from now on; the file goes with the device. A socket there that nobody listens on any
    /// more is replaced.
    pub fn new(options: &VsockOptions) -> Result<Self, VsockError> {
        Self::with_limits(options, Limits::new(options.max_connections))
    }

    fn with_limits(options: &VsockOptions, limits: Limits) -> Result<Self, VsockError> {
        if options.cid < 3 || options.cid == u32::MAX {
            return Err(VsockError::Cid(options.cid));
        }
        let cid = u64::from(options.cid);
        let listener = Listener::bind(&options.socket)?;
        let engine = Engine::new(options.id.clone(), cid, limits, listener);
        Ok(Self {
            cid,
            context: None,
            counters: engine.counters.clone(),
            place: Place::Idle(Box::new(engine)),
        })
    }

    /// A way to the device for when its transport has it.
    pub fn handle(&self) -> VsockHandle {
        VsockHandle(self.counters.clone())
    }

    /// Tells the guest, once it runs again, that all its streams are gone (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET): for a guest that
    /// continues from a snapshot or on another host. Call it before the queues are started.
    pub fn restore(&mut self) {
        if let Some(engine) = self.halt() {
            engine.reset();
            engine.transport_reset = true;
        }
    }

    /// Stops the thread, if one runs, and gives access to what it owns.
    fn halt(&mut self) -> Option<&mut Engine> {
        self.place = match std::mem::replace(&mut self.place, Place::Lost) {
            Place::Running(worker) => worker.stop().map_or(Place::Lost, |e| Place::Idle(Box::new(e))),
            other => other,
        };
        match &mut self.place {
            Place::Idle(engine) => Some(engine),
            _ => None,
        }
    }

    /// Starts the thread if there is work for it: packets take both queues.
    fn go_on(&mut self) -> io::Result<()> {
        let Some(context) = &self.context else { return Ok(()) };
        self.place = match std::mem::replace(&mut self.place, Place::Lost) {
            Place::Idle(engine) if engine.rx.is_some() && engine.tx.is_some() => {
                Place::Running(engine.spawn(&context.sandbox)?)
            }
            other => other,
        };
        Ok(())
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> DeviceId {
        DeviceId::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        feature::COMMON
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // The guest's address is read-only.
    }

    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError> {
        if self.context.is_some() {
            return Err(ActivateError::Driver("the device is active already"));
        }
        self.context = Some(context);
        Ok(())
    }

    fn start_queue(&mut self, queue: VirtQueue) -> Result<(), ActivateError> {
        if self.context.is_none() {
            return Err(ActivateError::Driver("a queue starts before the device is active"));
        }
        let no_thread = |source| ActivateError::Host {
            what: "the thread of the socket device",
            source,
        };
        let engine = self
            .halt()
            .ok_or_else(|| no_thread(io::Error::other("it died earlier")))?;
        match queue.index() {
            RX => engine.rx = Some(queue),
            TX => engine.tx = Some(queue),
            EVENT => engine.event = Some(queue),
            _ => return Err(ActivateError::Driver("it starts a queue the device does not have")),
        }
        self.go_on().map_err(no_thread)
    }

    fn stop_queue(&mut self, index: u16) -> Option<VirtQueue> {
        let engine = self.halt()?;
        let queue = match index {
            RX => engine.take_rx(),
            TX => engine.tx.take(),
            EVENT => engine.event.take(),
            _ => None,
        };
        if let (Err(error), Some(context)) = (self.go_on(), &self.context) {
            tracing::error!("cannot go on with the other queues of the socket device: {error}");
            context.interrupt.needs_reset();
        }
        queue
    }

    fn reset(&mut self) {
        self.context = None;
        if let Some(engine) = self.halt() {
            engine.reset();
            (engine.rx, engine.tx, engine.event) = (None, None, None);
        }
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
    }
}
