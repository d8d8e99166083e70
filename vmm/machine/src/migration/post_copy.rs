//! Guests that run at the destination before all of their memory is there (post-copy).

use std::io;
use std::ops::Range;
use std::sync::Arc;

use triarch_api::events::kind;
use triarch_api::{ApiError, Handler, MigrationSide, SetMigration, VmConfig};
use triarch_migration::{Blocker, PAGE, Part, Phase, Turn};
use triarch_vhost_user::VhostUserHandle;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::call::Caller;
use super::memory::There;
use super::{Role, Running, cap};
use crate::control::Controller;
use crate::snapshot::{Coming, Pager};
use crate::{GuestEvent, MachineError, Message};

/// What a client is told that wants to end what has no way back.
pub(super) const GIVEN_AWAY: &str = "the guest was given away and lacks memory at the destination: only the end of the migration, or of one of the two VMMs, ends \
                                     this. vm.cancel-migration at the source gives it up once the connection is lost";

impl Running {
    /// Whether the guest runs at the destination, and not all of its memory is there.
    pub(super) fn lacks_memory(&self) -> bool {
        matches!(self.handle.progress().phase, Phase::PostCopy | Phase::PostCopyPaused)
    }

    /// Whether the guest is on this side.
    pub(super) fn has_guest(&self) -> bool {
        (self.side == MigrationSide::Destination) == self.lacks_memory()
    }
}

impl Controller {
    pub(super) fn set_migration(&mut self, change: &SetMigration) -> Result<(), ApiError> {
        let wrong = |text: &str| Err(ApiError::WrongPhase(text.to_owned()));
        let Some(running) = &self.migrations.running else {
            return wrong("no migration is under way");
        };
        if change.post_copy {
            let Role::Source(sent) = &running.role else {
                return wrong("the source decides when the guest is moved; ask it");
            };
            if !sent.post_copy {
                return wrong("this migration may not become post-copy; begin it with post_copy");
            }
            if !running.handle.switch_to_post_copy() {
                return wrong("the guest is being given away, or was");
            }
        }
        if change.recover {
            if running.side != MigrationSide::Source {
                return wrong("the source makes the connection; ask it");
            }
            if !running.handle.recover() {
                return wrong("no connection of a guest that lacks memory is lost");
            }
        }
        if change.bandwidth.is_some() || !(change.post_copy || change.recover) {
            running.handle.set_cap(cap(change.bandwidth));
        }
        Ok(())
    }

    /// Has the pages `missing` of the guest that comes fault: they were forgotten. The machine that is made next has what provides them.
    pub(super) fn lack(&mut self, there: &There, missing: &[Range<u64>]) -> Result<Arc<Coming>, MachineError> {
        // The machine will be the next that is built.
        let (generation, inbox) = (self.generation + 1, self.inbox.clone());
        let report: crate::build::Report =
            Arc::new(move |event: GuestEvent| inbox.post(Message::Guest(generation, event)));
        let (pager, coming) = Pager::coming(&there.memory, missing, &self.sandbox, self.inbox.events(), &report)?;
        if let Some(prepared) = &mut self.awaited()?.memory {
            prepared.pager = Some(pager);
        }
        Ok(coming)
    }

    /// Tells how it goes on with a guest that lacks memory.
    fn post_copy_turn(&mut self, lost: Option<&str>, again: bool) {
        let Some(running) = &self.migrations.running else {
            return;
        };
        let job = ("job", running.job.id().into());
        match lost {
            Some(error) => {
                let properties = [job, ("error", error.into())];
                self.inbox.events().post(&kind::MIGRATION_PAUSED, &properties);
                running.note("connection");
            }
            None if again => self.migration_event(&kind::MIGRATION_RECOVERED, "memory that is lacking"),
            None => self.migration_event(&kind::MIGRATION_POST_COPY, "memory that is lacking"),
        }
    }

