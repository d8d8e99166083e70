//! Devices of the host that share a slot of the guest's.

use super::load::LIMIT;
use super::vfio::{LONG, ONE_GROUP, disks, guest_with, with};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use triarch_harness::api::Api;
use triarch_harness::images::Kernel;
use triarch_harness::linux::LinuxVm;
use triarch_harness::pci::Function;
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("vfio::two_functions_share_a_slot", two_functions).within(LONG),
    Test::nested("vfio::disks_interrupt_by_their_pins", pins).within(LONG),
];

/// The slot they share.
const SLOT: &str = "0000:00:06";

/// The functions of the slot that the guest has, and their drivers.
fn functions(guest: &LinuxVm) -> Result<String> {
    let script = format!(
        "cd /sys/bus/pci/devices; for d in {SLOT}.?; do [ -e $d ] && echo $d $(basename $(readlink $d/driver)); done; true"
    );
    guest.shell(&script)
}

/// Waits until the guest has no function in the slot any more.
fn are_gone(guest: &LinuxVm) -> Result<()> {
    let script = format!(
        "for i in $(seq 300); do ls -d /sys/bus/pci/devices/{SLOT}.? >/dev/null 2>&1 || exit 0; usleep 100000; done; exit 1"
    );
    guest.shell(&script).map(drop)
}

/// Drivers that get no messages use the pins of their devices, which both are wired to one interrupt.
fn pins(context: &Context) -> Result<Outcome> {
    with(context, &ONE_GROUP, |places| {
        let [first, second] = places else {
            return Ok(());
        };
        let flag = |function: &Function, addr: &str| format!("path={},addr={addr}", function.path().display());
        let guest = guest_with(context, Kernel::V6_12, &[])?
            .vm(|vm| {
                let vm = vm.flag("--device", flag(first, "06.0"));
                vm.flag("--device", flag(second, "06.1"))
            })
            .boot()?;
        both_work(&guest)?;
        guest.shell(&format!(
            "cd /sys/bus/pci/drivers/nvme; for d in {SLOT}.0 {SLOT}.1; do echo $d >unbind; echo 0 >/sys/bus/pci/devices/$d/msi_bus; done
             for d in {SLOT}.0 {SLOT}.1; do echo $d >bind; done"
        ))?;
        both_work(&guest)?;
        let lines = guest.shell("grep nvme /proc/interrupts")?;
        ensure!(
            lines.lines().count() == 1 && is_wire(&lines) && lines.contains("nvme0q0") && lines.contains("nvme1q0"),
            "one level for both, not {lines}"
        );
        let complaints = guest.shell("dmesg | grep -iE 'nvme.*timeout|nobody cared' || true")?;
        ensure!(complaints.is_empty(), "{complaints}");
        // And messages again.
        guest.shell(&format!(
            "cd /sys/bus/pci/drivers/nvme; for d in {SLOT}.0 {SLOT}.1; do echo $d >unbind; echo 1 >/sys/bus/pci/devices/$d/msi_bus; done
             for d in {SLOT}.0 {SLOT}.1; do echo $d >bind; done"
        ))?;
        both_work(&guest)?;
        let lines = guest.shell("grep nvme /proc/interrupts")?;
        ensure!(!is_wire(&lines), "{lines}");
        guest.power_off()?;
        Ok(())
    })
}

/// Whether a line of /proc/interrupts is of a wire: so they are told on x86, and on ARM.
fn is_wire(lines: &str) -> bool {
    lines.contains("fasteoi") || lines.contains("Level")
}

/// Both disks are read, and written where it does no harm.
fn both_work(guest: &LinuxVm) -> Result<()> {
    for disk in disks(guest, 2)? {
        guest.shell(&format!(
            "dd if=/dev/urandom of=/tmp/new bs=64k count=4; dd if=/tmp/new of={disk} bs=64k oflag=direct
             dd if={disk} bs=64k count=4 iflag=direct | cmp - /tmp/new"
        ))?;
    }
    let found = functions(guest)?;
    ensure!(found == format!("{SLOT}.0 nvme\n{SLOT}.1 nvme"), "{found}");
    Ok(())
}

fn body(function: &Function, id: &str, addr: &str) -> Value {
    json!({ "id": id, "path": function.path(), "addr": addr })
}

fn add(api: &Api, body: &Value) -> Result<()> {
    api.put("vm.add-device", Some(&body.to_string())).map(drop)
}

/// Asks for `id` and waits until the guest has given it back.
fn remove(api: &Api, id: &str) -> Result<()> {
    api.put("vm.remove-device", Some(&json!({ "id": id }).to_string()))?;
    api.is_done("vm.remove-device", LIMIT, &format!("the guest gave back '{id}'"))
}

fn two_functions(context: &Context) -> Result<Outcome> {
    with(context, &ONE_GROUP, |places| {
        let [first, second] = places else {
            return Ok(());
        };
        let flag = |function: &Function, id: &str, addr: &str| {
            format!("path={},id={id},addr={addr}", function.path().display())
        };
        let guest = guest_with(context, Kernel::V6_12, &[])?
            .vm(|vm| {
                // In an order that the guest cannot notice.
                let vm = vm.flag("--device", flag(second, "second", "06.1"));
                vm.flag("--device", flag(first, "first", "06.0"))
            })
            .boot()?;
        both_work(&guest)?;
        let api = guest.vm().api()?.within(LIMIT);
        // The guest gives back slots.
        let why = ["remove 'first', which is its function 0"];
        api.refused("vm.remove-device", &json!({ "id": "second" }), 400, &why)?;
        remove(&api, "first")?;
        are_gone(&guest)?;
        let info = api.get("vm.info")?.to_string();
        ensure!(!info.contains("\"first\"") && !info.contains("\"second\""), "{info}");
        // Function 0 comes last, and brings what was there before.
        add(&api, &body(second, "second", "06.1"))?;
        let found = functions(&guest)?;
        ensure!(found.is_empty(), "{found}");
        add(&api, &body(first, "first", "06.0"))?;
        both_work(&guest)?;
        // A guest that was reset has them where they were.
        let guest = guest.reboot()?;
        both_work(&guest)?;
        let api = guest.vm().api()?.within(LIMIT);
        remove(&api, "first")?;
        are_gone(&guest)?;
        add(&api, &body(first, "first", "06.0"))?;
        disks(&guest, 1)?;
        let why = ["'first' is function 0 there"];
        api.refused("vm.add-device", &body(second, "second", "06.1"), 400, &why)?;
        guest.power_off()?;
        Ok(())
    })
}
