//! What the VMM tells of CPUs: the host's, and those of a guest.

use super::guest::{Guest, builder, is_arm};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use triarch_harness::api::Api;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("cpu_features": tells_what_guests_can_have_and_what_one_has);

fn ask(api: &Api) -> Result<Value> {
    let answer = api.request("GET", "vmm.cpu-features", None)?;
    ensure!(answer.status == 200, "{}", answer.body);
    Ok(serde_json::from_str(&answer.body)?)
}

fn names(cpu: &Value) -> Result<Vec<&str>> {
    let features = cpu["features"].as_array().context("a list")?;
    Ok(features.iter().filter_map(Value::as_str).collect())
}

/// The same before there is a guest, with one, and when it is gone; a guest has all there is, and not wider addresses than it may.
fn tells_what_guests_can_have_and_what_one_has(context: &Context) -> Result<Outcome> {
    if is_arm() {
        return Ok(Outcome::Skipped("ARM's registers are tested with recorded ones".into()));
    }
    let guest = Guest::start(builder(context)?.api())?;
    let api = guest.vm().api()?.clone();
    let told = ask(&api)?;
    let (host, vm) = (&told["host"], &told["vm"]);
    for name in ["sse2", "lm", "nx", "xcr0_sse", "kvm_clocksource"] {
        ensure!(names(host)?.contains(&name), "{name}: {host}");
    }
    ensure!(host["architecture"] == std::env::consts::ARCH, "{host}");
    ensure!(host["vendor"].as_str().is_some_and(|name| name.len() == 12), "{host}");
    ensure!(host["signature"]["family"].as_u64() >= Some(6), "{host}");
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(host["kernel"] == release.trim(), "{host}");
    for key in ["features", "unnamed", "values", "vendor", "signature"] {
        ensure!(host[key] == vm[key], "{key}: {host} {vm}");
    }
    ensure!(vm["kernel"].is_null(), "{vm}");

    let info: Value = serde_json::from_str(&api.request("GET", "vm.info", None)?.body)?;
    let mut config = info["config"].clone();
    api.put("vm.delete", None)?;
    let alone = ask(&api)?;
    ensure!(alone["vm"].is_null() && &alone["host"] == host, "{alone}");
    config["cpus"]["max_phys_bits"] = 36.into();
    api.put("vm.create", Some(&config.to_string()))?;
    ensure!(ask(&api)?["vm"].is_null(), "no guest has been built");
    api.put("vm.boot", None)?;
    let narrow = ask(&api)?;
    ensure!(narrow["vm"]["values"]["physical_address_bits"] == 36, "{narrow}");
    ensure!(&narrow["host"] == host, "{narrow}");
    Ok(Outcome::Passed)
}
