//! A VM driven through its API alone, and what is left when the VMM is told to end.

use super::guest::{Guest, builder};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use std::process::Command;
use triarch_harness::api::Api;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("api":
    lives_by_requests,
    shows_devices,
    ends_by_request,
    ends_on_sigterm,
);

/// Asks for `vm.info`; the state, or the status when there is no VM.
fn state(api: &Api) -> Result<String> {
    let answer = api.request("GET", "vm.info", None)?;
    if answer.status != 200 {
        return Ok(answer.status.to_string());
    }
    let info: serde_json::Value = serde_json::from_str(&answer.body)?;
    Ok(info["state"].as_str().unwrap_or_default().to_owned())
}

fn lives_by_requests(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.api())?;
    let api = guest.vm().api()?.clone();
    let info = api.request("GET", "vm.info", None)?.body;
    let info: serde_json::Value = serde_json::from_str(&info)?;
    for (route, expected) in [
        ("vm.pause", "Paused"),
        ("vm.resume", "Running"),
        ("vm.reboot", "Running"),
    ] {
        api.put(route, None)?;
        let state = state(&api)?;
        ensure!(state == expected, "after {route} the state is {state}");
    }
    guest.wait_ready().context("after vm.reboot")?;
    guest.ask("hello")?;
    for (route, expected) in [("vm.shutdown", "Shutdown"), ("vm.boot", "Running")] {
        api.put(route, None)?;
        let state = state(&api)?;
        ensure!(state == expected, "after {route} the state is {state}");
    }
    guest.wait_ready().context("after vm.boot")?;
    api.put("vm.delete", None)?;
    ensure!(state(&api)? == "404", "a deleted VM is still there");
    ensure!(api.request("PUT", "vm.boot", None)?.status == 404);
    // What vm.info told is a configuration that vm.create takes.
    api.put("vm.create", Some(&info["config"].to_string()))?;
    ensure!(state(&api)? == "Created");
    api.put("vm.boot", None)?;
    ensure!(state(&api)? == "Running");
    Ok(Outcome::Passed)
}

fn shows_devices(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?.api();
    let disk = DiskImage::empty(vm.dir().join("disk"), 1 << 20)?;
    let mut guest = Guest::start(vm.disk(disk.path(), "id=data"))?;
    let api = guest.vm().api()?.clone();
    let tree = || -> Result<serde_json::Value> {
        let info: serde_json::Value = serde_json::from_str(&api.request("GET", "vm.info", None)?.body)?;
        Ok(info["device_tree"].clone())
    };
    let devices = tree()?;
    let function = &devices["_virtio-pci-data"];
    ensure!(function["children"] == serde_json::json!(["data"]), "{devices}");
    ensure!(devices["data"]["parent"] == "_virtio-pci-data", "{devices}");
    let bdf = function["pci_bdf"].as_str().context("an address")?;
    // The guest finds a block device there.
    let found = guest.ask("pci")?;
    let place = bdf.trim_start_matches("0000:");
    ensure!(
        found.contains(&format!(" {place}=1af4:1042:")),
        "{bdf} is not in `{found}`"
    );
    api.put("vm.shutdown", None)?;
    ensure!(tree()?.is_null(), "devices without a guest");
    Ok(Outcome::Passed)
}

fn ends_by_request(context: &Context) -> Result<Outcome> {
    let guest = Guest::start(builder(context)?.api())?;
    let socket = guest.vm().api()?.socket().to_owned();
    guest.vm().api()?.put("vmm.shutdown", None)?;
    guest.expect_end(0)?;
    ensure!(!socket.exists(), "the API's socket is left behind");
    Ok(Outcome::Passed)
}

fn ends_on_sigterm(context: &Context) -> Result<Outcome> {
    let guest = Guest::start(builder(context)?.api())?;
    let socket = guest.vm().api()?.socket().to_owned();
    let kill = format!("kill -TERM {}", guest.vm().pid());
    let status = Command::new("sh").args(["-c", &kill]).status()?;
    ensure!(status.success(), "kill: {status}");
    guest.expect_end(0)?;
    ensure!(!socket.exists(), "the API's socket is left behind");
    Ok(Outcome::Passed)
}
