//! One queue of a guest, and what of it is with the daemon.
//!
//! A daemon never works on the guest's own rings: it gets the heads of chains in a ring of the VMM's, and what it has done goes back
//! into the guest's ring from there. Descriptors and data stay where they are. So the VMM knows at any moment which requests are with
//! the daemon and in which order they came; when the daemon dies, exactly those are given to the next one, in that order. The rings
//! alone would not tell: completions come in any order, and both rings forget what is older than their size.

use std::os::fd::AsFd;
use std::sync::Arc;

use triarch_device_core::Event;
use triarch_virtio::{Chain, QueueStateV1, RingFault, VirtQueue};
use vm_memory::GuestMemoryError;

use crate::LinkError;
use crate::inflight::RecordError;
use crate::kind::{Done, Kind};
use crate::session::Ring;
use crate::shadow::{Shadow, ShadowRing};

/// A request that is not answered yet.
#[derive(Debug, Clone, Copy)]
struct Pending {
    head: u16,
    /// Counts requests as they came.
    number: u64,
    /// Bytes a daemon can read.
    readable: u32,
    /// Bytes a daemon can have written.
    room: u32,
    /// Where those begin (GPA), if there are any.
    at: u64,
}

impl Pending {
    fn of(chain: &Chain, number: u64) -> Self {
        Self {
            head: chain.head(),
            number,
            readable: chain.readable_len(),
            room: chain.writable_len(),
            at: chain.writable().first().map_or(0, |segment| segment.addr.0),
        }
    }
}

/// The daemon's side of a queue.
struct Far {
    ring: ShadowRing,
    kick: Event,
    call: Event,
}

/// Requests without an answer of a queue that does not run, for when it runs again.
pub(crate) struct Parked(Vec<Pending>);

impl Parked {
    /// Their heads, in order.
    pub(crate) fn heads(&self) -> Vec<u16> {
        self.0.iter().map(|request| request.head).collect()
    }
}

/// A queue that runs.
pub(crate) struct Relay {
    queue: VirtQueue,
    /// Requests without an answer by their heads.
    pending: Vec<Option<Pending>>,
    count: u16,
    next: u64,
    far: Option<Far>,
    kind: Arc<dyn Kind>,
}

impl Relay {
    /// Takes over a queue. `parked` are the requests that had no answer when the same queue was stopped.
    pub(crate) fn new(kind: Arc<dyn Kind>, queue: VirtQueue, parked: Option<Parked>) -> Self {
        let state = queue.state();
        let open = state.next_avail.wrapping_sub(state.next_used);
        let mut relay = Self {
            pending: vec![None; usize::from(queue.size())],
            queue,
            count: 0,
            next: 0,
            far: None,
            kind,
        };
        // A queue that was reset meanwhile begins anew, without anything open.
        let parked = parked.filter(|Parked(list)| list.len() == usize::from(open));
        for request in parked.into_iter().flat_map(|Parked(list)| list) {
            relay.keep(request);
        }
        relay
    }

    /// Takes over a queue from daemons that worked on its rings, with the heads of the requests they had no answer for, in order. If those
    /// are not known, or its driver broke them, nobody can go on with it.
    pub(crate) fn adopt(kind: Arc<dyn Kind>, mut queue: VirtQueue, heads: Result<Vec<u16>, RecordError>) -> Self {
        let heads = heads.unwrap_or_else(|error| {
            queue.give_up(&error);
            Vec::new()
        });
        let chains: Result<Vec<_>, _> = heads.iter().map(|head| queue.chain(*head)).collect();
        let chains = chains.unwrap_or_else(|fault| {
            queue.fault(&fault);
            Vec::new()
        });
        let state = queue.state();
        queue.restore(&QueueStateV1 {
            next_avail: state.next_used.wrapping_add(chains.len() as u16),
            ..state
        });
        let requests = chains.iter().map(|chain| Pending::of(chain, 0)).collect();
        Self::new(kind, queue, Some(Parked(requests)))
    }

    /// Gives the queue back, with the heads of the requests that have no answer, in order.
    pub(crate) fn into_heads(self) -> (VirtQueue, Vec<u16>) {
        let heads = self.in_order().iter().map(|request| request.head).collect();
        (self.queue, heads)
    }

    /// Gives the queue back, with the requests that have no answer.
    pub(crate) fn into_parts(self) -> (VirtQueue, Parked) {
        let parked = Parked(self.in_order());
        (self.queue, parked)
    }

    /// Requests without an answer.
    pub(crate) fn open(&self) -> u16 {
        self.count
    }

    pub(crate) fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    /// What the daemon signals completions with.
    pub(crate) fn call(&self) -> Option<&Event> {
        self.far.as_ref().map(|far| &far.call)
    }

    fn keep(&mut self, request: Pending) -> bool {
        let Some(slot @ None) = self.pending.get_mut(usize::from(request.head)) else {
            return false;
        };
        *slot = Some(Pending {
            number: self.next,
            ..request
        });
        self.next += 1;
        self.count += 1;
        true
    }

    fn in_order(&self) -> Vec<Pending> {
        let mut list: Vec<_> = self.pending.iter().flatten().copied().collect();
        list.sort_unstable_by_key(|request| request.number);
        list
    }

