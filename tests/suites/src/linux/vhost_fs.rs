//! A directory of the host that virtiofsd shares with a guest.

use crate::storage::wait_state;
use crate::virtiofsd::{self, Virtiofsd};
use anyhow::{Result, ensure};
use std::fs;
use triarch_harness::disk::pattern;
use triarch_harness::images::Kernel;
use triarch_harness::linux::LinuxBuilder;
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("vhost_fs::files_are_shared_with_linux_6_1", |c| {
        files_are_shared(c, Kernel::V6_1)
    }),
    Test::nested("vhost_fs::files_are_shared_with_linux_6_12", |c| {
        files_are_shared(c, Kernel::V6_12)
    }),
];

const SIZE: usize = 1 << 20;

fn files_are_shared(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let Some(mut daemon) = Virtiofsd::find(context)? else {
        return Ok(Outcome::Skipped(virtiofsd::missing()));
    };
    let shared = daemon.shared().to_owned();
    fs::create_dir_all(shared.join("deep/er"))?;
    fs::write(shared.join("deep/er/file"), pattern(3, SIZE))?;
    daemon.start()?;
    let flag = format!("tag=shared,socket={},id=served", daemon.socket().display());
    let guest = LinuxBuilder::new(context, kernel)?
        .vm(|vm| vm.api().flag("--fs", flag))
        .boot()?;
    let link = wait_state(guest.vm(), "Connected")?;
    // It keeps no record of the requests it has.
    ensure!(link["datapath"] == "relay", "{link}");
    // Some kernels have it built in.
    guest.shell("grep -q virtiofs /proc/filesystems || /init load virtiofs; mkdir /tmp/shared; mount -t virtiofs shared /tmp/shared")?;
    ensure!(guest.shell("ls /tmp/shared/deep")? == "er", "another directory");
    ensure!(
        guest.agent().get("/tmp/shared/deep/er/file")? == pattern(3, SIZE),
        "the guest reads something else"
    );
    // What the guest writes is the host's, and the other way round.
    guest.agent().put("/tmp/shared/deep/new", 0o640, &pattern(4, SIZE))?;
    guest.shell(
        "sync; mv /tmp/shared/deep/new /tmp/shared/renamed; rm /tmp/shared/deep/er/file; rmdir /tmp/shared/deep/er",
    )?;
    ensure!(
        fs::read(shared.join("renamed"))? == pattern(4, SIZE),
        "the host reads something else"
    );
    ensure!(!shared.join("deep/er").exists(), "it is still there");
    fs::write(shared.join("late"), "from the host")?;
    ensure!(
        guest.shell("cat /tmp/shared/late")? == "from the host",
        "the guest reads something else"
    );
    guest.shell("umount /tmp/shared")?;
    guest.power_off()?;
    daemon.expect_end()?;
    Ok(Outcome::Passed)
}
