//! Whether the guest could be moved (`vm.check-migration`): what each of the two sides knows to be in the way.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use triarch_api::{
    Answer, ApiError, CheckMigration, ConsoleMode, MigrationBlocker, MigrationCheck, MigrationPart, Reply,
    RestoreConfig, VmConfig,
};
use triarch_arch::CpuPlan;
use triarch_cpu_model::Verdict;
use triarch_migration::{
    Blocker, Check, Deadlines, Handed, Layout, Limits, MAX_BLOCKERS, Part, PostCopy, Region, SourceOptions,
};

use super::call::Caller;
use super::destination::{check_architecture, configured, moved, same_size};
use super::hand_over::{self, Given, Ran};
use super::memory::{self, Prepared};
use super::offer::{OfferedCpusV1, OfferedV1};
use super::source::refusal;
use super::{address, hosts, post_copy, tls_files, unmovable};
use crate::backends::{End, HandedEnds, Opener};
use crate::configured::DeviceConfig;
use crate::control::Controller;
use crate::snapshot::take_taps;
use crate::{MachineError, cpu_features};

/// Questions that may be under way at once: each has a thread.
const MAX_ASKED: usize = 8;
/// How long a destination may take to look at everything.
const SILENCE: Duration = Duration::from_secs(30);
/// Features of processors that are told one by one, so that there is room for all else.
const MAX_FEATURES: usize = MAX_BLOCKERS / 2;

/// A question, what is said of the guest and its processors, and what is in the way here.
type Question = (Check, Vec<u8>, Vec<u8>, Vec<Blocker>);

impl Controller {
    /// Asks a destination on a thread of its own. The guest notices nothing, and anything may be asked of it meanwhile.
    pub(super) fn check_migration(
        &mut self,
        config: &CheckMigration,
        answer: Answer,
    ) -> Result<(), (ApiError, Answer)> {
        if self.migrations.asked.len() >= MAX_ASKED {
            let error = format!("{MAX_ASKED} such questions are under way; ask again when one was answered");
            return Err((ApiError::WrongPhase(error), answer));
        }
        let (check, offered, cpus, ours) = match self.question(config) {
            Ok(question) => question,
            Err(error) => return Err((error, answer)),
        };
        self.migrations.questions += 1;
        let (number, caller) = (self.migrations.questions, Caller(self.inbox.clone()));
        let started = self.start_migration(move || {
            let found = check.run(&offered, &cpus);
            caller.post(move |controller| {
                if let Some(answer) = controller.migrations.asked.remove(&number) {
                    let told = found.map(|theirs| answered(ours, theirs));
                    answer.send(told.map_err(|error| refusal(error).of_route("vm.check-migration")));
                }
            });
        });
        match started {
            Ok(()) => {
                self.migrations.asked.insert(number, answer);
                Ok(())
            }
            Err(error) => Err((error.into(), answer)),
        }
    }

    fn question(&mut self, config: &CheckMigration) -> Result<Question, ApiError> {
        config.validate()?;
        let options = SourceOptions {
            address: address("destination_url", &config.destination_url)?,
            tls: config.tls.as_ref().map(tls_files),
            streams: 1,
            hand_over: config.local,
            compress: false,
            limits: Limits::default(),
            // Nothing is moved, and no connection lost.
            post_copy: config.post_copy.then(PostCopy::default),
            deadlines: Deadlines {
                silence: SILENCE,
                ..Deadlines::default()
            },
            vmm: env!("CARGO_PKG_VERSION").to_owned(),
        };
        self.finish_removals();
        let (Some(vm), Some(machine), Some(backends)) = (&self.config, &self.machine, &self.backends) else {
            return Err(ApiError::WrongPhase("there is no guest to be moved".to_owned()));
        };
        let (offered, cpus) = self.offer(vm, machine, backends)?;
        let regions: Vec<Region> = memory::regions(&machine.memory.memory());
        let mut ours = unmovable(backends, vm, machine.devices().served(), config.local);
        let private = match config.local {
            true => hand_over::private(vm),
            false => Vec::new(),
        };
        // Whether all else fits is asked all the same.
        let handed = match config.local && private.is_empty() {
            true => Some(hand_over::files(&machine.memory.memory(), &Ran::new()?)?),
            false => None,
        };
        ours.extend(private);
        if config.post_copy {
            ours.extend(post_copy::served(machine.devices().served()));
            ours.extend(hosts::late(backends));
            ours.extend(post_copy::of_huge_pages(vm));
        }
        let check = Check::new(options, regions, handed).map_err(refusal)?;
        Ok((check, offered, cpus, ours))
    }