    /// The VMM ends while the guest lacks memory: at the destination, whoever waits for that would wait for ever.
    pub(super) fn end_post_copy(&mut self) {
        let here = self.migrations.running.as_ref().is_some_and(Running::has_guest);
        if here && self.machine.as_ref().is_some_and(|machine| !machine.has_its_memory()) {
            let error = self.abandon_guest("the VMM ends before it came from the source".to_owned());
            tracing::warn!("{error}");
        }
    }
}

/// Has the controller tell of it.
pub(super) fn tell(caller: &Caller, turn: Turn<'_>) {
    let (lost, again) = match turn {
        Turn::Begun => (None, false),
        Turn::Lost(why) => (Some(why.to_owned()), false),
        Turn::Recovered => (None, true),
    };
    caller.post(move |controller| controller.post_copy_turn(lost.as_deref(), again));
}

/// What else can be done with a guest that cannot be moved by post-copy.
pub(super) const WITHOUT: &str = "move the guest without post_copy";

fn blocker(what: Part, name: &str, reason: String) -> Blocker {
    Blocker {
        what,
        name: name.to_owned(),
        reason,
        remedy: WITHOUT.to_owned(),
    }
}

/// The devices of `served` that keep a guest from it.
pub(super) fn served(served: &[(String, VhostUserHandle)]) -> Vec<Blocker> {
    let daemons = served.iter().map(|(id, _)| {
        let reason = format!(
            "device '{id}': its daemon would have to wait for memory that comes later (VHOST_USER_POSTCOPY_*), which is not done"
        );
        blocker(Part::Device, id, reason)
    });
    daemons.collect()
}

/// What of the memory cannot be provided page by page.
pub(super) fn of_huge_pages(vm: &VmConfig) -> Vec<Blocker> {
    let zones = vm.memory.zones.iter().flatten();
    let zones = zones.filter(|zone| zone.hugepages).map(|zone| {
        let reason = format!(
            "memory zone '{}' is of huge pages, which cannot come one by one later",
            zone.id
        );
        blocker(Part::Memory, &zone.id, reason)
    });
    let huge = vm.memory.hugepages.then(|| {
        let reason = "memory is of huge pages, which cannot come one by one later".to_owned();
        blocker(Part::Memory, "", reason)
    });
    zones.chain(huge).collect()
}

impl There {
    /// Makes sure that memory can come later, before any of it came.
    pub(super) fn check_faults(&self) -> Result<(), MachineError> {
        if self.discarder.page_size() != PAGE {
            return Err(MachineError::Moved(
                "post-copy: its memory here is of huge pages, which cannot come one by one later".to_owned(),
            ));
        }
        Coming::check(&self.memory)
    }

    /// Gives the pages of `missing` back to the host, so that whoever touches them waits.
    pub(super) fn forget(&self, missing: &[Range<u64>]) -> io::Result<()> {
        for run in missing {
            let given = self.discarder.discard(GuestAddress(run.start), run.end - run.start);
            given.map_err(|error| error.source)?;
        }
        // Pages of a file may be of larger ones, of which the kernel only clears a part: who touches those would not wait.
        for region in self
            .memory
            .iter()
            .filter(|region| region.flags() & libc::MAP_SHARED != 0)
        {
            let gpa = region.start_addr().raw_value();
            let from = missing.partition_point(|run| run.end <= gpa);
            for run in missing[from..].iter().take_while(|run| run.start < gpa + region.len()) {
                if self.touched.first(region, run.start - gpa..run.end - gpa)?.is_some() {
                    return Err(io::Error::other(
                        "the host keeps pages that were given back (huge pages of shared memory); write never to \
                         /sys/kernel/mm/transparent_hugepage/shmem_enabled, or move the guest without post_copy",
                    ));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_cannot_come_later_is_refused_by_name() {
        let mut vm = VmConfig::default();
        assert_eq!(of_huge_pages(&vm), []);
        vm.memory.hugepages = true;
        let found = of_huge_pages(&vm);
        assert_eq!(found.len(), 1);
        let text = found[0].to_string();
        assert!(
            text.contains("huge pages") && text.contains("without post_copy"),
            "{text}"
        );
    }
}
