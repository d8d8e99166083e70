//! vCPUs: CPUID, the registers the boot protocols ask for, the MSRs a firmware would have set.

use std::arch::x86_64::{__cpuid, CpuidResult};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_cpuid_entry2,
    kvm_msr_entry, kvm_segment,
};
use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;
use triarch_boot::EntryMode;
use triarch_cpu_model::{
    CpuidEntry, CpuidTable, DescriptionError, GuestCpu, Topology, TopologyError, Vendor, guest_cpuid,
};
use triarch_hypervisor::{HypervisorError, Vcpu, Vm};

use super::{Entry, Platform, processor};
use crate::starts::Starts;
use crate::{CpuCount, Vcpus};

/// Ids 255 and above cannot be addressed before a guest switches to x2APIC.
const MAX_APIC_ID: u32 = 254;

/// CR0: protected mode, the FPU's presence (always set on these CPUs), paging.
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS: the bit that is always set.
const RFLAGS_FIXED: u64 = 1 << 1;

const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, memory write-back where none says otherwise.
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;

/// Why vCPUs could not be made as asked.
#[derive(Debug, Error)]
pub enum CpuError {
    /// The topology does not fit.
    #[error("the CPU topology is invalid")]
    Topology(#[from] TopologyError),
    /// The topology leaves gaps in the APIC ids that push the last one too high.
    #[error(
        "with this CPU topology the last vCPU has APIC id {0}, at most {MAX_APIC_ID} can be used; make its levels powers of two"
    )]
    ApicId(u32),
    /// More vCPUs than the host's KVM can run.
    #[error("{asked} vCPUs were asked for, this host's KVM allows {max}; lower --cpus max")]
    TooMany {
        /// vCPUs asked for.
        asked: u32,
        /// vCPUs the host allows.
        max: usize,
    },
    /// KVM tells of a CPU that cannot be.
    #[error("cannot describe the CPU that KVM gave a vCPU")]
    Description(#[from] DescriptionError),
    /// KVM refused.
    #[error("cannot set up a vCPU")]
    Kvm(#[from] HypervisorError),
}

/// The processors of a guest, before they exist.
#[derive(Clone)]
pub struct CpuPlan {
    pub(super) host: CpuidTable,
    pub(super) topology: Topology,
    pub(super) boot: u32,
    pub(super) max: u32,
    pub(super) tsc_deadline: bool,
    /// Indices of the MSRs that tell features.
    pub(super) feature_msrs: Vec<u32>,
    /// Indices of the MSRs that are state, and of those that tell features.
    pub(super) saved_msrs: Vec<u32>,
    /// Bytes of an XSAVE area; 0 where it is as large as ever.
    pub(super) xsave_size: usize,
    /// KVM tells of guests of the guest.
    pub(super) can_nest: bool,
}

impl CpuPlan {
    /// Plans the vCPUs of `count`, shaped by `topology` (flat when `None`).
    pub fn new(kvm: &Kvm, count: CpuCount, topology: Option<Topology>) -> Result<Self, CpuError> {
        let CpuCount { now, max, .. } = count;
        let host_max = kvm.get_max_vcpus();
        if max as usize > host_max {
            return Err(CpuError::TooMany {
                asked: max,
                max: host_max,
            });
        }
        let topology = topology.unwrap_or_else(|| Topology::flat(max as u16));
        topology.check(max)?;
        let last = topology.apic_id(max - 1);
        if last > MAX_APIC_ID {
            return Err(CpuError::ApicId(last));
        }
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(HypervisorError::kvm("tell its CPUID"))?;
        let host = supported
            .as_slice()
            .iter()
            .map(from_kvm)
            .chain(names_and_caches())
            .collect();
        let listed = kvm.get_msr_index_list().map_err(HypervisorError::kvm("list MSRs"))?;
        let mut saved_msrs = listed.as_slice().to_vec();
        let feature_msrs = processor::feature_msrs(kvm, &saved_msrs);
        saved_msrs.extend(feature_msrs.iter().filter(|index| !listed.as_slice().contains(index)));
        Ok(Self {
            host,
            topology,
            boot: now,
            max,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            feature_msrs,
            saved_msrs,
            xsave_size: usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0),
            can_nest: kvm.check_extension(Cap::NestedState),
        })
    }

    /// Who made the CPU the guest sees.
    pub fn vendor(&self) -> Vendor {
        self.host.vendor()
    }

    /// Lets guest physical addresses have `bits` bits at most.
    pub fn limit_address_bits(&mut self, bits: u8) {
        self.host.limit_physical_address_bits(bits);
    }

    /// Width of a guest physical address in bits.
    pub fn address_bits(&self) -> u8 {
        self.host.physical_address_bits()
    }

    /// vCPUs the guest starts with.
    pub fn boot_vcpus(&self) -> u32 {
        self.boot
    }

    /// vCPUs it can have at most.
    pub fn max_vcpus(&self) -> u32 {
        self.max
    }

    /// vCPUs it cannot give back, from the first on.
    pub fn fixed_vcpus(&self) -> u32 {
        1
    }

    /// The APIC id of vCPU `index`.
    pub fn hardware_id(&self, index: u32) -> u32 {
        self.topology.apic_id(index)
    }

    pub(super) fn cpuid(&self, index: u32) -> CpuidTable {
        guest_cpuid(
            &self.host,
            &GuestCpu {
                index,
                topology: self.topology,
                tsc_deadline: self.tsc_deadline,
            },
        )
    }
}