    /// Prepares a ring for a daemon that just came: it begins with what the one before did not answer.
    pub(crate) fn connect(&mut self, shadow: &Shadow) -> Result<(), LinkError> {
        let ring = shadow.ring(self.queue.index(), self.queue.size());
        let mut ring = ring.ok_or_else(|| LinkError::Host {
            what: "a ring for a queue of this size",
            cause: std::io::ErrorKind::InvalidInput.into(),
        })?;
        ring.clear().map_err(inaccessible)?;
        for request in self.in_order() {
            ring.push(request.head).map_err(inaccessible)?;
        }
        ring.publish().map_err(inaccessible)?;
        let event = || Event::new().map_err(LinkError::host("an event of a daemon's ring"));
        self.far = Some(Far {
            ring,
            kick: event()?,
            call: event()?,
        });
        Ok(())
    }

    /// The ring to hand to the daemon.
    pub(crate) fn ring(&self) -> Option<Ring<'_>> {
        let far = self.far.as_ref()?;
        Some(Ring {
            index: self.queue.index(),
            size: self.queue.size(),
            descriptors: self.queue.descriptors(),
            available: far.ring.available(),
            used: far.ring.used(),
            logged: false,
            base: 0,
            kick: far.kick.as_fd(),
            call: far.call.as_fd(),
        })
    }

    /// Makes the daemon look at its ring.
    pub(crate) fn nudge(&self) {
        if let Some(far) = &self.far {
            far.kick.ring();
        }
    }

    /// The daemon is gone. What it has completed until now counts.
    pub(crate) fn disconnect(&mut self) {
        // What else it wrote does not matter any more.
        let _ = self.collect();
        self.far = None;
    }

    /// Passes on what the driver offers. Without a daemon it stays in the ring.
    pub(crate) fn forward(&mut self) -> Result<(), LinkError> {
        if self.far.is_none() {
            return Ok(());
        }
        let mut passed = false;
        self.queue.disarm();
        loop {
            let Some(chain) = self.queue.pop() else {
                match self.queue.arm() {
                    true => continue,
                    false => break,
                }
            };
            let (request, head) = (Pending::of(&chain, 0), chain.head());
            if !self.keep(request) {
                self.queue.fault(&RingFault::Request("a chain is offered twice"));
                break;
            }
            if let Some(far) = &mut self.far {
                far.ring.push(head).map_err(inaccessible)?;
                passed = true;
            }
        }
        if let Some(far) = self.far.as_ref().filter(|_| passed)
            && far.ring.publish().map_err(inaccessible)?
        {
            far.kick.ring();
        }
        Ok(())
    }

    /// Gives back to the driver what the daemon completed; how many requests that was.
    pub(crate) fn collect(&mut self) -> Result<u16, LinkError> {
        let Some(far) = &mut self.far else {
            return Ok(0);
        };
        far.call.clear();
        let ready = far.ring.ready().map_err(inaccessible)?;
        if ready > self.count {
            let text = format!("it completed {ready} requests of {}", self.count);
            return Err(LinkError::Nonsense(text));
        }
        let done = self.take(ready);
        if ready > 0 {
            self.queue.signal();
        }
        done.map(|()| ready)
    }

    fn take(&mut self, ready: u16) -> Result<(), LinkError> {
        let mut done = Vec::with_capacity(ready.into());
        let taken = (0..ready).try_for_each(|_| self.take_one(&mut done));
        // All at once: a packet may span several.
        self.queue.complete_all(&done);
        taken
    }

    fn take_one(&mut self, done: &mut Vec<(u16, u32)>) -> Result<(), LinkError> {
        let Some(far) = &mut self.far else {
            return Ok(());
        };
        let (head, written) = far.ring.take().map_err(inaccessible)?;
        let request = self.pending.get_mut(head as usize).and_then(Option::take);
        let Some(request) = request else {
            let text = format!("it completed request {head}, which it does not have");
            return Err(LinkError::Nonsense(text));
        };
        self.count -= 1;
        let written = written.min(request.room);
        let seen = Done {
            readable: request.readable,
            writable: request.at,
            written,
        };
        self.kind.done(self.queue.index(), &seen, &self.queue.memory());
        done.push((request.head, written));
        Ok(())
    }

    /// Answers what there is in the daemon's place, as its kind fails requests. A driver that goes on and on is served again later.
    pub(crate) fn fail(&mut self) {
        if !self.kind.answers(self.queue.index()) {
            return;
        }
        for request in self.in_order() {
            self.refuse(request);
        }
        self.queue.disarm();
        let mut left = self.queue.size();
        loop {
            match self.queue.pop() {
                Some(chain) => {
                    let request = Pending::of(&chain, 0);
                    if self.keep(request) {
                        self.refuse(request);
                    }
                    left -= 1;
                }
                None if self.queue.arm() => continue,
                None => break,
            }
            if left == 0 {
                // Fails only when it is readable already.
                let _ = self.queue.kick().write(1);
                break;
            }
        }
        self.queue.signal();
    }

    fn refuse(&mut self, request: Pending) {
        let memory = self.queue.memory();
        // A chain that its driver broke meanwhile has nobody to hear of it.
        let written = match self.queue.chain(request.head) {
            Ok(chain) => self.kind.refuse(self.queue.index(), &chain, &memory),
            Err(_) => 0,
        };
        if let Some(slot) = self.pending.get_mut(usize::from(request.head)) {
            *slot = None;
        }
        self.count -= 1;
        self.queue.complete(request.head, written.min(request.room));
    }
}

fn inaccessible(error: GuestMemoryError) -> LinkError {
    LinkError::Host {
        what: "an access to the daemon's rings",
        cause: std::io::Error::other(error),
    }
}
