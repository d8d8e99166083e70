//! Devices below root ports, under stock kernels.

use super::load::{self, LIMIT};
use super::plug::Subject;
use super::vfio::{LONG, NVME, disks, guest_with, load_on, on_host, with};
use anyhow::{Result, ensure};
use serde_json::json;
use triarch_harness::disk::{DiskImage, pattern};
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("ports::a_disk_is_below_a_port_of_linux_6_1", |c| disk(c, Kernel::V6_1)).within(LONG),
    Test::nested("ports::a_disk_is_below_a_port_of_linux_6_12", |c| {
        disk(c, Kernel::V6_12)
    })
    .within(LONG),
    Test::nested("ports::linux_numbers_the_buses_of_a_device_tree", numbered).within(LONG),
    Test::nested("vfio::an_nvme_disk_is_below_a_port", nvme).within(LONG),
];

const SIZE: usize = 1 << 20;

/// What Linux says of the port in `slot` and of the device below it.
fn port(guest: &LinuxVm, slot: &str, bus: &str, driver: &str) -> Result<()> {
    let script = format!(
        "cd /sys/bus/pci/devices/0000:00:{slot}.0; cat class secondary_bus_number; basename $(readlink driver)
         basename $(readlink 0000:{bus}:00.0/driver); cat current_link_width"
    );
    let told = guest.shell(&script)?;
    let number = u8::from_str_radix(bus, 16)?.to_string();
    let expected = ["0x060400", &number, "pcieport", driver, "16"];
    ensure!(
        told.split_whitespace().eq(expected),
        "{told}\n{}",
        guest.shell("dmesg | grep -i pci")?
    );
    let wrong = "dmesg | grep -E 'pci.*(no space|failed to assign|can.t claim|no compatible|invalid)' || true";
    let wrong = guest.shell(wrong)?;
    ensure!(wrong.trim().is_empty(), "{wrong}");
    Ok(())
}

/// The disk `name` has what `data` has, also after it was written.
fn works(guest: &LinuxVm, name: &str) -> Result<()> {
    guest.shell(&format!(
        "head -c {SIZE} /dev/urandom >/tmp/new; dd if=/tmp/new of=/dev/{name} bs=64k oflag=direct
         dd if=/dev/{name} bs=64k count={} iflag=direct | cmp - /tmp/new",
        SIZE >> 16
    ))?;
    Ok(())
}

/// One is there from the start, another comes and goes with its port.
fn disk(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let first = DiskImage::with(context.dir.join("first"), &pattern(1, SIZE))?;
    let second = DiskImage::with(context.dir.join("second"), &pattern(1, SIZE))?;
    let flag = format!("path={},id=first,root_port=on", first.path().display());
    let subject = Subject::boot(LinuxBuilder::new(context, kernel)?.vm(|vm| vm.flag("--disk", flag)))?;
    let link = subject.guest.shell("readlink -f /sys/block/vda")?;
    let bus = link
        .split('/')
        .find_map(|part| part.strip_prefix("0000:")?.strip_suffix(":00.0"));
    let Some(bus) = bus.filter(|bus| *bus != "00") else {
        anyhow::bail!("no port above {link}");
    };
    port(&subject.guest, bus, bus, "virtio-pci")?;
    works(&subject.guest, "vda")?;
    let body = json!({ "id": "second", "path": second.path(), "root_port": true });
    for _ in 0..2 {
        let bdf = subject.add("vm.add-disk", &body, "/sys/block/vdb")?;
        let slot = bdf.trim_start_matches("0000:").trim_end_matches(":00.0");
        port(&subject.guest, slot, slot, "virtio-pci")?;
        works(&subject.guest, "vdb")?;
        works(&subject.guest, "vda")?;
        subject.remove("second", &bdf, "/sys/block/vdb")?;
        let left = subject
            .guest
            .shell(&format!("ls -d /sys/bus/pci/devices/0000:00:{slot}.0 || true"))?;
        ensure!(!left.contains(":00:"), "{left}");
    }
    subject.end()
}

/// Linux on ARM gives the buses of a device tree numbers of its own, and the windows addresses.
fn numbered(context: &Context) -> Result<Outcome> {
    if std::env::consts::ARCH != "aarch64" {
        return Ok(Outcome::Skipped("device trees are for ARM guests".into()));
    }
    let disk = DiskImage::with(context.dir.join("disk"), &pattern(1, SIZE))?;
    let flag = format!("path={},id=first,root_port=on", disk.path().display());
    let guest = LinuxBuilder::new(context, Kernel::V6_12)?
        .vm(|vm| vm.api().flag("--disk", flag).flag("--platform", "dtb=on"))
        .boot()?;
    let link = guest.shell("readlink -f /sys/block/vda")?;
    ensure!(link.contains("/0000:01:00.0/"), "{link}");
    let above: Vec<&str> = link.split('/').filter(|part| part.starts_with("0000:00:")).collect();
    let slot = above.first().and_then(|part| part.get(8..10)).unwrap_or("none");
    port(&guest, slot, "01", "virtio-pci")?;
    works(&guest, "vda")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// An NVMe disk of the host: by messages and by its pin, and it comes and goes.
fn nvme(context: &Context) -> Result<Outcome> {
    with(context, &[NVME], |functions| {
        let flag = |function: &triarch_harness::pci::Function| {
            format!("path={},id=nvme,addr=0a,root_port=on", function.path().display())
        };
        let guest = guest_with(context, Kernel::V6_12, &[])?
            .vm(|vm| vm.flag("--device", flag(&functions[0])))
            .boot()?;
        let table = load_on(&guest, 1)?;
        port(&guest, "0a", "0a", "nvme")?;
        let link = guest.shell("cd /sys/bus/pci/devices/0000:0a:00.0; cat current_link_width max_link_speed")?;
        ensure!(link.starts_with('1') && link.contains("GT/s"), "{link}");
        guest.shell(
            "echo 0000:0a:00.0 >/sys/bus/pci/drivers/nvme/unbind; echo 0 >/sys/bus/pci/devices/0000:0a:00.0/msi_bus",
        )?;
        guest.shell("echo 0000:0a:00.0 >/sys/bus/pci/drivers/nvme/bind")?;
        disks(&guest, 1)?;
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
        let body = json!({ "id": "nvme", "path": functions[0].path(), "root_port": true });
        api.put("vm.add-device", Some(&body.to_string()))?;
        let table = load_on(&guest, 2)?;
        guest.power_off()?;
        load::compare(&on_host(&functions[0])?, &table)
    })
}
