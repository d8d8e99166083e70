//! Disks in any order, beside the vCPUs: how they should stand.

use super::super::data::pattern;
use super::super::guest::Guest;
use super::{CHECK, EJECT};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::dice::Dice;
use triarch_harness::disk::DiskImage;
use triarch_harness::jobs::wait;
use triarch_harness::suite::{Context, patient};

const DISKS: usize = 4;
const SIZE: usize = 64 << 10;
/// The notice of a device that is lost.
const VANISHED: u8 = 0;
const LIMIT: Duration = Duration::from_secs(5);

/// A disk that the guest has.
struct Disk {
    slot: u8,
    /// The guest did not hear of it, and did not look at it by itself.
    unheard: bool,
    /// The guest looked at it.
    touched: bool,
    /// The guest was asked for it.
    asked: bool,
}

/// All disks, and what the guest knows.
pub(super) struct Disks {
    images: Vec<DiskImage>,
    there: BTreeMap<usize, Disk>,
    notices: BTreeMap<u8, u8>,
    /// Slots whose disk the guest found, also if it lost it since.
    known: BTreeSet<u8>,
}

impl Disks {
    pub(super) fn new(context: &Context, seed: u64) -> Result<Self> {
        let image = |n: usize| {
            let path = context.dir.join(format!("disk{n}-{seed}"));
            DiskImage::with(path, &pattern(n as u64, 0, SIZE))
        };
        Ok(Self {
            images: (0..DISKS).map(image).collect::<Result<_>>()?,
            there: BTreeMap::new(),
            notices: BTreeMap::new(),
            known: BTreeSet::new(),
        })
    }

    /// Something that a client does.
    pub(super) fn ask(&mut self, api: &Api, dice: &mut Dice) -> Result<String> {
        let n = dice.below(DISKS);
        match dice.below(5) {
            0 | 1 => self.add(api, n),
            2 => self.remove(api, n, true),
            _ => self.remove(api, n, false),
        }
    }

    fn add(&mut self, api: &Api, n: usize) -> Result<String> {
        let status = if self.there.contains_key(&n) { 400 } else { 200 };
        let body = json!({ "id": format!("d{n}"), "path": self.images[n].path() }).to_string();
        let answer = api.request("PUT", "vm.add-disk", Some(&body))?;
        ensure!(
            answer.status == status,
            "add d{n}: {} {}, not {status}",
            answer.status,
            answer.body
        );
        if status == 200 {
            let added: serde_json::Value = serde_json::from_str(&answer.body)?;
            let bdf = added["bdf"].as_str().context("no bdf")?;
            let slot = bdf.strip_prefix("0000:00:").and_then(|rest| rest.strip_suffix(".0"));
            let slot = u8::from_str_radix(slot.with_context(|| bdf.to_owned())?, 16)?;
            let is_free = self.there.values().all(|disk| disk.slot != slot) && !self.notices.contains_key(&slot);
            ensure!(is_free && !self.known.contains(&slot), "slot {slot} is in use");
            self.notices.insert(slot, CHECK);
            let (unheard, touched, asked) = (true, false, false);
            self.there.insert(
                n,
                Disk {
                    slot,
                    unheard,
                    touched,
                    asked,
                },
            );
        }
        Ok(format!("add d{n}: {status}"))
    }

    fn remove(&mut self, api: &Api, n: usize, force: bool) -> Result<String> {
        let status = match self.there.get(&n) {
            None => 404,
            Some(disk) if disk.asked && !force => 429,
            Some(_) => 204,
        };
        let body = json!({ "id": format!("d{n}"), "force": force }).to_string();
        let answer = api.request("PUT", "vm.remove-device", Some(&body))?;
        ensure!(
            answer.status == status,
            "remove d{n}: {} {}, not {status}",
            answer.status,
            answer.body
        );
        if let Some(disk) = self.there.get_mut(&n).filter(|_| status == 204) {
            let unseen = disk.unheard && !disk.touched && !disk.asked;
            if unseen || force {
                let slot = disk.slot;
                self.gone(api, n)?;
                // One that the guest cannot know of is taken without a word, also by force.
                if !unseen {
                    self.notices.insert(slot, VANISHED);
                }
            } else {
                disk.asked = true;
                self.notices.insert(disk.slot, EJECT);
            }
        }
        Ok(format!("remove d{n}{}: {status}", if force { " by force" } else { "" }))
    }

    /// It is gone, or will be in a moment.
    fn gone(&mut self, api: &Api, n: usize) -> Result<()> {
        if let Some(disk) = self.there.remove(&n) {
            self.notices.remove(&disk.slot);
        }
        let node = format!("d{n}");
        wait(&format!("{node} does not go"), patient(LIMIT), || {
            // Its place in the configuration is free last.
            let disks = &api.get("vm.info")?["config"]["disks"];
            let there = disks
                .as_array()
                .is_some_and(|all| all.iter().any(|disk| disk["id"] == node));
            Ok((!there).then_some(()))
        })
    }

    /// Something that the guest does.
    pub(super) fn act(&mut self, guest: &mut Guest, api: &Api, dice: &mut Dice) -> Result<String> {
        match dice.below(6) {
            0..3 => self.hear(guest, api, dice),
            3 => self.look(guest, dice),
            4 => self.give(guest, api, dice),
            _ => self.read(guest, dice),
        }
    }

    fn at(&self, slot: u8) -> Option<usize> {
        self.there.iter().find(|(_, disk)| disk.slot == slot).map(|(n, _)| *n)
    }

