//! Whoever ends a migration, and whenever: at most one guest runs, its data are intact, and it is lost only with its host.

use super::super::guest::{Guest, number, test_ram};
use super::super::payload_tests;
use super::{MIB, MOVE, Waiting, begin, with_disk};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::dice::Dice;
use triarch_harness::jobs::wait;
use triarch_harness::suite::{Context, Outcome, Test, kills, patient};

payload_tests!("migration::kills":
    a_cancel_at_any_moment_leaves_the_guest_unharmed,
    at_most_one_guest_runs_whoever_dies,
    a_cancel_of_a_local_one_leaves_the_guest_unharmed,
    at_most_one_guest_runs_whoever_dies_of_a_local_one,
);

/// How a guest is moved.
struct Way {
    /// Whether its memory is handed over.
    local: bool,
    /// Microseconds within which all of that happens, here: moments are drawn from so many.
    span: usize,
}

const COPIED: Way = Way {
    local: false,
    span: 400_000,
};
const LOCAL: Way = Way {
    local: true,
    span: 80_000,
};

/// What the guest writes to its disk meanwhile.
const SOAK: &str = "blk 0 soak 1500 8 9 2000";

/// A guest with a disk under load, and data in memory.
fn loaded(context: &Context, kept: &Path, way: &Way) -> Result<Guest> {
    let (vm, _) = with_disk(context, kept)?;
    let vm = match way.local {
        true => vm.set("--memory", "size=64M,shared=on"),
        false => vm,
    };
    let mut guest = Guest::start(vm)?;
    guest.ask(&format!("mem fill {} {} 5", test_ram(), 8 * MIB))?;
    guest.ask("blk 0 write 20000 64 7")?;
    guest.send(SOAK)?;
    Ok(guest)
}

/// The guest does its work to its end, and has all its data.
fn intact(guest: &mut Guest) -> Result<()> {
    let answer = guest.answer()?;
    ensure!(number(&answer, "requests")? >= 1500, "{answer}");
    guest.ask(&format!("mem verify {} {} 5", test_ram(), 8 * MIB))?;
    guest.ask("blk 0 verify 20000 64 7")?;
    Ok(())
}

fn state(api: &Api) -> Result<Option<String>> {
    let answer = api.request("GET", "vm.info", None)?;
    if answer.status == 404 {
        return Ok(None);
    }
    let info: Value = serde_json::from_str(&answer.body)?;
    Ok(info["state"].as_str().map(ToOwned::to_owned))
}

fn ended(sending: JoinHandle<Result<String>>) -> Result<Result<String>> {
    sending
        .join()
        .map_err(|_| anyhow::anyhow!("the client's thread panicked"))
}

impl Way {
    fn request(&self) -> Value {
        match self.local {
            true => super::local::local(),
            // 8 MiB in about a fifth of a second.
            false => json!({ "bandwidth": 48 * MIB }),
        }
    }
}

fn a_cancel_at_any_moment_leaves_the_guest_unharmed(context: &Context) -> Result<Outcome> {
    cancels(context, &COPIED)
}

fn a_cancel_of_a_local_one_leaves_the_guest_unharmed(context: &Context) -> Result<Outcome> {
    cancels(context, &LOCAL)
}

fn cancels(context: &Context, way: &Way) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let mut guest = loaded(context, kept.path(), way)?;
    let mut dice = Dice::new(7);
    let (mut cancelled, mut late) = (0, 0);
    for round in 0..kills() {
        let waiting = Waiting::start(context, "unix", &json!({}))?;
        let sending = begin(&guest, &waiting.address, &way.request())?;
        thread::sleep(Duration::from_micros(dice.below(way.span) as u64));
        // Either side may end it.
        let api = match round % 2 {
            0 => guest.vm().api()?,
            _ => waiting.api()?,
        };
        let answer = api.request("PUT", "vm.cancel-migration", None)?;
        ensure!(
            [204, 409].contains(&answer.status),
            "{}: {}",
            answer.status,
            answer.body
        );
        match ended(sending)? {
            Ok(_) => {
                late += 1;
                guest = waiting.guest(guest)?;
            }
            Err(error) => {
                cancelled += 1;
                ensure!(format!("{error:#}").contains("runs here"), "{error:#}");
                ensure!(
                    state(guest.vm().api()?)?.as_deref() == Some("Running"),
                    "it does not run"
                );
                if answer.status == 204 {
                    waiting.given_up()?;
                } else {
                    // Asked before the source's request came; the destination still waits.
                    bail!("nobody cancelled it: {error:#}");
                }
            }
        }
        intact(&mut guest).with_context(|| format!("round {round}"))?;
        guest.send(SOAK)?;
    }
    ensure!(cancelled > 0, "all of {late} were too late");
    intact(&mut guest)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// Kills a process as a crash of its host would.
pub(super) fn kill(pid: u32) -> Result<()> {
    let status = std::process::Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()?;
    ensure!(status.success(), "kill: {status}");
    Ok(())
}

fn at_most_one_guest_runs_whoever_dies(context: &Context) -> Result<Outcome> {
    deaths(context, &COPIED)
}

