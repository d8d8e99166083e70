//! What clients ask about devices of a guest that runs.

use std::sync::Arc;
use std::time::Instant;

use triarch_api::events::kind;
use triarch_api::{AddedDevice, ApiError, Handler, Operation, RemoveDevice, VmConfig};
use triarch_legacy::PciSlot;
use triarch_net::Tap;
use triarch_pci::{AddError, PciAddress};

use super::removal::{Asked, Manner};
use crate::MachineError;
use crate::backends::{End, HandedTaps, Opener};
use crate::changes::{Direction, Outcome};
use crate::configured::DeviceConfig;
use crate::control::Controller;

/// What a guest that is described by a device tree is told of devices.
const NO_ACPI: &str =
    "a guest that a device tree describes cannot hear of devices that come or go; leave --platform dtb out";

impl Controller {
    /// Gives the guest that runs the device `id` of `config`, the configuration to be; `tap` is its tap, if a client opened it. Without a
    /// guest it is left to the next one. On error nothing has changed.
    pub(crate) fn plug(
        &mut self,
        config: &VmConfig,
        id: &str,
        tap: Option<&Arc<Tap>>,
    ) -> Result<Option<AddedDevice>, ApiError> {
        if self.machine.is_none() {
            return Ok(None);
        }
        self.look_at_slots();
        let result = self.plug_into_guest(config, id, tap);
        let outcome = if result.is_ok() { Outcome::Done } else { Outcome::Failed };
        self.plugs.meters.count(Direction::Add, outcome, 1);
        let address = result?;
        self.show_meters();
        self.plugs.announced = Some(Instant::now());
        self.watch_slots();
        let bdf = address.to_string();
        let properties = [("id", id.into()), ("bdf", bdf.as_str().into())];
        self.inbox.events().post(&kind::PCI_ADDED, &properties);
        let id = id.to_owned();
        Ok(Some(AddedDevice { id, bdf }))
    }

    fn plug_into_guest(&mut self, config: &VmConfig, id: &str, tap: Option<&Arc<Tap>>) -> Result<PciAddress, ApiError> {
        let (Some(machine), Some(backends), Some(device)) =
            (&mut self.machine, &mut self.backends, DeviceConfig::find(config, id))
        else {
            return Err(ApiError::Failed(
                "there is no guest that the device could go to".to_owned(),
            ));
        };
        let Some(slots) = machine.slots().cloned() else {
            return Err(ApiError::Unsupported(NO_ACPI.to_owned()));
        };
        if config.needs_shared_memory() && !machine.shares_memory() {
            return Err(ApiError::BadRequest(format!(
                "a daemon is to serve '{id}', and the memory of this guest is not shared, which cannot change while it runs; start it \
                 with memory.shared on"
            )));
        }
        // What the daemon touched first would be zeroes.
        if config.needs_shared_memory() && !machine.has_its_memory() {
            return Err(ApiError::Busy(format!(
                "a daemon is to serve '{id}', and memory of this guest still comes from its snapshot; try again after the event \
                 memory-restored"
            )));
        }
        if matches!(device, DeviceConfig::Host(_)) && !machine.has_its_memory() {
            return Err(ApiError::Busy(format!(
                "'{id}' reaches all of the guest's memory, and some of that still comes from its snapshot; try again after the event \
                 memory-restored"
            )));
        }
        let place = free_slot(&slots.peek()).ok_or(MachineError::Slot {
            id: id.to_owned(),
            source: AddError::Full(0),
        })?;
        let handed: HandedTaps = tap.map(|tap| (id.to_owned(), tap.clone())).into_iter().collect();
        let opener = Opener {
            handed: &handed,
            daemons: self.daemons.as_ref(),
            sandbox: &self.sandbox,
            iommu: &self.iommu,
            moved: None,
        };
        let end = End::open(device, opener)?;
        let address = PciAddress::from_devfn(0, 0, place << 3);
        machine.devices_mut().plug(device, &end, address)?;
        backends.insert(id, end, address);
        if machine.devices().served().iter().any(|(served, _)| served == id) {
            machine.forget_log("what the daemon of a new device writes is not seen");
        }
        slots.came(place);
        Ok(address)
    }

