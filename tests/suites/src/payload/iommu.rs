//! The guest's IOMMU: what a guest maps its devices reach, and nothing else.

use super::data::pattern;
use super::guest::{Guest, builder, field, number};
use super::payload_tests;
use super::snapshot;
use anyhow::{Result, ensure};
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("iommu":
    is_told_of_in_the_tables,
    lets_all_through_until_the_guest_says_otherwise,
    maps_what_a_disk_reaches,
    tells_of_what_is_refused,
    answers_whatever_it_is_asked,
    keeps_devices_that_come_behind_it,
    goes_on_after_a_restore,
);

const SIZE: u64 = 4 << 20;
/// How much higher than it is the disk has memory.
const OFFSET: u64 = 1 << 40;
/// All of the test guest's memory, and more.
const SPAN: u64 = 1 << 36;
/// The IOMMU is in the first slot, the disk in the second.
const DISK: u64 = 0x10;

fn start(context: &Context, options: &str) -> Result<(Guest, DiskImage)> {
    let vm = builder(context)?;
    let disk = DiskImage::with(vm.dir().join("disk"), &pattern(1, 0, SIZE as usize))?;
    let vm = vm.disk(disk.path(), options).api();
    Ok((Guest::start(vm)?, disk))
}

/// Sends the IOMMU a request and checks the status it is answered with.
fn ask(guest: &mut Guest, request: &str, status: u64) -> Result<()> {
    let answer = guest.ask(&format!("iommu {request}"))?;
    ensure!(number(&answer, "status")? == status, "{request}: {answer}");
    Ok(())
}

/// Puts the disk into domain 1, which has all memory `OFFSET` higher than it is.
fn map_all(guest: &mut Guest) -> Result<()> {
    ask(guest, &format!("attach 1 {DISK}"), 0)?;
    ask(guest, &format!("map 1 {OFFSET} {} 0 3", OFFSET + SPAN - 1), 0)
}

fn is_told_of_in_the_tables(context: &Context) -> Result<Outcome> {
    for (flag, there) in [("iommu=on", true), ("", false)] {
        let (mut guest, _disk) = start(context, flag)?;
        let tables = guest.ask("acpi")?;
        ensure!(field(&tables, "tables")?.contains("VIOT") == there, "{tables}");
        let offered = number(&guest.ask("blk 0 info")?, "offered")?;
        ensure!((offered >> 33 & 1 == 1) == there, "{offered:#x}");
        if !there {
            guest.refused("iommu info")?;
        }
        guest.power_off()?;
    }
    Ok(Outcome::Passed)
}

