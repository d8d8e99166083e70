//! Disks: what the guest writes is in the file, what is in the file the guest reads.

use super::data::{crc32, pattern};
use super::guest::{Guest, builder, field, number};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome, is_patient};

payload_tests!("blk":
    writes_reach_the_file,
    reads_come_from_the_file,
    describes_itself,
    refuses_writes_when_read_only,
    refuses_what_it_cannot,
    discards,
    writes_zeroes,
    takes_many_segments,
    runs_without_extras,
    runs_several_queues,
    runs_small_queues,
    runs_without_io_uring,
    runs_direct,
    has_two_disks,
    bears_loads,
);

const SIZE: u64 = 8 << 20;

fn start(context: &Context, options: &str) -> Result<(Guest, DiskImage)> {
    let vm = builder(context)?;
    let disk = DiskImage::with(vm.dir().join("disk"), &pattern(1, 0, SIZE as usize))?;
    let vm = vm.disk(disk.path(), options);
    Ok((Guest::start(vm)?, disk))
}

fn writes_reach_the_file(context: &Context) -> Result<Outcome> {
    let (mut guest, disk) = start(context, "")?;
    for (sector, count, seed) in [(0, 1, 2), (7, 9, 3), (1000, 2048, 4), (SIZE / 512 - 1, 1, 5)] {
        let checksum = number(&guest.ask(&format!("blk 0 write {sector} {count} {seed}"))?, "crc32")?;
        guest.ask("blk 0 flush")?;
        let data = disk.read(sector * 512, count * 512)?;
        ensure!(
            data == pattern(seed, sector, count * 512),
            "sector {sector} is not what was written"
        );
        ensure!(checksum == u64::from(crc32(&data)), "{checksum:#x}");
    }
    // What lies beside it is untouched.
    ensure!(disk.read(512, 6 * 512)? == pattern(1, 1, 6 * 512), "neighbours changed");
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn reads_come_from_the_file(context: &Context) -> Result<Outcome> {
    let (mut guest, _disk) = start(context, "")?;
    for (sector, count) in [(0, 2048), (3, 1), (SIZE / 512 - 100, 100)] {
        guest.ask(&format!("blk 0 verify {sector} {count} 1"))?;
    }
    guest.refused("blk 0 verify 0 1 2")?;
    Ok(Outcome::Passed)
}

fn describes_itself(context: &Context) -> Result<Outcome> {
    let (mut guest, _disk) = start(context, "serial=TRI-0815,num_queues=3,queue_size=64")?;
    let info = guest.ask("blk 0 info")?;
    ensure!(number(&info, "sectors")? == SIZE / 512, "{info}");
    ensure!(number(&info, "blk_size")? >= 512, "{info}");
    ensure!(number(&info, "queues")? == 3, "{info}");
    ensure!(number(&info, "seg_max")? >= 1, "{info}");
    ensure!(field(&info, "ro").is_err(), "{info}");
    ensure!(guest.ask("blk 0 id")? == "TRI-0815");
    Ok(Outcome::Passed)
}

fn refuses_writes_when_read_only(context: &Context) -> Result<Outcome> {
    let (mut guest, disk) = start(context, "readonly=on")?;
    ensure!(number(&guest.ask("blk 0 info")?, "ro")? == 1);
    guest.ask("blk 0 verify 0 100 1")?;
    let refused = guest.refused("blk 0 write 0 1 9")?;
    ensure!(refused.contains("I/O error"), "{refused}");
    ensure!(disk.read(0, 512)? == pattern(1, 0, 512), "written all the same");
    Ok(Outcome::Passed)
}

fn refuses_what_it_cannot(context: &Context) -> Result<Outcome> {
    let (mut guest, _disk) = start(context, "")?;
    let last = SIZE / 512;
    for (command, status) in [
        ("blk 0 raw 77 0 512".into(), 2),
        (format!("blk 0 raw 0 {last} 512 in"), 1),
        (format!("blk 0 raw 1 {} 1024", last - 1), 1),
        ("blk 0 raw 0 0xffffffffffffffff 512 in".into(), 1),
        ("blk 0 raw 0 0x7fffffffffffff 512 in".into(), 1),
        ("blk 0 raw 0 0 511 in".into(), 1),
    ] {
        let answer = guest.ask(&command)?;
        ensure!(number(&answer, "status")? == status, "`{command}` answered {answer}");
    }
    guest.refused(&format!("blk 0 discard {last} 1"))?;
    guest.refused("blk 0 zeroes 0 0xffffffff")?;
    guest.ask("blk 0 verify 0 10 1")?;
    Ok(Outcome::Passed)
}

fn discards(context: &Context) -> Result<Outcome> {
    let (mut guest, disk) = start(context, "")?;
    let before = disk.allocated()?;
    guest.ask("blk 0 discard 2048 8192")?;
    guest.ask("blk 0 flush")?;
    let freed = before - disk.allocated()?;
    ensure!(freed >= 4 << 20, "{freed} bytes freed of 4 MiB");
    guest.ask("blk 0 verify 0 2048 1")?;
    guest.ask("blk 0 verify 10240 2048 1")?;
    Ok(Outcome::Passed)
}

fn writes_zeroes(context: &Context) -> Result<Outcome> {
    let (mut guest, disk) = start(context, "")?;
    guest.ask("blk 0 zeroes 8 16")?;
    guest.ask("blk 0 zeroes 1001 3000 unmap")?;
    ensure!(disk.read(8 * 512, 16 * 512)? == vec![0; 16 * 512]);
    ensure!(disk.read(1001 * 512, 3000 * 512)? == vec![0; 3000 * 512]);
    let checksum = number(&guest.ask("blk 0 read 1001 2000")?, "crc32")?;
    ensure!(checksum == u64::from(crc32(&vec![0; 2000 * 512])));
    guest.ask("blk 0 verify 24 977 1")?;
    guest.ask("blk 0 verify 4001 100 1")?;
    Ok(Outcome::Passed)
}

fn takes_many_segments(context: &Context) -> Result<Outcome> {
    let (mut guest, disk) = start(context, "")?;
    for options in ["indirect=1", "indirect=0"] {
        guest.ask(&format!("blk 0 init {options}"))?;
        for pieces in [2, 3, 30] {
            // Pieces that do not end at sectors.
            guest.ask(&format!("blk 0 write 40 77 {pieces} segs={pieces}"))?;
            ensure!(
                disk.read(40 * 512, 77 * 512)? == pattern(pieces, 40, 77 * 512),
                "{pieces} pieces, {options}"
            );
            guest.ask(&format!("blk 0 verify 40 77 {pieces} segs={pieces}"))?;
        }
    }
    Ok(Outcome::Passed)
}

fn stress(context: &Context, options: &str, init: &str, depth: u32) -> Result<Outcome> {
    let (mut guest, disk) = start(context, options)?;
    guest.ask(&format!("blk 0 init {init}"))?;
    guest.ask(&format!("blk 0 stress 800 {depth} 12"))?;
    ensure!(
        disk.read(0, 800 * 4096)? == pattern(12, 0, 800 * 4096),
        "the file holds other data"
    );
    Ok(Outcome::Passed)
}

fn runs_without_extras(context: &Context) -> Result<Outcome> {
    stress(context, "", "event_idx=0 indirect=0", 16)
}

fn runs_several_queues(context: &Context) -> Result<Outcome> {
    stress(context, "num_queues=4", "queues=4", 64)
}

fn runs_small_queues(context: &Context) -> Result<Outcome> {
    stress(context, "queue_size=16", "size=8 indirect=0", 2)
}

fn runs_without_io_uring(context: &Context) -> Result<Outcome> {
    stress(context, "io_uring=off", "", 32)
}

fn runs_direct(context: &Context) -> Result<Outcome> {
    if !DiskImage::empty(context.dir.join("probe"), 4096)?.can_be_direct() {
        return Ok(Outcome::Skipped("the host's file system has no direct I/O".into()));
    }
    stress(context, "direct=on", "", 32)
}

fn has_two_disks(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let first = DiskImage::empty(vm.dir().join("first"), 1 << 20)?;
    let second = DiskImage::empty(vm.dir().join("second"), 2 << 20)?;
    let mut guest = Guest::start(vm.disk(first.path(), "").disk(second.path(), ""))?;
    guest.ask("blk 0 write 0 8 1")?;
    guest.ask("blk 1 write 0 8 2")?;
    ensure!(number(&guest.ask("blk 0 info")?, "sectors")? == 2048);
    ensure!(number(&guest.ask("blk 1 info")?, "sectors")? == 4096);
    ensure!(first.read(0, 4096)? == pattern(1, 0, 4096) && second.read(0, 4096)? == pattern(2, 0, 4096));
    Ok(Outcome::Passed)
}

fn bears_loads(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let disk = DiskImage::with(vm.dir().join("disk"), &pattern(1, 0, 1 << 20))?;
    let mut guest = Guest::start(vm.disk(disk.path(), "num_queues=4"))?;
    guest.ask("blk 0 init queues=4")?;
    // Long enough for some requests on a slow machine, too.
    let ms = if is_patient() { 2000 } else { 50 };
    for (shape, how, polled) in [("32 4", "", false), ("32 4", " poll", true), ("1 1024", " seq", false)] {
        let load = format!("{shape} {ms}{how}");
        let answer = guest.ask(&format!("blk 0 load {load}"))?;
        let value = |key| number(&answer, key);
        ensure!(value("requests")? > 0 && value("us")? >= ms * 1000, "{load}: {answer}");
        ensure!((value("interrupts")? == 0) == polled, "{load}: {answer}");
        let latencies = ["ns_min", "ns_p50", "ns_p99", "ns_p999", "ns_max"].map(value);
        let latencies = latencies.into_iter().collect::<Result<Vec<_>>>()?;
        ensure!(latencies[0] > 0 && latencies.is_sorted(), "{load}: {answer}");
    }
    // The last one read the whole disk, again and again, into the first buffer.
    let arenas = guest.ask("mem arenas")?;
    let size = |arena: &(&str, &str)| u64::from_str_radix(arena.1.trim_start_matches("0x"), 16).unwrap_or(0);
    let largest = arenas.split(' ').filter_map(|a| a.split_once('+')).max_by_key(size);
    let (arena, _) = largest.context("the guest has no RAM for tests")?;
    guest.ask(&format!("mem verify {arena} {} 1", 1 << 20))?;
    guest.refused(&format!("mem verify {arena} {} 2", 1 << 20))?;
    guest.refused("blk 0 load 1024 1024 50")?;
    Ok(Outcome::Passed)
}
