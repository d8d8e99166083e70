//! What the VMM counts is what the guest did.

use super::data::pattern;
use super::guest::{Guest, builder};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};
use triarch_harness::disk::DiskImage;
use triarch_harness::net::{self, Tap};
use triarch_harness::suite::{Context, Outcome};
use triarch_harness::vsock;

payload_tests!("metrics":
    counts_disk_operations,
    counts_queues_apart,
    counts_packets,
    counts_streams,
    tells_of_vcpus_and_memory,
    goes_with_the_guest,
);

const SIZE: u64 = 8 << 20;

/// Every sample at one time, by the text before its value.
struct Sample(BTreeMap<String, f64>);

impl Sample {
    fn of(guest: &Guest) -> Result<Self> {
        let answer = guest.vm().api()?.request("GET", "metrics", None)?;
        ensure!(answer.status == 200, "{}: {}", answer.status, answer.body);
        let lines = answer.body.lines().filter(|line| !line.starts_with('#'));
        let parse = |line: &str| {
            let (name, value) = line.rsplit_once(' ').with_context(|| format!("`{line}`"))?;
            Ok((name.to_owned(), value.parse().with_context(|| line.to_owned())?))
        };
        Ok(Self(lines.map(parse).collect::<Result<_>>()?))
    }

    /// Value of the sample that is written so.
    fn get(&self, name: &str) -> Result<f64> {
        self.0.get(name).copied().with_context(|| format!("no {name}"))
    }

    /// Value of a sample of the disk `_disk0`; `more` are the labels behind the queue.
    fn disk(&self, name: &str, queue: u32, more: &str) -> Result<f64> {
        self.get(&format!(
            "triarch_disk_{name}{{disk=\"_disk0\",queue=\"{queue}\"{more}}}"
        ))
    }

    /// Value of a sample of the interface `_net0`.
    fn nic(&self, name: &str, direction: &str) -> Result<f64> {
        let labels = format!("nic=\"_net0\",queue=\"0\",direction=\"{direction}\"");
        self.get(&format!("triarch_nic_{name}_total{{{labels}}}"))
    }

    fn exits(&self, vcpu: u32, reason: &str) -> Result<f64> {
        let name = format!("triarch_vcpu_exits_total{{vcpu=\"{vcpu}\",reason=\"{reason}\"}}");
        self.get(&name)
    }
}

/// Reads until `done`; counters follow the guest's answer by the time that a thread takes to go on.
fn eventually(guest: &Guest, what: &str, done: impl Fn(&Sample) -> Result<bool>) -> Result<Sample> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let sample = Sample::of(guest)?;
        if done(&sample)? {
            return Ok(sample);
        }
        ensure!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn start(context: &Context, options: &str) -> Result<Guest> {
    let vm = builder(context)?.api();
    let disk = DiskImage::with(vm.dir().join("disk"), &pattern(1, 0, SIZE as usize))?;
    Guest::start(vm.disk(disk.path(), options))
}

/// The `vm.counters` of a device.
fn counters(guest: &Guest, id: &str) -> Result<serde_json::Value> {
    let answer = guest.vm().api()?.request("GET", "vm.counters", None)?;
    ensure!(answer.status == 200, "{}: {}", answer.status, answer.body);
    let all: serde_json::Value = serde_json::from_str(&answer.body)?;
    Ok(all[id].clone())
}

