//! Devices below root ports.

use super::{Plug, SIZE, image};
use crate::payload::guest::{Guest, builder, number};
use crate::payload::payload_tests;
use crate::payload::snapshot::{restore, same_machine, snapshot};
use anyhow::{Result, ensure};
use serde_json::json;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("ports":
    a_disk_works_below_a_port,
    its_bus_gets_another_number,
    it_is_there_only_behind_the_window,
    a_reset_of_its_bus_is_one_of_the_disk,
    it_comes_and_goes_with_its_port,
    a_guest_that_was_saved_finds_the_bus_where_it_put_it,
);

/// A guest with one disk on bus 0, and one below a port in slot 2, with the patterns 1 and 2.
fn start(context: &Context) -> Result<(Plug, DiskImage)> {
    let (first, second) = (image(context, "first", 1)?, image(context, "second", 2)?);
    let vm = builder(context)?
        .flag("--disk", format!("path={},id=first", first.path().display()))
        .flag(
            "--disk",
            format!("path={},id=second,root_port=on", second.path().display()),
        );
    Ok((Plug::of(vm)?, second))
}

fn works(guest: &mut Guest, disk: u64) -> Result<()> {
    guest.ask(&format!("blk {disk} verify 0 100 2"))?;
    guest.ask(&format!("blk {disk} write 200 64 7"))?;
    guest.ask(&format!("blk {disk} verify 200 64 7"))?;
    Ok(())
}

fn a_disk_works_below_a_port(context: &Context) -> Result<Outcome> {
    let (mut p, disk) = start(context)?;
    let pci = p.guest.ask("pci")?;
    ensure!(
        pci.contains(" 00:02.0=1b36:000c:060400") && pci.contains(" 02:00.0=1af4:1042:"),
        "{pci}"
    );
    let look = p.guest.ask("root-port 2 look")?;
    let told = "id=0xc1b36 class=0x60400 type=4 link=0x2104 acs=0x1000d bus=2 below=0x10421af4";
    ensure!(look == told, "{look}");
    let tree = &p.api.get("vm.info")?["device_tree"];
    ensure!(tree["_virtio-pci-second"]["pci_bdf"] == "0000:02:00.0", "{tree}");
    ensure!(tree["_virtio-pci-second"]["parent"] == "_root-port-02", "{tree}");
    ensure!(tree["_root-port-02"]["pci_bdf"] == "0000:00:02.0", "{tree}");
    ensure!(
        tree["_root-port-02"]["children"] == json!(["_virtio-pci-second"]),
        "{tree}"
    );
    p.guest.ask("blk 0 verify 0 100 1")?;
    works(&mut p.guest, 1)?;
    p.guest.ask("msix blk1")?;
    ensure!(disk.read(0, SIZE as usize)?.len() == SIZE as usize);
    p.guest.send("pm reset")?;
    p.guest.wait_ready()?;
    ensure!(p.guest.ask("root-port 2 look")? == told);
    p.guest.ask("blk 1 verify 200 64 7")?;
    p.guest.ask("blk 1 stress 100 16 5")?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn its_bus_gets_another_number(context: &Context) -> Result<Outcome> {
    let (mut p, _disk) = start(context)?;
    let moved = p.guest.ask("root-port 2 number 9")?;
    ensure!(moved == "before=0x10421af4 there=0x10421af4 old=0xffffffff", "{moved}");
    works(&mut p.guest, 1)?;
    let again = p.guest.ask("root-port 2 number 31")?;
    ensure!(again == moved, "{again}");
    // Its messages come from the new number, once its driver is started anew.
    p.guest.ask("blk 1 init")?;
    works(&mut p.guest, 1)?;
    p.guest.ask("blk 0 verify 0 100 1")?;
    let tree = &p.api.get("vm.info")?["device_tree"];
    ensure!(tree["_virtio-pci-second"]["pci_bdf"] == "0000:02:00.0", "{tree}");
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn it_is_there_only_behind_the_window(context: &Context) -> Result<Outcome> {
    let (mut p, _disk) = start(context)?;
    works(&mut p.guest, 1)?;
    let shut = p.guest.ask("root-port 2 shut")?;
    ensure!(number(&shut, "shut")? == 0xffff_ffff, "{shut}");
    ensure!(
        number(&shut, "open")? != 0xffff_ffff && number(&shut, "open")? == number(&shut, "again")?,
        "{shut}"
    );
    works(&mut p.guest, 1)?;
    let moved = p.guest.ask("root-port 2 move 1")?;
    ensure!(
        number(&moved, "outside")? == 0xffff_ffff && number(&moved, "old")? == 0xffff_ffff,
        "{moved}"
    );
    ensure!(number(&moved, "inside")? != 0xffff_ffff, "{moved}");
    works(&mut p.guest, 1)?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_reset_of_its_bus_is_one_of_the_disk(context: &Context) -> Result<Outcome> {
    let (mut p, _disk) = start(context)?;
    works(&mut p.guest, 1)?;
    let reset = p.guest.ask("root-port 2 reset")?;
    ensure!(
        number(&reset, "before")? & 6 == 6 && number(&reset, "after")? & 6 == 0,
        "{reset}"
    );
    p.guest.ask("blk 1 init")?;
    works(&mut p.guest, 1)?;
    p.guest.ask("blk 0 verify 0 100 1")?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn it_comes_and_goes_with_its_port(context: &Context) -> Result<Outcome> {
    let disk = image(context, "disk", 2)?;
    let mut p = Plug::start(context, &[])?;
    let body = json!({ "id": "late", "path": disk.path(), "root_port": true });
    for _ in 0..3 {
        let answer = p.api.request("PUT", "vm.add-disk", Some(&body.to_string()))?;
        ensure!(
            answer.status == 200 && answer.body.contains(":00.0\""),
            "{} {}",
            answer.status,
            answer.body
        );
        let tree = &p.api.get("vm.info")?["device_tree"];
        let port = tree["_virtio-pci-late"]["parent"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        ensure!(port.starts_with("_root-port-"), "{tree}");
        p.takes(1)?;
        let slot = u64::from_str_radix(&port["_root-port-".len()..], 16)?;
        let look = p.guest.ask(&format!("root-port {slot} look"))?;
        ensure!(look.ends_with("below=0x10421af4"), "{look}");
        works(&mut p.guest, 0)?;
        p.gives("late")?;
        ensure!(p.is_gone("late")? && !p.has_open(disk.path())?);
        ensure!(p.api.get("vm.info")?["device_tree"][&port].is_null());
        p.guest.refused(&format!("root-port {slot} look"))?;
    }
    ensure!(p.events()? == ["added late", "removed late"].repeat(3));
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_guest_that_was_saved_finds_the_bus_where_it_put_it(context: &Context) -> Result<Outcome> {
    let (mut p, _disk) = start(context)?;
    p.guest.ask("root-port 2 number 9")?;
    let look = p.guest.ask("root-port 2 look")?;
    works(&mut p.guest, 1)?;
    p.guest.vm().pause()?;
    let before = p.api.get("vm.info")?;
    let directory = context.dir.join("snapshot");
    snapshot(&p.api, &directory)?;
    drop(p);
    let mut guest = restore(context, &directory)?;
    let after = guest.vm().api()?.get("vm.info")?;
    same_machine(&before, &after)?;
    ensure!(guest.ask("root-port 2 look")? == look);
    guest.ask("blk 1 verify 200 64 7")?;
    works(&mut guest, 1)?;
    guest.ask("blk 0 verify 0 100 1")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
