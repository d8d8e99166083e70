//! Memory of a running guest by virtio-mem: the host's side of the devices, and what clients ask of them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use triarch_api::{ApiError, Handler, Operation};
use triarch_hypervisor::MemorySlots;
use triarch_memory::{GuestMemory, GuestMemoryHandle, GuestRegion, MemoryError, SparseMemory};
use triarch_vfio::DmaMap;
use triarch_virtio::mem::{MIN_BLOCK, Mem, MemError, MemHandle, MemOptions, MemoryHost};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use super::plan::{MemoryPlan, ZonePlan};
use crate::build::Report;
use crate::control::Controller;
use crate::resize::{Goal, Part};
use crate::{GuestEvent, Machine, MachineError};

/// The guest gets and loses memory slots in parts of this size at least: what Linux adds and removes at once on most machines.
const MIN_PART: u64 = 128 << 20;
/// How long a driver may stand still before it is told again.
const STANDSTILL: Duration = Duration::from_secs(5);
/// Most parts of a region: each may take a memory slot, of which there are 32,764 at most for everything.
const MAX_PARTS: u64 = 512;

/// Room for a guest's memory that no device has yet.
pub(crate) struct Room {
    /// The device's id.
    pub(crate) id: String,
    memory: SparseMemory,
    requested: u64,
    node: Option<u16>,
}

/// The rooms of a guest by virtio-mem. They cost nothing as long as the guest has no memory there.
pub(crate) fn rooms(plan: &MemoryPlan) -> Result<Vec<Room>, MachineError> {
    rooms_of(plan, |_, _| Ok(None))
}

/// The same of files that have what the guest had there, where `file` has one.
pub(crate) fn rooms_of(
    plan: &MemoryPlan,
    mut file: impl FnMut(&ZonePlan, &Range<u64>) -> Result<Option<File>, MachineError>,
) -> Result<Vec<Room>, MachineError> {
    let mut rooms = Vec::new();
    for zone in &plan.zones {
        let Some(range) = zone.room.clone() else { continue };
        let memory = match file(zone, &range)? {
            Some(file) => SparseMemory::adopt(range, &zone.ram.options, &file)?,
            None => SparseMemory::new(range, &zone.ram.options)?,
        };
        rooms.push(Room {
            id: zone.device.clone(),
            memory,
            requested: zone.requested,
            node: zone.node.and_then(|node| u16::try_from(node).ok()),
        });
    }
    Ok(rooms)
}

impl Room {
    /// The part of it at the GPAs `part`, if it is in this room at all.
    pub(crate) fn part(&mut self, part: Range<u64>) -> Option<Result<Arc<GuestRegion>, MemoryError>> {
        let range = self.memory.range();
        let inside = range.start <= part.start && part.end <= range.end;
        inside.then(|| self.memory.part(part))
    }
}

/// What of `rooms` daemons share.
pub(crate) fn shared(rooms: &[Room]) -> Result<Vec<Arc<GuestRegion>>, MachineError> {
    let shared: Result<Vec<_>, _> = rooms.iter().map(|room| room.memory.shared()).collect();
    Ok(shared?.into_iter().flatten().collect())
}

/// Makes the device of `room` in a guest with this memory and these slots.
pub(crate) fn device(
    room: Room,
    memory: &GuestMemoryHandle,
    slots: &MemorySlots,
    report: &Report,
    reach: &DmaMap,
) -> Result<Mem, MemError> {
    let range = room.memory.range();
    let options = options(&range, room.memory.page_size(), room.requested, room.node);
    let host = Host {
        slots: slots.clone(),
        memory: memory.clone(),
        room: room.memory,
        reach: reach.clone(),
        block: options.block,
    };
    let report = report.clone();
    let observer = Box::new(move || report(GuestEvent::Memory));
    Mem::new(&room.id, options, Box::new(host), observer)
}

/// How a region is divided that the host backs with pages of `page` bytes.
fn options(range: &Range<u64>, page: u64, requested: u64, node: Option<u16>) -> MemOptions {
    let size = range.end - range.start;
    let block = page.max(MIN_BLOCK);
    let part = size.div_ceil(MAX_PARTS).next_power_of_two();
    MemOptions {
        addr: range.start,
        size,
        block,
        part: part.max(MIN_PART).max(block),
        node,
        requested,
    }
}

