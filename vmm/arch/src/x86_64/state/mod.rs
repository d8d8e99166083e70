//! The saved state of vCPUs, interrupt controllers and clocks.
//!
//! Values are those of the Intel SDM and the AMD APM. Where KVM has a state of its own (events on their way to the guest, how far an
//! application processor has come), its fields have names here and the numbers of KVM's header files do not appear.

mod convert;
mod counter;
mod msr;
#[allow(unsafe_code)] // a union
mod nested;
#[allow(unsafe_code)] // an attribute that KVM's crate cannot read
mod offset;
#[allow(unsafe_code)] // unions
mod platform;
#[allow(unsafe_code)] // an instruction
mod time;
mod vcpu;
#[allow(unsafe_code)] // an area whose size the kernel tells
mod xsave;

use serde::{Deserialize, Serialize};
use triarch_cpu_model::{CpuidTable, Topology};

use crate::HexBytes;
pub(super) use msr::{offered as offered_msrs, read as read_msrs};
pub use time::restore_time;
pub use vcpu::{recreate_vcpus, restore_vcpu, save_vcpu};

/// What the processors of a guest are made from, those included that come later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuPlanStateV1 {
    /// vCPUs the guest started with.
    pub boot: u32,
    /// vCPUs it can have at most.
    pub max: u32,
    /// Their shape.
    pub topology: Topology,
    /// CPUID that each vCPU's is derived from.
    pub cpuid: CpuidTable,
    /// The local APIC has the TSC deadline timer.
    pub tsc_deadline: bool,
}

/// A vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuStateV1 {
    /// CPUID as it sees it.
    pub cpuid: CpuidTable,
    /// General registers.
    pub general: GeneralV1,
    /// Segments, tables, control registers.
    pub special: SpecialV1,
    /// Debug registers.
    pub debug: DebugV1,
    /// The XSAVE area in its standard format (SDM volume 1, 13.4), without the zeros at its end.
    pub xsave: HexBytes,
    /// Extended control registers; empty on CPUs without XSAVE.
    pub xcrs: Vec<NumberedV1>,
    /// Model-specific registers but [`TscV1`].
    pub msrs: Vec<NumberedV1>,
    /// Registers of the local APIC: number n is at offset 16 * n (SDM volume 3, 11.4.1).
    pub local_apic: Vec<u32>,
    /// How far it is.
    pub run: RunV1,
    /// Exceptions and interrupts on their way.
    pub events: EventsV1,
    /// Its time stamp counter.
    pub tsc: TscV1,
}

/// A register that has a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NumberedV1 {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// General registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "names of registers")]
pub struct GeneralV1 {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// A segment register with what the CPU keeps of its descriptor (SDM volume 3, 3.4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentV1 {
    /// Linear address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// What is in the register itself.
    pub selector: u16,
    /// Type, 4 bits.
    #[serde(rename = "type")]
    pub kind: u8,
    /// Present.
    pub present: bool,
    /// Privilege level, 2 bits.
    pub dpl: u8,
    /// Default operation size, B or D.
    pub db: bool,
    /// Code or data, not a system segment.
    pub s: bool,
    /// 64-bit code.
    pub l: bool,
    /// Granularity.
    pub g: bool,
    /// Available for software.
    pub avl: bool,
    /// Loaded with a null selector.
    pub unusable: bool,
}

/// A descriptor table register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescriptorTableV1 {
    /// Linear address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Segments, tables, control registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "names of registers")]
pub struct SpecialV1 {
    pub cs: SegmentV1,
    pub ds: SegmentV1,
    pub es: SegmentV1,
    pub fs: SegmentV1,
    pub gs: SegmentV1,
    pub ss: SegmentV1,
    pub tr: SegmentV1,
    pub ldt: SegmentV1,
    pub gdt: DescriptorTableV1,
    pub idt: DescriptorTableV1,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
}

/// Debug registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DebugV1 {
    /// Addresses: DR0 to DR3.
    pub addresses: [u64; 4],
    /// Status.
    pub dr6: u64,
    /// Control.
    pub dr7: u64,
}