    /// All that keeps the guest that is offered from being taken here. Nothing stays open, nothing is locked, and nothing is set up.
    pub(super) fn in_the_way(
        &mut self,
        offered: &[u8],
        cpus: &[u8],
        layout: &Layout,
        handed: Option<Handed>,
        post_copy: bool,
    ) -> Result<Vec<Blocker>, MachineError> {
        let mut found = Found::default();
        let Some(offer) = found.of(Part::Host, "", OLDER, read_offer(offered)) else {
            return Ok(found.0);
        };
        let comes = match handed {
            Some(handed) => Comes::Handed(Given::new(handed, layout)),
            None if post_copy => Comes::Later,
            None => Comes::Copied,
        };
        self.look_at_configuration(&offer, layout, comes, &mut found)?;
        self.look_at_features(cpus, &mut found);
        Ok(found.0)
    }

    fn look_at_configuration(
        &mut self,
        offer: &OfferedV1,
        layout: &Layout,
        comes: Comes,
        found: &mut Found,
    ) -> Result<(), MachineError> {
        const OVER: &str = "give what fits with config of vm.receive-migration";
        let awaited = self.awaited()?;
        let (over, net_fds) = (awaited.config.clone(), awaited.net_fds.clone());
        let copies: Result<Vec<_>, _> = awaited.fds.iter().map(|fd| fd.try_clone()).collect();
        let copies = copies.map_err(MachineError::host("copy the descriptors of taps"))?;
        let vm = configured(offer.config.clone(), over);
        let Some(mut vm) = found.of(Part::Configuration, "", OVER, vm) else {
            return Ok(());
        };
        let request = RestoreConfig {
            net_fds,
            ..RestoreConfig::default()
        };
        let taps = take_taps(&mut vm, &request, copies);
        let taps = found.of(Part::Configuration, "", "", taps).unwrap_or_default();
        let complete = vm.validate().map_err(MachineError::from);
        let complete = complete.and_then(|()| crate::identity::complete(&mut vm));
        if found.of(Part::Configuration, "", OVER, complete).is_none() {
            return Ok(());
        }
        self.look_at_devices(&vm, &taps, offer, found);
        look_at_sockets(&vm, found);
        look_at_memory(&vm, layout, comes, found);
        Ok(())
    }

    fn look_at_devices(&self, vm: &VmConfig, taps: &HandedEnds, offer: &OfferedV1, found: &mut Found) {
        const DISK: &str =
            "make it reachable under this path, or give its path here with config of vm.receive-migration";
        const TAP: &str = "give another tap with config of vm.receive-migration, or its descriptors with net_fds";
        const SIZE: &str = "give the guest's own disk: contents are not copied";
        const LOCK: &str = "end whoever uses it, or give the guest's own disk";
        let shown = BTreeMap::new();
        let opener = Opener {
            handed: taps,
            daemons: None,
            sandbox: &self.sandbox,
            iommu: &self.iommu,
            behind_iommu: vm.iommu_for_all(),
            moved: Some(&shown),
        };
        for device in DeviceConfig::all(vm) {
            let id = device.id();
            let (part, remedy) = match device {
                DeviceConfig::Disk(_) => (Part::Disk, DISK),
                _ => (Part::Device, TAP),
            };
            let Some(Some(disk)) = found.of(part, id, remedy, End::look(device, opener)) else {
                continue;
            };
            found.of(part, id, SIZE, same_size(id, &disk, &offer.disks));
            // The source itself has the lock of its own disk.
            if offer.files.differs(id, &disk) {
                let lock = disk
                    .is_locked_elsewhere()
                    .map_err(|error| moved(triarch_api::chain(&error)));
                let free = lock.and_then(|locked| match locked {
                    false => Ok(()),
                    true => Err(moved(format!(
                        "another process holds a lock on {}, which is not the file that the source has open",
                        disk.path().display()
                    ))),
                });
                found.of(part, id, LOCK, free);
            }
        }
    }

