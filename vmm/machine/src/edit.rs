//! Changes to the configuration of a VM whose guest is not built, and those few that reach a running one.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use triarch_api::events::kind;
use triarch_api::{
    Answer, ApiError, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, Handler, NetConfig, Operation, Phase,
    RemoveDevice, Reply, Request, Resize, ResizeDisk, VmConfig, VsockConfig,
};
use triarch_net::Tap;

use crate::backends::{Handed, handed_tap};
use crate::control::{Cause, Controller};
use crate::resize::{Goal, Part};
use crate::{Machine, MachineError, configured, identity};

impl Controller {
    /// `vm.resize`. A target that is reached already is always fine.
    pub(crate) fn resize(&mut self, target: &Resize) -> Result<(), ApiError> {
        self.tell(&kind::VM_RESIZING, Cause::Client);
        self.refuse_zones(target.desired_ram)?;
        let running = self.machine.is_some();
        let before = self.config.clone();
        let begun = self.resizes.begun();
        let size = before.as_ref().map_or(0, |config| config.memory.size);
        let by_blocks = target.desired_ram.filter(|_| self.has_virtio_mem());
        let plugged = by_blocks.map(|bytes| self.plan_memory(size, bytes)).transpose()?;
        self.change(|config| {
            if plugged.is_some() {
                config.memory.hotplugged_size = plugged.filter(|bytes| *bytes > 0);
            }
            if let Some(ram) = target.desired_ram.filter(|_| !running) {
                config.memory.size = ram;
            }
            if let Some(vcpus) = target.desired_vcpus.filter(|_| !running) {
                config.cpus.boot_vcpus = vcpus;
            }
            match (&mut config.balloon, target.desired_balloon) {
                (Some(balloon), Some(bytes)) => balloon.size = bytes,
                (None, Some(bytes)) if bytes > 0 => return Err(no_balloon()),
                _ => {}
            }
            Ok(())
        })?;
        if target.desired_vcpus.is_some() && !running {
            self.processors.forget_size();
        }
        if let Err(error) = self.resize_running(target) {
            // All of it or nothing.
            self.config = before;
            return Err(error);
        }
        if let Some(bytes) = plugged {
            self.resize_memory(0, bytes, Operation::Resize)?;
        }
        if let Some(bytes) = target.desired_balloon {
            self.resize_balloon(bytes)?;
        }
        // A job, also one that has ended by now, tells of its end itself.
        if !self.resizes.any() && self.resizes.begun() == begun {
            self.tell(&kind::VM_RESIZED, Cause::Client);
        }
        Ok(())
    }

    /// Asks a guest that runs, if there is one, for another number of vCPUs and another amount of memory.
    fn resize_running(&mut self, target: &Resize) -> Result<(), ApiError> {
        if self.machine.is_none() {
            return Ok(());
        }
        let memory = match target.desired_ram.filter(|_| !self.has_virtio_mem()) {
            Some(ram) => self.prepare_memory(ram)?,
            None => None,
        };
        if let Some(vcpus) = target.desired_vcpus
            && let Err(error) = self.resize_vcpus(vcpus)
        {
            memory.iter().for_each(|change| self.undo_memory(change));
            return Err(error);
        }
        if let Some(change) = memory {
            self.commit_memory(change);
        }
        Ok(())
    }

    /// Asks a guest that runs for a balloon of `bytes`.
    fn resize_balloon(&mut self, bytes: u64) -> Result<(), MachineError> {
        let Some(balloon) = self.machine.as_ref().and_then(Machine::balloon) else {
            return Ok(());
        };
        if self.resizes.target(Part::Balloon) == Some(bytes) {
            return Ok(());
        }
        balloon
            .set_target(bytes)
            .map_err(MachineError::host("tell the guest of the size of its balloon"))?;
        match balloon.status().actual {
            actual if actual == bytes => self.resizes.replace(Part::Balloon, bytes),
            actual => {
                let goal = Goal {
                    target: bytes,
                    now: actual,
                    end: bytes,
                };
                let (jobs, kind) = (self.inbox.jobs(), Operation::Resize.name());
                self.resizes.begin(jobs, kind, Part::Balloon, "balloon", goal);
            }
        }
        Ok(())
    }

    /// The guest changed the size of its balloon.
    pub(crate) fn balloon_stands(&mut self) {
        let Some(balloon) = self.machine.as_ref().and_then(Machine::balloon) else {
            return;
        };
        if self.resizes.stands(Part::Balloon, balloon.status().actual) {
            self.end_resize(Part::Balloon, None, Ok(()));
        }
    }

