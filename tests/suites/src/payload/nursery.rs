//! Daemons that the VMM starts itself: `backend=blkd`.

use super::data::pattern;
use super::ends::started_by;
use super::guest::{Guest, builder, has_ended, number};
use crate::storage::soon;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome, Test, patient};
use triarch_harness::vm::Vm;

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("nursery::serves_a_disk", serves_a_disk),
    Test::payload("nursery::starts_a_killed_daemon_again", starts_a_killed_daemon_again),
    Test::payload("nursery::ends_with_a_killed_vmm", ends_with_a_killed_vmm),
    Test::payload(
        "nursery::tells_why_a_daemon_did_not_start",
        tells_why_a_daemon_did_not_start,
    ),
    Test::payload("nursery::serves_requests_only_if_told", serves_requests_only_if_told),
    Test::payload("nursery::a_disk_grows_under_the_guest", a_disk_grows_under_the_guest),
    Test::payload(
        "nursery::nobody_waits_with_a_resize_for_a_stopped_daemon",
        nobody_waits_for_a_stopped_daemon,
    )
    .within(Duration::from_secs(40)),
];

const SIZE: u64 = 4 << 20;
const DAEMON: &str = "triarch-blkd";
const NURSERY: &str = "triarch-nursery";

/// A guest with a disk of its own daemon, whose sockets are below `run` in the test's directory.
fn start(context: &Context) -> Result<(Guest, DiskImage)> {
    let image = DiskImage::with(context.dir.join("disk"), &pattern(1, 0, SIZE as usize))?;
    let run = context.dir.join("run");
    fs::create_dir(&run)?;
    let script = format!("export RUNTIME_DIRECTORY='{}'; exec", run.display());
    let vm = builder(&started_by(context, &script, "")?)?.api();
    let guest = Guest::start(vm.disk(image.path(), "backend=blkd,id=served"))?;
    Ok((guest, image))
}

/// The processes that `parent` started and that run a program of that name.
pub(super) fn children(parent: u32, name: &str) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // It may have ended meanwhile.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(") "));
        let Some((called, rest)) = fields else { continue };
        let of = rest.split(' ').nth(1).and_then(|text| text.parse().ok());
        // The kernel keeps 15 bytes of a name.
        if of == Some(parent) && name.starts_with(called) && !rest.starts_with('Z') {
            found.push(pid);
        }
    }
    Ok(found)
}

/// The nursery of a VMM, and its only daemon.
fn family(vm: &Vm) -> Result<(u32, u32)> {
    let one = |parent, name| -> Result<u32> {
        let found = children(parent, name)?;
        ensure!(found.len() == 1, "{found:?} are called {name}");
        Ok(found[0])
    };
    let nursery = one(vm.pid(), "triarch")?;
    let title = fs::read(format!("/proc/{nursery}/cmdline"))?;
    ensure!(title.starts_with(NURSERY.as_bytes()), "{}", title.escape_ascii());
    Ok((nursery, one(nursery, DAEMON)?))
}

fn kill(pid: u32) -> Result<()> {
    signal(pid, "KILL")
}

fn signal(pid: u32, name: &str) -> Result<()> {
    let status = Command::new("kill").args(["-s", name, &pid.to_string()]).status()?;
    ensure!(status.success(), "kill: {status}");
    Ok(())
}

fn is_empty(dir: &Path) -> Result<bool> {
    Ok(fs::read_dir(dir)?.next().is_none())
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + soon();
    while !is_so()? {
        ensure!(Instant::now() < deadline, "{what}: not within {:?}", soon());
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn serves_a_disk(context: &Context) -> Result<Outcome> {
    let (mut guest, image) = start(context)?;
    let (nursery, daemon) = family(guest.vm())?;
    guest.ask("blk 0 verify 0 2048 1")?;
    guest.ask("blk 0 write 9 100 2")?;
    guest.ask("blk 0 flush")?;
    ensure!(
        image.read(9 * 512, 100 * 512)? == pattern(2, 9, 100 * 512),
        "other data"
    );
    // Nobody else finds its socket.
    let run = context.dir.join("run");
    let place = fs::read_dir(&run)?.next().context("no directory")??.path();
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&place)?.permissions());
    ensure!(mode & 0o777 == 0o700, "{mode:o}");
    // A reset of the guest keeps it.
    guest.ask("blk 0 init")?;
    guest.vm().api()?.put("vm.reboot", None)?;
    guest.wait_ready()?;
    guest.ask("blk 0 verify 9 100 2")?;
    ensure!(family(guest.vm())? == (nursery, daemon), "another daemon after a reset");
    guest.power_off()?;
    ensure!(has_ended(nursery) && has_ended(daemon), "it is left behind");
    ensure!(is_empty(&run)?, "its sockets are left behind");
    Ok(Outcome::Passed)
}

