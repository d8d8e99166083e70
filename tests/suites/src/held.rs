//! What a VMM holds of its host and of KVM, so that soak tests see what it does not give back.

use anyhow::{Context as _, Result, ensure};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::smaps::{self, MMPermissions, MMapPath, MemoryMap};
use triarch_harness::vm::Vm;

/// Mappings of this many bytes and more are memory of the guest.
const GUEST: u64 = 16 << 20;
/// Bytes of the page before a thread's stack.
const PAGE: u64 = 4096;
/// What a VMM may need more after a while: its logs of events and jobs fill up, and pages of its heap come into use.
const SLACK_KIB: u64 = 1024;
/// The C library keeps stacks of threads that have ended for others. How many it makes depends on how many once ran at the same time, and
/// that on whether one had just ended when another began.
const SPARE_STACKS: usize = 4;
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
    memory: Memory,
}

/// What a process has mapped.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Memory {
    /// Mappings but for stacks of threads; memory of the guest is one of them for each of its regions.
    mappings: usize,
    /// Stacks of threads, also of those that have ended.
    stacks: usize,
    /// What the process wrote to outside of the guest's memory.
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
        let memory = Memory::of(&smaps::of(pid)?);
        Ok(Self {
            descriptors,
            threads,
            memory,
        })
    }

    /// Whether `now` has as many descriptors and threads.
    fn has_as_many(&self, now: &Self) -> bool {
        (&self.descriptors, &self.threads) == (&now.descriptors, &now.threads)
    }

    /// Whether `now` is as much.
    fn is_like(&self, now: &Self) -> bool {
        self.has_as_many(now) && self.memory.is_like(&now.memory)
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |of: &BTreeMap<String, usize>| of.values().sum::<usize>();
        let (descriptors, threads) = (count(&self.descriptors), count(&self.threads));
        let (mappings, kib) = (self.memory.mappings, self.memory.private_kib);
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

impl Memory {
    fn of(mappings: &[MemoryMap]) -> Self {
        let mut all = Self::default();
        // The mapping before it.
        let mut last: Option<&MemoryMap> = None;
        for mapping in mappings {
            // A thread's stack has a page before it that nobody may touch.
            let guard = last.replace(mapping).filter(|last| {
                last.perms == MMPermissions::PRIVATE && smaps::size(last) == PAGE && last.address.1 == mapping.address.0
            });
            all.mappings += 1;
            let own = MMPermissions::READ | MMPermissions::WRITE | MMPermissions::PRIVATE;
            if guard.is_some() && mapping.perms == own && mapping.pathname == MMapPath::Anonymous {
                all.stacks += 1;
                all.mappings -= 2;
            }
            if smaps::size(mapping) < GUEST {
                all.private_kib += smaps::kib(mapping, "Private_Dirty");
            }
        }
        all
    }

    /// Whether `now` is as much.
    fn is_like(&self, now: &Self) -> bool {
        self.mappings == now.mappings
            && now.stacks <= self.stacks + SPARE_STACKS
            && now.private_kib <= self.private_kib + SLACK_KIB
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_does_not_belong_to_the_guest_counts() {
        let text = "7f0000-7f8000 rw-p 0 00:00 0 \nPrivate_Dirty: 8 kB\n\
            10000000-30000000 rw-s 0 00:01 7 /memfd:ram\nPrivate_Dirty: 1000 kB\n\
            a0000000-a0010000 rw-p 0 00:00 0 \nPrivate_Dirty: 4 kB\n\
            b0000000-b0001000 ---p 0 00:00 0 \nPrivate_Dirty: 0 kB\n\
            b0001000-b0201000 rw-p 0 00:00 0 \nPrivate_Dirty: 1 kB\n\
            c0000000-c0001000 ---p 0 00:00 0 \n\
            d0001000-d0201000 rw-p 0 00:00 0 \n";
        let memory = Memory {
            mappings: 5,
            stacks: 1,
            private_kib: 13,
        };
        assert_eq!(Memory::of(&smaps::read(text).unwrap()), memory);
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
        assert_eq!(with(|now| now.memory.mappings += 1), (true, false));
        assert_eq!(with(|now| now.memory.stacks += SPARE_STACKS), (true, true));
        assert_eq!(with(|now| now.memory.stacks += SPARE_STACKS + 1), (true, false));
        assert_eq!(with(|now| now.memory.private_kib += SLACK_KIB), (true, true));
        assert_eq!(with(|now| now.memory.private_kib += SLACK_KIB + 1), (true, false));
    }
}
