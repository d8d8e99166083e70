//! The guest moves to another VMM, or comes from one, while it runs.
//!
//! The engines of [`triarch_migration`] run on a thread of their own. What they want done with the machine they have the controller do,
//! one [`Call`] after the other among its other messages: so the machine still belongs to it alone.
//!
//! As long as a guest is being moved, requests that would change it are refused. What the guest itself does goes on; a guest that resets
//! or powers itself off ends the migration first.

mod call;
mod check;
mod destination;
mod hand_over;
mod hosts;
mod memory;
mod offer;
mod post_copy;
mod source;

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use triarch_api::events::kind;
use triarch_api::jobs::JobHandle;
use triarch_api::{
    Answer, ApiError, Handler, MigrationPhase, MigrationProgress, MigrationSide, Phase, Reply, Request, VmConfig,
};
use triarch_legacy::PowerEvent;
use triarch_migration as engine;
use triarch_vcpu::VcpuEvent;
use triarch_vhost_user::{LinkError, VhostUserHandle};

pub use call::Call;
pub(crate) use hosts::bound_to_host;
pub(crate) use memory::{Prepared, marks, push_runs};
use post_copy::GIVEN_AWAY;

use crate::backends::Backends;
use crate::control::Controller;
use crate::{GuestEvent, MachineError, Message};

/// How long the end of the VMM waits for a migration to end in order.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// How long a daemon that has just ended has to be back for a guest that cannot go on without it, and how often that is looked for.
const COMES_BACK: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(20);

/// The migrations of a VMM: one at a time.
#[derive(Default)]
pub(crate) struct Migrations {
    running: Option<Running>,
    /// How the last one ended.
    last: Option<MigrationProgress>,
    /// What the guest did that ended the one that runs.
    deferred: Option<GuestEvent>,
    /// The guest's disks may have no locks: it was given away, or almost.
    unlocked: bool,
    /// Of a guest whose memory was handed over and that may run there: whether it did.
    handed: Option<hand_over::Ran>,
    /// Questions to destinations that are under way, by their numbers.
    asked: BTreeMap<u64, Answer>,
    /// How many there were.
    questions: u64,
}

/// Has the daemon of a disk take its lock. One that has just ended has so much time to be there again.
fn take(device: &VhostUserHandle, patience: Duration) -> Result<(), LinkError> {
    let deadline = Instant::now() + patience;
    loop {
        match device.take() {
            // Somebody else has it.
            done @ (Ok(()) | Err(LinkError::Failed(_))) => return done,
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => thread::sleep(LOOK),
        }
    }
}

/// A migration that is under way.
struct Running {
    side: MigrationSide,
    handle: engine::Handle,
    address: String,
    job: JobHandle,
    answer: Answer,
    role: Role,
}

/// What only one of the sides has.
enum Role {
    Source(Box<source::Sent>),
    Destination(Box<destination::Awaited>),
}

impl Running {
    fn progress(&self) -> MigrationProgress {
        let now = self.handle.progress();
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        MigrationProgress {
            side: self.side,
            phase: match now.phase {
                engine::Phase::Connecting => MigrationPhase::Connecting,
                engine::Phase::Copying => MigrationPhase::Copying,
                engine::Phase::HandingOver => MigrationPhase::HandingOver,
                engine::Phase::Switching => MigrationPhase::Switching,
                // Over, and not told yet.
                engine::Phase::Committed | engine::Phase::Over => MigrationPhase::Committed,
                engine::Phase::PostCopy => MigrationPhase::PostCopy,
                engine::Phase::PostCopyPaused => MigrationPhase::PostCopyPaused,
            },
            job: self.job.id(),
            address: self.address.clone(),
            elapsed_ms: ms(now.elapsed),
            rounds: now.rounds,
            total: now.total,
            remaining: now.remaining,
            pages: now.pages,
            zero_pages: now.zero_pages,
            wire_bytes: now.wire_bytes,
            rate: now.rate,
            dirty_rate: now.dirty_rate,
            downtime_ms: now.expected_downtime.map(ms),
            retreats: now.retreats,
            throttle: now.throttle,
            bandwidth: self.handle.cap(),
            error: now.trouble,
        }
    }

    /// Notes where it is.
    fn note(&self, phase: &str) {
        self.job.note(phase);
        let now = self.handle.progress();
        self.job
            .progress(now.total.saturating_sub(now.remaining), now.total, "bytes");
    }
}

impl Controller {
    /// Begins a migration if `request` asks for one: it is answered when that is over. While one is under way, refuses what would get
    /// into its way. Anything else is given back.
    pub(crate) fn migrate(&mut self, request: Request, answer: Answer) -> Option<(Request, Answer)> {
        let name = request.name();
        let begun = match (self.is_in_the_way(&request), request) {
            (Err(error), _) => Err((error, answer)),
            (Ok(()), Request::SendMigration(config)) => self.send_migration(&config, answer),
            (Ok(()), Request::CheckMigration(config)) => self.check_migration(&config, answer),
            (Ok(()), Request::ReceiveMigration(config, fds)) => self.receive_migration(*config, fds, answer),
            (Ok(()), other) => return Some((other, answer)),
        };
        self.publish();
        if let Err((error, answer)) = begun {
            answer.send(Err(error.of_route(name)));
        }
        None
    }

