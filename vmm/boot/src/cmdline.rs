//! The kernel command line.

use thiserror::Error;

/// Longest command line, in bytes without the NUL, of kernels that do not state one (x86 Linux has
/// `COMMAND_LINE_SIZE` 2048 with the NUL).
pub const DEFAULT_CMDLINE_MAX: usize = 2047;

/// Why a string is no command line.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CmdlineError {
    /// Longer than the kernel reads.
    #[error("the kernel command line has {len} bytes and this kernel takes {max}; shorten it")]
    TooLong {
        /// Its length in bytes.
        len: usize,
        /// The most that the kernel takes, in bytes.
        max: usize,
    },
    /// It contains the byte that ends it.
    #[error("the kernel command line has a NUL byte at position {at}; remove it")]
    Nul {
        /// The byte's index.
        at: usize,
    },
}

/// Checks that a kernel that takes `max` bytes reads all of `cmdline`.
pub fn check_cmdline(cmdline: &str, max: usize) -> Result<(), CmdlineError> {
    if let Some(at) = cmdline.bytes().position(|byte| byte == 0) {
        return Err(CmdlineError::Nul { at });
    }
    if cmdline.len() > max {
        return Err(CmdlineError::TooLong {
            len: cmdline.len(),
            max,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_both_lengths() {
        assert_eq!(check_cmdline("quiet", 5), Ok(()));
        let error = check_cmdline("quietly", 5).unwrap_err();
        assert!(error.to_string().contains("7 bytes") && error.to_string().contains("takes 5"));
        assert_eq!(check_cmdline("a\0b", 5), Err(CmdlineError::Nul { at: 1 }));
    }
}
