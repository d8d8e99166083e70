//! Thousands of bad requests, after which the VMM is what it was before.

use super::guest::IMAGE;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};
use triarch_harness::suite::{Context, Outcome, Test, is_patient};
use triarch_harness::vm::VmBuilder;
use triarch_harness::wire::{MAX_FDS, Wire};

/// This module's tests.
pub const TESTS: &[Test] = &[Test::payload(
    "abuse::thousands_of_bad_requests_leave_nothing",
    thousands_of_bad_requests_leave_nothing,
)
.within(Duration::from_secs(240))];

/// Requests sent, and how many where everything takes longer: an emulated host.
const COUNT: usize = 10_000;
const COUNT_EMULATED: usize = 2_000;
/// Kinds of bad requests.
const KINDS: usize = 14;
/// Memory that may come and go with connections, in KiB: buffers of those that are open at a time.
const SLACK: u64 = 1024;
const PATIENCE: Duration = Duration::from_secs(10);

/// What a process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Holdings {
    descriptors: usize,
    threads: usize,
    /// Memory of its own. Pages of the program's file come and go as it uses them.
    anonymous_kib: u64,
}

impl Holdings {
    fn of(pid: u32) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))
            .context("no RssAnon")?;
        Ok(Self {
            descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
            threads: fs::read_dir(format!("/proc/{pid}/task"))?.count(),
            anonymous_kib: line.trim().trim_end_matches(" kB").parse()?,
        })
    }

    /// Waits until the process holds no more descriptors and threads than this: it notices the end of connections a moment later.
    fn await_again(self, pid: u32) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = Self::of(pid)?;
            let settled = now.descriptors == self.descriptors && now.threads == self.threads;
            if settled || Instant::now() >= deadline {
                return Ok(now);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn thousands_of_bad_requests_leave_nothing(context: &Context) -> Result<Outcome> {
    let vm = VmBuilder::new(context)?.api().start()?;
    let api = vm.api()?.clone();
    let create = json!({ "payload": { "kernel": context.images.path(IMAGE)? }, "memory": { "size": 64 << 20 } });
    api.put("vm.create", Some(&create.to_string()))?;
    let mut client = Abuser::new(api.socket())?;
    // The first ones make the server's tables and the allocator's arenas as large as they get.
    for round in 0..KINDS * 20 {
        client.send(round)?;
    }
    client.lingering.clear();
    std::thread::sleep(Duration::from_millis(50));
    let before = Holdings::of(vm.pid())?;
    let count = if is_patient() { COUNT_EMULATED } else { COUNT };
    for round in 0..count {
        client
            .send(round)
            .with_context(|| format!("request {round}, of kind {}", round % KINDS))?;
    }
    client.lingering.clear();
    let after = before.await_again(vm.pid())?;
    ensure!(after.descriptors == before.descriptors, "{before:?} became {after:?}");
    ensure!(after.threads == before.threads, "{before:?} became {after:?}");
    ensure!(
        after.anonymous_kib <= before.anonymous_kib + SLACK,
        "{before:?} became {after:?}"
    );
    // It is as well as before, and a guest runs in it.
    api.put("vm.boot", None)?;
    let info: Value = serde_json::from_str(&api.request("GET", "vm.info", None)?.body)?;
    ensure!(info["state"] == "Running", "{info}");
    ensure!(info["config"]["net"].is_null(), "{info}");
    api.put("vmm.shutdown", None)?;
    vm.expect_end(0)?;
    Ok(Outcome::Passed)
}

/// A client that does everything wrong.
struct Abuser<'a> {
    socket: &'a Path,
    null: File,
    plain: File,
    /// Connections with a part of a request, which are closed when there are too many.
    lingering: Vec<Wire>,
}

impl<'a> Abuser<'a> {
    fn new(socket: &'a Path) -> Result<Self> {
        Ok(Self {
            socket,
            null: File::open("/dev/null")?,
            plain: File::open("/proc/self/status")?,
            lingering: Vec::new(),
        })
    }

