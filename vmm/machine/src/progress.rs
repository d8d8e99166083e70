//! How far long work is.

use triarch_api::jobs::JobHandle;

/// Where long work tells how far it is: a job, or nowhere.
#[derive(Clone, Copy)]
pub(crate) struct Progress<'a>(Option<&'a JobHandle>);

impl<'a> Progress<'a> {
    /// Nobody asked for it, so nobody watches.
    pub(crate) const NONE: Self = Self(None);

    pub(crate) fn of(job: &'a JobHandle) -> Self {
        Self(Some(job))
    }

    /// The work enters a phase.
    pub(crate) fn note(self, phase: &str) {
        if let Some(job) = self.0 {
            job.note(phase);
        }
    }

    /// So many bytes of the phase are done.
    pub(crate) fn bytes(self, done: u64, total: u64) {
        if let Some(job) = self.0 {
            job.progress(done, total, "bytes");
        }
    }

    /// So much of the phase is done.
    pub(crate) fn count(self, done: usize, total: usize, unit: &str) {
        if let Some(job) = self.0 {
            job.progress(done as u64, total as u64, unit);
        }
    }
}
