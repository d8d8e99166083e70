//! Which memory was written since a snapshot, so that the next one has that only.
//!
//! It is written by vCPUs and by the host's kernel for them, which KVM logs; by the VMM's devices, and by what gives memory back to the
//! host, which mark it in the bitmap of its region. Daemons write unseen: a guest with devices of theirs has no log.

use std::collections::BTreeMap;
use std::ops::Range;

use triarch_hypervisor::MemorySlots;
use triarch_memory::{GuestMemory, host_page};
use triarch_state::{Base, Pages, Part};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::MachineError;
use crate::migration::{marks, push_runs};

/// What was written since a snapshot.
pub(crate) struct WriteLog {
    base: Base,
    /// What of each region was written, by its GPA.
    regions: BTreeMap<u64, Written>,
}

/// What of a region was written.
struct Written {
    /// Tells it from others that are at its place later.
    serial: u64,
    /// A bit for each page of the host.
    words: Vec<u64>,
}

/// Has writes to `memory` be logged from now on; those before are forgotten. The guest must not run.
pub(super) fn begin(memory: &GuestMemory, slots: &MemorySlots) -> Result<(), MachineError> {
    slots.log_writes(true)?;
    memory.iter().for_each(|region| marks(region).reset());
    Ok(())
}

/// Ends that.
pub(super) fn end(slots: &MemorySlots) {
    if let Err(error) = slots.log_writes(false) {
        tracing::warn!("writes of the guest are still logged: {}", triarch_api::chain(&error));
    }
}

impl WriteLog {
    /// Of `memory`, which is what the snapshot `base` has. It is logged already, and nothing was written since.
    pub(super) fn new(base: Base, memory: &GuestMemory, slots: &MemorySlots) -> Self {
        let region = |(gpa, serial)| {
            let words = Vec::new();
            (gpa, Written { serial, words })
        };
        let known = gpas(memory).filter_map(|gpa| Some((gpa, slots.serial(gpa)?)));
        Self {
            base,
            regions: known.map(region).collect(),
        }
    }

    /// The snapshot.
    pub(crate) fn base(&self) -> &Base {
        &self.base
    }

    /// Takes note of what was written until now. It stays noted until there is another snapshot to build on.
    pub(super) fn collect(&mut self, memory: &GuestMemory, slots: &MemorySlots) -> Result<(), MachineError> {
        for region in memory.iter() {
            let gpa = region.start_addr().raw_value();
            let mut words = slots.written(gpa)?;
            let devices = marks(region).get_and_reset();
            words.resize(words.len().max(devices.len()), 0);
            merge(&mut words, &devices);
            let serial = slots.serial(gpa);
            match self.regions.get_mut(&gpa) {
                Some(known) if Some(known.serial) == serial => {
                    merge(&mut words, &known.words);
                    known.words = words;
                }
                // What is there now came later: the snapshot has nothing of it, whatever it has there.
                _ => drop(self.regions.remove(&gpa)),
            }
        }
        Ok(())
    }

    /// What of `memory` the next snapshot has to have.
    pub(super) fn parts(&self, memory: &GuestMemory) -> Vec<Part> {
        let part = |range: Range<u64>| {
            let pages = self.regions.get(&range.start).map(|written| {
                let mut runs = Vec::new();
                let size = range.end - range.start;
                push_runs(&mut runs, &written.words, 0, size, host_page());
                Pages::of(size, runs)
            });
            Part { range, pages }
        };
        super::memory::ranges(memory).into_iter().map(part).collect()
    }
}

fn gpas(memory: &GuestMemory) -> impl Iterator<Item = u64> {
    memory.iter().map(|region| region.start_addr().raw_value())
}

fn merge(words: &mut [u64], more: &[u64]) {
    words.iter_mut().zip(more).for_each(|(word, more)| *word |= more);
}
