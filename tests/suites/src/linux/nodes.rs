//! Devices in NUMA nodes, as a stock kernel sees them.

use super::load::{self, LIMIT};
use super::plug::Subject;
use super::vfio::{LONG, NVME, guest_with, load_on, on_host, with};
use anyhow::{Result, ensure};
use serde_json::json;
use triarch_harness::disk::{DiskImage, pattern};
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::pci::Function;
use triarch_harness::suite::{Context, Outcome, Test};
use triarch_harness::vm::VmBuilder;

pub const TESTS: &[Test] = &[
    Test::nested("numa::disks_are_in_nodes_of_linux_6_12", disks).within(LONG),
    Test::nested("vfio::an_nvme_disk_is_in_a_node", nvme).within(LONG),
];

const SIZE: usize = 1 << 20;

/// Two nodes with memory; `more` is said of the second.
fn nodes(vm: VmBuilder, more: &str) -> VmBuilder {
    vm.set("--memory", "size=0")
        .set("--cpus", "boot=2,topology=1:1:1:2")
        .flag("--memory-zone", "id=near,size=256M")
        .flag("--memory-zone", "id=far,size=256M")
        .flag("--numa", "guest_numa_id=0,cpus=[0],memory_zones=[near]")
        .flag("--numa", format!("guest_numa_id=1,cpus=[1],memory_zones=[far]{more}"))
}

/// The node of the device at `bdf`, and that nothing is wrong with its bus.
fn is_in(guest: &LinuxVm, bdf: &str, node: u32) -> Result<()> {
    let told = guest.shell(&format!("cat /sys/bus/pci/devices/{bdf}/numa_node"))?;
    let said = guest.shell("dmesg | grep -i -e pci -e 'host bridge' -e numa | tail -n 60")?;
    ensure!(told.trim() == node.to_string(), "{bdf} is in {told}\n{said}");
    // Where BARs of the host's devices are that are not prefetchable, Linux does not like on any root bus, and moves them.
    let wrong = "dmesg | grep -iE 'pci.*(no space|failed to assign|invalid|conflict|ignoring host bridge|not reserved)' || true";
    let wrong = guest.shell(wrong)?;
    ensure!(wrong.trim().is_empty(), "{wrong}\n{said}");
    Ok(())
}

fn works(guest: &LinuxVm, name: &str) -> Result<()> {
    guest.shell(&format!(
        "head -c {SIZE} /dev/urandom >/tmp/new; dd if=/tmp/new of=/dev/{name} bs=64k oflag=direct
         dd if=/dev/{name} bs=64k count={} iflag=direct | cmp - /tmp/new",
        SIZE >> 16
    ))?;
    Ok(())
}

/// One is there from the start, others come and go.
fn disks(context: &Context) -> Result<Outcome> {
    let first = DiskImage::with(context.dir.join("first"), &pattern(1, SIZE))?;
    let second = DiskImage::with(context.dir.join("second"), &pattern(2, SIZE))?;
    let flag = format!("path={},id=first,guest_numa_id=1", first.path().display());
    let builder = LinuxBuilder::new(context, Kernel::V6_12)?;
    let subject = Subject::boot(builder.vm(|vm| nodes(vm, "").flag("--disk", flag)))?;
    let guest = &subject.guest;
    let link = guest.shell("readlink -f /sys/block/vda")?;
    ensure!(link.contains("/pci0000:20/0000:20:01.0/"), "{link}");
    is_in(guest, "0000:20:01.0", 1)?;
    // The entropy device, and the console is next to it.
    is_in(guest, "0000:00:01.0", 0)?;
    works(guest, "vda")?;
    for (node, port, wanted) in [
        (1, false, "0000:20:02.0"),
        (1, true, "0000:22:00.0"),
        (0, false, "0000:00:03.0"),
        (1, false, "0000:20:02.0"),
    ] {
        let body = json!({ "id": "second", "path": second.path(), "guest_numa_id": node, "root_port": port });
        let bdf = subject.add("vm.add-disk", &body, "/sys/block/vdb")?;
        ensure!(bdf == wanted, "{bdf}");
        is_in(guest, &bdf, node)?;
        works(guest, "vdb")?;
        works(guest, "vda")?;
        subject.remove("second", &bdf, "/sys/block/vdb")?;
    }
    // One that is taken by force is missed. A driver would wait for it for ever.
    let body = json!({ "id": "second", "path": second.path(), "guest_numa_id": 1 });
    let bdf = subject.add("vm.add-disk", &body, "/sys/block/vdb")?;
    guest.shell(&format!("echo {bdf} >/sys/bus/pci/drivers/virtio-pci/unbind"))?;
    let api = guest.vm().api()?.within(LIMIT);
    let force = json!({ "id": "second", "force": true }).to_string();
    api.put("vm.remove-device", Some(&force))?;
    let gone = format!(
        "for i in $(seq 300); do [ -e /sys/bus/pci/devices/{bdf} ] || break; usleep 100000; done; ls /sys/bus/pci/devices"
    );
    let left = guest.shell(&gone)?;
    ensure!(!left.contains(&bdf) && left.contains("0000:20:01.0"), "{left}");
    works(guest, "vda")?;
    subject.end()
}

/// An NVMe disk of the host, there from the start and given again below a port.
fn nvme(context: &Context) -> Result<Outcome> {
    with(context, &[NVME], |functions| {
        let flag = |function: &Function| format!("path={},id=nvme,addr=05,guest_numa_id=1", function.path().display());
        let guest = guest_with(context, Kernel::V6_12, &[])?
            .vm(|vm| nodes(vm, "").flag("--device", flag(&functions[0])))
            .boot()?;
        let table = load_on(&guest, 1)?;
        is_in(&guest, "0000:20:05.0", 1)?;
        let node = guest.shell("cat /sys/block/nvme0n1/device/numa_node /sys/class/nvme/nvme0/device/numa_node")?;
        ensure!(node.split_whitespace().all(|node| node == "1"), "{node}");
        // By its pin: the wires are those of its slot, on whatever bus that is.
        guest.shell(
            "echo 0000:20:05.0 >/sys/bus/pci/drivers/nvme/unbind; echo 0 >/sys/bus/pci/devices/0000:20:05.0/msi_bus
             echo 0000:20:05.0 >/sys/bus/pci/drivers/nvme/bind",
        )?;
        super::vfio::disks(&guest, 1)?;
        guest.shell("dd if=/dev/nvme0n1 of=/dev/null bs=64k count=16 iflag=direct")?;
        let lines = guest.shell("grep nvme /proc/interrupts")?;
        ensure!(
            lines.contains("fasteoi") || lines.contains("Level"),
            "not by its pin: {lines}"
        );
        let api = guest.vm().api()?.within(LIMIT);
        api.put("vm.remove-device", Some(&json!({ "id": "nvme" }).to_string()))?;
        api.is_done("vm.remove-device", LIMIT, "the guest gave back 'nvme'")?;
        load::compare(&on_host(&functions[0])?, &table)?;
        functions[0].spare()?;
        let body = json!({ "id": "nvme", "path": functions[0].path(), "guest_numa_id": 1, "root_port": true });
        api.put("vm.add-device", Some(&body.to_string()))?;
        let table = load_on(&guest, 2)?;
        is_in(&guest, "0000:21:00.0", 1)?;
        guest.power_off()?;
        load::compare(&on_host(&functions[0])?, &table)
    })
}
