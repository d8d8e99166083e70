//! vCPUs come and go under a stock kernel.

use super::load::{self, LIMIT};
use crate::soak::Soak;
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::suite::{Context, Outcome, Test, figure, rounds};

/// On ARM kernels can do it from 6.11 on.
pub const TESTS: &[Test] = &[
    Test::nested("hotplug::vcpus_come_and_go_under_linux_6_1", |c| match is_arm() {
        true => Ok(Outcome::Skipped("ARM kernels can add CPUs from 6.11 on".into())),
        false => come_and_go(c, Kernel::V6_1),
    })
    .within(Duration::from_secs(600)),
    Test::nested("hotplug::vcpus_come_and_go_under_linux_6_12", |c| {
        come_and_go(c, Kernel::V6_12)
    })
    .within(Duration::from_secs(600))
    .soak(),
    Test::nested("hotplug::a_kernel_that_cannot_is_told_of", |c| match is_arm() {
        true => cannot(c),
        false => Ok(Outcome::Skipped("x86 kernels can all add CPUs".into())),
    })
    .within(Duration::from_secs(240)),
];

fn is_arm() -> bool {
    std::env::consts::ARCH == "aarch64"
}

/// Work that needs all of the machine: processes that come, compute, are compared, and go.
const LOAD: &str = r#"mkdir /load; want=$(head -c 65536 /dev/zero | md5sum)
for n in 1 2 3 4; do
  (while [ ! -e /load/stop ]; do
    if [ "$(head -c 65536 /dev/zero | md5sum)" = "$want" ]; then echo >>/load/good; else echo >>/load/bad; fi
  done) </dev/null >/dev/null 2>&1 &
done"#;

/// A Linux guest whose vCPUs come and go.
struct Subject {
    guest: LinuxVm,
    api: Api,
}

impl Subject {
    fn boot(context: &Context, kernel: Kernel, cpus: &str, cmdline: &str) -> Result<Self> {
        let guest = LinuxBuilder::new(context, kernel)?
            .cmdline(cmdline)
            .vm(|vm| vm.set("--cpus", cpus).api())
            .boot()?;
        let api = guest.vm().api()?.clone();
        Ok(Self { guest, api })
    }

    fn resize(&self, vcpus: u32) -> Result<()> {
        let target = json!({ "desired_vcpus": vcpus }).to_string();
        self.api.put("vm.resize", Some(&target))?;
        Ok(())
    }

    /// The last resize went well, and this came of it.
    fn done(&self, phase: &str) -> Result<()> {
        let dmesg = || self.guest.shell("dmesg | tail -n 20").unwrap_or_default();
        self.api.is_done("vm.resize", LIMIT, phase).with_context(dmesg)
    }

    /// So many CPUs are online in the guest, the first ones, and each runs something; `vm.info` says the same.
    fn has(&self, cpus: u32) -> Result<()> {
        let online = self.guest.shell("cat /sys/devices/system/cpu/online")?;
        let wanted = match cpus {
            1 => "0".to_owned(),
            _ => format!("0-{}", cpus - 1),
        };
        ensure!(online.trim() == wanted, "{online}, not {wanted}");
        let run = format!(
            "for n in $(seq 0 {}); do taskset -c $n sh -c 'echo $0' $n; done; grep -c ^processor /proc/cpuinfo",
            cpus - 1
        );
        let ran = self.guest.shell(&run)?;
        let wanted = (0..=cpus).map(|n| n.to_string());
        ensure!(ran.split_whitespace().eq(wanted), "{ran}");
        let vcpus = &self.api.get("vm.info")?["vcpus"];
        let counts = ["target", "present", "started"].map(|name| vcpus[name].as_u64());
        ensure!(counts == [Some(cpus.into()); 3], "{vcpus}");
        Ok(())
    }

