//! `cargo xtask bench api`: how soon and how fast the API answers, also while a guest is built, and what the guest notices of it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use triarch_harness::net::inheritable;

use super::{Ended, shown};
use crate::arch::Arch;
use crate::build::{self, Profile};
use crate::{payload, table, tools};

/// Requests a second beside which the guest is to be undisturbed.
const LOAD: u32 = 1000;
/// The guest works for so long at a time, in seconds: with the load and without, in turns.
const WORK: u64 = 1;
/// Boots during which requests are timed.
const BOOTS: u32 = 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// Carries out the benchmark with so many starts, turns of the guest, and requests of each kind.
pub(super) fn run(starts: u32, turns: u32, requests: u32, profile: Profile) -> Result<()> {
    let program = build::program(Arch::native(), profile, "triarch", "triarch")?;
    let kernel = payload::build(Arch::native())?;
    let starts = tools::step(&format!("starting triarch {starts} times"), || {
        first_replies(&program, starts)
    })?;
    let calm = tools::step(&format!("asking {requests} times"), || {
        calm(&program, &kernel, requests)
    })?;
    let building = tools::step(&format!("asking during {BOOTS} boots"), || {
        while_building(&program, &kernel)
    })?;
    let guest = tools::step(&format!("letting the guest work {turns} times"), || {
        undisturbed(&program, &kernel, turns)
    })?;
    let row = |name: &str, goal: &str, value: f64| vec![name.to_owned(), goal.to_owned(), shown(value)];
    let mut lines = vec![["API", "goal", "triarch"].map(str::to_owned).to_vec()];
    lines.push(row(
        "exec to first reply, ms, min",
        "2",
        quantile(&starts, 0.0) / 1000.0,
    ));
    lines.push(row(
        "exec to first reply, ms, median",
        "",
        quantile(&starts, 0.5) / 1000.0,
    ));
    for (name, times) in calm.iter().chain([&("vm.info during a boot".to_owned(), building)]) {
        lines.push(row(&format!("{name}, us, p50"), "20", quantile(times, 0.5)));
        lines.push(row(&format!("{name}, us, p99"), "200", quantile(times, 0.99)));
    }
    lines.push(row(
        &format!("guest's work beside {LOAD} requests/s, ratio"),
        "1.00",
        guest,
    ));
    println!("{}", table::format(&lines));
    Ok(())
}

/// A VMM with an API socket that exists before it does, so that nobody has to look for it.
struct Vmm {
    process: Ended,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Vmm {
    /// A socket in a directory of its own, and the command that serves it.
    fn prepare(program: &Path, args: &[String]) -> Result<(Command, UnixListener, PathBuf, tempfile::TempDir)> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("api.sock");
        let listener = UnixListener::bind(&socket)?;
        let mut command = Command::new(program);
        command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Ok((command, listener, socket, dir))
    }

    fn start(program: &Path, args: &[String]) -> Result<Self> {
        let (mut command, listener, socket, dir) = Self::prepare(program, args)?;
        let listener = inheritable(File::from(OwnedFd::from(listener)))?;
        command.args(["--api-socket", &format!("fd={}", listener.as_raw_fd())]);
        let process = Ended(command.spawn().context("triarch cannot be run")?);
        Ok(Self {
            process,
            socket,
            _dir: dir,
        })
    }

    fn client(&self) -> Result<Client> {
        Client::connect(&self.socket)
    }
}

/// A client that keeps its connection.
struct Client {
    stream: UnixStream,
    answer: Vec<u8>,
}

impl Client {
    fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let answer = vec![0; 64 << 10];
        Ok(Self { stream, answer })
    }

    /// Sends a request; its status, when the whole answer is there.
    fn call(&mut self, request: &[u8]) -> Result<u16> {
        self.stream.write_all(request)?;
        let mut have = 0;
        loop {
            let count = self.stream.read(&mut self.answer[have..])?;
            ensure!(count > 0, "the connection ended");
            have += count;
            if let Some(status) = whole(&self.answer[..have])? {
                return Ok(status);
            }
        }
    }

    fn put(&mut self, route: &str, body: &str) -> Result<()> {
        let status = self.call(&request("PUT", route, body))?;
        ensure!(
            status < 300,
            "{route} answered {status}: {}",
            String::from_utf8_lossy(&self.answer[..400])
        );
        Ok(())
    }

    /// Microseconds from a request to its whole answer.
    fn timed(&mut self, request: &[u8]) -> Result<f64> {
        let start = Instant::now();
        let status = self.call(request)?;
        let took = start.elapsed();
        ensure!(status == 200, "it answered {status}");
        Ok(took.as_secs_f64() * 1e6)
    }
}

fn request(method: &str, route: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("{method} /api/v1/{route} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}")
        .into_bytes()
}

/// The status of an answer that is there as a whole.
fn whole(answer: &[u8]) -> Result<Option<u16>> {
    let Some(end) = answer.windows(4).position(|w| w == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = std::str::from_utf8(&answer[..end])?;
    let status = head
        .get(9..12)
        .and_then(|s| s.parse().ok())
        .with_context(|| format!("not HTTP: {head}"))?;
    let length = head
        .split("\r\n")
        .find_map(|line| line.strip_prefix("Content-Length: "));
    let length: usize = length.map_or(Ok(0), str::parse)?;
    Ok((answer.len() >= end + 4 + length).then_some(status))
}

/// Microseconds from exec to the whole answer to a request that was there before.
fn first_replies(program: &Path, count: u32) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for round in 0..=count {
        let (mut command, listener, socket, _dir) = Vmm::prepare(program, &[])?;
        let mut client = Client::connect(&socket)?;
        let listener = inheritable(File::from(OwnedFd::from(listener)))?;
        command.args(["--api-socket", &format!("fd={}", listener.as_raw_fd())]);
        let start = Instant::now();
        let _process = Ended(command.spawn().context("triarch cannot be run")?);
        let status = client.call(&request("GET", "vmm.ping", ""))?;
        let took = start.elapsed();
        ensure!(status == 200, "vmm.ping answered {status}");
        // The first one warms caches.
        if round > 0 {
            times.push(took.as_secs_f64() * 1e6);
        }
    }
    Ok(times)
}

