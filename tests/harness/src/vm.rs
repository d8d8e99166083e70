//! A VM: the VMM's process with its flags, its output, and its end.

use crate::api::Api;
use crate::capture::Capture;
use crate::process::Process;
use crate::suite::Context;
use anyhow::{Context as _, Result, bail};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::{FileTypeExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a VMM may take to end when the guest has ended.
const END: Duration = Duration::from_secs(30);

/// A VM to be started, with flags in the dialect of Cloud Hypervisor.
pub struct VmBuilder {
    program: PathBuf,
    dir: TempDir,
    /// Each flag once with all its values, since that is how repeated devices are written.
    flags: Vec<(String, Vec<OsString>)>,
    api: Option<PathBuf>,
    user: Option<u32>,
}

impl VmBuilder {
    /// A VM without anything, with a directory of its own for sockets and files.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn new(context: &Context) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("vm").tempdir_in(&context.dir)?;
        Ok(Self {
            program: context.triarch.clone(),
            dir,
            flags: Vec::new(),
            api: None,
            user: None,
        })
    }

    /// The VM's directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Adds a flag with a value, or one more value to a flag: `flag("--disk", "path=a")`.
    #[must_use]
    pub fn flag(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        let value = value.as_ref().to_owned();
        match self.flags.iter_mut().find(|(flag, _)| flag == name) {
            Some((_, values)) => values.push(value),
            None => self.flags.push((name.into(), vec![value])),
        }
        self
    }

    /// Adds a flag that has no value.
    #[must_use]
    pub fn switch(mut self, name: &str) -> Self {
        self.flags.push((name.into(), Vec::new()));
        self
    }

    /// Sets a flag's value, instead of those that it may have.
    #[must_use]
    pub fn set(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.flags.retain(|(flag, _)| flag != name);
        self.flag(name, value)
    }

    /// Sets the number of vCPUs.
    #[must_use]
    pub fn cpus(self, count: u32) -> Self {
        self.set("--cpus", format!("boot={count}"))
    }

    /// Sets the size of the guest's memory.
    #[must_use]
    pub fn memory_mib(self, mib: u64) -> Self {
        self.set("--memory", format!("size={mib}M"))
    }

    /// Adds a disk; `options` are those of `--disk` beside the path, and may be empty.
    #[must_use]
    pub fn disk(self, path: &Path, options: &str) -> Self {
        let value = with_options("path=", path, options);
        self.flag("--disk", value)
    }

    /// Adds the API socket, for [`Vm::api`].
    #[must_use]
    pub fn api(mut self) -> Self {
        let socket = self.dir().join("api.sock");
        self.api = Some(socket.clone());
        self.set("--api-socket", with_options("path=", &socket, ""))
    }

    /// Lets the VMM run as this user, without any right of root's; the VM's directory becomes the user's.
    #[must_use]
    pub fn user(mut self, id: u32) -> Self {
        self.user = Some(id);
        self
    }

    /// Starts the VMM.
    ///
    /// # Errors
    /// It cannot be started. What it finds wrong itself shows in its exit code.
    pub fn start(self) -> Result<Vm> {
        let mut command = Command::new(&self.program);
        for (flag, values) in &self.flags {
            command.arg(flag).args(values);
        }
        if let Some(id) = self.user {
            chown(self.dir.path(), Some(id), Some(id)).context("cannot give the VM's directory away")?;
            command.uid(id).gid(id);
        }
        let process = Process::start(&mut command).context("TRIARCH_BIN names the VMM")?;
        Ok(Vm {
            process,
            api: self.api.map(Api::new),
            dir: self.dir,
        })
    }
}

/// `key` and a path, then a comma and `options` if there are any.
fn with_options(key: &str, path: &Path, options: &str) -> OsString {
    let mut value = OsString::from(key);
    value.push(path);
    if !options.is_empty() {
        value.push(",");
        value.push(options);
    }
    value
}

/// A started VM. Dropping it kills the VMM.
pub struct Vm {
    // First: the directory must outlive the process.
    process: Process,
    api: Option<Api>,
    dir: TempDir,
}

impl Vm {
    /// The VM's directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What the VMM prints to standard output: with `--serial tty` the guest's serial line.
    pub fn output(&self) -> &Capture {
        self.process.stdout()
    }

