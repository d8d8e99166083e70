//! What clients ask about devices of a guest that runs.

use std::collections::BTreeSet;
use std::time::Instant;

use triarch_api::events::kind;
use triarch_api::{AddedDevice, ApiError, Handler, Operation, RemoveDevice, VmConfig};
use triarch_legacy::PciSlot;
use triarch_pci::{AddError, BUSES_OF_ROOT, PciAddress};

use super::removal::{Asked, Manner};
use crate::MachineError;
use crate::backends::{End, Handed, HandedEnds, Opener};
use crate::changes::{Direction, Outcome};
use crate::configured::DeviceConfig;
use crate::control::Controller;

/// What a guest that is described by a device tree is told of devices.
const NO_ACPI: &str =
    "a guest that a device tree describes cannot hear of devices that come or go; leave --platform dtb out";

impl Controller {
    /// Gives the guest that runs the device `id` of `config`, the configuration to be; `handed` is what a client opened for it. Without a
    /// guest it is left to the next one. On error nothing has changed.
    pub(crate) fn plug(
        &mut self,
        config: &VmConfig,
        id: &str,
        handed: Option<&Handed>,
    ) -> Result<Option<AddedDevice>, ApiError> {
        if self.machine.is_none() {
            return Ok(None);
        }
        self.look_at_slots();
        let result = self.plug_into_guest(config, id, handed);
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

    fn plug_into_guest(
        &mut self,
        config: &VmConfig,
        id: &str,
        handed: Option<&Handed>,
    ) -> Result<PciAddress, ApiError> {
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
        if device.is_behind_iommu() && !machine.devices().all_behind_iommu() {
            return Err(ApiError::BadRequest(format!(
                "'{id}' is to be behind the guest's IOMMU, and a guest is told at its start what is; start it with \
                 platform.iommu_segments [0], which puts all devices there"
            )));
        }
        if !machine.devices().has_root(device) {
            let node = device.root();
            return Err(ApiError::BadRequest(format!(
                "'{id}' is to be in NUMA node {node}, which has no PCI root in this guest, and guests are told of those at their start; start it \
                 with pci_root on for that node, or with a device there"
            )));
        }
        let address = match device.place() {
            Some(address) if self.plugs.is_clearing(address.slot()) => {
                return Err(ApiError::Busy(format!(
                    "Too Many Requests: the host is taking away what was in slot {:02x}; the job tells when that is done",
                    address.slot()
                )));
            }
            Some(address) => check_place(id, address, machine.devices().first_of(address))?,
            None => free_slot(&slots.peek(), device.root(), &machine.devices().taken_slots())
                .map(|slot| PciAddress::in_slot(0, slot, 0, device.below_port()))
                .map_err(|source| MachineError::Slot {
                    id: id.to_owned(),
                    source,
                })?,
        };
        let handed: HandedEnds = handed.map(|end| (id.to_owned(), end.clone())).into_iter().collect();
        let opener = Opener {
            handed: &handed,
            daemons: self.daemons.as_ref(),
            sandbox: &self.sandbox,
            iommu: &self.iommu,
            behind_iommu: config.iommu_for_all(),
            moved: None,
        };
        let end = End::open(device, opener)?;
        machine.devices_mut().plug(device, &end, address)?;
        backends.insert(id, end, address);
        let devices = machine.devices();
        if devices.served().iter().any(|(served, _)| served == id) || devices.of_host().any(|own| own == id) {
            machine.forget_log("what a new device of a daemon or of the host writes is not seen");
        }
        // The guest finds the others by function 0.
        if address.function() == 0 {
            slots.came(address.slot());
        }
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
        let devices = self.machine.as_ref().map(|machine| machine.devices());
        let first = devices.and_then(|devices| devices.first_of(address));
        if let Some(first) = first.filter(|first| *first != id && !force) {
            return Err(ApiError::BadRequest(shares_slot(id, address, first)));
        }
        let hidden = first.is_none();
        let with = devices.map(|devices| devices.going_with(id)).unwrap_or_default();
        let slots = self.machine.as_ref().and_then(|machine| machine.slots().cloned());
        if slots.is_none() && !force {
            return Err(ApiError::Unsupported(format!("{NO_ACPI}, or take it with force")));
        }
        let job = self.inbox.jobs().begin(Operation::RemoveDevice.name());
        let slot = address.slot();
        let unheard = |slot: Option<&PciSlot>| slot.is_some_and(|slot| slot.unheard);
        let unheard = slots
            .as_ref()
            .is_some_and(|slots| unheard(slots.peek().get(usize::from(slot))));
        let touched = self
            .machine
            .as_ref()
            .is_some_and(|machine| machine.devices().touched(address));
        let unseen = hidden || unheard && !touched;
        match slots {
            Some(slots) if !force && !unseen => {
                job.note(&format!("the guest has to give back '{id}'"));
                slots.ask_back(slot);
                self.plugs.asked.push(Asked {
                    id: id.to_owned(),
                    slot,
                    with,
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

/// Whether the device `id` can come to `address`, while `first` is function 0 there.
fn check_place(id: &str, address: PciAddress, first: Option<&str>) -> Result<PciAddress, ApiError> {
    match first {
        Some(first) => Err(ApiError::BadRequest(format!(
            "'{id}' cannot come to {address}: '{first}' is function 0 there, and guests look at a slot once, when they find that; remove \
             '{first}', add '{id}', and then '{first}' again"
        ))),
        None => Ok(address),
    }
}

/// Why device `id` at `address` cannot be asked for, while `first` is function 0 there.
fn shares_slot(id: &str, address: PciAddress, first: &str) -> String {
    format!(
        "'{id}' is function {} of a slot that the guest gives back as a whole; remove '{first}', which is its function 0, and all of them \
         go, or take this one with force",
        address.function()
    )
}

/// The slot for a device that comes to a root bus: the first that is free and not `taken`; one whose device was taken by force, so
/// that its driver may still be there, only when there is no other.
fn free_slot(slots: &[PciSlot], root: u8, taken: &BTreeSet<u8>) -> Result<u8, AddError> {
    let bus = root * BUSES_OF_ROOT;
    let own = || {
        (0u8..=u8::MAX)
            .zip(slots)
            .skip(bus.into())
            .take(BUSES_OF_ROOT.into())
            .skip(1)
    };
    let free = || own().filter(|(n, _)| !taken.contains(n));
    let number = |wanted: fn(&PciSlot) -> bool| free().find(|(_, slot)| wanted(slot)).map(|(n, _)| n);
    let found = number(|slot| !slot.present && !slot.vanished).or_else(|| number(|slot| !slot.present));
    found.ok_or(match root {
        0 => AddError::Full(0),
        _ => AddError::FullBus(bus),
    })
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
        let slots = |begin: &[PciSlot]| {
            let mut all = begin.to_vec();
            all.resize(32, taken);
            all
        };
        let none = BTreeSet::new();
        assert_eq!(free_slot(&slots(&[taken, forced, free, free]), 0, &none), Ok(2));
        assert_eq!(
            free_slot(&slots(&[taken, forced, free, free]), 0, &BTreeSet::from([2])),
            Ok(3),
            "its function 0 is to come"
        );
        assert_eq!(free_slot(&slots(&[taken, forced, taken]), 0, &none), Ok(1));
        assert_eq!(free_slot(&[taken; 32], 0, &none), Err(AddError::Full(0)));
        let two = [slots(&[]), vec![free; 32]].concat();
        assert_eq!(free_slot(&two, 1, &BTreeSet::from([33])), Ok(34), "slot 32 is nobody's");
        assert_eq!(free_slot(&two, 0, &none), Err(AddError::Full(0)));
        assert_eq!(free_slot(&two, 2, &none), Err(AddError::FullBus(64)));
        assert_eq!(free_slot(&[free; 256], 7, &none), Ok(225));
    }

    #[test]
    fn functions_come_before_the_one_that_guests_find_them_by() {
        let at = PciAddress::new(0, 0, 6, 1).expect("an address");
        assert_eq!(check_place("audio", at, None), Ok(at));
        let refused = check_place("audio", at, Some("gpu")).expect_err("refused");
        assert!(matches!(refused, ApiError::BadRequest(text) if text.contains("'gpu' is function 0 there")));
        assert!(shares_slot("audio", at, "gpu").starts_with("'audio' is function 1 of a slot"));
    }
}
