//! What signals do in a test and in what it starts.
#![allow(unsafe_code)]

use std::io;

/// Those that shells ignore for what they start in the background, and `nohup` for everything.
const TERMINAL: [libc::c_int; 3] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT];

/// Lets the signals of terminals do what they do by default, here and in every program that is started from here. A program inherits
/// what is ignored, and a VMM that finds SIGHUP ignored does not end with its terminal.
///
/// # Errors
/// The kernel refused.
pub fn by_default() -> io::Result<()> {
    for signal in TERMINAL {
        // SAFETY: no handler is installed, so nothing of this program runs when the signal comes.
        if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// The signals that a program which is started now ignores.
    fn inherited() -> u64 {
        let status = Command::new("grep").args(["SigIgn", "/proc/self/status"]).output();
        let status = String::from_utf8(status.expect("grep").stdout).expect("text");
        let mask = status.split_whitespace().last().expect("a mask");
        u64::from_str_radix(mask, 16).expect("hexadecimal digits")
    }

    #[test]
    fn what_is_started_does_not_ignore_what_its_starter_did() {
        let hang_up = 1 << (libc::SIGHUP - 1);
        // SAFETY: the signal does nothing then, and the other test threads do not care.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
        assert_eq!(inherited() & hang_up, hang_up);
        by_default().expect("signals");
        assert_eq!(inherited() & (hang_up | 0b110), 0);
    }
}
