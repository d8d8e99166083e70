//! The signals that end a daemon.

#![allow(unsafe_code)] // signal sets

use std::io;
use std::mem::MaybeUninit;

/// SIGTERM and SIGINT, held back from every thread until somebody [waits](Self::wait) for them.
pub struct Signals {
    set: libc::sigset_t,
}

impl Signals {
    /// Holds them back on this thread and on those it makes. Call it before there is another one.
    pub fn hold() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set, the others change an initialised one, all of them through a pointer that lives.
        let (result, set) = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
            libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
            let result = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            (result, set.assume_init())
        };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        Ok(Self { set })
    }

    /// Waits until one comes.
    pub fn wait(&self) {
        loop {
            // SAFETY: the set is initialised; nothing is asked to be written.
            let signal = unsafe { libc::sigwaitinfo(&self.set, std::ptr::null_mut()) };
            // Only other signals, such as a debugger's, interrupt it.
            if signal > 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_came_before_is_not_missed() {
        let signals = Signals::hold().expect("hold");
        // SAFETY: sends a signal to this thread, which holds it back.
        let sent = unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGTERM) };
        assert_eq!(sent, 0);
        signals.wait();
    }
}
