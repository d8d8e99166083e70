//! NUMA nodes as a stock kernel sees them, and memory that comes to one of them.

use super::load::LIMIT;
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::images::Kernel;
use triarch_harness::jobs::wait;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[Test::nested("numa::linux_6_12_has_two_nodes_that_grow", |c| {
    two_nodes(c, Kernel::V6_12)
})
.within(Duration::from_secs(600))];

const MIB: u64 = 1 << 20;
/// Bytes of each zone at the start. Linux on x86 wants nodes to begin at a multiple of this.
const ZONE: u64 = 256 * MIB;
/// How often a guest is asked that stands still: on a busy host it takes longer than its job does.
const ASKED: u32 = 4;

struct Subject {
    guest: LinuxVm,
    api: Api,
}

impl Subject {
    /// A file of a node in sysfs.
    fn node(&self, node: u32, file: &str) -> Result<String> {
        let text = self
            .guest
            .shell(&format!("cat /sys/devices/system/node/node{node}/{file}"))?;
        Ok(text.split_whitespace().collect::<Vec<_>>().join(" "))
    }

    /// Bytes of memory that the kernel has in `node`.
    fn total(&self, node: u32) -> Result<u64> {
        let text = self.node(node, "meminfo")?;
        let mut words = text.split(' ').skip_while(|word| *word != "MemTotal:");
        let kib: u64 = words.nth(1).with_context(|| format!("no total in {text}"))?.parse()?;
        Ok(kib * 1024)
    }

    /// Has zone `id` get to `plugged` bytes more than it started with. A job may fail, if it says that the guest stands still: then the
    /// guest is asked once more.
    fn resize(&self, id: &str, plugged: u64) -> Result<()> {
        let target = json!({ "id": id, "desired_ram": ZONE + plugged }).to_string();
        let dmesg = || self.guest.shell("dmesg | tail -n 20").unwrap_or_default();
        for asked in 1..=ASKED {
            self.api.put("vm.resize-zone", Some(&target))?;
            let job = self.api.ended("vm.resize-zone", LIMIT).with_context(dmesg)?;
            if job["state"] == "done" {
                break;
            }
            let error = job["error"].as_str().unwrap_or_default();
            let stands = error.contains("has not moved for");
            ensure!(stands && asked < ASKED, "{job}; the guest: {}", dmesg());
        }
        Ok(())
    }

    /// Waits until the nodes have these many bytes.
    fn have(&self, wanted: [u64; 2]) -> Result<()> {
        let there = || Ok(([self.total(0)?, self.total(1)?] == wanted).then_some(()));
        wait("", LIMIT, there).with_context(|| {
            let has = [0, 1].map(|node| self.total(node).unwrap_or_default());
            let dmesg = self.guest.shell("dmesg | tail -n 20").unwrap_or_default();
            format!("the nodes have {has:?}, not {wanted:?}; the guest: {dmesg}")
        })
    }
}

fn two_nodes(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, kernel)?
        .cmdline("memhp_default_state=online_movable init_on_alloc=0")
        .vm(|vm| {
            vm.set("--memory", "size=0,hotplug_method=virtio-mem")
                .set("--cpus", "boot=2,max=3,topology=1:1:1:3")
                .flag("--memory-zone", "id=near,size=256M,hotplug_size=512M")
                .flag("--memory-zone", "id=far,size=256M,hotplug_size=512M,shared=on")
                .flag(
                    "--numa",
                    "guest_numa_id=0,cpus=[0],memory_zones=[near],distances=[1@21]",
                )
                .flag("--numa", "guest_numa_id=1,cpus=[1-2],memory_zones=[far]")
                .api()
        })
        .boot()?;
    let api = guest.vm().api()?.clone();
    let subject = Subject { guest, api };
    let nodes = subject.guest.shell("cat /sys/devices/system/node/online")?;
    let said = || {
        subject
            .guest
            .shell("dmesg | grep -i -e numa -e srat -e 'node '")
            .unwrap_or_default()
    };
    ensure!(nodes.trim() == "0-1", "{nodes}: {}", said());
    for (file, wanted) in [("cpulist", ["0", "1"]), ("distance", ["10 21", "21 10"])] {
        let told = [subject.node(0, file)?, subject.node(1, file)?];
        ensure!(told == wanted, "{file}: {told:?}, not {wanted:?}; {}", said());
    }
    let first = [subject.total(0)?, subject.total(1)?];
    // The kernel has some for itself.
    ensure!(first.iter().all(|bytes| (ZONE / 2..=ZONE).contains(bytes)), "{first:?}");
    // A vCPU that comes belongs to its node.
    subject
        .api
        .put("vm.resize", Some(&json!({ "desired_vcpus": 3 }).to_string()))?;
    let online = "at=/sys/devices/system/cpu/cpu2/online
        for i in $(seq 300); do [ -e $at ] && break; usleep 100000; done; echo 1 >$at";
    subject.guest.shell(online)?;
    subject.api.is_done("vm.resize", LIMIT, "the guest started vCPU 2")?;
    let cpus = subject.node(1, "cpulist")?;
    ensure!(cpus == "1-2", "{cpus}");
    // Memory comes to the node of its zone, and goes from there.
    subject.guest.shell("/init load virtio_mem")?;
    subject.resize("far", 256 * MIB)?;
    subject.have([first[0], first[1] + 256 * MIB])?;
    subject.resize("near", 128 * MIB)?;
    subject.have([first[0] + 128 * MIB, first[1] + 256 * MIB])?;
    subject.resize("far", 0)?;
    subject.have([first[0] + 128 * MIB, first[1]])?;
    subject.resize("near", 0)?;
    subject.have(first)?;
    let bad = subject.guest.shell(
        "dmesg | grep -i -e 'rejecting NUMA' -e 'not on the same node' -e 'virtio_mem.*\\(error\\|fail\\)' || true",
    )?;
    ensure!(bad.trim().is_empty(), "{bad}");
    subject.guest.power_off()?;
    Ok(Outcome::Passed)
}
