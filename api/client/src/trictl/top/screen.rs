//! The terminal: its own screen while a page is shown, and as it was before afterwards.

use std::io::{self, Stdin, Stdout, Write};
use std::panic;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::termios::{self, OptionalActions, Termios};
use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};

/// The alternate screen without a cursor, and back (xterm control sequences, DECSET 1049 and 25).
const ENTER: &str = "\u{1b}[?1049h\u{1b}[?25l\u{1b}[2J";
const LEAVE: &str = "\u{1b}[?25h\u{1b}[?1049l";
/// What ^C and ^D are while the terminal does not interpret them.
const INTERRUPT: u8 = 3;
const END: u8 = 4;

/// What the user did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    /// Has enough.
    Quit,
    /// Changed the window's size.
    Resized,
    /// Something that means nothing.
    Other,
    /// Nothing in all the time.
    None,
}

/// The terminal, taken. Dropping it gives it back.
pub(super) struct Screen {
    input: Stdin,
    output: Stdout,
    before: Termios,
    resized: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    signals: Vec<SigId>,
}

impl Screen {
    /// Takes the terminal that standard input and output are.
    ///
    /// # Errors
    /// They are none.
    pub(super) fn enter() -> io::Result<Self> {
        let (input, output) = (io::stdin(), io::stdout());
        let before = termios::tcgetattr(&input)?;
        let mut screen = Self {
            input,
            output,
            before,
            resized: Arc::default(),
            ended: Arc::default(),
            signals: Vec::new(),
        };
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            let id = signal_hook::flag::register(signal, screen.ended.clone())?;
            screen.signals.push(id);
        }
        let id = signal_hook::flag::register(SIGWINCH, screen.resized.clone())?;
        screen.signals.push(id);
        // A panic must be readable, too; where it aborts nothing is dropped.
        let (saved, print) = (screen.before.clone(), panic::take_hook());
        panic::set_hook(Box::new(move |what| {
            restore(&saved);
            print(what);
        }));
        let mut raw = screen.before.clone();
        raw.make_raw();
        termios::tcsetattr(&screen.input, OptionalActions::Flush, &raw)?;
        screen.output.write_all(ENTER.as_bytes())?;
        screen.output.flush()?;
        Ok(screen)
    }

    /// Columns and lines.
    pub(super) fn size(&self) -> (usize, usize) {
        match termios::tcgetwinsize(&self.output) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => (size.ws_col.into(), size.ws_row.into()),
            // A serial line does not know.
            _ => (80, 24),
        }
    }

    /// Shows `lines` in the place of what was shown.
    ///
    /// # Errors
    /// The terminal is gone.
    pub(super) fn draw(&mut self, lines: &[String]) -> io::Result<()> {
        let frame = frame(lines);
        self.output.write_all(frame.as_bytes())?;
        self.output.flush()
    }

    /// Waits at most `limit` for the user.
    ///
    /// # Errors
    /// The terminal is gone.
    pub(super) fn wait(&mut self, limit: Duration) -> io::Result<Key> {
        if self.ended.load(Ordering::Relaxed) {
            return Ok(Key::Quit);
        }
        if self.resized.swap(false, Ordering::Relaxed) {
            return Ok(Key::Resized);
        }
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(&self.input, PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Ok(0) => Ok(Key::None),
            // A signal: the next call tells which.
            Err(Errno::INTR) => Ok(Key::Other),
            Err(error) => Err(error.into()),
            Ok(_) => {
                let mut keys = [0; 64];
                let count = rustix::io::retry_on_intr(|| rustix::io::read(&self.input, &mut keys))?;
                Ok(meaning(&keys[..count]))
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        restore(&self.before);
        for signal in self.signals.drain(..) {
            signal_hook::low_level::unregister(signal);
        }
        if !std::thread::panicking() {
            let _ = panic::take_hook();
        }
    }
}

/// Makes the terminal what it was. There is nobody to tell when it cannot be done.
fn restore(before: &Termios) {
    let mut output = io::stdout();
    let _ = output.write_all(LEAVE.as_bytes());
    let _ = output.flush();
    let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, before);
}

/// The screen's new content, drawn over the old one so that nothing flickers (ECMA-48, CUP, EL, ED).
fn frame(lines: &[String]) -> String {
    let mut frame = String::from("\u{1b}[H");
    for (at, line) in lines.iter().enumerate() {
        if at > 0 {
            frame.push_str("\r\n");
        }
        // Emptied first, the last one with all below it: behind the last column the cursor would stand on the last character.
        let last = at + 1 == lines.len();
        frame.push_str(if last { "\u{1b}[J" } else { "\u{1b}[2K" });
        frame.push_str(line);
    }
    frame
}

/// What keys mean; none at all is the end of a terminal.
fn meaning(keys: &[u8]) -> Key {
    match keys {
        [] | [b'q' | b'Q' | INTERRUPT | END, ..] => Key::Quit,
        _ => Key::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q_and_the_usual_keys_end_it() {
        for keys in [&b"q"[..], b"Q", &[INTERRUPT], &[END], b""] {
            assert_eq!(meaning(keys), Key::Quit);
        }
        // An arrow.
        assert_eq!(meaning(b"\x1b[A"), Key::Other);
    }

    #[test]
    fn a_frame_replaces_all_that_was_there() {
        let frame = frame(&["ab".into(), "c".into()]);
        assert_eq!(frame, "\u{1b}[H\u{1b}[2Kab\r\n\u{1b}[Jc");
    }
}
