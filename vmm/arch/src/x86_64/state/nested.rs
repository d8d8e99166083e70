//! Guests of the guest. What the CPU holds of them while they are there is not saved.

use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GIF_SET, KVM_STATE_NESTED_GUEST_MODE,
    nested::KvmNestedStateBuffer,
};
use triarch_hypervisor::{HypervisorError, Vcpu};

use crate::StateError;

/// EFER: SVM is enabled.
const SVME: u64 = 1 << 12;
/// There is no VMXON region.
const NOWHERE: u64 = u64::MAX;

/// Refuses a vCPU, with `efer`, that runs a guest of its own or is ready to.
pub(super) fn check(vcpu: &Vcpu, efer: u64) -> Result<(), StateError> {
    let mut state = KvmNestedStateBuffer::empty();
    vcpu.fd()
        .nested_state(&mut state)
        .map_err(HypervisorError::kvm("tell of guests of the guest"))?;
    let flag = |flag: u32| u32::from(state.flags) & flag != 0;
    let ready = match u32::from(state.format) {
        // SAFETY: the kernel says that the header is this one, and every one is plain numbers.
        KVM_STATE_NESTED_FORMAT_VMX => (unsafe { state.hdr.vmx.vmxon_pa }) != NOWHERE,
        KVM_STATE_NESTED_FORMAT_SVM => efer & SVME != 0 && !flag(KVM_STATE_NESTED_GIF_SET),
        _ => true,
    };
    if ready || flag(KVM_STATE_NESTED_GUEST_MODE) {
        return Err(StateError::Unknown {
            what: "a guest that runs guests of its own (end them, and unload its hypervisor)".to_owned(),
        });
    }
    Ok(())
}
