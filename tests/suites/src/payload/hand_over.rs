//! One process of our storage daemon goes on in another one's place, or cannot.

use super::data::pattern;
use super::guest::number;
use super::vhost::{OURS, Rig, with_daemon};
use crate::storage::soon;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::Duration;
use triarch_harness::disk::DiskImage;
use triarch_harness::process::Process;
use triarch_harness::suite::{Context, Outcome, Test, figure};

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("vhost::blkd::another_process_goes_on", another_process_goes_on).within(Duration::from_secs(60)),
    Test::payload(
        "vhost::blkd::one_that_cannot_go_on_is_not_noticed",
        one_that_cannot_go_on,
    )
    .within(Duration::from_secs(60)),
];

/// The user that has no rights.
const NOBODY: u32 = 65534;

fn export(rig: &Rig) -> Result<Value> {
    let info = rig.daemon.control().request("GET", "blkd.info", None)?.body;
    let info: Value = serde_json::from_str(&info)?;
    Ok(info["exports"][0].clone())
}

/// A new process takes the place of the old one, under load, again and again.
fn another_process_goes_on(context: &Context) -> Result<Outcome> {
    with_daemon::<OURS>(context, 2, ",num_queues=2", |rig| {
        rig.guest.ask("blk 0 init queues=2")?;
        let mut stalls = Vec::new();
        for round in 0..10 {
            rig.guest.send(&format!("blk 0 soak 3000 48 {round} 1000"))?;
            thread::sleep(Duration::from_millis(5 + round * 3));
            rig.daemon.hand_over()?;
            let answer = rig.guest.answer().with_context(|| format!("round {round}"))?;
            stalls.push(number(&answer, "stall_us")? / 1000);
        }
        stalls.sort_unstable();
        let export = export(rig)?;
        ensure!(export["connected"] == true, "{export}");
        figure(&format!(
            "10 hand-overs under load; without an answer for {} ms (median), {} ms (longest)",
            stalls[5], stalls[9]
        ))?;
        Ok(())
    })
}

/// New processes that fail, each for a reason of its own, while the guest reads and writes: its connection stays.
fn one_that_cannot_go_on(context: &Context) -> Result<Outcome> {
    with_daemon::<OURS>(context, 2, ",num_queues=2", |rig| {
        rig.guest.ask("blk 0 init queues=2")?;
        // It has an export of that name already.
        let other = DiskImage::with(rig.image.path().with_extension("other"), &pattern(1, 0, 4096))?;
        let mut same_name = rig.daemon.successor(rig.daemon.program());
        let path = other.path().display();
        same_name
            .arg("--export")
            .arg(format!("name=served,path={path},socket={path}.sock"));
        fails(rig, &mut same_name, "an export called served in both")?;
        // It may not open as many files.
        let successor = rig.daemon.successor(rig.daemon.program());
        let mut few_files = Command::new("sh");
        few_files.args(["-c", "ulimit -n 24; exec \"$0\" \"$@\""]);
        few_files.arg(successor.get_program()).args(successor.get_args());
        fails(rig, &mut few_files, "RLIMIT_NOFILE")?;
        // It may not talk to the old one. Only root can start it so, and where that user finds it.
        if fs::metadata("/proc/self")?.uid() == 0 {
            let public = tempfile::Builder::new()
                .permissions(Permissions::from_mode(0o755))
                .tempdir()?;
            let program = public.path().join("triarch-blkd");
            fs::copy(rig.daemon.program(), &program)?;
            let mut nobody = rig.daemon.successor(&program);
            nobody.uid(NOBODY).gid(NOBODY);
            fails(rig, &mut nobody, "Permission denied")?;
        }
        // One that can is welcome.
        rig.guest.send("blk 0 soak 3000 48 9 1000")?;
        rig.daemon.hand_over()?;
        rig.guest.answer()?;
        Ok(())
    })
}

/// `successor` fails with one line that has `reason`, and the guest does not notice.
fn fails(rig: &mut Rig, successor: &mut Command, reason: &str) -> Result<()> {
    rig.guest.send("blk 0 soak 3000 48 5 1000")?;
    let mut process = Process::start(successor)?;
    let status = process.wait(soon())?;
    process.expect(status, 1)?;
    let told = process.stderr().text();
    ensure!(told.starts_with("triarch-blkd: cannot take over: "), "{told}");
    ensure!(
        told.lines().count() == 1 && told.contains(reason),
        "no `{reason}` in: {told}"
    );
    rig.guest.answer().context(reason.to_owned())?;
    let link = rig.link()?;
    ensure!(
        link["state"] == "Connected" && link["reconnects"] == 0,
        "{reason}: {link}"
    );
    let export = export(rig)?;
    ensure!(
        export["connected"] == true && export["connections"] == 1,
        "{reason}: {export}"
    );
    Ok(())
}
