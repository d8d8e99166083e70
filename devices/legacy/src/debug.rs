//! Ports that firmware and payloads talk to before they have any driver.

use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use triarch_device_core::{AccessError, BusDevice, RateLimit};

use crate::clock::Clock;
use crate::console::Console;

/// What reads of a debug port give: how firmware finds out that there is one.
pub const DEBUG_PORT_MAGIC: u8 = 0xe9;
/// Lines longer than this go to the log in pieces.
const LINE: usize = 240;

/// A port whose every byte goes out: 0x402 by convention. Claim one byte for it.
pub struct DebugPort(Output);

enum Output {
    Console(Arc<Console>),
    Log { line: Mutex<Vec<u8>>, limit: RateLimit },
}

impl DebugPort {
    /// Bytes go to `console`, all of them.
    pub fn to_console(console: Arc<Console>) -> Self {
        Self(Output::Console(console))
    }

    /// Lines go to the log at level debug, under the target `guest`, with a limit on how many: a guest must not fill the host's disk.
    pub fn to_log() -> Self {
        Self(Output::Log {
            line: Mutex::new(Vec::new()),
            limit: RateLimit::new(200, Duration::from_secs(1)),
        })
    }
}

impl BusDevice for DebugPort {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let (0, [value]) = (offset, data) else {
            return Err(AccessError::BadAccess);
        };
        *value = DEBUG_PORT_MAGIC;
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let (0, &[value]) = (offset, data) else {
            return Err(AccessError::BadAccess);
        };
        match &self.0 {
            Output::Console(console) => console.write(&[value]),
            Output::Log { line, limit } => {
                let mut line = line.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(text) = gather(&mut line, value)
                    && let Some(held_back) = limit.admit()
                {
                    tracing::debug!(target: "guest", held_back, "{text}");
                }
            }
        }
        Ok(())
    }
}

/// Adds a byte; returns the line when it is whole. Control characters are spelled out, for the log may be a terminal.
fn gather(line: &mut Vec<u8>, byte: u8) -> Option<String> {
    match byte {
        b'\r' => return None,
        b'\n' if line.is_empty() => return None,
        b'\n' => {}
        _ => line.push(byte),
    }
    if byte != b'\n' && line.len() < LINE {
        return None;
    }
    let text = line.escape_ascii().to_string();
    line.clear();
    Some(text)
}

/// POST codes kept.
const CODES: usize = 64;
/// Codes are kept in the top byte of a word and nanoseconds below: 2 years of them.
const TIME_BITS: u32 = 56;

/// Port 0x80: swallows progress codes and keeps the first ones with their time, to see where a boot spends it. Claim one byte for it.
///
/// Linux writes here to pass a microsecond, so a code that repeats the one before is not kept again.
pub struct PostCodes {
    clock: Arc<dyn Clock>,
    last: AtomicU8,
    used: AtomicUsize,
    codes: [AtomicU64; CODES],
}

impl PostCodes {
    /// No codes yet. Times are `clock`'s monotonic ones.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            last: AtomicU8::new(0),
            used: AtomicUsize::new(0),
            codes: [const { AtomicU64::new(0) }; CODES],
        }
    }

    /// The first codes, each with the time of its first write.
    pub fn codes(&self) -> Vec<(u8, Duration)> {
        let used = self.used.load(Ordering::Acquire).min(CODES);
        let words = self.codes[..used].iter().map(|c| c.load(Ordering::Relaxed));
        words
            .map(|w| ((w >> TIME_BITS) as u8, Duration::from_nanos(w & ((1 << TIME_BITS) - 1))))
            .collect()
    }
}

impl BusDevice for PostCodes {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let (0, [value]) = (offset, data) else {
            return Err(AccessError::BadAccess);
        };
        *value = self.last.load(Ordering::Relaxed);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let (0, &[value]) = (offset, data) else {
            return Err(AccessError::BadAccess);
        };
        let changed = self.last.swap(value, Ordering::Relaxed) != value;
        if !changed || self.used.load(Ordering::Relaxed) >= CODES {
            return Ok(());
        }
        // Only that many increments pass the check above as there are vCPUs, so the counter cannot wrap.
        if let Some(code) = self.codes.get(self.used.fetch_add(1, Ordering::AcqRel)) {
            let time = self.clock.monotonic().as_nanos() as u64 & ((1 << TIME_BITS) - 1);
            code.store(u64::from(value) << TIME_BITS | time, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::console::Backend;

    #[test]
    fn debug_bytes_reach_the_console() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("debug");
        let console = Arc::new(Console::open(&Backend::File(path.clone())).unwrap());
        let port = DebugPort::to_console(console);
        let mut magic = [0];
        port.read(0, &mut magic).unwrap();
        assert_eq!(magic, [DEBUG_PORT_MAGIC]);
        for byte in *b"ok\n" {
            port.write(0, &[byte]).unwrap();
        }
        assert_eq!(std::fs::read(path).unwrap(), b"ok\n");
        assert_eq!(port.write(0, &[0; 2]), Err(AccessError::BadAccess));
    }

    #[test]
    fn log_lines_are_whole_bounded_and_harmless() {
        let mut line = Vec::new();
        let mut feed = |bytes: &[u8]| bytes.iter().filter_map(|b| gather(&mut line, *b)).collect::<Vec<_>>();
        assert_eq!(feed(b"one\r\ntwo"), ["one"]);
        assert_eq!(feed(b"\n\n\n"), ["two"]);
        assert_eq!(feed(b"\x1b[2J\n"), ["\\x1b[2J"]);
        assert_eq!(feed(&[b'x'; LINE + 1]), ["x".repeat(LINE)]);
    }

    #[test]
    fn post_codes_keep_the_first_times() {
        let clock = ManualClock::at(5);
        let port = PostCodes::new(clock.clone());
        for (time, code) in [(5, 0x10), (6, 0x10), (7, 0x20), (8, 0x10)] {
            clock.set(time);
            port.write(0, &[code]).unwrap();
        }
        let ns = Duration::from_nanos;
        assert_eq!(port.codes(), [(0x10, ns(5)), (0x20, ns(7)), (0x10, ns(8))]);
        let mut last = [0];
        port.read(0, &mut last).unwrap();
        assert_eq!(last, [0x10]);
        for i in 0..1000u32 {
            port.write(0, &[i as u8]).unwrap();
        }
        assert_eq!(port.codes().len(), CODES);
        assert_eq!(port.codes()[0], (0x10, ns(5)));
    }
}
