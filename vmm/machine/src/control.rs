//! The controller: one guest, its phase, and everything that changes it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
use kvm_ioctls::Kvm;
use triarch_api::events::{Kind, kind};
use triarch_api::{ApiError, Handler, Operation, Phase, Reply, Request, VmConfig, VmInfo};
use triarch_device_core::Sandbox;
use triarch_legacy::{PowerEvent, SerialPort};
use triarch_vcpu::VcpuEvent;
use triarch_vfio::Iommu;
use vmm_sys_util::eventfd::EventFd;

use crate::backends::{Backends, HandedEnds};
use crate::build::Machine;
use crate::consoles::Consoles;
use crate::cpus::Processors;
use crate::daemons::Daemons;
use crate::inbox::Outbox;
use crate::memory::Dimms;
use crate::metrics::GuestMeters;
use crate::migration::Migrations;
use crate::plug::{HostInput, Plugs};
use crate::progress::Progress;
use crate::resize::{Part, Resizes};
use crate::signals::{Signal, Signals, told_to_end};
use crate::supervisor::{Heartbeat, Supervisor};
use crate::{GuestEvent, HeldSignals, Inbox, MachineError, Message};

/// How long the end of a VM waits for a slow reader of a console.
const DRAIN: Duration = Duration::from_millis(200);

/// How the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered itself off.
    PoweredOff,
    /// A client or a signal ended the VMM.
    Terminated,
}

/// Who made something happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// A client, or whoever started or ended the VMM.
    Client,
    /// The guest.
    Guest,
}

pub(crate) type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// Owns the guest. Runs on the main thread.
pub struct Controller {
    pub(crate) outbox: Outbox,
    pub(crate) inbox: Inbox,
    pub(crate) events: EventManager<Subscriber>,
    pub(crate) sandbox: Arc<dyn Sandbox>,
    supervisor: Box<dyn Supervisor>,
    /// Starts daemons for devices, if somebody may.
    pub(crate) daemons: Option<Arc<dyn Daemons>>,
    /// The VMM ends with the terminal the guest is on.
    hang_up_ends: bool,
    pub(crate) kvm: Kvm,
    pub(crate) phase: Phase,
    /// The phase the supervisor knows of.
    told_phase: Phase,
    pub(crate) config: Option<VmConfig>,
    /// What somebody else opened and handed over.
    pub(crate) handed: HandedEnds,
    pub(crate) consoles: Option<Consoles>,
    pub(crate) backends: Option<Backends>,
    /// Opens devices of the host.
    pub(crate) iommu: Iommu,
    pub(crate) machine: Option<Machine>,
    /// What the guest was asked for and has not done yet.
    pub(crate) resizes: Resizes,
    pub(crate) processors: Processors,
    pub(crate) dimms: Dimms,
    pub(crate) serial_input: Option<SubscriberId>,
    pub(crate) plugs: Plugs,
    pub(crate) migrations: Migrations,
    /// How many guests were built.
    pub(crate) generation: u64,
    outcome: Option<Outcome>,
}

