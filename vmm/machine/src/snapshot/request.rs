//! `vm.snapshot` and `vm.restore`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use triarch_api::events::kind;
use triarch_api::{
    ApiError, NetConfig, Operation, Phase, RestoreConfig, RestoreMode, SnapshotConfig, VmConfig, read_object,
};
use triarch_net::Tap;
use triarch_state::{About, Base, MAX_BASES, Snapshot, SnapshotError, SnapshotWriter};

use super::{Saved, WANTED};
use crate::backends::{Handed, HandedEnds, handed_tap};
use crate::build::Origin;
use crate::control::{Cause, Controller};
use crate::migration::{bound_to_host, refuse};
use crate::progress::Progress;
use crate::{Machine, MachineError};

/// What clients wanted that the guest has not done yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WantedV1 {
    /// vCPUs it should have.
    vcpus: Option<u32>,
    /// Bytes of memory it should have, if it comes by memory devices.
    memory: Option<u64>,
    /// Devices it was asked for.
    removals: Vec<String>,
}

fn about() -> About {
    About {
        vmm: env!("CARGO_PKG_VERSION").to_owned(),
        arch: std::env::consts::ARCH.to_owned(),
        id: None,
        base: None,
    }
}

/// A name that no other snapshot has.
fn new_id() -> Result<String, MachineError> {
    let mut bytes = [0; 16];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(MachineError::host("read /dev/urandom for the snapshot's id"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

impl Machine {
    /// The snapshot in `directory`, if what was written since is known.
    fn base(&self, directory: &Path) -> Result<Base, MachineError> {
        let refuse = |why: String| MachineError::Base {
            base: directory.to_owned(),
            why,
        };
        let snapshot = Snapshot::open(directory, &about().arch)?;
        let Some(base) = snapshot.itself() else {
            return Err(refuse(
                "it was saved without track_writes; save the guest as a whole".to_owned(),
            ));
        };
        let Some(log) = &self.log else {
            return Err(refuse(
                "this VM's writes are not logged: nobody asked for it with track_writes, or the VM was reset, restored or moved since, or a \
                 daemon served a device of it; save the guest as a whole"
                    .to_owned(),
            ));
        };
        if !log.base().is(base) {
            let since = log.base().directory.display();
            return Err(refuse(format!(
                "writes are logged since the snapshot that was saved in {since}; name that"
            )));
        }
        if !base.has_room() {
            let text = format!("it builds on {MAX_BASES} others already; save the guest as a whole");
            return Err(refuse(text));
        }
        Ok(base.clone())
    }

    /// Whether all writes to the guest's memory can be logged.
    fn can_log(&self) -> Result<(), MachineError> {
        let served = self.devices.served().iter().map(|(id, _)| id.as_str());
        let served: Vec<_> = served
            .chain(self.devices.of_host())
            .map(|id| format!("'{id}'"))
            .collect();
        match served.is_empty() {
            true => Ok(()),
            false => Err(MachineError::Unlogged(served.join(", "))),
        }
    }
}

impl Controller {
    /// Saves the guest, which is paused.
    pub(crate) fn snapshot(&mut self, config: &SnapshotConfig) -> Result<(), ApiError> {
        let (directory, base) = (config.directory()?, config.base_directory()?);
        self.check_memory_is_ours()?;
        if let (Some(backends), Some(vm)) = (&self.backends, &self.config) {
            refuse(bound_to_host(backends, vm), ApiError::Unsupported)?;
        }
        self.tell(&kind::VM_SNAPSHOTTING, Cause::Client);
        let (begun, mut bytes) = (Instant::now(), None);
        let done = self.job(Operation::Snapshot, |this, progress| {
            bytes = Some(this.save(&directory, base.as_deref(), config.track_writes, progress)?);
            Ok(())
        });
        let meters = self.outbox.snapshots();
        meters.saved(base.is_some(), begun.elapsed(), bytes);
        done?;
        self.tell(&kind::VM_SNAPSHOTTED, Cause::Client);
        Ok(())
    }

    fn save(
        &mut self,
        directory: &Path,
        base: Option<&Path>,
        track: Option<bool>,
        progress: Progress<'_>,
    ) -> Result<u64, MachineError> {
        let wanted = self.settle();
        let track_from_now = track == Some(true);
        let (Some(config), Some(machine)) = (&self.config, &mut self.machine) else {
            return Ok(0);
        };
        let base = base.map(|base| machine.base(base)).transpose()?;
        if track_from_now {
            machine.can_log()?;
        }
        let about = About {
            id: track_from_now.then(new_id).transpose()?,
            base,
            ..about()
        };
        let config = saved_config(config, &self.handed)?;
        let mut writer = SnapshotWriter::create(directory)?;
        let saved = machine.save(&mut writer, about.base.as_ref(), track_from_now, progress);
        let finished = saved.and_then(|(mut payloads, bytes)| {
            payloads.put(WANTED, "", &wanted)?;
            progress.note("to disk");
            Ok((writer.finish(&config, &about, payloads)?, bytes))
        });
        match finished {
            Ok((itself, bytes)) => {
                machine.saved(itself, track);
                Ok(bytes)
            }
            Err(error) => {
                // What was written since the one before is still known.
                machine.saved(None, None);
                Err(error)
            }
        }
    }

    /// Takes note of all that the guest has done, before it is saved, and returns what it has not.
    pub(crate) fn settle(&mut self) -> WantedV1 {
        // A device on its way out is neither there nor gone.
        self.finish_removals();
        self.look_at_processors();
        self.look_at_dimms();
        self.look_at_slots();
        WantedV1 {
            vcpus: self.vcpu_target(),
            memory: self.memory_target(),
            removals: self.asked_for(),
        }
    }

    /// Makes the VM that a snapshot has, with `fds` as the taps that `net_fds` tells of (`vm.restore`). On error there is none.
    pub fn restore(&mut self, config: &RestoreConfig, fds: Vec<OwnedFd>) -> Result<(), ApiError> {
        let directory = config.directory()?;
        if fds.len() != config.descriptors() {
            return Err(ApiError::BadRequest(format!(
                "{} descriptors came with the request, and net_fds tells of {}",
                fds.len(),
                config.descriptors()
            )));
        }
        self.tell(&kind::VM_RESTORING, Cause::Client);
        let (begun, mut answer) = (Instant::now(), Ok(()));
        let done = self.job(Operation::Restore, |this, progress| {
            let restored = this.restore_from(&directory, config, fds, progress);
            match restored {
                Err(RestoreError::Machine(error)) => return Err(error),
                Err(RestoreError::Request(error)) => answer = Err(error),
                Ok(()) => {}
            }
            Ok(())
        });
        let done = answer.and(done.map_err(ApiError::from));
        let meters = self.outbox.snapshots();
        meters.restored(config.memory_restore_mode, begun.elapsed(), done.is_ok());
        if done.is_err() {
            self.forget(Progress::NONE);
            return done;
        }
        self.tell(&kind::VM_RESTORED, Cause::Client);
        if config.resume {
            self.resume()?;
        }
        Ok(())
    }

    fn restore_from(
        &mut self,
        directory: &Path,
        config: &RestoreConfig,
        fds: Vec<OwnedFd>,
        progress: Progress<'_>,
    ) -> Result<(), RestoreError> {
        progress.note("snapshot");
        let mut snapshot = Snapshot::open(directory, &about().arch).map_err(MachineError::from)?;
        check_chain(&snapshot, config)?;
        let (mut vm, ignored) = read_object::<VmConfig>(snapshot.config()).map_err(|error| {
            let text = error.to_string();
            RestoreError::Request(ApiError::BadRequest(format!("config.json of the snapshot: {text}")))
        })?;
        for field in ignored {
            tracing::warn!("config.json of the snapshot: {field} is no field of a configuration, and was ignored");
        }
        vm.memory.prefault |= config.prefault;
        check_mode(&vm, config.memory_restore_mode)?;
        let taps = take_taps(&mut vm, config, fds)?;
        let wanted: WantedV1 = snapshot.payloads.take(WANTED, "").map_err(MachineError::from)?;
        let mut saved = Saved::read(snapshot, config).map_err(MachineError::from)?;
        // Before anything of the guest's is opened: a host that cannot have it leaves its disks and sockets alone.
        saved.plan(&self.kvm)?;
        self.create(vm)?;
        self.handed = taps;
        let mut machine = self.build(progress, Origin::Saved(&mut saved))?;
        if config.track_writes
            && let Some(base) = saved.itself()
        {
            machine.can_log()?;
            machine.log_since(base.clone())?;
        }
        self.take_in(machine, Phase::Paused);
        self.want_again(&wanted)?;
        Ok(())
    }

    /// Goes on waiting for what the guest was asked for.
    pub(crate) fn want_again(&mut self, wanted: &WantedV1) -> Result<(), ApiError> {
        self.publish();
        if let Some(vcpus) = wanted.vcpus.filter(|vcpus| self.vcpu_target() != Some(*vcpus)) {
            self.resize_vcpus(vcpus)?;
        }
        let memory = wanted.memory.filter(|bytes| self.memory_target() != Some(*bytes));
        if let Some(bytes) = memory
            && let Some(change) = self.prepare_memory(bytes)?
        {
            self.commit_memory(change);
        }
        self.ask_again(&wanted.removals);
        let memories = self.machine.as_ref().map(Machine::memories).unwrap_or_default();
        let requested: Vec<u64> = memories.iter().map(|(_, memory)| memory.status().requested).collect();
        let zoned = self
            .config
            .as_ref()
            .is_some_and(|config| !config.memory.zones().is_empty());
        let operation = match zoned {
            true => Operation::ResizeZone,
            false => Operation::Resize,
        };
        for (at, bytes) in requested.into_iter().enumerate() {
            self.resize_memory(at, bytes, operation)?;
        }
        Ok(())
    }
}

/// Why a VM was not restored: what a client is told, or what becomes that.
enum RestoreError {
    Request(ApiError),
    Machine(MachineError),
}

impl From<MachineError> for RestoreError {
    fn from(error: MachineError) -> Self {
        Self::Machine(error)
    }
}

impl From<ApiError> for RestoreError {
    fn from(error: ApiError) -> Self {
        Self::Request(error)
    }
}

/// `config.json`. Interfaces whose taps clients opened have so many descriptors: nobody else can open those.
pub(crate) fn saved_config(config: &VmConfig, taps: &HandedEnds) -> Result<Vec<u8>, MachineError> {
    let mut config = config.clone();
    for net in config.net.iter_mut().flatten() {
        if net.id.as_ref().is_some_and(|id| taps.contains_key(id)) {
            net.fds = Some(vec![0; pairs(net)]);
        }
    }
    let text = serde_json::to_vec_pretty(&config);
    Ok(text.map_err(SnapshotError::Document)?)
}

/// Whether memory can come back in this way.
fn check_mode(vm: &VmConfig, mode: RestoreMode) -> Result<(), ApiError> {
    let problem = match mode {
        RestoreMode::Copy => return Ok(()),
        _ if vm.devices.iter().flatten().next().is_some() => {
            "takes a VM without devices of the host, which reach all of its memory from the beginning"
        }
        _ if vm.memory.any_hugepages() => "takes memory that is not of huge pages",
        RestoreMode::Mapped if vm.memory.any_shared() || vm.needs_shared_memory() => {
            "takes memory that is not shared, as daemons need it"
        }
        // Pages that a daemon touches first would be zeroes: its faults are its own.
        RestoreMode::OnDemand if vm.needs_shared_memory() => "takes a VM without devices that daemons serve",
        RestoreMode::OnDemand if vm.memory.any_prefault() => "and prefault contradict each other: leave prefault out",
        _ => return Ok(()),
    };
    Err(ApiError::BadRequest(format!(
        "memory_restore_mode {mode:?} {problem}; or use Copy"
    )))
}

/// Whether what is asked of a snapshot can be had with this one, which may build on others.
fn check_chain(snapshot: &Snapshot, config: &RestoreConfig) -> Result<(), ApiError> {
    if config.memory_restore_mode == RestoreMode::Mapped && snapshot.memory_file().is_none() {
        let text = "memory_restore_mode Mapped takes a snapshot that builds on no other one; or use OnDemand or Copy";
        return Err(ApiError::BadRequest(text.to_owned()));
    }
    if config.track_writes && snapshot.itself().is_none() {
        let text =
            "track_writes takes a snapshot that was saved with track_writes, since only on such others can build";
        return Err(ApiError::BadRequest(text.to_owned()));
    }
    Ok(())
}

fn pairs(net: &NetConfig) -> usize {
    usize::from(net.num_queues / 2)
}

/// The taps that came as `fds`, for the interfaces of `vm` that are to have them.
pub(crate) fn take_taps(vm: &mut VmConfig, config: &RestoreConfig, fds: Vec<OwnedFd>) -> Result<HandedEnds, ApiError> {
    let mut rest = fds.into_iter();
    let mut handed = BTreeMap::new();
    for given in config.net_fds.iter().flatten() {
        let fds: Vec<_> = rest.by_ref().take(given.num_fds).collect();
        if handed.insert(given.id.clone(), fds).is_some() {
            return Err(ApiError::BadRequest(format!("net_fds has '{}' twice", given.id)));
        }
    }
    let mut taps = HandedEnds::new();
    for net in vm.net.iter_mut().flatten() {
        let id = net.id.clone().unwrap_or_default();
        let Some(fds) = handed.remove(&id) else {
            if net.fds.is_some() {
                return Err(ApiError::BadRequest(format!(
                    "a client opened the tap of '{id}'; give its descriptors with net_fds, or name a tap in config.json in the place of fds"
                )));
            }
            continue;
        };
        taps.insert(id, Handed::Tap(handed_to(net, fds)?));
    }
    match handed.keys().next() {
        Some(id) => Err(ApiError::BadRequest(format!(
            "net_fds has descriptors for '{id}', and the VM has no such network interface"
        ))),
        None => Ok(taps),
    }
}

fn handed_to(net: &mut NetConfig, fds: Vec<OwnedFd>) -> Result<Arc<Tap>, ApiError> {
    if net.vhost_user || fds.len() != pairs(net) {
        return Err(ApiError::BadRequest(format!(
            "'{}' has {} descriptors; it must be one for each of its {} queue pairs, and none if a daemon serves it",
            net.id.as_deref().unwrap_or_default(),
            fds.len(),
            pairs(net)
        )));
    }
    net.fds = None;
    net.tap = None;
    handed_tap(net, fds).map_err(|error| ApiError::bad_request(&error))
}