    /// It takes a notice and obeys, refuses, or forgets it.
    fn hear(&mut self, guest: &mut Guest, api: &Api, dice: &mut Dice) -> Result<String> {
        let said = guest.ask("slots next")?;
        let Some((slot, notice)) = self.notices.pop_first() else {
            ensure!(said == "none", "{said}, and there is nothing to tell");
            return Ok("nothing to hear of disks".to_owned());
        };
        let wanted = format!("slot={slot} value={notice}");
        ensure!(said == wanted, "{said}, not {wanted}");
        let n = self.at(slot);
        if let Some(disk) = n.and_then(|n| self.there.get_mut(&n)) {
            disk.unheard = false;
        }
        match (notice, dice.below(5)) {
            (VANISHED, _) => self.look_at(guest, slot)?,
            (_, 0) => return Ok(format!("{said}: forgotten")),
            (_, 1) => {
                guest.ask(&format!("slots ost {slot} {notice} 0x82"))?;
                if let Some(disk) = n.and_then(|n| self.there.get_mut(&n)).filter(|_| notice == EJECT) {
                    disk.asked = false;
                }
                return Ok(format!("{said}: refused"));
            }
            (CHECK, _) => {
                self.look_at(guest, slot)?;
                guest.ask(&format!("slots ost {slot} {CHECK} 0"))?;
            }
            _ => self.give_back(guest, api, n.context("no disk there")?)?,
        }
        Ok(format!("{said}: done"))
    }

    fn look_at(&mut self, guest: &mut Guest, slot: u8) -> Result<()> {
        let n = self.at(slot);
        let said = guest.ask(&format!("slots look {slot}"))?;
        ensure!(said.ends_with("kind=2") == n.is_some(), "{slot} is {said}");
        match n.and_then(|n| self.there.get_mut(&n)) {
            Some(disk) => {
                disk.touched = true;
                self.known.insert(slot);
            }
            None => {
                self.known.remove(&slot);
            }
        }
        Ok(())
    }

    fn look(&mut self, guest: &mut Guest, dice: &mut Dice) -> Result<String> {
        let slots: Vec<u8> = self.there.values().map(|disk| disk.slot).collect();
        let Some(slot) = dice.pick(&slots) else {
            return Ok("no disk to look at".to_owned());
        };
        ensure!(
            guest.ask(&format!("slots status {slot}"))? == "0xf",
            "nothing in {slot}"
        );
        self.look_at(guest, slot)?;
        Ok(format!("look at slot {slot}"))
    }

    fn give_back(&mut self, guest: &mut Guest, api: &Api, n: usize) -> Result<()> {
        let slot = self.there[&n].slot;
        guest.ask(&format!("slots give {slot}"))?;
        self.known.remove(&slot);
        self.gone(api, n)
    }

    fn give(&mut self, guest: &mut Guest, api: &Api, dice: &mut Dice) -> Result<String> {
        let all: Vec<usize> = self.there.keys().copied().collect();
        let Some(n) = dice.pick(&all) else {
            return Ok("no disk to give".to_owned());
        };
        self.give_back(guest, api, n)?;
        Ok(format!("give d{n}"))
    }

    fn read(&mut self, guest: &mut Guest, dice: &mut Dice) -> Result<String> {
        let alive = |(_, disk): &(&usize, &Disk)| self.known.contains(&disk.slot);
        let all: Vec<usize> = self.there.iter().filter(alive).map(|(n, _)| *n).collect();
        let Some(n) = dice.pick(&all) else {
            return Ok("no disk to read".to_owned());
        };
        let place = self.known.range(..self.there[&n].slot).count();
        guest.ask(&format!("blk {place} verify 0 {} {n}", SIZE / 512))?;
        Ok(format!("read d{n}"))
    }

    /// The guest was reset: those it was asked for are gone, and it finds all others.
    pub(super) fn reset(&mut self) {
        self.there.retain(|_, disk| !disk.asked);
        self.notices.clear();
        for disk in self.there.values_mut() {
            (disk.unheard, disk.touched) = (false, true);
        }
        self.known = self.there.values().map(|disk| disk.slot).collect();
    }

    /// The machine has these disks and asks for those.
    pub(super) fn check(&self, api: &Api) -> Result<()> {
        let asked = self.there.values().filter(|disk| disk.asked).count();
        let mut found = 0;
        wait("removals are not as they should be", patient(LIMIT), || {
            let jobs = api.get("vm.jobs")?;
            let jobs = jobs.as_array().context("no jobs")?.iter();
            let open = |job: &&serde_json::Value| job["kind"] == "vm.remove-device" && job["state"] == "running";
            found = jobs.filter(open).count();
            Ok((found == asked).then_some(()))
        })
        .with_context(|| format!("{asked} should be open"))?;
        let info = api.get("vm.info")?;
        let disks = info["config"]["disks"].as_array().cloned().unwrap_or_default();
        let ids: BTreeSet<_> = disks.iter().filter_map(|disk| disk["id"].as_str()).collect();
        let wanted: Vec<_> = self.there.keys().map(|n| format!("d{n}")).collect();
        ensure!(ids.iter().eq(wanted.iter()), "{ids:?}, not {wanted:?}");
        for (n, disk) in &self.there {
            let bdf = &info["device_tree"][format!("_virtio-pci-d{n}")]["pci_bdf"];
            ensure!(*bdf == format!("0000:00:{:02x}.0", disk.slot), "{bdf} is where d{n} is");
        }
        Ok(())
    }
}
