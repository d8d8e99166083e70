//! The side that has the guest (`vm.send-migration`).

use std::sync::Arc;
use std::time::Duration;

use triarch_api::events::kind;
use triarch_api::{Answer, ApiError, Handler, MigrationSide, Phase, SendMigration, TimeoutStrategy, VmConfig};
use triarch_block::Disk;
use triarch_legacy::PowerEvent;
use triarch_migration::{
    Cause, Deadlines, DevicePart, Guest, Handle, Limits, Memory, Moved, NotMoved, OnTimeOut, PostCopy, Region, Source,
    SourceError, SourceOptions, Turn, Whereabouts,
};
use triarch_state::Payloads;
use triarch_vcpu::VcpuEvent;
use triarch_vfio::{Fleet, Piece};
use triarch_vhost_user::VhostUserHandle;

use super::call::Caller;
use super::hand_over::{self, Handing, Ran};
use super::memory::{self, Daemons, Here, Writers};
use super::offer::{FilesV1, MOVED, MovedV1, OfferedCpusV1, OfferedV1};
use super::{Role, Running, address, cap, hosts, is_paused, post_copy, refuse, tls_files, unmovable};
use crate::backends::Backends;
use crate::build::Machine;
use crate::control::Controller;
use crate::progress::Progress;
use crate::snapshot::{WANTED, saved_config};
use crate::{GuestEvent, MachineError};

/// What the source knows of the guest that it offered.
pub(super) struct Sent {
    /// A client had paused it before.
    was_paused: bool,
    /// It may run at the destination before all of its memory is there.
    pub(super) post_copy: bool,
    config: VmConfig,
    regions: Vec<Region>,
    /// Its state, since it was paused.
    saved: Option<Payloads>,
    /// If its memory is handed over: whether it ran with that elsewhere.
    pub(super) ran: Option<Ran>,
    /// Its devices of the host.
    fleet: Fleet,
}

/// The guest, for the thread of the migration.
struct Proxy {
    caller: Caller,
    disks: Vec<Arc<Disk>>,
    /// The devices that daemons serve.
    served: Vec<(String, VhostUserHandle)>,
    /// The devices of the host.
    fleet: Fleet,
}

impl Guest for Proxy {
    fn before_pause(&mut self) {
        // What is written now need not be written while the guest stands still.
        for disk in &self.disks {
            if let Err(error) = disk.sync() {
                tracing::warn!("cannot write a disk's data out yet: {error}");
            }
        }
    }

    fn pause(&mut self) -> Result<(), Cause> {
        self.caller.call(Controller::pause_to_move)
    }

    fn save(&mut self) -> Result<Payloads, Cause> {
        self.caller.call(|controller| {
            let sent = controller.sent()?;
            Ok(sent.saved.take().unwrap_or_default())
        })
    }

    fn release_locks(&mut self) -> Result<(), Cause> {
        // The next one to use it may be another host.
        self.disks.iter().try_for_each(|disk| disk.sync())?;
        self.caller.call(|controller| {
            controller.migrations.unlocked = true;
            Ok(())
        })?;
        for (id, device) in &self.served {
            device.let_go().map_err(|error| format!("device '{id}': {error}"))?;
        }
        self.caller.call(|controller| {
            controller.migration_event(&kind::MIGRATION_COMMITTED, "the guest is given away");
            controller
                .backends
                .as_ref()
                .map_or(Ok(()), |backends| backends.unlock())
        })
    }

    fn take_locks(&mut self) -> Result<(), Cause> {
        self.caller.call(|controller| {
            controller.check_memory_is_ours()?;
            controller.take_back_locks()
        })
    }

    fn resume(&mut self) -> Result<(), Cause> {
        self.caller.call(Controller::resume_at_source)
    }

    fn retreat(&mut self) -> Result<(), Cause> {
        self.caller.call(|controller| {
            controller.resume_at_source()?;
            controller.migration_event(&kind::MIGRATION_RETREATED, "memory");
            Ok(())
        })
    }

    fn post_copy(&mut self, turn: Turn<'_>) {
        post_copy::tell(&self.caller, turn);
    }

    fn devices_ahead(&mut self) -> u64 {
        self.fleet.ahead()
    }

    fn devices_size(&mut self) -> u64 {
        self.fleet.size()
    }

