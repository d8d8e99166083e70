//! Guests that run at the destination before all of their memory is there.

use super::super::guest::{Guest, SERIAL, builder, number, test_ram};
use super::super::payload_tests;
use super::{
    MIB, Waiting, begin, changes_its_room, copying, events, joined, lay, progress, room_was_changed, to, with_room,
};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::jobs::wait;
use triarch_harness::suite::{Context, Outcome, Test, patient};

payload_tests!("migration::post_copy":
    what_does_not_converge_ends_in_post_copy,
    memory_comes_when_it_is_touched,
    memory_given_back_meanwhile_is_empty,
    a_connection_that_is_cut_is_made_anew,
    a_destination_that_dies_loses_the_guest,
    a_vmm_whose_guest_waits_for_memory_ends_when_told,
    who_did_not_allow_it_is_refused,
);

const LIMIT: Duration = Duration::from_secs(30);

/// Waits until both of its ends say that.
fn phase(api: &Api, phase: &str) -> Result<Value> {
    let mut last = Value::Null;
    let found = wait(&format!("it never was in {phase}"), patient(LIMIT), || {
        last = progress(api)?;
        Ok((last["phase"] == phase).then(|| last.clone()))
    });
    found.with_context(|| format!("{last}"))
}

fn allowed(more: &Value) -> Value {
    let mut body = json!({ "post_copy": true, "downtime_ms": 1 });
    lay(&mut body, more);
    body
}

fn switch(api: &Api) -> Result<()> {
    api.put("vm.set-migration", Some(&json!({ "post_copy": true }).to_string()))?;
    phase(api, "post-copy").map(drop)
}

fn uncapped(api: &Api) -> Result<()> {
    api.put("vm.set-migration", Some(&json!({ "bandwidth": 0 }).to_string()))
        .map(drop)
}

/// The guest, as long as its memory still comes.
fn early(waiting: Waiting) -> Result<(Guest, JoinHandle<Result<String>>)> {
    let serial = waiting.vm.dir().join(SERIAL);
    let Waiting { vm, received, .. } = waiting;
    Ok((Guest::attach_moved(vm, &serial, Vec::new())?, received))
}

