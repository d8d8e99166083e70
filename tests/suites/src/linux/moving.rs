//! What tests of migrations with Linux guests stand on: both sides of a move, a network that the guest stays in, and somebody there who
//! talks with it all the while.

use super::load::LIMIT;
use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use triarch_harness::jobs::wait;
use triarch_harness::linux::LinuxVm;
use triarch_harness::vm::Vm;

/// How long a migration may take on a busy emulated host.
pub const MOVE: Duration = Duration::from_secs(240);
/// The id of the guest's interface.
pub const NET: &str = "net0";
/// The guest's hardware address.
pub const MAC: &str = "52:54:00:00:0a:01";
/// Its address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 247, 100);

/// A VMM that waits for a guest.
pub struct Receiving {
    vm: Vm,
    address: String,
    answer: JoinHandle<Result<String>>,
}

impl Receiving {
    /// Lets `vm` wait at `url` for a guest whose devices are told of `config` here; `tls` is what the request has of that.
    pub fn start(vm: Vm, url: &str, config: &Value, tls: &Value) -> Result<Self> {
        let api = vm.api()?.clone();
        let mut config = config.clone();
        config["vsock"] = json!({ "socket": vm.dir().join("vsock.sock") });
        let mut body = json!({ "receiver_url": url, "config": config });
        if !tls.is_null() {
            body["tls"] = tls.clone();
        }
        let before = listening(&vm)?.len();
        let answer = thread::spawn(move || api.within(MOVE).put("vm.receive-migration", Some(&body.to_string())));
        let address = wait("nobody listens", LIMIT, || {
            ensure!(!answer.is_finished(), "it does not wait: {}", vm.last_words());
            Ok(listening(&vm)?.get(before).cloned())
        })?;
        Ok(Self { vm, address, answer })
    }

    /// Where it waits.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The guest that came.
    pub fn guest(self) -> Result<LinuxVm> {
        let said = || self.vm.last_words();
        joined(self.answer).with_context(|| format!("nobody came{}", said()))?;
        LinuxVm::attach(self.vm)
    }

    /// Why none came.
    pub fn refused(self) -> Result<String> {
        let error = joined(self.answer).err().context("a guest came")?;
        let info = self.vm.api()?.request("GET", "vm.info", None)?;
        ensure!(info.status == 404, "there is a VM: {}", info.body);
        Ok(format!("{error:#}"))
    }
}

fn joined<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread.join().map_err(|_| anyhow!("a thread panicked"))?
}

/// Where the VMM listened so far.
fn listening(vm: &Vm) -> Result<Vec<String>> {
    let all = vm.api()?.get("vm.events?since=0&follow=false")?;
    let all = all.as_array().context("no events")?.iter();
    let named = all.filter(|event| event["source"] == "migration" && event["event"] == "listening");
    let address = |event: &Value| event["properties"]["address"].as_str().map(ToOwned::to_owned);
    Ok(named.filter_map(address).collect())
}

/// Moves the guest of `vm` there; gives what was told of it in the end.
///
/// An emulated host is slow, and its guest writes all the while: it may stand still for two seconds, and for longer after a while.
pub fn send(vm: &Vm, address: &str, tls: &Value) -> Result<Value> {
    let mut body = json!({
        "destination_url": address, "connections": 2, "downtime_ms": 2000, "timeout_s": 60, "timeout_strategy": "Ignore",
    });
    if !tls.is_null() {
        body["tls"] = tls.clone();
    }
    let api = vm.api()?.within(MOVE);
    api.put("vm.send-migration", Some(&body.to_string()))?;
    let info = api.request("GET", "vm.info", None)?;
    ensure!(info.status == 404, "the source has a VM: {}", info.body);
    let last = api.get("vm.migration-progress")?;
    ensure!(last["phase"] == "done" && last["downtime_ms"].is_u64(), "{last}");
    Ok(last)
}

/// Says each number back that the guest says. The host never answers wrongly, and nothing is lost on the way: each number is one more than
/// the one before.
pub struct Talk {
    heard: Arc<Heard>,
    answers: JoinHandle<Result<u64>>,
}