/// Makes parts of a region memory of the guest: for its vCPUs by slots of KVM, for its devices in what they know of its memory.
struct Host {
    slots: MemorySlots,
    memory: GuestMemoryHandle,
    room: SparseMemory,
    /// What devices of the host reach.
    reach: DmaMap,
    /// Bytes that come and go together.
    block: u64,
}

impl Host {
    /// Puts another map of memory in the place of the one there is.
    fn change(&self, change: impl FnOnce(&GuestMemory) -> io::Result<GuestMemory>) -> io::Result<()> {
        let guard = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&self.memory.memory())?;
        guard.replace(changed);
        Ok(())
    }

    fn insert(&self, region: &Arc<GuestRegion>) -> io::Result<()> {
        self.change(|memory| memory.insert_region(region.clone()).map_err(io::Error::other))
    }
}

fn no_part(error: MemoryError) -> io::Error {
    io::Error::other(MachineError::from(error).chain())
}

impl MemoryHost for Host {
    fn open(&mut self, part: Range<u64>) -> io::Result<()> {
        let region = self.room.part(part.clone()).map_err(no_part)?;
        self.slots.map_region(&region).map_err(io::Error::other)?;
        if let Err(error) = self.insert(&region) {
            let _ = self.slots.unmap_region(part.start);
            return Err(error);
        }
        Ok(())
    }

    fn close(&mut self, part: Range<u64>) -> io::Result<()> {
        let start = vm_memory::GuestAddress(part.start);
        let mut removed = None;
        self.change(|memory| {
            let (without, region) = memory
                .remove_region(start, part.end - part.start)
                .map_err(io::Error::other)?;
            removed = Some(region);
            Ok(without)
        })?;
        if let Err(error) = self.slots.unmap_region(part.start) {
            if let Some(region) = removed {
                self.insert(&region)?;
            }
            return Err(io::Error::other(error));
        }
        Ok(())
    }

    fn fill(&mut self, blocks: Range<u64>) -> io::Result<()> {
        self.room.fill(blocks.clone())?;
        let memory = self.memory.memory();
        for gpa in blocks.step_by(self.block as usize) {
            let host = memory.get_host_address(vm_memory::GuestAddress(gpa));
            let host = host.map_err(io::Error::other)? as u64;
            // On error everything is discarded.
            let reached = self.reach.insert(gpa, self.block, host);
            reached.map_err(|error| io::Error::other(triarch_api::chain(&error)))?;
        }
        Ok(())
    }

    fn discard(&mut self, blocks: Range<u64>) -> io::Result<()> {
        // Before the pages go: a device would keep those.
        let reached = self.reach.remove(blocks.clone());
        let done = self.room.discard(blocks);
        if done.is_err() {
            for (gpa, len, host) in reached {
                if let Err(error) = self.reach.insert(gpa, len, host) {
                    tracing::warn!("{error}");
                }
            }
        }
        done
    }
}

impl Controller {
    /// Whether the memory of the guest that runs changes by virtio-mem.
    pub(crate) fn has_virtio_mem(&self) -> bool {
        self.machine
            .as_ref()
            .is_some_and(|machine| !machine.memories().is_empty())
    }

    /// What `vm.resize` with `desired_ram` means for a guest with `size` bytes of RAM: how many bytes it should have plugged.
    pub(crate) fn plan_memory(&self, size: u64, desired: u64) -> Result<u64, ApiError> {
        let bad = |text: String| Err(ApiError::BadRequest(text));
        let Some((_, memory)) = self.machine.as_ref().and_then(|machine| machine.memories().first()) else {
            return bad("the guest has no room for more memory; give it some with memory.hotplug_size".into());
        };
        let Some(bytes) = desired.checked_sub(size) else {
            return bad(format!(
                "desired_ram is {desired} bytes, and the guest keeps the {size} bytes it started with; use the balloon for less"
            ));
        };
        match memory.check(bytes) {
            Ok(()) => Ok(bytes),
            Err(MemError::Size { block, size: room, .. }) => bad(format!(
                "desired_ram is {desired} bytes; it must be {size}, what the guest started with, or up to {room} more in steps of {block}"
            )),
            Err(error) => bad(error.to_string()),
        }
    }

