//! Processors, memory and disks that come and go in any order, compared with a model of the machine after each step.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::collections::BTreeSet;
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::dice::Dice;
use triarch_harness::jobs::wait;
use triarch_harness::suite::{Context, Outcome, Test, is_patient, patient, rounds};

use super::guest::{Guest, builder, is_arm};
use super::hotplug::settled;
use devices::Disks;

mod devices;

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("hotplug::any_order_is_as_a_model_says", any_order_is_as_a_model_says)
        .within(Duration::from_secs(60))
        .soak(),
];

const MAX: usize = 5;
const STEPS: usize = 60;
const MIB: u64 = 1 << 20;
const RAM: u64 = 64 * MIB;
/// The environment variable with the first seed, when it is not 1.
const SEED: &str = "TRIARCH_HOTPLUG_SEED";
/// Values of notices.
const CHECK: u8 = 1;
const EJECT: u8 = 3;

fn any_order_is_as_a_model_says(context: &Context) -> Result<Outcome> {
    let first = std::env::var(SEED).ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    for seed in first..first + u64::from(rounds(if is_patient() { 1 } else { 5 })) {
        let mut run = Run::new(context, seed)?;
        for step in 1..=STEPS {
            let what = format!("{SEED}={seed}, step {step}");
            let done = run.step().with_context(|| format!("{what}: {:?}", run.log))?;
            run.log.push(done);
            run.check().with_context(|| format!("{what}: {:?}", run.log))?;
        }
    }
    Ok(Outcome::Passed)
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    present: bool,
    seen: bool,
    started: bool,
    accepted: bool,
    notice: Option<u8>,
    /// The guest itself started it since it booted, so that it answers.
    answers: bool,
}

/// What is not done yet.
#[derive(Debug, Default)]
struct Open {
    target: usize,
    coming: BTreeSet<usize>,
    going: BTreeSet<usize>,
}

/// What the machine should be.
struct Model {
    slots: [Slot; MAX],
    open: Option<Open>,
    paused: bool,
}

impl Model {
    fn booted(vcpus: usize) -> Self {
        let mut slots = [Slot::default(); MAX];
        for slot in &mut slots[..vcpus] {
            (slot.present, slot.seen, slot.started) = (true, true, true);
        }
        Self {
            slots,
            open: None,
            paused: false,
        }
    }

    fn those(&self, wanted: impl Fn(&Slot) -> bool) -> Vec<usize> {
        (0..MAX).filter(|n| wanted(&self.slots[*n])).collect()
    }

    fn target(&self) -> usize {
        let present = self.those(|slot| slot.present).len();
        self.open.as_ref().map_or(present, |open| open.target)
    }

    /// The status that a resize is answered with.
    fn resize(&mut self, target: usize) -> u16 {
        if !(1..=MAX).contains(&target) {
            return 400;
        }
        match &self.open {
            Some(open) if open.target == target => return 204,
            Some(open) if !open.going.is_empty() => return 429,
            _ => {}
        }
        let mut open = Open {
            target,
            ..Open::default()
        };
        let mut present = self.those(|slot| slot.present);
        while present.len() > target {
            // The highest that does not run, or the highest.
            let idle = present.iter().rposition(|n| !self.slots[*n].started);
            let index = present.remove(idle.unwrap_or(present.len() - 1));
            let slot = &mut self.slots[index];
            if slot.seen || slot.started {
                slot.notice = Some(EJECT);
                open.going.insert(index);
            } else {
                *slot = Slot::default();
            }
        }
        for index in self.those(|slot| !slot.present) {
            if present.len() < target && !present.contains(&index) {
                self.slots[index].present = true;
                present.push(index);
            }
        }
        for index in present
            .into_iter()
            .filter(|n| !self.slots[*n].started)
            .collect::<Vec<_>>()
        {
            self.slots[index].notice = Some(CHECK);
            open.coming.insert(index);
        }
        self.open = Some(open);
        self.settle();
        204
    }

    /// Nothing more is to come of these.
    fn heard(&mut self, index: usize) {
        if let Some(open) = &mut self.open {
            open.coming.remove(&index);
            open.going.remove(&index);
        }
        self.settle();
    }

    fn settle(&mut self) {
        self.open = self
            .open
            .take()
            .filter(|open| !open.coming.is_empty() || !open.going.is_empty());
    }

