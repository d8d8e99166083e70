//! A guest moves to another VMM while it works, whatever the connection is.

mod check;
mod daemons;
mod ends;
mod interfaces;
mod kills;
mod limits;
mod local;
mod post_copy;
mod refusals;
pub(crate) mod tls;

use super::data::crc32;
use super::guest::{Guest, SERIAL, builder, number, test_ram};
use super::payload_tests;
use super::snapshot::same_machine;
use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::disk::DiskImage;
use triarch_harness::jobs::wait;
use triarch_harness::suite::{Context, Outcome, Test, patient};
use triarch_harness::vm::{Vm, VmBuilder};

payload_tests!("migration":
    goes_on_by_every_connection,
    a_guest_that_writes_is_moved,
    what_came_while_it_ran_is_there,
    memory_that_was_given_back_is_empty,
    shared_memory_is_moved,
    a_paused_guest_arrives_paused,
);

/// All tests of migrations.
pub fn tests() -> Vec<Test> {
    [
        TESTS,
        check::TESTS,
        daemons::TESTS,
        ends::TESTS,
        interfaces::TESTS,
        &kills::ALL,
        &limits::ALL,
        &local::ALL,
        &post_copy::ALL,
        refusals::TESTS,
        tls::TESTS,
    ]
    .concat()
}

const MIB: u64 = 1 << 20;
const SECTORS: u64 = 16 * MIB / 512;
/// How long a migration may take.
const MOVE: Duration = Duration::from_secs(60);

/// A VMM that waits for a guest.
struct Waiting {
    vm: Vm,
    /// Where it waits.
    address: String,
    received: JoinHandle<Result<String>>,
}

impl Waiting {
    /// Starts one that waits at `url`; `more` is what else its request has.
    fn start(context: &Context, url: &str, more: &Value) -> Result<Self> {
        let vm = VmBuilder::new(context)?.api().start()?;
        Self::on(vm, url, more)
    }