    /// What the VMM says about itself.
    pub fn stderr(&self) -> &Capture {
        self.process.stderr()
    }

    /// The VMM's process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The moment just before the VMM was started.
    pub fn started(&self) -> Instant {
        self.process.started()
    }

    /// The VMM's API.
    ///
    /// # Errors
    /// The VM was built without.
    pub fn api(&self) -> Result<&Api> {
        self.api.as_ref().context("this VM has no API socket")
    }

    /// Pauses all vCPUs.
    ///
    /// # Errors
    /// The VMM does not do it.
    pub fn pause(&self) -> Result<()> {
        self.api()?.put("vm.pause", None).map(drop)
    }

    /// Lets all vCPUs run again.
    ///
    /// # Errors
    /// The VMM does not do it.
    pub fn resume(&self) -> Result<()> {
        self.api()?.put("vm.resume", None).map(drop)
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// The VMM does not do it.
    pub fn press_power_button(&self) -> Result<()> {
        self.api()?.put("vm.power-button", None).map(drop)
    }

    /// Waits for the VMM's end, which has to be with exit code `code` and leave no socket behind.
    ///
    /// # Errors
    /// It still runs after half a minute, ended otherwise, or left something; the error shows the
    /// last output.
    pub fn expect_end(self, code: i32) -> Result<Ended> {
        self.expect_end_within(code, END)
    }

    /// [`Vm::expect_end`] with another limit, for a guest that has not even booted yet.
    ///
    /// # Errors
    /// As [`Vm::expect_end`].
    pub fn expect_end_within(mut self, code: i32, limit: Duration) -> Result<Ended> {
        let status = self.process.wait(limit)?;
        self.process.expect(status, code)?;
        let sockets = sockets(self.dir())?;
        if !sockets.is_empty() {
            bail!("the VMM left sockets behind: {sockets:?}");
        }
        let files = fs::read_dir(self.dir())?.map(|entry| Ok(entry?.file_name()));
        Ok(Ended {
            files: files.collect::<Result<_>>()?,
            output: self.process.stdout().text(),
            stderr: self.process.stderr().text(),
        })
    }

    /// The end of all that the VMM printed, for error messages.
    pub fn last_words(&self) -> String {
        self.process.last_words()
    }
}

/// What a VMM that ended as it should has printed.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Standard output.
    pub output: String,
    /// Standard error.
    pub stderr: String,
    /// What its directory holds now.
    pub files: Vec<OsString>,
}

fn sockets(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_socket() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::Images;
    use std::os::unix::fs::PermissionsExt;

    /// A context whose VMM is this script.
    fn context(dir: &Path, script: &str) -> Context {
        let triarch = dir.join("vmm");
        fs::write(&triarch, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&triarch, PermissionsExt::from_mode(0o755)).unwrap();
        Context {
            dir: dir.to_path_buf(),
            triarch,
            images: Images::at(dir),
        }
    }

    #[test]
    fn writes_each_flag_once() {
        let dir = tempfile::tempdir().unwrap();
        let context = context(dir.path(), "printf '%s\\n' \"$@\"");
        let builder = VmBuilder::new(&context).unwrap();
        let builder = builder
            .disk(Path::new("/a"), "readonly=on")
            .cpus(1)
            .disk(Path::new("/b"), "");
        let ended = builder.cpus(4).start().unwrap().expect_end(0).unwrap();
        assert_eq!(ended.output, "--disk\npath=/a,readonly=on\npath=/b\n--cpus\nboot=4\n");
    }

    #[test]
    fn a_socket_left_behind_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let context = context(dir.path(), "");
        let builder = VmBuilder::new(&context).unwrap();
        let _left = std::os::unix::net::UnixListener::bind(builder.dir().join("x.sock")).unwrap();
        let error = builder.start().unwrap().expect_end(0).unwrap_err();
        assert!(error.to_string().contains("x.sock"), "{error}");
    }

    #[test]
    fn a_wrong_end_shows_the_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let context = context(dir.path(), "echo no memory >&2; exit 1");
        let vm = VmBuilder::new(&context).unwrap().start().unwrap();
        let error = vm.expect_end(0).unwrap_err().to_string();
        assert!(error.contains("exit code 1") && error.contains("no memory"), "{error}");
    }
}
