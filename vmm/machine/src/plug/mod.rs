//! Devices that come and go while the guest runs.
//!
//! A device that is added is there at once, and the guest is told of it. One that is to go the guest is asked for; when it gives it
//! back, or somebody takes it by force, a thread finishes what is in flight, makes what was written durable and closes everything:
//! nothing else waits for that. Its id, its slot and its place in the configuration are free when that is done, which is when its job
//! ends.

mod host;
mod removal;
mod request;

use std::time::{Duration, Instant};

use triarch_api::events::kind;
use triarch_api::{Handler, Operation, Phase};
use triarch_legacy::PciSlot;

use crate::changes::{ChangeMeters, Changing, Direction, Outcome};
use crate::control::Controller;
use crate::resize::PATIENCE;
pub(crate) use host::HostInput;
use removal::{Asked, Leaving, Manner};

/// How often a guest that should hear of something is told again.
pub(crate) const EVERY: Duration = Duration::from_millis(250);

/// What the controller knows of devices that come and go.
#[derive(Default)]
pub(crate) struct Plugs {
    /// Those the guest was asked for.
    asked: Vec<Asked>,
    /// Those that are taken: the guest has them no more, the host is not done with them.
    leaving: Vec<Leaving>,
    /// When a guest was given a device, while it may not have heard of it.
    announced: Option<Instant>,
    /// How often the host asked for those it wants back, by their ids.
    wanted: std::collections::BTreeMap<String, u32>,
    pub(crate) meters: std::sync::Arc<PlugMeters>,
}

/// What came of devices that were added and asked back.
pub(crate) type PlugMeters = ChangeMeters<Plugged>;

/// Devices that come and go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plugged;

impl Changing for Plugged {
    const OUTCOMES: &'static [Outcome] = &[
        Outcome::Done,
        Outcome::Refused,
        Outcome::Timeout,
        Outcome::Forced,
        Outcome::Reset,
        Outcome::Failed,
    ];
}

impl Controller {
    /// The guest did something about its slots.
    pub(crate) fn look_at_slots(&mut self) {
        let Some(machine) = &self.machine else {
            return;
        };
        let Some(slots) = machine.slots() else {
            return;
        };
        let mut news: Vec<(String, PciSlot)> = Vec::new();
        for (number, slot) in (0u8..).zip(slots.slots()) {
            if (slot.ejected || slot.refusal.is_some())
                && let Some((_, id)) = machine.devices().removable_in(number).last()
            {
                news.push(((*id).to_owned(), slot));
            }
        }
        for (id, slot) in news {
            if slot.ejected {
                self.take(&id, Manner::Given);
            } else if let Some(status) = slot.refusal {
                self.refused(&id, status);
            }
        }
    }

    /// The guest does not take a device, or does not give it back.
    fn refused(&mut self, id: &str, status: u32) {
        let reason = crate::cpus::status_name(status);
        let properties = [("id", id.into()), ("reason", reason.as_str().into())];
        self.inbox.events().post_guest(id, &kind::PCI_REFUSED, &properties);
        let direction = match self.plugs.take_asked(id) {
            Some(asked) => {
                self.publish();
                let text = format!("the guest does not give back '{id}' ({reason}); force takes it");
                asked.job.finish(Err(&text));
                Direction::Remove
            }
            None => Direction::Add,
        };
        self.plugs.meters.count(direction, Outcome::Refused, 1);
        self.watch_slots();
    }

    /// Time has passed: tells the guest again what it has not heard, and gives up on what it does not do.
    pub(crate) fn look_at_plugs(&mut self) {
        if self.phase != Phase::Running {
            // While it stands still itself, it has all the time.
            self.plugs
                .asked
                .iter_mut()
                .for_each(|asked| asked.since = Instant::now());
            return;
        }
        self.look_at_slots();
        let Some(slots) = self.machine.as_ref().and_then(|machine| machine.slots().cloned()) else {
            return;
        };
        let unheard = slots.remind();
        let recently = |at: &mut Instant| unheard && at.elapsed() < PATIENCE;
        self.plugs.announced = self.plugs.announced.take_if(recently);
        let stands = slots.peek();
        let late = |asked: &&Asked| asked.since.elapsed() >= PATIENCE;
        let late: Vec<String> = self
            .plugs
            .asked
            .iter()
            .filter(late)
            .map(|asked| asked.id.clone())
            .collect();
        for id in late {
            let Some(asked) = self.plugs.take_asked(&id) else {
                continue;
            };
            slots.leave(asked.slot);
            let seconds = PATIENCE.as_secs();
            let deaf = stands.get(usize::from(asked.slot)).is_some_and(|slot| slot.unheard);
            let text = match deaf {
                true => format!(
                    "the guest did not hear within {seconds} s that it should give back '{id}': it is not up yet or has no driver \
                     for ACPI PCI hot-plug; force takes it"
                ),
                false => format!("the guest did not give back '{id}' within {seconds} s; force takes it"),
            };
            self.plugs.meters.count(Direction::Remove, Outcome::Timeout, 1);
            self.publish();
            asked.job.finish(Err(&text));
        }
        self.watch_slots();
    }

    /// Devices the guest was asked for and has not given back.
    pub(crate) fn asked_for(&self) -> Vec<String> {
        self.plugs.asked.iter().map(|asked| asked.id.clone()).collect()
    }

    /// Goes on waiting for devices that a guest that was restored had been asked for: it has heard, or its slots tell it again.
    pub(crate) fn ask_again(&mut self, ids: &[String]) {
        for id in ids {
            let found = self.machine.as_ref().and_then(|machine| machine.devices().find(id));
            let Some((address, true)) = found else { continue };
            let job = self.inbox.jobs().begin(Operation::RemoveDevice.name());
            job.note(&format!("the guest has to give back '{id}'"));
            self.plugs.asked.push(Asked {
                id: id.clone(),
                slot: address.slot(),
                with: vec![id.clone()],
                since: Instant::now(),
                job,
            });
        }
        self.watch_slots();
    }

    /// Has the time looked at while a guest is to do or hear something.
    fn watch_slots(&mut self) {
        let wanted = !self.plugs.asked.is_empty() || self.plugs.announced.is_some();
        self.resizes.watch_devices(wanted);
    }
}

impl Plugs {
    fn take_asked(&mut self, id: &str) -> Option<Asked> {
        let at = self.asked.iter().position(|asked| asked.id == id)?;
        Some(self.asked.remove(at))
    }

    /// Whether the host is not done with a device that the guest has no more.
    fn is_leaving(&self, id: &str) -> bool {
        self.leaving.iter().any(|leaving| leaving.has(id))
    }

    /// Whether the host is not done with something that was in `slot`.
    fn is_clearing(&self, slot: u8) -> bool {
        self.leaving.iter().any(|leaving| leaving.slot == slot)
    }
}
