//! Devices of the host come and go under a stock kernel, and memory that comes is theirs as well.

use super::load::{self, LIMIT};
use super::lost::Faults;
use super::plug::{LOAD, Subject};
use super::vfio::{LONG, NVME, guest_with, with};
use crate::soak::{Soak, Times};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::cell::Cell;
use std::time::{Duration, Instant};
use triarch_harness::disk::{DiskImage, pattern};
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, PANICS};
use triarch_harness::pci::Function;
use triarch_harness::suite::{Context, Outcome, Test, figure, rounds};

pub const TESTS: &[Test] = &[
    Test::nested("vfio::nvme_comes_and_goes_under_linux_6_1", |c| {
        come_and_go(c, Kernel::V6_1)
    })
    .within(MANY)
    .soak(),
    Test::nested("vfio::nvme_comes_and_goes_under_linux_6_12", |c| {
        come_and_go(c, Kernel::V6_12)
    })
    .within(MANY)
    .soak(),
    Test::nested("vfio::nvme_reaches_memory_that_came", memory_that_came).within(LONG),
];

/// How long all rounds may take, and some guests that the host loses.
const MANY: Duration = Duration::from_secs(900);
/// The guest's only NVMe disk.
const FILE: &str = "/sys/block/nvme*n1";
/// How often it comes and goes: often enough that what happens once in some dozen times happens.
const ROUNDS: u32 = 50;
/// The first rounds, which make what is kept.
const SETTLES: u32 = 2;
/// Bytes that are written to it and read.
const SIZE: usize = 1 << 20;

/// Reads the disk until it is gone.
const READ: &str = "(while dd if=$(ls /dev/nvme*n1) of=/dev/null bs=4k count=64 iflag=direct; do :; done) </dev/null >/dev/null 2>&1 &";

/// How long one step of a round may take: a disk is there after two seconds and gone after one.
const STEP: Duration = Duration::from_secs(30);

fn come_and_go(context: &Context, kernel: Kernel) -> Result<Outcome> {
    with(context, &[NVME], |functions| {
        let function = &functions[0];
        let other = DiskImage::with(context.dir.join("other"), &pattern(1, SIZE))?;
        let boot = || -> Result<Subject> {
            let builder = LinuxBuilder::new(context, kernel)?.cmdline(PANICS);
            let s = Subject::boot(builder.vm(|vm| vm.disk(other.path(), "id=other")))?;
            s.guest.shell(LOAD)?;
            // Each round takes another part of it: to bring all of that into the guest takes longer than the disk does.
            s.guest.agent().put("/tmp/data", 0o600, &pattern(2, 2 * SIZE))?;
            Ok(s.within(STEP))
        };
        let mut s = boot()?;
        let rounds = rounds(ROUNDS);
        let (mut faults, done) = (Faults::in_rounds(rounds), Cell::new(0));
        let mut times = [(); 3].map(|()| Times::default());
        let soaked = loop {
            // A guest that takes the place of a lost one settles as well.
            let soak = Soak {
                rounds: rounds.saturating_sub(done.get()).max(SETTLES + 1),
                settles: SETTLES,
            };
            let round = |s: &mut Subject, _| {
                round(s, function, done.get(), &mut times)?;
                done.set(done.get() + 1);
                Ok(())
            };
            match soak.run(&mut s, |s| s.guest.vm(), round) {
                Ok(soaked) => break soaked,
                Err(error) => faults.forgive(&s.guest, error)?,
            }
            // Its VMM ends, which gives the disk back, before there is another one.
            drop(s);
            s = boot()?;
        };
        load::works(&s.guest)?;
        load::ends(&s.guest)?;
        let [added, used, removed] = times;
        figure(&format!(
            "a disk of the host under Linux: added {added}; used {used}; removed {removed}; {soaked}"
        ))?;
        // The host has it back, with what the guest wrote.
        let disk = function.disk()?;
        ensure!(disk.exists(), "{}", disk.display());
        s.end().map(drop)
    })
}