    fn started(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        (slot.started, slot.answers) = (true, true);
        if self.open.as_ref().is_some_and(|open| open.coming.contains(&index)) {
            self.heard(index);
        }
    }

    fn ejected(&mut self, index: usize) {
        self.slots[index] = Slot::default();
        self.heard(index);
    }
}

/// A guest, and how it should be.
struct Run {
    guest: Guest,
    api: Api,
    dice: Dice,
    model: Model,
    /// Bytes of memory that came.
    plugged: u64,
    disks: Disks,
    log: Vec<String>,
}

impl Run {
    fn new(context: &Context, seed: u64) -> Result<Self> {
        let memory = format!("size={RAM},hotplug_method=virtio-mem,hotplug_size=256M");
        let vm = builder(context)?.set("--memory", memory);
        let guest = Guest::start(vm.set("--cpus", format!("boot=1,max={MAX}")).api())?;
        let api = guest.vm().api()?.clone();
        Ok(Self {
            guest,
            api,
            dice: Dice::new(seed),
            model: Model::booted(1),
            plugged: 0,
            disks: Disks::new(context, seed)?,
            log: Vec::new(),
        })
    }

    /// Does something; returns what.
    fn step(&mut self) -> Result<String> {
        match self.dice.below(40) {
            0..6 => self.resize(),
            6 | 7 => self.pause_or_resume(),
            20..28 => self.disks.ask(&self.api, &mut self.dice),
            // The guest does nothing while it is paused.
            _ if self.model.paused => self.resize(),
            28..38 => self.disks.act(&mut self.guest, &self.api, &mut self.dice),
            38 | 39 => self.resize_memory(),
            8..14 => self.take_notice(),
            14 => self.start_unasked(),
            15 => self.eject_unasked(),
            16 | 17 => self.look(),
            18 => self.ping(),
            _ => self.reset(),
        }
    }

    fn resize(&mut self) -> Result<String> {
        let target = self.dice.below(MAX + 2);
        let status = self.model.resize(target);
        let body = json!({ "desired_vcpus": target }).to_string();
        let answer = self.api.request("PUT", "vm.resize", Some(&body))?;
        ensure!(
            answer.status == status,
            "resize to {target}: {} {}, not {status}",
            answer.status,
            answer.body
        );
        Ok(format!("resize {target}: {status}"))
    }

    /// The guest gets memory, or gives some back.
    fn resize_memory(&mut self) -> Result<String> {
        let plugged = 64 * MIB * self.dice.below(4) as u64;
        let body = json!({ "desired_ram": RAM + plugged }).to_string();
        self.api.put("vm.resize", Some(&body))?;
        self.reach(plugged)?;
        if plugged != self.plugged {
            let phase = format!("the guest has {} MiB plugged", plugged / MIB);
            self.api.is_done("vm.resize", patient(Duration::from_secs(5)), &phase)?;
        }
        self.plugged = plugged;
        Ok(format!("{} MiB more", plugged / MIB))
    }

    fn reach(&mut self, plugged: u64) -> Result<()> {
        self.guest.ask(&format!("vmem 0 wait {plugged} 5000"))?;
        self.guest.ask(&format!("vmem 0 reach {plugged}")).map(drop)
    }

    fn pause_or_resume(&mut self) -> Result<String> {
        let route = if self.model.paused { "vm.resume" } else { "vm.pause" };
        self.api.put(route, None)?;
        self.model.paused = !self.model.paused;
        Ok(route.to_owned())
    }

