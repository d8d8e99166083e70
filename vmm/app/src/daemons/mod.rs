//! Daemons this VMM starts itself: what serves a disk with `backend=blkd` or a network interface with `backend=netd`.
//!
//! A process of its own, the nursery, starts them, starts them again when they end, and ends them when the VMM is gone, however that
//! went. The VMM itself could not: its system call filters let it start no program.

mod message;
mod nursery;
mod ward;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};
use triarch_machine::{DaemonError, DaemonOrder, DaemonSockets, Daemons};

use message::{Answer, Order};

pub(crate) use nursery::run;

/// The name the nursery goes by, in the list of processes and to itself.
const NAME: &str = "triarch-nursery";
/// How long the nursery may take for an order: longer than a daemon has for its start or its end.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether this process was started to be the nursery.
pub(crate) fn is_nursery() -> bool {
    std::env::args_os().next().is_some_and(|name| name == NAME)
}

/// The way to the nursery. It ends when this is dropped.
pub(crate) struct Nursery {
    /// One message a datagram.
    socket: Mutex<OwnedFd>,
}

impl Nursery {
    /// Starts the nursery: this program once more, under another name.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let start = || -> io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC;
            let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            sockopt::set_socket_timeout(&ours, sockopt::Timeout::Recv, Some(PATIENCE))?;
            // By its real name: it looks for the daemons beside itself.
            Command::new(fs::read_link("/proc/self/exe")?)
                .arg0(NAME)
                .stdin(theirs)
                .stdout(Stdio::null())
                // What ends the VMM from a terminal must not end it first.
                .process_group(0)
                .spawn()?;
            Ok(ours)
        };
        let socket = start().context("cannot start the process that starts daemons")?;
        Ok(Self {
            socket: Mutex::new(socket),
        })
    }

    fn ask(&self, order: &Order) -> Result<Answer, DaemonError> {
        let gone = |error: io::Error| DaemonError(format!("the process that starts daemons does not answer: {error}"));
        let message = serde_json::to_vec(order).map_err(|error| gone(error.into()))?;
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        rustix::net::send(&*socket, &message, SendFlags::NOSIGNAL).map_err(|error| gone(error.into()))?;
        let mut answer = vec![0; message::LARGEST];
        let (_, size) =
            rustix::net::recv(&*socket, &mut answer, RecvFlags::empty()).map_err(|error| gone(error.into()))?;
        let known = answer.get(..size).unwrap_or_default();
        serde_json::from_slice(known).map_err(|error| gone(error.into()))
    }
}

impl Daemons for Nursery {
    fn start(&self, id: &str, order: DaemonOrder) -> Result<DaemonSockets, DaemonError> {
        let order = Order::Start {
            id: id.to_owned(),
            program: order.program.to_owned(),
            arguments: order.arguments,
            control: order.control,
        };
        match self.ask(&order)? {
            Answer::Serves { device, control } => Ok(DaemonSockets { device, control }),
            Answer::Done => Err(DaemonError("the process that starts daemons said no socket".to_owned())),
            Answer::Failed(reason) => Err(DaemonError(reason)),
        }
    }

    fn stop(&self, id: &str) {
        match self.ask(&Order::Stop { id: id.to_owned() }) {
            Ok(Answer::Failed(reason)) => tracing::warn!("the daemon of {id} did not end well: {reason}"),
            Ok(_) => {}
            Err(error) => tracing::warn!("cannot end the daemon of {id}: {error}"),
        }
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        let socket = self.socket.get_mut().unwrap_or_else(PoisonError::into_inner);
        // It ends its daemons and then itself, which is when there is nothing more to read.
        let _ = rustix::net::shutdown(&*socket, rustix::net::Shutdown::Write);
        let _ = rustix::net::recv(&*socket, &mut [0; 1], RecvFlags::empty());
    }
}
