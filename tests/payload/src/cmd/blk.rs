//! `blk N ...`

use crate::Guest;
use crate::clock;
use crate::data;
use crate::dev::Setup;
use crate::dev::blk::{Blk, MAX_SECTORS, SoakPlan, check, feature, request};
use crate::dev::load::Plan;
use crate::shell::{Args, Reply};
use crate::virtio::ring::Segment;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;
use core::ops::Range;

/// Where the configuration space says whether writes may stay in a cache.
const WRITEBACK: u64 = 32;

/// Runs one command on a disk.
pub fn run(guest: &mut Guest, args: &mut Args) -> Reply {
    let index = args.number("disk number")? as usize;
    let what = args.word("command")?;
    if what == "init" {
        let setup = Setup::of(args);
        guest.restart("blk", index, &setup)?;
        let disk = guest.blk(index)?;
        return Ok(format!("features={:#x}", disk.features));
    }
    let arenas = guest.platform.arenas();
    let disk = guest.blk(index)?;
    match what {
        "info" => info(disk),
        "id" => disk.serial(),
        "writeback" => {
            let on = args.number("0|1")? as u8;
            disk.registers().write_config8(WRITEBACK, on).map(|()| String::new())
        }
        "read" => read(disk, args),
        "write" | "verify" => write_or_verify(disk, what == "write", args),
        "flush" => disk.flush().map(|()| String::new()),
        "discard" | "zeroes" => {
            let kind = if what == "discard" {
                request::DISCARD
            } else {
                request::WRITE_ZEROES
            };
            let (sector, count) = (args.number("SECTOR")?, args.number_to("COUNT", u32::MAX.into())?);
            disk.range(kind, sector, count as u32, args.has("unmap"))
                .map(|()| String::new())
        }
        "raw" => raw(disk, args),
        "dma" => dma(disk, args),
        "stress" => {
            let (blocks, depth) = (args.number("BLOCKS")?, args.number_to("DEPTH", 128)?);
            let start = clock::ticks();
            disk.stress(blocks, depth.max(1) as usize, args.number("SEED")?)?;
            Ok(format!("us={}", clock::nanoseconds(clock::ticks() - start) / 1000))
        }
        "soak" => soak(disk, args),
        "bench" => bench(disk, args),
        "load" => load(disk, args, &arenas),
        other => Err(format!("blk {other}?")),
    }
}

/// `dma in|out SECTOR COUNT ADDR [ms=N]`: without a buffer of the driver's.
fn dma(disk: &mut Blk, args: &mut Args) -> Reply {
    let write = args.word("in|out")? == "in";
    let kind = if write { request::IN } else { request::OUT };
    let (sector, count) = (args.number("SECTOR")?, args.number_to("COUNT", MAX_SECTORS)?);
    let segment = Segment {
        address: args.number("ADDR")?,
        len: count as u32 * 512,
        write,
    };
    let ms = args.option("ms", 5000);
    let status = disk.request_within(kind, sector, &[segment], ms);
    status.and_then(check).map(|()| String::new())
}

fn info(disk: &mut Blk) -> Reply {
    let config = disk.registers();
    let mut text = format!(
        "sectors={} features={:#x} offered={:#x}",
        disk.capacity()?,
        disk.features,
        config.offered()
    );
    for (bit, name, offset, len) in [
        (feature::RO, "ro", 0, 0),
        (feature::SEG_MAX, "seg_max", 12, 4),
        (feature::BLK_SIZE, "blk_size", 20, 4),
        (feature::TOPOLOGY, "physical_exp", 24, 1),
        (feature::TOPOLOGY, "min_io", 26, 2),
        (feature::TOPOLOGY, "opt_io", 28, 4),
        (feature::CONFIG_WCE, "writeback", WRITEBACK, 1),
        (feature::MQ, "queues", 34, 2),
        (feature::DISCARD, "discard_max", 36, 4),
        (feature::DISCARD, "discard_align", 44, 4),
        (feature::WRITE_ZEROES, "zeroes_max", 48, 4),
        (feature::WRITE_ZEROES, "zeroes_unmap", 56, 1),
    ] {
        if disk.features & bit != 0 {
            let value = if len == 0 {
                1
            } else {
                config.config_number(offset, len)?
            };
            let _ = write!(text, " {name}={value}");
        }
    }
    Ok(text)
}

