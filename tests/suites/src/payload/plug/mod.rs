//! PCI devices come and go while the guest runs.

use super::data::pattern;
use super::guest::{Guest, builder};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::disk::DiskImage;
use triarch_harness::jobs::wait;
use triarch_harness::suite::{Context, Test, patient};
use triarch_harness::vm::VmBuilder;

mod disks;
mod kinds;
mod nodes;
mod ports;
mod removals;
mod soak;
mod wrong;

/// This module's tests.
pub fn tests() -> Vec<Test> {
    [
        disks::TESTS,
        kinds::TESTS,
        nodes::TESTS,
        ports::TESTS,
        removals::TESTS,
        removals::SLOW,
        soak::TESTS,
        wrong::TESTS,
    ]
    .concat()
}

const SIZE: u64 = 1 << 20;
/// How long a job may take whose guest has done its part.
const LIMIT: Duration = Duration::from_secs(10);

/// A guest that is to get devices.
struct Plug {
    guest: Guest,
    api: Api,
}

impl Plug {
    fn start(context: &Context, more: &[(&str, &str)]) -> Result<Self> {
        let vm = builder(context)?;
        Self::of(more.iter().fold(vm, |vm, (flag, value)| vm.set(flag, value)))
    }

    fn of(vm: VmBuilder) -> Result<Self> {
        let guest = Guest::start(vm.api())?;
        let api = guest.vm().api()?.clone();
        Ok(Self { guest, api })
    }

    /// Adds a device; returns its slot.
    fn add(&self, route: &str, body: &Value) -> Result<u64> {
        let answer = self.api.request("PUT", route, Some(&body.to_string()))?;
        ensure!(answer.status == 200, "{} {}", answer.status, answer.body);
        let added: Value = serde_json::from_str(&answer.body)?;
        ensure!(body["id"].is_null() || added["id"] == body["id"], "{added}");
        self.slot_of(&added)
    }

    /// The slot in the answer to what added a device.
    fn slot_of(&self, added: &Value) -> Result<u64> {
        let bdf = added["bdf"].as_str().context("no bdf")?;
        let slot = bdf.strip_prefix("0000:00:").and_then(|rest| rest.strip_suffix(".0"));
        let slot = u64::from_str_radix(slot.with_context(|| bdf.to_owned())?, 16)?;
        let function = format!("_virtio-pci-{}", added["id"].as_str().context("no id")?);
        ensure!(self.api.get("vm.info")?["device_tree"][&function]["pci_bdf"] == bdf);
        Ok(slot)
    }

    fn add_disk(&self, id: &str, path: &Path) -> Result<u64> {
        self.add("vm.add-disk", &json!({ "id": id, "path": path }))
    }

    fn remove(&self, id: &str, force: bool) -> Result<()> {
        let body = json!({ "id": id, "force": force }).to_string();
        let answer = self.api.put("vm.remove-device", Some(&body))?;
        ensure!(answer.is_empty(), "{answer}");
        Ok(())
    }

    fn done(&self, phase: &str) -> Result<()> {
        self.api.is_done("vm.remove-device", patient(LIMIT), phase)
    }

    fn failed(&self, limit: Duration, words: &[&str]) -> Result<()> {
        self.api.has_failed("vm.remove-device", patient(limit), words)
    }

    /// The guest is told of so many devices, and takes them.
    fn takes(&mut self, count: u64) -> Result<()> {
        let told = self.guest.ask(&format!("slots serve {count} 5000"))?;
        ensure!(told == format!("came={count} went=0 lost=0"), "{told}");
        Ok(())
    }

    /// Removes a device from a guest that gives it.
    fn gives(&mut self, id: &str) -> Result<()> {
        self.guest.send("slots serve 1 5000")?;
        self.remove(id, false)?;
        ensure!(self.guest.answer()? == "came=0 went=1 lost=0");
        self.done(&format!("the guest gave back '{id}'"))
    }

    /// Waits until `vm.info` does not show the device any more.
    fn gone(&self, id: &str) -> Result<()> {
        wait(&format!("{id} is still there"), patient(LIMIT), || {
            Ok(self.is_gone(id)?.then_some(()))
        })
    }

    fn is_gone(&self, id: &str) -> Result<bool> {
        let info = self.api.get("vm.info")?;
        let quoted = format!("\"{id}\"");
        Ok(!info["config"].to_string().contains(&quoted) && info["device_tree"][id].is_null())
    }

    /// Events of devices that came and went: `added d`.
    fn events(&self) -> Result<Vec<String>> {
        let events = self.api.get("vm.events?since=0&follow=false")?;
        let all = events.as_array().context("no events")?.iter();
        let text = |event: &Value| {
            Some(format!(
                "{} {}",
                event["event"].as_str()?,
                event["properties"]["id"].as_str()?
            ))
        };
        Ok(all
            .filter(|event| event["source"] == "device")
            .filter_map(text)
            .collect())
    }

    /// Whether the VMM has `path` open.
    fn has_open(&self, path: &Path) -> Result<bool> {
        let path = fs::canonicalize(path)?;
        for entry in fs::read_dir(format!("/proc/{}/fd", self.guest.vm().pid()))? {
            // One may be closed meanwhile.
            if fs::read_link(entry?.path()).is_ok_and(|target| target == path) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn image(context: &Context, name: &str, seed: u64) -> Result<DiskImage> {
    DiskImage::with(context.dir.join(name), &pattern(seed, 0, SIZE as usize))
}
