//! Memory that a Linux guest lends to the host: `free` shows it, and so does the host.

use super::load::LIMIT;
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[Test::nested("balloon::lends_and_takes_back", lends)];

const MIB: u64 = 1 << 20;
/// Sets the balloon's size and waits for the end of the job.
fn resize(api: &Api, bytes: u64) -> Result<()> {
    api.put("vm.resize", Some(&json!({ "desired_balloon": bytes }).to_string()))?;
    let job = api.ended("vm.resize", LIMIT)?;
    ensure!(job["state"] == "done", "{job}");
    Ok(())
}

/// Bytes of memory that the guest's kernel says it has.
fn total(guest: &LinuxVm) -> Result<u64> {
    let line = guest.shell("grep MemTotal /proc/meminfo")?;
    let kib = line.split_whitespace().nth(1).context("no number")?;
    Ok(kib.parse::<u64>()? * 1024)
}

fn lends(context: &Context) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, Kernel::V6_1)?
        .vm(|vm| vm.flag("--balloon", "size=0,free_page_reporting=on,id=b").api())
        .boot()?;
    let api = guest.vm().api()?.clone();
    let all = total(&guest)?;
    for _ in 0..3 {
        resize(&api, 64 * MIB)?;
        let less = all - total(&guest)?;
        ensure!(less == 64 * MIB, "the guest has {less} bytes less");
        ensure!(api.get("vm.info")?["memory_actual_size"] == 192 * MIB);
        resize(&api, 0)?;
        ensure!(total(&guest)? == all, "the guest did not get everything back");
    }
    // The driver's own word, by way of the queue for statistics: the second look has what the first asked for.
    let text = || Ok::<_, anyhow::Error>(api.request("GET", "metrics", None)?.body);
    text()?;
    std::thread::sleep(Duration::from_secs(1));
    let told = text()?;
    let line = told
        .lines()
        .find_map(|line| line.strip_prefix(r#"triarch_guest_memory_bytes{kind="total"} "#))
        .context("the guest tells no statistics")?;
    ensure!(line.parse::<u64>()? == all, "{line} of {all} bytes");
    let reported = told
        .lines()
        .find_map(|line| line.strip_prefix(r#"triarch_balloon_bytes_total{balloon="b",operation="report"} "#))
        .context("no reports")?;
    ensure!(reported.parse::<u64>()? > 0, "no free pages were reported");
    guest.power_off()?;
    Ok(Outcome::Passed)
}
