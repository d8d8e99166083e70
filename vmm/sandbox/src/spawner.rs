//! The thread that makes threads.

use std::io;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};

type Body = Box<dyn FnOnce() + Send>;

struct Order {
    name: String,
    body: Body,
    reply: SyncSender<io::Result<JoinHandle<()>>>,
}

/// Makes threads that do not inherit the filter of whoever wants them.
pub(crate) struct Spawner {
    /// The main thread: its filter is the widest, so it makes its threads itself.
    main: ThreadId,
    orders: Sender<Order>,
    /// Orders nobody serves yet.
    waiting: Mutex<Option<Receiver<Order>>>,
}

impl Spawner {
    /// A spawner that belongs to the calling thread. Orders of other threads wait until [`start`](Self::start).
    pub(crate) fn new() -> Self {
        let (orders, waiting) = channel();
        Self {
            main: thread::current().id(),
            orders,
            waiting: Mutex::new(Some(waiting)),
        }
    }

    /// Starts serving orders, on a thread that inherits the caller's filter and ends with this handle. Once; when it fails, orders
    /// fail too.
    pub(crate) fn start(&self) -> io::Result<()> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(waiting) = waiting else { return Ok(()) };
        thread::Builder::new().name("spawner".into()).spawn(move || {
            for Order { name, body, reply } in waiting {
                // The one who ordered waits for the reply.
                let _ = reply.send(thread::Builder::new().name(name).spawn(body));
            }
        })?;
        Ok(())
    }

    pub(crate) fn spawn(&self, name: String, body: Body) -> io::Result<JoinHandle<()>> {
        if thread::current().id() == self.main {
            return thread::Builder::new().name(name).spawn(body);
        }
        let gone = || io::Error::other("the thread that makes threads has ended");
        let (reply, answer) = sync_channel(1);
        self.orders.send(Order { name, body, reply }).map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())?
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn orders_of_other_threads_wait_for_the_start() {
        let spawner = Arc::new(Spawner::new());
        let theirs = spawner.clone();
        let other = thread::spawn(move || {
            let spawned = theirs.spawn("_ordered".into(), Box::new(|| {}));
            spawned.map(|thread| thread.thread().name().map(str::to_owned))
        });
        assert!(!other.is_finished());
        spawner.start().expect("start");
        let name = other.join().expect("no panic").expect("spawned");
        assert_eq!(name.as_deref(), Some("_ordered"));
    }

    #[test]
    fn the_main_thread_waits_for_nobody() {
        let spawner = Spawner::new();
        let thread = spawner.spawn("_own".into(), Box::new(|| {})).expect("spawned");
        thread.join().expect("no panic");
    }
}
