//! The side that gets the guest (`vm.receive-migration`).

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use triarch_api::events::kind;
use triarch_api::{
    Answer, ApiError, Handler, MigrationSide, Phase, ReceiveMigration, RestoreConfig, RestoredNet, VmConfig, lay_over,
    read_object,
};
use triarch_arch::CpuPlan;
use triarch_block::Disk;
use triarch_migration::{
    Blocker, Cause, Deadlines, Destination, DestinationError, DestinationOptions, Handed, Handle, Lacking, Layout,
    Offer, Sink, Taken, Target, Turn,
};
use triarch_state::Payloads;
use triarch_vfio::Fleet;

use super::call::Caller;
use super::check::ends;
use super::hand_over::{Given, Ran};
use super::memory::{Prepared, There};
use super::offer::{MOVED, MovedV1, OfferedCpusV1, OfferedV1};
use super::{Fields, Role, Running, address, hosts, post_copy, refuse, tls_files, unmovable};
use crate::MachineError;
use crate::backends::{Backends, Opener};
use crate::build::Origin;
use crate::control::{Cause as By, Controller};
use crate::progress::Progress;
use crate::snapshot::{Saved, WANTED, WantedV1, take_taps};

/// What the destination has of the guest that comes.
pub(super) struct Awaited {
    /// What is different here.
    pub(super) config: Fields,
    pub(super) net_fds: Option<Vec<RestoredNet>>,
    pub(super) fds: Vec<OwnedFd>,
    /// Its memory, from the offer until it is restored.
    pub(super) memory: Option<Prepared>,
    /// How it goes on.
    restored: Option<(MovedV1, WantedV1)>,
    /// If its memory was handed over: where the source learns that it runs.
    ran: Option<Ran>,
}

/// The machine that is made, for the thread of the migration.
struct Proxy {
    caller: Caller,
    /// Kept as long as the migration runs: who frees the memory of a guest that fails shall not be a thread that others wait for.
    memory: Option<Arc<There>>,
    /// Its devices of this host.
    fleet: Fleet,
}

impl Sink for Proxy {
    fn prepare(&mut self, offer: &Offer<'_>, handed: Option<Handed>) -> Result<Arc<dyn Target>, Cause> {
        let (config, cpu, layout) = (offer.config.to_vec(), offer.cpu.to_vec(), offer.layout.clone());
        let post_copy = offer.post_copy;
        let (there, fleet) = self.caller.call(move |controller| {
            let there = controller.prepare_for(&config, &cpu, &layout, handed)?;
            let fleet = controller.backends.as_ref().map(hosts::fleet).unwrap_or_default();
            if post_copy {
                there.check_faults()?;
                let late = controller.backends.as_ref().map(hosts::late).unwrap_or_default();
                refuse(late, ApiError::Unsupported).map_err(|error| moved(error.to_string()))?;
            }
            Ok((there, fleet))
        })?;
        self.fleet = fleet;
        self.memory = Some(there.clone());
        Ok(there)
    }

    fn check(&mut self, offer: &Offer<'_>, handed: Option<Handed>) -> Vec<Blocker> {
        let (config, cpu, layout) = (offer.config.to_vec(), offer.cpu.to_vec(), offer.layout.clone());
        let post_copy = offer.post_copy;
        let found = self
            .caller
            .call(move |controller| controller.in_the_way(&config, &cpu, &layout, handed, post_copy));
        found.unwrap_or_else(|error| vec![ends(&*error)])
    }

    fn lack(&mut self, missing: &[Range<u64>]) -> Result<Arc<dyn Lacking>, Cause> {
        let there = self.memory.clone().ok_or("there is no memory")?;
        there.forget(missing)?;
        let missing = missing.to_vec();
        let coming = self.caller.call(move |controller| controller.lack(&there, &missing))?;
        Ok(coming)
    }

    fn post_copy(&mut self, turn: Turn<'_>) {
        post_copy::tell(&self.caller, turn);
    }

    fn load_device(&mut self, device: u16, begins: bool, part: &[u8]) -> Result<(), Cause> {
        Ok(self.fleet.load(device.into(), begins, part)?)
    }

    fn restore(&mut self, state: Payloads) -> Result<(), Cause> {
        self.caller.call(|controller| controller.restore_moved(state))
    }

    fn take_locks_and_run(&mut self) -> Result<(), Cause> {
        self.caller.call(Controller::take_over)
    }

    fn abort(&mut self, why: &str) {
        tracing::info!(why, "no guest was taken");
        self.memory = None;
        self.fleet = Fleet::default();
        // The VMM ends only if it cannot be done, and then it is.
        let _ = self.caller.call(|controller| {
            controller.migrations.unlocked = false;
            controller.forget(Progress::NONE);
            Ok(())
        });
    }
}