/// What was heard so far.
#[derive(Default)]
struct Heard {
    /// The last number.
    last: AtomicU64,
    /// For how long nothing was heard at most, in milliseconds, since somebody asked.
    silence: AtomicU64,
}

impl Talk {
    /// Begins to talk, over TCP, with a guest that has an address and reaches `host`. This thread's network namespace is where the host is.
    pub fn with(guest: &LinuxVm, host: Ipv4Addr) -> Result<Self> {
        let listener = TcpListener::bind((host, 0)).context("cannot listen on the host's address")?;
        let port = listener.local_addr()?.port();
        let talk = b"#!/bin/sh\nn=0\nwhile [ ! -e /load/stop ]; do\n\
            n=$((n+1)); echo $n; read said\n\
            [ \"$said\" = $n ] || { echo \"$n came back as $said\" >>/load/bad; exit 1; }\n\
            echo >>/load/said; usleep 20000\ndone\n";
        guest.shell("mkdir -p /load; : >/load/said")?;
        guest.agent().put("/load/talk", 0o700, talk)?;
        guest.shell(&format!(
            "(nc {host} {port} -e /load/talk || echo 'nobody talks' >>/load/bad) </dev/null >/dev/null 2>&1 &"
        ))?;
        let (stream, _) = listener.accept()?;
        let heard = Arc::new(Heard::default());
        let ours = Arc::clone(&heard);
        let answers = thread::spawn(move || answer(stream, &ours));
        Ok(Self { heard, answers })
    }

    /// The guest still talks.
    pub fn goes_on(&self) -> Result<()> {
        let last = &self.heard.last;
        let before = last.load(Ordering::Relaxed);
        wait("the host hears nothing", LIMIT, || {
            Ok((last.load(Ordering::Relaxed) > before).then_some(()))
        })
    }

    /// For how many milliseconds the host heard nothing at most, since this was asked before.
    pub fn silence(&self) -> u64 {
        self.heard.silence.swap(0, Ordering::Relaxed)
    }

    /// The guest has ended its load, and thus hung up, and had its answer to so many numbers: all that it said was heard.
    pub fn ends(self, said: u64) -> Result<()> {
        let heard = joined(self.answers)?;
        ensure!(heard == said && said > 0, "{said} numbers were said, {heard} heard");
        Ok(())
    }
}

/// How many numbers it said and got back; its load has ended.
pub fn said(guest: &LinuxVm) -> Result<u64> {
    // What it says now is the last.
    wait("the guest does not hang up", LIMIT, || {
        let talks = guest.shell("pidof talk || true")?;
        Ok(talks.trim().is_empty().then_some(()))
    })?;
    Ok(guest.shell("wc -l </load/said")?.trim().parse()?)
}

fn answer(stream: TcpStream, heard: &Heard) -> Result<u64> {
    stream.set_read_timeout(Some(MOVE))?;
    stream.set_nodelay(true)?;
    let mut answers = stream.try_clone()?;
    let (mut last, mut at) = (0, Instant::now());
    for line in BufReader::new(stream).lines() {
        let number: u64 = line.context("the connection was lost")?.parse()?;
        ensure!(number == last + 1, "{number} was said after {last}");
        last = number;
        writeln!(answers, "{number}")?;
        heard.last.store(number, Ordering::Relaxed);
        let silence = at.elapsed().as_millis() as u64;
        heard.silence.fetch_max(silence, Ordering::Relaxed);
        at = Instant::now();
    }
    Ok(last)
}

/// These times, in milliseconds: the median, how long 99 of 100 last at most, and the longest.
pub fn spread(mut millis: Vec<u64>) -> String {
    millis.sort_unstable();
    let count = millis.len();
    let [middle, most, all] = [count / 2, count * 99 / 100, count.saturating_sub(1)]
        .map(|place| millis.get(place).copied().unwrap_or_default());
    format!("{count} times, {middle} ms (median), {most} ms (99 %), {all} ms (most)")
}
