//! Ports that firmware and payloads talk to before they have any driver.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use triarch_device_core::{AccessError, ByteRegisters, RateLimit};

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

impl ByteRegisters for DebugPort {
    const COUNT: u64 = 1;

    fn read_byte(&self, _offset: u64) -> Result<u8, AccessError> {
        Ok(DEBUG_PORT_MAGIC)
    }

    fn write_byte(&self, _offset: u64, value: u8) -> Result<(), AccessError> {
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

/// Port 0x80: progress codes of firmware. It gives back the last one and does nothing else; Linux writes here to pass a microsecond.
/// Claim one byte for it.
#[derive(Default)]
pub struct PostPort(AtomicU8);

impl ByteRegisters for PostPort {
    const COUNT: u64 = 1;

    fn read_byte(&self, _offset: u64) -> Result<u8, AccessError> {
        Ok(self.0.load(Ordering::Relaxed))
    }

    fn write_byte(&self, _offset: u64, value: u8) -> Result<(), AccessError> {
        self.0.store(value, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::Backend;
    use triarch_device_core::BusDevice as _;

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
    fn post_codes_are_remembered() {
        let port = PostPort::default();
        for code in [0x10, 0x20] {
            port.write(0, &[code]).unwrap();
            let mut last = [0];
            port.read(0, &mut last).unwrap();
            assert_eq!(last, [code]);
        }
    }
}
