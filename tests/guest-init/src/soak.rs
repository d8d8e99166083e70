//! A disk under load whose every byte is known: random writes, reads that compare, and flushes, by many threads at once.
//!
//! Each block carries data made from its number and from how often it was written. A table of these counts is kept in a file, so that one
//! run goes on where the last one ended, and so that whoever has the disk's image can compare it ([`compare`]).

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of a block: the unit that is written.
pub const BLOCK: usize = 4096;
/// Most blocks that one request is for.
const RUN: usize = 4;

/// What a soak does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The disk.
    pub disk: PathBuf,
    /// Where the table of versions is kept; one that is not there yet says that nothing was written.
    pub table: PathBuf,
    /// Requests in flight, each by a thread with blocks of its own.
    pub threads: usize,
    /// Blocks to work on, from the start of the disk.
    pub blocks: usize,
    /// How long; afterwards all that was ever written is read and compared.
    pub time: Duration,
    /// Seed of places.
    pub seed: u64,
}

/// What a soak has seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Requests answered.
    pub requests: u64,
    /// The longest time without any answer.
    pub stall: Duration,
}

/// The next of a sequence of random numbers (SplitMix64: Steele, Lea, Flood 2014).
pub(crate) fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills one block with what it holds after it was written `version` times.
fn fill(data: &mut [u8], block: usize, version: u32) {
    let mut state = (block as u64) << 32 | u64::from(version);
    for word in data.chunks_exact_mut(8) {
        word.copy_from_slice(&random(&mut state).to_le_bytes());
    }
}

/// Compares one block; the error says what it holds instead.
fn check(data: &[u8], block: usize, version: u32) -> io::Result<()> {
    let mut expected = [0; BLOCK];
    fill(&mut expected, block, version);
    if data == expected {
        return Ok(());
    }
    let older = (1..version).rev().find(|older| {
        fill(&mut expected, block, *older);
        data == expected
    });
    let instead = older.map_or("something else".to_owned(), |older| format!("version {older}"));
    Err(io::Error::other(format!(
        "block {block} has {instead} instead of version {version}"
    )))
}

fn versions(table: &[u8]) -> Vec<u32> {
    let word = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    table.chunks_exact(4).map(word).collect()
}

/// Compares a disk's image with the table of versions that a soak has left, and gives the number of blocks that were ever written.
///
/// # Errors
/// A block differs, or the image is too short for the table.
pub fn compare(image: &[u8], table: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    for (block, version) in versions(table).into_iter().enumerate().filter(|(_, v)| *v > 0) {
        let data = image.get(block * BLOCK..(block + 1) * BLOCK);
        check(data.ok_or(io::ErrorKind::UnexpectedEof)?, block, version)?;
        written += 1;
    }
    Ok(written)
}

/// Memory that a disk's driver takes as it is (`O_DIRECT`, open(2)).
#[repr(align(4096))]
struct Buffer([u8; RUN * BLOCK]);

/// What all threads share.
struct Shared<'a> {
    plan: &'a Plan,
    disk: File,
    start: Instant,
    /// When the last answer came, in nanoseconds since the start.
    last: AtomicU64,
    stall: AtomicU64,
    requests: AtomicU64,
    failed: AtomicBool,
}

impl Shared<'_> {
    fn answered(&self) {
        let now = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let before = self.last.fetch_max(now, Ordering::Relaxed);
        self.stall.fetch_max(now.saturating_sub(before), Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Works on the blocks from `first` on, whose versions these are.
    fn work(&self, first: usize, versions: &mut [u32]) -> io::Result<()> {
        let mut buffer = Box::new(Buffer([0; RUN * BLOCK]));
        let mut state = self.plan.seed ^ (first as u64) << 20;
        while self.start.elapsed() < self.plan.time && !self.failed.load(Ordering::Relaxed) {
            let at = random(&mut state) as usize % versions.len();
            let count = (1 + random(&mut state) as usize % RUN).min(versions.len() - at);
            let run = &mut versions[at..at + count];
            match random(&mut state) % 8 {
                0 => self.disk.sync_data()?,
                1 | 2 => self.read(&mut buffer, first + at, run)?,
                _ => self.write(&mut buffer, first + at, run)?,
            }
            self.answered();
        }
        for at in (0..versions.len()).step_by(RUN) {
            let count = RUN.min(versions.len() - at);
            self.read(&mut buffer, first + at, &versions[at..at + count])?;
            self.answered();
        }
        Ok(())
    }

    fn write(&self, buffer: &mut Buffer, block: usize, versions: &mut [u32]) -> io::Result<()> {
        let data = &mut buffer.0[..versions.len() * BLOCK];
        for (n, (version, data)) in versions.iter_mut().zip(data.chunks_exact_mut(BLOCK)).enumerate() {
            *version += 1;
            fill(data, block + n, *version);
        }
        let what = |e| at("writing", block, e);
        self.disk.write_all_at(data, (block * BLOCK) as u64).map_err(what)
    }

    fn read(&self, buffer: &mut Buffer, block: usize, versions: &[u32]) -> io::Result<()> {
        let data = &mut buffer.0[..versions.len() * BLOCK];
        let what = |e| at("reading", block, e);
        self.disk.read_exact_at(data, (block * BLOCK) as u64).map_err(what)?;
        let blocks = versions.iter().zip(data.chunks_exact(BLOCK)).enumerate();
        let mut written = blocks.filter(|(_, (version, _))| **version > 0);
        written.try_for_each(|(n, (version, data))| check(data, block + n, *version))
    }
}

fn at(what: &str, block: usize, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what} block {block}: {error}"))
}

