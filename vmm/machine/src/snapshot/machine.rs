//! What a whole guest saves, and continues from.

use std::sync::Arc;

use kvm_ioctls::Kvm;
use triarch_api::events::EventLog;
use triarch_api::{RestoreClock, RestoreConfig, RestoreMode};
use triarch_arch::{
    BoardStateV1, CpuPlan, CpuPlanStateV1, Elapsed, Platform, PlatformStateV1, StateError, VcpuStateV1, Vcpus,
    recreate_vcpus, restore_time, save_vcpu, saved_processor,
};
use triarch_cpu_model::GuestProcessor;
use triarch_device_core::Sandbox;
use triarch_hypervisor::{FirmwareStateV1, Vcpu, Vm};
use triarch_memory::{Backing, GuestMemory, GuestMemoryHandle, map_copy_on_write};
use triarch_state::{Base, MemoryRange, PayloadError, Payloads, Snapshot, SnapshotError, SnapshotWriter};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::devices::{PciStateV1, SavedDevices};
use super::{BOARD, CPUS, FIRMWARE, PCI, PLATFORM, Pager, VCPU, WriteLog, log, memory};
use crate::build::Report;
use crate::memory::virtio_mem::Room;
use crate::migration::Prepared;
use crate::progress::Progress;
use crate::{Machine, MachineError};

/// A snapshot that a guest continues from.
pub(crate) struct Saved {
    /// `None`: memory is there.
    snapshot: Option<Snapshot>,
    /// The memory of a guest that was moved here.
    moved: Option<Prepared>,
    pub(crate) cpus: CpuPlanStateV1,
    /// What its processors are made from here, once that was looked at.
    plan: Option<CpuPlan>,
    pub(crate) board: BoardStateV1,
    vcpus: Vec<VcpuStateV1>,
    firmware: FirmwareStateV1,
    platform: PlatformStateV1,
    mode: RestoreMode,
    elapsed: Elapsed,
    /// What provides memory on demand, until the machine has it.
    pager: Option<Pager>,
    /// `None`: they were taken by the devices.
    devices: Option<SavedDevices>,
}

impl Saved {
    /// Sorts what `snapshot` has, whose memory comes as `config` says.
    pub(crate) fn read(mut snapshot: Snapshot, config: &RestoreConfig) -> Result<Self, PayloadError> {
        let payloads = std::mem::take(&mut snapshot.payloads);
        let mut saved = Self::sort(payloads, Some(snapshot), None, config.memory_restore_mode)?;
        saved.elapsed = match config.clock {
            RestoreClock::Stands => Elapsed::Stands,
            RestoreClock::Passes => Elapsed::Passes,
        };
        Ok(saved)
    }

    /// Sorts `payloads`, of a guest whose memory is there already.
    pub(crate) fn moved(payloads: Payloads, mut memory: Prepared) -> Result<Self, PayloadError> {
        let pager = memory.pager.take();
        let mut saved = Self::sort(payloads, None, Some(memory), RestoreMode::Copy)?;
        saved.pager = pager;
        Ok(saved)
    }

    fn sort(
        mut payloads: Payloads,
        snapshot: Option<Snapshot>,
        moved: Option<Prepared>,
        mode: RestoreMode,
    ) -> Result<Self, PayloadError> {
        let all = &mut payloads;
        let mut vcpus = Vec::new();
        while let Some(vcpu) = all.take_if_there(VCPU, &vcpus.len().to_string())? {
            vcpus.push(vcpu);
        }
        let (cpus, firmware, platform) = (all.take(CPUS, "")?, all.take(FIRMWARE, "")?, all.take(PLATFORM, "")?);
        let (board, pci): (_, PciStateV1) = (all.take(BOARD, "")?, all.take(PCI, "")?);
        let files = snapshot.as_ref().and_then(Snapshot::devices);
        Ok(Self {
            snapshot,
            moved,
            cpus,
            plan: None,
            board,
            vcpus,
            firmware,
            platform,
            mode,
            elapsed: Elapsed::Stands,
            pager: None,
            devices: Some(SavedDevices { pci, payloads, files }),
        })
    }

    /// The CPU that the guest was given.
    fn processor(&self) -> Result<GuestProcessor, StateError> {
        saved_processor(&self.cpus, &self.vcpus, &self.platform)
    }

