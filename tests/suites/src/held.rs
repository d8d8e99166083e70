//! What a VMM holds of its host, so that soak tests see what it does not give back.

use anyhow::{Context as _, Result, bail};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

/// Mappings of this many KiB and more are memory of the guest.
const GUEST_KIB: u64 = 16 << 10;
/// What a VMM may need more after a while: its logs of events and jobs fill up, and pages of its heap come into use.
const SLACK_KIB: u64 = 512;
/// A client's connection, for one, is closed a moment after its answer.
const MOMENT: Duration = Duration::from_secs(2);

/// What a process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Descriptors of each kind.
    descriptors: BTreeMap<String, usize>,
    /// Threads of each name.
    threads: BTreeMap<String, usize>,
    /// Mappings; memory of the guest is one of them for each of its regions.
    mappings: usize,
    /// Its own memory, beside the guest's.
    private_kib: u64,
}

impl Held {
    /// What process `pid` holds now.
    pub fn of(pid: u32) -> Result<Self> {
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
            if let Ok(name) = fs::read_to_string(task?.path().join("comm")) {
                *threads.entry(name.trim().to_owned()).or_default() += 1;
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

    /// What process `pid` holds when it has nothing to do: as much as a little later.
    pub fn at_rest(pid: u32) -> Result<Self> {
        let mut last = Self::of(pid)?;
        let mut same = 0;
        while same < 5 {
            thread::sleep(Duration::from_millis(20));
            let now = Self::of(pid)?;
            same = if now == last { same + 1 } else { 0 };
            last = now;
        }
        Ok(last)
    }

    /// Fails if process `pid` holds more than it did, or less, also after a moment. Returns what it holds.
    pub fn is_all_of(&self, pid: u32) -> Result<Self> {
        let deadline = Instant::now() + MOMENT;
        loop {
            let now = Self::of(pid)?;
            match self.difference(&now) {
                None => return Ok(now),
                Some(difference) if Instant::now() > deadline => {
                    bail!("it has not given everything back: {difference}")
                }
                Some(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    fn difference(&self, now: &Self) -> Option<String> {
        let counted = (&self.descriptors, &self.threads, self.mappings);
        let same = counted == (&now.descriptors, &now.threads, now.mappings);
        let grown = now.private_kib > self.private_kib + SLACK_KIB;
        (!same || grown).then(|| format!("before: {self:?}, now: {now:?}"))
    }
}

impl fmt::Display for Held {
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

/// What a descriptor is, without what makes it this one: `socket:[123]` is `socket`, and `anon_inode:[eventfd]` is that.
fn kind(target: &str) -> String {
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
            ["socket:[7]", "anon_inode:[eventfd]", "/dev/kvm"].map(kind),
            ["socket", "anon_inode:[eventfd]", "/dev/kvm"]
        );
    }

    #[test]
    fn what_is_not_given_back_is_seen() {
        let held = Held::of(std::process::id()).expect("this process");
        assert_eq!(held.difference(&held), None);
        let more = |change: fn(&mut Held)| {
            let mut now = held.clone();
            change(&mut now);
            held.difference(&now)
        };
        assert!(more(|now| *now.descriptors.entry("socket".into()).or_default() += 1).is_some());
        assert!(more(|now| *now.threads.entry("vcpu9".into()).or_default() += 1).is_some());
        assert!(more(|now| now.mappings += 1).is_some());
        assert_eq!(more(|now| now.private_kib += SLACK_KIB), None);
        assert!(more(|now| now.private_kib += SLACK_KIB + 1).is_some());
    }
}
