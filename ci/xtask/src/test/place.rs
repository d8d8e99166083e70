//! Where tests with Linux guests run: hosts, each with all tests or some.

use std::fmt;

use anyhow::{Result, ensure};

use crate::arch::Arch;
use crate::host::{Kind, Options};
use crate::kernels::Version;

/// The tests on a second ARM host: those that see another processor and another KVM.
const SECOND_ARM: [&str; 13] = [
    "boot::linux_6_1_on_1_cpu",
    "boot::linux_6_1_on_4_cpus",
    "boot::linux_6_12_on_1_cpu",
    "boot::linux_6_12_on_4_cpus",
    "boot::cpus_stop_and_start_again",
    "boot::linux_6_12_without_the_cpus_to_come",
    "blk::data_matches_the_hosts_file",
    "net::guest_and_host_talk",
    "power::a_panic_resets",
    "payload::boot::says_hello",
    "payload::smp::starts_sixteen",
    "payload::smp::interrupts_others",
    "payload::blk::runs_several_queues",
];

/// A host and the tests it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Which host.
    pub kind: Kind,
    /// QEMU's CPU model, when it is not the usual one.
    cpu: Option<String>,
    /// Its kernel, when it is not the usual one.
    kernel: Option<Version>,
    /// The only tests to run; all when there are none.
    only: &'static [&'static str],
}

impl Place {
    /// All tests on one host.
    pub fn all(kind: Kind, cpu: Option<String>, kernel: Option<Version>) -> Self {
        let only = &[];
        Self {
            kind,
            cpu,
            kernel,
            only,
        }
    }

    /// The hosts of a run that names none.
    pub fn defaults() -> Vec<Self> {
        let kinds = Kind::defaults();
        let second = kinds.contains(&Kind::Arm).then(Self::second_arm);
        let places = kinds.into_iter().map(|kind| Self::all(kind, None, None));
        places.chain(second).collect()
    }

    /// A host without VHE whose KVM leaves the start of vCPUs to the VMM; the usual one has VHE and does not.
    fn second_arm() -> Self {
        Self {
            only: &SECOND_ARM,
            ..Self::all(Kind::Arm, Some("cortex-a72".into()), Some(Version::V6_12))
        }
    }

    /// Whether tests with the payload guest run here: on what is not this machine's architecture, since they cannot run beside it, and on
    /// any emulated ARM machine, so that there they are the same everywhere.
    pub fn has_payload(&self) -> bool {
        let arch = self.kind.arch();
        arch != Arch::native() || self.kind == Kind::Arm
    }

    /// Those of `tests` that are for this host.
    ///
    /// # Errors
    /// One that is only for this host is not among them.
    pub fn select(&self, tests: Vec<String>) -> Result<Vec<String>> {
        for name in self.only {
            ensure!(tests.iter().any(|test| test == name), "{self}: there is no test {name}");
        }
        let wanted = |test: &String| self.only.is_empty() || self.only.contains(&test.as_str());
        Ok(tests.into_iter().filter(wanted).collect())
    }

    /// The host's processor and kernel.
    pub fn options(&self) -> Options {
        let usual = Options::default();
        Options {
            cpu: self.cpu.clone(),
            kernel: self.kernel.unwrap_or(usual.kernel),
            ..usual
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nested::{}", self.kind)?;
        let other = [self.cpu.clone(), self.kernel.map(|kernel| kernel.to_string())];
        let other: Vec<_> = other.into_iter().flatten().collect();
        match other[..] {
            [] => Ok(()),
            _ => write!(f, "({})", other.join(",")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_named_after_what_is_unusual() {
        assert_eq!(Place::all(Kind::Amd, None, None).to_string(), "nested::amd");
        assert_eq!(Place::second_arm().to_string(), "nested::arm(cortex-a72,6.12)");
        assert_eq!(Place::second_arm().options().kernel, Version::V6_12);
    }

    #[test]
    fn only_the_second_host_of_a_kind_has_fewer_tests() {
        let mut tests: Vec<String> = SECOND_ARM.map(str::to_owned).to_vec();
        tests.push("power::ten_reboots".into());
        let select = |place: Place| place.select(tests.clone()).unwrap();
        assert_eq!(select(Place::all(Kind::Arm, None, None)), tests);
        assert_eq!(select(Place::second_arm()), SECOND_ARM);
        let error = Place::second_arm()
            .select(vec!["power::ten_reboots".into()])
            .unwrap_err();
        assert!(error.to_string().contains(SECOND_ARM[0]), "{error}");
    }
}
