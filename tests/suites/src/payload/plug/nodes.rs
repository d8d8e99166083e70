//! Devices in NUMA nodes of the guest: each has a PCI root bus, with slots and windows of its own.

use super::{Plug, image};
use crate::payload::guest::{Guest, builder, number};
use crate::payload::payload_tests;
use crate::payload::snapshot::{restore, same_machine, snapshot};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};
use triarch_harness::vm::VmBuilder;

payload_tests!("nodes":
    disks_are_on_the_buses_of_their_nodes,
    they_come_and_go_there,
    one_that_is_taken_by_force_is_missed,
    a_guest_that_was_saved_has_them_there,
    the_iommu_is_before_them_too,
    a_node_that_was_left_keeps_its_bus,
    what_cannot_be_is_refused,
);

/// What an IOMMU says of an endpoint that is not behind it.
const NO_SUCH_ENDPOINT: u64 = 6;

/// A guest with three nodes; `more` is said of the last.
fn nodes(context: &Context, more: &str) -> Result<VmBuilder> {
    Ok(builder(context)?
        .set("--cpus", "boot=1,max=3")
        .flag("--numa", "guest_numa_id=0")
        .flag("--numa", "guest_numa_id=1,cpus=[1]")
        .flag("--numa", format!("guest_numa_id=2,cpus=[2]{more}")))
}

/// One with disks in all of them, the last below a root port. They have the patterns 1 to 3.
fn start(context: &Context) -> Result<(Plug, [DiskImage; 3])> {
    let disks = [
        image(context, "zero", 1)?,
        image(context, "one", 2)?,
        image(context, "two", 3)?,
    ];
    let mut vm = nodes(context, "")?;
    for (disk, more) in disks.iter().zip([
        "id=zero",
        "id=one,guest_numa_id=1",
        "id=two,guest_numa_id=2,root_port=on",
    ]) {
        vm = vm.flag("--disk", format!("path={},{more}", disk.path().display()));
    }
    Ok((Plug::of(vm)?, disks))
}

fn works(guest: &mut Guest, disk: u64, seed: u64) -> Result<()> {
    guest.ask(&format!("blk {disk} verify 0 100 {seed}"))?;
    guest.ask(&format!("blk {disk} write 200 64 7"))?;
    guest.ask(&format!("blk {disk} verify 200 64 7"))?;
    Ok(())
}

/// Where the guest has the first BAR of a disk.
fn bar(guest: &mut Guest, disk: u64) -> Result<u64> {
    let told = guest.ask(&format!("bars blk{disk}"))?;
    let address = told.split(['+', ':']).find_map(|word| word.strip_prefix("0x"));
    Ok(u64::from_str_radix(address.with_context(|| told.clone())?, 16)?)
}

/// What is asked for is refused, with these words.
fn refused(p: &Plug, body: &Value, words: &[&str]) -> Result<()> {
    let answer = p.api.request("PUT", "vm.add-disk", Some(&body.to_string()))?;
    ensure!(
        answer.status == 400 && words.iter().all(|word| answer.body.contains(word)),
        "{} {}",
        answer.status,
        answer.body
    );
    Ok(())
}

/// Adds a disk and returns where it is.
fn add(p: &Plug, body: &Value) -> Result<String> {
    let answer = p.api.request("PUT", "vm.add-disk", Some(&body.to_string()))?;
    ensure!(answer.status == 200, "{} {}", answer.status, answer.body);
    let added: Value = serde_json::from_str(&answer.body)?;
    Ok(added["bdf"].as_str().context("no bdf")?.to_owned())
}