    /// Makes sure that this host has all of the CPU that the guest was given, and returns what its processors are made from.
    pub(crate) fn plan(&mut self, kvm: &Kvm) -> Result<CpuPlan, MachineError> {
        if let Some(plan) = &self.plan {
            return Ok(plan.clone());
        }
        crate::cpu_features::check(kvm, &self.processor()?)?;
        let plan = CpuPlan::restore(kvm, &self.cpus)?;
        self.plan = Some(plan.clone());
        Ok(plan)
    }

    /// What snapshots build on that build on this one, if it was saved for that.
    pub(crate) fn itself(&self) -> Option<&Base> {
        self.snapshot.as_ref()?.itself()
    }

    /// The memory, if it is there already.
    pub(crate) fn memory(&self) -> Option<&GuestMemoryHandle> {
        self.moved.as_ref().map(|moved| &moved.handle)
    }

    /// The room of memory devices, once, if it is there already.
    pub(crate) fn rooms(&mut self) -> Option<Vec<Room>> {
        self.moved.as_mut()?.rooms.take()
    }

    /// Whether a guest that was moved has the memory devices that it was offered with.
    pub(crate) fn check_devices(&self) -> Result<(), MachineError> {
        let places = self.board.memory_places();
        match &self.moved {
            Some(moved) => moved.check_devices(places.iter().map(|place| (place.start, place.size))),
            None => Ok(()),
        }
    }

    /// Whether memory becomes that of the file.
    pub(crate) fn is_mapped(&self) -> bool {
        self.mode == RestoreMode::Mapped
    }

    /// Begins to provide memory, if it comes on demand.
    pub(crate) fn begin(
        &mut self,
        sandbox: &Arc<dyn Sandbox>,
        events: &Arc<EventLog>,
        report: &Report,
    ) -> Result<(), MachineError> {
        if self.mode == RestoreMode::OnDemand
            && let Some(snapshot) = &self.snapshot
        {
            self.pager = Some(Pager::start(snapshot.saved_memory()?, sandbox, events, report)?);
        }
        Ok(())
    }

    /// What provides memory, if that comes on demand: it has to outlive whoever may touch it.
    pub(crate) fn pager(&mut self) -> Option<Pager> {
        self.pager.take()
    }

    /// What the devices continue from, once.
    pub(crate) fn devices(&mut self) -> SavedDevices {
        self.devices.take().unwrap_or_default()
    }

    /// Fills what of `memory` is there before its devices are.
    pub(crate) fn fill(
        &self,
        memory: &GuestMemory,
        backing: &Backing,
        progress: Progress<'_>,
    ) -> Result<(), MachineError> {
        progress.note("memory");
        let here = |range: &MemoryRange| memory.find_region(GuestAddress(range.gpa)).is_some();
        self.put(memory, backing, here, progress)
    }

    /// Fills what of `memory` was not in `before`. Now all has to be there.
    pub(crate) fn fill_rest(
        &self,
        memory: &GuestMemory,
        before: &GuestMemory,
        backing: &Backing,
        progress: Progress<'_>,
    ) -> Result<(), MachineError> {
        match (&self.snapshot, &self.moved) {
            (Some(snapshot), _) => memory::check(memory, snapshot)?,
            (None, Some(moved)) => moved.check(memory)?,
            (None, None) => {}
        }
        let new = |range: &MemoryRange| before.find_region(GuestAddress(range.gpa)).is_none();
        self.put(memory, backing, new, progress)?;
        if let Some(pager) = &self.pager {
            pager.seal();
        }
        Ok(())
    }

    fn put(
        &self,
        memory: &GuestMemory,
        backing: &Backing,
        wanted: impl Fn(&MemoryRange) -> bool,
        progress: Progress<'_>,
    ) -> Result<(), MachineError> {
        let Some(snapshot) = &self.snapshot else {
            return Ok(());
        };
        if let Some(pager) = &self.pager {
            let mut ranges = snapshot.ranges().iter().filter(|range| wanted(range));
            return ranges.try_for_each(|range| pager.add(memory, range));
        }
        if !self.is_mapped() {
            return Ok(memory::fill(memory, snapshot, wanted, progress)?);
        }
        let chained =
            || SnapshotError::Memory("it is in several files, which cannot be mapped; use Copy or OnDemand".to_owned());
        let file = snapshot.memory_file().ok_or_else(chained)?;
        for range in snapshot.ranges().iter().filter(|range| wanted(range)) {
            let region = memory.find_region(GuestAddress(range.gpa));
            if let Some(region) = region.filter(|region| region.len() == range.size) {
                map_copy_on_write(region, backing.of(range.gpa), file, range.offset)?;
            }
        }
        Ok(())
    }