    /// The guest is not on its way to a size any more, and has come so far. What it has now is shown before its job has ended.
    pub(crate) fn end_resize(&mut self, part: Part, phase: Option<&str>, result: Result<(), &str>) {
        let Some(job) = self.resizes.end(part) else {
            return;
        };
        self.publish();
        if let Some(phase) = phase {
            job.note(phase);
        }
        job.finish(result);
        if result.is_ok() {
            self.tell(&kind::VM_RESIZED, Cause::Guest);
        }
    }

    /// Time has passed while the guest is on its way to a size: tells it again, and gives up on what it does not do.
    pub(crate) fn look_at_resizes(&mut self) {
        let runs = self.phase == Phase::Running;
        if runs {
            self.remind_of_processors();
            self.remind_of_dimms();
            self.remind_of_memory();
        }
        for part in self.resizes.late(runs) {
            match part {
                Part::Vcpus => self.give_up_on_processors(),
                Part::Memory(at) => self.give_up_on_memory(at),
                Part::Dimms => self.give_up_on_dimms(),
                Part::Balloon => {
                    let mut reason = self.resizes.so_far(part);
                    let balloon = self.machine.as_ref().and_then(Machine::balloon);
                    if balloon.is_some_and(|balloon| !balloon.status().active) {
                        reason.push_str(": it has no driver for its balloon");
                    }
                    self.end_resize(part, None, Err(&reason));
                }
            }
        }
    }

    /// Lets a daemon of our own carry out what only it can: the resize of a disk it serves. Its answer is given when there is one, and
    /// other requests need not wait for it. What is no daemon's business is given back.
    pub(crate) fn pass_on(&mut self, request: Request, answer: Answer) -> Option<(Request, Answer)> {
        let (request, answer) = self.migrate(request, answer)?;
        if let Request::ResizeDisk(target) = &request
            && request.check(self.phase).is_ok()
            && let Some(daemon) = self.backends.as_mut().and_then(|backends| backends.daemon(&target.id))
        {
            let device = self.machine.as_ref().and_then(|machine| machine.daemon(&target.id));
            daemon.resize_disk(target.desired_size, device, answer, &self.sandbox);
            return None;
        }
        Some((request, answer))
    }

    /// `vm.resize-disk` of a disk that has no daemon of our own.
    pub(crate) fn resize_disk(&mut self, target: &ResizeDisk) -> Result<(), ApiError> {
        let mut disks = self.config.iter().flat_map(|config| config.disks.iter().flatten());
        let Some(disk) = disks.find(|disk| disk.id.as_deref() == Some(&*target.id)) else {
            return Err(no_device(&target.id, "disk"));
        };
        if disk.has_daemon() {
            return Err(ApiError::BadRequest(format!(
                "a daemon serves the disk '{}'; resize it there, and the guest hears of it",
                target.id
            )));
        }
        match self.machine.as_ref().and_then(|machine| machine.disk(&target.id)) {
            Some(disk) => disk
                .resize(target.desired_size)
                .map_err(|error| ApiError::bad_request(&error)),
            None => Ok(()),
        }
    }

    /// `vm.add-disk`.
    pub(crate) fn add_disk(&mut self, disk: DiskConfig) -> Result<Reply, ApiError> {
        self.add(None, |config| {
            config.disks.get_or_insert_default().push(disk);
            Ok(())
        })
    }

    /// `vm.add-net`; `fds` are its tap, if the client opened it.
    pub(crate) fn add_net(&mut self, net: NetConfig, fds: Vec<OwnedFd>) -> Result<Reply, ApiError> {
        let tap = match fds.is_empty() {
            true => None,
            false => Some(Handed::Tap(check_tap(&net, fds)?)),
        };
        self.add(tap, |config| {
            config.net.get_or_insert_default().push(net);
            Ok(())
        })
    }

    /// `vm.add-fs`.
    pub(crate) fn add_fs(&mut self, fs: FsConfig) -> Result<Reply, ApiError> {
        self.add(None, |config| {
            config.fs.get_or_insert_default().push(fs);
            Ok(())
        })
    }

    /// `vm.add-generic-vhost-user`.
    pub(crate) fn add_generic(&mut self, device: GenericVhostUserConfig) -> Result<Reply, ApiError> {
        self.add(None, |config| {
            config.generic_vhost_user.get_or_insert_default().push(device);
            Ok(())
        })
    }

