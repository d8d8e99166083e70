//! This machine as a host: the same agent as on an emulated one, in a process of its own.
//!
//! The agent ends, and kills what it started, when its stream ends; so nothing stays behind even
//! when we are killed.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use tempfile::TempDir;
use triarch_guest_init::agent;

use crate::arch::Arch;

/// The hidden verb by which this program becomes the agent.
pub const AGENT_VERB: &str = "local-agent";

/// The agent's process and the directory of its files.
#[derive(Debug)]
pub struct Local {
    child: Child,
    dir: TempDir,
}

impl Local {
    /// Starts the agent; returns it with the stream that leads to it.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start() -> Result<(Self, UnixStream)> {
        let dir = tempfile::Builder::new().prefix("triarch-host-").tempdir()?;
        let (ours, theirs) = UnixStream::pair()?;
        let child = Command::new(std::env::current_exe()?)
            .arg(AGENT_VERB)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            // A ^C on the terminal is for us; the agent sees its stream end.
            .process_group(0)
            .spawn()
            .context("cannot start the agent")?;
        Ok((Self { child, dir }, ours))
    }

    /// Where its files lie.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Whether the agent's process runs, in words.
    pub fn state(&mut self) -> String {
        match self.child.try_wait() {
            Ok(Some(status)) => format!("it ended: {status}"),
            Ok(None) => "it runs".to_owned(),
            Err(error) => error.to_string(),
        }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        // Its stream is closed by now: it ends by itself after its commands.
        let _ = self.child.wait();
    }
}

/// Serves the agent on standard input, which is a socket, until it ends.
///
/// # Errors
/// The stream broke.
pub fn serve() -> Result<()> {
    let reader = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let writer = reader.try_clone()?;
    Ok(agent::serve(reader, writer)?)
}

/// Whether this machine can run any guest by itself: its processor has VMX, SVM or EL2, and
/// /dev/kvm may be used. Without them /dev/kvm may still be a software one, which runs only payloads.
pub fn hardware_kvm() -> bool {
    if Arch::native() == Arch::Aarch64 {
        // There is no flag to read, and no software KVM either.
        return usable_kvm().is_ok();
    }
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    has_virtualization(&flags) && usable_kvm().is_ok()
}

/// Opens /dev/kvm as a VMM would.
///
/// # Errors
/// It is not there, or may not be used.
pub fn usable_kvm() -> io::Result<()> {
    File::options().read(true).write(true).open("/dev/kvm").map(drop)
}

fn has_virtualization(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|l| l.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|f| f == "vmx" || f == "svm")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualization_is_a_whole_word() {
        assert!(has_virtualization("processor: 0\nflags\t\t: fpu svm sse\n"));
        assert!(has_virtualization("flags : vmx\n"));
        assert!(!has_virtualization("flags : svm_lock avx\nbugs : vmx\n"));
        assert!(!has_virtualization(""));
    }
}
