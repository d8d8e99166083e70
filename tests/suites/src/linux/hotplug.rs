//! vCPUs come and go under a stock kernel.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::api::Api;
use triarch_harness::images::Kernel;
use triarch_harness::linux::LinuxBuilder;
use triarch_harness::suite::{Context, Outcome, Test};

/// On ARM kernels can do it from 6.11 on.
pub const TESTS: &[Test] = &[
    Test::nested("hotplug::vcpus_come_and_go_under_linux_6_1", |c| {
        if std::env::consts::ARCH == "aarch64" {
            return Ok(Outcome::Skipped("ARM kernels can add CPUs from 6.11 on".into()));
        }
        come_and_go(c, Kernel::V6_1)
    })
    .within(Duration::from_secs(240)),
    Test::nested("hotplug::vcpus_come_and_go_under_linux_6_12", |c| {
        come_and_go(c, Kernel::V6_12)
    })
    .within(Duration::from_secs(240)),
];

/// A busy emulated host takes its time.
const LIMIT: Duration = Duration::from_secs(60);

fn get(api: &Api, route: &str) -> Result<Value> {
    Ok(serde_json::from_str(&api.request("GET", route, None)?.body)?)
}

/// How the last resize ended.
fn ended(api: &Api) -> Result<Value> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let jobs = get(api, "vm.jobs")?;
        let mut all = jobs.as_array().context("no jobs")?.iter();
        let last = all.rfind(|job| job["kind"] == "vm.resize").context("no resize")?;
        if last["state"] != "running" {
            return Ok(last.clone());
        }
        ensure!(Instant::now() < deadline, "the job does not end: {last}");
        thread::sleep(Duration::from_millis(100));
    }
}

fn come_and_go(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, kernel)?
        .vm(|vm| vm.set("--cpus", "boot=1,max=3").api())
        .boot()?;
    let api = guest.vm().api()?.clone();
    let resize = |vcpus: u32| api.put("vm.resize", Some(&json!({ "desired_vcpus": vcpus }).to_string()));
    let online = || guest.shell("cat /sys/devices/system/cpu/online");
    // What udev does in a distribution.
    let bring_online = "for n in 1 2; do for i in $(seq 300); do [ -e /sys/devices/system/cpu/cpu$n/online ] && break; usleep 100000; done; \
        echo 1 >/sys/devices/system/cpu/cpu$n/online; done";
    for round in 0..2 {
        ensure!(online()?.trim() == "0", "round {round}: {}", online()?);
        resize(3)?;
        guest.shell(bring_online)?;
        ensure!(online()?.trim() == "0-2", "round {round}: {}", online()?);
        let job = ended(&api)?;
        ensure!(
            job["state"] == "done" && job["phase"] == "the guest started vCPUs 1, 2",
            "{job}"
        );
        let ran = guest
            .shell("for n in 0 1 2; do taskset -c $n sh -c 'echo $0' $n; done; grep -c ^processor /proc/cpuinfo")?;
        ensure!(ran.split_whitespace().eq(["0", "1", "2", "3"]), "{ran}");
        ensure!(get(&api, "vm.info")?["vcpus"]["started"] == 3);
        resize(1)?;
        let job = ended(&api)?;
        ensure!(
            job["state"] == "done" && job["phase"] == "the guest gave back vCPUs 1, 2",
            "{job}"
        );
        ensure!(online()?.trim() == "0" && get(&api, "vm.info")?["vcpus"]["present"] == 1);
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}
