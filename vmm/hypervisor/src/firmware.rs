//! Who decides which vCPUs run, and what of that is saved.

use serde::{Deserialize, Serialize};

use crate::{HypervisorError, Vcpu};

/// Which vCPUs run: what the machine gives the guest, what the guest starts, and the calls to its machine's firmware by which it does
/// so where KVM leaves that to the VMM (some of PSCI on ARM).
pub trait Firmware: Send + Sync {
    /// Serves the call `function` that vCPU `index`, `caller`, has just made; false when there is no such call.
    fn call(&self, index: usize, caller: &Vcpu, function: u64) -> Result<bool, HypervisorError>;

    /// Whether vCPU `index` is to run: one that the guest does not have, has not started, or has stopped, is not.
    fn runs(&self, index: usize) -> bool;

    /// Puts vCPU `index` where the guest has started it, if it has since the last time. Called on the vCPU's own thread before it runs.
    fn prepare(&self, index: usize, vcpu: &Vcpu) -> Result<(), HypervisorError>;

    /// Whether vCPU `index`, which runs, may not have been started by the guest yet, so that [`started`](Self::started) has to be asked
    /// when it leaves the guest. It does not change while the vCPU runs, but for what that returns.
    fn waits(&self, index: usize) -> bool;

    /// Whether the guest has started vCPU `index` since it was given it by [`plug`](Self::plug); told once. Called on the vCPU's own
    /// thread after [`prepare`](Self::prepare) and when it was woken.
    fn started(&self, index: usize, vcpu: &Vcpu) -> bool;

    /// Makes vCPU `index`, if the guest does not have it, as it is after a reset. Called on the vCPU's own thread while it does not run.
    fn rest(&self, index: usize, vcpu: &Vcpu) -> Result<(), HypervisorError>;

    /// Whether vCPU `index`, which the guest does not have, is as it is after a reset.
    fn rested(&self, index: usize) -> bool;

    /// Lets the guest start vCPU `index`, which has [`rested`](Self::rested).
    fn plug(&self, index: usize);

    /// Takes vCPU `index` from the guest. What runs of it is to be interrupted then.
    fn unplug(&self, index: usize);

    /// Everything about who runs and who may. Asked while no vCPU runs.
    fn save(&self) -> FirmwareStateV1;
}

/// The saved state of a [`Firmware`], by its kind: of every vCPU the guest may ever have, in their order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FirmwareStateV1 {
    /// KVM starts vCPUs itself.
    StartedByKvm(Vec<StartV1>),
    /// The VMM serves the guest's PSCI calls.
    Psci(Vec<PsciV1>),
}

impl FirmwareStateV1 {
    /// How many vCPUs it tells of.
    pub fn vcpus(&self) -> usize {
        match self {
            Self::StartedByKvm(vcpus) => vcpus.len(),
            Self::Psci(vcpus) => vcpus.len(),
        }
    }
}

/// How far a vCPU is that KVM starts itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartV1 {
    /// The guest does not have it, and it waits for its start.
    Absent,
    /// The guest has given it back, and it is as the guest left it.
    Left,
    /// The guest has it, and has not started it.
    Waiting,
    /// It was started, or was there from the guest's start.
    Started,
}

/// A processor of a guest whose PSCI calls the VMM serves (Arm DEN 0022).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PsciV1 {
    /// The guest may start it.
    pub enabled: bool,
    /// It has run before, so that its registers are reset when it is started.
    pub ran: bool,
    /// It is known that the guest has started it since it was enabled.
    pub told: bool,
    /// It is on, or was started and is not yet at its first instruction.
    pub on: bool,
    /// Address of its first instruction, if it is not there yet.
    pub entry: Option<u64>,
    /// What it finds in X0 there.
    pub context: Option<u64>,
}
