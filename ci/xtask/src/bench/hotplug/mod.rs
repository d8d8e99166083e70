//! `cargo xtask bench hotplug`: what comes and goes in a running guest: how soon the API answers, how soon it is there, and how often it can
//! be done in a second.
//!
//! Each subject is a module with one function that measures it and returns rows; [`SUBJECTS`] lists them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::client::{Client, Guest, Vmm, config, number, quantile};
use super::shown;
use crate::arch::Arch;
use crate::build::{self, Profile};
use crate::{payload, table, tools};

mod devices;
mod dimms;
mod vcpus;
mod virtio_mem;

/// What to measure, and how often.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Times that everything comes and goes on one guest
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Guests to which it comes for the first time
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    guests: u32,
    /// Only subjects whose names contain this
    #[arg(long)]
    only: Option<String>,
    /// How triarch is compiled
    #[arg(long, value_enum, default_value = "release")]
    profile: Profile,
}

/// What can come and go, and how it is measured.
const SUBJECTS: [(&str, Measure); 4] = [
    ("vCPUs", vcpus::measure),
    ("devices", devices::measure),
    ("DIMMs", dimms::measure),
    ("virtio-mem", virtio_mem::measure),
];

/// RAM of the guests, in bytes.
const RAM: u64 = 512 << 20;

type Measure = fn(&Setup) -> Result<Vec<Row>>;

/// What subjects start VMs from.
struct Setup {
    program: PathBuf,
    kernel: PathBuf,
    rounds: u32,
    guests: u32,
}

/// What a configuration has beside what all have: JSON, with a comma behind each field.
#[derive(Default)]
struct More {
    fields: String,
    /// Fields of its memory.
    memory: String,
}

impl Setup {
    fn config(&self, more: &More, serial: &str) -> String {
        const MEMORY: &str = r#""memory":{"#;
        let config = config(&self.kernel, serial).replace(MEMORY, &format!("{MEMORY}{}", more.memory));
        format!("{{{}{}", more.fields, config.trim_start_matches('{'))
    }

    /// A VMM with a guest, a client, and the guest.
    fn start(&self, more: &More) -> Result<(Vmm, Client, Guest)> {
        Vmm::with_guest(&self.program, |serial| self.config(more, serial))
    }
}

/// Something that a client asks for and the guest does.
struct Change<'a> {
    route: &'a str,
    body: &'a str,
    /// What the guest is told to do; it answers with its time.
    guest: &'a str,
    /// What it says that it did.
    counts: [(&'a str, u32); 2],
    /// Kind of the job that follows; there may be none.
    job: Option<&'a str>,
}

impl Change<'_> {
    /// Has it made, by a guest that listens already.
    fn make(&self, client: &mut Client, guest: &mut Guest) -> Result<Sample> {
        guest.send(self.guest)?;
        let start = Instant::now();
        client.put(self.route, self.body)?;
        let answer = us(start.elapsed());
        let said = guest.answer()?;
        let whole = us(start.elapsed());
        if let Some(kind) = self.job {
            last_job(client, kind)?;
        }
        let job = self.job.map(|_| us(start.elapsed()));
        for (name, count) in self.counts {
            ensure!(number(&said, name)? == f64::from(count), "{said}, not {name}={count}");
        }
        let guest = number(&said, "us")?;
        Ok(Sample {
            answer,
            way: whole - guest,
            guest,
            job,
        })
    }
}

/// What one change took, in microseconds.
struct Sample {
    /// From the request to its answer.
    answer: f64,
    /// From the request until the guest did what it was asked and said so, without what it did.
    way: f64,
    /// What the guest did: from the first interrupt on.
    guest: f64,
    /// From the request until its job was done, if it has one.
    job: Option<f64>,
}

impl Sample {
    /// Lines about changes that are all of one kind.
    fn rows(name: &str, samples: &[Self]) -> Vec<Row> {
        let row = |what: &str, goal, of: fn(&Self) -> Option<f64>| {
            let times: Vec<_> = samples.iter().filter_map(of).collect();
            (!times.is_empty()).then(|| Row::times(format!("{name}: {what}, ms"), goal, times))
        };
        let rows = [
            row("answer", "5", |s| Some(s.answer)),
            row("request to guest's answer but for its work", "50", |s| Some(s.way)),
            row("the guest's work", "", |s| Some(s.guest)),
            row("job done", "", |s| s.job),
        ];
        rows.into_iter().flatten().collect()
    }
}

/// Lines about what came first to guests one by one, and then came and went on one of them; the last is how often it did so in a second.
fn comes_and_goes(
    setup: &Setup,
    more: &More,
    name: &str,
    add: impl Fn(&mut Client, &mut Guest) -> Result<Sample>,
    remove: impl Fn(&mut Client, &mut Guest) -> Result<Sample>,
) -> Result<Vec<Row>> {
    let mut first = Vec::new();
    for _ in 0..setup.guests {
        let (_vmm, mut client, mut guest) = setup.start(more)?;
        first.push(add(&mut client, &mut guest)?);
    }
    let (_vmm, mut client, mut guest) = setup.start(more)?;
    let (mut adds, mut removes) = (Vec::new(), Vec::new());
    let begin = Instant::now();
    for _ in 0..setup.rounds {
        adds.push(add(&mut client, &mut guest)?);
        removes.push(remove(&mut client, &mut guest)?);
    }
    let rate = f64::from(setup.rounds) / begin.elapsed().as_secs_f64();
    let mut rows = Vec::new();
    for (when, samples) in [("first time", &first), ("added again", &adds), ("removed", &removes)] {
        rows.extend(Sample::rows(&format!("{name} {when}"), samples));
    }
    rows.push(Row::one(format!("{name} added and removed, rounds/s"), "", rate));
    Ok(rows)
}

