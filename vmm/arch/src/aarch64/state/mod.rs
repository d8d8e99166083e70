//! The saved state of vCPUs, the interrupt controller and clocks.
//!
//! Values are those of the Arm Architecture Reference Manual and of Arm's GIC specification (IHI 0069); vCPU registers have the numbers of
//! KVM's interface (Linux, Documentation/virt/kvm/api.rst, 4.68), which hold the architecture's encoding.

#[allow(unsafe_code)] // attributes are read into variables
mod attribute;
mod gic;
mod its;
mod platform;
mod registers;
mod time;
mod vcpu;

use serde::{Deserialize, Serialize};
use triarch_cpu_model::Topology;

use crate::HexBytes;
pub use time::restore_time;
pub use vcpu::{recreate_vcpus, restore_vcpu, save_vcpu};

/// What the processors of a guest are made from, those included that it may get later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuPlanStateV1 {
    /// vCPUs as configured.
    pub boot: u32,
    /// vCPUs the guest started with.
    pub now: u32,
    /// vCPUs it can have at most.
    pub max: u32,
    /// Their shape.
    pub topology: Topology,
    /// Width of a guest physical address in bits.
    pub address_bits: u8,
    /// They have scalable vectors.
    pub sve: bool,
    /// They have pointer authentication.
    pub pauth: bool,
    /// They have performance monitors.
    pub pmu: bool,
}

/// A vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuStateV1 {
    /// Features it was made with, as a bitmap (KVM_ARM_VCPU_INIT).
    pub features: u32,
    /// All registers but the counters.
    pub registers: Vec<RegisterV1>,
    /// How far it is.
    pub run: RunV1,
    /// Exceptions on their way.
    pub events: EventsV1,
    /// What its counters counted.
    pub counters: CountersV1,
}

/// A register of a vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterV1 {
    /// Its number.
    pub id: u64,
    /// Its value, the least significant byte first.
    pub value: HexBytes,
}

/// How far a vCPU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunV1 {
    /// It runs, or waits for an interrupt by itself.
    #[default]
    Running,
    /// It is off (PSCI).
    Stopped,
    /// It sleeps until an interrupt comes (PSCI).
    Suspended,
}

/// Exceptions on their way to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsV1 {
    /// An SError waits.
    pub serror_pending: bool,
    /// Its syndrome, if it has one.
    pub serror_syndrome: Option<u64>,
}

/// Counters, which all vCPUs have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CountersV1 {
    /// CNTVCT_EL0, by which Linux tells time.
    #[serde(rename = "virtual")]
    pub virtual_count: u64,
    /// CNTPCT_EL0; kernels before 6.4 cannot set it.
    #[serde(rename = "physical")]
    pub physical_count: Option<u64>,
}

/// What of the VM is outside of its vCPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformStateV1 {
    /// The GIC's distributor.
    pub distributor: DistributorV1,
    /// What of the GIC each vCPU has, in their order.
    pub cpus: Vec<GicCpuV1>,
    /// The ITS. Its tables are in guest memory.
    pub its: ItsV1,
    /// When it was saved.
    pub clock: ClockV1,
}

/// The GIC's distributor: the shared interrupts, from number 32 on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistributorV1 {
    /// GICD_CTLR.
    pub control: u32,
    /// GICD_IIDR: how KVM implements it.
    pub implementation: u32,
    /// GICD_IGROUPR: a bit each.
    pub groups: Vec<u32>,
    /// GICD_IPRIORITYR: a byte each.
    pub priorities: Vec<u32>,
    /// GICD_ICFGR: two bits each.
    pub configuration: Vec<u32>,
    /// GICD_IROUTER.
    pub routes: Vec<u64>,
    /// GICD_ISENABLER: a bit each.
    pub enabled: Vec<u32>,
    /// GICD_ISPENDR, without what is pending by its line: a bit each.
    pub pending: Vec<u32>,
    /// GICD_ISACTIVER: a bit each.
    pub active: Vec<u32>,
    /// Levels of the lines: a bit each.
    pub lines: Vec<u32>,
}

/// What of the GIC a vCPU has.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GicCpuV1 {
    /// Its private interrupts.
    pub redistributor: RedistributorV1,
    /// Its CPU interface.
    pub interface: InterfaceV1,
}

/// A redistributor: the private interrupts of a vCPU, and where its tables of message-signalled ones are.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RedistributorV1 {
    /// GICR_CTLR.
    pub control: u32,
    /// GICR_PROPBASER.
    pub properties: u64,
    /// GICR_PENDBASER.
    pub pending_table: u64,
    /// GICR_IGROUPR0.
    pub group: u32,
    /// GICR_IPRIORITYR.
    pub priorities: Vec<u32>,
    /// GICR_ICFGR1; the one before cannot be changed.
    pub configuration: u32,
    /// GICR_ISENABLER0.
    pub enabled: u32,
    /// GICR_ISPENDR0, without what is pending by its line.
    pub pending: u32,
    /// GICR_ISACTIVER0.
    pub active: u32,
    /// Levels of the lines.
    pub lines: u32,
}

/// A CPU interface.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceV1 {
    /// ICC_SRE_EL1.
    pub system_registers: u64,
    /// ICC_CTLR_EL1.
    pub control: u64,
    /// ICC_IGRPEN0_EL1 and ICC_IGRPEN1_EL1.
    pub group_enabled: [u64; 2],
    /// ICC_PMR_EL1.
    pub priority_mask: u64,
    /// ICC_BPR0_EL1 and ICC_BPR1_EL1.
    pub binary_point: [u64; 2],
    /// ICC_AP0R_EL1.
    pub active0: Vec<u64>,
    /// ICC_AP1R_EL1.
    pub active1: Vec<u64>,
}

/// The ITS.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ItsV1 {
    /// GITS_CTLR.
    pub control: u64,
    /// GITS_IIDR: the format of its tables.
    pub implementation: u64,
    /// GITS_CBASER.
    pub commands: u64,
    /// GITS_CREADR.
    pub commands_read: u64,
    /// GITS_CWRITER.
    pub commands_written: u64,
    /// GITS_BASER.
    pub tables: [u64; 8],
}

/// When a guest was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockV1 {
    /// Frequency of the counters in Hz.
    pub counter_hz: u64,
    /// The host's clock then, in nanoseconds since 1970.
    pub host_ns: u64,
}