/// Makes the vCPUs the guest starts with. All but the first wait to be started by it. Others can be made at any time.
pub fn create_vcpus(vm: &Vm, plan: &CpuPlan, _platform: &Platform) -> Result<Vcpus, CpuError> {
    let running: Result<Vec<_>, _> = (0..plan.boot).map(|index| create_vcpu(vm, plan, index)).collect();
    let running = running?;
    let first = running
        .first()
        .ok_or(HypervisorError::Capability("a vCPU to start with"))?;
    Ok(Vcpus {
        processor: processor::of_vcpu(first, plan.cpuid(0), &plan.feature_msrs),
        running,
        parked: Vec::new(),
        firmware: Arc::new(Starts::new(plan.max, plan.boot, KVM_MP_STATE_UNINITIALIZED)),
    })
}

/// Makes a vCPU for a guest that runs already: the one with this index, which no other has.
pub fn create_later(vm: &Vm, plan: &CpuPlan, index: u32) -> Result<Vcpu, CpuError> {
    let vcpu = create_vcpu(vm, plan, index)?;
    // KVM draws its map of APIC ids before a new vCPU is among them, and draws it again when a local APIC is set: without this, INIT
    // would find nobody.
    let apic = vcpu
        .fd()
        .get_lapic()
        .map_err(HypervisorError::kvm("read a local APIC"))?;
    vcpu.fd()
        .set_lapic(&apic)
        .map_err(HypervisorError::kvm("set a local APIC"))?;
    Ok(vcpu)
}

pub(super) fn create_vcpu(vm: &Vm, plan: &CpuPlan, index: u32) -> Result<Vcpu, CpuError> {
    let vcpu = vm.create_vcpu(u64::from(plan.hardware_id(index)))?;
    let cpuid = kvm_cpuid(&plan.cpuid(index)).ok_or(HypervisorError::Capability("room for all CPUID entries"))?;
    vcpu.fd()
        .set_cpuid2(&cpuid)
        .map_err(HypervisorError::kvm("set CPUID"))?;
    let mtrr = kvm_msr_entry {
        index: MSR_MTRR_DEF_TYPE,
        data: MTRR_ON_WRITE_BACK,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[mtrr]).map_err(|_| HypervisorError::Capability("room for MSRs"))?;
    vcpu.fd().set_msrs(&msrs).map_err(HypervisorError::kvm("set MSRs"))?;
    Ok(vcpu)
}

/// Leaves KVM does not tell, since they enable nothing: the CPU's name (0x8000_0002 to 4) and AMD's first-level caches
/// (0x8000_0005). An empty entry of KVM gives way.
fn names_and_caches() -> impl Iterator<Item = CpuidEntry> {
    let highest = __cpuid(0x8000_0000).eax;
    (0x8000_0002..=0x8000_0005)
        .filter(move |leaf| *leaf <= highest)
        .map(|leaf| {
            let CpuidResult { eax, ebx, ecx, edx } = __cpuid(leaf);
            CpuidEntry {
                leaf,
                subleaf: 0,
                indexed: false,
                eax,
                ebx,
                ecx,
                edx,
            }
        })
}

pub(super) fn from_kvm(e: &kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        leaf: e.function,
        subleaf: e.index,
        indexed: e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
    }
}

/// CPUID as KVM takes it; `None`: more than it has room for.
pub(super) fn kvm_cpuid(table: &CpuidTable) -> Option<CpuId> {
    let entries: Vec<_> = table.entries().iter().map(to_kvm).collect();
    CpuId::from_entries(&entries).ok()
}

fn to_kvm(e: &CpuidEntry) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: e.leaf,
        index: e.subleaf,
        flags: if e.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
        ..Default::default()
    }
}

/// Puts the first vCPU at the kernel's entry.
pub fn set_entry(vcpu: &Vcpu, entry: &Entry) -> Result<(), HypervisorError> {
    let Entry { boot: entry, tables } = entry;
    let mut sregs = vcpu.fd().get_sregs().map_err(HypervisorError::kvm("read registers"))?;
    let long = entry.mode == EntryMode::Long64;
    let selectors = tables.selectors;
    let flat = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: selectors.data,
        type_: 3,
        db: 1,
        ..flat
    };
    sregs.cs = kvm_segment {
        selector: selectors.code,
        type_: 11,
        db: u8::from(!long),
        l: u8::from(long),
        ..flat
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        selector: selectors.task,
        limit: 0x67,
        type_: 11,
        present: 1,
        ..kvm_segment::default()
    };
    sregs.gdt.base = tables.gdt_base.0;
    sregs.gdt.limit = tables.gdt_limit;
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    if let Some(page_table) = tables.page_table.filter(|_| long) {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = page_table.0;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    }
    vcpu.fd()
        .set_sregs(&sregs)
        .map_err(HypervisorError::kvm("set registers"))?;

    let mut regs = vcpu.fd().get_regs().map_err(HypervisorError::kvm("read registers"))?;
    regs.rflags = RFLAGS_FIXED;
    regs.rip = entry.rip.0;
    match entry.mode {
        EntryMode::Pvh32 => regs.rbx = entry.params.0,
        EntryMode::Long64 => regs.rsi = entry.params.0,
    }
    vcpu.fd().set_regs(&regs).map_err(HypervisorError::kvm("set registers"))
}
