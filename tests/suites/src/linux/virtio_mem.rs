//! Memory comes and goes by virtio-mem under a stock kernel.

use super::load::{self, LIMIT};
use crate::soak::{Soak, Times};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::time::{Duration, Instant};
use triarch_harness::api::Api;
use triarch_harness::images::Kernel;
use triarch_harness::jobs::wait;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::suite::{Context, Outcome, Test, figure, rounds};

pub const TESTS: &[Test] = &[
    Test::nested("virtio_mem::linux_6_1_grows_and_shrinks", |c| {
        grows_and_shrinks(c, Kernel::V6_1)
    })
    .within(Duration::from_secs(600))
    .soak(),
    Test::nested("virtio_mem::linux_6_12_grows_and_shrinks", |c| {
        grows_and_shrinks(c, Kernel::V6_12)
    })
    .within(Duration::from_secs(600))
    .soak(),
];

const MIB: u64 = 1 << 20;
/// Bytes of RAM the guest starts with.
const RAM: u64 = 256 * MIB;
/// How often a guest is asked that stands still: what it cannot move just now, it may be able to move later, and on a busy host it takes
/// longer than its job does.
const ASKED: u32 = 4;

/// Work that goes on meanwhile: data that are summed, again and again.
const LOAD: &str = r#"mkdir /load; want=$(head -c 65536 /dev/zero | md5sum)
(while [ ! -e /load/stop ]; do
  if [ "$(head -c 65536 /dev/zero | md5sum)" = "$want" ]; then echo >>/load/good; else echo >>/load/bad; fi
  usleep 200000
done) </dev/null >/dev/null 2>&1 &"#;

struct Subject {
    guest: LinuxVm,
    api: Api,
    /// Bytes of memory its kernel has to begin with.
    first: u64,
}

impl Subject {
    /// Bytes of memory that the guest's kernel says it has.
    fn total(&self) -> Result<u64> {
        total(&self.guest)
    }

    /// Sets a target, and waits for the guest to be there. A job may fail, if it says that the guest stands still: then the guest is asked
    /// once more.
    fn reach(&self, plugged: u64) -> Result<()> {
        let target = json!({ "desired_ram": RAM + plugged }).to_string();
        let dmesg = || self.guest.shell("dmesg | tail -n 20").unwrap_or_default();
        for asked in 1..=ASKED {
            self.api.put("vm.resize", Some(&target))?;
            let job = self.api.ended("vm.resize", LIMIT).with_context(dmesg)?;
            if job["state"] == "done" {
                break;
            }
            let error = job["error"].as_str().unwrap_or_default();
            let stands = error.contains("has not moved for");
            ensure!(stands && asked < ASKED, "{job}; the guest: {}", dmesg());
        }
        let info = self.api.get("vm.info")?;
        ensure!(info["memory_actual_size"] == RAM + plugged, "{info}");
        // What its driver plugged, the guest brings online a moment later.
        let there = || Ok((self.total()? == self.first + plugged).then_some(()));
        wait("", LIMIT, there).with_context(|| {
            format!(
                "{:?} bytes, {} before, {plugged} plugged; the guest: {}",
                self.total(),
                self.first,
                dmesg()
            )
        })
    }
}

/// 128 MiB come and go again and again.
fn many_rounds(subject: &mut Subject) -> Result<()> {
    let soak = Soak {
        rounds: rounds(2),
        settles: 1,
    };
    let (mut grown, mut shrunk) = (Times::default(), Times::default());
    let soaked = soak.run(
        subject,
        |subject| subject.guest.vm(),
        |subject, _| {
            let begin = Instant::now();
            subject.reach(128 * MIB)?;
            grown.since(begin);
            let begin = Instant::now();
            subject.reach(0)?;
            shrunk.since(begin);
            Ok(())
        },
    )?;
    figure(&format!(
        "128 MiB of virtio-mem under Linux: grown {grown}; shrunk {shrunk}; {soaked}"
    ))
}

fn total(guest: &LinuxVm) -> Result<u64> {
    let line = guest.shell("grep MemTotal /proc/meminfo")?;
    let kib = line.split_whitespace().nth(1).context("no number")?;
    Ok(kib.parse::<u64>()? * 1024)
}

fn grows_and_shrinks(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, kernel)?
        // Without the second, Debian's kernels fill all that they give back with zeroes first, with interrupts off: half a minute for
        // 128 MiB of an emulated host's.
        .cmdline("memhp_default_state=online_movable init_on_alloc=0")
        .vm(|vm| {
            vm.set("--memory", "size=256M,hotplug_method=virtio-mem,hotplug_size=1G")
                .api()
        })
        .boot()?;
    let api = guest.vm().api()?.clone();
    let first = total(&guest)?;
    let mut subject = Subject { guest, api, first };
    subject.guest.shell("/init load virtio_mem")?;
    subject.guest.shell(LOAD)?;
    subject.reach(128 * MIB)?;
    subject.reach(384 * MIB)?;
    // The kernel puts what it can move into memory that came.
    let make = "mkdir -p /data; mount -t tmpfs none /data; dd if=/dev/urandom of=/data/1 bs=1M count=2 2>/dev/null
        for n in 2 3 4 5 6 7 8 9; do cp /data/1 /data/$n; done; md5sum /data/1 | cut -d' ' -f1";
    let sum = subject.guest.shell(make)?.trim().to_owned();
    let same = |subject: &Subject| -> Result<()> {
        let sums = subject.guest.shell("md5sum /data/* | cut -d' ' -f1 | sort -u")?;
        ensure!(sums.trim() == sum, "{sums}, not {sum}");
        Ok(())
    };
    subject.guest.shell("rm /data/1 /data/3 /data/5 /data/7")?;
    load::works(&subject.guest)?;
    subject.reach(64 * MIB)?;
    same(&subject)?;
    subject.reach(0)?;
    same(&subject)?;
    subject.reach(1024 * MIB)?;
    same(&subject)?;
    load::works(&subject.guest)?;
    load::ends(&subject.guest)?;
    subject.guest.shell("umount /data")?;
    subject.reach(0)?;
    many_rounds(&mut subject)?;
    let bad = subject
        .guest
        .shell("dmesg | grep -i -e 'virtio_mem.*\\(error\\|fail\\|unknown\\)' || true")?;
    ensure!(bad.trim().is_empty(), "{bad}");
    subject.guest.power_off()?;
    Ok(Outcome::Passed)
}
