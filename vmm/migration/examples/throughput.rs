//! How fast memory goes over loopback: `cargo run --release -p triarch-migration --example throughput [ADDRESS [STREAMS [MIB]]]`.
//!
//! ADDRESS is `unix:/path` or `tcp-plain:127.0.0.1:0`. The guest is memory that nobody writes to; all of it is sent once.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use triarch_device_core::{NoSandbox, Sandbox};
use triarch_migration::{
    Blocker, Cause, Deadlines, Destination, DestinationOptions, Guest, Handed, Handle, Limits, Memory, Offer, Region,
    Sink, Source, SourceOptions, Target,
};
use triarch_state::Payloads;

/// Bytes of a part of memory that has a lock of its own.
const PART: u64 = 1 << 20;

struct Ram(Vec<Mutex<Vec<u8>>>);

impl Ram {
    fn new(bytes: u64, byte: u8) -> Self {
        Self(
            (0..bytes / PART)
                .map(|_| Mutex::new(vec![byte; PART as usize]))
                .collect(),
        )
    }

    /// Calls `each` with the bytes of memory from `gpa` on, part by part, and where they are in `len` bytes.
    fn parts(&self, gpa: u64, len: usize, mut each: impl FnMut(&mut [u8], Range<usize>)) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let at = gpa + done as u64;
            let part = self.0.get((at / PART) as usize).ok_or(io::ErrorKind::InvalidInput)?;
            let start = (at % PART) as usize;
            let end = (start + len - done).min(PART as usize);
            let mut bytes = part.lock().map_err(|_| io::ErrorKind::Other)?;
            each(&mut bytes[start..end], done..done + end - start);
            done += end - start;
        }
        Ok(())
    }
}

impl Memory for Ram {
    fn regions(&self) -> Vec<Region> {
        vec![Region {
            gpa: 0,
            len: self.0.len() as u64 * PART,
        }]
    }

    fn read(&self, gpa: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.parts(gpa, buffer.len(), |bytes, at| buffer[at].copy_from_slice(bytes))
    }

    fn start_log(&self) -> io::Result<()> {
        Ok(())
    }

    fn fetch_log(&self) -> io::Result<Vec<Range<u64>>> {
        Ok(Vec::new())
    }

    fn stop_log(&self) {}
}

impl Target for Ram {
    fn write(&self, gpa: u64, from: &[u8]) -> io::Result<()> {
        self.parts(gpa, from.len(), |bytes, at| bytes.copy_from_slice(&from[at]))
    }

    fn zero(&self, gpa: u64, len: u64) -> io::Result<()> {
        self.parts(gpa, len as usize, |bytes, _| bytes.fill(0))
    }
}

struct Nothing;

impl Guest for Nothing {
    fn pause(&mut self) -> Result<(), Cause> {
        Ok(())
    }

    fn save(&mut self) -> Result<Payloads, Cause> {
        Ok(Payloads::default())
    }

    fn release_locks(&mut self) -> Result<(), Cause> {
        Ok(())
    }

    fn take_locks(&mut self) -> Result<(), Cause> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Cause> {
        Ok(())
    }

    fn throttle(&mut self, _percent: u8) -> Result<(), Cause> {
        Ok(())
    }
}

/// Keeps the memory it makes, as a machine does: giving it back would take time while the guest is paused.
#[derive(Default)]
struct Keeps(Option<Arc<Ram>>);

impl Sink for Keeps {
    fn check(&mut self, _offer: &Offer<'_>, _handed: Option<Handed>) -> Vec<Blocker> {
        Vec::new()
    }

    fn prepare(&mut self, offer: &Offer<'_>, _handed: Option<Handed>) -> Result<Arc<dyn Target>, Cause> {
        Ok(self.0.insert(Arc::new(Ram::new(offer.layout.len(), 0))).clone())
    }

    fn restore(&mut self, _state: Payloads) -> Result<(), Cause> {
        Ok(())
    }

    fn take_locks_and_run(&mut self) -> Result<(), Cause> {
        Ok(())
    }

    fn abort(&mut self, why: &str) {
        eprintln!("aborted: {why}");
    }
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let address = args.next().unwrap_or_else(|| "tcp-plain:127.0.0.1:0".into());
    let streams = args.next().map_or(Ok(4), |text| text.parse()).context("STREAMS")?;
    let mib: u64 = args.next().map_or(Ok(1024), |text| text.parse()).context("MIB")?;
    let destination = Destination::bind(DestinationOptions {
        address: address.parse()?,
        tls: None,
        deadlines: Deadlines::default(),
        vmm: "example".into(),
    })?;
    let options = SourceOptions {
        post_copy: None,
        address: destination.address().clone(),
        tls: None,
        streams,
        hand_over: false,
        compress: false,
        limits: Limits::default(),
        deadlines: Deadlines::default(),
        vmm: "example".into(),
    };
    let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
    let theirs = sandbox.clone();
    let takes = thread::spawn(move || destination.run(&mut Keeps::default(), &Handle::new(None), &theirs));
    let memory = Arc::new(Ram::new(mib << 20, 0xa5));
    let handle = Handle::new(None);
    let began = Instant::now();
    let moved = Source::new(options, memory, &handle, &sandbox)?.run(&mut Nothing, b"", b"")?;
    let seconds = began.elapsed().as_secs_f64();
    takes.join().map_err(|_| anyhow!("the destination panicked"))??;
    println!(
        "{mib} MiB over {address} by {streams} streams in {seconds:.2} s: {:.0} MiB/s, paused for {:.1} ms",
        mib as f64 / seconds,
        moved.downtime.as_secs_f64() * 1000.0
    );
    Ok(())
}