fn what_does_not_converge_ends_in_post_copy(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.set("--memory", "size=256M").cpus(2).api())?;
    let ram = test_ram();
    guest.ask(&format!("mem fill {} {} 3", ram + 160 * MIB, 4 * MIB))?;
    guest.send("dirty 8192 0 0")?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    let (here, there) = (guest.vm().api()?.clone(), waiting.api()?.clone());
    // 32 MiB are written again and again, of which a twentieth goes in the time that the guest may stand still.
    let slowly = json!({ "bandwidth": 16 * MIB, "downtime_ms": 100, "timeout_s": 3, "timeout_strategy": "PostCopy" });
    joined(begin(&guest, &waiting.address, &allowed(&slowly))?)?;
    let last = progress(&here)?;
    ensure!(last["phase"] == "done" && last["remaining"] == 0, "{last}");
    ensure!(last["rounds"].as_u64() > Some(1), "it was not tried before: {last}");
    ensure!(last["downtime_ms"].is_u64(), "{last}");
    for (api, names) in [
        (&here, ["switching", "committed", "post-copy"]),
        (&there, ["prepared", "listening", "post-copy"]),
    ] {
        for name in names {
            ensure!(events(api, name)?.len() == 1, "{name}: {:?}", events(api, name)?);
        }
        ensure!(events(api, "post-copy-paused")?.is_empty(), "a connection was lost");
    }
    let mut guest = waiting.guest(guest)?;
    guest.send("")?;
    let answer = guest.answer()?;
    ensure!(number(&answer, "pages")? > 8192, "{answer}");
    guest.ask(&format!("mem verify {} {} 3", ram + 160 * MIB, 4 * MIB))?;
    // It is a guest as any other: it can be moved on, and saved.
    let mut guest = super::moved(context, guest, "unix", &json!({}), &json!({}))?;
    guest.ask(&format!("mem verify {} {} 3", ram + 160 * MIB, 4 * MIB))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn memory_comes_when_it_is_touched(context: &Context) -> Result<Outcome> {
    let authority = super::tls::Authority::new()?;
    let secret = authority.pair("source.test", "destination.test")?;
    let (source, destination) = (json!({ "tls": secret.source }), json!({ "tls": secret.destination }));
    for (memory, url, receive, more) in [
        ("size=256M", "unix", json!({}), json!({})),
        ("size=256M,shared=on", "tcp:127.0.0.1:0", destination, source),
    ] {
        let mut guest = Guest::start(builder(context)?.set("--memory", memory).api())?;
        let ram = test_ram();
        guest.ask(&format!("mem fill {ram} {} 5", 32 * MIB))?;
        let waiting = Waiting::start(context, url, &receive)?;
        let (here, there) = (guest.vm().api()?.clone(), waiting.api()?.clone());
        let mut body = allowed(&json!({ "bandwidth": MIB, "connections": 2 }));
        lay(&mut body, &more);
        let sending = begin(&guest, &waiting.address, &body)?;
        copying(&here)?;
        switch(&here)?;
        let now = phase(&there, "post-copy")?;
        ensure!(now["remaining"].as_u64() > Some(20 * MIB), "{now}");
        ensure!(progress(&here)?["bandwidth"] == MIB, "the bandwidth was changed, too");
        let (mut moved, received) = early(waiting)?;
        // In a fraction of the time that it would take by itself.
        moved.ask(&format!("mem verify {ram} {} 5", 8 * MIB))?;
        let now = progress(&here)?;
        ensure!(
            now["phase"] == "post-copy" && now["remaining"].as_u64() > Some(4 * MIB),
            "{now}"
        );
        // The source has no guest to run, and no way back.
        for (route, status) in [("vm.resume", 409), ("vm.boot", 409), ("vm.cancel-migration", 409)] {
            let answer = here.request("PUT", route, None)?;
            ensure!(answer.status == status, "{route}: {} {}", answer.status, answer.body);
        }
        uncapped(&here)?;
        joined(sending)?;
        joined(received)?;
        ensure!(
            here.request("GET", "vm.info", None)?.status == 404,
            "the source has a VM"
        );
        let all = there.get("vm.events?since=0&follow=false")?;
        let told = all
            .as_array()
            .into_iter()
            .flatten()
            .any(|event| event["event"] == "memory-restored");
        ensure!(told, "{all}");
        moved.ask(&format!("mem verify {ram} {} 5", 32 * MIB))?;
        moved.power_off()?;
    }
    Ok(Outcome::Passed)
}

fn memory_given_back_meanwhile_is_empty(context: &Context) -> Result<Outcome> {
    let (guest, room) = with_room(context)?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    let here = guest.vm().api()?.clone();
    let sending = begin(&guest, &waiting.address, &allowed(&json!({ "bandwidth": MIB })))?;
    copying(&here)?;
    switch(&here)?;
    let (mut moved, received) = early(waiting)?;
    changes_its_room(&mut moved)?;
    // What was given back need not come: it may be over by now.
    let _ = uncapped(&here);
    joined(sending)?;
    joined(received)?;
    room_was_changed(&mut moved, room)?;
    moved.power_off()?;
    Ok(Outcome::Passed)
}

/// A network between the two that can be cut.
struct Network {
    address: String,
    open: Arc<AtomicBool>,
    passing: Arc<Mutex<Vec<UnixStream>>>,
}

impl Network {
    fn new(directory: &Path, destination: &str) -> Result<Self> {
        let path = directory.join("network.sock");
        let back = PathBuf::from(destination.strip_prefix("unix:").context("no socket")?);
        let listener = UnixListener::bind(&path)?;
        let network = Self {
            address: format!("unix:{}", path.display()),
            open: Arc::new(AtomicBool::new(true)),
            passing: Arc::default(),
        };
        let (open, passing) = (network.open.clone(), network.passing.clone());
        // It ends with the process.
        thread::spawn(move || {
            while let Ok((source, _)) = listener.accept() {
                let Ok(destination) = UnixStream::connect(&back) else {
                    continue;
                };
                let pairs = [
                    (source.try_clone(), destination.try_clone()),
                    (destination.try_clone(), source.try_clone()),
                ];
                let mut passing = passing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if !open.load(Ordering::SeqCst) {
                    continue;
                }
                passing.extend([source, destination]);
                for pair in pairs {
                    let (Ok(from), Ok(to)) = pair else { continue };
                    thread::spawn(move || pass(from, to));
                }
            }
        });
        Ok(network)
    }

