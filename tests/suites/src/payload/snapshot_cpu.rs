//! A guest that was saved on another CPU is refused before anything of it is made, with the names of what this host lacks.

use super::guest::is_arm;
use super::payload_tests;
use super::snapshot::{another, resign, small, url};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;
use triarch_harness::api::Api;
use triarch_harness::suite::{Context, Outcome, is_patient};

payload_tests!("snapshot_cpu":
    what_the_host_lacks_is_named;
    x86:
    another_vendor_is_refused: "vendors in CPUID",
    another_frequency_is_refused: "time stamp counters",
);

/// Features of x86 CPUs that no CPU has all of, and where: leaf, register, bit.
const RARE: [(&str, u64, &str, u32); 3] = [
    ("sse4a", 0x8000_0001, "ecx", 6),
    ("hle", 7, "ebx", 4),
    ("tbm", 0x8000_0001, "ecx", 21),
];

/// ID_AA64ISAR0_EL1, whose RNDR is in the highest four bits: no CPU has a 2 there.
const ISAR0: u64 = 0x6030_0000_0013_c030;

/// Changes the saved states in a snapshot.
fn change_states(directory: &Path, change: impl FnOnce(&mut Vec<Value>) -> Result<()>) -> Result<()> {
    let mut done = Ok(());
    resign(directory, |body| {
        let read = || -> Result<String> {
            let mut all: Map<String, Value> = serde_json::from_str(&format!("{{{body}"))?;
            let payloads = all.get_mut("payloads").and_then(Value::as_array_mut);
            change(payloads.context("payloads")?)?;
            Ok(Value::Object(all).to_string().split_off(1))
        };
        read().unwrap_or_else(|error| {
            done = Err(error);
            String::new()
        })
    })?;
    done
}

/// Changes the saved state of one part in a snapshot.
pub(super) fn change(
    directory: &Path,
    [kind, id]: [&str; 2],
    change: impl FnOnce(&mut Value) -> Result<()>,
) -> Result<()> {
    change_states(directory, |payloads| {
        let ours = |payload: &&mut Value| payload["kind"] == kind && payload["id"].as_str().unwrap_or("") == id;
        let found = payloads.iter_mut().find(ours);
        change(&mut found.context(kind.to_owned())?["state"])
    })
}

/// Makes a snapshot one that goes on where CPUs are emulated.
///
/// QEMU's emulated AMD looks into the I/O bitmap of a task state segment only if it is not marked busy, as one that a program loads is not
/// there. KVM, as the manuals, knows only busy ones. Without this the guest, which is in ring 3, reaches no port.
pub(super) fn for_emulated_cpus(directory: &Path) -> Result<()> {
    const AVAILABLE: u8 = 9;
    if is_arm() || !is_patient() {
        return Ok(());
    }
    change_states(directory, |payloads| {
        for vcpu in payloads.iter_mut().filter(|payload| payload["kind"] == "vcpu") {
            vcpu["state"]["special"]["tr"]["type"] = AVAILABLE.into();
        }
        Ok(())
    })
}

const FIRST: [&str; 2] = ["vcpu", "0"];
const ALL: [&str; 2] = ["cpus", ""];

/// The CPUID of processors with this leaf, of its subleaf 0.
fn leaf(cpus: &mut Value, number: u64) -> Result<&mut Value> {
    let mut leaves = cpus["cpuid"].as_array_mut().context("CPUID")?.iter_mut();
    let found = leaves.find(|leaf| leaf["leaf"] == number && leaf["subleaf"] == 0);
    found.with_context(|| format!("no leaf {number:#x}"))
}

/// A feature that this host's guests cannot have, which the guest of the snapshot gets.
fn ask_for_more(directory: &Path, api: &Api) -> Result<&'static str> {
    if is_arm() {
        change(directory, FIRST, |vcpu| {
            let mut registers = vcpu["registers"].as_array_mut().context("registers")?.iter_mut();
            let register = registers.find(|register| register["id"] == ISAR0);
            let register = register.context("ID_AA64ISAR0_EL1")?;
            let mut text = register["value"].as_str().context("a value")?.to_owned();
            text.replace_range(14..15, "2");
            register["value"] = text.into();
            Ok(())
        })?;
        return Ok("ID_AA64ISAR0_EL1.RNDR");
    }
    let host = api.get("vmm.cpu-features")?;
    let host = host["host"]["features"].as_array().context("features")?;
    let lacks = |name: &str| !host.iter().any(|feature| feature == name);
    let rare = RARE.iter().find(|(name, ..)| lacks(name));
    let (name, number, register, bit) = rare.context("this host has them all")?;
    change(directory, ALL, |cpus| {
        let value = &mut leaf(cpus, *number)?[*register];
        *value = (value.as_u64().context("a number")? | 1 << bit).into();
        Ok(())
    })?;
    Ok(name)
}

/// Nothing may be made of memory that has not been read: what is damaged there is not what it is refused for.
fn damage_memory(directory: &Path) -> Result<()> {
    let path = directory.join("memory-ranges");
    let mut bytes = fs::read(&path)?;
    bytes[(16 << 20) + 5] ^= 1;
    Ok(fs::write(path, bytes)?)
}

fn refused(context: &Context, words: impl FnOnce(&Path, &Api) -> Result<Vec<String>>) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let directory = small(context, kept.path())?;
    let (_vm, api) = another(context)?;
    let words = words(&directory, &api)?;
    damage_memory(&directory)?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    api.refused("vm.restore", &url("source_url", &directory), 400, &words)?;
    ensure!(api.request("GET", "vm.info", None)?.status == 404, "there is a VM");
    Ok(Outcome::Passed)
}

fn what_the_host_lacks_is_named(context: &Context) -> Result<Outcome> {
    refused(context, |directory, api| {
        let name = ask_for_more(directory, api)?;
        Ok(vec![name.to_owned(), "restore the guest on a host with".to_owned()])
    })
}

fn another_vendor_is_refused(context: &Context) -> Result<Outcome> {
    refused(context, |directory, api| {
        let host = api.get("vmm.cpu-features")?;
        let other = match host["host"]["vendor"].as_str() {
            Some("AuthenticAMD") => *b"HygonGenuine",
            _ => *b"AuthenticAMD",
        };
        change(directory, ALL, |cpus| {
            let zero = leaf(cpus, 0)?;
            for (register, bytes) in ["ebx", "edx", "ecx"].into_iter().zip(other.as_chunks::<4>().0) {
                zero[register] = json!(u32::from_le_bytes(*bytes));
            }
            Ok(())
        })?;
        Ok(vec!["does not fit: vendor".to_owned()])
    })
}

fn another_frequency_is_refused(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let directory = small(context, kept.path())?;
    let (_vm, api) = another(context)?;
    let told = api.get("vmm.cpu-features")?;
    if told["host"]["tsc_scaling"] == true || told["host"]["tsc_khz"].is_null() {
        return Ok(Outcome::Skipped("this host's CPU scales time stamp counters".into()));
    }
    change(&directory, FIRST, |vcpu| {
        vcpu["tsc"]["khz"] = 77_000.into();
        Ok(())
    })?;
    api.refused("vm.restore", &url("source_url", &directory), 400, &["tsc_khz"])?;
    Ok(Outcome::Passed)
}
