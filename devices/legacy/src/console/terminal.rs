//! The terminal Triarch was started from, while a guest has it.

use std::io;
use std::panic;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::sys;

/// How the terminal was set when a guest got it first. It lives as long as the process because signal handlers and exit hooks
/// can reach nothing else.
static BEFORE: OnceLock<libc::termios> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

/// Keeps stdin in raw mode; dropping it restores the terminal.
pub(super) struct RawMode(());

impl RawMode {
    /// Passes every key to the guest, Ctrl-C too. Output processing stays on, so that log lines of the VMM start in column one.
    /// `None` when stdin is no terminal, is already raw, or belongs to another job.
    pub(super) fn enter() -> io::Result<Option<Self>> {
        let Ok(before) = sys::attributes(sys::STDIN) else {
            return Ok(None);
        };
        if !sys::in_foreground(sys::STDIN) || RAW.swap(true, Ordering::SeqCst) {
            return Ok(None);
        }
        if BEFORE.set(before).is_ok() {
            sys::at_exit(at_exit);
            let next = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                restore_terminal();
                next(info);
            }));
        }
        let guard = Self(());
        let mut raw = before;
        sys::fully_raw(&mut raw);
        raw.c_oflag = before.c_oflag;
        sys::set_attributes(sys::STDIN, &raw)?;
        Ok(Some(guard))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_terminal();
    }
}

extern "C" fn at_exit() {
    restore_terminal();
}

/// Gives the terminal its settings back, if a guest has it. Exits and panics do so by themselves; handlers of deadly signals
/// call it (it is async-signal-safe).
pub fn restore_terminal() {
    if let Some(before) = BEFORE.get()
        && RAW.swap(false, Ordering::SeqCst)
    {
        // Nothing can be done about a terminal that is gone.
        let _ = sys::set_attributes(sys::STDIN, before);
    }
}