impl Controller {
    /// Begins to wait for a guest.
    pub(super) fn receive_migration(
        &mut self,
        config: ReceiveMigration,
        fds: Vec<OwnedFd>,
        answer: Answer,
    ) -> Result<(), (ApiError, Answer)> {
        let destination = match listen(&config, fds.len()) {
            Ok(destination) => destination,
            Err(error) => return Err((error, answer)),
        };
        let address = destination.address().to_string();
        let handle = Handle::new(None);
        let job = self.inbox.jobs().begin("vm.receive-migration");
        let (caller, sandbox, theirs) = (Caller(self.inbox.clone()), self.sandbox.clone(), handle.clone());
        let started = self.start_migration(move || {
            let mut proxy = Proxy {
                caller: caller.clone(),
                memory: None,
                fleet: Fleet::default(),
            };
            let result = destination.run(&mut proxy, &theirs, &sandbox);
            drop(proxy);
            caller.post(move |controller| controller.end_of_receiving(result));
        });
        if let Err(error) = started {
            job.finish(Err(&error.chain()));
            return Err((error.into(), answer));
        }
        self.migrations.running = Some(Running {
            side: MigrationSide::Destination,
            handle,
            address,
            job,
            answer,
            role: Role::Destination(Box::new(Awaited {
                config: config.config,
                net_fds: config.net_fds,
                fds,
                memory: None,
                restored: None,
                ran: None,
            })),
        });
        self.migration_event(&kind::MIGRATION_LISTENING, "connection");
        Ok(())
    }

    pub(super) fn awaited(&mut self) -> Result<&mut Awaited, MachineError> {
        match self.migrations.running.as_mut().map(|running| &mut running.role) {
            Some(Role::Destination(awaited)) => Ok(awaited),
            _ => Err(MachineError::Moved("there is no migration any more".to_owned())),
        }
    }

    /// Makes everything of the guest that is offered that does not depend on its state.
    fn prepare_for(
        &mut self,
        offered: &[u8],
        cpus: &[u8],
        layout: &Layout,
        handed: Option<Handed>,
    ) -> Result<Arc<There>, MachineError> {
        let OfferedV1 {
            arch,
            config,
            disks,
            served,
            hosts: kinds,
            ..
        } = serde_json::from_slice(offered)
            .map_err(|error| moved(format!("its description cannot be read: {error}")))?;
        check_architecture(&arch)?;
        self.check_processors(cpus)?;
        let awaited = self.awaited()?;
        let (over, net_fds) = (std::mem::take(&mut awaited.config), awaited.net_fds.take());
        let fds = std::mem::take(&mut awaited.fds);
        let mut vm = configured(config, over)?;
        let request = RestoreConfig {
            net_fds,
            ..RestoreConfig::default()
        };
        let taps = take_taps(&mut vm, &request, fds).map_err(|error| moved(error.to_string()))?;
        self.create(vm)?;
        self.handed = taps;
        let Some(config) = &self.config else {
            return Err(moved("it has no configuration".to_owned()));
        };
        let shown = served.into_iter().map(|(id, served)| (id, served.into())).collect();
        let backends = Backends::open(
            config,
            Opener {
                handed: &self.handed,
                daemons: self.daemons.as_ref(),
                sandbox: &self.sandbox,
                iommu: &self.iommu,
                behind_iommu: config.iommu_for_all(),
                moved: Some(&shown),
            },
        )?;
        refuse(
            unmovable(&backends, config, &[], handed.is_some()),
            ApiError::Unsupported,
        )
        .map_err(|error| moved(error.to_string()))?;
        hosts::same_kinds(&backends, &kinds)?;
        for (id, disk) in backends.disks() {
            same_size(id, disk, &disks)?;
        }
        let mut given = handed.map(|handed| Given::new(handed, layout));
        let (prepared, there) = Prepared::new(config, layout, given.as_mut())?;
        let ran = given.map(Given::end).transpose()?;
        self.backends = Some(backends);
        self.migrations.unlocked = true;
        let awaited = self.awaited()?;
        (awaited.memory, awaited.ran) = (Some(prepared), ran);
        self.migration_event(&kind::MIGRATION_PREPARED, "memory");
        Ok(there)
    }

    /// Whether the guest can go on with the processors of this host.
    fn check_processors(&self, cpus: &[u8]) -> Result<(), MachineError> {
        let OfferedCpusV1 { plan, processor } =
            serde_json::from_slice(cpus).map_err(|error| moved(format!("its processors cannot be read: {error}")))?;
        // Names all that is missing, where the plan stops at the first.
        if let Some(guest) = processor {
            crate::cpu_features::check(&self.kvm, &guest)?;
        }
        CpuPlan::restore(&self.kvm, &plan)?;
        Ok(())
    }