/// How far a vCPU is (SDM volume 3, 9.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunV1 {
    /// It runs.
    #[default]
    Running,
    /// It waits for an interrupt (HLT).
    Halted,
    /// It was never started.
    Uninitialized,
    /// It was reset by INIT and waits for its start.
    InitReceived,
    /// It has been told where to start, and has not.
    SipiReceived,
}

/// Exceptions and interrupts on their way to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsV1 {
    /// An exception that is being delivered.
    pub exception: Option<ExceptionV1>,
    /// An interrupt that is being delivered.
    pub interrupt: Option<InterruptV1>,
    /// The instruction before this one keeps interrupts away (1: MOV SS or POP SS, 2: STI).
    pub shadow: u8,
    /// An NMI is being delivered.
    pub nmi_injected: bool,
    /// NMIs that wait.
    pub nmi_pending: u8,
    /// The guest handles an NMI: others wait.
    pub nmi_masked: bool,
    /// Vector of a SIPI that was received.
    pub sipi_vector: Option<u32>,
    /// System management mode, where KVM knows it.
    pub smm: Option<SmmV1>,
}

/// An exception that is being delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExceptionV1 {
    /// Its vector.
    pub vector: u8,
    /// Its error code, if it has one.
    pub error_code: Option<u32>,
}

/// An interrupt that is being delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterruptV1 {
    /// Its vector.
    pub vector: u8,
    /// It comes of an INT instruction.
    pub soft: bool,
}

/// System management mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmmV1 {
    /// The vCPU is in it.
    pub active: bool,
    /// An SMI waits.
    pub pending: bool,
    /// It was entered while NMIs were masked.
    pub inside_nmi: bool,
    /// An INIT waits for its end.
    pub latched_init: bool,
}

/// A time stamp counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TscV1 {
    /// What it counted when it was saved. vCPUs are saved one after the other.
    pub value: u64,
    /// What the host's counted then.
    pub host: u64,
    /// What it counts more than the host's, scaled; of several vCPUs this tells how their counters differ. Kernels before 5.16 do not tell.
    pub offset: Option<u64>,
    /// Frequency in kHz; `None` where KVM does not tell.
    pub khz: Option<u32>,
    /// IA32_TSC_DEADLINE: when the timer fires, 0 if it does not.
    pub deadline: Option<u64>,
}

/// What of the VM is outside of its vCPUs. There is no PIT.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformStateV1 {
    /// The I/O APIC.
    pub io_apic: IoApicV1,
    /// Master and slave of the 8259 pair.
    pub pics: [PicV1; 2],
    /// KVM's clock for guests.
    pub clock: ClockV1,
}

/// The I/O APIC (82093AA data sheet, 3.0).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoApicV1 {
    /// Where it is.
    pub base: u64,
    /// Register that is selected.
    pub select: u32,
    /// Its id.
    pub id: u32,
    /// Pins with an interrupt that has not been delivered, one bit each.
    pub pending: u32,
    /// Redirection entries of its pins.
    pub redirections: [u64; 24],
}

/// An 8259 interrupt controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PicV1 {
    /// Levels of its lines, for edges.
    pub lines: u8,
    /// Interrupt request register.
    pub irr: u8,
    /// Interrupt mask register.
    pub imr: u8,
    /// In-service register.
    pub isr: u8,
    /// The line with the highest priority.
    pub highest: u8,
    /// First vector.
    pub base: u8,
    /// A read shows the in-service register.
    pub reads_isr: bool,
    /// The next read polls.
    pub poll: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// Command words of the initialization that were given.
    pub init_step: u8,
    /// Interrupts end by themselves.
    pub auto_eoi: bool,
    /// Priorities rotate when they do.
    pub rotate_on_auto_eoi: bool,
    /// Special fully nested mode.
    pub fully_nested: bool,
    /// The initialization has a fourth word.
    pub init_has_fourth: bool,
    /// Edge/level control register.
    pub elcr: u8,
    /// Bits of it that can be changed.
    pub elcr_mask: u8,
}

/// KVM's clock for guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockV1 {
    /// What it counts, in nanoseconds.
    pub guest_ns: u64,
    /// The host's clock then, in nanoseconds since 1970.
    pub host_ns: u64,
    /// What the host's time stamp counter counted then: at this instant the guest's counters belong to this clock.
    pub host_tsc: u64,
}
