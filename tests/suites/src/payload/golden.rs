//! Snapshots that were written long ago, by this version or an earlier one: guests go on from them. They are in `tests/golden`.

use super::guest::{Guest, IMAGE, SERIAL, builder, is_arm, number, test_ram};
use super::snapshot::{another, edit, url};
use super::snapshot_cpu::{change, for_emulated_cpus};
use anyhow::{Context as _, Result, ensure};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use std::env;
use std::fs::{self, File};
use std::io::{BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, GOLDEN, Outcome, Test, is_patient};
use triarch_harness::vm::Vm;

/// On emulated hosts, whose CPUs are the same on any machine.
pub const NESTED: &[Test] = &[
    Test::nested("golden::old_snapshots_are_restored", old_ones_are_restored).within(Duration::from_secs(200)),
    Test::nested("golden::a_new_one_is_made_and_restored", a_new_one).within(Duration::from_secs(200)),
];

/// A snapshot in `tests/golden`.
struct Golden {
    /// Where it is: format and architecture.
    place: [&'static str; 2],
    config: &'static [u8],
    state: &'static [u8],
    pages: &'static [u8],
}

macro_rules! golden {
    ($format:literal, $arch:literal) => {
        Golden {
            place: [$format, $arch],
            config: include_bytes!(concat!("../../../golden/", $format, "/", $arch, "/config.json")),
            state: include_bytes!(concat!("../../../golden/", $format, "/", $arch, "/state.json")),
            pages: include_bytes!(concat!("../../../golden/", $format, "/", $arch, "/memory-pages.gz")),
        }
    };
}

/// All there are, by the version of the format.
const ALL: &[Golden] = &[golden!("1", "x86_64"), golden!("1", "aarch64")];

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;
/// Bytes of memory with a pattern: it does not get smaller by compression.
const FILLED: u64 = 64 << 10;
/// Bytes that a memory device has plugged.
const PLUGGED: u64 = 4 * MIB;
const DISK: u64 = MIB;

/// Writes the pages of `memory` that are not all zeroes, each behind its offset, and at the end how many bytes it has.
fn pack(memory: &Path, to: impl Write) -> Result<()> {
    let mut packed = GzEncoder::new(to, Compression::best());
    let mut from = BufReader::with_capacity(1 << 20, File::open(memory)?);
    let mut page = [0; PAGE];
    let mut offset = 0_u64;
    while offset < fs::metadata(memory)?.len() {
        from.read_exact(&mut page)?;
        if page != [0; PAGE] {
            packed.write_all(&offset.to_le_bytes())?;
            packed.write_all(&page)?;
        }
        offset += PAGE as u64;
    }
    packed.write_all(&offset.to_le_bytes())?;
    packed.finish()?.flush()?;
    Ok(())
}

/// Makes `memory` of what [`pack`] wrote.
fn unpack(packed: &[u8], memory: &Path) -> Result<()> {
    let mut bytes = Vec::new();
    GzDecoder::new(packed).read_to_end(&mut bytes)?;
    let to = File::create(memory)?;
    let (records, end) = bytes.as_chunks::<{ 8 + PAGE }>();
    for record in records {
        let (offset, page) = record.split_at(8);
        to.write_all_at(page, u64::from_le_bytes(offset.try_into()?))?;
    }
    Ok(to.set_len(u64::from_le_bytes(end.try_into()?))?)
}

/// The vCPUs that the guest has.
const VCPUS: [&str; 2] = ["0", "1"];

/// Has the snapshot in `directory` name files of `vm`, with a disk; where its serial line is.
fn settle(directory: &Path, vm: &Vm) -> Result<(PathBuf, DiskImage)> {
    let (serial, disk) = (vm.dir().join(SERIAL), vm.dir().join("disk"));
    edit(directory, |config| {
        config["serial"]["socket"] = json!(serial);
        config["disks"][0]["path"] = json!(disk);
        config["vsock"]["socket"] = json!(vm.dir().join("vsock.sock"));
    })?;
    Ok((serial, DiskImage::empty(disk, DISK)?))
}

/// Lets the snapshot in `directory` go on here and sees to it that all of it does.
fn goes_on(context: &Context, directory: &Path) -> Result<()> {
    let (vm, api) = another(context)?;
    let (serial, _disk) = settle(directory, &vm)?;
    for_emulated_cpus(directory)?;
    api.put("vm.restore", Some(&url("source_url", directory).to_string()))?;
    let mut guest = Guest::attach_restored(vm, &serial)?;
    guest.vm().resume()?;
    guest.ask(&format!("mem verify {} {FILLED} 5", test_ram()))?;
    let room = number(&guest.ask("vmem 0 info")?, "addr")?;
    guest.ask(&format!("mem verify {room} {FILLED} 6"))?;
    guest.ask(&format!("vmem 0 wait {PLUGGED} 2000"))?;
    guest.ask("blk 0 write 100 64 8")?;
    guest.ask("blk 0 verify 100 64 8")?;
    ensure!(number(&guest.ask("ipi 20")?, "sent")? == 20);
    ensure!(number(&guest.ask("vsock info")?, "cid")? == 42);
    guest.ask("rng 64")?;
    guest.ask("balloon sizes")?;
    api.put("vm.resize", Some(&json!({ "desired_vcpus": 3 }).to_string()))?;
    guest.ask("hot serve 1 4000")?;
    guest.ask("hot ping 2")?;
    guest.power_off()?;
    Ok(())
}

fn old_ones_are_restored(context: &Context) -> Result<Outcome> {
    if !is_patient() {
        return Ok(Outcome::Skipped("they were saved on the CPUs of emulated hosts".into()));
    }
    let ours = || ALL.iter().filter(|golden| golden.place[1] == env::consts::ARCH);
    ensure!(ours().count() > 0, "there is none for {}", env::consts::ARCH);
    for golden in ours() {
        let name = golden.place.join("/");
        let kept = tempfile::tempdir_in(&context.dir)?;
        let directory = kept.path();
        fs::write(directory.join("config.json"), golden.config)?;
        fs::write(directory.join("state.json"), golden.state)?;
        unpack(golden.pages, &directory.join("memory-ranges"))?;
        let (vm, api) = another(context)?;
        let host = api.get("vmm.cpu-features")?;
        if !is_arm() && host["host"]["vendor"] != "AuthenticAMD" {
            let (_, _disk) = settle(directory, &vm)?;
            api.refused("vm.restore", &url("source_url", directory), 400, &["vendor"])?;
            continue;
        }
        goes_on(context, directory).with_context(|| format!("tests/golden/{name}"))?;
    }
    Ok(Outcome::Passed)
}

/// Makes one that goes on as the old ones do; kept where [`GOLDEN`] says.
fn a_new_one(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let disk = DiskImage::empty(kept.path().join("disk"), DISK)?;
    let vsock = kept.path().join("vsock.sock");
    let vm = builder(context)?
        .set("--cpus", "boot=2,max=3")
        .set("--memory", "size=32M,hotplug_method=virtio-mem,hotplug_size=64M")
        .disk(disk.path(), "num_queues=2")
        .flag("--vsock", format!("cid=42,socket={}", vsock.display()))
        .flag("--rng", "src=/dev/urandom")
        .flag("--balloon", "size=0");
    let mut guest = Guest::start(vm.api())?;
    let api = guest.vm().api()?.clone();
    for command in ["cpus", "blk 0 init queues=2", "vsock info", "rng 16", "balloon sizes"] {
        guest.ask(command)?;
    }
    let room = number(&guest.ask("vmem 0 info")?, "addr")?;
    let more = json!({ "desired_ram": 32 * MIB + PLUGGED });
    api.put("vm.resize", Some(&more.to_string()))?;
    guest.ask(&format!("vmem 0 wait {PLUGGED} 2000"))?;
    guest.ask(&format!("vmem 0 reach {PLUGGED}"))?;
    guest.ask(&format!("mem fill {} {FILLED} 5", test_ram()))?;
    guest.ask(&format!("mem fill {room} {FILLED} 6"))?;
    guest.vm().pause()?;
    let directory = kept.path().join("snapshot");
    api.put("vm.snapshot", Some(&url("destination_url", &directory).to_string()))?;
    drop(guest);
    // Not what is of this machine: where its files are, and how fast its counter is, which emulated CPUs have as well.
    edit(&directory, |config| {
        config["payload"]["kernel"] = json!(IMAGE);
        config["serial"]["socket"] = json!(SERIAL);
        config["disks"][0]["path"] = json!("disk");
        config["vsock"]["socket"] = json!("vsock.sock");
    })?;
    if !is_arm() {
        for id in VCPUS {
            change(&directory, ["vcpu", id], |vcpu| {
                vcpu["tsc"]["khz"] = Value::Null;
                Ok(())
            })?;
        }
    }
    let pages = directory.join("memory-pages.gz");
    pack(&directory.join("memory-ranges"), File::create(&pages)?)?;
    let packed = fs::read(&pages)?;
    ensure!(
        packed.len() < 512 << 10,
        "it has {} bytes, too many to be kept",
        packed.len()
    );
    if let Some(to) = env::var_os(GOLDEN) {
        fs::create_dir_all(&to)?;
        for name in ["config.json", "state.json", "memory-pages.gz"] {
            fs::copy(directory.join(name), Path::new(&to).join(name))?;
        }
    }
    fs::remove_file(directory.join("memory-ranges"))?;
    fs::remove_file(pages)?;
    unpack(&packed, &directory.join("memory-ranges"))?;
    goes_on(context, &directory)?;
    Ok(Outcome::Passed)
}
