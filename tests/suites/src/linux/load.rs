//! Work that a guest does all the while: a script of its own counts in `/load/good` what went well.

use anyhow::{Result, ensure};
use std::time::Duration;
use triarch_harness::jobs::wait;
use triarch_harness::linux::LinuxVm;

/// How long a step may take: a busy emulated host takes its time.
pub const LIMIT: Duration = Duration::from_secs(90);

/// How much of the load is done.
fn good(guest: &LinuxVm) -> Result<u64> {
    Ok(guest.shell("wc -l </load/good")?.trim().parse()?)
}

/// The load goes on.
pub fn works(guest: &LinuxVm) -> Result<()> {
    let before = good(guest)?;
    wait("the load stands still", LIMIT, || {
        Ok((good(guest)? > before).then_some(()))
    })
}

/// Ends the load: nothing went wrong.
pub fn ends(guest: &LinuxVm) -> Result<()> {
    let bad = guest.shell("touch /load/stop; cat /load/bad 2>/dev/null || true")?;
    ensure!(bad.trim().is_empty(), "{bad}");
    Ok(())
}
