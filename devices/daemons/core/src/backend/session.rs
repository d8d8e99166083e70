//! One connection of a front end: its requests, one after the other.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use triarch_device_core::Sandbox;
use triarch_vhost_protocol::{
    ConfigRange, InflightShape, LOG_ALL, LogArea, MAX_CONFIG, PROTOCOL_FEATURES, Payload, Reader, Region, Request,
    VringAddress, VringFd, VringState, protocol,
};
use triarch_virtio::{DeviceContext, QueueLayout, QueueStateV1, RingFault, VirtQueue, VirtioInterrupt};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ask::Ask;
use super::call::Calls;
use super::channel::{Channel, Message};
use super::dirty::{self, DirtyLog};
use super::error::SessionError;
use super::fd;
use super::inflight::Inflight;
use super::memory::{MAX_REGIONS, MemoryTable};
use super::ring::{Addresses, Ring};
use super::served::Served;

/// Longest ring.
const MAX_RING: u16 = 1024;
/// Of device_status: the driver works (virtio 1.2, 2.1).
const DRIVER_OK: u8 = 4;
/// How often marks are moved into a log while there is one.
const LOG_PERIOD: Duration = Duration::from_millis(50);

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
    Answer::Payload(value.encode())
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
    /// What tells the front end that pages were marked in it.
    log_event: Option<EventFd>,
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
            log_event: None,
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
        let wants = message.header.needs_reply() && self.protocol & protocol::REPLY_ACK != 0;
        let number = message.header.request;
        let question = Request::of(number).is_some_and(Request::has_answer);
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
        let number = message.header.request;
        let Some(request) = Request::of(number) else {
            return Err(SessionError::Request {
                request: format!("message {number}"),
                what: "this back end does not know it",
            });
        };
        let ask = Ask {
            request,
            payload: &message.payload,
            fds: message.fds,
        };
        self.check_negotiated(&ask)?;
        match request {
            GET_FEATURES => {
                let offered = self.device.features() | PROTOCOL_FEATURES | LOG_ALL;
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
            SET_LOG_FD => self.log_event = Some(ask.only_event()?),
            SET_VRING_NUM | SET_VRING_BASE | SET_VRING_ENABLE => self.set_ring(&ask)?,
            SET_VRING_ADDR => self.set_addresses(&ask)?,
            SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => self.set_event(ask)?,
            GET_VRING_BASE => return self.take_ring(&ask),
            GET_PROTOCOL_FEATURES => return Ok(self::number(self.device.protocol())),
            SET_PROTOCOL_FEATURES => {
                let wanted = ask.payload::<u64>()?;
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
                self.device.tell_changes(Some(self.calls.clone()));
            }
            GET_CONFIG => return self.get_config(&ask),
            SET_CONFIG => self.set_config(&ask)?,
            GET_INFLIGHT_FD => return self.get_inflight(&ask),
            SET_INFLIGHT_FD => self.set_inflight(ask)?,
            SET_STATUS => self.set_status(&ask)?,
            GET_STATUS => return Ok(self::number(self.status.into())),
            // Never offered: what these devices know stands in the rings.
            SET_DEVICE_STATE_FD | CHECK_DEVICE_STATE => return Err(ask.wrong("this back end keeps no state")),
        }
        Ok(Answer::Done)
    }

    /// Whether a request that belongs to a protocol feature may come.
    fn check_negotiated(&self, ask: &Ask<'_>) -> Result<(), SessionError> {
        let needed = ask.request.needs();
        if needed != 0 && self.protocol & needed == 0 {
            return Err(ask.wrong("its protocol feature was not negotiated"));
        }
        Ok(())
    }

    fn set_features(&mut self, ask: Ask<'_>) -> Result<(), SessionError> {
        let wanted = ask.payload::<u64>()?;
        let ours = PROTOCOL_FEATURES | LOG_ALL;
        if wanted & !(self.device.features() | ours) != 0 {
            return Err(ask.wrong("it wants features that were not offered"));
        }
        let was_logging = self.logging().is_some();
        let changed = (wanted ^ self.features) & !ours != 0;
        self.features = wanted;
        if !was_logging && wanted & LOG_ALL != 0 {
            // What was written before does not count.
            dirty::forget(&self.memory.handle().memory());
        } else if was_logging && wanted & LOG_ALL == 0 {
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
        let regions: Vec<Region> = ask.payload()?;
        if regions.len() != ask.fds.len() {
            return Err(ask.wrong("it has another number of regions than of descriptors"));
        }
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
        let LogArea { bytes, offset } = ask.payload()?;
        let log = DirtyLog::map(ask.only_fd()?, bytes, offset, self.lost.as_ref()).map_err(SessionError::Log)?;
        // What belongs into the old one is not lost with it.
        self.collect();
        self.log = Some(log);
        Ok(number(0))
    }

    fn logging(&self) -> Option<&DirtyLog> {
        self.log.as_ref().filter(|_| self.features & LOG_ALL != 0)
    }

    fn collect(&self) {
        if let Some(log) = self.logging()
            && log.collect(&self.memory.handle().memory())
            && let Some(event) = &self.log_event
        {
            // A counter at its maximum is readable already, and who gave something else looks by itself.
            let _ = event.write(1);
        }
    }

    /// The place of ring `index` among all.
    fn ring(&mut self, ask: &Ask<'_>, index: u32) -> Result<&mut Ring, SessionError> {
        let ring = self.rings.get_mut(index as usize);
        ring.ok_or_else(|| ask.wrong("there is no such ring"))
    }

    /// A number for a ring.
    fn set_ring(&mut self, ask: &Ask<'_>) -> Result<(), SessionError> {
        use Request::*;
        let VringState { index, number } = ask.payload()?;
        let negotiated = self.features & PROTOCOL_FEATURES != 0 || self.protocol != 0;
        let ring = self.ring(ask, index)?;
        match ask.request {
            SET_VRING_NUM => {
                let size = u16::try_from(number)
                    .ok()
                    .filter(|n| n.is_power_of_two() && *n <= MAX_RING);
                ring.size = size.ok_or_else(|| ask.wrong("a ring has a power of two of descriptors, 1024 at most"))?;
            }
            SET_VRING_BASE => ring.base = number as u16,
            _ => {
                // QEMU enables the rings of a network device before it sets features.
                if number > 1 || !negotiated {
                    return Err(ask.wrong("it is neither 0 nor 1, or there are no protocol features"));
                }
                ring.enabled = number == 1;
                return self.update(index as u16);
            }
        }
        Ok(())
    }

    fn set_addresses(&mut self, ask: &Ask<'_>) -> Result<(), SessionError> {
        let described: VringAddress = ask.payload()?;
        let ring = self.ring(ask, described.index)?;
        let addresses = Addresses {
            descriptors: described.descriptors,
            used: described.used,
            available: described.available,
        };
        // The flag that says whether the used ring is logged changes while it runs; it is logged anyway.
        if ring.running && ring.addresses != Some(addresses) {
            return Err(ask.wrong("the ring runs"));
        }
        ring.addresses = Some(addresses);
        Ok(())
    }

    /// What a ring is woken by, or signals with.
    fn set_event(&mut self, mut ask: Ask<'_>) -> Result<(), SessionError> {
        use Request::*;
        let VringFd { index, none } = ask.payload()?;
        let negotiated = self.features & PROTOCOL_FEATURES != 0;
        let running = self.ring(&ask, index.into())?.running;
        let event = ask.event(none)?;
        match ask.request {
            SET_VRING_KICK => {
                let event = event.ok_or_else(|| ask.wrong("polling a ring for ever is not supported"))?;
                if running {
                    // Another descriptor for a ring that runs.
                    self.stop(index);
                }
                let ring = self.ring(&ask, index.into())?;
                ring.kick = Some(Arc::new(event));
                ring.enabled |= !negotiated;
                return self.update(index);
            }
            SET_VRING_CALL => {
                self.calls.change(index.into(), |signals| signals.call = event);
                // What was completed while there was none, or one that nobody listened to any more.
                let _ = self.calls.queue(index);
            }
            _ => self.calls.change(index.into(), |signals| signals.error = event),
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
                // Not all front ends tell the status.
                self.device.keep(true)?;
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
        let VringState { index, .. } = ask.payload()?;
        if index as usize >= self.rings.len() {
            return Err(ask.wrong("there is no such ring"));
        }
        self.stop(index as u16);
        self.collect();
        let ring = &mut self.rings[index as usize];
        ring.kick = None;
        let base = ring.base;
        self.calls.change(index as usize, |signals| signals.call = None);
        let number = base.into();
        Ok(Answer::Payload(VringState { index, number }.encode()))
    }

    fn get_config(&self, ask: &Ask<'_>) -> Result<Answer, SessionError> {
        let ConfigRange { offset, size, flags } = ask.payload()?;
        let fits = offset.checked_add(size).is_some_and(|end| end <= MAX_CONFIG);
        // No bytes at all say that it failed.
        let size = if fits { size } else { 0 };
        let mut data = vec![0; size as usize];
        self.device.read_config(offset.into(), &mut data);
        let mut payload = ConfigRange { offset, size, flags }.encode();
        payload.extend(data);
        Ok(Answer::Payload(payload))
    }

    fn set_config(&mut self, ask: &Ask<'_>) -> Result<(), SessionError> {
        let mut numbers = Reader::new(ask.payload);
        let ConfigRange { offset, size, .. } = ask.read(&mut numbers)?;
        let data = numbers.rest();
        if data.len() != size as usize {
            return Err(ask.wrong("it has another number of bytes than it says"));
        }
        self.device.write_config(offset.into(), data);
        Ok(())
    }

    fn get_inflight(&mut self, ask: &Ask<'_>) -> Result<Answer, SessionError> {
        let shape: InflightShape = ask.payload()?;
        let (region, shape, file) = Inflight::create(shape.queues, shape.size)?;
        self.inflight = Some(region);
        Ok(Answer::WithFd(shape.encode(), file))
    }

    fn set_inflight(&mut self, ask: Ask<'_>) -> Result<(), SessionError> {
        let shape = ask.payload()?;
        if self.rings.iter().any(|ring| ring.running) {
            return Err(ask.wrong("a ring runs"));
        }
        self.inflight = Some(Inflight::adopt(ask.only_fd()?, shape)?);
        Ok(())
    }

    /// A front end whose guest goes elsewhere takes DRIVER_OK back, which no driver does alone.
    fn set_status(&mut self, ask: &Ask<'_>) -> Result<(), SessionError> {
        let status = ask.payload::<u64>()? as u8;
        let works = |status: u8| status & DRIVER_OK != 0;
        if status == 0 {
            self.reset();
        } else if works(status) != works(self.status) {
            if !works(status) && self.rings.iter().any(|ring| ring.running) {
                return Err(ask.wrong("a ring runs"));
            }
            self.device.keep(works(status))?;
        }
        self.status = status;
        Ok(())
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
            // The front end is still there.
            self.device.tell_changes(Some(self.calls.clone()));
        }
    }

    fn end(&mut self) {
        self.reset_device();
        self.device.tell_changes(None);
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.end();
    }
}