    /// `vm.remove-device` of a guest that runs.
    pub(crate) fn unplug(&mut self, device: &RemoveDevice) -> Result<(), ApiError> {
        let (id, force) = (&*device.id, device.force);
        self.look_at_slots();
        if self.plugs.is_leaving(id) {
            let text =
                format!("Too Many Requests: the host is taking '{id}' away already; the job tells when that is done");
            return Err(ApiError::Busy(text));
        }
        let Some((address, removable)) = self.machine.as_ref().and_then(|machine| machine.devices().find(id)) else {
            return Err(crate::edit::no_device(id, "device that can be removed"));
        };
        if !removable {
            return Err(ApiError::BadRequest(format!(
                "'{id}' stays as long as the guest runs; of what it has, disks, network interfaces, devices of daemons and of the host and the vsock can go"
            )));
        }
        if let Some(asked) = self.plugs.asked.iter().find(|asked| asked.id == id) {
            if force {
                asked.job.note("it is taken by force");
                self.take(id, Manner::Forced);
                return Ok(());
            }
            return Err(ApiError::Busy(format!(
                "Too Many Requests: the guest was asked for '{id}' already and has not given it back; force takes it"
            )));
        }
        let slots = self.machine.as_ref().and_then(|machine| machine.slots().cloned());
        if slots.is_none() && !force {
            return Err(ApiError::Unsupported(format!("{NO_ACPI}, or take it with force")));
        }
        let job = self.inbox.jobs().begin(Operation::RemoveDevice.name());
        let slot = address.device();
        let unheard = |slot: Option<&PciSlot>| slot.is_some_and(|slot| slot.unheard);
        let unseen = slots
            .as_ref()
            .is_some_and(|slots| unheard(slots.peek().get(usize::from(slot))))
            && !self
                .machine
                .as_ref()
                .is_some_and(|machine| machine.devices().touched(address));
        match slots {
            Some(slots) if !force && !unseen => {
                job.note(&format!("the guest has to give back '{id}'"));
                slots.ask_back(slot);
                self.plugs.asked.push(Asked {
                    id: id.to_owned(),
                    slot,
                    since: Instant::now(),
                    job,
                });
                self.watch_slots();
            }
            _ if unseen => self.take_for(id, Manner::Unseen, Some(job)),
            _ => self.take_for(id, Manner::Forced, Some(job)),
        }
        Ok(())
    }

    /// Shows everybody what the guest counts, after its devices changed.
    pub(super) fn show_meters(&self) {
        if let Some(machine) = &self.machine {
            self.outbox.show_meters(self.meters(machine));
        }
    }
}

/// The slot for a device that comes: the first that is free; one whose device was taken by force, so that its driver may still be there,
/// only when there is no other.
fn free_slot(slots: &[PciSlot]) -> Option<u8> {
    let number = |wanted: fn(&PciSlot) -> bool| (0u8..).zip(slots).find(|(_, slot)| wanted(slot)).map(|(n, _)| n);
    number(|slot| !slot.present && !slot.vanished).or_else(|| number(|slot| !slot.present))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_lost_its_device_by_force_is_the_last_choice() {
        let slot = |present, vanished| PciSlot {
            present,
            unheard: false,
            ejected: false,
            vanished,
            refusal: None,
        };
        let (taken, forced, free) = (slot(true, false), slot(false, true), slot(false, false));
        assert_eq!(free_slot(&[taken, forced, free, free]), Some(2));
        assert_eq!(free_slot(&[taken, forced, taken]), Some(1));
        assert_eq!(free_slot(&[taken; 32]), None);
    }
}
