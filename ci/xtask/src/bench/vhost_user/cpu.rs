//! CPU time of processes, the guest's apart.

use std::fs;
use std::time::Duration;

use anyhow::Result;

/// CPU time of a process so far.
#[derive(Debug, Default, Clone, Copy)]
pub struct Cpu {
    /// Threads that run the guest.
    pub vcpus: Duration,
    /// All others.
    pub others: Duration,
}

impl Cpu {
    /// CPU time of a process so far. The first field of schedstat is nanoseconds (Linux, Documentation/scheduler/sched-stats.rst). A thread that ends while
    /// this looks has none.
    ///
    /// # Errors
    /// The process is gone.
    pub fn of(pid: u32) -> Result<Self> {
        let mut cpu = Self::default();
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let thread = thread?.path();
            let name = fs::read_to_string(thread.join("comm")).unwrap_or_default();
            let stat = fs::read_to_string(thread.join("schedstat")).unwrap_or_default();
            let time = stat.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
            let whose = if is_vcpu(name.trim_end()) {
                &mut cpu.vcpus
            } else {
                &mut cpu.others
            };
            *whose += Duration::from_nanos(time);
        }
        Ok(cpu)
    }

    /// Of all threads.
    pub fn all(self) -> Duration {
        self.vcpus + self.others
    }
}

/// As Triarch and QEMU name the threads of vCPUs.
fn is_vcpu(name: &str) -> bool {
    name.starts_with("vcpu") || name.starts_with("CPU ")
}

impl std::ops::Sub for Cpu {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            vcpus: self.vcpus.saturating_sub(before.vcpus),
            others: self.others.saturating_sub(before.others),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::Instant;

    #[test]
    fn the_time_of_vcpus_is_told_apart() {
        assert!(is_vcpu("vcpu0") && is_vcpu("CPU 0/KVM"));
        assert!(!is_vcpu("_disk0_q0") && !is_vcpu("IO io") && !is_vcpu("triarch"));
    }

    #[test]
    fn work_costs_time() {
        // Threads of this process come and go with other tests, and take what they cost along.
        let mut works = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let before = Cpu::of(works.id()).unwrap();
        let (start, mut spent) = (Instant::now(), Cpu::default());
        while spent.others < Duration::from_millis(5) && start.elapsed() < Duration::from_secs(30) {
            spent = Cpu::of(works.id()).unwrap() - before;
        }
        works.kill().unwrap();
        works.wait().unwrap();
        assert!(spent.others >= Duration::from_millis(5), "{spent:?}");
        assert_eq!(spent.vcpus, Duration::ZERO);
    }
}
