//! Stock guests that keep their devices from memory: our own ones, and those of the host.

use super::load::{self, LIMIT, Load};
use super::vfio::{LONG, NVME, disks, on_host, reset_at_once, with};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use std::fs;
use std::time::Duration;
use triarch_harness::disk::DiskImage;
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[Test::nested("iommu::linux_isolates_its_disks", isolates).within(LONG)];

const MIB: u64 = 1 << 20;
/// What the guest has.
const MEMORY: u64 = 512 * MIB;
/// How long there is load.
const ROUND: Duration = Duration::from_millis(1000);

/// Bytes of the guest that devices of the host reach.
fn reached(guest: &LinuxVm) -> Result<u64> {
    let metrics = guest.vm().api()?.request("GET", "metrics", None)?.body;
    let mut lines = metrics.lines();
    let value = lines.find_map(|line| line.strip_prefix("triarch_passthrough_memory_bytes "));
    Ok(value.context("the VMM does not count it")?.trim().parse()?)
}

/// Load on a disk of which a `table` is known; what is known of it then.
fn load_on(guest: &LinuxVm, disk: &str, table: Option<&[u8]>, seed: u64) -> Result<Vec<u8>> {
    guest.shell(&format!("rm -f {}", load::TABLE))?;
    if let Some(table) = table {
        guest.agent().put(load::TABLE, 0o600, table)?;
    }
    Load::start(guest, disk, ROUND, seed)?.end()?;
    Ok(guest.agent().get(load::TABLE)?)
}

/// The guest takes its IOMMU over; the name of its NVMe disk.
fn take_over(guest: &LinuxVm) -> Result<String> {
    guest.shell("/init load virtio_iommu")?;
    let disk = disks(guest, 1)?.remove(0);
    guest.shell("for i in $(seq 300); do [ -b /dev/vda ] && break; usleep 100000; done; [ -b /dev/vda ]")?;
    let kinds = guest.shell("cat /sys/bus/pci/devices/*/iommu_group/type")?;
    let kinds: Vec<_> = kinds.lines().collect();
    ensure!(
        kinds.len() == 2 && kinds.iter().all(|kind| kind.starts_with("DMA")),
        "both disks are to be translated: {kinds:?}"
    );
    Ok(disk)
}

/// A disk of the VMM's and one of the host's are behind the guest's IOMMU, and nothing else is. Without a driver they reach all memory; with
/// one the host's reaches what is mapped just now. What they write and read is right all the while.
fn isolates(context: &Context) -> Result<Outcome> {
    with(context, &[NVME], |functions| {
        let image = DiskImage::empty(context.dir.join("own"), load::BYTES as u64)?;
        let device = format!("path={},id=host0,iommu=on", functions[0].path().display());
        let guest = LinuxBuilder::new(context, Kernel::V6_12)?
            .vm(|vm| {
                let vm = vm.api().set("--memory", "size=512M");
                vm.disk(image.path(), "id=own,iommu=on").flag("--device", &device)
            })
            .boot()?;
        ensure!(reached(&guest)? == MEMORY, "nobody has taken the IOMMU over");
        let disk = take_over(&guest).context("the guest takes it over")?;
        let own = load_on(&guest, "/dev/vda", None, 1).context("on the VMM's disk")?;
        let table = load_on(&guest, &disk, None, 2).context("on the host's disk")?;
        let mapped = reached(&guest)?;
        ensure!(mapped > 0 && mapped < MEMORY / 8, "the disk reaches {mapped} bytes");
        let guest = reset_at_once(guest).context("the guest begins anew")?;
        ensure!(reached(&guest)? == MEMORY, "the guest that had it is gone");
        let disk = take_over(&guest).context("once more")?;
        let own = load_on(&guest, "/dev/vda", Some(&own), 3)?;
        let table = load_on(&guest, &disk, Some(&table), 4)?;
        let complaints = "dmesg | grep -E 'virtio_iommu.*fault|nvme.*(timeout|error)|I/O error' || true";
        let complaints = guest.shell(complaints)?;
        ensure!(complaints.is_empty(), "{complaints}");
        let api = guest.vm().api()?.clone();
        api.put("vm.remove-device", Some(&json!({ "id": "host0" }).to_string()))?;
        let job = api.ended("vm.remove-device", LIMIT)?;
        ensure!(job["state"] == "done", "{job}");
        ensure!(reached(&guest)? == 0, "nothing of the host is there any more");
        guest.power_off()?;
        load::compare(&on_host(&functions[0])?, &table)?;
        load::compare(&fs::read(image.path())?, &own)
    })
}