fn config(kernel: &Path, serial: &str) -> String {
    format!(
        r#"{{"payload":{{"kernel":"{}"}},"memory":{{"size":536870912}},"serial":{serial},"console":{{"mode":"Off"}}}}"#,
        kernel.display()
    )
}

/// Times of questions while a guest idles.
fn calm(program: &Path, kernel: &Path, count: u32) -> Result<Vec<(String, Vec<f64>)>> {
    let vmm = Vmm::start(program, &[])?;
    let mut client = vmm.client()?;
    client.put("vm.create", &config(kernel, r#"{"mode":"Null"}"#))?;
    client.put("vm.boot", "")?;
    let mut result = Vec::new();
    for route in ["vmm.ping", "vm.info"] {
        let asked = request("GET", route, "");
        for _ in 0..100 {
            client.timed(&asked)?;
        }
        let times: Result<Vec<_>> = (0..count).map(|_| client.timed(&asked)).collect();
        result.push((route.to_owned(), times?));
    }
    Ok(result)
}

/// Times of questions while guests are built, one after the other.
fn while_building(program: &Path, kernel: &Path) -> Result<Vec<f64>> {
    let vmm = Vmm::start(program, &[])?;
    let (mut driver, mut client) = (vmm.client()?, vmm.client()?);
    driver.put("vm.create", &config(kernel, r#"{"mode":"Null"}"#))?;
    let asked = request("GET", "vm.info", "");
    let mut times = Vec::new();
    for _ in 0..BOOTS {
        let done = AtomicBool::new(false);
        thread::scope(|scope| -> Result<()> {
            let driver = scope.spawn(|| {
                let result = driver.put("vm.boot", "");
                done.store(true, Ordering::Release);
                result
            });
            while !done.load(Ordering::Acquire) {
                times.push(client.timed(&asked)?);
            }
            driver.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
        })?;
        driver.put("vm.shutdown", "")?;
    }
    Ok(times)
}

/// How much the guest does beside requests, compared with how much it does alone: the ratio of medians.
fn undisturbed(program: &Path, kernel: &Path, turns: u32) -> Result<f64> {
    let vmm = Vmm::start(program, &[])?;
    let serial = vmm.socket.with_file_name("serial.sock");
    let mut client = vmm.client()?;
    client.put(
        "vm.create",
        &config(
            kernel,
            &format!(r#"{{"mode":"Socket","socket":"{}"}}"#, serial.display()),
        ),
    )?;
    client.put("vm.boot", "")?;
    let stream = UnixStream::connect(&serial)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut guest = Guest(BufReader::new(stream));
    guest.line()?;
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for turn in 0..=turns {
        let without = guest.work()?;
        let stop = AtomicBool::new(false);
        let with = thread::scope(|scope| {
            let load = scope.spawn(|| load(&mut client, &stop));
            let with = guest.work();
            stop.store(true, Ordering::Release);
            load.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
            with
        })?;
        // The first touches the memory.
        if turn > 0 {
            alone.push(without);
            beside.push(with);
        }
    }
    ensure!(
        fs::metadata(format!("/proc/{}", vmm.process.0.id())).is_ok(),
        "triarch ended"
    );
    Ok(quantile(&beside, 0.5) / quantile(&alone, 0.5))
}

/// Asks at an even rate until told to stop.
fn load(client: &mut Client, stop: &AtomicBool) -> Result<()> {
    let asked = request("GET", "vm.info", "");
    let start = Instant::now();
    let mut due = start;
    while !stop.load(Ordering::Acquire) {
        client.timed(&asked)?;
        due += Duration::from_secs(1) / LOAD;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

/// The guest, on its serial line.
struct Guest(BufReader<UnixStream>);

impl Guest {
    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "the serial line ended after `{line}`");
        Ok(line.trim_end().to_owned())
    }

    /// What it gets done in a second: pages that it counts up, round and round.
    fn work(&mut self) -> Result<f64> {
        self.0.get_mut().write_all(format!("dirty 16 0 {WORK}\n").as_bytes())?;
        let answer = self.line()?;
        let number = |key: &str| {
            let value = answer
                .split(' ')
                .find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
            value
                .and_then(|v| v.parse::<f64>().ok())
                .with_context(|| format!("no {key} in `{answer}`"))
        };
        Ok(number("pages")? / number("us")?)
    }
}

/// The value below which a part of `values` lies; 0 is the least.
fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss
    )]
    let at = (sorted.len() as f64 * part) as usize;
    sorted
        .get(at.min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_among_the_values() {
        let values: Vec<f64> = (0..1000).rev().map(f64::from).collect();
        assert_eq!(
            [0.0, 0.5, 0.99, 1.0].map(|part| quantile(&values, part)),
            [0.0, 500.0, 990.0, 999.0]
        );
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn an_answer_is_whole_when_all_of_it_is_there() {
        let answer = b"HTTP/1.1 200 \r\nContent-Length: 3\r\n\r\nabc";
        for cut in 0..answer.len() {
            assert_eq!(whole(&answer[..cut]).unwrap(), None, "{cut}");
        }
        assert_eq!(whole(answer).unwrap(), Some(200));
        assert_eq!(whole(b"HTTP/1.1 204 \r\n\r\n").unwrap(), Some(204));
    }
}
