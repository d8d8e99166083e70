//! One connection of a front end: its requests, one after the other.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use triarch_device_core::Sandbox;
use triarch_virtio::{ActivateError, DeviceContext, QueueLayout, QueueStateV1, RingFault, VirtQueue, VirtioInterrupt};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::call::Calls;
use super::channel::{Channel, ChannelError, Message};
use super::dirty::{self, DirtyLog, LogError};
use super::fd;
use super::inflight::{Inflight, InflightError, Shape};
use super::memory::{MAX_REGIONS, MemoryError, MemoryTable};
use super::message::{self, NEED_REPLY, NO_FD, Reader, Region, Request, feature, protocol};
use super::ring::{Addresses, Ring};
use super::served::Served;

/// Longest ring.
const MAX_RING: u16 = 1024;
/// Bytes of a configuration space, as far as the protocol goes.
const MAX_CONFIG: u32 = 256;
/// How often marks are moved into a log while there is one.
const LOG_PERIOD: Duration = Duration::from_millis(50);

/// Why a request, or a connection, failed.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The connection.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// A request is none, or not now.
    #[error("{request}: {what}")]
    Request {
        /// Its name or number.
        request: String,
        /// What is wrong.
        what: &'static str,
    },
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The log.
    #[error("cannot map the log of written pages")]
    Log(#[source] LogError),
    /// The inflight region.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// A ring cannot be used.
    #[error("ring {index} cannot be used")]
    Ring {
        /// Its number.
        index: u16,
        /// Why.
        #[source]
        source: RingFault,
    },
    /// The device refuses.
    #[error("the device cannot start")]
    Device(#[from] ActivateError),
    /// A descriptor that came is unusable.
    #[error("a descriptor of {request} is unusable")]
    Descriptor {
        /// The request's name.
        request: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What a session did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SessionStats {
    /// Requests of the guest that an earlier back end had not finished, done again.
    pub resubmitted: u64,
}

/// What is answered.
enum Answer {
    /// Nothing but, where it was asked for, that it worked.
    Done,
    Payload(Vec<u8>),
    WithFd(Vec<u8>, OwnedFd),
}

fn number(value: u64) -> Answer {
    Answer::Payload(value.to_le_bytes().to_vec())
}

/// A front end and the device it uses. Dropped, the device is idle again.
pub struct Session<'a> {
    channel: Channel,
    device: &'a mut dyn Served,
    sandbox: Arc<dyn Sandbox>,
    calls: Arc<Calls>,
    memory: MemoryTable,
    rings: Vec<Ring>,
    features: u64,
    protocol: u64,
    active: bool,
    status: u8,
    inflight: Option<Inflight>,
    log: Option<DirtyLog>,
    /// Readable when what the front end shared is gone.
    lost: Option<Arc<EventFd>>,
    stats: SessionStats,
}

impl<'a> Session<'a> {
    /// A session on `socket`, which is connected and does not block, for `device`, which is idle.
    pub fn new(socket: OwnedFd, device: &'a mut dyn Served, sandbox: Arc<dyn Sandbox>) -> Self {
        let queues = device.queue_sizes().len();
        // Without one, only memory is taken that nobody can take away.
        let lost = EventFd::new(EFD_NONBLOCK).ok().map(Arc::new);
        Self {
            channel: Channel::new(socket, lost.clone()),
            device,
            sandbox,
            calls: Arc::new(Calls::new(queues)),
            memory: MemoryTable::new(lost.clone()),
            lost,
            rings: (0..queues).map(|_| Ring::default()).collect(),
            features: 0,
            protocol: 0,
            active: false,
            status: 0,
            inflight: None,
            log: None,
            stats: SessionStats::default(),
        }
    }

    /// Serves until the front end leaves, says nonsense, or `stop` becomes readable. What is in flight is finished before it returns.
    pub fn run(&mut self, stop: BorrowedFd<'_>) -> SessionError {
        let error = loop {
            match self.step(stop) {
                Ok(()) => {}
                Err(error) => break error,
            }
        };
        self.end();
        error
    }

    /// What it did so far.
    pub fn stats(&self) -> SessionStats {
        self.stats
    }

    fn step(&mut self, stop: BorrowedFd<'_>) -> Result<(), SessionError> {
        let period = self.logging().map(|_| LOG_PERIOD);
        let Some(message) = self.channel.receive(stop, period)? else {
            self.collect();
            return Ok(());
        };
        let wants = message.flags & NEED_REPLY != 0 && self.protocol & protocol::REPLY_ACK != 0;
        let number = message.request;
        let question = Request::of(number).is_some_and(Request::is_question);
        match self.handle(message) {
            Ok(Answer::Payload(payload)) => self.channel.answer(number, &payload, None, stop)?,
            Ok(Answer::WithFd(payload, fd)) => self.channel.answer(number, &payload, Some(fd.as_fd()), stop)?,
            Ok(Answer::Done) if wants => self.channel.answer(number, &0u64.to_le_bytes(), None, stop)?,
            Ok(Answer::Done) => {}
            // A front end that hears of it decides what follows.
            Err(error) if wants && !question => {
                tracing::debug!("refused: {}", triarch_api::chain(&error));
                self.channel.answer(number, &1u64.to_le_bytes(), None, stop)?;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn handle(&mut self, message: Message) -> Result<Answer, SessionError> {
        use Request::*;
        let number = message.request;
        let Some(request) = Request::of(number) else {
            return Err(SessionError::Request {
                request: format!("message {number}"),
                what: "this back end does not know it",
            });
        };
        self.check_negotiated(request)?;
        let ask = Ask {
            request,
            payload: &message.payload,
            fds: message.fds,
        };
        match request {
            GET_FEATURES => {
                let offered = self.device.features() | feature::PROTOCOL_FEATURES | feature::LOG_ALL;
                return Ok(self::number(offered));
            }
            SET_FEATURES => self.set_features(ask)?,
            SET_OWNER => {}
            RESET_OWNER => self.stop_all(),
            RESET_DEVICE => self.reset(),
            SET_MEM_TABLE => self.set_memory(ask)?,
            ADD_MEM_REG => {
                let (region, fd) = (ask.region()?, ask.only_fd()?);
                self.memory.add(region, fd)?;
            }
            REM_MEM_REG => {
                let region = ask.region()?;
                self.between_requests(|session| Ok(session.memory.remove(&region)?))?;
            }
            GET_MAX_MEM_SLOTS => return Ok(self::number(MAX_REGIONS as u64)),
            SET_LOG_BASE => return self.set_log(ask),
            // It would be signalled for each change of the log; front ends look by themselves.
            SET_LOG_FD => {}
            SET_VRING_NUM | SET_VRING_ADDR | SET_VRING_BASE | SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR
            | SET_VRING_ENABLE => self.set_ring(ask)?,
            GET_VRING_BASE => return self.take_ring(&ask),
            GET_PROTOCOL_FEATURES => return Ok(self::number(self.device.protocol())),
            SET_PROTOCOL_FEATURES => {
                let wanted = ask.numbers().u64().ok_or_else(|| ask.short())?;
                if wanted & !self.device.protocol() != 0 {
                    return Err(ask.wrong("it wants features that were not offered"));
                }
                self.protocol = wanted;
            }
            // Of network devices, some front ends take it for a number of pairs, and then refuse less than they need, not more.
            GET_QUEUE_NUM => return Ok(self::number(self.rings.len() as u64)),
            SEND_RARP => {
                let mac = ask.payload.first_chunk().ok_or_else(|| ask.short())?;
                self.device.announce(*mac);
            }
            // What is sent is limited by what the administrator said, not by what a front end says.
            NET_SET_MTU => {}
            SET_BACKEND_REQ_FD => {
                let socket = ask.only_fd()?;
                self.calls.set_back_channel(socket);
            }
            GET_CONFIG => return self.get_config(&ask),
            SET_CONFIG => self.set_config(&ask)?,
            GET_INFLIGHT_FD => return self.get_inflight(&ask),
            SET_INFLIGHT_FD => self.set_inflight(ask)?,
            SET_STATUS => self.set_status(ask.numbers().u64().ok_or_else(|| ask.short())?),
            GET_STATUS => return Ok(self::number(self.status.into())),
        }
        Ok(Answer::Done)
    }

    /// Whether a request that belongs to a protocol feature may come.
    fn check_negotiated(&self, request: Request) -> Result<(), SessionError> {
        use Request::*;
        let needed = match request {
            GET_QUEUE_NUM => protocol::MQ,
            SET_LOG_BASE | SET_LOG_FD => protocol::LOG_SHMFD,
            SET_BACKEND_REQ_FD => protocol::BACKEND_REQ,
            GET_CONFIG | SET_CONFIG => protocol::CONFIG,
            GET_INFLIGHT_FD | SET_INFLIGHT_FD => protocol::INFLIGHT_SHMFD,
            RESET_DEVICE => protocol::RESET_DEVICE,
            GET_MAX_MEM_SLOTS | ADD_MEM_REG | REM_MEM_REG => protocol::CONFIGURE_MEM_SLOTS,
            SET_STATUS | GET_STATUS => protocol::STATUS,
            SEND_RARP => protocol::RARP,
            NET_SET_MTU => protocol::NET_MTU,
            _ => return Ok(()),
        };
        if self.protocol & needed == 0 {
            return Err(SessionError::Request {
                request: format!("{request:?}"),
                what: "its protocol feature was not negotiated",
            });
        }
        Ok(())
    }

    fn set_features(&mut self, ask: Ask<'_>) -> Result<(), SessionError> {
        let wanted = ask.numbers().u64().ok_or_else(|| ask.short())?;
        let ours = feature::PROTOCOL_FEATURES | feature::LOG_ALL;
        if wanted & !(self.device.features() | ours) != 0 {
            return Err(ask.wrong("it wants features that were not offered"));
        }
        let was_logging = self.logging().is_some();
        let changed = (wanted ^ self.features) & !ours != 0;
        self.features = wanted;
        if !was_logging && wanted & feature::LOG_ALL != 0 {
            // What was written before does not count.
            dirty::forget(&self.memory.handle().memory());
        } else if was_logging && wanted & feature::LOG_ALL == 0 {
            self.collect();
        }
        if self.active && !changed {
            return Ok(());
        }
        self.reset_device();
        self.device.activate(DeviceContext {
            features: wanted & !ours,
            memory: self.memory.handle().clone(),
            interrupt: self.calls.clone() as Arc<dyn VirtioInterrupt>,
            sandbox: self.sandbox.clone(),
        })?;
        self.active = true;
        Ok(())
    }

    fn set_memory(&mut self, mut ask: Ask<'_>) -> Result<(), SessionError> {
        let mut numbers = ask.numbers();
        let count = numbers.u64().ok_or_else(|| ask.short())? as u32 as usize;
        if count != ask.fds.len() {
            return Err(ask.wrong("it has another number of regions than of descriptors"));
        }
        let regions: Option<Vec<_>> = (0..count).map(|_| Region::read(&mut numbers)).collect();
        let regions = regions.ok_or_else(|| ask.short())?;
        let table = regions.into_iter().zip(std::mem::take(&mut ask.fds)).collect();
        self.between_requests(|session| Ok(session.memory.set(table)?))
    }

    /// Changes something while no ring runs, and lets run again those that did.
    fn between_requests(
        &mut self,
        change: impl FnOnce(&mut Self) -> Result<(), SessionError>,
    ) -> Result<(), SessionError> {
        let running: Vec<_> = self.rings.iter().map(|ring| ring.running).collect();
        self.stop_all();
        let done = change(self);
        for (index, _) in running.iter().enumerate().filter(|(_, running)| **running) {
            self.update(index as u16)?;
        }
        done
    }

    fn set_log(&mut self, ask: Ask<'_>) -> Result<Answer, SessionError> {
        let mut numbers = ask.numbers();
        let (bytes, offset) = (numbers.u64(), numbers.u64());
        let (Some(bytes), Some(offset)) = (bytes, offset) else {
            return Err(ask.short());
        };
        let log = DirtyLog::map(ask.only_fd()?, bytes, offset, self.lost.as_ref()).map_err(SessionError::Log)?;
        // What belongs into the old one is not lost with it.
        self.collect();
        self.log = Some(log);
        Ok(number(0))
    }

    fn logging(&self) -> Option<&DirtyLog> {
        self.log.as_ref().filter(|_| self.features & feature::LOG_ALL != 0)
    }

    fn collect(&self) {
        if let Some(log) = self.logging() {
            log.collect(&self.memory.handle().memory());
        }
    }

    fn set_ring(&mut self, mut ask: Ask<'_>) -> Result<(), SessionError> {
        use Request::*;
        let mut numbers = ask.numbers();
        let with_fd = matches!(ask.request, SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR);
        let (index, value) = if with_fd {
            let bits = numbers.u64().ok_or_else(|| ask.short())?;
            (bits as u32 & 0xff, bits & NO_FD)
        } else {
            let index = numbers.u32().ok_or_else(|| ask.short())?;
            (index, u64::from(numbers.u32().ok_or_else(|| ask.short())?))
        };
        let negotiated = self.features & feature::PROTOCOL_FEATURES != 0;
        let unknown = ask.wrong("there is no such ring");
        let ring = self.rings.get_mut(index as usize).ok_or(unknown)?;
        let index = index as u16;
        match ask.request {
            SET_VRING_NUM => {
                let size = u16::try_from(value)
                    .ok()
                    .filter(|n| n.is_power_of_two() && *n <= MAX_RING);
                ring.size = size.ok_or_else(|| ask.wrong("a ring has a power of two of descriptors, 1024 at most"))?;
            }
            SET_VRING_ADDR => {
                let mut next = || numbers.u64();
                let (descriptors, used, available) = (next(), next(), next());
                let (Some(descriptors), Some(used), Some(available)) = (descriptors, used, available) else {
                    return Err(ask.short());
                };
                let addresses = Addresses {
                    descriptors,
                    used,
                    available,
                };
                // The flag that says whether the used ring is logged changes while it runs; it is logged anyway.
                if ring.running && ring.addresses != Some(addresses) {
                    return Err(ask.wrong("the ring runs"));
                }
                ring.addresses = Some(addresses);
            }
            SET_VRING_BASE => ring.base = value as u16,
            SET_VRING_ENABLE => {
                // QEMU enables the rings of a network device before it sets features.
                if value > 1 || !negotiated && self.protocol == 0 {
                    return Err(ask.wrong("it is neither 0 nor 1, or there are no protocol features"));
                }
                ring.enabled = value == 1;
                return self.update(index);
            }
            SET_VRING_KICK => {
                let event = ask.event(value)?;
                let event = event.ok_or_else(|| ask.wrong("polling a ring for ever is not supported"))?;
                if ring.running {
                    // Another descriptor for a ring that runs.
                    self.stop(index);
                }
                let ring = &mut self.rings[usize::from(index)];
                ring.kick = Some(Arc::new(event));
                ring.enabled |= !negotiated;
                return self.update(index);
            }
            SET_VRING_CALL => {
                let event = ask.event(value)?;
                self.calls.change(index.into(), |signals| signals.call = event);
                // What was completed while there was none, or one that nobody listened to any more.
                let _ = self.calls.queue(index);
            }
            _ => {
                let event = ask.event(value)?;
                self.calls.change(index.into(), |signals| signals.error = event);
            }
        }
        Ok(())
    }

    /// Starts or stops a ring, as it should be.
    fn update(&mut self, index: u16) -> Result<(), SessionError> {
        let Some(ring) = self.rings.get(usize::from(index)) else {
            return Ok(());
        };
        match (ring.ready(), ring.running) {
            (None, true) => self.stop(index),
            (Some((addresses, kick)), false) if self.active => {
                let (size, base) = (ring.size, ring.base);
                let faulty = |source| SessionError::Ring { index, source };
                let gpa = |user| self.memory.gpa(user).ok_or(faulty(RingFault::Layout));
                let layout = QueueLayout {
                    index,
                    size,
                    max_size: MAX_RING,
                    descriptors: gpa(addresses.descriptors)?,
                    driver: gpa(addresses.available)?,
                    device: gpa(addresses.used)?,
                    event_idx: self.features & triarch_virtio::feature::EVENT_IDX != 0,
                };
                let interrupt = self.calls.clone() as Arc<dyn VirtioInterrupt>;
                let mut queue =
                    VirtQueue::new(&layout, self.memory.handle().clone(), kick, interrupt).map_err(faulty)?;
                match self.inflight.as_ref().and_then(|inflight| inflight.queue(index)) {
                    Some(part) => self.stats.resubmitted += queue.track(part).map_err(faulty)? as u64,
                    None => {
                        let next_used = queue.used_index().map_err(faulty)?;
                        queue.restore(&QueueStateV1 {
                            index,
                            next_avail: base,
                            next_used,
                        });
                    }
                }
                self.device.start_queue(queue)?;
                self.rings[usize::from(index)].running = true;
            }
            _ => {}
        }
        Ok(())
    }

    /// Finishes what is in flight on a ring and takes it from the device.
    fn stop(&mut self, index: u16) {
        let Some(ring) = self.rings.get_mut(usize::from(index)).filter(|ring| ring.running) else {
            return;
        };
        if let Some(kick) = &ring.kick {
            // Should the front end have made it block meanwhile, nobody is to wait there.
            let _ = fd::unblock(fd::borrow(kick)).map(|()| kick.write(1));
        }
        if let Some(queue) = self.device.stop_queue(index) {
            ring.base = queue.state().next_avail;
        }
        ring.running = false;
    }

    fn stop_all(&mut self) {
        for index in 0..self.rings.len() {
            self.stop(index as u16);
        }
        self.collect();
    }

    /// GET_VRING_BASE: the ring is the front end's again.
    fn take_ring(&mut self, ask: &Ask<'_>) -> Result<Answer, SessionError> {
        let index = ask.numbers().u32().ok_or_else(|| ask.short())?;
        if index as usize >= self.rings.len() {
            return Err(ask.wrong("there is no such ring"));
        }
        self.stop(index as u16);
        self.collect();
        let ring = &mut self.rings[index as usize];
        ring.kick = None;
        let base = ring.base;
        self.calls.change(index as usize, |signals| signals.call = None);
        Ok(Answer::Payload(message::ring_state(index, base.into())))
    }

    fn get_config(&self, ask: &Ask<'_>) -> Result<Answer, SessionError> {
        let mut numbers = ask.numbers();
        let (Some(offset), Some(size), Some(flags)) = (numbers.u32(), numbers.u32(), numbers.u32()) else {
            return Err(ask.short());
        };
        let fits = offset.checked_add(size).is_some_and(|end| end <= MAX_CONFIG);
        // No bytes at all say that it failed.
        let size = if fits { size } else { 0 };
        let mut data = vec![0; size as usize];
        self.device.read_config(offset.into(), &mut data);
        let head = [offset, size, flags].into_iter().flat_map(u32::to_le_bytes);
        Ok(Answer::Payload(head.chain(data).collect()))
    }

    fn set_config(&mut self, ask: &Ask<'_>) -> Result<(), SessionError> {
        let mut numbers = ask.numbers();
        let (Some(offset), Some(size), Some(_)) = (numbers.u32(), numbers.u32(), numbers.u32()) else {
            return Err(ask.short());
        };
        let data = numbers.rest();
        if data.len() != size as usize {
            return Err(ask.wrong("it has another number of bytes than it says"));
        }
        self.device.write_config(offset.into(), data);
        Ok(())
    }

    fn get_inflight(&mut self, ask: &Ask<'_>) -> Result<Answer, SessionError> {
        let shape = ask.shape()?;
        let (region, shape, file) = Inflight::create(shape.queues, shape.size)?;
        self.inflight = Some(region);
        let mut payload = [shape.bytes, shape.offset].map(u64::to_le_bytes).concat();
        payload.extend([shape.queues, shape.size, 0, 0].into_iter().flat_map(u16::to_le_bytes));
        Ok(Answer::WithFd(payload, file))
    }

    fn set_inflight(&mut self, ask: Ask<'_>) -> Result<(), SessionError> {
        let shape = ask.shape()?;
        if self.rings.iter().any(|ring| ring.running) {
            return Err(ask.wrong("a ring runs"));
        }
        self.inflight = Some(Inflight::adopt(ask.only_fd()?, shape)?);
        Ok(())
    }

    fn set_status(&mut self, status: u64) {
        self.status = status as u8;
        if status == 0 {
            self.reset();
        }
    }

    /// The driver is gone. Memory and descriptors stay.
    fn reset(&mut self) {
        self.reset_device();
        self.features = 0;
        for ring in &mut self.rings {
            ring.enabled = false;
            ring.kick = None;
            ring.base = 0;
        }
    }

    fn reset_device(&mut self) {
        self.stop_all();
        if std::mem::take(&mut self.active) {
            self.device.reset();
        }
    }

    fn end(&mut self) {
        self.reset_device();
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

/// A request with what came with it.
struct Ask<'a> {
    request: Request,
    payload: &'a [u8],
    fds: Vec<OwnedFd>,
}

impl Ask<'_> {
    fn numbers(&self) -> Reader<'_> {
        Reader::new(self.payload)
    }

    fn wrong(&self, what: &'static str) -> SessionError {
        SessionError::Request {
            request: format!("{:?}", self.request),
            what,
        }
    }

    fn short(&self) -> SessionError {
        self.wrong("its payload is too short")
    }

    /// The one descriptor that must have come.
    fn only_fd(mut self) -> Result<OwnedFd, SessionError> {
        match (self.fds.pop(), self.fds.is_empty()) {
            (Some(fd), true) => Ok(fd),
            _ => Err(self.wrong("it needs exactly one descriptor")),
        }
    }

    /// The event descriptor of a ring, or none if it says so.
    fn event(&mut self, none: u64) -> Result<Option<EventFd>, SessionError> {
        match (self.fds.pop(), none != 0) {
            (None, true) => Ok(None),
            (Some(found), false) if self.fds.is_empty() => {
                let event = fd::event(found).map_err(|source| SessionError::Descriptor {
                    request: format!("{:?}", self.request),
                    source,
                })?;
                Ok(Some(event))
            }
            _ => Err(self.wrong("its descriptors are not what it says")),
        }
    }

    /// The region of ADD_MEM_REG and REM_MEM_REG.
    fn region(&self) -> Result<Region, SessionError> {
        let mut numbers = self.numbers();
        let padding = numbers.u64();
        padding
            .and_then(|_| Region::read(&mut numbers))
            .ok_or_else(|| self.short())
    }

    /// What the requests about the inflight region say.
    fn shape(&self) -> Result<Shape, SessionError> {
        let mut numbers = self.numbers();
        let (Some(bytes), Some(offset)) = (numbers.u64(), numbers.u64()) else {
            return Err(self.short());
        };
        let (Some(queues), Some(size)) = (numbers.u16(), numbers.u16()) else {
            return Err(self.short());
        };
        Ok(Shape {
            bytes,
            offset,
            queues,
            size,
        })
    }
}