fn counts_disk_operations(context: &Context) -> Result<Outcome> {
    let mut guest = start(context, "")?;
    guest.ask("blk 0 init")?;
    for (command, times) in [
        ("write 0 8 2", 3),
        ("verify 0 8 2", 5),
        ("read 100 3", 1),
        ("flush", 2),
        ("discard 0 16", 1),
        ("zeroes 16 8", 4),
    ] {
        for _ in 0..times {
            guest.ask(&format!("blk 0 {command}"))?;
        }
    }
    guest.refused(&format!("blk 0 read {} 1", SIZE / 512))?;
    let sample = Sample::of(&guest)?;
    for (operation, count, bytes) in [
        ("read", 6, 5 * 4096 + 3 * 512),
        ("write", 3, 3 * 4096),
        ("flush", 2, 0),
        ("discard", 1, 16 * 512),
        ("write_zeroes", 4, 4 * 8 * 512),
    ] {
        let label = format!(",operation=\"{operation}\"");
        let counted = sample.disk("operations_total", 0, &label)?;
        ensure!(counted == f64::from(count), "{operation}: {counted}");
        let timed = sample.disk("operation_seconds_count", 0, &label)?;
        ensure!(timed == f64::from(count), "{operation} timed: {timed}");
        ensure!(
            sample.disk("operation_seconds_sum", 0, &label)? > 0.0,
            "{operation} takes no time"
        );
        if operation != "flush" {
            let moved = sample.disk("bytes_total", 0, &label)?;
            ensure!(moved == f64::from(bytes), "{operation}: {moved} bytes");
        }
    }
    ensure!(sample.disk("errors_total", 0, "")? == 1.0);
    ensure!(sample.disk("in_flight", 0, "")? == 0.0);
    let counters = counters(&guest, "_disk0")?;
    ensure!(counters["read_ops"] == 6 && counters["write_ops"] == 3, "{counters}");
    ensure!(counters["read_bytes"] == 5 * 4096 + 3 * 512, "{counters}");
    let latency = |name: &str| counters[name].as_u64().unwrap_or_default();
    ensure!(
        latency("read_latency_max") >= latency("read_latency_avg")
            && latency("read_latency_avg") >= latency("read_latency_min"),
        "{counters}"
    );
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn counts_queues_apart(context: &Context) -> Result<Outcome> {
    let mut guest = start(context, "num_queues=3")?;
    guest.ask("blk 0 init queues=3")?;
    // Queues take turns: 67, 67 and 66 blocks of 4 KiB, written and read.
    guest.ask("blk 0 stress 200 16 5")?;
    let sample = Sample::of(&guest)?;
    for (queue, count) in [(0, 67), (1, 67), (2, 66)] {
        for operation in [",operation=\"read\"", ",operation=\"write\""] {
            let counted = sample.disk("operations_total", queue, operation)?;
            ensure!(counted == f64::from(count), "queue {queue}, {operation}: {counted}");
            let moved = sample.disk("bytes_total", queue, operation)?;
            ensure!(moved == f64::from(count * 4096), "queue {queue}, {operation}: {moved}");
        }
    }
    ensure!(counters(&guest, "_disk0")?["write_ops"] == 200);
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// Packets and bytes the interface gave to the guest, by the host's count.
fn given_by_host() -> Result<(f64, f64)> {
    let table = fs::read_to_string("/proc/thread-self/net/dev")?;
    let line = table.lines().find_map(|line| line.trim().strip_prefix("tap0:"));
    let numbers: Vec<f64> = line
        .context("no tap0")?
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    Ok((numbers[9], numbers[8]))
}

fn counts_packets(context: &Context) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let host = Ipv4Addr::new(10, 9, 8, 1);
    let tap = Tap::create("tap0", host, Ipv4Addr::new(255, 255, 255, 0), false)?;
    let vm = builder(context)?.api().flag("--net", format!("tap={}", tap.name()));
    let mut guest = Guest::start(vm)?;
    guest.ask("net 0 init")?;
    guest.ask("net 0 send 200 1 30")?;
    let sample = eventually(&guest, "30 packets are not counted", |sample| {
        Ok(sample.nic("packets", "transmit")? >= 30.0)
    })?;
    ensure!(sample.nic("packets", "transmit")? == 30.0);
    ensure!(sample.nic("bytes", "transmit")? == 30.0 * 214.0);
    ensure!(sample.nic("dropped", "transmit")? == 0.0);
    guest.ask(&format!("net 0 ping 10.9.8.2 {host} 10"))?;
    // Besides the answers the host sends packets of its own accord; its count has them, too.
    eventually(
        &guest,
        "the host gave the guest other packets than those counted",
        |sample| {
            let counted = (sample.nic("packets", "receive")?, sample.nic("bytes", "receive")?);
            Ok(counted == given_by_host()? && counted.0 > 10.0)
        },
    )?;
    let counters = counters(&guest, "_net0")?;
    ensure!(counters["tx_frames"] == 41, "{counters}");
    // A reset makes the device anew; what went through the interface stays counted.
    guest.vm().api()?.put("vm.reboot", None)?;
    guest.wait_ready()?;
    guest.ask("net 0 init")?;
    guest.ask("net 0 send 200 1 3")?;
    eventually(&guest, "3 packets are not counted after a reset", |sample| {
        Ok(sample.nic("packets", "transmit")? == 44.0)
    })?;
    // The host refuses to cut packets into segments of nothing. The question for its address goes through each time.
    for _ in 0..7 {
        guest.ask(&format!("net 0 tso 10.9.8.2 {host} 9 4000 1 0"))?;
    }
    let sample = eventually(&guest, "7 lost packets are not counted", |sample| {
        Ok(sample.nic("dropped", "transmit")? == 7.0)
    })?;
    ensure!(sample.nic("packets", "transmit")? == 51.0);
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn counts_streams(context: &Context) -> Result<Outcome> {
    const BYTES: u64 = 50_000;
    let vm = builder(context)?.api();
    let socket = vm.dir().join("vsock.sock");
    let mut guest = Guest::start(vm.flag("--vsock", format!("cid=42,socket={}", socket.display())))?;
    guest.ask("vsock init")?;
    let listener = vsock::listen(&socket, 52)?;
    let host = std::thread::spawn(move || -> std::io::Result<u64> {
        let (mut stream, _) = listener.accept()?;
        let mut copy = stream.try_clone()?;
        std::io::copy(&mut stream, &mut copy)
    });
    guest.ask(&format!("vsock echo 52 {BYTES} 7"))?;
    let carried = host.join().ok().context("the host's side panicked")??;
    ensure!(carried == BYTES, "{carried} bytes");
    let id = "vsock=\"_vsock0\"";
    let sample = eventually(&guest, "the stream is not counted", |sample| {
        Ok(sample.get(&format!("triarch_vsock_connections{{{id}}}"))? == 0.0)
    })?;
    for direction in ["receive", "transmit"] {
        let bytes = sample.get(&format!("triarch_vsock_bytes_total{{{id},direction=\"{direction}\"}}"))?;
        ensure!(bytes == BYTES as f64, "{direction}: {bytes}");
    }
    for (result, count) in [("opened", 1.0), ("refused", 0.0)] {
        let name = format!("triarch_vsock_connections_total{{{id},result=\"{result}\"}}");
        ensure!(sample.get(&name)? == count, "{name}");
    }
    Ok(Outcome::Passed)
}

fn tells_of_vcpus_and_memory(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.api().cpus(2))?;
    let before = Sample::of(&guest)?;
    let writes = 50;
    for _ in 0..writes {
        guest.ask("hello")?;
    }
    let after = Sample::of(&guest)?;
    // Each answer is at least "ok" and the end of the line, a byte a write to the serial port, which is memory on ARM.
    let written = |sample: &Sample| anyhow::Ok(sample.exits(0, "port_write")? + sample.exits(0, "mmio_write")?);
    let more = written(&after)? - written(&before)?;
    ensure!(more >= f64::from(writes * 3), "{more} writes");
    ensure!(after.exits(1, "failed")? == 0.0);
    let times: Vec<_> = ["user", "system", "guest"]
        .iter()
        .map(|mode| after.get(&format!("triarch_vcpu_seconds_total{{vcpu=\"1\",mode=\"{mode}\"}}")))
        .collect::<Result<_>>()?;
    ensure!(times.iter().all(|time| (0.0..60.0).contains(time)), "{times:?}");
    let waited = after.get("triarch_vcpu_wait_seconds_total{vcpu=\"0\"}")?;
    ensure!((0.0..60.0).contains(&waited), "{waited}");
    ensure!(after.get("triarch_memory_size_bytes")? == 64.0 * 1024.0 * 1024.0);
    let resident = after.get("triarch_memory_resident_bytes")?;
    ensure!((65536.0..80e6).contains(&resident), "{resident}");
    ensure!(after.get("triarch_vm_state{state=\"Running\"}")? == 1.0);
    // Main, API, two vCPUs, and those of the devices.
    ensure!(after.get("triarch_process_threads")? >= 4.0);
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn goes_with_the_guest(context: &Context) -> Result<Outcome> {
    let mut guest = start(context, "")?;
    guest.ask("blk 0 init")?;
    guest.ask("blk 0 write 0 8 2")?;
    let api = guest.vm().api()?.clone();
    let writes = |guest: &Guest| Sample::of(guest)?.disk("operations_total", 0, ",operation=\"write\"");
    ensure!(writes(&guest)? == 1.0);
    // A reset ends the vCPUs, not the disk.
    api.put("vm.reboot", None)?;
    guest.wait_ready()?;
    guest.ask("blk 0 init")?;
    guest.ask("blk 0 write 0 8 2")?;
    ensure!(writes(&guest)? == 2.0);
    api.put("vm.pause", None)?;
    ensure!(writes(&guest)? == 2.0, "not while paused");
    api.put("vm.shutdown", None)?;
    let sample = Sample::of(&guest)?;
    ensure!(!sample.0.keys().any(|name| name.starts_with("triarch_disk")));
    ensure!(sample.get("triarch_vm_state{state=\"Shutdown\"}")? == 1.0);
    let answer = api.request("GET", "vm.counters", None)?;
    ensure!((answer.status, answer.body.as_str()) == (200, "{}"), "{answer:?}");
    api.put("vm.delete", None)?;
    ensure!(api.request("GET", "vm.counters", None)?.status == 404);
    Ok(Outcome::Passed)
}