fn starts_a_killed_daemon_again(context: &Context) -> Result<Outcome> {
    let (mut guest, _image) = start(context)?;
    guest.ask("blk 0 init")?;
    for round in 0..3u64 {
        let (_, daemon) = family(guest.vm())?;
        guest.send(&format!("blk 0 soak 1000 16 {round} 1000"))?;
        kill(daemon)?;
        guest.answer()?;
        let connected = || Ok(crate::storage::link(guest.vm())?["reconnects"].as_u64() > Some(round));
        wait_until("connected again", connected)?;
        ensure!(family(guest.vm())?.1 != daemon, "the killed one lives");
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn ends_with_a_killed_vmm(context: &Context) -> Result<Outcome> {
    let (guest, _image) = start(context)?;
    let (nursery, daemon) = family(guest.vm())?;
    kill(guest.vm().pid())?;
    wait_until("both end", || Ok(has_ended(nursery) && has_ended(daemon)))?;
    ensure!(is_empty(&context.dir.join("run"))?, "its sockets are left behind");
    Ok(Outcome::Passed)
}

fn tells_why_a_daemon_did_not_start(context: &Context) -> Result<Outcome> {
    let missing = context.dir.join("missing");
    let vm = builder(context)?.disk(&missing, "backend=blkd");
    let ended = vm.start()?.expect_end(1)?;
    let last = ended.stderr.lines().last().unwrap_or_default();
    ensure!(
        last.starts_with("triarch: cannot set up the device _disk0: ") && last.contains("missing"),
        "{}",
        ended.stderr
    );
    Ok(Outcome::Passed)
}

fn serves_requests_only_if_told(context: &Context) -> Result<Outcome> {
    let image = DiskImage::with(context.dir.join("disk"), &pattern(1, 0, SIZE as usize))?;
    let kernel = context.images.path(super::guest::IMAGE)?;
    for told in [false, true] {
        let builder = triarch_harness::vm::VmBuilder::new(context)?.api();
        let serial = builder.dir().join("serial");
        let config = json!({
            "payload": { "kernel": kernel },
            "memory": { "size": 64 << 20 },
            "serial": { "mode": "Socket", "socket": serial },
            "console": { "mode": "Null" },
            "disks": [{ "path": image.path(), "backend": "blkd", "id": "served" }],
        });
        let vm = if told { builder.switch("--daemons") } else { builder }.start()?;
        let api = vm.api()?.clone();
        api.put("vm.create", Some(&config.to_string()))?;
        let info: Value = serde_json::from_str(&api.request("GET", "vm.info", None)?.body)?;
        ensure!(info["config"]["disks"][0]["backend"] == "blkd", "{info}");
        if !told {
            let refused = api.request("PUT", "vm.boot", None)?;
            ensure!(
                refused.status == 400 && refused.body.contains("--daemons"),
                "{}",
                refused.body
            );
            ensure!(children(vm.pid(), "triarch")?.is_empty(), "it has a nursery");
            api.put("vmm.shutdown", None)?;
            vm.expect_end(0)?;
            continue;
        }
        api.put("vm.boot", None)?;
        let mut guest = Guest::attach(vm, &serial)?;
        guest.ask("blk 0 verify 0 2048 1")?;
        let (nursery, daemon) = family(guest.vm())?;
        api.put("vm.shutdown", None)?;
        ensure!(has_ended(daemon) && !has_ended(nursery), "the daemon outlives its VM");
        api.put("vm.boot", None)?;
        ensure!(family(guest.vm())?.0 == nursery, "another nursery");
        api.put("vmm.shutdown", None)?;
        guest.expect_end(0)?;
        ensure!(has_ended(nursery), "the nursery is left behind");
    }
    Ok(Outcome::Passed)
}

fn resize(size: u64) -> Value {
    json!({ "id": "served", "desired_size": size })
}

/// Has its disk made `size` bytes large.
fn grow(guest: &mut Guest, size: u64) -> Result<()> {
    guest
        .vm()
        .api()?
        .put("vm.resize-disk", Some(&resize(size).to_string()))?;
    sees(guest, size)
}

/// The guest sees the size when the answer has come.
fn sees(guest: &mut Guest, size: u64) -> Result<()> {
    let info = guest.ask("blk 0 info")?;
    ensure!(number(&info, "sectors")? == size / 512, "{info}");
    Ok(())
}

fn a_disk_grows_under_the_guest(context: &Context) -> Result<Outcome> {
    let (mut guest, image) = start(context)?;
    let api = guest.vm().api()?.clone();
    guest.ask("blk 0 verify 0 8 1")?;
    let grown = 4 * SIZE;
    // The second time it has that size already.
    for _ in 0..2 {
        grow(&mut guest, grown)?;
    }
    let last = grown / 512 - 8;
    guest.ask(&format!("blk 0 write {last} 8 3"))?;
    guest.ask("blk 0 flush")?;
    ensure!(image.read(last * 512, 8 * 512)? == pattern(3, last, 8 * 512));
    // In the words of a disk without a daemon.
    api.refused("vm.resize-disk", &resize(SIZE), 400, &["lose data", "grow"])?;
    api.refused("vm.resize-disk", &resize(grown + 1), 400, &["multiple", "512"])?;
    let other = json!({ "id": "disk9", "desired_size": SIZE });
    api.refused("vm.resize-disk", &other, 404, &["disk9", "vm.info"])?;
    // The next daemon, which is asked while it starts, knows the size, and can be asked as well.
    kill(family(guest.vm())?.1)?;
    grow(&mut guest, 2 * grown)?;
    guest.ask(&format!("blk 0 verify {last} 8 3"))?;
    // So can the one that a boot brings.
    api.put("vm.shutdown", None)?;
    api.refused("vm.resize-disk", &resize(3 * grown), 409, &["Shutdown"])?;
    api.put("vm.boot", None)?;
    guest.wait_ready()?;
    ensure!(number(&guest.ask("blk 0 info")?, "sectors")? == 2 * grown / 512);
    grow(&mut guest, 3 * grown)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn nobody_waits_for_a_stopped_daemon(context: &Context) -> Result<Outcome> {
    let (mut guest, _image) = start(context)?;
    let api = guest.vm().api()?.clone();
    let (_, daemon) = family(guest.vm())?;
    guest.ask("blk 0 verify 0 8 1")?;
    for (size, waits) in [(2 * SIZE, false), (3 * SIZE, true)] {
        signal(daemon, "STOP")?;
        let asking = {
            let api = api.clone();
            thread::spawn(move || api.request("PUT", "vm.resize-disk", Some(&resize(size).to_string())))
        };
        // Everything else is answered as ever, also what the controller does.
        for _ in 0..10 {
            let asked = Instant::now();
            api.put("vm.resize", Some(r#"{"desired_vcpus":1}"#))?;
            ensure!(
                asked.elapsed() < patient(Duration::from_secs(1)),
                "{:?}",
                asked.elapsed()
            );
            thread::sleep(Duration::from_millis(20));
        }
        ensure!(!asking.is_finished(), "a stopped daemon answered");
        if !waits {
            signal(daemon, "CONT")?;
        }
        let answer = asking.join().ok().context("a panic")??;
        if waits {
            let told = answer.status == 500 && answer.body.contains("did not answer within 5 s");
            ensure!(told, "{} {}", answer.status, answer.body);
            signal(daemon, "CONT")?;
            // It may still do it, it said, or not.
            api.put("vm.resize-disk", Some(&resize(size).to_string()))?;
        } else {
            ensure!(answer.is_success(), "{} {}", answer.status, answer.body);
        }
        sees(&mut guest, size)?;
    }
    // One that is killed meanwhile leaves the order to the next one, unless it had it already.
    signal(daemon, "STOP")?;
    let asking = {
        let api = api.clone();
        thread::spawn(move || api.request("PUT", "vm.resize-disk", Some(&resize(4 * SIZE).to_string())))
    };
    thread::sleep(Duration::from_millis(200));
    signal(daemon, "KILL")?;
    let answer = asking.join().ok().context("a panic")??;
    if !answer.is_success() {
        let told = answer.status == 500 && answer.body.contains("ended before it answered");
        ensure!(told, "{} {}", answer.status, answer.body);
        api.put("vm.resize-disk", Some(&resize(4 * SIZE).to_string()))?;
    }
    sees(&mut guest, 4 * SIZE)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
