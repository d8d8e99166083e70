//! Memory devices come and go under a stock kernel.

use super::load::LIMIT;
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
    Test::nested("dimms::memory_comes_and_goes_under_linux_6_1", |c| {
        come_and_go(c, Kernel::V6_1)
    })
    .within(Duration::from_secs(600))
    .soak(),
    Test::nested("dimms::memory_comes_and_goes_under_linux_6_12", |c| {
        come_and_go(c, Kernel::V6_12)
    })
    .within(Duration::from_secs(600))
    .soak(),
];

const MIB: u64 = 1 << 20;
/// What the guest starts with.
const BOOT: u64 = 256 * MIB;
/// Memory comes in multiples of it.
const BLOCK: u64 = 128 * MIB;

/// A Linux guest whose memory comes and goes.
struct Subject {
    guest: LinuxVm,
    api: Api,
}

impl Subject {
    /// Asks for so many blocks beyond what the guest started with; this must come of it. On a busy host a guest may take longer than its
    /// job waits, and does what it was asked for all the same.
    fn resize(&self, blocks: u64, phase: &str) -> Result<()> {
        let target = json!({ "desired_ram": BOOT + blocks * BLOCK }).to_string();
        self.api.put("vm.resize", Some(&target))?;
        let dmesg = || self.guest.shell("dmesg | tail -n 20").unwrap_or_default();
        let job = self.api.ended("vm.resize", LIMIT).with_context(dmesg)?;
        let late = job["error"].as_str().is_some_and(|error| error.contains("within 30 s"));
        ensure!(late || job["phase"] == phase, "{job}, not {phase}: {}", dmesg());
        let wanted = Some(BOOT + blocks * BLOCK);
        wait("", LIMIT, || {
            let info = self.api.get("vm.info")?;
            let counts = ["target", "present", "taken"].map(|name| info["memory"][name].as_u64());
            let same = counts == [wanted; 3] && info["memory_actual_size"].as_u64() == wanted;
            ensure!(same || late, "{info}");
            Ok(same.then_some(()))
        })
        .with_context(|| format!("{job}, and no more came of it: {}", dmesg()))
    }

    /// Bytes of memory that the guest's kernel says it has.
    fn total(&self) -> Result<u64> {
        let line = self.guest.shell("grep MemTotal /proc/meminfo")?;
        let kib = line.split_whitespace().nth(1).context("no number")?;
        Ok(kib.parse::<u64>()? * 1024)
    }

    /// Brings what came online so that it can go again, as an agent or udev does in a distribution.
    fn bring_online(&self) -> Result<()> {
        self.guest
            .shell("cd /sys/devices/system/memory; for f in memory*/state; do grep -q offline $f && echo online_movable >$f; done; true")?;
        Ok(())
    }

    /// The guest fills files of `mib` MiB, whose pages are mostly in the memory that came, and finds in them what it wrote.
    fn works(&self, mib: u64) -> Result<()> {
        let free = "awk '/zone +Movable/ {found=1} found && /pages free/ {print $3; exit}' /proc/zoneinfo";
        let script = format!(
            "mkdir -p /more; mount -t tmpfs none /more; {free}; head -c {MIB} /dev/urandom >/more/1
            for n in $(seq 2 {mib}); do cp /more/1 /more/$n; done; {free}
            for n in 2 {} {mib}; do cmp /more/1 /more/$n; done; umount /more",
            mib / 2
        );
        let shown = self.guest.shell(&script)?;
        let pages: Result<Vec<u64>, _> = shown.split_whitespace().map(str::parse).collect();
        let pages = pages.with_context(|| shown.clone())?;
        let [before, after] = pages[..] else {
            anyhow::bail!("no two numbers: {shown}");
        };
        let used = before.saturating_sub(after) * 4096;
        ensure!(
            used > mib * MIB / 2,
            "only {used} bytes of {mib} MiB are in the memory that came"
        );
        Ok(())
    }
}

/// A memory device comes and goes again and again.
fn many_rounds(subject: &mut Subject) -> Result<()> {
    let soak = Soak {
        rounds: rounds(2),
        settles: 1,
    };
    let (mut added, mut removed) = (Times::default(), Times::default());
    let soaked = soak.run(
        subject,
        |subject| subject.guest.vm(),
        |subject, _| {
            let begin = Instant::now();
            subject.resize(1, "the guest took 128 MiB")?;
            subject.bring_online()?;
            added.since(begin);
            let begin = Instant::now();
            subject.resize(0, "the guest gave back 128 MiB")?;
            removed.since(begin);
            Ok(())
        },
    )?;
    figure(&format!(
        "a memory device of 128 MiB under Linux: added {added}; removed {removed}; {soaked}"
    ))
}

fn come_and_go(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let memory = format!("size={}M,hotplug_size=1G", BOOT / MIB);
    // Debian's 6.12 brings memory online by itself on x86, and then for all purposes: it could not be given back.
    let online = match kernel {
        Kernel::V6_1 => "",
        Kernel::V6_12 => "memhp_default_state=online_movable",
    };
    let guest = LinuxBuilder::new(context, kernel)?
        .cmdline(online)
        .vm(|vm| vm.set("--memory", memory).api())
        .boot()?;
    let api = guest.vm().api()?.clone();
    let subject = Subject { guest, api };
    let all = subject.total()?;
    // The kernel's own book of the pages is part of what comes.
    let has = |blocks: u64| -> Result<()> {
        let more = subject.total()?.saturating_sub(all);
        let wanted = blocks * BLOCK;
        ensure!(
            (wanted * 96 / 100..=wanted).contains(&more),
            "the guest has {more} bytes more, not {wanted}"
        );
        Ok(())
    };
    subject.resize(1, "the guest took 128 MiB")?;
    subject.bring_online()?;
    has(1)?;
    subject.works(24)?;
    subject.resize(3, "the guest took 256 MiB")?;
    subject.bring_online()?;
    has(3)?;
    subject.works(48)?;
    subject.resize(1, "the guest gave back 256 MiB")?;
    has(1)?;
    subject.works(24)?;
    subject.resize(0, "the guest gave back 128 MiB")?;
    has(0)?;
    let bad = subject
        .guest
        .shell("dmesg | grep -e 'ACPI.*Error' -e 'Unable to' || true")?;
    ensure!(bad.trim().is_empty(), "{bad}");

    // What it has when it starts again, it finds by itself.
    subject.resize(2, "the guest took 256 MiB")?;
    let Subject { guest, api } = subject;
    let mut subject = Subject {
        guest: guest.reboot()?,
        api,
    };
    subject.bring_online()?;
    let more = subject.total()?.saturating_sub(all);
    ensure!(
        (2 * BLOCK * 96 / 100..=2 * BLOCK).contains(&more),
        "after the reset {more} bytes more"
    );
    subject.works(24)?;
    subject.resize(0, "the guest gave back 256 MiB")?;
    many_rounds(&mut subject)?;
    subject.guest.power_off()?;
    Ok(Outcome::Passed)
}