fn at_most_one_guest_runs_whoever_dies_of_a_local_one(context: &Context) -> Result<Outcome> {
    deaths(context, &LOCAL)
}

fn deaths(context: &Context, way: &Way) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let mut dice = Dice::new(11);
    let mut counts = std::collections::BTreeMap::<&str, u32>::new();
    let mut guest = loaded(context, kept.path(), way)?;
    for round in 0..kills() {
        let waiting = Waiting::start(context, "unix", &json!({}))?;
        let sending = begin(&guest, &waiting.address, &way.request())?;
        thread::sleep(Duration::from_micros(dice.below(way.span) as u64));
        let source = dice.below(2) == 0;
        let outcome = match source {
            true => {
                kill(guest.vm().pid())?;
                let _ = ended(sending)?;
                after_the_source_died(waiting, guest.rest())
            }
            false => {
                kill(waiting.vm.pid())?;
                after_the_destination_died(guest, waiting, sending)
            }
        };
        let (what, survivor) = outcome.with_context(|| format!("round {round}, the source died: {source}"))?;
        *counts.entry(what).or_default() += 1;
        guest = match survivor {
            Some(mut survivor) => {
                intact(&mut survivor).with_context(|| format!("round {round}: {what}"))?;
                survivor.send(SOAK)?;
                survivor
            }
            // It died with its host. The disk is free for another.
            None => loaded(context, kept.path(), way)?,
        };
    }
    intact(&mut guest)?;
    guest.power_off()?;
    triarch_harness::suite::figure(&format!(
        "migration::kills: local {}, {} rounds: {counts:?}",
        way.local,
        kills()
    ))?;
    Ok(Outcome::Passed)
}

/// The guest runs at the destination, or died.
fn after_the_source_died(waiting: Waiting, said: Vec<u8>) -> Result<(&'static str, Option<Guest>)> {
    // A destination that was not reached yet still waits.
    let api = waiting.api()?.clone();
    let limit = patient(2 * MOVE);
    let over = wait("the destination does not know what became of the guest", limit, || {
        let job = api.get("vm.jobs")?;
        let job = job.as_array().and_then(|jobs| jobs.last()).context("no job")?.clone();
        if job["state"] != "running" {
            return Ok(Some(job["state"] == "done"));
        }
        let found = super::progress(&api)?;
        // Nobody will come any more.
        if found["phase"] == "connecting" {
            api.request("PUT", "vm.cancel-migration", None)?;
        }
        // It runs, and waits for whoever may ask.
        Ok((state(&api)?.as_deref() == Some("Running")).then_some(true))
    })?;
    if !over {
        waiting.failed()?;
        return Ok(("the guest died with the source", None));
    }
    ensure!(state(&api)?.as_deref() == Some("Running"), "it does not run");
    // Nobody can ask any more when it is answered. Until then the guest cannot go on to another place.
    waiting.answered()?;
    let serial = waiting.vm.dir().join(super::SERIAL);
    let Waiting { vm, .. } = waiting;
    let guest = Guest::attach_moved(vm, &serial, said)?;
    Ok(("the destination runs it", Some(guest)))
}

/// The guest runs at the source, or is paused there and can be resumed.
fn after_the_destination_died(
    guest: Guest,
    waiting: Waiting,
    sending: JoinHandle<Result<String>>,
) -> Result<(&'static str, Option<Guest>)> {
    let result = ended(sending)?;
    let api = guest.vm().api()?.clone();
    match result {
        Ok(_) => {
            // It had been given away, and died with the destination.
            ensure!(state(&api)?.is_none(), "the source has a VM");
            drop(waiting);
            drop(guest);
            Ok(("the guest died with the destination", None))
        }
        Err(error) => {
            let text = format!("{error:#}");
            match state(&api)?.as_deref() {
                Some("Running") => {
                    ensure!(text.contains("runs here"), "{text}");
                    Ok(("the source runs it", Some(guest)))
                }
                Some("Paused") => {
                    ensure!(text.contains("does not answer"), "{text}");
                    // The operator has looked: it is not there.
                    drop(waiting);
                    if let Err(error) = guest.vm().resume() {
                        // It had begun to run there, with the memory that is here.
                        let text = format!("{error:#}");
                        ensure!(text.contains("ran at the destination"), "{text}");
                        ensure!(state(&api)?.as_deref() == Some("Paused"), "it does not stand still");
                        return Ok(("the guest died with the destination, which had its memory", None));
                    }
                    Ok(("the source was told to resume it", Some(guest)))
                }
                other => bail!("the guest is {other:?}: {text}"),
            }
        }
    }
}

/// All tests, with the time that these take when somebody wants two hundred moments (`TRIARCH_KILLS`).
pub const ALL: [Test; 4] = [
    TESTS[0].within(Duration::from_secs(3600)),
    TESTS[1].within(Duration::from_secs(3600)),
    TESTS[2].within(Duration::from_secs(3600)),
    TESTS[3].within(Duration::from_secs(3600)),
];