    fn read_devices(&mut self, buffer: &mut [u8]) -> Result<Option<DevicePart>, Cause> {
        let Some((number, Piece { begins, len })) = self.fleet.read(buffer)? else {
            return Ok(None);
        };
        let device = u16::try_from(number)?;
        Ok(Some(DevicePart { device, begins, len }))
    }

    fn throttle(&mut self, percent: u8) -> Result<(), Cause> {
        self.caller.call(move |controller| controller.throttle(percent))
    }
}

impl Controller {
    /// Begins to move the guest.
    pub(super) fn send_migration(&mut self, config: &SendMigration, answer: Answer) -> Result<(), (ApiError, Answer)> {
        let handle = Handle::new(cap(config.bandwidth));
        let (source, offered, cpus, sent) = match self.prepare_to_send(config, &handle) {
            Ok(prepared) => prepared,
            Err(error) => return Err((error, answer)),
        };
        let job = self.inbox.jobs().begin("vm.send-migration");
        job.note("connection");
        let caller = Caller(self.inbox.clone());
        let disks = self.backends.iter().flat_map(|backends| backends.disks());
        let served = self.machine.as_ref();
        let mut proxy = Proxy {
            caller: caller.clone(),
            disks: disks.map(|(_, disk)| disk.clone()).collect(),
            served: served
                .map(|machine| machine.devices().served().to_vec())
                .unwrap_or_default(),
            fleet: sent.fleet.clone(),
        };
        let started = self.start_migration(move || {
            let result = source.run(&mut proxy, &offered, &cpus);
            // Nothing of the guest is held any more when its end is told.
            drop(proxy);
            caller.post(move |controller| controller.end_of_sending(result));
        });
        if let Err(error) = started {
            job.finish(Err(&error.chain()));
            return Err((error.into(), answer));
        }
        self.migrations.running = Some(Running {
            side: MigrationSide::Source,
            handle,
            address: config.destination_url.clone(),
            job,
            answer,
            role: Role::Source(Box::new(sent)),
        });
        Ok(())
    }

    /// The engine, what it tells of the guest and its processors, and what is kept of that.
    fn prepare_to_send(
        &mut self,
        config: &SendMigration,
        handle: &Handle,
    ) -> Result<(Source, Vec<u8>, Vec<u8>, Sent), ApiError> {
        config.validate()?;
        self.check_memory_is_ours()?;
        let options = options(config)?;
        self.finish_removals();
        if let Some(machine) = &mut self.machine {
            machine.forget_log("the log is the migration's now");
        }
        let (Some(vm), Some(machine), Some(backends)) = (&self.config, &self.machine, &self.backends) else {
            return Err(ApiError::WrongPhase("there is no guest to be moved".to_owned()));
        };
        let served = machine.devices().served();
        refuse(unmovable(backends, vm, served, config.local), ApiError::Unsupported)?;
        if config.local {
            // Another configuration of the VM, or of this request, mends that.
            refuse(hand_over::private(vm), ApiError::BadRequest)?;
        }
        if config.post_copy {
            refuse(post_copy::served(served), ApiError::Unsupported)?;
            refuse(hosts::late(backends), ApiError::Unsupported)?;
            // As above.
            refuse(post_copy::of_huge_pages(vm), ApiError::BadRequest)?;
        }
        if let Some(pager) = &machine.pager {
            // What the guest has not touched yet is in its snapshot.
            pager.complete()?;
        }
        let (offered, cpus) = self.offer(vm, machine, backends)?;
        let memory = (*machine.memory.memory()).clone();
        let regions = memory::regions(&memory);
        let caller = Caller(self.inbox.clone());
        let devices = machine.devices();
        let fleet = hosts::fleet(backends);
        let ran = config.local.then(Ran::new).transpose()?;
        let memory: Arc<dyn Memory> = match &ran {
            Some(ran) => Arc::new(Handing::new(&memory, ran, caller)?),
            None => {
                let daemons = Daemons::new(devices.served(), &memory, devices.rooms())?;
                let slots = machine.vm.memory_slots().clone();
                let writers = Writers {
                    daemons,
                    fleet: fleet.clone(),
                };
                Arc::new(Here::new(memory, slots, devices.backing(), writers, caller))
            }
        };
        let sent = Sent {
            was_paused: is_paused(self.phase),
            post_copy: config.post_copy,
            config: vm.clone(),
            regions,
            saved: None,
            ran,
            fleet,
        };
        let source = Source::new(options, memory, handle, &self.sandbox);
        Ok((source.map_err(refusal)?, offered, cpus, sent))
    }

