//! The tests that two emulated hosts run together: a wire leads from one to the other, and both have a disk.

use std::fmt;
use std::fs::File;
use std::io;
use std::panic::resume_unwind;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result};
use triarch_harness::suite::{self, Side};

use super::suites::{Pending, Programs, run_on};
use super::tally::Tally;
use crate::host::{Host, Kind, Options};
use crate::kernels::Version;
use crate::qemu::Paired;

/// What a host of a pair needs.
const HOST_MIB: u32 = 2048;
const DISK: u64 = 64 << 20;

/// One of two hosts: what it is, and its processor if that is not the usual one.
type End = (Kind, Option<&'static str>);

/// Two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    ends: [End; 2],
    /// What the second one lacks for the guests of the first one, if it does; the tests look for these words.
    lacks: Option<&'static str>,
}

/// All of them. An emulated host's guests have all that its KVM offers.
const PAIRS: [Pair; 6] = [
    alike(Kind::Amd),
    alike(Kind::Hygon),
    alike(Kind::Arm),
    Pair {
        ends: [(Kind::Amd, Some("EPYC-Milan")), (Kind::Amd, Some("EPYC"))],
        lacks: Some("pku"),
    },
    Pair {
        ends: [(Kind::Amd, Some("EPYC")), (Kind::Hygon, Some("Dhyana"))],
        lacks: Some("vendor"),
    },
    Pair {
        ends: [(Kind::Arm, Some("neoverse-n1")), (Kind::Arm, Some("cortex-a76"))],
        lacks: Some("MIDR_EL1 ID_AA64PFR1_EL1.SSBS"),
    },
];

const fn alike(kind: Kind) -> Pair {
    Pair {
        ends: [(kind, None), (kind, None)],
        lacks: None,
    }
}

impl Pair {
    /// Those whose first host is one of `kinds`; all if there are none.
    pub fn of(kinds: &[Kind]) -> impl Iterator<Item = Self> {
        let wanted = |kind: &Kind| kinds.is_empty() || kinds.contains(kind);
        PAIRS.into_iter().filter(move |pair| wanted(&pair.ends[0].0))
    }

    /// Runs those of the tests whose names contain one of `filters`, on both hosts at once.
    ///
    /// # Errors
    /// A host cannot be made, or failed.
    pub fn run(
        &self,
        programs: &Programs,
        filters: &[String],
        kernel: Option<Version>,
        tally: &mut Tally,
    ) -> Result<()> {
        // The others are skipped there.
        let here = |name: &String| name.contains("lacks") == self.lacks.is_some();
        let names = programs.list("pair", &[])?.into_iter().filter(here);
        let names: Vec<_> = names
            .filter(|name| super::selected(filters, &format!("{self}::{name}")))
            .collect();
        if names.is_empty() {
            return Ok(());
        }
        let shared = tempfile::tempdir()?;
        let disk = shared.path().join("disk");
        File::create(&disk)?.set_len(DISK)?;
        let start = |side| self.start(side, programs, kernel, shared.path(), &disk);
        // A host ends with the thread that started it.
        let hosts = [(Side::Here, start(Side::Here)?), (Side::There, start(Side::There)?)];
        thread::scope(|scope| {
            let workers = hosts.each_ref().map(|(side, host)| {
                let pending = Pending::new(&format!("{self}::{side}"), "pair", names.clone());
                scope.spawn(move || self.run_side(host, *side, pending))
            });
            for worker in workers {
                match worker.join() {
                    Ok(counted) => tally.merge(counted),
                    Err(panic) => resume_unwind(panic),
                }
            }
        });
        Ok(())
    }

    fn run_side(&self, host: &Host, side: Side, mut pending: Pending) -> Tally {
        let mut tally = Tally::new(io::stdout());
        let side_text = side.to_string();
        let mut environment = vec![(suite::SIDE, side_text.as_str())];
        environment.extend(self.lacks.map(|words| (suite::LACKS, words)));
        tally.guard(&format!("{self}::{side}"), |tally| {
            host.shell("/init load virtio_net")
                .context("the host has no network card")?;
            run_on(host, &mut pending, &environment, tally)
        });
        tally
    }

    fn start(
        &self,
        side: Side,
        programs: &Programs,
        kernel: Option<Version>,
        shared: &Path,
        disk: &Path,
    ) -> Result<Host> {
        let (kind, cpu) = self.ends[usize::from(side == Side::There)];
        let usual = Options::default();
        let options = Options {
            cpu: cpu.map(ToOwned::to_owned),
            memory_mib: HOST_MIB,
            kernel: kernel.unwrap_or(usual.kernel),
            files: programs.files(kind.arch())?,
            pair: Some(Paired {
                wire: shared.join("wire"),
                is_server: side == Side::Here,
                disk: disk.to_owned(),
            }),
            ..usual
        };
        Host::start(kind, &options)
    }
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [one, other] = self
            .ends
            .map(|(kind, cpu)| cpu.map_or_else(|| kind.to_string(), str::to_owned));
        write!(f, "pair::{one},{other}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_named_after_its_hosts() {
        let names: Vec<String> = Pair::of(&[Kind::Amd]).map(|pair| pair.to_string()).collect();
        assert_eq!(names, ["pair::amd,amd", "pair::EPYC-Milan,EPYC", "pair::EPYC,Dhyana"]);
        assert_eq!(Pair::of(&[]).count(), PAIRS.len());
    }

    #[test]
    fn only_hosts_that_differ_lack_something() {
        for pair in PAIRS {
            assert_eq!(pair.lacks.is_some(), pair.ends[0] != pair.ends[1], "{pair}");
        }
    }
}
