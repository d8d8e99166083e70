//! Opening kernels and initramfs with errors a person can act on.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why a boot file could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is no such file.
    #[error("{role} '{}' does not exist; check the path", .path.display())]
    Missing {
        /// What the file was to be.
        role: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// The path names a directory, socket, pipe or device.
    #[error("{role} '{}' is {found}, not a regular file; give the path of the image itself", .path.display())]
    NotAFile {
        /// What the file was to be.
        role: &'static str,
        /// Its path.
        path: PathBuf,
        /// What it is instead.
        found: &'static str,
    },
    /// It may not be read.
    #[error("no permission to read {role} '{}'; change its owner or mode", .path.display())]
    Permission {
        /// What the file was to be.
        role: &'static str,
        /// Its path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The system refused.
    #[error("cannot open {role} '{}' for reading", .path.display())]
    Io {
        /// What the file was to be.
        role: &'static str,
        /// Its path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Opens `path` for reading; `role` ("kernel", "initramfs") is the first word of errors.
///
/// Does not block on a pipe without a writer, and accepts regular files only: the loaders seek.
pub fn open_boot_file(path: &Path, role: &'static str) -> Result<File, OpenError> {
    let io_error = |source| OpenError::Io {
        role,
        path: path.into(),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => OpenError::Missing {
                role,
                path: path.into(),
            },
            io::ErrorKind::PermissionDenied => OpenError::Permission {
                role,
                path: path.into(),
                source: error,
            },
            _ => io_error(error),
        })?;
    let kind = file.metadata().map_err(io_error)?.file_type();
    if kind.is_file() {
        return Ok(file);
    }
    Err(OpenError::NotAFile {
        role,
        path: path.into(),
        found: if kind.is_dir() {
            "a directory"
        } else {
            "a pipe or a device"
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_what_is_wrong() {
        let missing = open_boot_file(Path::new("/nonexistent/vmlinux"), "kernel").unwrap_err();
        assert_eq!(
            missing.to_string(),
            "kernel '/nonexistent/vmlinux' does not exist; check the path"
        );
        let directory = open_boot_file(Path::new("/"), "initramfs").unwrap_err();
        assert!(directory.to_string().contains("is a directory"));
        let device = open_boot_file(Path::new("/dev/null"), "kernel").unwrap_err();
        assert!(device.to_string().contains("a pipe or a device"));
    }

    #[test]
    fn opens_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(open_boot_file(file.path(), "kernel").is_ok());
    }
}
