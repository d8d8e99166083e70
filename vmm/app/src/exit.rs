//! The exit code, for whoever started the process.

use std::io;
use std::process::ExitCode;

use thiserror::Error;
use triarch_hypervisor::HypervisorError;
use triarch_machine::{ENDED_AT_ONCE, MachineError};
use triarch_sandbox::SandboxError;

/// How the process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// The guest powered off, or the VMM was told to end.
    Ended = 0,
    /// Something failed while the VM was set up, or ran.
    Failed = 1,
    /// The command line or the configuration is wrong, whatever the host.
    Usage = 2,
    /// The host lacks what every VM needs.
    Host = 3,
    /// The guest did what no processor can go on after.
    Guest = 4,
}

// Given out by the handler of the signals.
const _: () = assert!(ENDED_AT_ONCE == 5);

/// The table for `--help`.
pub(crate) const HELP: &str = "\
Exit status:
  0  the guest powered off, or the VMM was told to end
  1  the VM could not be set up, or an error while it ran
  2  the command line or the configuration is wrong
  3  the host lacks what every VM needs, like /dev/kvm
  4  a vCPU of the guest failed
  5  told to end once more while ending: ended at once";

impl Exit {
    /// What `error` means for whoever started the process.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        if error.is::<Wrong>() {
            return Self::Usage;
        }
        if error.is::<SandboxError>() {
            return Self::Host;
        }
        match error.downcast_ref::<MachineError>() {
            Some(error) if error.is_configuration() => Self::Usage,
            Some(MachineError::Sandbox(_)) => Self::Host,
            Some(MachineError::Hypervisor(error)) if is_missing(error) => Self::Host,
            Some(MachineError::Guest { .. }) => Self::Guest,
            _ => Self::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        (exit as u8).into()
    }
}

/// An error of the command line or of the configuration, told in full.
#[derive(Debug, Error)]
#[error("{0}")]
pub(crate) struct Wrong(pub(crate) String);

/// There is no KVM here that could run this VMM's guests, as opposed to one that cannot do something now.
fn is_missing(error: &HypervisorError) -> bool {
    match error {
        HypervisorError::Open(source) => {
            let too_many = [libc::EMFILE, libc::ENFILE];
            source.raw_os_error().is_none_or(|errno| !too_many.contains(&errno))
                && source.kind() != io::ErrorKind::OutOfMemory
        }
        HypervisorError::Kvm { .. } => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn help_and_documentation_agree() {
        let documentation = include_str!("../../../docs/command-line.md");
        let rows = HELP.lines().skip(1).filter_map(|line| line.trim().split_once("  "));
        for (code, meaning) in rows.inspect(|(code, _)| assert!(code.len() == 1)) {
            let row = format!("\n| {code} | {meaning} |\n");
            assert!(documentation.contains(&row), "no {row}");
        }
        assert_eq!(HELP.lines().count(), 1 + usize::from(ENDED_AT_ONCE) + 1);
    }

    #[test]
    fn errors_are_told_apart_below_their_context() {
        let invalid = triarch_api::VmConfig::default()
            .validate()
            .expect_err("nothing to boot");
        let guest = MachineError::Guest {
            index: 0,
            reason: "KVM internal error".into(),
        };
        let open = |errno| HypervisorError::Open(io::Error::from_raw_os_error(errno));
        let machine = |error: HypervisorError| anyhow!(MachineError::from(error));
        for (error, exit) in [
            (anyhow!(Wrong("vm.json".into())), Exit::Usage),
            (anyhow!(MachineError::from(invalid)).context("vm.json"), Exit::Usage),
            (anyhow!(guest), Exit::Guest),
            (machine(HypervisorError::Missing("load it")), Exit::Host),
            (machine(open(libc::EISDIR)), Exit::Host),
            (machine(open(libc::EMFILE)), Exit::Failed),
            (anyhow!("x"), Exit::Failed),
        ] {
            assert_eq!(Exit::of(&error), exit, "{error:#}");
        }
        let result: anyhow::Result<()> = Err(MachineError::from(HypervisorError::Permission)).context("more");
        assert_eq!(Exit::of(&result.expect_err("an error")), Exit::Host);
    }
}