/// A line of the table.
struct Row {
    name: String,
    /// What no median is to exceed, if there is such a thing.
    goal: &'static str,
    figures: Figures,
}

/// What a line tells.
enum Figures {
    /// Microseconds, of which the table shows milliseconds.
    Times(Vec<f64>),
    /// One number: the name of the line tells what it counts.
    One(f64),
}

impl Row {
    fn times(name: impl Into<String>, goal: &'static str, times: Vec<f64>) -> Self {
        let (name, figures) = (name.into(), Figures::Times(times));
        Self { name, goal, figures }
    }

    fn one(name: impl Into<String>, goal: &'static str, value: f64) -> Self {
        let (name, figures) = (name.into(), Figures::One(value));
        Self { name, goal, figures }
    }

    fn cells(&self) -> Vec<String> {
        let figures = match &self.figures {
            Figures::Times(times) => [0.5, 0.99, 1.0].map(|part| shown(quantile(times, part) / 1000.0)),
            Figures::One(value) => [shown(*value), String::new(), String::new()],
        };
        let names = [self.name.clone(), self.goal.to_owned()];
        names.into_iter().chain(figures).collect()
    }
}

/// Carries out the benchmark.
///
/// # Errors
/// A VM does not start, or does not do what it is asked for.
pub fn run(args: &Args) -> Result<()> {
    let setup = Setup {
        program: build::program(Arch::native(), args.profile, "triarch", "triarch")?,
        kernel: payload::build(Arch::native())?,
        rounds: args.rounds,
        guests: args.guests,
    };
    let wanted = |name: &str| args.only.as_deref().is_none_or(|only| name.contains(only));
    let subjects: Vec<_> = SUBJECTS.into_iter().filter(|(name, _)| wanted(name)).collect();
    ensure!(!subjects.is_empty(), "there is no such subject");
    let load = || std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let before = load();
    let mut lines = vec![["", "goal", "median", "p99", "most"].map(str::to_owned).to_vec()];
    for (name, measure) in subjects {
        let what = format!("{name}: {} guests, then {} rounds", setup.guests, setup.rounds);
        let rows = tools::step(&what, || measure(&setup)).context(name)?;
        lines.extend(rows.iter().map(Row::cells));
    }
    println!("{}", table::format(&lines));
    let first = |load: &str| load.split(' ').next().unwrap_or_default().to_owned();
    println!("load average before {}, after {}", first(&before), first(&load()));
    Ok(())
}

/// How long a guest may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// The last job of `kind`, once it is done.
fn last_job(client: &mut Client, kind: &str) -> Result<Value> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let jobs = client.get("vm.jobs")?;
        let mut all = jobs.as_array().context("no jobs")?.iter();
        let job = all.rfind(|job| job["kind"] == kind).context("no such job")?;
        ensure!(job["state"] != "failed", "{job}");
        if job["state"] == "done" {
            return Ok(job.clone());
        }
        ensure!(Instant::now() < deadline, "it does not end: {job}");
        // Not all the time: the guest shares the processors.
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_shows_milliseconds_or_a_number() {
        let row = Row::times("answer, ms", "5", vec![1000.0, 2500.0, 250_000.0]);
        assert_eq!(row.cells(), ["answer, ms", "5", "2.50", "250", "250"]);
        assert_eq!(Row::one("rounds", "", 12.0).cells(), ["rounds", "", "12.00", "", ""]);
    }

    #[test]
    fn only_changes_with_a_job_have_a_line_about_it() {
        let sample = |job| Sample {
            answer: 1000.0,
            way: 2000.0,
            guest: 3000.0,
            job,
        };
        let names = |job| {
            let rows = Sample::rows("x", &[sample(job)]);
            rows.into_iter().map(|row| row.name).collect::<Vec<_>>()
        };
        assert_eq!(names(None).len(), 3);
        assert_eq!(names(Some(4000.0)).last().unwrap(), "x: job done, ms");
    }

    #[test]
    fn fields_are_added_to_a_configuration() {
        let setup = Setup {
            program: PathBuf::new(),
            kernel: "k".into(),
            rounds: 1,
            guests: 1,
        };
        let more = More {
            fields: r#""cpus":{"boot_vcpus":1},"#.into(),
            memory: r#""hotplug_size":7,"#.into(),
        };
        let config: Value = serde_json::from_str(&setup.config(&more, "{}")).unwrap();
        assert_eq!(config["cpus"]["boot_vcpus"], 1);
        assert_eq!(config["memory"]["hotplug_size"], 7);
        assert_eq!(config["memory"]["size"], RAM);
        assert_eq!(config["payload"]["kernel"], "k");
    }
}
