//! What a VMM holds of its host and of KVM, so that soak tests see what it does not give back.

use anyhow::{Context as _, Result, ensure};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::vm::Vm;

/// Mappings of this many KiB and more are memory of the guest.
const GUEST_KIB: u64 = 16 << 10;
/// What a VMM may need more after a while: its logs of events and jobs fill up, and pages of its heap come into use.
const SLACK_KIB: u64 = 1024;
/// What threads are called that the kernel makes and ends as it likes as long as an io_uring is open, which is a descriptor.
const KERNELS: &str = "iou-";
/// A client's connection, for one, is closed a moment after its answer.
const MOMENT: Duration = Duration::from_secs(2);

/// What a VMM holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    process: Process,
    /// Memory slots of KVM, and interrupts by message, each of which has a GSI.
    kvm: [u64; 2],
}

impl Held {
    /// What a VMM with an API and a guest holds now.
    pub fn of(vm: &Vm) -> Result<Self> {
        let metric = |name: &str| vm.api()?.metric(name)?.with_context(|| format!("no {name}"));
        let kvm = [metric("triarch_memory_slots")?, metric("triarch_interrupt_routes")?];
        let process = Process::of(vm.pid())?;
        Ok(Self { process, kvm })
    }

    /// What it holds when it has nothing to do: as much as a little later.
    pub fn at_rest(vm: &Vm) -> Result<Self> {
        let mut held = Self::of(vm)?;
        let mut same = 0;
        while same < 5 {
            thread::sleep(Duration::from_millis(20));
            let now = Process::of(vm.pid())?;
            same = if now == held.process { same + 1 } else { 0 };
            held.process = now;
        }
        Ok(held)
    }

    /// Fails if it holds more than it did, or less, also after a moment.
    pub fn is_all_of(&self, vm: &Vm) -> Result<()> {
        self.compare(vm, |held, now| {
            held.kvm == now.kvm && held.process.is_like(&now.process)
        })
    }

    /// The same but for its memory: stacks of the first threads are kept for the next ones.
    pub fn is_all_of_beside_memory(&self, vm: &Vm) -> Result<()> {
        self.compare(vm, |held, now| {
            held.kvm == now.kvm && held.process.has_as_many(&now.process)
        })
    }

    fn compare(&self, vm: &Vm, same: fn(&Self, &Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + MOMENT;
        let mut now = Self::of(vm)?;
        while !same(self, &now) {
            ensure!(
                Instant::now() < deadline,
                "it has not given everything back: before: {self:?}, now: {now:?}"
            );
            thread::sleep(Duration::from_millis(10));
            // To ask for the others takes a descriptor.
            now.process = Process::of(vm.pid())?;
        }
        Ok(())
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [slots, routes] = self.kvm;
        write!(f, "{}, {slots} memory slots, {routes} interrupt routes", self.process)
    }
}

/// What a process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Process {
    /// Descriptors of each kind.
    descriptors: BTreeMap<String, usize>,
    /// Threads of each name.
    threads: BTreeMap<String, usize>,
    /// Mappings; memory of the guest is one of them for each of its regions.
    mappings: usize,
    /// Its own memory, beside the guest's.
    private_kib: u64,
}

impl Process {
    /// What process `pid` holds now.
    fn of(pid: u32) -> Result<Self> {
        let at = |name: &str| format!("/proc/{pid}/{name}");
        let mut descriptors = BTreeMap::new();
        for fd in fs::read_dir(at("fd"))? {
            // One that was closed meanwhile is none.
            if let Ok(target) = fs::read_link(fd?.path()) {
                *descriptors.entry(kind(&target.to_string_lossy())).or_default() += 1;
            }
        }
        let mut threads = BTreeMap::new();
        for task in fs::read_dir(at("task"))? {
            match fs::read_to_string(task?.path().join("comm")) {
                Ok(name) if !name.starts_with(KERNELS) => *threads.entry(name.trim().to_owned()).or_default() += 1,
                _ => {}
            }
        }
        let smaps = fs::read_to_string(at("smaps")).with_context(|| at("smaps"))?;
        let (mappings, private_kib) = memory(&smaps);
        Ok(Self {
            descriptors,
            threads,
            mappings,
            private_kib,
        })
    }

