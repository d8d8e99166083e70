//! Filters and how they are applied.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use thiserror::Error;
use triarch_device_core::{Sandbox, ThreadClass};

use crate::spawner::Spawner;
use crate::syscalls::{self, Allowed};

/// What happens to a system call that a thread's class does not need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It is killed with the whole process.
    Enforce,
    /// It is served, and the kernel's audit log gets a line.
    Log,
}

/// Why the sandbox could not be set up.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// A filter could not be made.
    #[error("cannot build the system call filter of {class:?} threads")]
    Build {
        /// Whose filter.
        class: ThreadClass,
        /// Cause.
        #[source]
        source: seccompiler::Error,
    },
    /// The kernel refused one.
    #[error("cannot apply the system call filter of {class:?} threads; use --seccomp false on kernels without seccomp")]
    Apply {
        /// Whose filter.
        class: ThreadClass,
        /// Cause.
        #[source]
        source: seccompiler::Error,
    },
    /// No thread.
    #[error("cannot start the thread that makes threads")]
    Spawner(#[source] io::Error),
}

/// seccomp filters, one per class of thread, built when first needed.
pub struct Seccomp {
    mode: Mode,
    older: &'static [(i64, i64)],
    programs: Mutex<HashMap<ThreadClass, Arc<BpfProgram>>>,
    spawner: Spawner,
}

impl Seccomp {
    /// Filters for the threads of this process. Call it on the main thread: see [`start_spawner`](Self::start_spawner). `older` pairs
    /// system calls with what this architecture has beside them for the same purpose (openat and open).
    pub fn new(mode: Mode, older: &'static [(i64, i64)]) -> Self {
        Self {
            mode,
            older,
            programs: Mutex::default(),
            spawner: Spawner::new(),
        }
    }

    /// Starts the thread that makes the threads other threads than the main one ask for; until then they wait. Call it on the main
    /// thread, confined, as soon as the guest runs: it is not needed to get there.
    pub fn start_spawner(&self) -> Result<(), SandboxError> {
        self.spawner.start().map_err(SandboxError::Spawner)
    }

    fn program(&self, class: ThreadClass) -> Result<Arc<BpfProgram>, SandboxError> {
        let mut programs = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(program) = programs.get(&class) {
            return Ok(program.clone());
        }
        let program = Arc::new(build(class, self.mode, self.older)?);
        programs.insert(class, program.clone());
        Ok(program)
    }

    /// Confines the calling thread to `class`, for good.
    pub fn apply(&self, class: ThreadClass) -> Result<(), SandboxError> {
        let program = self.program(class)?;
        seccompiler::apply_filter(&program).map_err(|source| SandboxError::Apply { class, source })
    }
}

impl Sandbox for Seccomp {
    fn enter(&self, class: ThreadClass) -> io::Result<()> {
        self.apply(class).map_err(io::Error::other)
    }

    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        self.spawner.spawn(name, body)
    }
}

fn build(class: ThreadClass, mode: Mode, older: &'static [(i64, i64)]) -> Result<BpfProgram, SandboxError> {
    let failed = |source: seccompiler::BackendError| SandboxError::Build {
        class,
        source: source.into(),
    };
    let arch: TargetArch = std::env::consts::ARCH.try_into().map_err(failed)?;
    let mismatch = match mode {
        Mode::Enforce => SeccompAction::KillProcess,
        Mode::Log => SeccompAction::Log,
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for allowed in syscalls::of(class) {
        match allowed {
            Allowed::Call(number) => {
                rules.insert(number, vec![]);
            }
            Allowed::With { number, arg, value } => {
                let condition =
                    SeccompCondition::new(arg, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value).map_err(failed)?;
                let rule = SeccompRule::new(vec![condition]).map_err(failed)?;
                match rules.get_mut(&number) {
                    // No condition at all is wider than any one.
                    Some(existing) if existing.is_empty() => {}
                    Some(existing) => existing.push(rule),
                    None => {
                        rules.insert(number, vec![rule]);
                    }
                }
            }
        }
    }
    for (newer, older) in older {
        if rules.get(newer).is_some_and(Vec::is_empty) {
            rules.insert(*older, vec![]);
        }
    }
    let filter = SeccompFilter::new(rules, mismatch, SeccompAction::Allow, arch).map_err(failed)?;
    filter.try_into().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_a_filter() {
        use ThreadClass::{
            BackEnd, Control, Device, Disk, Http, Migration, Net, Report, Switch, Vcpu, VhostUser, Vsock,
        };
        for class in [
            Control, Http, Report, Vcpu, Disk, Net, Switch, Vsock, VhostUser, BackEnd, Migration, Device,
        ] {
            let program = build(class, Mode::Enforce, &[]).expect("a filter");
            assert!(program.len() > 50, "{class:?} has {} instructions", program.len());
        }
    }

    #[test]
    fn an_older_call_goes_where_the_newer_one_goes() {
        // Numbers no architecture has yet.
        const OLDER: &[(i64, i64)] = &[(libc::SYS_unlinkat, 100_001), (libc::SYS_read, 100_002)];
        let added = |class| {
            let len = |older| build(class, Mode::Enforce, older).expect("a filter").len();
            len(OLDER) - len(&[])
        };
        // A vCPU reads, but removes no files.
        assert_eq!(added(ThreadClass::Control), 2 * added(ThreadClass::Vcpu));
        assert_ne!(added(ThreadClass::Vcpu), 0);
    }
}