    fn is_in_the_way(&self, request: &Request) -> Result<(), ApiError> {
        let Some(running) = &self.migrations.running else {
            return match request {
                Request::SendMigration(_) | Request::CheckMigration(_) | Request::ReceiveMigration(..) => {
                    request.check(self.phase)
                }
                _ => Ok(()),
            };
        };
        match request {
            Request::CpuFeatures
            | Request::MigrationProgress
            | Request::SetMigration(_)
            | Request::CancelMigration
            | Request::VmmShutdown => Ok(()),
            Request::PowerButton | Request::Nmi if running.has_guest() => Ok(()),
            _ => Err(ApiError::WrongPhase(format!(
                "a migration is under way (job {}, {}); wait for its end, or end it with vm.cancel-migration",
                running.job.id(),
                running.address
            ))),
        }
    }

    /// What is asked of the migration that is under way.
    pub(crate) fn during_migration(&mut self, request: &Request) -> Result<Reply, ApiError> {
        let none = || ApiError::WrongPhase("no migration is under way".to_owned());
        match request {
            Request::MigrationProgress => {
                let running = self.migrations.running.as_ref().map(Running::progress);
                let found = running.or_else(|| self.migrations.last.clone());
                let nothing = || ApiError::NotFound("nobody asked for a migration yet".to_owned());
                found
                    .map(|progress| Reply::MigrationProgress(Box::new(progress)))
                    .ok_or_else(nothing)
            }
            Request::SetMigration(change) => self.set_migration(change).map(|()| Reply::Done),
            Request::CancelMigration => {
                let running = self.migrations.running.as_ref().ok_or_else(none)?;
                let gives_up = running.side == MigrationSide::Source && running.handle.abandon();
                match gives_up || running.handle.cancel() {
                    true => Ok(Reply::Done),
                    false if running.lacks_memory() => Err(ApiError::WrongPhase(GIVEN_AWAY.to_owned())),
                    false => Err(ApiError::WrongPhase(
                        "the guest was given away already; the migration is about to end".to_owned(),
                    )),
                }
            }
            // All others were carried out elsewhere.
            _ => Err(none()),
        }
    }

    /// Keeps back what the guest did if it ends the migration, until that has ended; gives everything else back.
    pub(crate) fn defer(&mut self, event: GuestEvent) -> Option<GuestEvent> {
        let ends = matches!(
            event,
            GuestEvent::Power(PowerEvent::Off | PowerEvent::Reset)
                | GuestEvent::Vcpu(_, VcpuEvent::PowerOff | VcpuEvent::Reset | VcpuEvent::Failed(_))
        );
        // What it does at the destination it does there.
        let running = self.migrations.running.as_ref().filter(|_| ends);
        let running = running.filter(|running| running.side == MigrationSide::Source || !running.lacks_memory());
        let Some(running) = running else {
            return Some(event);
        };
        // It cannot be too late: the guest was paused before it was given away, and what it did before that came here earlier.
        if !running.handle.cancel() {
            tracing::error!("the guest that was given away did something: {event:?}");
        }
        self.migrations.deferred.get_or_insert(event);
        None
    }

    /// Takes the locks of the guest's disks back if a migration left them to others. A guest that nobody else has can wait for a daemon.
    pub(crate) fn take_back_locks(&mut self) -> Result<(), MachineError> {
        self.take_locks(COMES_BACK)
    }

    /// Takes the locks of the guest's disks if others may have them: those of our own, and those of daemons, which have so much time to be
    /// there.
    fn take_locks(&mut self, patience: Duration) -> Result<(), MachineError> {
        if self.migrations.unlocked {
            if let Some(backends) = &self.backends {
                backends.lock()?;
                if self.machine.is_none() {
                    backends.peers().for_each(|peer| peer.come_back());
                }
            }
            let served = self
                .machine
                .as_ref()
                .map_or(&[][..], |machine| machine.devices().served());
            for (at, (id, device)) in served.iter().enumerate() {
                if let Err(error) = take(device, patience) {
                    // Whoever has it needs the others as well.
                    served[..at].iter().for_each(|(_, device)| drop(device.let_go()));
                    let _ = self.backends.as_ref().map(Backends::unlock);
                    return Err(MachineError::device(&Some(id.clone()), error));
                }
            }
            self.migrations.unlocked = false;
        }
        Ok(())
    }

