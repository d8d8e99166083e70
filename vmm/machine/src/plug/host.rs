//! Devices of the host that it wants back, or that broke.

use std::os::fd::AsRawFd;

use event_manager::{EventOps, Events, MutEventSubscriber};
use triarch_api::events::kind;
use triarch_api::{Handler, RemoveDevice};
use triarch_vfio::{Alarm, Iommu};

use crate::backends::Handed;
use crate::control::{Controller, watch};
use crate::{Inbox, Message};

/// How often the host asks until the guest is not waited for any more. It asks about every 10 s (vfio_unregister_group_dev of the kernel),
/// and whoever took the device from vfio-pci waits.
const PATIENT: u32 = 4;

/// Why a device that failed is taken.
const BROKEN: &str = "it had an error that the hardware could not correct; the host's kernel log says more";

/// Brings what the host tells of its devices.
pub(crate) struct HostInput {
    iommu: Iommu,
    inbox: Inbox,
}

impl HostInput {
    pub(crate) fn new(iommu: &Iommu, inbox: &Inbox) -> Self {
        let (iommu, inbox) = (iommu.clone(), inbox.clone());
        Self { iommu, inbox }
    }
}

impl MutEventSubscriber for HostInput {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        for (name, alarm) in self.iommu.alarms() {
            self.inbox.post(Message::OfHost(name, alarm));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.iommu.as_raw_fd());
    }
}

/// What is done about a device that the host wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The guest is asked for it.
    Ask,
    /// It was, and has time.
    Wait,
    /// It is taken.
    Force,
}

/// What is done when the host asks for a device, this many `times` by now; `waiting`: the guest was asked and has not answered.
fn step(times: u32, waiting: bool) -> Step {
    match (times, waiting) {
        (PATIENT.., _) => Step::Force,
        (_, true) => Step::Wait,
        (1, false) => Step::Ask,
        // It said no, or nothing for too long.
        (_, false) => Step::Force,
    }
}

impl Controller {
    /// The host tells `alarm` of its device `name`.
    pub(crate) fn told_by_host(&mut self, name: &str, alarm: Alarm) {
        if self.machine.is_none() {
            return self.lose(name);
        }
        let id = self.backends.as_ref().and_then(|backends| backends.host_device(name));
        let Some(id) = id.map(str::to_owned).filter(|id| !self.plugs.is_leaving(id)) else {
            return;
        };
        match alarm {
            Alarm::Wanted => self.host_wants(&id, name),
            Alarm::Failed => {
                tracing::error!(
                    "the device {name} of the host failed, and is taken from the guest, which has it as '{id}'"
                );
                let properties = [("id", id.as_str().into()), ("reason", BROKEN.into())];
                self.inbox.events().post(&kind::PCI_FAILED, &properties);
                self.demand(&id, true);
            }
        }
    }

    /// Closes the device `name`, which somebody handed over and no guest has.
    fn lose(&mut self, name: &str) {
        let is_it = |end: &Handed| matches!(end, Handed::Host(device) if device.name() == name);
        let found = self.handed.iter().find(|(_, end)| is_it(end));
        let Some(id) = found.map(|(id, _)| id.clone()) else {
            return;
        };
        tracing::warn!(
            "the host wants its device {name} back, or it failed: the VM, which is not running, has '{id}' no more"
        );
        self.inbox
            .events()
            .post(&kind::PCI_WANTED, &[("id", id.as_str().into())]);
        self.demand(&id, true);
    }

    fn host_wants(&mut self, id: &str, name: &str) {
        let times = self.plugs.wanted.entry(id.to_owned()).or_default();
        *times = times.saturating_add(1);
        let times = *times;
        if times == 1 {
            tracing::warn!(
                "the host wants its device {name} back, which the guest has as '{id}'; the guest is asked for it"
            );
            self.inbox.events().post(&kind::PCI_WANTED, &[("id", id.into())]);
        }
        // The guest gives back slots, not functions.
        let devices = self.machine.as_ref().map(|machine| machine.devices());
        let first = devices.and_then(|devices| devices.first_of(devices.find(id)?.0));
        let first = first.unwrap_or(id).to_owned();
        match step(times, self.asked_for().contains(&first)) {
            Step::Wait => {}
            // One that cannot hear of it is not asked.
            Step::Ask => {
                if !self.demand(&first, false) {
                    self.demand(id, true);
                }
            }
            Step::Force => {
                tracing::warn!("the guest does not give back '{id}', which the host wants; it is taken by force");
                self.demand(id, true);
            }
        }
    }

    /// Does as if a client wanted device `id` to go; whether it will.
    fn demand(&mut self, id: &str, force: bool) -> bool {
        let id = id.to_owned();
        let asked = self.remove_device(&RemoveDevice { id, force });
        asked.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_has_time_to_give_a_device_back_but_not_for_ever() {
        assert_eq!(step(1, false), Step::Ask);
        assert_eq!(step(1, true), Step::Wait, "a client asked before");
        assert_eq!((step(2, true), step(3, true)), (Step::Wait, Step::Wait));
        assert_eq!(step(4, true), Step::Force);
        assert_eq!(
            (step(2, false), step(9, false)),
            (Step::Force, Step::Force),
            "it refused"
        );
    }
}
