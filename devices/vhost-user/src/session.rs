//! One connection to a daemon, from the first question to running rings.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use triarch_device_core::Event;
use triarch_memory::GuestMemory;
use triarch_vhost_protocol::{
    ConfigRange, LOG_ALL, NEED_REPLY, PROTOCOL_FEATURES, Payload, Reader, Region, Request, StateAnswer, StateTransfer,
    TABLE_REGIONS, VringAddress, VringFd, VringState, protocol,
};
use triarch_virtio::feature;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::connection::{Connection, Wake};
use crate::inflight::Inflight;
use crate::kind::{Kind, Offer, Setting};
use crate::{DataPath, LinkError, PageLog, StateError};

/// Protocol features that are asked for with every kind of device.
const WANTED: u64 = protocol::COMMON | protocol::DEVICE_STATE;

/// Most bytes of memory of the VMM's own that a daemon is shown.
pub(crate) const OWN_SIZE: u64 = 256 << 20;

/// Where daemons find memory of the VMM's own: where `guest` has devices and no memory ever comes, so below 4 GiB. Daemons want the log of
/// what they write to reach that far, and it has a bit for each page from 0 on.
pub(crate) fn own_memory(guest: &GuestMemory) -> GuestAddress {
    // Memory begins at 0 and leaves out the last GiB, or it begins with the second GiB.
    let first = guest.iter().map(|region| region.start_addr().0).min().unwrap_or(0);
    GuestAddress(if first < 1 << 30 { 0xd000_0000 } else { 0x1000_0000 })
}

/// device_status of a driver that works (virtio 1.2, 2.1).
const STATUS_READY: u64 = 1 | 2 | 4 | 8;
/// The bit of it that says so (DRIVER_OK).
const STATUS_WORKS: u64 = 4;
/// How long a daemon may take to make durable what was written, when it lets go of a disk.
const FLUSH: Duration = Duration::from_secs(30);

/// A ring that is handed to the daemon.
pub(crate) struct Ring<'a> {
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    /// It is in guest memory, where writes are logged if any are.
    pub(crate) logged: bool,
    /// The first entry of the available ring to look at.
    pub(crate) base: u16,
    pub(crate) kick: BorrowedFd<'a>,
    pub(crate) call: BorrowedFd<'a>,
}

/// What a daemon is asked for.
pub(crate) struct Terms<'a> {
    pub(crate) kind: &'a dyn Kind,
    pub(crate) data_path: DataPath,
    /// Features that guests were offered before; 0 if there was none.
    pub(crate) shown: u64,
}

impl Terms<'_> {
    /// Whether a daemon with these virtio and protocol features is to work on the guest's rings.
    fn direct(&self, features: u64, protocol: u64) -> Result<bool, LinkError> {
        let reason = if self.kind.needs_record() && protocol & protocol::INFLIGHT_SHMFD == 0 {
            "it does not keep a record of requests in flight (protocol feature INFLIGHT_SHMFD), which datapath=direct needs"
        } else if self.shown & !features & feature::EVENT_IDX != 0 {
            "it does not offer VIRTIO_F_EVENT_IDX, which the guest was offered"
        } else {
            return Ok(self.data_path != DataPath::Relay);
        };
        match self.data_path {
            DataPath::Direct => Err(LinkError::Unfit(reason.into())),
            DataPath::Auto | DataPath::Relay => Ok(false),
        }
    }
}

/// A daemon that was asked what it offers.
pub(crate) struct Session {
    connection: Connection,
    protocol: u64,
    /// Features of the daemon itself.
    features: u64,
    /// Memory it has.
    shared: Vec<Region>,
    /// It logs which pages it writes.
    logging: bool,
    /// Its state is on its way, in one direction or the other.
    transfers: bool,
    /// It can work on the guest's rings, and shall.
    pub(crate) direct: bool,
    /// What guests can be offered with it.
    pub(crate) offer: Offer,
    /// Bytes of the configuration space that are asked for.
    config_length: usize,
    /// Of the rings it has: whether it was told to work on them.
    enabled: Vec<Option<bool>>,
}

