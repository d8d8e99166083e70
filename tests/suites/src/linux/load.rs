//! Work that a guest does all the while, and what its kernel thinks of it: scripts count in `/load` what went well, and write down in
//! `/load/bad` what did not; or every byte of a disk is known.

use anyhow::{Context as _, Result, bail, ensure};
use std::time::Duration;
use triarch_guest_init::soak;
use triarch_harness::agent::{Exec, Running};
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

/// Has a program work on the disk that knows every byte of it, again and again: [`Load`], without anybody who waits for it.
pub fn soak() -> String {
    format!(
        r#"mkdir -p /load; : >/load/good
(n=0; while [ ! -e /load/stop ]; do
  n=$((n+1)); if /init disk-soak /dev/vda {TABLE} {THREADS} {BLOCKS} 2000 $n >/load/soak 2>&1; then echo >>/load/good
  else cat /load/soak >>/load/bad; break; fi
done; echo >/load/soaked) </dev/null >/dev/null 2>&1 &"#
    )
}

/// What [`soak`] has written how often, once it has ended; [`ends`] was called before.
pub fn soaked(guest: &LinuxVm) -> Result<Vec<u8>> {
    wait("the load on the disk does not end", LIMIT, || {
        let ended = guest.shell("cat /load/soaked 2>/dev/null || echo no")?;
        Ok((ended.trim() != "no").then_some(()))
    })?;
    ends(guest)?;
    Ok(guest.agent().get(TABLE)?)
}

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

/// Where the guest keeps what a load on a disk has written how often.
pub const TABLE: &str = "/tmp/soak.table";
/// Requests in flight, and blocks that it works on.
const THREADS: u32 = 16;
const BLOCKS: u32 = 1024;
/// Bytes of a disk that it works on, from its start.
pub const BYTES: usize = BLOCKS as usize * soak::BLOCK;

/// Load on a disk, in the guest.
pub struct Load<'a> {
    running: Running<'a>,
    said: String,
}

impl<'a> Load<'a> {
    /// Starts one that lasts `time` and then compares; it runs when this returns.
    pub fn start(guest: &'a LinuxVm, disk: &str, time: Duration, seed: u64) -> Result<Self> {
        let numbers = [THREADS.into(), BLOCKS.into(), time.as_millis() as u64, seed];
        let words = ["/init", "disk-soak", disk, TABLE].map(str::to_owned);
        let words = words.into_iter().chain(numbers.map(|number| number.to_string()));
        let running = guest.agent().start(&Exec::new(words))?;
        let mut load = Self {
            running,
            said: String::new(),
        };
        while !load.said.contains("soaking\n") {
            match load.running.next_output()? {
                Some(data) => load.said += &String::from_utf8_lossy(&data),
                None => bail!("the load ended: {}", load.said),
            }
        }
        Ok(load)
    }

    /// Waits for its end; gives the longest time without any answer.
    pub fn end(self) -> Result<Duration> {
        let mut said = self.said;
        let exit = self.running.wait(|_, data| said += &String::from_utf8_lossy(data))?;
        ensure!(exit.code == Some(0), "{said}");
        let stall = said.split_once("stall_us=").context("no figures")?.1.trim();
        Ok(Duration::from_micros(stall.parse()?))
    }
}

/// Compares all that was ever written by loads with this table to a disk with what the disk holds.
pub fn compare(disk: &[u8], table: &[u8]) -> Result<()> {
    let written = soak::compare(disk, table).context("the host finds something else on the disk")?;
    ensure!(written > 0, "nothing was written");
    Ok(())
}