fn read(disk: &mut Blk, args: &mut Args) -> Reply {
    let (sector, count) = (args.number("SECTOR")?, args.number_to("COUNT", MAX_SECTORS)?);
    disk.data().fill(0xa5);
    disk.transfer(request::IN, sector, count, args.option("segs", 1) as usize)?;
    Ok(format!(
        "crc32={:#010x}",
        data::crc32(0, &disk.data()[..count as usize * 512])
    ))
}

fn write_or_verify(disk: &mut Blk, write: bool, args: &mut Args) -> Reply {
    let (sector, count, seed) = (
        args.number("SECTOR")?,
        args.number_to("COUNT", MAX_SECTORS)?,
        args.number("SEED")?,
    );
    let (len, pieces) = (count as usize * 512, args.option("segs", 1) as usize);
    if write {
        data::fill(&mut disk.data()[..len], seed, sector);
        disk.transfer(request::OUT, sector, count, pieces)?;
    } else {
        disk.data().fill(0);
        disk.transfer(request::IN, sector, count, pieces)?;
        let mut expected = [0; 512];
        for (n, chunk) in disk.data()[..len].chunks(512).enumerate() {
            data::fill(&mut expected, seed, sector + n as u64);
            if chunk != expected {
                return Err(format!("sector {} differs", sector + n as u64));
            }
        }
    }
    Ok(format!("crc32={:#010x}", data::crc32(0, &disk.data()[..len])))
}

/// `raw TYPE SECTOR LEN [in]`: any request type with LEN bytes of data, whatever the device thinks of it.
fn raw(disk: &mut Blk, args: &mut Args) -> Reply {
    let (kind, sector, len) = (
        args.number_to("TYPE", u32::MAX.into())?,
        args.number("SECTOR")?,
        args.number_to("LEN", MAX_SECTORS * 512)?,
    );
    let segment = Segment {
        address: disk.data().as_ptr() as u64,
        len: len as u32,
        write: args.has("in"),
    };
    let segments: &[Segment] = if len == 0 { &[] } else { &[segment] };
    Ok(format!("status={}", disk.request(kind as u32, sector, segments)?))
}

/// `soak COUNT DEPTH SEED BLOCKS`
fn soak(disk: &mut Blk, args: &mut Args) -> Reply {
    let (count, depth) = (args.number("COUNT")?, args.number_to("DEPTH", 128)?.max(1));
    let plan = SoakPlan {
        count,
        depth: depth as usize,
        seed: args.number("SEED")?,
        blocks: args.number_to("BLOCKS", 1 << 20)?.max(2 * depth),
    };
    let soak = disk.soak(&plan)?;
    let stall = clock::nanoseconds(soak.stall) / 1000;
    Ok(format!("requests={} stall_us={stall}", soak.requests))
}

fn bench(disk: &mut Blk, args: &mut Args) -> Reply {
    let (count, poll) = (args.number_to("N", 100_000)?.max(1), args.has("poll"));
    let sectors = disk.capacity()?;
    let mut ticks = Vec::new();
    for n in 0..count {
        ticks.push(disk.timed_read(n * 8 % sectors.max(1), poll)?);
    }
    ticks.sort_unstable();
    let at = |percent: usize| clock::nanoseconds(ticks[(ticks.len() - 1) * percent / 100]);
    Ok(format!(
        "reads={count} ns_min={} ns_p50={} ns_p99={}",
        at(0),
        at(50),
        at(99)
    ))
}

/// `load DEPTH KIB MS [seq] [poll]`
fn load(disk: &mut Blk, args: &mut Args, arenas: &[Range<u64>]) -> Reply {
    let plan = Plan {
        depth: args.number_to("DEPTH", 1024)?.max(1) as usize,
        bytes: args.number_to("KIB", MAX_SECTORS / 2)? * 1024,
        ms: args.number_to("MS", 3_600_000)?,
        sequential: args.has("seq"),
        poll: args.has("poll"),
    };
    let memory = arenas.iter().max_by_key(|arena| arena.end - arena.start);
    let load = disk.load(&plan, memory.ok_or("no RAM for tests")?)?;
    Ok(format!(
        "requests={} us={} {} kicks={} interrupts={}",
        load.requests,
        clock::nanoseconds(load.ticks) / 1000,
        load.latencies.report(),
        load.kicks,
        load.interrupts
    ))
}
