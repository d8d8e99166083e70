//! What CPUs guests can have here, and what the guest that is there has (`vmm.cpu-features`).

use std::sync::OnceLock;

use kvm_ioctls::Kvm;
use triarch_api::{CpuDescription, CpuFeatures, CpuSignature, Reply};
use triarch_arch::CpuError;
use triarch_cpu_model::{GuestProcessor, HostProcessor, Processor, Verdict};

use crate::control::Controller;
use crate::{Machine, MachineError};

impl Controller {
    /// `vmm.cpu-features`.
    pub(crate) fn cpu_features(&self) -> Result<Reply, MachineError> {
        let offered = offered(&self.kvm)?;
        let mut host = describe(offered.processor());
        host.kernel = Some(offered.host().kernel.clone());
        if let Processor::X86(_) = offered.processor() {
            host.tsc_scaling = Some(offered.host().tsc_scaling);
        }
        let vm = self.machine.as_ref().and_then(Machine::processor);
        let vm = vm.map(|guest| describe(guest.processor()));
        Ok(Reply::CpuFeatures(Box::new(CpuFeatures { host, vm })))
    }
}

/// The CPU of a guest. Without it the guest runs as well, but nobody can tell where else it could.
pub(crate) fn told(processor: Result<GuestProcessor, CpuError>) -> Option<GuestProcessor> {
    processor
        .inspect_err(|error| tracing::warn!("it is not known what CPU the guest has: {}", triarch_api::chain(error)))
        .ok()
}

/// Checks that this host has all of the CPU that a guest was given elsewhere. What it lacks is in the error, by name.
pub(crate) fn check(kvm: &Kvm, guest: &GuestProcessor) -> Result<(), MachineError> {
    Ok(triarch_arch::check_processor(guest, offered(kvm)?)?)
}

/// All that this host lacks of it, for a guest that is not to be moved yet.
pub(crate) fn compared(kvm: &Kvm, guest: &GuestProcessor) -> Result<Verdict, MachineError> {
    Ok(triarch_cpu_model::compare(guest, offered(kvm)?))
}

/// What this host offers. A VM is made to find out, once: it stays the same for as long as KVM is held open.
fn offered(kvm: &Kvm) -> Result<&'static HostProcessor, MachineError> {
    static OFFERED: OnceLock<HostProcessor> = OnceLock::new();
    if let Some(offered) = OFFERED.get() {
        return Ok(offered);
    }
    let found = triarch_arch::host_processor(kvm)?;
    Ok(OFFERED.get_or_init(|| found))
}

fn describe(processor: &Processor) -> CpuDescription {
    let listing = processor.listing();
    let mut description = CpuDescription {
        architecture: processor.architecture().to_owned(),
        vendor: None,
        signature: None,
        kernel: None,
        tsc_khz: None,
        tsc_scaling: None,
        features: listing.features,
        values: listing.values,
        unnamed: listing.unnamed,
    };
    if let Processor::X86(x86) = processor {
        let signature = x86.signature();
        description.vendor = Some(x86.vendor_name());
        description.tsc_khz = x86.tsc_khz;
        description.signature = Some(CpuSignature {
            family: signature.family,
            model: signature.model,
            stepping: signature.stepping,
        });
    }
    description
}