fn disks_are_on_the_buses_of_their_nodes(context: &Context) -> Result<Outcome> {
    let (mut p, _disks) = start(context)?;
    let acpi = p.guest.ask("acpi")?;
    ensure!(acpi.contains(" buses=96"), "{acpi}");
    let told = |p: &mut Plug| -> Result<()> {
        let pci = p.guest.ask("pci")?;
        for function in [
            " 00:01.0=1af4:1042",
            " 20:01.0=1af4:1042",
            " 40:01.0=1b36:000c",
            " 41:00.0=1af4:1042",
        ] {
            ensure!(pci.contains(function), "no {function}: {pci}");
        }
        for (disk, seed) in [(0, 1), (1, 2), (2, 3)] {
            works(&mut p.guest, disk, seed)?;
            p.guest.ask(&format!("msix blk{disk}"))?;
        }
        // The last node has the upper part of the window.
        let bars = [bar(&mut p.guest, 0)?, bar(&mut p.guest, 1)?, bar(&mut p.guest, 2)?];
        ensure!(
            bars[0] + (1 << 30) < bars[1] && bars[1] + (1 << 30) < bars[2],
            "{bars:x?}"
        );
        Ok(())
    };
    told(&mut p)?;
    let tree = &p.api.get("vm.info")?["device_tree"];
    ensure!(tree["_virtio-pci-one"]["pci_bdf"] == "0000:20:01.0", "{tree}");
    ensure!(tree["_virtio-pci-two"]["pci_bdf"] == "0000:41:00.0", "{tree}");
    ensure!(tree["_virtio-pci-two"]["parent"] == "_root-port-41", "{tree}");
    ensure!(tree["_root-port-41"]["pci_bdf"] == "0000:40:01.0", "{tree}");
    // What leads to the last bus has a number below that of its root.
    ensure!(p.guest.ask("root-port 65 look")?.contains(" bus=65 "));
    p.guest.send("pm reset")?;
    p.guest.wait_ready()?;
    told(&mut p)?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn they_come_and_go_there(context: &Context) -> Result<Outcome> {
    let disk = image(context, "disk", 2)?;
    let mut p = Plug::of(nodes(context, ",pci_root=on")?)?;
    for (node, port, place) in [
        (2, false, "0000:40:01.0"),
        (1, true, "0000:21:00.0"),
        (2, true, "0000:41:00.0"),
        (1, false, "0000:20:01.0"),
    ] {
        let body = json!({ "id": "late", "path": disk.path(), "guest_numa_id": node, "root_port": port });
        ensure!(add(&p, &body)? == place);
        p.takes(1)?;
        works(&mut p.guest, 0, 2)?;
        p.gives("late")?;
        p.gone("late")?;
        ensure!(!p.has_open(disk.path())?);
    }
    // One without a node comes to bus 0.
    let slot = p.add_disk("near", disk.path())?;
    p.takes(1)?;
    works(&mut p.guest, 0, 2)?;
    ensure!(p.guest.ask("slots count")? == "96" && slot < 32);
    p.gives("near")?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn one_that_is_taken_by_force_is_missed(context: &Context) -> Result<Outcome> {
    let (mut p, disks) = start(context)?;
    works(&mut p.guest, 1, 2)?;
    p.guest.send("slots serve 1 5000")?;
    p.remove("one", true)?;
    ensure!(p.guest.answer()? == "came=0 went=0 lost=1");
    p.done("'one' was taken by force")?;
    // Its slot is the last choice.
    let body = json!({ "id": "again", "path": disks[1].path(), "guest_numa_id": 1 });
    ensure!(add(&p, &body)? == "0000:20:02.0");
    p.takes(1)?;
    p.gives("again")?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_guest_that_was_saved_has_them_there(context: &Context) -> Result<Outcome> {
    let (mut p, _disks) = start(context)?;
    let late = image(context, "late", 4)?;
    let body = json!({ "id": "late", "path": late.path(), "guest_numa_id": 1, "root_port": true });
    ensure!(add(&p, &body)? == "0000:22:00.0");
    p.takes(1)?;
    p.guest.ask("root-port 34 number 40")?;
    let look = p.guest.ask("root-port 34 look")?;
    ensure!(look.contains(" bus=40 "), "{look}");
    // Its messages come from the new number, once its driver is started anew.
    p.guest.ask("blk 2 init")?;
    works(&mut p.guest, 2, 4)?;
    p.gives("one")?;
    p.guest.vm().pause()?;
    let before = p.api.get("vm.info")?;
    let directory = context.dir.join("snapshot");
    snapshot(&p.api, &directory)?;
    drop(p);
    let mut guest = restore(context, &directory)?;
    let after = guest.vm().api()?.get("vm.info")?;
    same_machine(&before, &after)?;
    ensure!(guest.ask("root-port 34 look")? == look);
    guest.ask("blk 0 verify 0 100 1")?;
    works(&mut guest, 1, 4)?;
    works(&mut guest, 2, 3)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn the_iommu_is_before_them_too(context: &Context) -> Result<Outcome> {
    let (zero, one) = (image(context, "zero", 1)?, image(context, "one", 2)?);
    let vm = nodes(context, "")?
        .flag("--disk", format!("path={},id=zero", zero.path().display()))
        .flag(
            "--disk",
            format!("path={},id=one,guest_numa_id=1,iommu=on", one.path().display()),
        );
    let mut p = Plug::of(vm)?;
    // It knows the one by the number it has on its bus, and not the other.
    for (endpoint, known) in [("0x2008", 0), ("0x10", NO_SUCH_ENDPOINT)] {
        let told = p.guest.ask(&format!("iommu probe {endpoint}"))?;
        ensure!(number(&told, "status")? == known, "{endpoint}: {told}");
    }
    p.guest.ask("iommu attach 1 0x2008")?;
    p.guest.refused("blk 1 dma in 0 1 0x200000 ms=300")?;
    let fault = p.guest.ask("iommu fault 5000")?;
    ensure!(fault.contains("endpoint=0x2008"), "{fault}");
    works(&mut p.guest, 0, 1)?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_node_that_was_left_keeps_its_bus(context: &Context) -> Result<Outcome> {
    let (mut p, disks) = start(context)?;
    p.gives("two")?;
    p.gone("two")?;
    let config = &p.api.get("vm.info")?["config"];
    ensure!(config["numa"][2]["pci_root"] == true, "{config}");
    p.guest.send("pm reset")?;
    p.guest.wait_ready()?;
    ensure!(p.guest.ask("acpi")?.contains(" buses=96"));
    let body = json!({ "id": "two", "path": disks[2].path(), "guest_numa_id": 2 });
    ensure!(add(&p, &body)? == "0000:40:01.0");
    p.takes(1)?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn what_cannot_be_is_refused(context: &Context) -> Result<Outcome> {
    let disk = image(context, "disk", 1)?;
    let body = |node| json!({ "id": "disk", "path": disk.path(), "guest_numa_id": node });
    let mut p = Plug::of(nodes(context, "")?)?;
    ensure!(p.guest.ask("acpi")?.contains(" buses=32"), "nobody asked for more");
    refused(&p, &body(3), &["disks[0].guest_numa_id is 3", "between 0 and 2"])?;
    refused(
        &p,
        &body(2),
        &["'disk' is to be in NUMA node 2", "start it with pci_root on"],
    )?;
    // Node 0 has bus 0.
    ensure!(add(&p, &body(0))?.starts_with("0000:00:"));
    p.takes(1)?;
    p.guest.power_off()?;
    let p = Plug::start(context, &[])?;
    refused(&p, &body(1), &["guest_numa_id is 1, and the guest has no NUMA nodes"])?;
    let Plug { guest, .. } = p;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
