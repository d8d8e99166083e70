//! virtiofsd, which shares a directory of the host with one guest.

use crate::storage::soon;
use anyhow::{Context as _, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use triarch_harness::jobs::wait;
use triarch_harness::process::Process;
use triarch_harness::suite::Context;

const PROGRAM: &str = "virtiofsd";

/// virtiofsd, and what it shares.
pub struct Virtiofsd {
    program: PathBuf,
    socket: PathBuf,
    shared: PathBuf,
    process: Option<Process>,
    // Last: what is in it outlives the rest.
    _dir: tempfile::TempDir,
}

/// Why a test that wants it is skipped.
pub fn missing() -> String {
    format!("there is no {PROGRAM} among the images")
}

impl Virtiofsd {
    /// One that is not started yet, with an empty directory to share; `None` where the program is missing.
    ///
    /// # Errors
    /// There is no place for the directory.
    pub fn find(context: &Context) -> Result<Option<Self>> {
        let Ok(program) = context.images.path(PROGRAM) else {
            return Ok(None);
        };
        let dir = tempfile::Builder::new().prefix("files").tempdir_in(&context.dir)?;
        let (socket, shared) = (dir.path().join("fs.sock"), dir.path().join("shared"));
        fs::create_dir(&shared)?;
        Ok(Some(Self {
            program,
            socket,
            shared,
            process: None,
            _dir: dir,
        }))
    }

    /// Where the VMM finds it.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The directory that it shares.
    pub fn shared(&self) -> &Path {
        &self.shared
    }

    /// Starts it and waits until it listens. It serves one front end, and ends with it.
    ///
    /// # Errors
    /// It does not.
    pub fn start(&mut self) -> Result<()> {
        let _ = fs::remove_file(&self.socket);
        let mut command = Command::new(&self.program);
        command.arg(format!("--socket-path={}", self.socket.display()));
        command.arg(format!("--shared-dir={}", self.shared.display()));
        // Neither needs more of the host's kernel than an emulated host has.
        command.args(["--sandbox=chroot", "--inode-file-handles=never"]);
        let process = self.process.insert(Process::start(&mut command)?);
        wait("it does not listen", soon(), || Ok(self.socket.exists().then_some(())))
            .with_context(|| process.last_words())
    }

    /// Its front end is gone, and so it ends well.
    ///
    /// # Errors
    /// It does not, or was not started.
    pub fn expect_end(&mut self) -> Result<()> {
        let mut process = self.process.take().context("it does not run")?;
        let status = process.wait(soon())?;
        process.expect(status, 0)
    }
}