    /// What a destination is told of the guest and of its processors.
    pub(super) fn offer(
        &self,
        vm: &VmConfig,
        machine: &Machine,
        backends: &Backends,
    ) -> Result<(Vec<u8>, Vec<u8>), ApiError> {
        let text = saved_config(vm, &self.handed)?;
        let wrong = |error: serde_json::Error| ApiError::Failed(format!("the guest cannot be described: {error}"));
        let offered = OfferedV1 {
            arch: std::env::consts::ARCH.to_owned(),
            config: serde_json::from_slice(&text).map_err(wrong)?,
            disks: backends
                .disks()
                .map(|(id, disk)| (id.to_owned(), disk.size()))
                .collect(),
            files: FilesV1::of(backends.disks()),
            served: machine
                .devices()
                .served()
                .iter()
                .map(|(id, device)| (id.clone(), device.shown().into()))
                .collect(),
            hosts: hosts::kinds(backends)?,
        };
        let cpus = OfferedCpusV1 {
            plan: machine.plan.save(),
            processor: machine.processor().cloned(),
        };
        Ok((
            serde_json::to_vec(&offered).map_err(wrong)?,
            serde_json::to_vec(&cpus).map_err(wrong)?,
        ))
    }

    fn sent(&mut self) -> Result<&mut Sent, MachineError> {
        match self.migrations.running.as_mut().map(|running| &mut running.role) {
            Some(Role::Source(sent)) => Ok(sent),
            _ => Err(MachineError::Moved("there is no migration any more".to_owned())),
        }
    }

    /// The memory of the guest is being copied.
    pub(super) fn migration_copies(&mut self) {
        self.migration_event(&kind::MIGRATION_STARTED, "memory");
    }

    /// Has the guest's vCPUs stand still for `percent` of the time.
    fn throttle(&mut self, percent: u8) -> Result<(), MachineError> {
        if let Some(machine) = &mut self.machine {
            machine.vcpus.throttle(percent)?;
        }
        if let Some(running) = &self.migrations.running {
            let properties = [("job", running.job.id().into()), ("percent", u64::from(percent).into())];
            self.inbox.events().post(&kind::MIGRATION_THROTTLED, &properties);
        }
        Ok(())
    }

    /// Pauses the guest and saves it: what of its memory that writes is sent with the rest.
    fn pause_to_move(&mut self) -> Result<(), MachineError> {
        self.migration_event(&kind::MIGRATION_SWITCHING, "the guest stands still");
        if let Some(machine) = &mut self.machine {
            machine.pause()?;
            self.phase = Phase::Paused;
        }
        let saved = self.save_to_move();
        let result = saved.and_then(|saved| {
            self.sent()?.saved = Some(saved);
            Ok(())
        });
        if result.is_err() {
            // Whoever wanted the pause does not get it.
            self.resume_at_source()?;
        }
        result
    }

    fn save_to_move(&mut self) -> Result<Payloads, MachineError> {
        let wanted = self.settle();
        let changed = |what: &str| Err(MachineError::Moved(format!("{what} while it was moved")));
        let (config, regions) = match (&self.config, &self.machine) {
            (Some(config), Some(machine)) => (config.clone(), memory::regions(&machine.memory.memory())),
            _ => return changed("the guest ended"),
        };
        let sent = self.sent()?;
        let paused = sent.was_paused;
        if regions != sent.regions {
            return changed("the guest's memory became more or less");
        }
        if config != sent.config {
            return changed("the guest gave back a device");
        }
        let Some(machine) = &mut self.machine else {
            return changed("the guest ended");
        };
        let mut payloads = machine.save_state(None)?;
        payloads.put(WANTED, "", &wanted)?;
        payloads.put(MOVED, "", &MovedV1 { paused })?;
        Ok(payloads)
    }

    /// Lets the guest go on that stays here, unless a client had paused it.
    fn resume_at_source(&mut self) -> Result<(), MachineError> {
        if !self.sent()?.was_paused
            && let Some(machine) = &mut self.machine
        {
            machine.resume()?;
            self.phase = Phase::Running;
        }
        Ok(())
    }