    /// The same of a VMM that is there.
    fn on(vm: Vm, url: &str, more: &Value) -> Result<Self> {
        let api = vm.api()?.clone();
        let url = match url {
            "unix" => format!("unix:{}", vm.dir().join("move.sock").display()),
            url => url.to_owned(),
        };
        let mut body = json!({ "receiver_url": url, "config": { "serial": { "socket": vm.dir().join(SERIAL) } } });
        lay(&mut body, more);
        let before = listening(&api)?.len();
        let (theirs, text) = (api.within(patient(2 * MOVE)), body.to_string());
        let received = thread::spawn(move || theirs.put("vm.receive-migration", Some(&text)));
        let address = wait("nobody listens", patient(Duration::from_secs(10)), || {
            if received.is_finished() {
                return Err(anyhow!("it does not wait: {}", vm.last_words()));
            }
            Ok(listening(&api)?.get(before).cloned())
        });
        match address {
            Ok(address) => Ok(Self { vm, address, received }),
            Err(error) if received.is_finished() => match received.join() {
                Ok(Err(refused)) => Err(refused),
                _ => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    fn api(&self) -> Result<&Api> {
        self.vm.api()
    }

    /// The guest that came, which was `source`.
    fn guest(self, source: Guest) -> Result<Guest> {
        self.came()?;
        let serial = self.vm.dir().join(SERIAL);
        joined(self.received)?;
        Guest::attach_moved(self.vm, &serial, source.rest())
    }

    fn came(&self) -> Result<()> {
        let limit = patient(Duration::from_secs(10));
        wait("the request is not answered", limit, || {
            Ok(self.received.is_finished().then_some(()))
        })
    }

    /// Waits for the answer, also of one that waits for a source which may ask what became of the guest.
    fn answered(&self) -> Result<()> {
        wait("the request is not answered", patient(2 * MOVE), || {
            Ok(self.received.is_finished().then_some(()))
        })
    }

    /// As [`Waiting::failed`], also where the source gave up before it was here: then somebody has to say that none will come.
    fn given_up(self) -> Result<()> {
        wait("the request is not answered", patient(2 * MOVE), || {
            let api = self.api()?;
            if self.received.is_finished() {
                return Ok(Some(()));
            }
            let found = api.request("GET", "vm.migration-progress", None)?;
            if found.is_success() && found.body.contains("\"connecting\"") {
                api.request("PUT", "vm.cancel-migration", None)?;
            }
            Ok(None)
        })?;
        self.failed().map(drop)
    }

    /// Why none came, and the VMM, which has no VM.
    fn failed(self) -> Result<(Vm, String)> {
        self.answered()?;
        let error = joined(self.received).err().context("a guest came")?;
        let info = self.vm.api()?.request("GET", "vm.info", None)?;
        ensure!(info.status == 404, "there is a VM: {}", info.body);
        Ok((self.vm, format!("{error:#}")))
    }
}

fn joined(thread: JoinHandle<Result<String>>) -> Result<String> {
    thread.join().map_err(|_| anyhow!("the client's thread panicked"))?
}

/// Lays the fields of `more` over those of `body`.
fn lay(body: &mut Value, more: &Value) {
    for (name, value) in more.as_object().into_iter().flatten() {
        match body[name].is_object() && value.is_object() {
            true => lay(&mut body[name], value),
            false => body[name] = value.clone(),
        }
    }
}

/// Events of migrations, so far.
fn events(api: &Api, event: &str) -> Result<Vec<Value>> {
    let all = api.get("vm.events?since=0&follow=false")?;
    let all = all.as_array().context("no events")?.iter();
    let named = |found: &&Value| found["source"] == "migration" && found["event"] == event;
    Ok(all.filter(named).cloned().collect())
}

/// Where the VMM listened so far.
fn listening(api: &Api) -> Result<Vec<String>> {
    let address = |event: &Value| event["properties"]["address"].as_str().map(ToOwned::to_owned);
    Ok(events(api, "listening")?.iter().filter_map(address).collect())
}

fn to(address: &str, more: &Value) -> Value {
    let mut body = json!({ "destination_url": address });
    lay(&mut body, more);
    body
}

/// Moves the guest there; `more` is what else the request has.
fn send(guest: &Guest, waiting: &Waiting, more: &Value) -> Result<()> {
    let api = guest.vm().api()?.within(patient(MOVE));
    api.put("vm.send-migration", Some(&to(&waiting.address, more).to_string()))?;
    // It is there no more.
    let info = api.request("GET", "vm.info", None)?;
    ensure!(info.status == 404, "the source has a VM: {}", info.body);
    Ok(())
}

/// Begins to move it, on a thread.
fn begin(guest: &Guest, address: &str, more: &Value) -> Result<JoinHandle<Result<String>>> {
    let api = guest.vm().api()?.within(patient(2 * MOVE));
    let body = to(address, more).to_string();
    Ok(thread::spawn(move || api.put("vm.send-migration", Some(&body))))
}

/// How far the migration is.
fn progress(api: &Api) -> Result<Value> {
    api.get("vm.migration-progress")
}

/// Waits until the guest's memory is being copied.
fn copying(api: &Api) -> Result<()> {
    wait("memory is not copied", patient(Duration::from_secs(10)), || {
        let answer = api.request("GET", "vm.migration-progress", None)?;
        if !answer.is_success() {
            return Ok(None);
        }
        let found: Value = serde_json::from_str(&answer.body)?;
        Ok((found["phase"] == "copying").then_some(()))
    })
}

/// Moves the guest to a VMM of its own and ends the source.
fn moved(context: &Context, guest: Guest, url: &str, receive: &Value, more: &Value) -> Result<Guest> {
    let waiting = Waiting::start(context, url, receive)?;
    send(&guest, &waiting, more)?;
    let source = guest.vm().api()?;
    let last = progress(source)?;
    ensure!(last["phase"] == "done" && last["downtime_ms"].is_u64(), "{last}");
    let jobs = source.ended("vm.send-migration", patient(MOVE))?;
    ensure!(jobs["state"] == "done", "{jobs}");
    let arrived = waiting.guest(guest)?;
    let info = arrived.vm().api()?.get("vm.info")?;
    ensure!(
        info["state"] == "Running" || info["state"] == "Paused",
        "{}",
        info["state"]
    );
    Ok(arrived)
}

/// A guest with a disk, whose image is in `kept`, anew.
fn with_disk(context: &Context, kept: &Path) -> Result<(VmBuilder, PathBuf)> {
    let path = kept.join("disk");
    let _ = fs::remove_file(&path);
    let disk = DiskImage::empty(&path, SECTORS * 512)?;
    Ok((builder(context)?.disk(disk.path(), "num_queues=1").api(), path))
}

fn goes_on_by_every_connection(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let authority = tls::Authority::new()?;
    let (vm, _) = with_disk(context, kept.path())?;
    let vm = vm
        .cpus(2)
        .flag(
            "--vsock",
            format!("cid=42,socket={}", kept.path().join("vsock0").display()),
        )
        .flag("--balloon", "size=0");
    let mut guest = Guest::start(vm)?;
    guest.ask("cpus")?;
    guest.ask("vsock info")?;
    let ram = test_ram();
    guest.ask(&format!("mem fill {ram} {} 5", 4 * MIB))?;
    guest.ask("blk 0 write 20000 64 7")?;
    let first = guest.vm().api()?.get("vm.info")?;
    let secret = authority.pair("source.test", "destination.test")?;
    let ways = [
        ("unix", json!({}), json!({})),
        ("tcp-plain:127.0.0.1:0", json!({}), json!({ "connections": 4 })),
        (
            "tcp:127.0.0.1:0",
            json!({ "tls": secret.destination }),
            json!({ "tls": secret.source, "connections": 2, "compress": true }),
        ),
    ];
    for (at, (url, receive, more)) in ways.into_iter().enumerate() {
        // It is moved in the middle of its work, which it ends in another process, and answers there.
        guest.send("blk 0 soak 3000 16 9 2000")?;
        let mut receive = receive;
        lay(
            &mut receive,
            &json!({ "config": { "vsock": { "socket": kept.path().join(format!("vsock{}", at + 1)) } } }),
        );
        guest = moved(context, guest, url, &receive, &more).with_context(|| url.to_owned())?;
        let answer = guest.answer()?;
        ensure!(number(&answer, "requests")? >= 3000, "{answer}");
        guest.ask(&format!("mem verify {ram} {} 5", 4 * MIB))?;
        guest.ask("blk 0 verify 20000 64 7")?;
        let sent = guest.ask("ipi 20")?;
        ensure!(number(&sent, "sent")? == 20, "{sent}");
        guest.ask("sleep 5")?;
        ensure!(number(&guest.ask("vsock info")?, "cid")? == 42);
        let info = guest.vm().api()?.get("vm.info")?;
        ensure!(info["device_tree"] == first["device_tree"], "{}", info["device_tree"]);
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_guest_that_writes_is_moved(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.set("--memory", "size=256M").api())?;
    let ram = test_ram();
    guest.ask(&format!("mem fill {} {MIB} 3", ram + 200 * MIB))?;
    for round in 0..2 {
        // 128 MiB, of which 40 MiB a second are written.
        guest.send("dirty 32768 10000 0")?;
        thread::sleep(Duration::from_millis(100));
        let receive = json!({});
        guest = moved(context, guest, "unix", &receive, &json!({ "connections": 2 }))?;
        guest.send("")?;
        let answer = guest.answer()?;
        let (start, pages) = (number(&answer, "start")?, number(&answer, "pages")?);
        ensure!(pages > 500, "round {round}: {answer}");
        // It counted up the first word of each page, round and round: all of them are as often, or once less.
        let words = guest.ask(&format!("mem checksum {start} 4096"))?;
        ensure!(number(&words, "crc32")? != u64::from(crc32(&[0; 4096])), "{words}");
        guest.ask(&format!("mem verify {} {MIB} 3", ram + 200 * MIB))?;
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn what_came_while_it_ran_is_there(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let vm = builder(context)?
        .set("--cpus", "boot=1,max=3")
        .set("--memory", "size=64M,hotplug_method=virtio-mem,hotplug_size=1G");
    let mut guest = Guest::start(vm.api())?;
    let api = guest.vm().api()?.clone();
    let room = number(&guest.ask("vmem 0 info")?, "addr")?;
    api.put("vm.resize", Some(&json!({ "desired_vcpus": 2 }).to_string()))?;
    guest.ask("hot serve 1 2000")?;
    let more = json!({ "desired_ram": 80 * MIB, "desired_vcpus": 2 });
    api.put("vm.resize", Some(&more.to_string()))?;
    guest.ask(&format!("vmem 0 wait {} 2000", 16 * MIB))?;
    guest.ask(&format!("vmem 0 reach {}", 16 * MIB))?;
    guest.ask(&format!("mem fill {room} {} 3", 16 * MIB))?;
    let disk = DiskImage::empty(kept.path().join("disk"), SECTORS * 512)?;
    let late = json!({ "path": disk.path(), "id": "late" });
    api.put("vm.add-disk", Some(&late.to_string()))?;
    guest.ask("slots serve 1 2000")?;
    guest.ask("blk 0 write 0 64 4")?;
    let before = api.get("vm.info")?;
    let mut guest = moved(context, guest, "unix", &json!({}), &json!({}))?;
    let api = guest.vm().api()?.clone();
    let after = api.get("vm.info")?;
    same_machine(&before, &after)?;
    guest.ask(&format!("mem verify {room} {} 3", 16 * MIB))?;
    guest.ask("blk 0 verify 0 64 4")?;
    guest.ask("hot ping 1")?;
    // All of it goes on: the disk goes, another processor comes.
    api.put("vm.remove-device", Some(&json!({ "id": "late" }).to_string()))?;
    guest.ask("slots serve 1 2000")?;
    let job = api.ended("vm.remove-device", patient(Duration::from_secs(5)))?;
    ensure!(job["state"] == "done", "{job}");
    api.put("vm.resize", Some(&json!({ "desired_vcpus": 3 }).to_string()))?;
    guest.ask("hot serve 1 2000")?;
    guest.ask("hot ping 2")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// A guest whose virtio-mem device at `room` has 16 MiB with a pattern.
fn with_room(context: &Context) -> Result<(Guest, u64)> {
    let vm = builder(context)?.set("--memory", "size=64M,hotplug_method=virtio-mem,hotplug_size=256M");
    let mut guest = Guest::start(vm.api())?;
    let room = number(&guest.ask("vmem 0 info")?, "addr")?;
    let more = json!({ "desired_ram": 80 * MIB }).to_string();
    guest.vm().api()?.put("vm.resize", Some(&more))?;
    guest.ask(&format!("vmem 0 wait {} 2000", 16 * MIB))?;
    guest.ask(&format!("vmem 0 reach {}", 16 * MIB))?;
    guest.ask(&format!("mem fill {room} {} 3", 16 * MIB))?;
    Ok((guest, room))
}

/// It gives back all of them but 2 MiB, and takes as many new ones.
fn changes_its_room(guest: &mut Guest) -> Result<()> {
    guest.ask(&format!("vmem 0 reach {}", 2 * MIB))?;
    guest.ask(&format!("vmem 0 reach {}", 16 * MIB)).map(drop)
}

/// What it kept is there, and what it gave back is empty.
fn room_was_changed(guest: &mut Guest, room: u64) -> Result<()> {
    guest.ask(&format!("mem verify {room} {} 3", 2 * MIB))?;
    let sum = guest.ask(&format!("mem checksum {} {}", room + 2 * MIB, 14 * MIB))?;
    let zeroes = crc32(&vec![0; 14 * MIB as usize]);
    ensure!(number(&sum, "crc32")? == u64::from(zeroes), "{sum}, not {zeroes:#x}");
    Ok(())
}

fn memory_that_was_given_back_is_empty(context: &Context) -> Result<Outcome> {
    let (mut guest, room) = with_room(context)?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    // So slowly that all of this is in the log.
    let sending = begin(&guest, &waiting.address, &json!({ "bandwidth": 8 * MIB }))?;
    copying(guest.vm().api()?)?;
    changes_its_room(&mut guest)?;
    guest
        .vm()
        .api()?
        .put("vm.set-migration", Some(&json!({ "bandwidth": 0 }).to_string()))?;
    joined(sending)?;
    let mut guest = waiting.guest(guest)?;
    room_was_changed(&mut guest, room)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn shared_memory_is_moved(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?.set("--memory", "size=512M,shared=on");
    let mut guest = Guest::start(vm.api())?;
    let ram = test_ram();
    guest.ask(&format!("mem fill {ram} {} 5", 8 * MIB))?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    send(&guest, &waiting, &json!({}))?;
    // What the guest never touched is not sent.
    let last = progress(guest.vm().api()?)?;
    let sent = last["wire_bytes"].as_u64().context("no figure")?;
    ensure!((8 * MIB..32 * MIB).contains(&sent), "{last}");
    let mut guest = waiting.guest(guest)?;
    guest.ask(&format!("mem verify {ram} {} 5", 8 * MIB))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_paused_guest_arrives_paused(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.api())?;
    guest.ask(&format!("mem fill {} {MIB} 5", test_ram()))?;
    guest.vm().pause()?;
    let mut guest = moved(context, guest, "unix", &json!({}), &json!({}))?;
    let state = guest.vm().api()?.get("vm.info")?["state"].clone();
    ensure!(state == "Paused", "{state}");
    guest.vm().resume()?;
    guest.ask(&format!("mem verify {} {MIB} 5", test_ram()))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