    fn look_at_features(&self, cpus: &[u8], found: &mut Found) {
        let cpus = serde_json::from_slice::<OfferedCpusV1>(cpus)
            .map_err(|error| moved(format!("its processors cannot be read: {error}")));
        let Some(OfferedCpusV1 { plan, processor }) = found.of(Part::Cpu, "", OLDER, cpus) else {
            return;
        };
        let verdict = processor.map_or(Ok(Verdict::default()), |guest| {
            cpu_features::compared(&self.kvm, &guest)
        });
        let Some(verdict) = found.of(Part::Cpu, "", "", verdict) else {
            return;
        };
        if verdict.is_accepted() {
            // It would say again, for one of them, what the verdict says of all.
            let plan = CpuPlan::restore(&self.kvm, &plan).map_err(MachineError::from);
            found.of(Part::Cpu, "", "", plan);
        }
        let more = verdict.blockers.len().saturating_sub(MAX_FEATURES) + verdict.omitted as usize;
        for feature in verdict.blockers.into_iter().take(MAX_FEATURES) {
            let place = match feature.place.is_empty() || feature.place == feature.name {
                true => String::new(),
                false => format!(" ({})", feature.place),
            };
            found.0.push(Blocker {
                what: match feature.name.as_str() {
                    "tsc_khz" | "CNTFRQ_EL0" => Part::Clock,
                    _ => Part::Cpu,
                },
                reason: format!(
                    "{}{place}: the guest has {}, this host {}",
                    feature.name, feature.guest, feature.destination
                ),
                name: feature.name,
                remedy: feature.remedy,
            });
        }
        if more > 0 {
            let text = format!("{more} more features of the CPU do not fit");
            found.of(Part::Cpu, "", "", Err::<(), _>(moved(text)));
        }
    }
}

/// What may be the cause of an offer that cannot be read.
const OLDER: &str = "use the same version of the VMM on both hosts";

/// What is in the way, so far.
#[derive(Default)]
struct Found(Vec<Blocker>);

impl Found {
    /// What came of looking at something; a failure is in the way.
    fn of<T, E: std::error::Error + 'static>(
        &mut self,
        what: Part,
        name: &str,
        remedy: &str,
        result: Result<T, E>,
    ) -> Option<T> {
        result
            .map_err(|error| {
                let text = triarch_api::chain(&error);
                // Nobody has to be told that the guest cannot be moved.
                let reason = text.strip_prefix("the guest cannot be moved: ").unwrap_or(&text);
                self.0.push(Blocker {
                    what,
                    name: name.to_owned(),
                    reason: reason.to_owned(),
                    remedy: remedy.to_owned(),
                });
            })
            .ok()
    }
}

fn read_offer(offered: &[u8]) -> Result<OfferedV1, MachineError> {
    let offer: OfferedV1 =
        serde_json::from_slice(offered).map_err(|error| moved(format!("its description cannot be read: {error}")))?;
    check_architecture(&offer.arch)?;
    Ok(offer)
}

