//! Which phase of a VM accepts what: a pure table.

use serde::{Deserialize, Serialize};

use crate::ApiError;

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub enum Phase {
    /// There is no VM: the VMM waits for one.
    #[cfg_attr(feature = "openapi", schemars(skip))]
    Absent,
    /// It has a configuration and nothing else.
    Created,
    /// The guest runs.
    Running,
    /// The guest stands still.
    Paused,
    /// The guest was shut down; it can be booted again.
    Shutdown,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Self; 5] = [Self::Absent, Self::Created, Self::Running, Self::Paused, Self::Shutdown];

    /// The name agents know it by; an absent VM has none.
    pub fn name(self) -> &'static str {
        match self {
            Self::Absent => "none",
            Self::Created => "Created",
            Self::Running => "Running",
            Self::Paused => "Paused",
            Self::Shutdown => "Shutdown",
        }
    }
}

/// What a client can ask of a VM. One variant a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// `vm.info`.
    Info,
    /// `vm.counters`.
    Counters,
    /// `vm.create`: take this configuration.
    Create,
    /// `vm.delete`: shut down if needed and forget the configuration.
    Delete,
    /// `vm.boot`.
    Boot,
    /// `vm.pause`.
    Pause,
    /// `vm.resume`.
    Resume,
    /// `vm.shutdown`: stop at once, without asking the guest.
    Shutdown,
    /// `vm.reboot`: stop at once and boot again.
    Reboot,
    /// `vm.power-button`: ask the guest to shut itself down.
    PowerButton,
    /// `vm.nmi`: interrupt every vCPU with an NMI.
    Nmi,
    /// `vm.resize`: another number of vCPUs, another size of RAM.
    Resize,
    /// `vm.resize-zone`: another size of a memory zone.
    ResizeZone,
    /// `vm.resize-disk`: a disk grows.
    ResizeDisk,
    /// `vm.add-disk`.
    AddDisk,
    /// `vm.add-net`.
    AddNet,
    /// `vm.add-fs`.
    AddFs,
    /// `vm.add-generic-vhost-user`.
    AddGenericVhostUser,
    /// `vm.add-vsock`.
    AddVsock,
    /// `vm.add-device`.
    AddDevice,
    /// `vm.remove-device`.
    RemoveDevice,
    /// `vm.snapshot`: save a paused VM.
    Snapshot,
    /// `vm.restore`: make a VM from a snapshot.
    Restore,
    /// `vm.send-migration`: move the VM to another VMM.
    SendMigration,
    /// `vm.receive-migration`: take a VM from another VMM.
    ReceiveMigration,
    /// `vm.check-migration`: ask whether the VM could be moved.
    CheckMigration,
    /// `vm.set-migration`: change one that is under way.
    SetMigration,
    /// `vm.cancel-migration`.
    CancelMigration,
    /// `vm.migration-progress`.
    MigrationProgress,
    /// `vmm.cpu-features`.
    CpuFeatures,
    /// `vmm.shutdown`: end the process.
    VmmShutdown,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 31] = [
        Self::Info,
        Self::Counters,
        Self::Create,
        Self::Delete,
        Self::Boot,
        Self::Pause,
        Self::Resume,
        Self::Shutdown,
        Self::Reboot,
        Self::PowerButton,
        Self::Nmi,
        Self::Resize,
        Self::ResizeZone,
        Self::ResizeDisk,
        Self::AddDisk,
        Self::AddNet,
        Self::AddFs,
        Self::AddGenericVhostUser,
        Self::AddVsock,
        Self::AddDevice,
        Self::RemoveDevice,
        Self::Snapshot,
        Self::Restore,
        Self::SendMigration,
        Self::ReceiveMigration,
        Self::CheckMigration,
        Self::SetMigration,
        Self::CancelMigration,
        Self::MigrationProgress,
        Self::CpuFeatures,
        Self::VmmShutdown,
    ];

    /// The route's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Info => "vm.info",
            Self::Counters => "vm.counters",
            Self::Create => "vm.create",
            Self::Delete => "vm.delete",
            Self::Boot => "vm.boot",
            Self::Pause => "vm.pause",
            Self::Resume => "vm.resume",
            Self::Shutdown => "vm.shutdown",
            Self::Reboot => "vm.reboot",
            Self::PowerButton => "vm.power-button",
            Self::Nmi => "vm.nmi",
            Self::Resize => "vm.resize",
            Self::ResizeZone => "vm.resize-zone",
            Self::ResizeDisk => "vm.resize-disk",
            Self::AddDisk => "vm.add-disk",
            Self::AddNet => "vm.add-net",
            Self::AddFs => "vm.add-fs",
            Self::AddGenericVhostUser => "vm.add-generic-vhost-user",
            Self::AddVsock => "vm.add-vsock",
            Self::AddDevice => "vm.add-device",
            Self::RemoveDevice => "vm.remove-device",
            Self::Snapshot => "vm.snapshot",
            Self::Restore => "vm.restore",
            Self::SendMigration => "vm.send-migration",
            Self::ReceiveMigration => "vm.receive-migration",
            Self::CheckMigration => "vm.check-migration",
            Self::SetMigration => "vm.set-migration",
            Self::CancelMigration => "vm.cancel-migration",
            Self::MigrationProgress => "vm.migration-progress",
            Self::CpuFeatures => "vmm.cpu-features",
            Self::VmmShutdown => "vmm.shutdown",
        }
    }

    /// The phases that accept it.
    pub fn phases(self) -> &'static [Phase] {
        use Phase::{Absent, Created, Paused, Running, Shutdown};
        match self {
            Self::Create | Self::Restore | Self::ReceiveMigration => &[Absent],
            Self::Info | Self::Counters | Self::Delete | Self::Resize | Self::ResizeZone => {
                &[Created, Running, Paused, Shutdown]
            }
            Self::Boot => &[Created, Shutdown],
            Self::AddDisk
            | Self::AddNet
            | Self::AddFs
            | Self::AddGenericVhostUser
            | Self::AddVsock
            | Self::AddDevice
            | Self::RemoveDevice => &[Created, Running, Paused, Shutdown],
            Self::Pause | Self::PowerButton | Self::Nmi => &[Running],
            Self::Resume | Self::Snapshot => &[Paused],
            Self::Shutdown | Self::Reboot | Self::ResizeDisk | Self::SendMigration | Self::CheckMigration => {
                &[Running, Paused]
            }
            Self::SetMigration
            | Self::CancelMigration
            | Self::MigrationProgress
            | Self::CpuFeatures
            | Self::VmmShutdown => &Phase::ALL,
        }
    }

    /// Whether a VM in `phase` accepts it; if not, what the client is told.
    pub fn check(self, phase: Phase) -> Result<(), ApiError> {
        let phases = self.phases();
        if phases.contains(&phase) {
            return Ok(());
        }
        let name = self.name();
        Err(match phase {
            Phase::Absent => ApiError::NotFound(format!("{name}: there is no VM; create one with vm.create")),
            _ if phases == [Phase::Absent] => {
                ApiError::WrongPhase(format!("{name}: there is a VM already; remove it with vm.delete"))
            }
            _ => {
                let names: Vec<_> = phases.iter().map(|p| p.name()).collect();
                let wanted = names.join(" or ");
                ApiError::WrongPhase(format!("{name}: the VM is {}, it must be {wanted}", phase.name()))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_operation_is_accepted_somewhere_and_refusals_say_why() {
        for operation in Operation::ALL {
            let (good, bad): (Vec<_>, Vec<_>) = Phase::ALL.into_iter().partition(|p| operation.check(*p).is_ok());
            assert!(!good.is_empty(), "{operation:?}");
            for phase in bad {
                let error = operation.check(phase).expect_err("refused");
                assert!(error.to_string().starts_with(operation.name()));
                let expected = if phase == Phase::Absent { 404 } else { 409 };
                assert_eq!(error.status(), expected, "{operation:?} in {phase:?}");
            }
        }
    }

    #[test]
    fn only_what_makes_a_vm_the_end_and_what_asks_of_the_host_works_without_one() {
        let accepted: Vec<_> = Operation::ALL
            .into_iter()
            .filter(|o| o.check(Phase::Absent).is_ok())
            .collect();
        assert_eq!(
            accepted,
            [
                Operation::Create,
                Operation::Restore,
                Operation::ReceiveMigration,
                Operation::SetMigration,
                Operation::CancelMigration,
                Operation::MigrationProgress,
                Operation::CpuFeatures,
                Operation::VmmShutdown
            ]
        );
    }

    /// Where an operation that succeeds leads; `None`: it leaves the phase as it is.
    fn leads_to(operation: Operation) -> Option<Phase> {
        match operation {
            Operation::Create => Some(Phase::Created),
            Operation::Delete | Operation::SendMigration => Some(Phase::Absent),
            Operation::Boot | Operation::Resume | Operation::Reboot | Operation::ReceiveMigration => {
                Some(Phase::Running)
            }
            Operation::Pause | Operation::Restore => Some(Phase::Paused),
            Operation::Shutdown => Some(Phase::Shutdown),
            _ => None,
        }
    }

    proptest! {
        /// Whatever clients ask in whatever order, a VM is never stuck: it can be ended, and a new one made.
        #[test]
        fn any_sequence_leads_back_to_the_start(steps in proptest::collection::vec(0..Operation::ALL.len(), 0..50)) {
            let mut phase = Phase::Absent;
            for operation in steps.into_iter().map(|i| Operation::ALL[i]) {
                if operation.check(phase).is_ok() {
                    phase = leads_to(operation).unwrap_or(phase);
                }
                let both = Operation::Pause.check(phase).is_ok() && Operation::Resume.check(phase).is_ok();
                prop_assert!(!both, "pause and resume exclude each other");
                prop_assert_eq!(Operation::Info.check(phase).is_ok(), phase != Phase::Absent);
            }
            if phase != Phase::Absent {
                prop_assert!(Operation::Delete.check(phase).is_ok());
            }
            prop_assert!(Operation::Create.check(Phase::Absent).is_ok());
            prop_assert!(Operation::VmmShutdown.check(phase).is_ok());
        }
    }
}
