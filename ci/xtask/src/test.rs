//! `cargo xtask test`: every test there is, on every level and host, counted together.

mod front_end;
mod pair;
mod place;
mod suites;
mod tally;
mod unit;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use crate::host::Kind;
use crate::kernels::Version;
use crate::lint;
use pair::Pair;
use place::Place;
pub use suites::{PATIENCE, Programs, SUITES};
use tally::{Tally, Verdict};

/// Runs tests: all of them, or those whose names contain one of the given.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this level; may be repeated
    #[arg(long, value_enum)]
    level: Vec<Level>,
    /// Only on this host (nested level); may be repeated. The default is this machine where it
    /// has hardware KVM, else the emulated ones
    #[arg(long, value_enum)]
    host: Vec<Kind>,
    /// QEMU's name of the CPU model of the emulated host, e.g. cortex-a72
    #[arg(long, value_name = "MODEL", requires = "host")]
    cpu: Option<String>,
    /// The kernel of the emulated host
    #[arg(long, value_enum, requires = "host")]
    host_kernel: Option<Version>,
    /// Only tests whose names contain this
    name: Vec<String>,
}

/// What a test needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Level {
    /// The source alone: format, clippy, licences
    Lint,
    /// Nothing: tests of single crates
    Unit,
    /// Any /dev/kvm: our own bare-metal guest
    Payload,
    /// Any /dev/kvm: some tests of that guest, with the programs as they are shipped
    Shipped,
    /// Hardware KVM, or an emulated host: Linux guests
    Nested,
    /// Two emulated hosts: Linux guests that move from one to the other. Only when it is named
    Pair,
}

impl Args {
    fn wants(&self, level: Level) -> bool {
        self.level.is_empty() || self.level.contains(&level)
    }

    /// Where the nested level runs.
    fn places(&self) -> Vec<Place> {
        if self.host.is_empty() {
            return Place::defaults();
        }
        let place = |host: &Kind| Place::all(*host, self.cpu.clone(), self.host_kernel);
        self.host.iter().map(place).collect()
    }
}

/// Whether a test called `name` is among those asked for by `filters`.
fn selected(filters: &[String], name: &str) -> bool {
    filters.is_empty() || filters.iter().any(|f| name.contains(f.as_str()))
}

/// Carries out the verb. Its last line is `N passed, N failed, N skipped`; it fails if a test
/// failed, or if none passed.
///
/// # Errors
/// Never: what goes wrong is a failure among the others, so that the rest still runs.
pub fn run(args: &Args) -> ExitCode {
    let start = Instant::now();
    let mut tally = Tally::new(std::io::stdout());
    if args.wants(Level::Lint) {
        lint_checks(&args.name, &mut tally);
    }
    if args.wants(Level::Unit) {
        tally.guard("unit", |tally| unit::run(&args.name, tally));
    }
    let has_pairs = args.level.contains(&Level::Pair);
    let has_suites = [Level::Payload, Level::Shipped, Level::Nested].map(|level| args.wants(level));
    if has_suites.contains(&true) || has_pairs {
        tally.guard("suites", |tally| run_suites(args, tally));
    }
    tally.finish(start.elapsed())
}

fn lint_checks(filters: &[String], tally: &mut Tally) {
    for check in lint::CHECKS {
        let name = format!("lint::{}", check.name.replace(' ', "_"));
        if !selected(filters, &name) {
            continue;
        }
        let start = Instant::now();
        let verdict = match (check.run)() {
            Ok(lint::Outcome::Passed) => Verdict::Passed,
            Ok(lint::Outcome::Skipped(why)) => Verdict::Skipped(why),
            Err(e) => Verdict::Failed(format!("{e:#}")),
        };
        tally.add(&name, verdict, Some(start.elapsed()));
    }
}

fn run_suites(args: &Args, tally: &mut Tally) -> Result<()> {
    let programs = Programs::build()?;
    if args.wants(Level::Payload) {
        tally.guard("payload", |tally| programs.payload(&args.name, tally));
    }
    if args.wants(Level::Shipped) {
        tally.guard("shipped", |tally| programs.shipped(&args.name, tally));
    }
    if args.wants(Level::Nested) {
        front_end::run(&args.name, &programs, tally);
        let mut hosts = Vec::new();
        for place in args.places() {
            tally.guard(&place.to_string(), |tally| {
                hosts.extend(programs.prepare(place, &args.name, tally)?);
                Ok(())
            });
        }
        suites::Nested::run_all(hosts, tally);
    }
    if args.level.contains(&Level::Pair) {
        for pair in Pair::of(&args.host) {
            tally.guard(&pair.to_string(), |tally| {
                pair.run(&programs, &args.name, args.host_kernel, tally)
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_select() {
        let filters = ["blk".to_owned(), "boot::".to_owned()];
        assert!(selected(&filters, "payload::virtio_blk::reads"));
        assert!(!selected(&filters, "payload::boots"));
        assert!(selected(&[], "anything"));
    }
}
