//! Disks and network interfaces come and go under a stock kernel.

use super::load::{self, LIMIT};
use crate::soak::{Soak, Times};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};
use triarch_harness::api::Api;
use triarch_harness::disk::{DiskImage, pattern};
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::net;
use triarch_harness::suite::{Context, Outcome, Test, figure, rounds};

pub const TESTS: &[Test] = &[
    Test::nested("plug::disks_come_and_go_under_linux_6_1", |c| disks(c, Kernel::V6_1))
        .within(Duration::from_secs(300))
        .soak(),
    Test::nested("plug::disks_come_and_go_under_linux_6_12", |c| disks(c, Kernel::V6_12))
        .within(Duration::from_secs(300))
        .soak(),
    Test::nested("plug::interfaces_come_and_go_under_linux_6_1", |c| {
        interfaces(c, Kernel::V6_1)
    })
    .within(Duration::from_secs(300)),
    Test::nested("plug::interfaces_come_and_go_under_linux_6_12", |c| {
        interfaces(c, Kernel::V6_12)
    })
    .within(Duration::from_secs(300)),
];

const SIZE: usize = 256 << 10;
const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 249, 1);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const GUEST: &str = "192.168.249.2";

/// Writes to the first disk and reads it back again and again.
pub(super) const LOAD: &str = r#"mkdir /load; head -c 65536 /dev/urandom >/load/data; want=$(md5sum </load/data)
(while [ ! -e /load/stop ]; do
  dd if=/load/data of=/dev/vda bs=4096 conv=fsync 2>/dev/null
  if [ "$(dd if=/dev/vda bs=4096 count=16 iflag=direct 2>/dev/null | md5sum)" = "$want" ]; then echo >>/load/good
  else echo >>/load/bad; fi
done) </dev/null >/dev/null 2>&1 &"#;

/// A Linux guest that gets devices.
pub(super) struct Subject {
    pub(super) guest: LinuxVm,
    api: Api,
    /// How long a step may take.
    limit: Duration,
}

impl Subject {
    pub(super) fn boot(builder: LinuxBuilder) -> Result<Self> {
        let guest = builder.vm(|vm| vm.api()).boot()?;
        // A device of the host's has all of the guest's memory locked first.
        let api = guest.vm().api()?.within(LIMIT);
        let limit = LIMIT;
        Ok(Self { guest, api, limit })
    }

    /// The same, of which no step takes longer than `limit`: that the guest hangs is seen sooner.
    pub(super) fn within(self, limit: Duration) -> Self {
        let guest = self.guest.within(limit);
        Self { guest, limit, ..self }
    }

    /// Adds a device; returns its place on the bus, which `file` in the guest leads to.
    pub(super) fn add(&self, route: &str, body: &Value, file: &str) -> Result<String> {
        let answer = self.api.request("PUT", route, Some(&body.to_string()))?;
        ensure!(answer.status == 200, "{} {}", answer.status, answer.body);
        let added: Value = serde_json::from_str(&answer.body)?;
        let bdf = added["bdf"].as_str().context("no bdf")?.to_owned();
        let script = format!("for i in $(seq 600); do [ -e {file} ] && break; usleep 100000; done; readlink -f {file}");
        let link = self.guest.shell(&script)?;
        ensure!(link.contains(&format!("/{bdf}/")), "{bdf}: {link}\n{}", self.dmesg()?);
        Ok(bdf)
    }

    /// Removes a device which `file` in the guest shows.
    pub(super) fn remove(&self, id: &str, bdf: &str, file: &str) -> Result<()> {
        self.api
            .put("vm.remove-device", Some(&json!({ "id": id }).to_string()))?;
        let done = format!("the guest gave back '{id}'");
        let dmesg = || self.dmesg().unwrap_or_default();
        self.api
            .is_done("vm.remove-device", self.limit, &done)
            .with_context(dmesg)?;
        let left = self
            .guest
            .shell(&format!("ls -d {file} /sys/bus/pci/devices/{bdf} 2>/dev/null || true"))?;
        ensure!(left.trim().is_empty(), "{left}");
        let info = self.api.get("vm.info")?;
        ensure!(!info.to_string().contains(&format!("\"{id}\"")), "{info}");
        Ok(())
    }

    fn dmesg(&self) -> Result<String> {
        self.guest.shell("dmesg | tail -n 25")
    }