    /// Whether `now` has as many descriptors and threads.
    fn has_as_many(&self, now: &Self) -> bool {
        (&self.descriptors, &self.threads) == (&now.descriptors, &now.threads)
    }

    /// Whether `now` is as much.
    fn is_like(&self, now: &Self) -> bool {
        let grown = now.private_kib > self.private_kib + SLACK_KIB;
        self.has_as_many(now) && self.mappings == now.mappings && !grown
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |of: &BTreeMap<String, usize>| of.values().sum::<usize>();
        let (descriptors, threads) = (count(&self.descriptors), count(&self.threads));
        let (mappings, kib) = (self.mappings, self.private_kib);
        write!(
            f,
            "{descriptors} descriptors, {threads} threads, {mappings} mappings, {kib} KiB of its own"
        )
    }
}

/// What a descriptor is, without what makes it this one: `socket:[123]` is `socket`, and `anon_inode:[eventfd]` is that; a file that tells of
/// a thread is called without its number, since the next guest's has another one.
fn kind(target: &str) -> String {
    if let Some((_, file)) = target.rsplit_once('/').filter(|_| target.starts_with("/proc/")) {
        return format!("/proc: {file}");
    }
    let kind = match target.split_once(":[") {
        Some((kind, id)) if id.starts_with(|c: char| c.is_ascii_digit()) => kind,
        _ => target,
    };
    kind.to_owned()
}

/// Mappings, and KiB that the process wrote to outside of the guest's memory.
fn memory(smaps: &str) -> (usize, u64) {
    let (mut mappings, mut private, mut size) = (0, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (name, kib) = (words.next(), words.next().and_then(|kib| kib.parse::<u64>().ok()));
        match (name, kib) {
            (Some("Size:"), Some(kib)) => (mappings, size) = (mappings + 1, kib),
            (Some("Private_Dirty:"), Some(kib)) if size < GUEST_KIB => private += kib,
            _ => {}
        }
    }
    (mappings, private)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_does_not_belong_to_the_guest_counts() {
        let smaps = "7f00-7f10 rw-p 0\nSize: 64 kB\nPrivate_Dirty: 8 kB\n\
            7f20-9f20 rw-s 0\nSize: 524288 kB\nPrivate_Dirty: 1000 kB\n\
            a000-a010 rw-p 0\nSize: 64 kB\nPrivate_Dirty: 4 kB\n";
        assert_eq!(memory(smaps), (3, 12));
        assert_eq!(
            ["socket:[7]", "anon_inode:[eventfd]", "/dev/kvm", "/proc/7/task/8/stat"].map(kind),
            ["socket", "anon_inode:[eventfd]", "/dev/kvm", "/proc: stat"]
        );
    }

    #[test]
    fn what_is_not_given_back_is_seen() {
        let held = Process::of(std::process::id()).expect("this process");
        assert!(held.is_like(&held) && held.has_as_many(&held));
        let with = |change: fn(&mut Process)| {
            let mut now = held.clone();
            change(&mut now);
            (held.has_as_many(&now), held.is_like(&now))
        };
        let one_more = |now: &mut Process| *now.descriptors.entry("socket".into()).or_default() += 1;
        assert_eq!(with(one_more), (false, false));
        assert_eq!(
            with(|now| *now.threads.entry("vcpu9".into()).or_default() += 1),
            (false, false)
        );
        assert_eq!(with(|now| now.mappings += 1), (true, false));
        assert_eq!(with(|now| now.private_kib += SLACK_KIB), (true, true));
        assert_eq!(with(|now| now.private_kib += SLACK_KIB + 1), (true, false));
    }
}
