//! What CPU a guest has, and what this host offers, as data.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use kvm_ioctls::{Cap, Kvm};
use triarch_cpu_model::features::{self, Register};
use triarch_cpu_model::{CpuidTable, GuestCpu, GuestProcessor, Host, HostProcessor, Processor, X86, guest_cpuid};
use triarch_hypervisor::{Vcpu, Vm};

use super::cpu::{CpuError, CpuPlan, create_vcpu};
use super::state::{CpuPlanStateV1, PlatformStateV1, VcpuStateV1, offered_msrs, read_msrs};
use crate::common::kernel_release;
use crate::common::state::no_vcpus;
use crate::{CpuCount, StateError};

/// Feature MSRs that are 0 in a new vCPU, and in which guests themselves set what KVM offers: AMD's DE_CFG.
const SET_BY_GUESTS: [u32; 1] = [0xc001_1029];

/// MSRs that tell what a CPU can do: those KVM says are such, which kernels before 4.17 do not, and of those that are state (`listed`)
/// the ones that tell features, too.
pub(super) fn feature_msrs(kvm: &Kvm, listed: &[u32]) -> Vec<u32> {
    let told = kvm.get_msr_feature_index_list();
    let mut told = told.map_or_else(|_| Vec::new(), |list| list.as_slice().to_vec());
    let more = listed.iter().filter(|index| tells(**index) && !told.contains(index));
    told.extend(more.copied().collect::<Vec<_>>());
    told
}

/// Whether a feature is known to be in MSR `index`.
fn tells(index: u32) -> bool {
    static KNOWN: OnceLock<BTreeSet<u32>> = OnceLock::new();
    let msr = |(register, _)| match register {
        Register::Msr(index) => Some(index),
        _ => None,
    };
    let known = KNOWN.get_or_init(|| features::x86().all().filter_map(msr).collect());
    known.contains(&index)
}

/// The CPU that `vcpu` was given with `cpuid`. One of `msrs` that it does not have is left out.
pub(super) fn of_vcpu(vcpu: &Vcpu, cpuid: CpuidTable, msrs: &[u32]) -> Result<GuestProcessor, CpuError> {
    let msrs = read_msrs(vcpu, msrs)?;
    let msrs: BTreeMap<u32, u64> = msrs.into_iter().map(|msr| (msr.index, msr.value)).collect();
    let tsc_khz = vcpu.fd().get_tsc_khz().ok().filter(|khz| *khz > 0);
    Ok(GuestProcessor::new(Processor::X86(X86 { cpuid, msrs, tsc_khz }))?)
}

/// What this host offers to guests: the CPU of a guest that gets all of it.
pub fn host_processor(kvm: &Kvm) -> Result<HostProcessor, CpuError> {
    let plan = CpuPlan::new(kvm, CpuCount::ONE, None)?;
    // Without interrupt controllers, which change nothing of it and take KVM most of the time that a VM takes.
    let vm = Vm::new(kvm)?;
    let vcpu = create_vcpu(&vm, &plan, 0)?;
    let guest = of_vcpu(&vcpu, plan.cpuid(0), &plan.feature_msrs)?;
    let mut processor = guest.processor().clone();
    if let Processor::X86(x86) = &mut processor {
        let most = offered_msrs(kvm, &SET_BY_GUESTS)?;
        x86.msrs.extend(most.iter().map(|msr| (msr.index, msr.value)));
    }
    Ok(HostProcessor::new(Host {
        processor,
        kernel: kernel_release(),
        tsc_scaling: kvm.check_extension(Cap::TscControl),
        writable: BTreeMap::new(),
    })?)
}

/// The CPU of a guest that was saved, as it was given to its first vCPU: to be compared with what a host offers.
pub fn saved_processor(
    cpus: &CpuPlanStateV1,
    vcpus: &[VcpuStateV1],
    _platform: &PlatformStateV1,
) -> Result<GuestProcessor, StateError> {
    let first = vcpus.first().ok_or_else(no_vcpus)?;
    let msrs = first.msrs.iter().filter(|msr| tells(msr.index));
    let given = GuestCpu {
        index: 0,
        topology: cpus.topology,
        tsc_deadline: cpus.tsc_deadline,
    };
    let processor = Processor::X86(X86 {
        // Not as the vCPU was saved with it: a KVM in software may tell there of more than it let guests have.
        cpuid: guest_cpuid(&cpus.cpuid, &given),
        msrs: msrs.map(|msr| (msr.index, msr.value)).collect(),
        tsc_khz: first.tsc.khz,
    });
    GuestProcessor::new(processor).map_err(|error| StateError::damaged("a vCPU", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msrs_that_tell_features_are_known_whatever_the_vendor() {
        // IA32_ARCH_CAPABILITIES, MSR_PLATFORM_INFO, AMD's DE_CFG.
        assert!([0x10a, 0xce, 0xc001_1029].into_iter().all(tells));
        // The TSC, STAR, the revision of the microcode.
        assert!(![0x10, 0xc000_0081, 0x8b].into_iter().any(tells));
    }
}
