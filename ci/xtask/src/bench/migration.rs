//! `cargo xtask bench migration`: how fast a guest moves over loopback, beside a plain copy of bytes, and for how long it stands still.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use super::client::{Client, Guest, Vmm, number, quantile};
use super::shown;
use crate::arch::Arch;
use crate::build::{self, Profile};
use crate::{payload, table, tools};

/// What to measure, and how often.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Migrations at each rate of writing
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    moves: u32,
    /// Turns in which a full guest is moved and as many bytes are copied
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    turns: u32,
    /// Only subjects whose names contain this
    #[arg(long)]
    only: Option<String>,
    /// How triarch is compiled
    #[arg(long, value_enum, default_value = "release")]
    profile: Profile,
}

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// RAM of the guests that hold data, in bytes.
const RAM: u64 = 1 << 30;
/// What of it a guest writes to again and again while it is moved.
const WRITTEN: u64 = 256 * MIB;
/// How long one migration may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where guests wait that go over the network.
const LOOPBACK: &str = "tcp-plain:127.0.0.1:0";

type Measure = fn(&Setup) -> Result<Vec<Vec<String>>>;

const SUBJECTS: [(&str, Measure); 4] = [
    ("throughput", throughput),
    ("downtime", downtime),
    ("zeroes", zeroes),
    ("local", local),
];

struct Setup {
    program: PathBuf,
    kernel: PathBuf,
    moves: u32,
    turns: u32,
}

/// Carries out the benchmark.
///
/// # Errors
/// A VM does not start, or is not moved.
pub fn run(args: &Args) -> Result<()> {
    let setup = Setup {
        program: build::program(Arch::native(), args.profile, "triarch", "triarch")?,
        kernel: payload::build(Arch::native())?,
        moves: args.moves,
        turns: args.turns,
    };
    let wanted = |name: &str| args.only.as_deref().is_none_or(|only| name.contains(only));
    let subjects: Vec<_> = SUBJECTS.into_iter().filter(|(name, _)| wanted(name)).collect();
    ensure!(!subjects.is_empty(), "there is no such subject");
    let load = || std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let before = load();
    let mut lines = vec![line(["", "goal", "median", "p99", "most"])];
    for (name, measure) in subjects {
        lines.extend(tools::step(name, || measure(&setup)).context(name)?);
    }
    println!("{}", table::format(&lines));
    let first = |load: &str| load.split(' ').next().unwrap_or_default().to_owned();
    println!("load average before {}, after {}", first(&before), first(&load()));
    Ok(())
}

fn line<T: Into<String>>(cells: [T; 5]) -> Vec<String> {
    cells.map(Into::into).to_vec()
}

/// A line about values of which more is worse.
fn row(name: String, goal: &str, values: &[f64]) -> Vec<String> {
    let [middle, late, most] = [0.5, 0.99, 1.0].map(|part| shown(quantile(values, part)));
    line([name, goal.to_owned(), middle, late, most])
}

/// A VM that moves from one VMM to the next.
struct Mover<'a> {
    setup: &'a Setup,
    vmm: Vmm,
    client: Client,
    guest: Guest,
}

/// What a migration was.
struct Moved {
    /// What the source told in the end.
    last: Value,
}

impl Moved {
    fn figure(&self, name: &str) -> Result<f64> {
        self.last[name]
            .as_f64()
            .with_context(|| format!("no {name}: {}", self.last))
    }
}

impl<'a> Mover<'a> {
    /// A guest with so many bytes of RAM; `more` are further fields of its memory, with a comma before them.
    fn start(setup: &'a Setup, ram: u64, more: &str) -> Result<Self> {
        let kernel = setup.kernel.display();
        let (vmm, client, guest) = Vmm::with_guest(&setup.program, |serial| {
            format!(
                r#"{{"payload":{{"kernel":"{kernel}"}},"memory":{{"size":{ram}{more}}},"serial":{serial},"console":{{"mode":"Off"}}}}"#
            )
        })?;
        Ok(Self {
            setup,
            vmm,
            client,
            guest,
        })
    }

    /// The largest part of RAM that commands may use: where it begins, and its bytes.
    fn arena(&mut self) -> Result<(u64, u64)> {
        let answer = self.guest.ask("mem arenas")?;
        let arenas = answer.split(' ').filter_map(|arena| {
            let (start, len) = arena.split_once('+')?;
            let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
            Some((number(start)?, number(len)?))
        });
        let largest = arenas.max_by_key(|(_, len)| *len);
        largest.with_context(|| format!("no RAM for tests in {answer}"))
    }

    /// Fills all RAM that may be used with data, and returns how many bytes that are.
    fn fill(&mut self) -> Result<u64> {
        let (start, len) = self.arena()?;
        self.guest.patience(PATIENCE)?;
        self.guest.ask(&format!("mem fill {start} {len} 7"))?;
        Ok(len)
    }

    /// Moves it to a new VMM; `more` are further fields of the request, with a comma before them.
    fn moves(&mut self, more: &str) -> Result<Moved> {
        self.moves_by(LOOPBACK, more)
    }

