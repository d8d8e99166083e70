//! What a process prints: kept, timed, and waited for.

use anyhow::{Result, bail};
use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What is kept at most, in bytes; a guest that prints without end must not fill the memory.
const KEPT: usize = 8 << 20;

#[derive(Default)]
struct Log {
    text: Vec<u8>,
    /// Start in `text` and time of each piece that was read.
    pieces: Vec<(usize, Instant)>,
    ended: bool,
}

/// A stream that is read by a thread of its own until it ends.
#[derive(Clone, Default)]
pub struct Capture {
    shared: Arc<(Mutex<Log>, Condvar)>,
}

/// Where a pattern was found.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// The first byte behind it; the place to search on from.
    pub end: usize,
    /// When its last byte was read.
    pub at: Instant,
}

impl Capture {
    /// Reads `stream` to its end. The thread ends with it.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(mut stream: impl Read + Send + 'static) -> Result<(Self, JoinHandle<()>)> {
        let capture = Self::default();
        let ours = capture.clone();
        let thread = thread::Builder::new().name("capture".into()).spawn(move || {
            let mut buffer = vec![0; 16 << 10];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                ours.add(&buffer[..n]);
            }
            ours.lock().ended = true;
            ours.shared.1.notify_all();
        })?;
        Ok((capture, thread))
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, data: &[u8]) {
        let mut log = self.lock();
        let room = KEPT.saturating_sub(log.text.len()).min(data.len());
        if room > 0 {
            let start = log.text.len();
            log.pieces.push((start, Instant::now()));
            log.text.extend_from_slice(&data[..room]);
        }
        drop(log);
        self.shared.1.notify_all();
    }

    /// All that was printed so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().text).into_owned()
    }

    /// Number of bytes printed so far: the place from which only later output is searched.
    pub fn len(&self) -> usize {
        self.lock().text.len()
    }

    /// Whether nothing was printed yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// When the first byte was read.
    pub fn first_byte(&self) -> Option<Instant> {
        Some(self.lock().pieces.first()?.1)
    }

    /// How often `pattern` was printed so far.
    pub fn count(&self, pattern: &str) -> usize {
        self.text().matches(pattern).count()
    }

    /// Waits until `pattern` is printed at or after the byte `from`.
    ///
    /// # Errors
    /// It is not within `limit`, or the stream ends without it; the error shows the last lines.
    pub fn wait_for(&self, pattern: &str, from: usize, limit: Duration) -> Result<Found> {
        let deadline = Instant::now() + limit;
        let mut log = self.lock();
        loop {
            if let Some(found) = find(&log, pattern.as_bytes(), from) {
                return Ok(found);
            }
            let wait = deadline.saturating_duration_since(Instant::now());
            if log.ended {
                bail!(
                    "the output ended without `{pattern}`; its end was:\n{}",
                    tail(&log.text)
                );
            }
            if wait.is_zero() {
                bail!(
                    "no `{pattern}` in {limit:?}; the output ends with:\n{}",
                    tail(&log.text)
                );
            }
            let waited = self.shared.1.wait_timeout(log, wait);
            log = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn find(log: &Log, pattern: &[u8], from: usize) -> Option<Found> {
    let searched = log.text.get(from..)?;
    let start = searched.windows(pattern.len().max(1)).position(|w| w == pattern)?;
    let end = from + start + pattern.len();
    let piece = log.pieces.partition_point(|(start, _)| *start < end);
    Some(Found {
        end,
        at: log.pieces.get(piece.checked_sub(1)?)?.1,
    })
}

/// The last lines of an output, for error messages.
pub fn tail(text: &[u8]) -> String {
    const LINES: usize = 25;
    let text = String::from_utf8_lossy(text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn finds_what_comes_in_pieces() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let (capture, thread) = Capture::start(reader).unwrap();
        writer.write_all(b"one tw").unwrap();
        capture.wait_for("tw", 0, Duration::from_secs(10)).unwrap();
        let before = Instant::now();
        writer.write_all(b"o two\n").unwrap();
        let found = capture.wait_for("two", 0, Duration::from_secs(10)).unwrap();
        assert_eq!(found.end, 7);
        assert!(found.at >= before);
        assert!(capture.first_byte().unwrap() <= before);
        assert_eq!(
            capture.wait_for("two", found.end, Duration::from_secs(10)).unwrap().end,
            11
        );
        assert_eq!(capture.count("two"), 2);
        drop(writer);
        let error = capture
            .wait_for("three", 0, Duration::from_secs(10))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("ended without `three`") && error.contains("one two two"),
            "{error}"
        );
        thread.join().unwrap();
    }

    #[test]
    fn gives_up_in_time() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let (capture, _thread) = Capture::start(reader).unwrap();
        let error = capture.wait_for("x", 0, Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("no `x` in 50ms"));
    }

    #[test]
    fn keeps_a_bounded_part() {
        let (capture, thread) = Capture::start(std::io::repeat(b'x').take(KEPT as u64 + 9)).unwrap();
        thread.join().unwrap();
        assert_eq!(capture.len(), KEPT);
    }
}