    /// Makes the guest that was saved, which does not run yet and has no lock.
    fn restore_moved(&mut self, mut state: Payloads) -> Result<(), MachineError> {
        let (wanted, how): (WantedV1, MovedV1) = (state.take(WANTED, "")?, state.take(MOVED, "")?);
        let memory = self.awaited()?.memory.take();
        let memory = memory.ok_or_else(|| moved("its memory is not here".to_owned()))?;
        let mut saved = Saved::moved(state, memory)?;
        saved.check_devices()?;
        let machine = self.build(Progress::NONE, Origin::Saved(&mut saved))?;
        self.take_in(machine, Phase::Paused);
        self.awaited()?.restored = Some((how, wanted));
        Ok(())
    }

    /// The guest is ours: takes its disks and lets it run.
    fn take_over(&mut self) -> Result<(), MachineError> {
        let awaited = self.awaited()?;
        let (restored, ran) = (awaited.restored.take(), awaited.ran.take());
        let (how, wanted) = restored.ok_or_else(|| moved("it was not restored".to_owned()))?;
        // One that has to wait for a daemon goes on at the source.
        self.take_locks(Duration::ZERO)?;
        let failed = MachineError::host("note that the guest runs here");
        ran.as_ref().map_or(Ok(()), |ran| ran.set(true)).map_err(failed)?;
        if !how.paused
            && let Some(machine) = &mut self.machine
        {
            machine.resume()?;
            self.phase = Phase::Running;
        }
        let interfaces = self.machine.as_ref().map_or(0, |machine| machine.devices().announce());
        if interfaces > 0 {
            let count = ("interfaces", (interfaces as u64).into());
            self.inbox.events().post(&kind::MIGRATION_ANNOUNCED, &[count]);
        }
        let address = self.migrations.running.as_ref().map(|running| running.address.clone());
        let properties = [("address", address.as_deref().unwrap_or_default().into())];
        self.inbox.events().post(&kind::VM_RECEIVED, &properties);
        if !how.paused {
            self.tell(&kind::VM_RESUMED, By::Client);
        }
        // It runs whatever comes of that.
        if let Err(error) = self.want_again(&wanted) {
            tracing::warn!("what the guest was asked for is not waited for any more: {error}");
        }
        Ok(())
    }

    fn end_of_receiving(&mut self, result: Result<Taken, DestinationError>) {
        match result {
            Ok(taken) => {
                if !taken.confirmed {
                    tracing::warn!(
                        "the guest runs, and its source does not know: there it is paused, and must not go on"
                    );
                }
                self.migration_done(None);
            }
            Err(error) => {
                let error = match &error {
                    DestinationError::Cancelled => ApiError::WrongPhase(triarch_api::chain(&error)),
                    DestinationError::Thread(_) | DestinationError::Memory(_) => ApiError::failed(&error),
                    _ => ApiError::bad_request(&error),
                };
                self.migration_failed("none", error);
            }
        }
    }
}

pub(super) fn check_architecture(arch: &str) -> Result<(), MachineError> {
    let here = std::env::consts::ARCH;
    match arch == here {
        true => Ok(()),
        false => Err(moved(format!("it is a guest of {arch}, and this host is {here}"))),
    }
}

/// The guest's configuration, with what is different here.
pub(super) fn configured(mut config: Fields, over: Fields) -> Result<VmConfig, MachineError> {
    lay_over(&mut config, over).map_err(|error| moved(format!("config of vm.receive-migration: {error}")))?;
    let text = serde_json::to_vec(&config).map_err(|error| moved(error.to_string()))?;
    let (vm, ignored) = read_object::<VmConfig>(&text).map_err(|error| moved(format!("its configuration: {error}")))?;
    for field in ignored {
        tracing::warn!("the guest's configuration has {field}, which this version does not know");
    }
    Ok(vm)
}

/// Whether the disk `id` has as many bytes as the source said.
pub(super) fn same_size(id: &str, disk: &Disk, said: &BTreeMap<String, u64>) -> Result<(), MachineError> {
    let (there, here) = (said.get(id).copied().unwrap_or(0), disk.size());
    match here == there {
        true => Ok(()),
        false => Err(moved(format!(
            "its disk '{id}' has {there} bytes, and {} here has {here}",
            disk.path().display()
        ))),
    }
}

pub(super) fn moved(text: String) -> MachineError {
    MachineError::Moved(text)
}

fn listen(config: &ReceiveMigration, fds: usize) -> Result<Destination, ApiError> {
    let counted = RestoreConfig {
        net_fds: config.net_fds.clone(),
        ..RestoreConfig::default()
    };
    if fds != counted.descriptors() {
        return Err(ApiError::BadRequest(format!(
            "{fds} descriptors came with the request, and net_fds tells of {}",
            counted.descriptors()
        )));
    }
    let options = DestinationOptions {
        address: address("receiver_url", &config.receiver_url)?,
        tls: config.tls.as_ref().map(tls_files),
        deadlines: Deadlines::default(),
        vmm: env!("CARGO_PKG_VERSION").to_owned(),
    };
    Destination::bind(options).map_err(|error| match error {
        DestinationError::Thread(_) => ApiError::failed(&error),
        error => ApiError::bad_request(&error),
    })
}
