//! What CPU a guest has, and what this host offers, as data.

use std::collections::BTreeMap;

use kvm_ioctls::{Cap, Kvm};
use triarch_cpu_model::{CpuidTable, GuestProcessor, Host, HostProcessor, Processor, X86};
use triarch_hypervisor::{Vcpu, Vm};

use super::cpu::{CpuError, CpuPlan, create_vcpus};
use super::platform::Platform;
use super::state::read_msrs;
use crate::CpuCount;
use crate::common::kernel_release;

/// MSRs that tell what a CPU can do. Kernels before 4.17 do not say which those are.
pub(super) fn feature_msrs(kvm: &Kvm) -> Vec<u32> {
    let told = kvm.get_msr_feature_index_list();
    told.map_or_else(|_| Vec::new(), |list| list.as_slice().to_vec())
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
    let vm = Vm::new(kvm)?;
    let platform = Platform::new(&vm)?;
    let made = create_vcpus(&vm, &plan, &platform)?;
    Ok(HostProcessor::new(Host {
        processor: made.processor?.processor().clone(),
        kernel: kernel_release(),
        tsc_scaling: kvm.check_extension(Cap::TscControl),
        writable: BTreeMap::new(),
    })?)
}
