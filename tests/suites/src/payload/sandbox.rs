//! Every thread of a VMM is confined.

use super::guest::{Guest, builder};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::path::Path;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("sandbox":
    confines_every_thread,
    can_be_left_out,
);

/// A thread's name, and how many filters it is under (proc_pid_status(5)).
fn thread(dir: &Path) -> Result<(String, u32)> {
    let status = fs::read_to_string(dir.join("status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(str::trim).with_context(|| format!("no {name} in {status}"))
    };
    let (name, mode) = (field("Name:")?, field("Seccomp:")?);
    let filters = field("Seccomp_filters:")?.parse()?;
    ensure!((mode == "2") == (filters > 0), "mode {mode} with {filters} filters");
    Ok((name.to_owned(), filters))
}

/// The threads of a VMM whose devices all work.
fn threads(context: &Context, seccomp: &str) -> Result<Vec<(String, u32)>> {
    let disk = DiskImage::empty(context.dir.join(format!("disk-{seccomp}")), 1 << 20)?;
    let vm = builder(context)?.api().disk(disk.path(), "").cpus(2);
    let vsock = format!("cid=3,socket={}", vm.dir().join("vsock.sock").display());
    let console = format!("socket={}", vm.dir().join("console.sock").display());
    let vm = vm.flag("--vsock", vsock).set("--console", console);
    let mut guest = Guest::start(vm.set("--seccomp", seccomp))?;
    for device in ["blk 0 init", "rng init", "console init", "vsock init"] {
        guest.ask(device)?;
    }
    guest.ask("cpus")?;
    let tasks = fs::read_dir(format!("/proc/{}/task", guest.vm().pid()))?;
    let threads: Result<Vec<_>> = tasks.map(|task| thread(&task?.path())).collect();
    guest.power_off()?;
    let threads = threads?;
    for part in ["vcpu0", "vcpu1", "_disk", "_rng", "_console", "_vsock", "http-server"] {
        ensure!(
            threads.iter().any(|(name, _)| name.starts_with(part)),
            "no {part} in {threads:?}"
        );
    }
    Ok(threads)
}

fn confines_every_thread(context: &Context) -> Result<Outcome> {
    for seccomp in ["true", "log"] {
        for (name, filters) in threads(context, seccomp)? {
            // The filter of its class, and above it the one of the thread that made it, if that was confined by then.
            let expected = if matches!(name.as_str(), "triarch" | "spawner" | "http-server") {
                1
            } else {
                2
            };
            ensure!(
                filters == expected,
                "--seccomp {seccomp}: {filters} filters, not {expected}, on {name}"
            );
        }
    }
    Ok(Outcome::Passed)
}

fn can_be_left_out(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?.set("--seccomp", "false");
    let guest = Guest::start(vm)?;
    for task in fs::read_dir(format!("/proc/{}/task", guest.vm().pid()))? {
        let (name, filters) = thread(&task?.path())?;
        ensure!(filters == 0, "{name} is confined");
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}