/// The disk comes, is used and goes.
fn round(s: &Subject, function: &Function, number: u32, [added, used, removed]: &mut [Times; 3]) -> Result<()> {
    let begin = Instant::now();
    let bdf = s.add("vm.add-device", &body(function), FILE).context("it comes")?;
    added.since(begin);
    let begin = Instant::now();
    write_and_read(s, number).context("it is used")?;
    used.since(begin);
    let begin = Instant::now();
    s.remove("spare", &bdf, FILE).context("it goes")?;
    removed.since(begin);
    ensure!(function.driver().as_deref() == Some("vfio-pci"), "{function:?}");
    Ok(())
}

fn body(function: &Function) -> serde_json::Value {
    json!({ "id": "spare", "path": function.path() })
}

/// The guest writes to the disk, other data than in the last rounds, and reads the same, and goes on reading.
fn write_and_read(s: &Subject, round: u32) -> Result<()> {
    let script = format!(
        "dd if=/tmp/data of=/tmp/fresh bs=64k skip={} count=16
        for i in $(seq 100); do [ -b $(ls /dev/nvme*n1) ] && break; usleep 100000; done; disk=$(ls /dev/nvme*n1)
        dd if=/tmp/fresh of=$disk bs=64k oflag=direct
        dd if=$disk bs=64k count=16 iflag=direct | cmp - /tmp/fresh
        {READ}",
        round % 16
    );
    s.guest.shell(&script).map(drop)
}

/// What the disk is told to write to lies in memory that the guest got while it had the disk, or the disk while it had that memory.
fn memory_that_came(context: &Context) -> Result<Outcome> {
    const MIB: u64 = 1 << 20;
    /// What is read at once.
    const AT_ONCE: u64 = 32 * MIB;
    with(context, &[NVME], |functions| {
        let guest = guest_with(context, Kernel::V6_1, functions)?
            .vm(|vm| vm.set("--memory", "size=256M,hotplug_size=1G"))
            .boot()?;
        let api = guest.vm().api()?.clone();
        let resize = |mib: u64| -> Result<()> {
            let target = json!({ "desired_ram": mib * MIB }).to_string();
            api.put("vm.resize", Some(&target))?;
            let dmesg = || guest.shell("dmesg | tail -n 20").unwrap_or_default();
            let job = api.ended("vm.resize", LIMIT).with_context(dmesg)?;
            ensure!(job["state"] == "done", "{job}: {}", dmesg());
            guest
                .shell("cd /sys/devices/system/memory; for f in memory*/state; do grep -q offline $f && echo online_movable >$f; done; true")
                .map(drop)
        };
        resize(512)?;
        // The disk writes to memory of a program, which the kernel takes from what is movable first: that is what came.
        guest.shell(&format!(
            "{WAIT}; disk=$(ls /dev/nvme*n1); free() {{ awk '/zone +Movable/ {{f=1}} f && /pages free/ {{print $3; exit}}' /proc/zoneinfo; }}
            head -c {AT_ONCE} /dev/urandom >/tmp/data; dd if=/tmp/data of=$disk bs=64k oflag=direct; before=$(free)
            dd if=$disk bs={AT_ONCE} count=1 iflag=direct | {{
                dd bs=4k count=1 of=/tmp/first; free >/tmp/during; cat /tmp/first - | cmp - /tmp/data || touch /tmp/differs; }}
            [ ! -e /tmp/differs ]; taken=$((before-$(cat /tmp/during))); echo $taken; [ $taken -gt {} ]",
            AT_ONCE / 4096 * 3 / 4
        ))?;
        resize(256)?;
        guest.shell("dd if=$(ls /dev/nvme*n1) bs=64k count=512 iflag=direct | cmp - /tmp/data")?;
        guest.power_off()?;
        Ok(())
    })
}

/// Waits for the disk.
const WAIT: &str = "for i in $(seq 600); do ls /dev/nvme*n1 && break; usleep 100000; done";