    fn end_of_sending(&mut self, result: Result<Moved, NotMoved>) {
        match result {
            Ok(moved) => self.let_go(moved.downtime),
            Err(error) => {
                if let Some(machine) = &self.machine {
                    // The engine leaves it as it is where the guest may run elsewhere.
                    let _ = machine.vm.memory_slots().log_writes(false);
                    let served = machine.devices().served();
                    served.iter().for_each(|(_, device)| device.stop_log());
                }
                if let Ok(sent) = self.sent() {
                    sent.fleet.stop_log();
                    sent.fleet.finish();
                }
                if error.guest == Whereabouts::Unknown
                    && let Ok(sent) = self.sent()
                {
                    self.migrations.handed = sent.ran.take();
                }
                let guest = match error.guest {
                    Whereabouts::RunsHere => "here",
                    Whereabouts::PausedHere => "paused",
                    Whereabouts::Unknown => "unknown",
                    Whereabouts::Lost => "lost",
                };
                let why = match &self.migrations.deferred {
                    Some(event) => ApiError::WrongPhase(format!("the guest was not moved, since it {}", did(event))),
                    None => refused(&error),
                };
                if error.guest == Whereabouts::Lost {
                    // It never runs here again.
                    self.forget_moved();
                }
                self.migration_failed(guest, why);
            }
        }
    }

    /// The guest runs elsewhere: there is no VM here any more.
    fn let_go(&mut self, downtime: Duration) {
        let address = self.migrations.running.as_ref().map(|running| running.address.clone());
        let downtime_ms = u64::try_from(downtime.as_millis()).unwrap_or(u64::MAX);
        let properties = [
            ("address", address.as_deref().unwrap_or_default().into()),
            ("downtime_ms", downtime_ms.into()),
        ];
        self.inbox.events().post(&kind::VM_MIGRATED, &properties);
        self.forget_moved();
        self.migration_done(Some(downtime));
        tracing::info!(downtime_ms, "the guest was moved");
    }

    /// There is no guest here any more.
    fn forget_moved(&mut self) {
        // It did not shut down: nobody shall be told so.
        self.end_machine();
        self.forget(Progress::NONE);
        self.migrations.unlocked = false;
        self.migrations.deferred = None;
    }
}

/// What the guest did that ended its migration.
fn did(event: &GuestEvent) -> &'static str {
    match event {
        GuestEvent::Power(PowerEvent::Reset) | GuestEvent::Vcpu(_, VcpuEvent::Reset) => "reset itself",
        GuestEvent::Vcpu(_, VcpuEvent::Failed(_)) => "cannot go on",
        _ => "powered itself off",
    }
}

fn options(config: &SendMigration) -> Result<SourceOptions, ApiError> {
    Ok(SourceOptions {
        address: address("destination_url", &config.destination_url)?,
        tls: config.tls.as_ref().map(tls_files),
        // Nothing is sent on them if memory is handed over.
        streams: if config.local { 1 } else { config.connections },
        hand_over: config.local,
        compress: config.compress,
        limits: Limits {
            downtime: Duration::from_millis(config.downtime_ms),
            max_throttle: config.throttle,
            time: Some(Duration::from_secs(config.timeout_s)),
            on_time_out: match config.timeout_strategy {
                TimeoutStrategy::Cancel => OnTimeOut::Fail,
                TimeoutStrategy::Ignore => OnTimeOut::Switch,
                TimeoutStrategy::PostCopy => OnTimeOut::PostCopy,
            },
            ..Limits::default()
        },
        post_copy: config.post_copy.then(|| PostCopy {
            recover: config.recover_s.map(Duration::from_secs),
        }),
        deadlines: Deadlines::default(),
        vmm: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// What a client is told that asked for what cannot be.
pub(super) fn refusal(error: SourceError) -> ApiError {
    match error {
        SourceError::Thread(_) => ApiError::failed(&error),
        error => ApiError::bad_request(&error),
    }
}

fn refused(error: &NotMoved) -> ApiError {
    match error.why {
        SourceError::Cancelled => ApiError::WrongPhase(triarch_api::chain(error)),
        SourceError::Connect(_) | SourceError::Refused(_) => ApiError::bad_request(error),
        _ => ApiError::failed(error),
    }
}