    /// Brings CPUs from `first` to `last` online, as udev does in a distribution.
    fn bring_online(&self, first: u32, last: u32) -> Result<()> {
        let script = format!(
            "for n in $(seq {first} {last}); do at=/sys/devices/system/cpu/cpu$n/online
            for i in $(seq 300); do [ -e $at ] && break; usleep 100000; done; echo 1 >$at; done"
        );
        self.guest.shell(&script)?;
        Ok(())
    }

    /// One vCPU comes and goes again and again.
    fn many_rounds(&mut self) -> Result<()> {
        self.guest.shell("dmesg -c >/dev/null")?;
        let soak = Soak {
            rounds: rounds(2),
            settles: 1,
        };
        let last = soak.rounds.saturating_sub(1);
        let soaked = soak.run(
            self,
            |subject| subject.guest.vm(),
            |subject, round| {
                subject.resize(2)?;
                subject.bring_online(1, 1)?;
                subject.done("the guest started vCPU 1")?;
                if round % 50 == 49 || round == last {
                    subject.has(2)?;
                }
                subject.resize(1)?;
                subject.done("the guest gave back vCPU 1")
            },
        )?;
        self.has(1)?;
        let complaints = self
            .guest
            .shell("dmesg | grep -e 'ACPI.*Error' -e 'cut here' || true")?;
        ensure!(complaints.trim().is_empty(), "{complaints}");
        figure(&format!("a vCPU under Linux: {soaked}"))
    }
}

fn come_and_go(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let mut subject = Subject::boot(context, kernel, "boot=1,max=4", "")?;
    subject.guest.shell(LOAD)?;
    subject.has(1)?;
    for (from, to) in [(1, 4), (4, 2), (2, 3), (3, 1)] {
        subject.resize(to)?;
        let list = |first: u32, last: u32| {
            let numbers: Vec<_> = (first..=last).map(|n| n.to_string()).collect();
            format!("vCPU{} {}", if first == last { "" } else { "s" }, numbers.join(", "))
        };
        if from < to {
            subject.bring_online(from, to - 1)?;
            subject.done(&format!("the guest started {}", list(from, to - 1)))?;
        } else {
            subject.done(&format!("the guest gave back {}", list(to, from - 1)))?;
        }
        subject.has(to).with_context(|| format!("from {from} to {to}"))?;
        load::works(&subject.guest).with_context(|| format!("from {from} to {to}"))?;
    }
    load::ends(&subject.guest)?;
    let bad = subject.guest.shell("dmesg | grep -e 'ACPI.*Error' || true")?;
    ensure!(bad.trim().is_empty(), "{bad}");
    if kernel == Kernel::V6_12 {
        subject.many_rounds()?;
    }
    subject.guest.power_off()?;
    Ok(Outcome::Passed)
}

/// A kernel before 6.11 on ARM: its job tells what is missing, nothing changes, and another way to have fewer CPUs is left.
fn cannot(context: &Context) -> Result<Outcome> {
    let subject = Subject::boot(context, Kernel::V6_1, "boot=1,max=2", "")?;
    subject.resize(2)?;
    subject.api.has_failed("vm.resize", LIMIT, &["version 6.11"])?;
    let online = subject.guest.shell("cat /sys/devices/system/cpu/online")?;
    ensure!(
        online.trim() == "0" && subject.api.get("vm.info")?["vcpus"]["started"] == 1,
        "{online}"
    );
    subject.guest.power_off()?;

    let subject = Subject::boot(context, Kernel::V6_1, "boot=2,max=2", "maxcpus=1")?;
    let online = || subject.guest.shell("cat /sys/devices/system/cpu/online");
    ensure!(online()?.trim() == "0");
    subject.bring_online(1, 1)?;
    subject.has(2)?;
    subject.guest.shell("echo 0 >/sys/devices/system/cpu/cpu1/online")?;
    ensure!(online()?.trim() == "0");
    subject.guest.power_off()?;
    Ok(Outcome::Passed)
}