fn lets_all_through_until_the_guest_says_otherwise(context: &Context) -> Result<Outcome> {
    let (mut guest, _disk) = start(context, "iommu=on,num_queues=2")?;
    // Nobody drives the IOMMU yet.
    guest.ask("blk 0 verify 0 1000 1")?;
    let info = guest.ask("iommu info")?;
    ensure!(
        number(&info, "bypass")? == 1 && number(&info, "mask")? == !0xfff,
        "{info}"
    );
    guest.ask("blk 0 init")?;
    guest.ask("blk 0 verify 0 1000 1")?;
    map_all(&mut guest)?;
    // And again when its driver has gone.
    guest.ask("iommu drop")?;
    guest.ask("blk 0 init queues=2")?;
    guest.ask("blk 0 verify 0 1000 1")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn maps_what_a_disk_reaches(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let disk = DiskImage::with(vm.dir().join("disk"), &pattern(1, 0, SIZE as usize))?;
    let beside = DiskImage::with(vm.dir().join("beside"), &pattern(2, 0, SIZE as usize))?;
    let vm = vm.disk(disk.path(), "iommu=on,num_queues=2").disk(beside.path(), "");
    let mut guest = Guest::start(vm)?;
    map_all(&mut guest)?;
    for options in ["queues=2", "indirect=0", "event_idx=0 indirect=0 size=16"] {
        guest.ask(&format!("blk 0 init offset={OFFSET} {options}"))?;
        guest.ask("blk 0 verify 0 2000 1 segs=5")?;
    }
    guest.ask(&format!("blk 0 init offset={OFFSET} queues=2"))?;
    guest.ask("blk 0 stress 500 8 7")?;
    guest.ask("blk 0 write 3 40 9")?;
    guest.ask("blk 0 flush")?;
    ensure!(disk.read(3 * 512, 40 * 512)? == pattern(9, 3, 40 * 512), "other data");
    // One that is not behind it knows nothing of all that.
    guest.ask("blk 1 verify 0 1000 2")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// The next fault, which is of the disk.
fn fault(guest: &mut Guest, reason: u64, flags: u64, address: u64) -> Result<()> {
    let told = guest.ask("iommu fault 5000")?;
    let expected = format!("reason={reason} flags={flags:#x} endpoint={DISK:#x} address={address:#x}");
    ensure!(told == expected, "{told}, not {expected}");
    Ok(())
}

fn tells_of_what_is_refused(context: &Context) -> Result<Outcome> {
    let (mut guest, _disk) = start(context, "iommu=on")?;
    map_all(&mut guest)?;
    let hole = SPAN + 0x10_0000;
    guest.ask(&format!("blk 0 init offset={OFFSET}"))?;
    guest.refused(&format!("blk 0 dma in 0 1 {hole} ms=300"))?;
    fault(&mut guest, 2, 0x102, OFFSET + hole)?;
    guest.refused(&format!("blk 0 dma in 0 1 {hole} ms=100"))?;
    // A reset repairs the disk. What may only be read is not written.
    let (first, last) = (OFFSET + hole, OFFSET + hole + 0xfff);
    let arena = number(
        &guest
            .ask("mem arenas")?
            .replace('+', " size=")
            .replacen("0x", "at=0x", 1),
        "at",
    )?;
    ask(&mut guest, &format!("map 1 {first} {last} {arena} 1"), 0)?;
    guest.ask(&format!("blk 0 init offset={OFFSET}"))?;
    guest.ask(&format!("blk 0 dma out 8000 1 {hole}"))?;
    guest.refused(&format!("blk 0 dma in 0 1 {hole} ms=300"))?;
    fault(&mut guest, 2, 0x102, first)?;
    // The same with leave to write.
    ask(&mut guest, &format!("unmap 1 {first} {last}"), 0)?;
    ask(&mut guest, &format!("map 1 {first} {last} {arena} 3"), 0)?;
    guest.ask(&format!("blk 0 init offset={OFFSET}"))?;
    guest.ask(&format!("blk 0 dma in 8 1 {hole}"))?;
    guest.ask("blk 0 verify 0 100 1")?;
    // In no domain, and without bypass.
    guest.ask("iommu bypass 0")?;
    ask(&mut guest, &format!("detach 1 {DISK}"), 0)?;
    guest.ask("blk 0 init")?;
    let told = guest.ask("iommu fault 5000")?;
    ensure!(told.starts_with("reason=1 "), "{told}");
    guest.refused("blk 0 dma in 0 1 0x200000 ms=100")?;
    guest.ask("iommu bypass 1")?;
    guest.ask("blk 0 init")?;
    guest.ask("blk 0 verify 0 100 1")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn answers_whatever_it_is_asked(context: &Context) -> Result<Outcome> {
    let (mut guest, _disk) = start(context, "iommu=on")?;
    let probe = guest.ask(&format!("iommu probe {DISK}"))?;
    ensure!(
        number(&probe, "status")? == 0 && number(&probe, "subtype")? == 1,
        "{probe}"
    );
    ensure!(number(&guest.ask("iommu probe 0x999")?, "status")? == 6);
    ask(&mut guest, "raw 1 0", 4)?;
    ask(&mut guest, "raw 99 0", 2)?;
    ask(&mut guest, &format!("attach 0x10000 {DISK}"), 5)?;
    ask(&mut guest, "attach 1 0x999", 6)?;
    ask(&mut guest, "map 1 0 0xfff 0 3", 6)?;
    map_all(&mut guest)?;
    ask(&mut guest, "map 1 0x800 0x17ff 0 3", 5)?;
    ask(&mut guest, &format!("map 1 {OFFSET} {} 0 3", OFFSET + 0xfff), 4)?;
    ask(&mut guest, &format!("unmap 1 {OFFSET} {}", OFFSET + 0xfff), 5)?;
    guest.ask("fuzz-ring iommu0 loop")?;
    guest.ask("iommu init")?;
    map_all(&mut guest)?;
    guest.ask(&format!("blk 0 init offset={OFFSET}"))?;
    guest.ask("blk 0 verify 0 100 1")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn keeps_devices_that_come_behind_it(context: &Context) -> Result<Outcome> {
    let (guest, _disk) = start(context, "iommu=on")?;
    let more = guest.vm().dir().join("more");
    let _more = DiskImage::with(more.clone(), &pattern(3, 0, SIZE as usize))?;
    let body = format!(r#"{{"path":"{}","iommu":true,"id":"more"}}"#, more.display());
    let refused = guest.vm().api()?.request("PUT", "vm.add-disk", Some(&body))?;
    ensure!(
        refused.status == 400 && refused.body.contains("platform.iommu_segments"),
        "{refused:?}"
    );
    let vm = builder(context)?;
    let mut guest = Guest::start(vm.flag("--platform", "iommu_segments=[0]").api())?;
    let body = format!(r#"{{"path":"{}","id":"more"}}"#, more.display());
    guest.vm().api()?.put("vm.add-disk", Some(&body))?;
    let came = guest.ask("slots serve 1 10000")?;
    ensure!(number(&came, "came")? == 1, "{came}");
    let offered = number(&guest.ask("blk 0 info")?, "offered")?;
    ensure!(offered >> 33 & 1 == 1, "{offered:#x}");
    guest.ask("blk 0 verify 0 100 3")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn goes_on_after_a_restore(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let disk = DiskImage::empty(kept.path().join("disk"), SIZE)?;
    let vm = builder(context)?.disk(disk.path(), "iommu=on,num_queues=2");
    let mut guest = Guest::start(vm.api())?;
    map_all(&mut guest)?;
    guest.ask(&format!("blk 0 init queues=2 offset={OFFSET}"))?;
    guest.ask("blk 0 write 0 50 6")?;
    let saved = kept.path().join("saved");
    guest.vm().pause()?;
    snapshot::snapshot(guest.vm().api()?, &saved)?;
    drop(guest);
    let mut guest = snapshot::restore(context, &saved)?;
    guest.ask("blk 0 verify 0 50 6")?;
    guest.ask("blk 0 stress 200 8 7")?;
    // Its mappings are there, and can be taken.
    ask(&mut guest, &format!("map 1 {OFFSET} {} 0 3", OFFSET + 0xfff), 4)?;
    guest.refused(&format!("blk 0 dma in 0 1 {} ms=300", SPAN + 0x1000))?;
    fault(&mut guest, 2, 0x102, OFFSET + SPAN + 0x1000)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