    /// `vm.add-device`; `fds` are its file and what is for all devices, if the client opened them.
    pub(crate) fn add_device(&mut self, mut device: DeviceConfig, fds: Vec<OwnedFd>) -> Result<Reply, ApiError> {
        let brought = fds.len() > 1;
        let behind_iommu = self.config.as_ref().is_some_and(VmConfig::iommu_for_all);
        let handed = match fds.is_empty() {
            true => None,
            false => Some(self.take_device(&mut device, fds, behind_iommu)?),
        };
        let added = self.add(handed, |config| {
            config.devices.get_or_insert_default().push(device);
            Ok(())
        });
        if added.is_err() && brought {
            self.iommu.forget();
        }
        added
    }

    /// `vm.add-vsock`.
    pub(crate) fn add_vsock(&mut self, vsock: VsockConfig) -> Result<Reply, ApiError> {
        self.add(None, |config| match config.vsock {
            Some(_) => Err(ApiError::BadRequest(
                "the VM has a vsock already, and can have one only".to_owned(),
            )),
            None => {
                config.vsock = Some(vsock);
                Ok(())
            }
        })
    }

    /// Adds the device that `edit` puts into the configuration, also to a guest that runs; `handed` is what a client opened for it. All of it
    /// or nothing.
    fn add(
        &mut self,
        handed: Option<Handed>,
        edit: impl FnOnce(&mut VmConfig) -> Result<(), ApiError>,
    ) -> Result<Reply, ApiError> {
        let (Some(before), Some(changed)) = (&self.config, self.changed(edit)?) else {
            return Ok(Reply::Done);
        };
        // Every device has a name by now.
        let is_new = |id: &&str| before.ids().all(|known| known != *id);
        let id = changed.ids().find(is_new).unwrap_or_default().to_owned();
        let added = self.plug(&changed, &id, handed.as_ref())?;
        if let Some(handed) = handed {
            self.handed.insert(id, handed);
        }
        self.config = Some(changed);
        Ok(added.map_or(Reply::Done, Reply::Added))
    }

    /// `vm.remove-device`.
    pub(crate) fn remove_device(&mut self, device: &RemoveDevice) -> Result<(), ApiError> {
        if self.machine.is_some() {
            return self.unplug(device);
        }
        let id = &*device.id;
        self.change(|config| {
            let balloon = config.balloon.take_if(|balloon| balloon.id.as_deref() == Some(id));
            match configured::take(config, id) || balloon.is_some() {
                true => Ok(()),
                false => Err(no_device(id, "device that can be removed")),
            }
        })?;
        self.handed.remove(id);
        Ok(())
    }

    /// Changes the configuration as a whole or not at all.
    pub(crate) fn change(&mut self, edit: impl FnOnce(&mut VmConfig) -> Result<(), ApiError>) -> Result<(), ApiError> {
        if let Some(changed) = self.changed(edit)? {
            self.config = Some(changed);
        }
        Ok(())
    }

    /// The configuration as it would be after `edit`, if there is one.
    fn changed(&self, edit: impl FnOnce(&mut VmConfig) -> Result<(), ApiError>) -> Result<Option<VmConfig>, ApiError> {
        let Some(config) = &self.config else {
            return Ok(None);
        };
        let mut changed = config.clone();
        edit(&mut changed)?;
        changed.validate().map_err(MachineError::Config)?;
        identity::complete(&mut changed)?;
        Ok(Some(changed))
    }
}

/// The tap of a new network interface, which a client opened.
fn check_tap(net: &NetConfig, fds: Vec<OwnedFd>) -> Result<Arc<Tap>, ApiError> {
    if net.vhost_user {
        return Err(ApiError::BadRequest(
            "descriptors of a tap came with the request, and a daemon serves the interface; give one of them"
                .to_owned(),
        ));
    }
    let (count, pairs) = (fds.len(), usize::from(net.num_queues / 2));
    if count != pairs {
        return Err(ApiError::BadRequest(format!(
            "{count} descriptors came with the request; it must be one for each of the {pairs} queue pairs"
        )));
    }
    if let Some(tap) = &net.tap {
        return Err(ApiError::BadRequest(format!(
            "it names the tap '{tap}' and brings descriptors of one; give one of them"
        )));
    }
    handed_tap(net, fds).map_err(|error| ApiError::bad_request(&error))
}

fn no_balloon() -> ApiError {
    ApiError::BadRequest(
        "the VM has no balloon, so desired_balloon can only be 0; vm.create gives it one with balloon".to_owned(),
    )
}

pub(crate) fn no_device(id: &str, kind: &str) -> ApiError {
    ApiError::NotFound(format!(
        "there is no {kind} with the id '{id}'; vm.info lists the devices"
    ))
}
