//! Where random bytes come from.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use thiserror::Error;

/// Gives random bytes.
pub struct EntropySource(Option<(File, PathBuf)>);

/// Why a source cannot be used.
#[derive(Debug, Error)]
#[error("cannot read entropy from {}; give a readable device or file, like src=/dev/urandom", path.display())]
pub struct SourceError {
    /// The source.
    pub path: PathBuf,
    /// Cause.
    #[source]
    pub source: io::Error,
}

impl EntropySource {
    /// The host kernel's generator, without a descriptor: what `/dev/urandom` gives.
    pub fn kernel() -> Self {
        Self(None)
    }

    /// A device such as `/dev/hwrng`, or a file. `/dev/urandom` and `/dev/random` are the kernel's generator.
    ///
    /// A file that ends or fails is replaced by the kernel's generator: a guest that waits for entropy must not hang.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        if [Path::new("/dev/urandom"), Path::new("/dev/random")].contains(&path) {
            return Ok(Self::kernel());
        }
        let failed = |source| SourceError {
            path: path.to_owned(),
            source,
        };
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(path)
            .map_err(failed)?;
        if file.metadata().map_err(failed)?.is_dir() {
            return Err(failed(io::ErrorKind::IsADirectory.into()));
        }
        Ok(Self(Some((file, path.to_owned()))))
    }

    /// Fills a part of `buf`, at least one byte unless it is empty; returns how many. `WouldBlock` when a device has none now: its
    /// descriptor becomes readable when it has.
    pub(super) fn fill(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if let Some((file, path)) = &mut self.0 {
            match file.read(buf) {
                Ok(n) if n > 0 || buf.is_empty() => return Ok(n),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(_) => tracing::warn!("{} has ended: the kernel's entropy is used instead", path.display()),
                Err(e) => tracing::warn!("{}: {e}: the kernel's entropy is used instead", path.display()),
            }
            self.0 = None;
        }
        kernel_random(buf)
    }
}

impl AsRawFd for EntropySource {
    /// The descriptor to wait on after `WouldBlock`; the kernel's generator never needs one.
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_ref().map_or(-1, |(file, _)| file.as_raw_fd())
    }
}

fn kernel_random(buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match getrandom(&mut *buf, GetRandomFlags::empty()) {
            Err(Errno::INTR) => {}
            done => return Ok(done?),
        }
    }
}
