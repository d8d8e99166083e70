//! Work that a guest does all the while, and what its kernel thinks of it: scripts count in `/load` what went well, and write down in
//! `/load/bad` what did not.

use anyhow::{Context as _, Result, ensure};
use std::time::Duration;
use triarch_harness::jobs::wait;
use triarch_harness::linux::LinuxVm;

/// How long a step may take: a busy emulated host takes its time.
pub const LIMIT: Duration = Duration::from_secs(90);

/// Writes other data to the disk each time and reads it back from there.
pub const DISK: &str = r#"mkdir -p /load; : >/load/good
(n=0; while [ ! -e /load/stop ]; do
  n=$((n+1)); { echo $n; head -c 65000 /dev/urandom; } | head -c 65000 >/load/data; want=$(md5sum </load/data)
  dd if=/load/data of=/dev/vda bs=4096 conv=fsync 2>/dev/null
  if [ "$(dd if=/dev/vda bs=4096 count=16 iflag=direct 2>/dev/null | head -c 65000 | md5sum)" = "$want" ]; then echo >>/load/good
  else echo "round $n differs" >>/load/bad; fi
done) </dev/null >/dev/null 2>&1 &"#;

/// Writes other data to one of eight MiB of memory each time, and before that compares what it wrote there eight rounds ago.
pub const MEMORY: &str = r#"mkdir -p /load; : >/load/remembered
(n=0; while [ ! -e /load/stop ]; do
  n=$((n+1)); f=/load/memory$((n%8))
  if [ -e $f ] && [ "$(md5sum <$f)" != "$(cat $f.sum)" ]; then echo "memory of round $((n-8)) differs" >>/load/bad; fi
  head -c 1048576 /dev/urandom >$f; md5sum <$f >$f.sum; echo >>/load/remembered
done) </dev/null >/dev/null 2>&1 &"#;

/// Words of a kernel that has found somebody standing still, or worse.
const COMPLAINTS: &str =
    "rcu.*stall|soft lockup|hard LOCKUP|hung_task|blocked for more than|BUG:|Oops|clocksource.*unstable|I/O error";

/// How much of the load is done.
fn done(guest: &LinuxVm, what: &str) -> Result<u64> {
    Ok(guest.shell(&format!("wc -l </load/{what}"))?.trim().parse()?)
}

/// The load that counts in `what` goes on.
pub fn goes_on(guest: &LinuxVm, what: &str) -> Result<()> {
    let before = done(guest, what)?;
    wait(&format!("the load stands still: {what}"), LIMIT, || {
        Ok((done(guest, what)? > before).then_some(()))
    })
}

/// That of the disk goes on.
pub fn works(guest: &LinuxVm) -> Result<()> {
    goes_on(guest, "good")
}

/// Ends the load: nothing went wrong.
pub fn ends(guest: &LinuxVm) -> Result<()> {
    let bad = guest.shell("touch /load/stop; cat /load/bad 2>/dev/null || true")?;
    ensure!(bad.trim().is_empty(), "{bad}");
    Ok(())
}

/// Seconds that have passed for the guest since its start.
pub fn uptime(guest: &LinuxVm) -> Result<f64> {
    let text = guest.shell("cut -d' ' -f1 /proc/uptime")?;
    text.trim().parse().with_context(|| text)
}

/// What the kernel complained about so far: an emulated host may be slow before anything is done to its guest.
pub fn complaints(guest: &LinuxVm) -> Result<String> {
    guest.shell(&format!("dmesg | grep -E '{COMPLAINTS}' || true"))
}