impl Session {
    /// Asks for everything there is to know before a driver comes.
    pub(crate) fn open(connection: Connection, terms: &Terms<'_>, wake: &Wake) -> Result<Self, LinkError> {
        let offer = Offer {
            features: 0,
            queues: 1,
            config: Vec::new(),
        };
        let mut session = Self {
            connection,
            protocol: 0,
            features: 0,
            shared: Vec::new(),
            logging: false,
            transfers: false,
            direct: false,
            offer,
            config_length: terms.kind.config_length(),
            enabled: vec![None; terms.kind.queue_sizes().len()],
        };
        session.features = session.ask(Request::GET_FEATURES, wake)?;
        let mut offered = 0;
        if session.features & PROTOCOL_FEATURES != 0 {
            offered = session.ask(Request::GET_PROTOCOL_FEATURES, wake)?;
        }
        session.direct = terms.direct(session.features, offered)?;
        session.offer.features = session.features | feature::RING_RESET;
        if !session.direct {
            // The relay does that itself.
            session.offer.features |= feature::EVENT_IDX;
        }
        if session.features & PROTOCOL_FEATURES != 0 {
            let mut unused = 0;
            if session.config_length == 0 && !terms.kind.asks() {
                unused |= protocol::CONFIG;
            }
            if !session.direct || !terms.kind.needs_record() {
                unused |= protocol::INFLIGHT_SHMFD;
            }
            let chosen = offered & (WANTED | terms.kind.protocol()) & !unused;
            let payload = chosen.encode();
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
            session.refresh(wake)?;
            if session.has(protocol::BACKEND_REQ) {
                let theirs = session.connection.open_back_channel()?;
                session.tell(Request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()], wake)?;
            }
        }
        Ok(session)
    }

    /// Whether these protocol features were agreed on.
    fn has(&self, features: u64) -> bool {
        self.protocol & features == features
    }

    /// Asks for a number.
    fn ask(&self, request: Request, wake: &Wake) -> Result<u64, LinkError> {
        self.connection.send(request, 0, &[], &[], wake)?;
        self.number(request, wake)
    }

    fn number(&self, request: Request, wake: &Wake) -> Result<u64, LinkError> {
        let payload = self.connection.receive(request, wake)?;
        eight_bytes(request, &payload)
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

    /// Reads the first `length` bytes of the configuration space; none if the daemon has not as many. It is always read from its beginning:
    /// daemons made with QEMU's libvhost-user answer with that, whichever place they are asked for.
    pub(crate) fn read_config(&self, length: usize, wake: &Wake) -> Result<Vec<u8>, LinkError> {
        if !self.has(protocol::CONFIG) || length == 0 {
            return Ok(Vec::new());
        }
        let question = ConfigRange::encode_with(0, &vec![0; length]);
        self.connection.send(Request::GET_CONFIG, 0, &question, &[], wake)?;
        let mut answer = self.connection.receive(Request::GET_CONFIG, wake)?;
        if answer.is_empty() {
            // So daemons say that they cannot.
            return Ok(answer);
        }
        if answer.len() != question.len() || answer[..ConfigRange::BYTES] != question[..ConfigRange::BYTES] {
            return Err(LinkError::Nonsense(format!(
                "asked for {length} bytes of its configuration space it answered {} bytes",
                answer.len().saturating_sub(ConfigRange::BYTES)
            )));
        }
        Ok(answer.split_off(ConfigRange::BYTES))
    }

    /// Reads the configuration space again.
    pub(crate) fn refresh(&mut self, wake: &Wake) -> Result<(), LinkError> {
        self.offer.config = self.read_config(self.config_length, wake)?;
        Ok(())
    }

    /// Writes `data` at `at` of the configuration space, if the daemon has one.
    pub(crate) fn set_config(&self, at: u32, data: &[u8], wake: &Wake) -> Result<(), LinkError> {
        match self.has(protocol::CONFIG) {
            true => self.tell(Request::SET_CONFIG, &ConfigRange::encode_with(at, data), &[], wake),
            false => Ok(()),
        }
    }

    /// Writes `byte` at `at` of the configuration space, if it is another one there.
    pub(crate) fn write_config(&mut self, at: usize, byte: u8, wake: &Wake) -> Result<(), LinkError> {
        if self.offer.config.get(at).is_none_or(|now| *now == byte) {
            return Ok(());
        }
        self.set_config(at as u32, &[byte], wake)?;
        if let Some(now) = self.offer.config.get_mut(at) {
            *now = byte;
        }
        Ok(())
    }

    /// Tells what the driver agreed to, as far as it concerns the daemon: of the relay's rings it needs to know nothing.
    pub(crate) fn set_features(&self, features: u64, wake: &Wake) -> Result<(), LinkError> {
        let relayed = if self.direct { 0 } else { feature::EVENT_IDX };
        let mut features = features & self.features & !(relayed | feature::RING_RESET) | PROTOCOL_FEATURES;
        if self.logging {
            features |= LOG_ALL;
        }
        self.tell(Request::SET_FEATURES, &features.encode(), &[], wake)
    }

    /// Tells the daemon which memory it has from now on. What it was told before and is there no more is taken from it.
    pub(crate) fn share(&mut self, memories: &[&GuestMemory], wake: &Wake) -> Result<(), LinkError> {
        let mut regions = Vec::new();
        let mut files: Vec<BorrowedFd<'_>> = Vec::new();
        for region in memories.iter().flat_map(|memory| memory.iter()) {
            let backing = region.file_offset().ok_or_else(|| {
                LinkError::Unfit("the guest's memory cannot be shared with it; set shared=on for --memory".into())
            })?;
            let gpa = region.start_addr().0;
            regions.push(Region {
                gpa,
                size: region.len(),
                // It only has to be the same here and in addresses of rings. So no daemon learns where the VMM has its memory.
                user: gpa,
                offset: backing.start(),
            });
            files.push(backing.file().as_fd());
        }
        let count = regions.len();
        if !self.has(protocol::CONFIGURE_MEM_SLOTS) {
            if count > TABLE_REGIONS {
                return Err(LinkError::Unfit(format!(
                    "the memory has {count} parts, it takes {TABLE_REGIONS}"
                )));
            }
            self.tell(Request::SET_MEM_TABLE, &regions.encode(), &files, wake)?;
            self.shared = regions;
            return Ok(());
        }
        let slots = self.ask(Request::GET_MAX_MEM_SLOTS, wake)?;
        if slots < count as u64 {
            return Err(LinkError::Unfit(format!(
                "the memory has {count} parts, it takes {slots}"
            )));
        }
        // One that does not take everything has what it was told until then.
        while let Some(at) = self.shared.iter().position(|region| !regions.contains(region)) {
            let gone = self.shared.remove(at);
            self.tell(Request::REM_MEM_REG, &gone.encode_single(), &[], wake)?;
        }
        for (region, file) in regions.into_iter().zip(files) {
            if !self.shared.contains(&region) {
                self.tell(Request::ADD_MEM_REG, &region.encode_single(), &[file], wake)?;
                self.shared.push(region);
            }
        }
        Ok(())
    }

    /// As [`share`](Self::share), while rings run: when it returns, the daemon has the memory, also one that acknowledges nothing.
    pub(crate) fn share_while_running(&mut self, memories: &[&GuestMemory], wake: &Wake) -> Result<(), LinkError> {
        self.share(memories, wake)?;
        if !self.has(protocol::REPLY_ACK) {
            // It answers one thing after the other.
            self.ask(Request::GET_FEATURES, wake)?;
        }
        Ok(())
    }

    /// Tells the daemon these numbers, as far as it understands them.
    pub(crate) fn set(&self, settings: Vec<Setting>, wake: &Wake) -> Result<(), LinkError> {
        let understood = settings.into_iter().filter(|setting| self.has(setting.needs));
        let mut told = understood.map(|s| self.tell(s.request, &s.value.encode(), &[], wake));
        told.try_for_each(|done| done)
    }

    /// Lets the daemon work on ring `index`, or not.
    pub(crate) fn enable(&mut self, index: u16, on: bool, wake: &Wake) -> Result<(), LinkError> {
        match self.enabled.get_mut(usize::from(index)) {
            Some(Some(now)) if *now != on => *now = on,
            _ => return Ok(()),
        }
        let state = ring_state(index, on.into());
        self.tell(Request::SET_VRING_ENABLE, &state, &[], wake)
    }

    /// Lets the daemon know how many rings there may be, before it has the first of them. DPDK counts those that it was told anything of
    /// when the first pair works, and Open vSwitch never looks at others; QEMU, too, begins with a descriptor for each one's interrupts.
    pub(crate) fn announce(&self, rings: u16, wake: &Wake) -> Result<(), LinkError> {
        // The one that counts comes when the ring starts.
        let unused = Event::new().map_err(LinkError::host("an event for the rings to come"))?;
        (0..rings).try_for_each(|index| self.set_call(index, unused.as_fd(), wake))
    }

    /// Hands a ring to the daemon. It works on it once that is enabled.
    pub(crate) fn start(&mut self, ring: &Ring<'_>, wake: &Wake) -> Result<(), LinkError> {
        let Ring { index, size, .. } = *ring;
        let number = |n: u32| ring_state(index, n);
        let which = VringFd { index, none: false }.encode();
        self.tell(Request::SET_VRING_NUM, &number(size.into()), &[], wake)?;
        self.set_addresses(ring, wake)?;
        self.tell(Request::SET_VRING_BASE, &number(ring.base.into()), &[], wake)?;
        self.set_call(index, ring.call, wake)?;
        self.tell(Request::SET_VRING_KICK, &which, &[ring.kick], wake)?;
        if let Some(enabled) = self.enabled.get_mut(usize::from(index)) {
            *enabled = Some(false);
        }
        Ok(())
    }

    /// Tells where a ring is, and whether writes to it are logged.
    pub(crate) fn set_addresses(&self, ring: &Ring<'_>, wake: &Wake) -> Result<(), LinkError> {
        let log = self.logging && ring.logged;
        let addresses = VringAddress {
            index: ring.index.into(),
            flags: if log { VringAddress::LOG } else { 0 },
            descriptors: ring.descriptors,
            used: ring.used,
            available: ring.available,
            log: if log { ring.used } else { 0 },
        };
        self.tell(Request::SET_VRING_ADDR, &addresses.encode(), &[], wake)
    }

    /// Whether the daemon can log which pages it writes.
    pub(crate) fn check_log(&self) -> Result<(), LinkError> {
        match self.has(protocol::LOG_SHMFD) && self.features & LOG_ALL != 0 {
            true => Ok(()),
            false => Err(LinkError::Unfit(
                "it cannot log which pages it writes (LOG_SHMFD, VHOST_F_LOG_ALL), which migration needs".into(),
            )),
        }
    }

    /// Has the daemon log the pages it writes from now on, or no longer. [`set_features`](Self::set_features) and
    /// [`set_addresses`](Self::set_addresses) of all rings make it so.
    pub(crate) fn set_log(&mut self, log: Option<&PageLog>, wake: &Wake) -> Result<(), LinkError> {
        self.logging = false;
        let Some(log) = log else { return Ok(()) };
        self.check_log()?;
        let files: Vec<_> = log.file().into_iter().collect();
        let request = Request::SET_LOG_BASE;
        self.connection.send(request, 0, &log.payload(), &files, wake)?;
        // Daemons differ in what they put into their answer.
        self.connection.receive(request, wake)?;
        self.logging = true;
        self.set_log_event(log, wake)
    }

    /// Tells what to ring when pages were marked. The message is an optional one, which some daemons do not know, or end the connection
    /// over. So only one is told that says whether it worked, and none after one that ended it.
    fn set_log_event(&self, log: &PageLog, wake: &Wake) -> Result<(), LinkError> {
        let Some(event) = log.written().filter(|_| self.has(protocol::REPLY_ACK)) else {
            return Ok(());
        };
        match self.tell(Request::SET_LOG_FD, &[], &[event], wake) {
            // Whoever reads the log looks by itself, then.
            Err(LinkError::Failed(_)) => Ok(()),
            Err(error) if !matches!(error, LinkError::Interrupted) => {
                log.keep_silent();
                Err(error)
            }
            done => done,
        }
    }

    /// Gives a ring another event for completions.
    pub(crate) fn set_call(&self, index: u16, call: BorrowedFd<'_>, wake: &Wake) -> Result<(), LinkError> {
        let which = VringFd { index, none: false }.encode();
        self.tell(Request::SET_VRING_CALL, &which, &[call], wake)
    }

    /// Takes a ring back. Returns how many entries of its available ring the daemon has taken, modulo 2^16.
    pub(crate) fn stop(&mut self, index: u16, wake: &Wake) -> Result<u16, LinkError> {
        if let Some(enabled) = self.enabled.get_mut(usize::from(index)) {
            *enabled = None;
        }
        let request = Request::GET_VRING_BASE;
        self.connection.send(request, 0, &ring_state(index, 0), &[], wake)?;
        let answer = self.connection.receive(request, wake)?;
        let state = VringState::read(&mut Reader::new(&answer)).filter(|_| answer.len() == 8);
        match state {
            // Rings count modulo 2^16.
            Some(state) if state.index == u32::from(index) => Ok(state.number as u16),
            _ => Err(LinkError::nonsense(
                "its answer to GET_VRING_BASE is about no such ring",
            )),
        }
    }

    /// Asks for a record of requests in flight, for queues of at most these sizes.
    pub(crate) fn new_record(&self, sizes: &[u16], wake: &Wake) -> Result<Inflight, LinkError> {
        let (queues, queue_size) = (sizes.len() as u16, sizes.iter().copied().max().unwrap_or(0));
        let request = Request::GET_INFLIGHT_FD;
        let question = Inflight::question(queues, queue_size);
        self.connection.send(request, 0, &question, &[], wake)?;
        let (answer, file) = self.connection.receive_with(request, wake)?;
        let file = file.ok_or_else(|| LinkError::nonsense("its record of requests in flight has no memory"))?;
        Inflight::adopt(&answer, file, queues, queue_size)
    }

    /// Hands a record of requests in flight to the daemon, before any ring.
    pub(crate) fn set_record(&self, record: &Inflight, wake: &Wake) -> Result<(), LinkError> {
        self.tell(Request::SET_INFLIGHT_FD, &record.payload(), &[record.file()], wake)
    }

    /// Agrees on a channel for the daemon's state, `channel` or the one it answers with. No ring may run.
    pub(crate) fn begin_state(
        &mut self,
        transfer: StateTransfer,
        channel: BorrowedFd<'_>,
        wake: &Wake,
    ) -> Result<Option<OwnedFd>, StateError> {
        if !self.has(protocol::DEVICE_STATE) {
            return Err(StateError::Unable);
        }
        let request = Request::SET_DEVICE_STATE_FD;
        self.connection.send(request, 0, &transfer.encode(), &[channel], wake)?;
        let (payload, file) = self.connection.receive_with(request, wake)?;
        let answer: StateAnswer = eight_bytes(request, &payload)?;
        match (answer.error, answer.none, file) {
            (0, true, None) => {
                self.transfers = true;
                Ok(None)
            }
            (0, false, Some(file)) => {
                self.transfers = true;
                Ok(Some(file))
            }
            // Then it does not matter whether the other bit is set.
            (1.., _, None) => Err(StateError::Refused),
            _ => Err(LinkError::nonsense(
                "its answer to SET_DEVICE_STATE_FD and its descriptors contradict each other",
            )
            .into()),
        }
    }

    /// Asks whether the daemon transferred its state, and waits `patience` for the answer.
    pub(crate) fn check_state(&mut self, patience: Duration, wake: &Wake) -> Result<(), StateError> {
        if !self.end_state() {
            return Err(StateError::Lost);
        }
        let request = Request::CHECK_DEVICE_STATE;
        self.connection.send(request, 0, &[], &[], wake)?;
        let payload = self.connection.receive_within(request, patience, wake)?;
        match eight_bytes(request, &payload)? {
            0u64 => Ok(()),
            _ => Err(StateError::Failed),
        }
    }

    /// Whether this is the daemon whose state was on its way. It is no longer.
    pub(crate) fn end_state(&mut self) -> bool {
        std::mem::take(&mut self.transfers)
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
        self.tell(Request::SET_STATUS, &status.encode(), &[], wake)
    }

    /// Has the daemon take what only one may have, which it holds while a driver works; or let go of it, with the driver still there. So
    /// our own daemons read DRIVER_OK: no driver ever takes back that bit alone.
    pub(crate) fn keep(&self, on: bool, wake: &Wake) -> Result<(), LinkError> {
        if !self.has(protocol::STATUS | protocol::REPLY_ACK) {
            return Ok(());
        }
        self.order_status(STATUS_READY, wake)?;
        match on {
            true => Ok(()),
            false => self.order_status(STATUS_READY & !STATUS_WORKS, wake),
        }
    }

    fn order_status(&self, status: u64, wake: &Wake) -> Result<(), LinkError> {
        let request = Request::SET_STATUS;
        self.connection.send(request, NEED_REPLY, &status.encode(), &[], wake)?;
        let payload = self.connection.receive_within(request, FLUSH, wake)?;
        match eight_bytes(request, &payload)? {
            0u64 => Ok(()),
            _ => Err(LinkError::Failed(request.name())),
        }
    }

    /// Whether the daemon can hand its state over.
    pub(crate) fn hands_over(&self) -> bool {
        self.has(protocol::DEVICE_STATE)
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

/// What the answer to `request` says.
fn eight_bytes<T: Payload>(request: Request, payload: &[u8]) -> Result<T, LinkError> {
    let number = T::read(&mut Reader::new(payload)).filter(|_| payload.len() == 8);
    number.ok_or_else(|| {
        let (name, bytes) = (request.name(), payload.len());
        LinkError::Nonsense(format!("its answer to {name} has {bytes} bytes, not 8"))
    })
}

/// Payload of requests with a number for ring `index`.
fn ring_state(index: u16, number: u32) -> Vec<u8> {
    let index = index.into();
    VringState { index, number }.encode()
}