    fn cut(&self) {
        let mut passing = self.passing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.open.store(false, Ordering::SeqCst);
        for stream in passing.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn mend(&self) {
        self.open.store(true, Ordering::SeqCst);
    }
}

fn pass(mut from: UnixStream, mut to: UnixStream) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(len) = from.read(&mut buffer) {
        if len == 0 || to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

/// A guest that runs at the destination, of whose 32 MiB most are at the source, with a network between the two.
struct Between {
    network: Network,
    source: Guest,
    moved: Guest,
    sending: JoinHandle<Result<String>>,
    received: JoinHandle<Result<String>>,
}

fn between(context: &Context, kept: &Path, more: &Value) -> Result<Between> {
    let mut source = Guest::start(builder(context)?.set("--memory", "size=256M").api())?;
    source.ask(&format!("mem fill {} {} 5", test_ram(), 32 * MIB))?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    let network = Network::new(kept, &waiting.address)?;
    let mut body = allowed(&json!({ "bandwidth": MIB }));
    lay(&mut body, more);
    let here = source.vm().api()?.clone();
    let sending = begin(&source, &network.address, &body)?;
    copying(&here)?;
    switch(&here)?;
    let (moved, received) = early(waiting)?;
    Ok(Between {
        network,
        source,
        moved,
        sending,
        received,
    })
}

fn a_connection_that_is_cut_is_made_anew(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    // By itself at once, and then only when it is asked to.
    for more in [json!({}), json!({ "recover_s": 0 })] {
        let round = tempfile::tempdir_in(kept.path())?;
        let mut all = between(context, round.path(), &more)?;
        let (here, there) = (all.source.vm().api()?.clone(), all.moved.vm().api()?.clone());
        let ram = test_ram();
        for slice in 0..if more["recover_s"] == 0 { 1 } else { 3 } {
            all.network.cut();
            let paused = phase(&here, "post-copy-paused")?;
            let error = paused["error"].as_str().context("no reason")?;
            ensure!(
                error.contains("the guest is lost") && error.contains("goes on"),
                "{error}"
            );
            phase(&there, "post-copy-paused")?;
            // The guest waits for a page, and the VMM answers all the same.
            all.moved
                .send(&format!("mem checksum {} {}", ram + slice * 3 * MIB, 3 * MIB))?;
            ensure!(there.get("vm.info")?["state"] == "Running");
            let resumed = here.request("PUT", "vm.resume", None)?;
            ensure!(resumed.status == 409, "{} {}", resumed.status, resumed.body);
            all.network.mend();
            if more["recover_s"] == 0 {
                thread::sleep(Duration::from_millis(800));
                ensure!(progress(&here)?["phase"] == "post-copy-paused", "nobody asked");
                here.put("vm.set-migration", Some(&json!({ "recover": true }).to_string()))?;
            }
            phase(&here, "post-copy")?;
            phase(&there, "post-copy")?;
            all.moved.answer()?;
        }
        uncapped(&here)?;
        joined(all.sending)?;
        joined(all.received)?;
        let recovered = events(&there, "recovered")?.len();
        ensure!(recovered > 0 && recovered == events(&there, "post-copy-paused")?.len());
        all.moved.ask(&format!("mem verify {ram} {} 5", 32 * MIB))?;
        all.moved.power_off()?;
    }
    Ok(Outcome::Passed)
}

fn a_destination_that_dies_loses_the_guest(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let all = between(context, kept.path(), &json!({}))?;
    let here = all.source.vm().api()?.clone();
    super::kills::kill(all.moved.vm().pid())?;
    let paused = phase(&here, "post-copy-paused")?;
    let error = paused["error"].as_str().context("no reason")?;
    ensure!(error.contains("the guest is lost: it cannot go on here"), "{error}");
    let resumed = here.request("PUT", "vm.resume", None)?;
    ensure!(resumed.status == 409, "{} {}", resumed.status, resumed.body);
    ensure!(here.get("vm.info")?["state"] == "Paused");
    // Whoever knows that it is dead says so.
    here.put("vm.cancel-migration", None)?;
    let error = format!("{:#}", joined(all.sending).err().context("it was moved")?);
    ensure!(error.contains("the guest is lost"), "{error}");
    let failed = events(&here, "failed")?;
    ensure!(
        failed.len() == 1 && failed[0]["properties"]["guest"] == "lost",
        "{failed:?}"
    );
    ensure!(
        here.request("GET", "vm.info", None)?.status == 404,
        "the source has a VM"
    );
    let resumed = here.request("PUT", "vm.resume", None)?;
    ensure!(!resumed.is_success(), "{}", resumed.body);
    Ok(Outcome::Passed)
}

fn a_vmm_whose_guest_waits_for_memory_ends_when_told(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let mut all = between(context, kept.path(), &json!({}))?;
    let there = all.moved.vm().api()?.clone();
    all.network.cut();
    phase(&there, "post-copy-paused")?;
    all.moved.send(&format!("mem verify {} {} 5", test_ram(), 32 * MIB))?;
    let cancelled = there.request("PUT", "vm.cancel-migration", None)?;
    ensure!(
        cancelled.status == 409 && cancelled.body.contains("given away"),
        "{}",
        cancelled.body
    );
    there.put("vmm.shutdown", None)?;
    all.moved.expect_end(0)?;
    // So does the source, which tells that it had the guest's memory.
    let here = all.source.vm().api()?.clone();
    phase(&here, "post-copy-paused")?;
    here.put("vmm.shutdown", None)?;
    all.source.expect_end(0)?;
    Ok(Outcome::Passed)
}

fn who_did_not_allow_it_is_refused(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.set("--memory", "size=256M").api())?;
    guest.ask(&format!("mem fill {} {} 5", test_ram(), 16 * MIB))?;
    let here = guest.vm().api()?.clone();
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    let asked = to(&waiting.address, &json!({ "post_copy": true }));
    let answer = here.put("vm.check-migration", Some(&asked.to_string()))?;
    ensure!(
        serde_json::from_str::<Value>(&answer)?["blockers"] == json!([]),
        "{answer}"
    );
    let without = json!({ "timeout_strategy": "PostCopy" });
    let error = joined(begin(&guest, &waiting.address, &without)?)
        .err()
        .context("it was taken")?;
    ensure!(format!("{error:#}").contains("needs post_copy"), "{error:#}");
    let sending = begin(&guest, &waiting.address, &json!({ "bandwidth": MIB }))?;
    copying(&here)?;
    for (body, reason) in [
        (json!({ "post_copy": true }), "may not become post-copy"),
        (json!({ "recover": true }), "no connection"),
    ] {
        let answer = here.request("PUT", "vm.set-migration", Some(&body.to_string()))?;
        ensure!(
            answer.status == 409 && answer.body.contains(reason),
            "{} {}",
            answer.status,
            answer.body
        );
    }
    ensure!(progress(&here)?["bandwidth"] == MIB, "the bandwidth was changed");
    uncapped(&here)?;
    joined(sending)?;
    let guest = waiting.guest(guest)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// All tests; capped as they are, they take their time.
pub const ALL: [Test; 7] = [
    TESTS[0].within(Duration::from_secs(200)),
    TESTS[1].within(Duration::from_secs(200)),
    TESTS[2].within(Duration::from_secs(120)),
    TESTS[3].within(Duration::from_secs(240)),
    TESTS[4].within(Duration::from_secs(120)),
    TESTS[5].within(Duration::from_secs(120)),
    TESTS[6],
];