    /// Nothing went wrong, and the guest ends.
    pub(super) fn end(self) -> Result<Outcome> {
        let bad = "dmesg | grep -e 'ACPI.*Error' -e 'Call Trace' -e 'BUG' || true";
        let bad = self.guest.shell(bad)?;
        ensure!(bad.trim().is_empty(), "{bad}");
        self.guest.power_off()?;
        Ok(Outcome::Passed)
    }
}

fn disks(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let image = |name: &str, seed| DiskImage::with(context.dir.join(name), &pattern(seed, SIZE));
    let (first, second) = (image("first", 1)?, image("second", 2)?);
    let builder = LinuxBuilder::new(context, kernel)?;
    let mut s = Subject::boot(builder.vm(|vm| vm.disk(first.path(), "id=first")))?;
    s.guest.shell("[ -e /sys/block/vda ] && [ ! -e /sys/block/vdb ]")?;
    s.guest.shell(LOAD)?;
    for round in 0..2 {
        let body = json!({ "id": "second", "path": second.path() });
        let bdf = s.add("vm.add-disk", &body, "/sys/block/vdb")?;
        ensure!(
            s.guest.agent().get("/dev/vdb")? == pattern(2 + round, SIZE),
            "other content"
        );
        s.guest.agent().put("/tmp/fresh", 0o600, &pattern(3 + round, SIZE))?;
        s.guest.shell("dd if=/tmp/fresh of=/dev/vdb bs=64k conv=fsync")?;
        s.remove("second", &bdf, "/sys/block/vdb")?;
        ensure!(second.read(0, SIZE)? == pattern(3 + round, SIZE), "lost");
        load::works(&s.guest)?;
    }
    many_rounds(&mut s, &second)?;
    // While somebody reads it.
    let body = json!({ "id": "second", "path": second.path() });
    let bdf = s.add("vm.add-disk", &body, "/sys/block/vdb")?;
    s.guest
        .shell("(while dd if=/dev/vdb of=/dev/null bs=4k iflag=direct; do :; done) </dev/null >/dev/null 2>&1 &")?;
    s.remove("second", &bdf, "/sys/block/vdb")?;
    load::works(&s.guest)?;
    load::ends(&s.guest)?;
    s.guest.shell("while [ -n \"$(pidof dd)\" ]; do usleep 10000; done")?;
    // The one it booted with goes as well.
    s.remove("first", "0000:00:01.0", "/sys/block/vda")?;
    s.end()
}

/// A disk comes and goes again and again, while another one works.
fn many_rounds(s: &mut Subject, disk: &DiskImage) -> Result<()> {
    const FILE: &str = "/sys/block/vdb";
    let soak = Soak {
        rounds: rounds(2),
        settles: 1,
    };
    let (mut added, mut removed) = (Times::default(), Times::default());
    let body = json!({ "id": "second", "path": disk.path() });
    let soaked = soak.run(
        s,
        |s| s.guest.vm(),
        |s, _| {
            let begin = Instant::now();
            let bdf = s.add("vm.add-disk", &body, FILE)?;
            added.since(begin);
            let begin = Instant::now();
            s.remove("second", &bdf, FILE)?;
            removed.since(begin);
            Ok(())
        },
    )?;
    load::works(&s.guest)?;
    figure(&format!(
        "a disk under Linux: added {added}; removed {removed}; {soaked}"
    ))
}

fn interfaces(context: &Context, kernel: Kernel) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let s = Subject::boot(LinuxBuilder::new(context, kernel)?)?;
    s.guest.shell("[ ! -e /sys/class/net/eth0 ]")?;
    for round in 0..2 {
        let tap = format!("tap{round}");
        let body = json!({ "id": "nic", "tap": tap, "ip": HOST, "mask": MASK });
        let bdf = s.add("vm.add-net", &body, "/sys/class/net/eth0")?;
        ensure!(net::interfaces()?.contains(&tap), "no {tap}");
        s.guest.shell(&format!(
            "ip addr add {GUEST}/24 dev eth0; ip link set eth0 up; ping -c 3 -i 0.2 -W 20 {HOST}"
        ))?;
        s.remove("nic", &bdf, "/sys/class/net/eth0")?;
        ensure!(net::interfaces()? == ["lo"], "the tap was left");
    }
    s.end()
}
