//! What a whole guest saves, and continues from.

use triarch_arch::{
    BoardStateV1, CpuPlan, CpuPlanStateV1, Elapsed, Platform, PlatformStateV1, VcpuStateV1, Vcpus, recreate_vcpus,
    restore_time, save_vcpu,
};
use triarch_hypervisor::{FirmwareStateV1, Vcpu, Vm};
use triarch_memory::{GuestMemory, RamOptions, map_copy_on_write};
use triarch_state::{MemoryRange, PayloadError, Payloads, Snapshot, SnapshotWriter};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::devices::{PciStateV1, SavedDevices};
use super::{BOARD, CPUS, FIRMWARE, PCI, PLATFORM, VCPU, memory};
use crate::progress::Progress;
use crate::{Machine, MachineError};

/// A snapshot that a guest continues from.
pub(crate) struct Saved {
    snapshot: Snapshot,
    pub(crate) cpus: CpuPlanStateV1,
    pub(crate) board: BoardStateV1,
    vcpus: Vec<VcpuStateV1>,
    firmware: FirmwareStateV1,
    platform: PlatformStateV1,
    /// Memory is mapped, not copied.
    mapped: bool,
    /// `None`: they were taken by the devices.
    devices: Option<SavedDevices>,
}

impl Saved {
    /// Sorts what `snapshot` has, whose memory is to be `mapped` or else copied.
    pub(crate) fn read(mut snapshot: Snapshot, mapped: bool) -> Result<Self, PayloadError> {
        let mut payloads = std::mem::take(&mut snapshot.payloads);
        let all = &mut payloads;
        let mut vcpus = Vec::new();
        while let Some(vcpu) = all.take_if_there(VCPU, &vcpus.len().to_string())? {
            vcpus.push(vcpu);
        }
        let (cpus, firmware, platform) = (all.take(CPUS, "")?, all.take(FIRMWARE, "")?, all.take(PLATFORM, "")?);
        let (board, pci): (_, PciStateV1) = (all.take(BOARD, "")?, all.take(PCI, "")?);
        Ok(Self {
            snapshot,
            cpus,
            board,
            vcpus,
            firmware,
            platform,
            mapped,
            devices: Some(SavedDevices { pci, payloads }),
        })
    }

    /// Whether memory becomes that of the file.
    pub(crate) fn is_mapped(&self) -> bool {
        self.mapped
    }

    /// What the devices continue from, once.
    pub(crate) fn devices(&mut self) -> SavedDevices {
        self.devices.take().unwrap_or_default()
    }

    /// Fills what of `memory` is there before its devices are.
    pub(crate) fn fill(
        &self,
        memory: &GuestMemory,
        options: &RamOptions,
        progress: Progress<'_>,
    ) -> Result<(), MachineError> {
        progress.note("memory");
        let here = |range: &MemoryRange| memory.find_region(GuestAddress(range.gpa)).is_some();
        self.put(memory, options, here, progress)
    }

    /// Fills what of `memory` was not in `before`. Now all has to be there.
    pub(crate) fn fill_rest(
        &self,
        memory: &GuestMemory,
        before: &GuestMemory,
        options: &RamOptions,
        progress: Progress<'_>,
    ) -> Result<(), MachineError> {
        memory::check(memory, &self.snapshot)?;
        let new = |range: &MemoryRange| before.find_region(GuestAddress(range.gpa)).is_none();
        self.put(memory, options, new, progress)
    }

    fn put(
        &self,
        memory: &GuestMemory,
        options: &RamOptions,
        wanted: impl Fn(&MemoryRange) -> bool,
        progress: Progress<'_>,
    ) -> Result<(), MachineError> {
        if !self.mapped {
            return Ok(memory::fill(memory, &self.snapshot, wanted, progress)?);
        }
        for range in self.snapshot.ranges().iter().filter(|range| wanted(range)) {
            let region = memory.find_region(GuestAddress(range.gpa));
            if let Some(region) = region.filter(|region| region.len() == range.size) {
                map_copy_on_write(region, options, self.snapshot.memory_file(), range.offset)?;
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
        Ok(restore_time(vm, vcpus, &self.vcpus, &self.platform, Elapsed::Stands)?)
    }
}

impl Machine {
    /// Writes everything of a guest that is paused, but for what is in its configuration.
    pub(crate) fn save(
        &mut self,
        writer: &mut SnapshotWriter,
        progress: Progress<'_>,
    ) -> Result<Payloads, MachineError> {
        progress.note("processors and devices");
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
        let pci = self.devices.save(&mut payloads)?;
        payloads.put(PCI, "", &pci)?;
        memory::save(&self.memory.memory(), writer, progress)?;
        Ok(payloads)
    }
}
