//! The thread of a queue pair.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use triarch_device_core::metrics::Padded;
use triarch_device_core::{Sandbox, ThreadClass, Worker};
use triarch_net::PacketQueue;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::counters::PairCounters;
use super::rx::{Rx, RxPause};
use super::tx::{Tx, TxPause};

const STOP: u64 = 0;
const HOST: u64 = 1;
const RX_KICK: u64 = 2;
const TX_KICK: u64 = 3;

/// What a pair's thread owns while it runs. Either queue may be missing: the driver starts and resets them one by one.
pub(super) struct Pair {
    pub(super) name: String,
    pub(super) host: Arc<PacketQueue>,
    pub(super) counters: Arc<Padded<PairCounters>>,
    pub(super) rx: Option<Rx>,
    pub(super) tx: Option<Tx>,
}

impl Pair {
    /// Starts a thread that serves the queues there are.
    pub(super) fn spawn(self, sandbox: &Arc<dyn Sandbox>) -> io::Result<Worker<Pair>> {
        let events = Events::new(&self)?;
        let name = self.name.clone();
        Worker::spawn(&name, ThreadClass::Net, sandbox, self, move |pair, stop| {
            if let Err(error) = pair.run(events, stop) {
                tracing::error!("{} stopped: {error}", pair.name);
            }
        })
    }

    fn run(&mut self, mut events: Events, stop: &EventFd) -> io::Result<()> {
        events.watch(stop.as_raw_fd(), STOP, EventSet::IN)?;
        // What came in before the thread did has no event of its own any more.
        let mut receive = self.rx.is_some();
        let mut send = self.tx.is_some();
        let mut host_full = false;
        let mut wait_for_packet = false;
        loop {
            let woken = events.wait(if receive || send { 0 } else { -1 })?;
            if woken.stop {
                return Ok(());
            }
            if woken.rx_kick {
                clear(self.rx.as_ref().map(|rx| rx.queue().kick()));
            }
            if woken.tx_kick {
                clear(self.tx.as_ref().map(|tx| tx.queue().kick()));
            }
            receive |= woken.rx_kick || (woken.readable && wait_for_packet);
            send |= (woken.tx_kick && !host_full) || (woken.writable && host_full);
            if let Some(rx) = self.rx.as_mut().filter(|_| receive && !events.lost) {
                let pause = rx.receive(&self.host, &self.counters.rx);
                receive = pause == RxPause::Budget;
                wait_for_packet = matches!(pause, RxPause::NoPacket | RxPause::Budget);
                if pause == RxPause::Lost {
                    events.lose(&self.host, &self.name)?;
                }
            } else {
                receive = false;
            }
            if let Some(tx) = self.tx.as_mut().filter(|_| send) {
                let pause = tx.transmit(&self.host, &self.counters.tx);
                send = pause == TxPause::Budget;
                host_full = pause == TxPause::HostFull;
            } else {
                send = false;
            }
            events.want(&self.host, wait_for_packet, host_full)?;
            if woken.lost {
                events.lose(&self.host, &self.name)?;
            }
        }
    }
}

fn clear(kick: Option<&EventFd>) {
    // It is only read to make it unreadable; that it already is does not matter.
    let _ = kick.map(EventFd::read);
}

/// What a thread was woken by.
#[derive(Default)]
struct Woken {
    stop: bool,
    rx_kick: bool,
    tx_kick: bool,
    readable: bool,
    writable: bool,
    lost: bool,
}

/// What a pair's thread waits for.
struct Events {
    epoll: Epoll,
    interest: EventSet,
    /// The host's end is gone; it would be reported for ever, so it is watched no more.
    lost: bool,
}

impl Events {
    fn new(pair: &Pair) -> io::Result<Self> {
        let events = Self {
            epoll: Epoll::new()?,
            interest: EventSet::empty(),
            lost: false,
        };
        events.watch(pair.host.as_raw_fd(), HOST, EventSet::empty())?;
        if let Some(rx) = &pair.rx {
            events.watch(rx.queue().kick().as_raw_fd(), RX_KICK, EventSet::IN)?;
        }
        if let Some(tx) = &pair.tx {
            events.watch(tx.queue().kick().as_raw_fd(), TX_KICK, EventSet::IN)?;
        }
        Ok(events)
    }

    fn watch(&self, fd: RawFd, token: u64, set: EventSet) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(set, token))
    }

    fn wait(&self, timeout: i32) -> io::Result<Woken> {
        let mut list = [EpollEvent::default(); 4];
        let n = match self.epoll.wait(timeout, &mut list) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let mut woken = Woken::default();
        for event in &list[..n] {
            let set = event.event_set();
            match event.data() {
                STOP => woken.stop = true,
                RX_KICK => woken.rx_kick = true,
                TX_KICK => woken.tx_kick = true,
                _ => {
                    woken.lost = set.intersects(EventSet::ERROR | EventSet::HANG_UP);
                    // What it still holds comes out before the end does.
                    woken.readable = set.contains(EventSet::IN);
                    woken.writable = set.contains(EventSet::OUT) || woken.lost;
                }
            }
        }
        Ok(woken)
    }

    /// Watches the host's end for what is needed of it now.
    fn want(&mut self, host: &PacketQueue, readable: bool, writable: bool) -> io::Result<()> {
        let mut interest = EventSet::empty();
        interest.set(EventSet::IN, readable);
        interest.set(EventSet::OUT, writable);
        if interest == self.interest || self.lost {
            return Ok(());
        }
        self.interest = interest;
        let event = EpollEvent::new(interest, HOST);
        self.epoll.ctl(ControlOperation::Modify, host.as_raw_fd(), event)
    }

    fn lose(&mut self, host: &PacketQueue, name: &str) -> io::Result<()> {
        if self.lost {
            return Ok(());
        }
        self.lost = true;
        tracing::warn!("{name}: the host's interface is gone; packets are lost from now on");
        self.epoll
            .ctl(ControlOperation::Delete, host.as_raw_fd(), EpollEvent::default())
    }
}