/// Carries out a plan.
///
/// # Errors
/// A request failed, or a block holds what it should not.
pub fn run(plan: &Plan) -> io::Result<Seen> {
    let mut table = fs::read(&plan.table).or_else(|e| match e.kind() {
        io::ErrorKind::NotFound => Ok(Vec::new()),
        _ => Err(e),
    })?;
    table.resize(plan.blocks * 4, 0);
    let mut versions = versions(&table);
    let mut options = File::options();
    let disk = options.read(true).write(true).custom_flags(libc::O_DIRECT);
    let shared = Shared {
        plan,
        disk: disk.open(&plan.disk)?,
        start: Instant::now(),
        last: AtomicU64::new(0),
        stall: AtomicU64::new(0),
        requests: AtomicU64::new(0),
        failed: AtomicBool::new(false),
    };
    let share = plan.blocks.div_ceil(plan.threads.max(1)).max(1);
    let results: Vec<io::Result<()>> = thread::scope(|scope| {
        let parts = versions.chunks_mut(share).enumerate();
        let work = |(n, versions): (usize, _)| {
            let shared = &shared;
            scope.spawn(move || {
                let result = shared.work(n * share, versions);
                shared.failed.fetch_or(result.is_err(), Ordering::Relaxed);
                result
            })
        };
        let threads: Vec<_> = parts.map(work).collect();
        let end = |thread: thread::ScopedJoinHandle<'_, io::Result<()>>| {
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        };
        threads.into_iter().map(end).collect()
    });
    results.into_iter().collect::<io::Result<()>>()?;
    save(&plan.table, &versions)?;
    Ok(Seen {
        requests: shared.requests.into_inner(),
        stall: Duration::from_nanos(shared.stall.into_inner()),
    })
}

fn save(table: &Path, versions: &[u32]) -> io::Result<()> {
    let bytes: Vec<u8> = versions.iter().flat_map(|version| version.to_le_bytes()).collect();
    fs::write(table, bytes)
}

/// The program: `disk-soak DISK TABLE THREADS BLOCKS MILLISECONDS SEED`. Prints a line when it begins, and one with what it has seen.
///
/// # Errors
/// As [`run`], or the words are no plan.
pub fn main(words: &[&str]) -> io::Result<()> {
    let number = |text: &str| text.parse::<u64>().map_err(io::Error::other);
    let [disk, table, threads, blocks, time, seed] = words else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let plan = Plan {
        disk: disk.into(),
        table: table.into(),
        threads: number(threads)? as usize,
        blocks: number(blocks)? as usize,
        time: Duration::from_millis(number(time)?),
        seed: number(seed)?,
    };
    println!("soaking");
    io::stdout().flush()?;
    let seen = run(&plan)?;
    println!("requests={} stall_us={}", seen.requests, seen.stall.as_micros());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(dir: &Path) -> Plan {
        let disk = dir.join("disk");
        fs::write(&disk, vec![0; 64 * BLOCK]).unwrap();
        Plan {
            disk,
            table: dir.join("table"),
            threads: 5,
            blocks: 64,
            time: Duration::from_millis(50),
            seed: 1,
        }
    }

    /// A directory whose file system takes direct I/O.
    fn dir() -> tempfile::TempDir {
        let us = std::env::current_exe().unwrap();
        tempfile::tempdir_in(us.parent().unwrap()).unwrap()
    }

    #[test]
    fn the_image_holds_what_the_table_says() {
        let dir = dir();
        let plan = plan(dir.path());
        for seed in 0..2 {
            let seen = run(&Plan { seed, ..plan.clone() }).unwrap();
            assert!(seen.requests > 20, "{seen:?}");
        }
        let (image, table) = (fs::read(&plan.disk).unwrap(), fs::read(&plan.table).unwrap());
        assert!(compare(&image, &table).unwrap() > 10);
        assert!(compare(&image[..BLOCK], &table).is_err());
    }

    #[test]
    fn a_lost_write_is_found() {
        let dir = dir();
        let plan = plan(dir.path());
        run(&plan).unwrap();
        let table = fs::read(&plan.table).unwrap();
        let block = versions(&table).iter().position(|version| *version > 1).unwrap();
        let mut image = fs::read(&plan.disk).unwrap();
        fill(&mut image[block * BLOCK..(block + 1) * BLOCK], block, 1);
        let error = compare(&image, &table).unwrap_err().to_string();
        assert!(
            error.contains(&format!("block {block} has version 1 instead")),
            "{error}"
        );
        // The next run finds it too.
        fs::write(&plan.disk, image).unwrap();
        let quick = Plan {
            time: Duration::ZERO,
            ..plan
        };
        assert_eq!(run(&quick).unwrap_err().to_string(), error);
    }
}
