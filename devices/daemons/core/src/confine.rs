//! System call filters of a daemon's threads.

use std::sync::Arc;

use triarch_device_core::{NoSandbox, Sandbox, ThreadClass};
use triarch_sandbox::{Mode, SandboxError, Seccomp};

/// What `--seccomp` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SeccompMode {
    /// A thread that does what it need not is killed with the process.
    True,
    /// It is not restricted.
    False,
    /// It is not restricted, and the kernel's audit log gets a line.
    Log,
}

/// Filters for each class of thread, or none.
pub struct Confinement(Option<Arc<Seccomp>>);

impl Confinement {
    /// Makes them. Call it on the main thread.
    pub fn new(mode: SeccompMode) -> Self {
        let mode = match mode {
            SeccompMode::True => Mode::Enforce,
            SeccompMode::Log => Mode::Log,
            SeccompMode::False => return Self(None),
        };
        Self(Some(Arc::new(Seccomp::new(mode, triarch_arch::OLDER_SYSCALLS))))
    }

    /// What threads are made with.
    pub fn sandbox(&self) -> Arc<dyn Sandbox> {
        match &self.0 {
            Some(seccomp) => seccomp.clone(),
            None => Arc::new(NoSandbox),
        }
    }

    /// Confines the main thread to [`ThreadClass::Control`], and serves the wishes of others for threads from then on.
    pub fn enter(&self) -> Result<(), SandboxError> {
        let Some(seccomp) = &self.0 else { return Ok(()) };
        seccomp.apply(ThreadClass::Control)?;
        seccomp.start_spawner()
    }
}
