//! A terminal for a VMM to run on, of any size.
#![allow(unsafe_code)]

use anyhow::{Context, Result};
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A pseudo-terminal (pty(7)). It is nobody's controlling terminal: whoever runs on it hears of its new size only from the test.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    /// Held open: the last one to close it would bring the first settings back.
    _slave: File,
    path: PathBuf,
}

/// How a terminal is set: the flags and characters of termios(3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    flags: [libc::tcflag_t; 4],
    characters: [libc::cc_t; libc::NCCS],
}

impl Terminal {
    /// Makes a terminal of this size in characters.
    ///
    /// # Errors
    /// The system has no more of them.
    pub fn new(columns: u16, rows: u16) -> Result<Self> {
        const FLAGS: libc::c_int = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: takes plain numbers.
        let master = check(unsafe { libc::posix_openpt(FLAGS) }).context("cannot make a terminal")?;
        // SAFETY: the kernel just made this descriptor and nothing else owns it.
        let master = unsafe { File::from_raw_fd(master) };
        // SAFETY: an open descriptor.
        check(unsafe { libc::unlockpt(master.as_raw_fd()) })?;
        let mut name = [0; 64];
        // SAFETY: the buffer is as long as said, and ends with a zero when the call succeeds.
        let failed = unsafe { libc::ptsname_r(master.as_raw_fd(), name.as_mut_ptr(), name.len()) };
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed)).context("a terminal without a name");
        }
        // SAFETY: as said above.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) };
        let path = PathBuf::from(OsStr::from_bytes(name.to_bytes()));
        let slave = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        let terminal = Self {
            master,
            _slave: slave,
            path,
        };
        terminal.resize(columns, rows)?;
        Ok(terminal)
    }

    /// What a program opens to be on it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a person would sit: reads what is on it, writes what is typed.
    ///
    /// # Errors
    /// There are too many descriptors.
    pub fn other_end(&self) -> io::Result<File> {
        self.master.try_clone()
    }

    /// Gives it another size.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: an open descriptor and a live winsize, which is what this ioctl reads.
        check(unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })?;
        Ok(())
    }

    /// How it is set now.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn settings(&self) -> Result<Settings> {
        // SAFETY: termios is plain data, for which zeroes are valid.
        let mut termios: libc::termios = unsafe { mem::zeroed() };
        // SAFETY: an open descriptor and a live termios.
        check(unsafe { libc::tcgetattr(self.master.as_raw_fd(), &raw mut termios) })?;
        Ok(Settings {
            flags: [termios.c_iflag, termios.c_oflag, termios.c_cflag, termios.c_lflag],
            characters: termios.c_cc,
        })
    }
}

fn check(result: RawFd) -> io::Result<RawFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn programs_on_it_see_its_size_and_change_its_settings() {
        let terminal = Terminal::new(91, 17).unwrap();
        let before = terminal.settings().unwrap();
        let stty = |argument: &str| {
            let stdin = File::open(terminal.path()).unwrap();
            let output = Command::new("stty").arg(argument).stdin(Stdio::from(stdin)).output();
            String::from_utf8(output.unwrap().stdout).unwrap()
        };
        assert_eq!(stty("size"), "17 91\n");
        terminal.resize(50, 20).unwrap();
        assert_eq!(stty("size"), "20 50\n");
        stty("-echo");
        assert_ne!(terminal.settings().unwrap(), before);
        stty("echo");
        assert_eq!(terminal.settings().unwrap(), before);
    }
}