impl Controller {
    /// A controller without a guest, which tells `supervisor` how it does. Call it on the main thread: it takes the signals that were
    /// held back there.
    pub fn new(
        sandbox: Arc<dyn Sandbox>,
        signals: &HeldSignals,
        supervisor: Box<dyn Supervisor>,
    ) -> Result<Self, MachineError> {
        let kvm = triarch_hypervisor::open(triarch_arch::WITHOUT_KVM)?;
        let (inbox, outbox) = Inbox::new().map_err(MachineError::host("make an event descriptor"))?;
        let hang_up_ends = signals.hang_up_ends();
        let signals = Signals::take(signals, outbox.wake()).map_err(MachineError::host("take signals"))?;
        triarch_vcpu::install_kick_signal().map_err(MachineError::host("install the signal of vCPUs"))?;
        let failed = |error| MachineError::Host {
            what: "make the event loop",
            source: io::Error::other(error),
        };
        inbox.events().post(&kind::VMM_STARTING, &[]);
        let mut events = EventManager::<Subscriber>::new().map_err(failed)?;
        events.add_subscriber(Arc::new(Mutex::new(Wake(outbox.wake().clone()))));
        events.add_subscriber(Arc::new(Mutex::new(SignalInput {
            signals,
            inbox: inbox.clone(),
        })));
        if let Some(every) = supervisor.alive_every() {
            let heartbeat = Heartbeat::new(every, inbox.clone()).map_err(MachineError::host("make a timer"))?;
            events.add_subscriber(Arc::new(Mutex::new(heartbeat)));
        }
        let iommu =
            Iommu::new(Arc::new(triarch_vfio::Linux)).map_err(MachineError::host("make a set of descriptors"))?;
        events.add_subscriber(Arc::new(Mutex::new(HostInput::new(&iommu, &inbox))));
        let (resizes, alarm) = Resizes::new(inbox.clone())?;
        events.add_subscriber(alarm);
        Ok(Self {
            outbox,
            inbox,
            events,
            sandbox,
            supervisor,
            daemons: None,
            hang_up_ends,
            kvm,
            phase: Phase::Absent,
            told_phase: Phase::Absent,
            config: None,
            handed: HandedEnds::new(),
            consoles: None,
            backends: None,
            iommu,
            machine: None,
            resizes,
            processors: Processors::default(),
            dimms: Dimms::default(),
            plugs: Plugs::default(),
            migrations: Migrations::default(),
            serial_input: None,
            generation: 0,
            outcome: None,
        })
    }

    /// Lets devices be served by daemons that `daemons` starts. Without it they have to be there.
    pub fn set_daemons(&mut self, daemons: Arc<dyn Daemons>) {
        self.daemons = Some(daemons);
    }

    /// The way to this controller.
    pub fn inbox(&self) -> Inbox {
        self.inbox.clone()
    }

    /// Serves messages until the guest powers itself off or somebody ends the VMM. An error is one of the guest itself; it has ended.
    pub fn run(mut self) -> Result<Outcome, MachineError> {
        self.publish();
        self.supervisor.ready();
        let outcome = self.serve_messages();
        self.supervisor.stopping();
        outcome
    }

    fn serve_messages(&mut self) -> Result<Outcome, MachineError> {
        loop {
            if told_to_end() {
                return Ok(Outcome::Terminated);
            }
            if let Some(message) = self.outbox.next() {
                self.handle(message)?;
                if let Some(outcome) = self.outcome {
                    return Ok(outcome);
                }
                continue;
            }
            // A signal that comes before it makes a descriptor readable, one that comes later interrupts it.
            self.events.run().map_err(|error| MachineError::Host {
                what: "wait for events",
                source: io::Error::other(error),
            })?;
        }
    }

    /// Takes a configuration (`vm.create`). In any phase but `Absent` use [`Inbox::request`], which checks it.
    pub fn create(&mut self, mut config: VmConfig) -> Result<(), MachineError> {
        config.validate()?;
        config.check_functions()?;
        crate::identity::complete(&mut config)?;
        let consoles = Consoles::open(&config)?;
        consoles.show_paths(&mut config);
        self.consoles = Some(consoles);
        self.config = Some(config);
        self.phase = Phase::Created;
        self.publish();
        self.tell(&kind::VM_CREATED, Cause::Client);
        Ok(())
    }

    /// Builds the guest and lets it run (`vm.boot`). On error there is no guest, and the phase is what it was.
    pub fn boot(&mut self) -> Result<(), MachineError> {
        if let Some(config) = &self.config {
            config.check_functions()?;
        }
        self.job(Operation::Boot, |this, progress| {
            this.start(progress, Cause::Client, None, &[])
        })
    }

    /// What `machine` counts.
    pub(crate) fn meters(&self, machine: &Machine) -> Option<GuestMeters> {
        let config = self.config.as_ref()?;
        let (cpus, ram, plugs) = (&self.processors.meters, &self.dimms.meters, &self.plugs.meters);
        Some(machine.meters(config, cpus, ram, plugs, self.iommu.reached()))
    }

    /// Makes an event of it. What a guest causes must not drown everything else.
    pub(crate) fn tell(&self, kind: &'static Kind, cause: Cause) {
        match cause {
            Cause::Client => self.inbox.events().post(kind, &[]),
            Cause::Guest => self.inbox.events().post_guest("vm", kind, &[]),
        }
    }