    fn send(&mut self, round: usize) -> Result<()> {
        let mut wire = Wire::connect(self.socket, PATIENCE)?;
        let fds = [self.null.as_fd(); MAX_FDS];
        match round % KINDS {
            0 => refused(wire, &put("vm.create", &"x".repeat(9000), "{}"), &[], 431),
            1 => refused(
                wire,
                b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 999999\r\n\r\n{",
                &[],
                413,
            ),
            // Cut off: the client is gone, with descriptors under way.
            2 => Ok(wire.send_with(
                b"PUT /api/v1/vm.add-net HTTP/1.1\r\nContent-Length: 90\r\n\r\n{\"id\"",
                &fds,
            )?),
            // A part of a request, and then nothing for a while.
            3 => {
                wire.send_with(b"PUT /api/v1/vm.add-net HT", &fds[..20])?;
                if self.lingering.len() >= 20 {
                    self.lingering.clear();
                }
                self.lingering.push(wire);
                Ok(())
            }
            4 => pipelined(wire),
            5 => refused(wire, &put("vm.resize", "", r#"{"desired_vcpus":"two"}"#), &[], 400),
            6 => refused(wire, &put("vm.pause", "", ""), &[], 409),
            7 => refused(wire, &put("vm.add-net", "", r#"{"num_queues":2}"#), &fds, 400),
            8 => thousands_of_descriptors(wire, &fds),
            9 => refused(wire, &put("vm.add-net", "", "{}"), &[self.plain.as_fd()], 400),
            10 => refused(wire, &put("vm.boot", "", ""), &fds[..7], 400),
            11 => refused(wire, &put("vm.add-disk", "", r#"[["path"]]"#), &[], 400),
            12 => refused(wire, &put("vm.remove-device", "", r#"{"id":"nobody"}"#), &[], 404),
            _ => refused(wire, b"\x16\x03\x01\x02\x00 hello\r\n\r\n", &fds[..3], 400),
        }
    }
}

fn put(route: &str, field: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("PUT /api/v1/{route} HTTP/1.1\r\nX-Field: {field}\r\nContent-Length: {length}\r\n\r\n{body}").into_bytes()
}

/// Sends a request that has to be answered with `status` and one sentence.
fn refused(mut wire: Wire, request: &[u8], fds: &[BorrowedFd<'_>], status: u16) -> Result<()> {
    wire.send_with(request, fds)?;
    let (got, body) = answer(&mut wire, &mut Vec::new())?;
    ensure!(got == status, "{got} instead of {status}: {body}");
    sentence(&body)
}

fn sentence(body: &str) -> Result<()> {
    let body: Value = serde_json::from_str(body)?;
    let error = body["error"].as_str().unwrap_or_default();
    ensure!(error.len() > 10 && !error.contains('\n'), "no sentence: {body}");
    Ok(())
}

/// Several at once: what is wrong with one does not touch the next, until one is no request at all.
fn pipelined(mut wire: Wire) -> Result<()> {
    let requests = [
        put("vm.nmi", "", ""),
        put("vm.nothing", "", "{"),
        put("vm.resume", "", "null"),
        b"?\r\n\r\n".to_vec(),
    ];
    wire.send(&requests.concat())?;
    let mut rest = Vec::new();
    for status in [409, 404, 409, 400] {
        let (got, body) = answer(&mut wire, &mut rest)?;
        ensure!(got == status, "{got} instead of {status}: {body}");
        sentence(&body)?;
    }
    Ok(())
}

/// More than the kernel passes at once, with a request that never ends.
fn thousands_of_descriptors(mut wire: Wire, fds: &[BorrowedFd<'_>]) -> Result<()> {
    wire.send(b"PUT /api/v1/vm.add-net HTTP/1.1\r\n")?;
    for _ in 0..8 {
        // The server hangs up when it has seen enough.
        if wire.send_with(b"a: b\r\n", fds).is_err() {
            break;
        }
    }
    match answer(&mut wire, &mut Vec::new()) {
        Ok((status, body)) => {
            ensure!(status == 400, "{status}: {body}");
            sentence(&body)
        }
        // It may close with some of ours unread, which takes the answer along.
        Err(error) if error.downcast_ref::<std::io::Error>().is_some_and(is_reset) => Ok(()),
        Err(error) => Err(error),
    }
}

fn is_reset(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe
    )
}

/// The next answer; `rest` has the bytes behind it.
fn answer(wire: &mut Wire, rest: &mut Vec<u8>) -> Result<(u16, String)> {
    loop {
        if let Some(end) = rest.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8(rest[..end].to_vec())?;
            let length = head
                .split("\r\n")
                .find_map(|line| line.strip_prefix("Content-Length: "));
            let length: usize = length.map_or(Ok(0), str::parse)?;
            if rest.len() >= end + 4 + length {
                let body = String::from_utf8(rest[end + 4..][..length].to_vec())?;
                rest.drain(..end + 4 + length);
                let status = head.get(9..12).context("no status")?.parse()?;
                return Ok((status, body));
            }
        }
        let more = wire.read_some(4096)?;
        ensure!(!more.is_empty(), "the connection ended after {} bytes", rest.len());
        rest.extend(more);
    }
}
