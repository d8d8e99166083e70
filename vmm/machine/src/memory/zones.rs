//! Memory zones of a guest: `vm.resize-zone`, and how much each has.

use triarch_api::events::kind;
use triarch_api::{ApiError, Operation, ResizeZone, ZoneCounts};
use triarch_virtio::mem::MemError;

use super::plan::device_id;
use crate::control::{Cause, Controller};

impl Controller {
    /// `vm.resize-zone`. A target that is reached already is always fine.
    pub(crate) fn resize_zone(&mut self, target: &ResizeZone) -> Result<(), ApiError> {
        self.tell(&kind::VM_RESIZING, Cause::Client);
        let begun = self.resizes.begun();
        let zones = self.config.iter().flat_map(|config| config.memory.zones());
        let Some((at, zone)) = zones.enumerate().find(|(_, zone)| zone.id == target.id) else {
            return Err(ApiError::NotFound(format!(
                "there is no memory zone '{}'; config.memory.zones of vm.info has those there are",
                target.id
            )));
        };
        let desired = target.desired_ram;
        if self.machine.is_none() {
            self.change(|config| {
                if let Some(zone) = config.memory.zones.iter_mut().flatten().nth(at) {
                    zone.size = desired;
                }
                Ok(())
            })?;
        } else {
            let (device, bytes) = self.plan_zone(&zone.id, zone.size, desired)?;
            self.change(|config| {
                if let Some(zone) = config.memory.zones.iter_mut().flatten().nth(at) {
                    zone.hotplugged_size = Some(bytes).filter(|bytes| *bytes > 0);
                }
                Ok(())
            })?;
            if let Some(device) = device {
                self.resize_memory(device, bytes, Operation::ResizeZone)?;
            }
        }
        // A job, also one that has ended by now, tells of its end itself.
        if !self.resizes.any() && self.resizes.begun() == begun {
            self.tell(&kind::VM_RESIZED, Cause::Client);
        }
        Ok(())
    }

    /// What `desired` bytes mean for zone `id` of a guest, which started with `size` bytes there: its device, if it has one, and how many
    /// bytes should be plugged in it.
    fn plan_zone(&self, id: &str, size: u64, desired: u64) -> Result<(Option<usize>, u64), ApiError> {
        let bad = |text: String| Err(ApiError::BadRequest(format!("desired_ram is {desired} bytes; {text}")));
        let Some(bytes) = desired.checked_sub(size) else {
            return bad(format!("the zone '{id}' keeps the {size} bytes it started with"));
        };
        let name = device_id(id);
        let memories = self.machine.iter().flat_map(|machine| machine.memories());
        let Some((at, (_, memory))) = memories.enumerate().find(|(_, (device, _))| *device == name) else {
            return match bytes {
                0 => Ok((None, 0)),
                _ => bad(format!(
                    "the zone '{id}' has {size} and no hotplug_size, so it stays as it is"
                )),
            };
        };
        match memory.check(bytes) {
            Ok(()) => Ok((Some(at), bytes)),
            Err(MemError::Size { block, size: room, .. }) => bad(format!(
                "the zone '{id}' can have {size}, what the guest started with, and up to {room} more in steps of {block}"
            )),
            Err(error) => Err(ApiError::bad_request(&error)),
        }
    }

    /// `vm.resize` with `desired_ram` is for memory in one piece.
    pub(crate) fn refuse_zones(&self, desired_ram: Option<u64>) -> Result<(), ApiError> {
        let zoned = self
            .config
            .as_ref()
            .is_some_and(|config| !config.memory.zones().is_empty());
        match desired_ram {
            Some(_) if zoned => Err(ApiError::BadRequest(
                "desired_ram is for memory in one piece, and this VM has memory zones; resize one of them with vm.resize-zone"
                    .to_owned(),
            )),
            _ => Ok(()),
        }
    }

    /// How much memory each zone has; nothing without a guest or without zones.
    pub(crate) fn zone_counts(&self) -> Vec<ZoneCounts> {
        let (Some(machine), Some(config)) = (&self.machine, &self.config) else {
            return Vec::new();
        };
        let zones = config.memory.zones().iter().map(|zone| {
            let name = device_id(&zone.id);
            let memory = machine.memories().iter().find(|(device, _)| *device == name);
            ZoneCounts {
                id: zone.id.clone(),
                target: zone.size + memory.map_or(0, |(_, memory)| memory.requested()),
                actual: zone.size + memory.map_or(0, |(_, memory)| memory.plugged()),
            }
        });
        zones.collect()
    }
}
