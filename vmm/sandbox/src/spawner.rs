//! The thread that makes threads.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use seccompiler::BpfProgram;

type Body = Box<dyn FnOnce() + Send>;

struct Order {
    name: String,
    body: Body,
    reply: SyncSender<io::Result<JoinHandle<()>>>,
}

/// Makes threads that do not inherit the filter of whoever wants them.
pub(crate) struct Spawner {
    orders: Sender<Order>,
}

impl Spawner {
    /// Starts it, confined by `program`. It ends when this handle is dropped.
    pub(crate) fn start(program: Arc<BpfProgram>) -> io::Result<Self> {
        let (orders, incoming) = channel::<Order>();
        thread::Builder::new().name("spawner".into()).spawn(move || {
            if let Err(error) = seccompiler::apply_filter(&program) {
                tracing::error!("cannot confine the spawner: {error}");
                std::process::abort();
            }
            for Order { name, body, reply } in incoming {
                // The one who ordered waits for the reply.
                let _ = reply.send(thread::Builder::new().name(name).spawn(body));
            }
        })?;
        Ok(Self { orders })
    }

    pub(crate) fn spawn(&self, name: String, body: Body) -> io::Result<JoinHandle<()>> {
        let gone = || io::Error::other("the thread that makes threads has ended");
        let (reply, answer) = sync_channel(1);
        self.orders.send(Order { name, body, reply }).map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())?
    }
}