    /// The same over a connection of this kind; `unix` is a socket beside the new VMM's.
    fn moves_by(&mut self, url: &str, more: &str) -> Result<Moved> {
        let vmm = Vmm::start(&self.setup.program, &[])?;
        let serial = vmm.socket.with_file_name("serial.sock");
        let mut client = vmm.client()?;
        let mut waits = vmm.client()?;
        waits.patience(PATIENCE)?;
        let url = match url {
            "unix" => format!("unix:{}", vmm.socket.with_file_name("move.sock").display()),
            url => url.to_owned(),
        };
        let body = format!(
            r#"{{"receiver_url":"{url}","config":{{"serial":{{"socket":"{}"}}}}}}"#,
            serial.display()
        );
        let received = thread::spawn(move || waits.put("vm.receive-migration", &body));
        let address = listening(&mut client)?;
        self.client.patience(PATIENCE)?;
        self.client.put(
            "vm.send-migration",
            &format!(r#"{{"destination_url":"{address}"{more}}}"#),
        )?;
        received.join().map_err(|_| anyhow!("a client panicked"))??;
        let last = self.client.get("vm.migration-progress")?;
        self.guest = Guest::attach(&serial)?;
        (self.vmm, self.client) = (vmm, client);
        Ok(Moved { last })
    }

    /// Moves it, as [`moves_by`](Self::moves_by) does, as often as was asked for, while it writes so many MiB a second. Rows, which begin with
    /// `what`, the first two with the aim `goal`.
    fn rows(&mut self, (what, goal): (&str, &str), rate: u64, (url, more): (&str, &str)) -> Result<Vec<Vec<String>>> {
        // At rate 0 it counts in one page, a thousand times a second, to see for how long it cannot.
        let (pages, a_second) = match rate {
            0 => (1, 1000),
            rate => (WRITTEN / PAGE, rate * MIB / PAGE),
        };
        let (mut told, mut seen, mut times) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.setup.moves {
            self.guest.send(&format!("dirty {pages} {a_second} 0"))?;
            thread::sleep(Duration::from_millis(50));
            let moved = self.moves_by(url, more)?;
            self.guest.send("")?;
            seen.push(number(&self.guest.answer()?, "gap_us")? / 1000.0);
            told.push(moved.figure("downtime_ms")?);
            times.push(moved.figure("elapsed_ms")?);
        }
        let name = |figure: &str| format!("{what}{rate} MiB/s written: {figure}");
        Ok(vec![
            row(name("stands still, as the source tells, ms"), goal, &told),
            row(name("longest gap that the guest sees, ms"), goal, &seen),
            row(name("the whole migration, ms"), "", &times),
        ])
    }
}

/// Where the VMM waits.
fn listening(client: &mut Client) -> Result<String> {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let events = client.get("vm.events?since=0&follow=false")?;
        let mut events = events.as_array().context("no events")?.iter();
        if let Some(event) = events.find(|event| event["event"] == "listening") {
            let address = event["properties"]["address"].as_str();
            return Ok(address.context("no address")?.to_owned());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Err(anyhow!("nobody listens"))
}

/// A full guest, and plain copies of as many bytes over as many connections, in turns.
fn throughput(setup: &Setup) -> Result<Vec<Vec<String>>> {
    let mut rows = Vec::new();
    for (streams, goal) in [(1, ""), (4, "80")] {
        let mut mover = Mover::start(setup, RAM, "")?;
        let filled = mover.fill()?;
        let (mut ours, mut plain, mut memory) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..setup.turns {
            plain.push(copy(streams, filled, Ends::OneBuffer)?);
            // What it gives back is what the destination gets.
            memory.push(copy(streams, filled, Ends::Memory)?);
            let moved = mover.moves(&format!(r#","connections":{streams}"#))?;
            let sent = moved.figure("pages")? * bytes(PAGE) / bytes(MIB);
            ours.push(sent / (moved.figure("elapsed_ms")? / 1000.0));
        }
        let part = |of: &[f64]| -> Vec<f64> { ours.iter().zip(of).map(|(ours, of)| 100.0 * ours / of).collect() };
        let name = |what: &str| format!("{streams} connections: {what}");
        for (name, goal, values) in [
            (name("a full guest of 1 GiB, MiB/s"), "", &ours),
            (name("a plain copy, MiB/s"), "", &plain),
            (name("of the plain copy, %"), goal, &part(&plain)),
            (name("a copy from memory to memory, MiB/s"), "", &memory),
            (name("of the copy from memory to memory, %"), "", &part(&memory)),
        ] {
            let middle = shown(quantile(values, 0.5));
            rows.push(line([
                name,
                goal.to_owned(),
                middle,
                String::new(),
                shown(quantile(values, 1.0)),
            ]));
        }
    }
    Ok(rows)
}

/// What the ends of a plain copy have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ends {
    /// One buffer each, as with iperf.
    OneBuffer,
    /// All bytes, as a guest that is moved: in memory that was touched before.
    Memory,
}

impl Ends {
    /// Memory of an end that takes or gives `each` bytes.
    fn memory(self, each: usize) -> Vec<u8> {
        match self {
            Self::OneBuffer => vec![7; each.min(BUFFER)],
            Self::Memory => vec![7; each],
        }
    }
}

/// Bytes that a plain copy sends or takes at once.
const BUFFER: usize = 512 << 10;

/// MiB a second of a plain copy over loopback TCP.
fn copy(streams: u64, total: u64, ends: Ends) -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let each = usize::try_from(total / streams)?;
    let pairs = (0..streams).map(|_| -> Result<_> {
        let sender = TcpStream::connect(address)?;
        Ok((sender, listener.accept()?.0, ends.memory(each), ends.memory(each)))
    });
    let pairs = pairs.collect::<Result<Vec<_>>>()?;
    let began = Instant::now();
    let threads = pairs.into_iter().flat_map(|(mut sender, mut receiver, from, mut to)| {
        let sends = thread::spawn(move || -> Result<Vec<u8>> {
            let mut done = 0;
            while done < each {
                let at = if from.len() == each { done } else { 0 };
                let part = BUFFER.min(each - done);
                sender.write_all(&from[at..at + part])?;
                done += part;
            }
            Ok(from)
        });
        let takes = thread::spawn(move || -> Result<Vec<u8>> {
            let mut done = 0;
            while done < each {
                let at = if to.len() == each { done } else { 0 };
                let part = BUFFER.min(each - done);
                let came = receiver.read(&mut to[at..at + part])?;
                ensure!(came > 0, "the connection ended");
                done += came;
            }
            Ok(to)
        });
        [sends, takes]
    });
    // Begun all before the first is waited for. Giving the memory back is none of a copy.
    let threads: Vec<_> = threads.collect();
    let kept = threads
        .into_iter()
        .map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?);
    let kept = kept.collect::<Result<Vec<_>>>()?;
    let seconds = began.elapsed().as_secs_f64();
    drop(kept);
    Ok(bytes(total / streams * streams / MIB) / seconds)
}

/// A guest of 1 GiB, half of it data, that writes at a rate.
fn downtime(setup: &Setup) -> Result<Vec<Vec<String>>> {
    let mut rows = Vec::new();
    for (rate, goal) in [(0, ""), (100, "50"), (500, "")] {
        let mut mover = Mover::start(setup, RAM, "")?;
        let (start, len) = mover.arena()?;
        mover.guest.patience(PATIENCE)?;
        mover
            .guest
            .ask(&format!("mem fill {start} {} 7", len / 2 / PAGE * PAGE))?;
        rows.extend(mover.rows(("", goal), rate, (LOOPBACK, r#","connections":4"#))?);
    }
    Ok(rows)
}

/// A guest of 4 GiB without data: memory that was never touched, that the guest wrote zeroes to, and that both VMMs touch at the start.
fn zeroes(setup: &Setup) -> Result<Vec<Vec<String>>> {
    let mut rows = Vec::new();
    for (name, more, written) in [
        ("never touched", "", false),
        ("zero pages", "", true),
        ("zero pages, prefault", r#","prefault":true"#, false),
    ] {
        let mut times = Vec::new();
        for _ in 0..setup.turns {
            let mut mover = Mover::start(setup, 4 << 30, more)?;
            if written {
                let (start, len) = mover.arena()?;
                mover.guest.patience(PATIENCE)?;
                mover.guest.ask(&format!("mem zero {start} {len}"))?;
            }
            times.push(mover.moves(r#","connections":4"#)?.figure("elapsed_ms")?);
        }
        rows.push(row(format!("4 GiB, {name}: the whole migration, ms"), "1000", &times));
    }
    Ok(rows)
}

/// Guests whose memory is handed over to another VMM on this host: one that writes, and larger ones.
fn local(setup: &Setup) -> Result<Vec<Vec<String>>> {
    let mut rows = Vec::new();
    for (gib, rate) in [(1, 0), (1, 500), (4, 0)] {
        let mut mover = Mover::start(setup, gib << 30, r#","shared":true"#)?;
        mover.fill()?;
        let what = format!("{gib} GiB handed over, ");
        rows.extend(mover.rows((&what, "50"), rate, ("unix", r#","local":true"#))?);
    }
    Ok(rows)
}

/// Sizes here are far below 2^52.
#[allow(clippy::cast_precision_loss)]
fn bytes(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_copy_has_a_rate() {
        for (streams, ends) in [
            (1, Ends::OneBuffer),
            (4, Ends::OneBuffer),
            (1, Ends::Memory),
            (4, Ends::Memory),
        ] {
            let rate = copy(streams, 8 * MIB + 4, ends).unwrap();
            assert!(rate > 0.0, "{rate}");
        }
    }

    #[test]
    fn a_row_has_median_and_tail() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(row("x".to_owned(), "50", &values), ["x", "50", "51.00", "100", "100"]);
    }
}