    /// Ends a migration for good, since the VMM ends: the other side hears of it.
    pub(crate) fn end_migration(&mut self) {
        let Some(running) = &self.migrations.running else {
            return;
        };
        if !running.handle.cancel() && running.lacks_memory() {
            running.handle.leave();
            self.end_post_copy();
        }
        let end = Instant::now() + LAST_WORDS;
        while self.migrations.running.is_some() && Instant::now() < end {
            match self.outbox.next() {
                Some(Message::Call(call)) => call.run(self),
                Some(_) => {}
                None => thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Tells of the end of a migration whose guest is where it should be.
    fn migration_done(&mut self, downtime: Option<Duration>) {
        let Some(running) = self.migrations.running.take() else {
            return;
        };
        let downtime_ms = downtime.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        let progress = MigrationProgress {
            phase: MigrationPhase::Done,
            downtime_ms,
            ..running.progress()
        };
        self.migrations.last = Some(progress);
        running.job.finish(Ok(()));
        self.publish();
        running.answer.send(Ok(Reply::Done));
    }

    /// Tells of the end of a migration that came to nothing; `guest` tells where the guest is.
    fn migration_failed(&mut self, guest: &str, error: ApiError) {
        let Some(running) = self.migrations.running.take() else {
            return;
        };
        let text = error.to_string();
        let id = running.job.id();
        self.migrations.last = Some(MigrationProgress {
            phase: MigrationPhase::Failed,
            downtime_ms: None,
            error: Some(text.clone()),
            ..running.progress()
        });
        let properties = [
            ("job", id.into()),
            ("guest", guest.into()),
            ("error", text.as_str().into()),
        ];
        self.inbox.events().post(&kind::MIGRATION_FAILED, &properties);
        running.job.finish(Err(&text));
        self.publish();
        let name = match running.side {
            MigrationSide::Source => "vm.send-migration",
            MigrationSide::Destination => "vm.receive-migration",
        };
        running.answer.send(Err(error.of_route(name)));
        // Now it is what it would have been without a migration.
        if let Some(event) = self.migrations.deferred.take() {
            self.inbox.post(Message::Guest(self.generation, event));
        }
    }

    /// Makes an event of what happens in the migration that is under way, and notes it.
    fn migration_event(&self, kind: &'static triarch_api::events::Kind, phase: &str) {
        let Some(running) = &self.migrations.running else {
            return;
        };
        running.note(phase);
        let job = ("job", running.job.id().into());
        let address = ("address", running.address.as_str().into());
        match kind.properties.contains(&"address") {
            true => self.inbox.events().post(kind, &[job, address]),
            false => self.inbox.events().post(kind, &[job]),
        }
    }

    /// Starts the thread of a migration.
    fn start_migration(&self, body: impl FnOnce() + Send + 'static) -> Result<(), MachineError> {
        let sandbox = self.sandbox.clone();
        let confined = move || {
            if let Err(error) = sandbox.enter(triarch_device_core::ThreadClass::Migration) {
                tracing::error!("cannot confine the thread of a migration: {error}");
                std::process::abort();
            }
            body();
        };
        let thread = self.sandbox.spawn("migrate".to_owned(), Box::new(confined));
        thread.map(drop).map_err(MachineError::host("start a thread"))
    }
}

/// Fields of a configuration.
type Fields = serde_json::Map<String, serde_json::Value>;

/// A bandwidth as the engines take it.
fn cap(bandwidth: Option<u64>) -> Option<u64> {
    bandwidth.filter(|bytes| *bytes > 0)
}

fn tls_files(tls: &triarch_api::MigrationTls) -> engine::TlsFiles {
    engine::TlsFiles {
        cert: tls.certificate.clone(),
        key: tls.key.clone(),
        ca: tls.ca.clone(),
        peer: tls.peer.clone(),
    }
}

/// The address in the field `field`.
fn address(field: &str, url: &str) -> Result<engine::Address, ApiError> {
    url.parse()
        .map_err(|error: engine::AddressError| ApiError::BadRequest(format!("{field}: {error}")))
}

/// The devices with which the guest cannot be moved: some of the host, and those of `served` whose daemons lack something. What they write
/// matters to nobody if memory is `handed` over.
fn unmovable(
    backends: &Backends,
    vm: &VmConfig,
    served: &[(String, VhostUserHandle)],
    handed: bool,
) -> Vec<engine::Blocker> {
    let served = served.iter().filter_map(move |(id, device)| {
        let movable = match handed {
            true => device.check_state(),
            false => device.check_movable(),
        };
        let error = movable.err()?;
        Some(engine::Blocker {
            what: engine::Part::Device,
            name: id.clone(),
            reason: format!("device '{id}': {}", triarch_api::chain(&error)),
            remedy: "save the guest with vm.snapshot, or remove the device".to_owned(),
        })
    });
    served.chain(bound_to_host(backends, vm)).collect()
}

/// Refuses a guest with something in the way, by an error of this kind.
pub(crate) fn refuse(blockers: Vec<engine::Blocker>, kind: fn(String) -> ApiError) -> Result<(), ApiError> {
    let all: Vec<_> = blockers.iter().map(ToString::to_string).collect();
    match all.is_empty() {
        true => Ok(()),
        false => Err(kind(all.join(". "))),
    }
}

/// Whether the VM is one that stands still because somebody wants it to.
fn is_paused(phase: Phase) -> bool {
    phase == Phase::Paused
}
