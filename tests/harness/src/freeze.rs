//! A thread that does not get on: what a VMM looks like whose disk does not answer.
#![allow(unsafe_code)]

use anyhow::{Context, Result};
use std::fs;
use std::io;
use std::ptr::null_mut;

/// A thread of another process that stands still (ptrace(2)). Dropped, it goes on.
#[derive(Debug)]
pub struct Frozen(libc::pid_t);

impl Frozen {
    /// Stops the thread called `name` of the process `pid`, which this one has started.
    ///
    /// # Errors
    /// There is no such thread, or processes may not do that to each other here.
    pub fn thread(pid: u32, name: &str) -> Result<Self> {
        let mut threads = fs::read_dir(format!("/proc/{pid}/task"))?.filter_map(Result::ok);
        let is_it = |entry: &fs::DirEntry| {
            fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name)
        };
        let found = threads.find(is_it).with_context(|| format!("no thread {name}"))?;
        let tid = found.file_name().to_string_lossy().parse()?;
        ptrace(libc::PTRACE_SEIZE, tid).context("cannot trace it")?;
        let frozen = Self(tid);
        ptrace(libc::PTRACE_INTERRUPT, tid).context("cannot stop it")?;
        let mut status = 0;
        // SAFETY: the status outlives the call.
        let waited = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) };
        anyhow::ensure!(waited == tid, "it did not stop: {}", io::Error::last_os_error());
        Ok(frozen)
    }

    /// Waits for the thread's end: its process does not end without somebody having taken note of it.
    pub fn wait_for_end(self) {
        let mut status = 0;
        loop {
            // SAFETY: the status outlives the call.
            let waited = unsafe { libc::waitpid(self.0, &raw mut status, libc::__WALL) };
            if waited != self.0 || libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                return;
            }
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // It fails when the thread has ended.
        let _ = ptrace(libc::PTRACE_DETACH, self.0);
    }
}

fn ptrace(request: libc::c_uint, tid: libc::pid_t) -> io::Result<()> {
    // SAFETY: these requests take no address, and the data is a number.
    match unsafe { libc::ptrace(request, tid, null_mut::<libc::c_void>(), null_mut::<libc::c_void>()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    #[test]
    fn it_stands_still_until_it_is_let_go() {
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut answer = [0];
        // It has its name some time after it is started.
        stdin.write_all(b"a").unwrap();
        stdout.read_exact(&mut answer).unwrap();
        assert!(Frozen::thread(child.id(), "dog").is_err());
        let frozen = Frozen::thread(child.id(), "cat").unwrap();
        stdin.write_all(b"b").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        assert!(stat.contains(") t "), "{stat}");
        drop(frozen);
        stdout.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"b");
        drop(stdin);
        child.wait().unwrap();
    }
}
