//! Descriptors that trictl was started with.
#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, RawFd};

/// The descriptors of these numbers, for `command`.
///
/// # Errors
/// One of them is not open.
pub(crate) fn descriptors(command: &str, numbers: &[RawFd]) -> Result<Vec<BorrowedFd<'static>>, String> {
    numbers.iter().map(|number| descriptor(command, *number)).collect()
}

fn descriptor(command: &str, number: RawFd) -> Result<BorrowedFd<'static>, String> {
    let problem =
        || format!("{command}: descriptor {number} is not open; open it for trictl, as in 'trictl ... 3<>/dev/x'");
    if number < 0 {
        return Err(problem());
    }
    // SAFETY: the number is not -1. What is open under it was opened by whoever started this program; nothing here closes
    // descriptors that it did not open itself, so it stays open as long as the program runs. Should nothing be open, the first
    // call says so and the descriptor is not used again.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_getfd(fd).map_err(|_| problem())?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn only_what_is_open_is_found() {
        let file = tempfile::tempfile().expect("a file").into_raw_fd();
        let found = descriptors("add-net", &[file]).expect("open");
        assert_eq!(found[0].as_raw_fd(), file);
        for bad in [-1, 1 << 20] {
            let error = descriptors("add-device", &[file, bad]).expect_err("not open");
            assert!(error.contains(&format!("descriptor {bad} is not open")), "{error}");
        }
    }
}
