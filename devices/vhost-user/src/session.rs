//! One connection to a daemon, from the first question to running rings.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use triarch_device_core::Event;
use triarch_memory::GuestMemory;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::LinkError;
use crate::connection::{Connection, Wake};
use crate::kind::{Kind, Offer, RING_FEATURES};
use crate::message::{self, CONFIG_HEAD, MAX_REGIONS, NEED_REPLY, PROTOCOL_FEATURES, Region, Request, protocol};

/// How long a daemon may take for an answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// device_status of a driver that works (virtio 1.2, 2.1).
const STATUS_READY: u64 = 1 | 2 | 4 | 8;

/// A ring that is handed to the daemon.
pub(crate) struct Ring<'a> {
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    pub(crate) kick: &'a Event,
    pub(crate) call: &'a Event,
}

/// A daemon that was asked what it offers.
pub(crate) struct Session {
    connection: Connection,
    protocol: u64,
    pub(crate) offer: Offer,
    /// Bytes of the configuration space that are asked for.
    config_length: usize,
}

impl Session {
    /// Connects and asks for everything there is to know before a driver comes.
    pub(crate) fn open(path: &Path, kind: &dyn Kind, wake: &Wake) -> Result<Self, LinkError> {
        let connection = Connection::open(path, PATIENCE)?;
        let offer = Offer {
            features: 0,
            queues: 1,
            config: Vec::new(),
        };
        let mut session = Self {
            connection,
            protocol: 0,
            offer,
            config_length: kind.config_length(),
        };
        session.offer.features = session.ask(Request::GET_FEATURES, wake)?;
        if session.offer.features & PROTOCOL_FEATURES != 0 {
            let offered = session.ask(Request::GET_PROTOCOL_FEATURES, wake)?;
            let unused = if session.config_length == 0 {
                protocol::CONFIG
            } else {
                0
            };
            let chosen = offered & protocol::ALL & !unused;
            let payload = message::numbers(&[chosen]);
            session
                .connection
                .send(Request::SET_PROTOCOL_FEATURES, 0, &payload, &[], wake)?;
            session.protocol = chosen;
        }
        session.tell(Request::SET_OWNER, &[], &[], wake)?;
        if session.has(protocol::MQ) {
            session.offer.queues = session.ask(Request::GET_QUEUE_NUM, wake)?;
        }
        if session.has(protocol::CONFIG) {
            session.offer.config = session.read_config(wake)?;
            if session.has(protocol::BACKEND_REQ) {
                let theirs = session.connection.open_back_channel()?;
                session.tell(Request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()], wake)?;
            }
        }
        Ok(session)
    }

    fn has(&self, feature: u64) -> bool {
        self.protocol & feature != 0
    }

    /// Asks for a number.
    fn ask(&self, request: Request, wake: &Wake) -> Result<u64, LinkError> {
        self.connection.send(request, 0, &[], &[], wake)?;
        self.number(request, wake)
    }

    fn number(&self, request: Request, wake: &Wake) -> Result<u64, LinkError> {
        let payload = self.connection.receive(request, wake)?;
        match <[u8; 8]>::try_from(payload.as_slice()) {
            Ok(bytes) => Ok(u64::from_le_bytes(bytes)),
            Err(_) => Err(LinkError::Nonsense(format!(
                "its answer to {} has {} bytes, not 8",
                request.name(),
                payload.len()
            ))),
        }
    }

    /// Gives an order, and waits until it is carried out where the daemon can tell.
    fn tell(&self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>], wake: &Wake) -> Result<(), LinkError> {
        if !self.has(protocol::REPLY_ACK) {
            return self.connection.send(request, 0, payload, fds, wake);
        }
        self.connection.send(request, NEED_REPLY, payload, fds, wake)?;
        match self.number(request, wake)? {
            0 => Ok(()),
            _ => Err(LinkError::Failed(request.name())),
        }
    }

    /// Reads the configuration space.
    fn read_config(&self, wake: &Wake) -> Result<Vec<u8>, LinkError> {
        let question = message::config(0, &vec![0; self.config_length]);
        self.connection.send(Request::GET_CONFIG, 0, &question, &[], wake)?;
        let mut answer = self.connection.receive(Request::GET_CONFIG, wake)?;
        if answer.len() != question.len() || answer[..CONFIG_HEAD] != question[..CONFIG_HEAD] {
            return Err(LinkError::Nonsense(format!(
                "asked for {} bytes of its configuration space it answered {} bytes",
                self.config_length,
                answer.len().saturating_sub(CONFIG_HEAD)
            )));
        }
        Ok(answer.split_off(CONFIG_HEAD))
    }

    /// Reads the configuration space again.
    pub(crate) fn refresh(&mut self, wake: &Wake) -> Result<(), LinkError> {
        if self.has(protocol::CONFIG) {
            self.offer.config = self.read_config(wake)?;
        }
        Ok(())
    }

    /// Writes `byte` at `at` of the configuration space, if it is another one there.
    pub(crate) fn write_config(&mut self, at: usize, byte: u8, wake: &Wake) -> Result<(), LinkError> {
        if self.offer.config.get(at).is_none_or(|now| *now == byte) {
            return Ok(());
        }
        self.tell(Request::SET_CONFIG, &message::config(at as u32, &[byte]), &[], wake)?;
        if let Some(now) = self.offer.config.get_mut(at) {
            *now = byte;
        }
        Ok(())
    }

    /// Tells what the driver agreed to, as far as it concerns the daemon: the rings it sees are the relay's.
    pub(crate) fn set_features(&self, features: u64, wake: &Wake) -> Result<(), LinkError> {
        let features = features & self.offer.features & !RING_FEATURES | PROTOCOL_FEATURES;
        self.tell(Request::SET_FEATURES, &message::numbers(&[features]), &[], wake)
    }

    /// Shares memory with the daemon.
    pub(crate) fn share(&self, memories: &[&GuestMemory], wake: &Wake) -> Result<(), LinkError> {
        let mut regions = Vec::new();
        let mut files: Vec<BorrowedFd<'_>> = Vec::new();
        for region in memories.iter().flat_map(|memory| memory.iter()) {
            let backing = region.file_offset().ok_or_else(|| {
                LinkError::Unfit("the guest's memory cannot be shared with it; set shared=on for --memory".into())
            })?;
            regions.push(Region {
                gpa: region.start_addr().0,
                size: region.len(),
                offset: backing.start(),
            });
            files.push(backing.file().as_fd());
        }
        let count = regions.len();
        if !self.has(protocol::CONFIGURE_MEM_SLOTS) {
            if count > MAX_REGIONS {
                return Err(LinkError::Unfit(format!(
                    "the memory has {count} parts, it takes {MAX_REGIONS}"
                )));
            }
            return self.tell(Request::SET_MEM_TABLE, &message::memory_table(&regions), &files, wake);
        }
        let slots = self.ask(Request::GET_MAX_MEM_SLOTS, wake)?;
        if slots < count as u64 {
            return Err(LinkError::Unfit(format!(
                "the memory has {count} parts, it takes {slots}"
            )));
        }
        for (region, file) in regions.into_iter().zip(files) {
            self.tell(Request::ADD_MEM_REG, &message::memory_region(region), &[file], wake)?;
        }
        Ok(())
    }

    /// Hands a ring to the daemon, from its first entry on.
    pub(crate) fn start(&self, ring: &Ring<'_>, wake: &Wake) -> Result<(), LinkError> {
        let Ring { index, size, .. } = *ring;
        let number = |n: u32| message::ring_state(index, n);
        let addresses = message::ring_addresses(index, ring.descriptors, ring.used, ring.available);
        let which = message::numbers(&[u64::from(index)]);
        self.tell(Request::SET_VRING_NUM, &number(size.into()), &[], wake)?;
        self.tell(Request::SET_VRING_ADDR, &addresses, &[], wake)?;
        self.tell(Request::SET_VRING_BASE, &number(0), &[], wake)?;
        self.tell(Request::SET_VRING_CALL, &which, &[ring.call.as_fd()], wake)?;
        self.tell(Request::SET_VRING_KICK, &which, &[ring.kick.as_fd()], wake)?;
        self.tell(Request::SET_VRING_ENABLE, &number(1), &[], wake)
    }

    /// Takes a ring back.
    pub(crate) fn stop(&self, index: u16, wake: &Wake) -> Result<(), LinkError> {
        let request = Request::GET_VRING_BASE;
        self.connection
            .send(request, 0, &message::ring_state(index, 0), &[], wake)?;
        let answer = self.connection.receive(request, wake)?;
        if answer.len() != 8 || answer[..4] != u32::from(index).to_le_bytes() {
            return Err(LinkError::nonsense(
                "its answer to GET_VRING_BASE is about no such ring",
            ));
        }
        Ok(())
    }

    /// The driver works, or does no longer.
    pub(crate) fn set_status(&self, ready: bool, wake: &Wake) -> Result<(), LinkError> {
        if !ready && self.has(protocol::RESET_DEVICE) {
            self.tell(Request::RESET_DEVICE, &[], &[], wake)?;
        }
        if !self.has(protocol::STATUS) {
            return Ok(());
        }
        let status = if ready { STATUS_READY } else { 0 };
        self.tell(Request::SET_STATUS, &message::numbers(&[status]), &[], wake)
    }

    /// Looks at what came without being asked for.
    pub(crate) fn look(&self) -> Result<(), LinkError> {
        self.connection.look()
    }

    /// Whether the daemon said since the last call that its configuration space changed.
    pub(crate) fn config_changed(&self) -> bool {
        self.connection.config_changed()
    }

    /// What to wait on.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.connection.sockets()
    }
}

/// A GPA that no memory has, with room for more behind it: a whole number of 2 MiB.
pub(crate) fn beyond(memory: &GuestMemory) -> GuestAddress {
    let last = memory.iter().map(|region| region.last_addr().0).max().unwrap_or(0);
    GuestAddress((last / (2 << 20) + 1) * (2 << 20))
}