    /// Asks the guest for `bytes` plugged in device `at`.
    pub(crate) fn resize_memory(&mut self, at: usize, bytes: u64, operation: Operation) -> Result<(), MachineError> {
        let Some((_, memory)) = self.machine.as_ref().and_then(|machine| machine.memories().get(at)) else {
            return Ok(());
        };
        let part = Part::Memory(at);
        if self.resizes.target(part) == Some(bytes) {
            return Ok(());
        }
        memory
            .set_requested(bytes)
            .map_err(MachineError::host("tell the guest of the size of its memory"))?;
        match memory.status().plugged {
            plugged if plugged == bytes => self.resizes.replace(part, bytes),
            plugged => {
                let goal = Goal {
                    target: bytes,
                    now: plugged,
                    end: bytes,
                };
                let phase = match bytes > plugged {
                    true => "the guest has to plug memory",
                    false => "the guest has to unplug memory",
                };
                let (jobs, kind) = (self.inbox.jobs(), operation.name());
                self.resizes.begin(jobs, kind, part, phase, goal);
            }
        }
        Ok(())
    }

    /// The guest plugged or unplugged memory.
    pub(crate) fn memory_stands(&mut self) {
        let Some(machine) = &self.machine else { return };
        let stand: Vec<u64> = machine.memories().iter().map(|(_, m)| m.status().plugged).collect();
        for (at, plugged) in stand.into_iter().enumerate() {
            if self.resizes.stands(Part::Memory(at), plugged) {
                let outcome = format!("the guest has {} MiB plugged", plugged >> 20);
                self.end_resize(Part::Memory(at), Some(&outcome), Ok(()));
            }
        }
    }

    /// Time has passed while the guest runs: a driver that could not go on tries again. Linux's would by itself only after 50 s.
    pub(crate) fn remind_of_memory(&mut self) {
        for part in self.resizes.parts() {
            if let Part::Memory(at) = part
                && self.resizes.is_to_be_told(part, STANDSTILL)
                && let Some((_, memory)) = self.machine.as_ref().and_then(|machine| machine.memories().get(at))
                && let Err(error) = memory.set_requested(memory.status().requested)
            {
                tracing::warn!("cannot tell the guest of the size of its memory: {error}");
            }
        }
    }

    /// The guest did not get where it should.
    pub(crate) fn give_up_on_memory(&mut self, at: usize) {
        let part = Part::Memory(at);
        let mut reason = self.resizes.so_far(part);
        let memory = self.machine.as_ref().and_then(|machine| machine.memories().get(at));
        if let Some((_, memory)) = memory {
            let (status, goal) = (memory.status(), self.resizes.target(part).unwrap_or(0));
            reason.push_str(match (status.active, status.plugged > goal) {
                (false, _) => ": it has no driver for its memory device",
                (true, true) => ": what is left it uses for what it cannot move",
                (true, false) => ": its driver adds no more",
            });
        }
        self.end_resize(part, None, Err(&reason));
    }

    /// Nobody will plug memory any more.
    pub(crate) fn abandon_memory(&mut self) {
        for part in self.resizes.parts() {
            if let Part::Memory(_) = part {
                self.resizes.abandon(part);
            }
        }
    }
}

impl Machine {
    /// Bytes of its memory devices that the guest has plugged.
    pub(crate) fn plugged(&self) -> u64 {
        self.memories().iter().map(|(_, memory)| memory.plugged()).sum()
    }
}

/// A memory device by its id.
pub(crate) type Named = (String, MemHandle);

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn regions_are_divided_into_few_parts_of_whole_blocks() {
        let of = |size: u64, page| {
            let options = options(&(4 * GIB..4 * GIB + size), page, 0, None);
            (options.block, options.part)
        };
        assert_eq!(of(GIB, 4096), (2 * MIB, 128 * MIB));
        assert_eq!(of(64 * GIB, 4096), (2 * MIB, 128 * MIB));
        assert_eq!(of(64 * GIB + 2 * MIB, 4096), (2 * MIB, 256 * MIB));
        assert_eq!(of(4096 * GIB, 2 * MIB), (2 * MIB, 8 * GIB));
        assert_eq!(of(16 * GIB, GIB), (GIB, GIB));
    }
}
