//! What a vCPU counts, and the time its thread took.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use triarch_device_core::metrics::Counter;
use triarch_hypervisor::Exit;

/// Nanoseconds of a clock tick of /proc: user space sees 100 Hz on every architecture KVM knows.
const TICK: u64 = 10_000_000;

/// Why a vCPU left the guest for the VMM. What KVM serves in the kernel (interrupts, halting, doorbells) does not show here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    PortRead,
    PortWrite,
    MmioRead,
    MmioWrite,
    Interrupted,
    Shutdown,
    SystemEvent,
    Halted,
    Call,
    Failed,
}

impl Reason {
    const NAMES: [&str; 10] = [
        "port_read",
        "port_write",
        "mmio_read",
        "mmio_write",
        "interrupted",
        "shutdown",
        "system_event",
        "halted",
        "firmware_call",
        "failed",
    ];

    pub(crate) fn of(exit: &Exit<'_>) -> Self {
        match exit {
            Exit::PortIn { .. } => Self::PortRead,
            Exit::PortOut { .. } => Self::PortWrite,
            Exit::MmioRead { .. } => Self::MmioRead,
            Exit::MmioWrite { .. } => Self::MmioWrite,
            Exit::Interrupted | Exit::Waiting => Self::Interrupted,
            Exit::Shutdown => Self::Shutdown,
            Exit::SystemEvent(_) => Self::SystemEvent,
            Exit::Halted => Self::Halted,
            Exit::Call(_) => Self::Call,
            Exit::Failed(_) => Self::Failed,
        }
    }
}

/// Counters of one vCPU since its thread started.
#[derive(Debug, Default)]
pub struct VcpuMetrics {
    exits: [Counter; Reason::NAMES.len()],
    clock: OnceLock<Clock>,
}

impl VcpuMetrics {
    pub(crate) fn exited(&self, reason: Reason) {
        self.exits[reason as usize].add(1);
    }

    /// Makes the calling thread the one whose time is told. It opens files, so it comes before the thread is confined; without
    /// /proc there is no time to tell.
    pub(crate) fn watch_this_thread(&self) {
        // A thread is watched once.
        let _ = self.clock.set(Clock::open());
    }

    /// How often the vCPU left the guest for the VMM, by reason.
    pub fn exits(&self) -> [(&'static str, u64); Reason::NAMES.len()] {
        std::array::from_fn(|i| (Reason::NAMES[i], self.exits[i].get()))
    }

    /// The time its thread took so far; `None` before it started, after it ended, and where /proc does not tell.
    pub fn times(&self) -> Option<VcpuTimes> {
        self.clock.get()?.read()
    }
}

/// Where the time of a thread went, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VcpuTimes {
    /// In the VMM's own code. Like the next two it has the granularity of the kernel's clock tick.
    pub user: u64,
    /// In the kernel.
    pub system: u64,
    /// In the guest.
    pub guest: u64,
    /// Ready to run while others had the CPU; `None` if the kernel does not count it.
    pub wait: Option<u64>,
}

/// Descriptors that tell a thread's times.
#[derive(Debug)]
struct Clock {
    stat: Option<File>,
    schedstat: Option<File>,
}

impl Clock {
    /// Those of the calling thread.
    fn open() -> Self {
        Self {
            stat: File::open("/proc/thread-self/stat").ok(),
            schedstat: File::open("/proc/thread-self/schedstat").ok(),
        }
    }

    fn read(&self) -> Option<VcpuTimes> {
        let mut buffer = [0; 1024];
        let mut times = parse_stat(text(self.stat.as_ref()?, &mut buffer)?)?;
        times.wait = self
            .schedstat
            .as_ref()
            .and_then(|file| parse_schedstat(text(file, &mut buffer)?));
        Some(times)
    }
}

/// What a file of /proc says now; `None` when the thread is gone.
fn text<'a>(file: &File, buffer: &'a mut [u8]) -> Option<&'a str> {
    let len = file.read_at(buffer, 0).ok()?;
    str::from_utf8(buffer.get(..len)?).ok()
}

/// Fields 14, 15 and 43 of proc_pid_stat(5): utime, stime and guest_time, the last part of the first.
fn parse_stat(line: &str) -> Option<VcpuTimes> {
    // The name may contain anything but ends with the last parenthesis; field 3 follows it.
    let fields = line.get(line.rfind(')')? + 1..)?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let mut ticks = |skip| Some(fields.nth(skip)?.parse::<u64>().ok()?.saturating_mul(TICK));
    let (user, system, guest) = (ticks(0)?, ticks(0)?, ticks(27)?);
    Some(VcpuTimes {
        // The two are not read at one instant.
        user: user.saturating_sub(guest),
        system,
        guest,
        wait: None,
    })
}

/// Field 2 of /proc/PID/schedstat (Documentation/scheduler/sched-stats.rst): time on a run queue.
fn parse_schedstat(line: &str) -> Option<u64> {
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn fields_are_counted_from_behind_the_name() {
        let fields: Vec<String> = (3..=52).map(|n: u32| n.to_string()).collect();
        let line = format!("1234 (a) b (c)) {}\n", fields.join(" "));
        let times = parse_stat(&line).expect("times");
        assert_eq!((times.user, times.system, times.guest), (0, 15 * TICK, 43 * TICK));
        let line = line.replacen(" 14 ", " 99 ", 1);
        assert_eq!(parse_stat(&line).expect("times").user, (99 - 43) * TICK);
        assert_eq!(parse_schedstat("7 8 9\n"), Some(8));
    }

    #[test]
    fn what_is_cut_off_tells_nothing() {
        for line in ["", "1 (", "1 ()", "1 (x) S 4 5", "1 (x) S 4 5 6 7 8 9 10 11 12 13 x 15"] {
            assert_eq!(parse_stat(line), None, "{line}");
        }
        assert_eq!(parse_schedstat("7"), None);
    }

    #[test]
    fn a_busy_thread_takes_time_and_a_dead_one_tells_none() {
        let metrics = std::sync::Arc::new(VcpuMetrics::default());
        assert_eq!(metrics.times(), None);
        let theirs = metrics.clone();
        let thread = std::thread::spawn(move || {
            theirs.watch_this_thread();
            let start = Instant::now();
            let total = |times: VcpuTimes| times.user + times.system;
            while theirs.times().map(total).unwrap_or_default() < 3 * TICK {
                assert!(start.elapsed() < Duration::from_secs(20), "no time passes");
            }
        });
        thread.join().expect("no panic");
        assert_eq!(metrics.times(), None);
    }

    #[test]
    fn every_reason_has_its_name() {
        let metrics = VcpuMetrics::default();
        metrics.exited(Reason::of(&Exit::MmioRead {
            address: 0,
            data: &mut [],
        }));
        metrics.exited(Reason::of(&Exit::Failed(String::new())));
        let counted: Vec<_> = metrics.exits().into_iter().filter(|(_, n)| *n > 0).collect();
        assert_eq!(counted, [("mmio_read", 1), ("failed", 1)]);
    }
}
