//! How fast a disk is read: single blocks at random places, by some threads, past the page cache. Nothing is written, so that a host may read
//! its own disks with it, too.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::soak::{BLOCK, random};

/// What a reader has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Blocks that were read.
    pub requests: u64,
    /// How long that took.
    pub time: Duration,
}

/// Memory that a disk's driver takes as it is (`O_DIRECT`, open(2)).
#[repr(align(4096))]
struct Buffer([u8; BLOCK]);

/// Reads `disk` for `time` by `threads` threads, each of which has one request in flight.
///
/// # Errors
/// A request failed, or the disk has not a single block.
pub fn run(disk: &Path, threads: u64, time: Duration) -> io::Result<Seen> {
    let mut file = File::options().read(true).custom_flags(libc::O_DIRECT).open(disk)?;
    let blocks = file.seek(SeekFrom::End(0))? / BLOCK as u64;
    if blocks == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let (requests, start) = (AtomicU64::new(0), Instant::now());
    let read = |seed: u64| {
        let (mut buffer, mut state) = (Box::new(Buffer([0; BLOCK])), seed);
        while start.elapsed() < time {
            let at = random(&mut state) % blocks * BLOCK as u64;
            file.read_exact_at(&mut buffer.0, at)?;
            requests.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    let read = &read;
    let results: Vec<io::Result<()>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|seed| scope.spawn(move || read(seed))).collect();
        let end = |thread: thread::ScopedJoinHandle<'_, io::Result<()>>| {
            let panicked = |_| Err(io::Error::other("a thread panicked"));
            thread.join().unwrap_or_else(panicked)
        };
        threads.into_iter().map(end).collect()
    });
    results.into_iter().collect::<io::Result<()>>()?;
    Ok(Seen {
        requests: requests.into_inner(),
        time: start.elapsed(),
    })
}

/// The program: `disk-read DISK THREADS MILLISECONDS`. Prints a line with what it has seen, which [`parse`] reads.
///
/// # Errors
/// As [`run`], or the words are none of a reader.
pub fn main(words: &[&str]) -> io::Result<()> {
    let [disk, threads, time] = words else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let number = |text: &str| text.parse::<u64>().map_err(io::Error::other);
    let seen = run(Path::new(disk), number(threads)?, Duration::from_millis(number(time)?))?;
    println!("requests={} us={}", seen.requests, seen.time.as_micros());
    Ok(())
}

/// What the program has printed.
pub fn parse(line: &str) -> Option<Seen> {
    let (requests, time) = line.trim().strip_prefix("requests=")?.split_once(" us=")?;
    Some(Seen {
        requests: requests.parse().ok()?,
        time: Duration::from_micros(time.parse().ok()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_and_counted() {
        let us = std::env::current_exe().unwrap();
        // A directory whose file system takes direct I/O.
        let dir = tempfile::tempdir_in(us.parent().unwrap()).unwrap();
        let disk = dir.path().join("disk");
        std::fs::write(&disk, vec![0; 16 * BLOCK]).unwrap();
        let time = Duration::from_millis(20);
        let seen = run(&disk, 3, time).unwrap();
        assert!(seen.requests >= 3 && seen.time >= time, "{seen:?}");
        std::fs::write(&disk, [0; 10]).unwrap();
        assert!(run(&disk, 1, time).is_err());
    }

    #[test]
    fn what_is_printed_is_understood() {
        let seen = Seen {
            requests: 12,
            time: Duration::from_micros(345),
        };
        assert_eq!(parse("requests=12 us=345\n"), Some(seen));
        assert_eq!(parse("requests=12"), None);
    }
}
