//! Flags themselves.

use super::{FAILED, WRONG, builder, ended, failed, payload_tests, refused, text};
use anyhow::{Context as _, Result};
use std::fs;
use triarch_harness::suite::{Context, Outcome};
use triarch_harness::vm::VmBuilder;

payload_tests!("bad_input":
    unknown_flags,
    flags_that_would_go_unheard,
    flags_of_cloud_hypervisor,
    zones_and_nodes,
    log_flags,
    configuration_files,
);

fn unknown_flags(context: &Context) -> Result<Outcome> {
    let flag = |name: &str, value: &str| -> Result<_> { Ok(builder(context)?.set(name, value)) };
    refused(context, flag("--bogus", "1")?, &["--bogus", "--help"])?;
    refused(context, flag("--seccomp", "maybe")?, &["maybe", "log"])?;
    failed(
        context,
        flag("--log-file", "/nonexistent/l")?,
        &["--log-file", "/nonexistent/l", "No such file"],
    )?;
    refused(context, flag("--firmware", "f")?, &["--firmware", "--kernel"])?;
    refused(context, builder(context)?.flag("--cpus", "2"), &["'2'", "--help"])?;
    Ok(Outcome::Passed)
}

fn flags_that_would_go_unheard(context: &Context) -> Result<Outcome> {
    refused(context, VmBuilder::new(context)?, &["nothing to do", "--kernel"])?;
    let vm = VmBuilder::new(context)?.api().flag("--disk", "path=/nonexistent/d");
    refused(context, vm, &["--disk", "--kernel FILE"])?;
    let vm = VmBuilder::new(context)?.api().cpus(2);
    refused(context, vm, &["--cpus", "--kernel FILE"])?;
    Ok(Outcome::Passed)
}

fn flags_of_cloud_hypervisor(context: &Context) -> Result<Outcome> {
    for (flag, value) in [("--pmem", "file=/nonexistent/p"), ("--vdpa", "path=/dev/vhost-vdpa-0")] {
        let words = [&format!("{flag} is not supported by this version; leave it out")[..]];
        refused(context, builder(context)?.flag(flag, value), &words)?;
    }
    refused(
        context,
        builder(context)?.flag("--compat", "qemu"),
        &["'qemu'", "cloud-hypervisor"],
    )?;
    Ok(Outcome::Passed)
}

fn zones_and_nodes(context: &Context) -> Result<Outcome> {
    for (memory, flag, value, words) in [
        ("size=1G", "--memory-zone", "id=a,size=1G", "set memory.size to 0"),
        (
            "size=0",
            "--memory-zone",
            "id=a,size=1G,hotplug_size=1G",
            "memory.hotplug_method VirtioMem",
        ),
        (
            "size=0",
            "--memory-zone",
            "id=a,size=1G,file=/dev/shm",
            "memory.zones[0].file is not supported",
        ),
        (
            "size=1G",
            "--numa",
            "guest_numa_id=0,memory_zones=[a]",
            "numa[0].memory_zones has 'a'",
        ),
        (
            "size=1G",
            "--numa",
            "guest_numa_id=1,cpus=[0]",
            "numa[0].guest_numa_id is 1",
        ),
        ("size=1G", "--numa", "cpus=[0]", "write guest_numa_id=0"),
    ] {
        refused(
            context,
            builder(context)?.set("--memory", memory).flag(flag, value),
            &[words],
        )?;
    }
    Ok(Outcome::Passed)
}

fn log_flags(context: &Context) -> Result<Outcome> {
    for (flag, value, words) in [
        ("--log-level", "loud", ["'loud' is no level", "error, warn"]),
        ("--log-level", "info,bloc=debug", ["no module 'bloc'", "block"]),
        ("--log-format", "xml", ["'xml'", "text, json"]),
    ] {
        refused(context, builder(context)?.flag(flag, value), &words)?;
    }
    Ok(Outcome::Passed)
}

fn configuration_files(context: &Context) -> Result<Outcome> {
    let path = context.dir.join("vm.json");
    let file = text(&path)?;
    let kernel = context.images.path("triarch-payload")?;
    let kernel = format!(r#""payload": {{"kernel": "{}"}}"#, text(&kernel)?);
    let many = format!(r#"{{{kernel}, "cpus": {{"boot_vcpus": 300, "max_vcpus": 300}}}}"#);
    let missing = format!(r#"{{{kernel}, "disks": [{{"path": "/nonexistent/d"}}]}}"#);
    for (code, content, words) in [
        (WRONG, "", ["it is not JSON", "EOF"]),
        (WRONG, "{\n  \"cpus\": 1,,}", ["it is not JSON", "line 2"]),
        (WRONG, "[]", ["not a JSON object", ""]),
        (
            WRONG,
            r#"{"disks": [{"num_queues": "many"}]}"#,
            [": disks[0].num_queues: ", "\"many\""],
        ),
        (WRONG, r#"{"serial": {"mode": "Loud"}}"#, [": serial.mode: ", "Loud"]),
        (
            WRONG,
            r#"{"pmem": [{"file": "a"}]}"#,
            ["does not support pmem", "leave it out"],
        ),
        (WRONG, "{}", ["nothing to boot", "kernel"]),
        (WRONG, &many, ["boot_vcpus is 300", "between 1 and 254"]),
        (FAILED, &missing, ["/nonexistent/d", "does not exist"]),
    ] {
        fs::write(&path, content)?;
        let vm = VmBuilder::new(context)?.flag("--config", file);
        let place = if code == WRONG { file } else { "_disk0" };
        ended(context, vm, code, &[place, words[0], words[1]]).with_context(|| content.to_owned())?;
    }
    let vm = VmBuilder::new(context)?.flag("--config", "/nonexistent/vm.json");
    refused(context, vm, &["--config", "/nonexistent/vm.json", "No such file"])?;
    let vm = VmBuilder::new(context)?.flag("--config", file).cpus(1);
    refused(context, vm, &["--cpus", "so does --config", file])?;
    Ok(Outcome::Passed)
}