    /// Does long work as a job.
    pub(crate) fn job(
        &mut self,
        operation: Operation,
        work: impl FnOnce(&mut Self, Progress<'_>) -> Result<(), MachineError>,
    ) -> Result<(), MachineError> {
        let job = self.inbox.jobs().begin(operation.name());
        let result = work(self, Progress::of(&job));
        match &result {
            Ok(()) => job.finish(Ok(())),
            Err(error) => job.finish(Err(&error.chain())),
        }
        result
    }

    fn handle(&mut self, message: Message) -> Result<(), MachineError> {
        match message {
            Message::Request(request, answer) => {
                tracing::info!(request = request.name(), phase = self.phase.name(), "request");
                let Some((request, answer)) = self.pass_on(request, answer) else {
                    return Ok(());
                };
                let name = request.name();
                let result = self.serve(request).map_err(|error| error.of_route(name));
                // Whoever has the answer sees what it changed.
                self.publish();
                answer.send(result);
            }
            Message::Guest(generation, event) if generation == self.generation && self.machine.is_some() => {
                self.guest_event(event)?;
                self.publish();
            }
            Message::Guest(..) => {}
            Message::HangUp { by_kernel } => self.hang_up(by_kernel),
            Message::Alive => self.supervisor.alive(),
            Message::Call(call) => {
                call.run(self);
                self.publish();
            }
            Message::Patience => {
                self.look_at_resizes();
                self.look_at_plugs();
                self.publish();
            }
            Message::OfHost(name, alarm) => {
                self.told_by_host(&name, alarm);
                self.publish();
            }
            Message::Resized => {
                if let Some(machine) = &self.machine {
                    machine.terminal_resized();
                }
            }
        }
        Ok(())
    }

    fn guest_event(&mut self, event: GuestEvent) -> Result<(), MachineError> {
        let Some(event) = self.defer(event) else { return Ok(()) };
        match event {
            GuestEvent::Power(PowerEvent::Off) | GuestEvent::Vcpu(_, VcpuEvent::PowerOff) => {
                tracing::info!("the guest powered itself off");
                self.outcome = Some(Outcome::PoweredOff);
            }
            GuestEvent::Power(PowerEvent::Reset) | GuestEvent::Vcpu(_, VcpuEvent::Reset) => {
                tracing::info!("the guest resets");
                self.restart(Progress::NONE, Cause::Guest)?;
            }
            GuestEvent::Power(PowerEvent::Panicked) | GuestEvent::Vcpu(_, VcpuEvent::Crashed) => {
                tracing::warn!("the guest crashed, by its own word");
                let event = [("event", "panic".into())];
                self.inbox.events().post_guest("panic", &kind::GUEST_PANIC, &event);
            }
            GuestEvent::Processors => self.look_at_processors(),
            GuestEvent::Dimms => self.look_at_dimms(),
            GuestEvent::Slots => self.look_at_slots(),
            GuestEvent::Unplugged(id) => self.unplugged(&id),
            GuestEvent::Vcpu(index, VcpuEvent::Started) => self.vcpu_started(index),
            // Published by whoever handles the event.
            GuestEvent::Link => {}
            GuestEvent::Balloon => self.balloon_stands(),
            GuestEvent::Memory => self.memory_stands(),
            GuestEvent::MemoryLost(reason) => return Err(self.abandon_guest(reason)),
            GuestEvent::Vcpu(index, VcpuEvent::Failed(reason)) => {
                let error = MachineError::Guest { index, reason };
                let text = error.to_string();
                self.inbox
                    .events()
                    .post(&kind::VM_FAILED, &[("error", text.as_str().into())]);
                self.stop_guest(Progress::NONE);
                return Err(error);
            }
        }
        Ok(())
    }

    fn serve(&mut self, request: Request) -> Result<Reply, ApiError> {
        request.check(self.phase)?;
        match request {
            Request::Create(config) => self.create(*config)?,
            Request::Boot => self.boot()?,
            Request::Pause => self.pause()?,
            Request::Resume => self.resume()?,
            Request::Shutdown => self.job(Operation::Shutdown, |this, progress| {
                this.stop_guest(progress);
                Ok(())
            })?,
            Request::Reboot => self.job(Operation::Reboot, |this, progress| {
                this.restart(progress, Cause::Client)
            })?,
            Request::Delete => self.job(Operation::Delete, |this, progress| {
                this.forget(progress);
                Ok(())
            })?,
            Request::PowerButton => self.power_button()?,
            Request::Nmi => self.inject_nmi()?,
            Request::Resize(target) => self.resize(&target)?,
            Request::ResizeZone(target) => self.resize_zone(&target)?,
            Request::ResizeDisk(target) => self.resize_disk(&target)?,
            Request::AddDisk(disk) => return self.add_disk(*disk),
            Request::AddNet(net, fds) => return self.add_net(*net, fds),
            Request::AddFs(fs) => return self.add_fs(fs),
            Request::AddGenericVhostUser(device) => return self.add_generic(device),
            Request::AddVsock(vsock) => return self.add_vsock(vsock),
            Request::AddDevice(device, fds) => return self.add_device(device, fds),
            Request::RemoveDevice(device) => self.remove_device(&device)?,
            Request::CpuFeatures => return Ok(self.cpu_features()?),
            Request::Snapshot(snapshot) => self.snapshot(&snapshot)?,
            Request::Restore(restore, fds) => self.restore(&restore, fds)?,
            Request::VmmShutdown => self.outcome = Some(Outcome::Terminated),
            request => return self.during_migration(&request),
        }
        Ok(Reply::Done)
    }

    fn info(&self) -> Option<VmInfo> {
        let mut config = self.config.clone()?;
        let vcpus = self.publish_processors();
        // Agents read there how many there are.
        let at_boot = self.processors.at_boot(config.cpus.boot_vcpus);
        config.cpus.boot_vcpus = vcpus.map_or(at_boot, |vcpus| vcpus.started);
        let lent = self
            .machine
            .as_ref()
            .and_then(Machine::balloon)
            .map_or(0, |balloon| balloon.actual());
        let memory = self.publish_memory(&mut config);
        let plugged = self.machine.as_ref().map_or(0, Machine::plugged);
        let memory_actual_size = (config.memory.boot_size() + plugged).saturating_sub(lent);
        let device_tree = self.machine.as_ref().map(Machine::device_tree).unwrap_or_default();
        Some(VmInfo {
            config,
            state: self.phase,
            memory_actual_size,
            device_tree,
            vcpus,
            memory,
            memory_zones: self.zone_counts(),
            links: self.machine.as_ref().map(Machine::links).unwrap_or_default(),
        })
    }

    /// Shows everybody how things are now.
    pub(crate) fn publish(&mut self) {
        self.outbox.publish(self.info());
        if self.told_phase != self.phase {
            self.told_phase = self.phase;
            self.supervisor.phase(self.phase);
        }
    }

    /// SIGHUP asks for another log file. Where there is none, or when the terminal is gone, it ends a guest that is on a terminal.
    fn hang_up(&mut self, by_kernel: bool) {
        let reopened = self.supervisor.reopen_log();
        let terminal = self.consoles.as_ref().is_some_and(Consoles::on_terminal);
        let gone = by_kernel || !Consoles::terminal_there();
        if self.hang_up_ends && terminal && (gone || !reopened) {
            tracing::info!("the terminal of the guest hung up");
            self.outcome = Some(Outcome::Terminated);
        }
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        self.tell(&kind::VM_PAUSING, Cause::Client);
        if let Some(machine) = &mut self.machine {
            machine.pause()?;
            self.phase = Phase::Paused;
            self.tell(&kind::VM_PAUSED, Cause::Client);
        }
        Ok(())
    }

    pub(crate) fn resume(&mut self) -> Result<(), MachineError> {
        self.check_memory_is_ours()?;
        self.take_back_locks()?;
        self.tell(&kind::VM_RESUMING, Cause::Client);
        if let Some(machine) = &mut self.machine {
            machine.resume()?;
            self.phase = Phase::Running;
            self.tell(&kind::VM_RESUMED, Cause::Client);
        }
        Ok(())
    }

    fn power_button(&self) -> Result<(), MachineError> {
        self.tell(&kind::VM_POWER_BUTTON, Cause::Client);
        match &self.machine {
            Some(machine) => machine
                .press_power_button()
                .map_err(MachineError::host("press the power button")),
            None => Ok(()),
        }
    }

    fn inject_nmi(&self) -> Result<(), MachineError> {
        match &self.machine {
            Some(machine) => Ok(machine.inject_nmi()?),
            None => Ok(()),
        }
    }

    /// Ends the guest and builds it again, on the same ends of the host.
    fn restart(&mut self, progress: Progress<'_>, cause: Cause) -> Result<(), MachineError> {
        self.tell(&kind::VM_REBOOTING, cause);
        progress.note("guest");
        let (vcpus, memory) = (self.vcpu_target(), self.memory_places());
        self.end_machine();
        self.end_removals();
        let result = self.start(progress, cause, vcpus, &memory);
        self.end_processors(result.is_ok());
        self.end_dimms(result.is_ok());
        if result.is_err() {
            self.abandon_memory();
        }
        let kind = if result.is_ok() {
            &kind::VM_REBOOTED
        } else {
            &kind::VM_SHUTDOWN
        };
        self.tell(kind, cause);
        result
    }

    /// Ends the guest and frees its disks and network interfaces; keeps its configuration and consoles.
    fn stop_guest(&mut self, progress: Progress<'_>) {
        progress.note("guest");
        self.keep_processors();
        if self.end_machine() {
            self.tell(&kind::VM_SHUTDOWN, Cause::Client);
        }
        self.end_processors(false);
        self.end_dimms(false);
        self.abandon_memory();
        self.end_removals();
        self.backends = None;
    }

    /// Whether there was a guest to end.
    pub(crate) fn end_machine(&mut self) -> bool {
        if let Some(id) = self.serial_input.take() {
            // It was added by us and is removed nowhere else.
            let _ = self.events.remove_subscriber(id);
        }
        self.finish_removals();
        let existed = self.machine.take().is_some();
        self.forget_handed();
        // A guest that is built anew has as many vCPUs as it was to have; its balloon is empty.
        self.resizes.abandon(Part::Balloon);
        if existed {
            self.phase = Phase::Shutdown;
        }
        // Not before it has ended: until then somebody may want to see why that takes so long.
        self.outbox.show_meters(None);
        existed
    }

    /// Ends the guest and forgets it.
    pub(crate) fn forget(&mut self, progress: Progress<'_>) {
        self.stop_guest(progress);
        if let Some(consoles) = self.consoles.take() {
            progress.note("consoles");
            consoles.drain(DRAIN);
        }
        if self.config.take().is_some() {
            self.tell(&kind::VM_DELETED, Cause::Client);
        }
        self.forget_handed_ends();
        self.processors.forget_size();
        self.phase = Phase::Absent;
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.end_migration();
        self.forget(Progress::NONE);
        self.tell(&kind::VMM_SHUTDOWN, Cause::Client);
    }
}

/// Ends the wait of the event loop when there are messages.
struct Wake(Arc<EventFd>);

impl MutEventSubscriber for Wake {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // The messages themselves are looked for after each turn of the loop.
        let _ = self.0.read();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.0.as_raw_fd());
    }
}

/// Turns signals into messages.
struct SignalInput {
    signals: Signals,
    inbox: Inbox,
}

impl MutEventSubscriber for SignalInput {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        while let Some(signal) = self.signals.next() {
            self.inbox.post(match signal {
                Signal::HangUp { by_kernel } => Message::HangUp { by_kernel },
                Signal::Resized => Message::Resized,
            });
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.signals.as_raw_fd());
    }
}

/// Brings what is typed into the serial port.
pub(crate) struct SerialInput(pub(crate) Arc<dyn SerialPort>);

impl MutEventSubscriber for SerialInput {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.0.on_event();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.0.console().as_raw_fd());
    }
}

pub(crate) fn watch(ops: &mut EventOps<'_>, fd: i32) {
    if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
        tracing::error!("cannot wait for events of descriptor {fd}: {error}");
    }
}