    /// The guest takes a notice, and obeys, refuses, or forgets it.
    fn take_notice(&mut self) -> Result<String> {
        let said = self.guest.ask("hot next")?;
        let next = (0..MAX).find_map(|n| Some((n, self.model.slots[n].notice.take()?)));
        let Some((index, notice)) = next else {
            ensure!(said == "none", "{said}, and there is nothing to tell");
            return Ok("nothing to hear".to_owned());
        };
        ensure!(
            said == format!("index={index} value={notice}"),
            "{said}, not {notice} for {index}"
        );
        self.model.slots[index].seen = true;
        let manner = self.dice.below(6);
        match (notice, manner) {
            (_, 0) => return Ok(format!("{said}: forgotten")),
            (_, 1) => {
                self.guest.ask(&format!("hot ost {index} {notice} 0x82"))?;
                let slot = self.model.slots[index];
                if notice == EJECT || !slot.started && !slot.accepted {
                    self.model.heard(index);
                }
                return Ok(format!("{said}: refused"));
            }
            (CHECK, _) => {
                if !self.model.slots[index].started {
                    self.guest.ask(&format!("hot start {index}"))?;
                    self.model.started(index);
                }
                self.guest.ask(&format!("hot ost {index} {CHECK} 0"))?;
                self.model.slots[index].accepted = true;
            }
            _ => {
                self.guest.ask(&format!("hot eject {index}"))?;
                self.guest.ask(&format!("hot ost {index} {EJECT} 0"))?;
                self.model.ejected(index);
            }
        }
        Ok(format!("{said}: done"))
    }

    fn start_unasked(&mut self) -> Result<String> {
        let idle = self.model.those(|slot| slot.present && !slot.started);
        let Some(index) = self.dice.pick(&idle) else {
            return Ok("nothing to start".to_owned());
        };
        self.guest.ask(&format!("hot start {index}"))?;
        self.model.started(index);
        Ok(format!("start {index}"))
    }

    fn eject_unasked(&mut self) -> Result<String> {
        let index = self.dice.below(MAX);
        self.guest.ask(&format!("hot eject {index}"))?;
        if index > 0 && self.model.slots[index].present {
            self.model.ejected(index);
        }
        Ok(format!("eject {index}"))
    }

    fn look(&mut self) -> Result<String> {
        let index = self.dice.below(MAX);
        let slot = &mut self.model.slots[index];
        let wanted = match (slot.present, is_arm()) {
            (true, _) => "0xf",
            (false, true) => "0xd",
            (false, false) => "0x0",
        };
        slot.seen |= slot.present;
        let said = self.guest.ask(&format!("hot status {index}"))?;
        ensure!(said == wanted, "status of {index} is {said}, not {wanted}");
        Ok(format!("look at {index}"))
    }

    fn ping(&mut self) -> Result<String> {
        let all = self.model.those(|slot| slot.answers);
        match self.dice.pick(&all) {
            Some(index) => self
                .guest
                .ask(&format!("hot ping {index}"))
                .map(|_| format!("ping {index}")),
            None => Ok("nobody to ping".to_owned()),
        }
    }

    fn reset(&mut self) -> Result<String> {
        self.model = Model::booted(self.model.target());
        let by = match self.dice.below(2) {
            0 => {
                self.guest.send("pm reset")?;
                "guest"
            }
            _ => {
                self.api.put("vm.reboot", None)?;
                "client"
            }
        };
        self.guest.wait_ready()?;
        self.disks.reset();
        self.reach(self.plugged)?;
        Ok(format!("reset by the {by}"))
    }

    /// The machine is what the model says, and so are its last job and its state.
    fn check(&self) -> Result<()> {
        let count = |wanted: fn(&Slot) -> bool| self.model.those(wanted).len() as u64;
        let counts = [
            self.model.target() as u64,
            count(|slot| slot.present),
            count(|slot| slot.started),
        ];
        settled(&self.api, counts)?;
        // Also an answer of the guest reaches whoever has the job a moment later.
        let is_open = self.model.open.is_some();
        wait(
            "the job is not as it should be",
            patient(Duration::from_secs(5)),
            || {
                let jobs = self.api.get("vm.jobs")?;
                let mut resizes = jobs.as_array().context("no jobs")?.iter();
                let running = resizes.any(|job| job["kind"] == "vm.resize" && job["state"] == "running");
                Ok((running == is_open).then_some(()))
            },
        )
        .with_context(|| format!("{:?}", self.model.open))?;
        self.disks.check(&self.api)?;
        let has = RAM + self.plugged;
        // So does what the guest plugged: the answer it has is the device's.
        wait(
            "the memory is not as it should be",
            patient(Duration::from_secs(5)),
            || {
                let memory = &self.api.get("vm.info")?["memory_actual_size"];
                Ok((*memory == has).then_some(()))
            },
        )?;
        let state = &self.api.get("vm.info")?["state"];
        let wanted = if self.model.paused { "Paused" } else { "Running" };
        ensure!(*state == wanted, "it is {state}");
        Ok(())
    }
}