    pub(crate) fn vcpus(&self, vm: &Vm, plan: &CpuPlan, platform: &Platform) -> Result<Vcpus, MachineError> {
        Ok(recreate_vcpus(vm, plan, platform, &self.vcpus, &self.firmware)?)
    }

    /// Puts the interrupt controllers where they were, when nothing else is missing, and lets time go on.
    pub(crate) fn restore_platform(&self, vm: &Vm, platform: &Platform, vcpus: &[Vcpu]) -> Result<(), MachineError> {
        platform.restore(vm, &self.platform)?;
        Ok(restore_time(vm, vcpus, &self.vcpus, &self.platform, self.elapsed)?)
    }
}

impl Machine {
    /// Writes everything of a guest that is paused, but for what is in its configuration: all of its memory, or what was written since
    /// `base`, which the log is of. `track`: it is asked whether writes are logged from now on, for a snapshot that builds on this one.
    /// Returns also how many bytes of memory were written.
    pub(crate) fn save(
        &mut self,
        writer: &mut SnapshotWriter,
        base: Option<&Base>,
        track: bool,
        progress: Progress<'_>,
    ) -> Result<(Payloads, u64), MachineError> {
        if let Some(pager) = &self.pager {
            progress.note("memory of the snapshot before");
            pager.complete()?;
        }
        progress.note("processors and devices");
        // KVM writes some of that into the guest's memory: what was written is looked at afterwards.
        let payloads = self.save_state(Some(&mut *writer))?;
        let memory = self.memory.memory();
        let slots = self.vm.memory_slots();
        match &mut self.log {
            Some(log) => log.collect(&memory, slots)?,
            None if track => log::begin(&memory, slots)?,
            None => {}
        }
        let parts = match (&self.log, base) {
            (Some(log), Some(_)) => log.parts(&memory),
            _ => memory::whole(&memory),
        };
        let written = memory::save(&memory, self.devices.backing(), parts, writer, progress)?;
        Ok((payloads, written))
    }

    /// The guest was saved as `base`, for others to build on, and did not run since: from now on the log is of that. Or it was not, or
    /// `track` says that nobody will; then the log stays as it is, or ends.
    pub(crate) fn saved(&mut self, base: Option<Base>, track: Option<bool>) {
        let slots = self.vm.memory_slots();
        match (base, track) {
            (Some(base), Some(true)) => self.log = Some(WriteLog::new(base, &self.memory.memory(), slots)),
            (_, Some(false)) => self.log = None,
            _ => {}
        }
        if self.log.is_none() {
            log::end(slots);
        }
    }

    /// Logs what is written since the guest was what the snapshot `base` has, which it still is.
    pub(crate) fn log_since(&mut self, base: Base) -> Result<(), MachineError> {
        log::begin(&self.memory.memory(), self.vm.memory_slots())?;
        self.saved(Some(base), Some(true));
        Ok(())
    }

    /// What was written since a snapshot is not known any more.
    pub(crate) fn forget_log(&mut self, why: &str) {
        if let Some(log) = self.log.take() {
            tracing::info!(
                "what is written since {} is not logged any more: {why}",
                log.base().directory.display()
            );
            log::end(self.vm.memory_slots());
        }
    }

    /// What a guest that is paused is, beside its memory and what is in its configuration. What only drivers of the host understand goes to
    /// `writer`, if there is one.
    pub(crate) fn save_state(&mut self, writer: Option<&mut SnapshotWriter>) -> Result<Payloads, MachineError> {
        let mut payloads = Payloads::default();
        payloads.put(CPUS, "", &self.plan.save())?;
        let plan = self.plan.clone();
        let vcpus = self.vcpus.on_each(move |_, vcpu| save_vcpu(vcpu, &plan))?;
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            payloads.put(VCPU, &index.to_string(), &vcpu?)?;
        }
        payloads.put(FIRMWARE, "", &self.vcpus.firmware().save())?;
        payloads.put(PLATFORM, "", &self.platform.save(&self.vm)?)?;
        payloads.put(BOARD, "", &self.board.save())?;
        let pci = self.devices.save(&mut payloads, writer)?;
        payloads.put(PCI, "", &pci)?;
        Ok(payloads)
    }
}