/// The sockets that the VMM makes itself: at their places may be nothing that somebody listens on. Whoever listens is not disturbed.
fn look_at_sockets(vm: &VmConfig, found: &mut Found) {
    const OTHER: &str = "give another path with config of vm.receive-migration";
    let consoles = [("serial", &vm.serial), ("console", &vm.console)].into_iter();
    let consoles = consoles.filter(|(_, console)| console.mode == ConsoleMode::Socket);
    let consoles = consoles.filter_map(|(name, console)| Some((name, console.socket.as_deref()?)));
    let vsock = vm.vsock.iter().map(|vsock| {
        let id = vsock.id.as_deref().unwrap_or("vsock");
        (id, vsock.socket.as_path())
    });
    let listening = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    for (name, path) in consoles.chain(vsock) {
        found.of(Part::Device, name, OTHER, free(path, &listening));
    }
}

/// Whether a socket can be made there, when these are the sockets that there are (proc_net(5)).
fn free(path: &Path, sockets: &str) -> Result<(), MachineError> {
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
    if directory.is_some_and(|directory| !directory.is_dir()) {
        return Err(moved(format!(
            "there is no directory for the socket {}",
            path.display()
        )));
    }
    let last = format!(" {}", path.display());
    match path.exists() && sockets.lines().any(|line| line.ends_with(&last)) {
        true => Err(moved(format!(
            "another process listens on the socket {}",
            path.display()
        ))),
        false => Ok(()),
    }
}

/// How memory would come.
enum Comes {
    Copied,
    Handed(Given),
    /// Some of it when the guest runs.
    Later,
}

fn look_at_memory(vm: &VmConfig, layout: &Layout, comes: Comes, found: &mut Found) {
    const MORE: &str = "choose a host with as much free, or move other guests away first";
    const SAME: &str = "leave memory as it is in config of vm.receive-migration";
    let mut vm = vm.clone();
    // Made, and not filled.
    vm.memory.prefault = false;
    for zone in vm.memory.zones.iter_mut().flatten() {
        zone.prefault = false;
    }
    if let Comes::Handed(mut given) = comes {
        let made = Prepared::new(&vm, layout, Some(&mut given));
        found.of(Part::Memory, "", SAME, made.and_then(|_| given.end()));
        return;
    }
    let made = found.of(Part::Memory, "", MORE, Prepared::new(&vm, layout, None));
    if let (Some((_, there)), Comes::Later) = (made, comes) {
        found.of(Part::Memory, "", post_copy::WITHOUT, there.check_faults());
    }
}

/// Why a destination cannot say.
pub(super) fn ends(error: &(dyn std::error::Error + Send + Sync)) -> Blocker {
    Blocker {
        what: Part::Host,
        name: String::new(),
        reason: error.to_string(),
        remedy: String::new(),
    }
}

/// The answer, of what is in the way here and there.
fn answered(ours: Vec<Blocker>, theirs: Vec<Blocker>) -> Reply {
    let blocker = |blocker: Blocker| MigrationBlocker {
        what: match blocker.what {
            Part::Host => MigrationPart::Host,
            Part::Cpu => MigrationPart::Cpu,
            Part::Clock => MigrationPart::Clock,
            Part::Memory => MigrationPart::Memory,
            Part::Disk => MigrationPart::Disk,
            Part::Device => MigrationPart::Device,
            Part::Configuration => MigrationPart::Configuration,
        },
        name: (!blocker.name.is_empty()).then_some(blocker.name),
        reason: blocker.reason,
        remedy: blocker.remedy,
    };
    let blockers = ours.into_iter().chain(theirs).map(blocker).collect();
    Reply::MigrationCheck(Box::new(MigrationCheck { blockers }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_free_where_nobody_listens() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a socket");
        let ask = || {
            let sockets = std::fs::read_to_string("/proc/net/unix").expect("a list");
            free(&path, &sockets)
        };
        assert!(ask().is_ok());
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("listens");
        assert!(ask().expect_err("in use").to_string().contains("listens"));
        // Left over, as by a process that was killed.
        drop(listener);
        assert!(path.exists() && ask().is_ok());
        let nowhere = directory.path().join("none/socket");
        assert!(
            free(&nowhere, "")
                .expect_err("no directory")
                .to_string()
                .contains("directory")
        );
    }
}
