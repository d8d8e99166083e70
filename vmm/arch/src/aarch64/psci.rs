//! Starting and stopping vCPUs (PSCI, Arm DEN 0022), as far as KVM leaves that to the VMM.
//!
//! The tables show a guest all processors it may ever have, since their GIC interfaces are there from the start. A kernel tries to
//! start each of them and has to be refused those it does not have yet. KVM itself knows no such thing. From Linux 6.4 on it can
//! forward the calls (Documentation/virt/kvm/devices/vm.rst, 5.2), and the answer is DENIED, which kernels take as a matter of course.
//! On older hosts KVM serves them, and such a vCPU is given to it as one that runs already: the guest notes ALREADY_ON as an error
//! and goes on, instead of waiting for a processor that never comes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_ARM_VM_SMCCC_CTRL, KVM_ARM_VM_SMCCC_FILTER, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_STOPPED, kvm_device_attr,
    kvm_mp_state, kvm_smccc_filter, kvm_smccc_filter_action_KVM_SMCCC_FILTER_FWD_TO_USER, kvm_vcpu_init,
};
use triarch_cpu_model::psci::{Answer, CPU_OFF, CPU_ON_32, CPU_ON_64, Processors, Standing};
use triarch_hypervisor::{Firmware, FirmwareStateV1, HypervisorError, PsciV1, Vcpu, Vm};

use super::cpu::{PC, X0, get_register, set_register};

/// Ranges of function numbers that KVM forwards: the first, and how many.
const FORWARDED: [(u32, u32); 2] = [(CPU_OFF, CPU_ON_32 - CPU_OFF + 1), (CPU_ON_64, 1)];

/// Asks KVM to forward the calls; false when it cannot. Before the guest runs.
pub(super) fn forward(vm: &Vm) -> Result<bool, HypervisorError> {
    for (base, nr_functions) in FORWARDED {
        let filter = kvm_smccc_filter {
            base,
            nr_functions,
            action: kvm_smccc_filter_action_KVM_SMCCC_FILTER_FWD_TO_USER as u8,
            ..Default::default()
        };
        let attribute = kvm_device_attr {
            flags: 0,
            group: KVM_ARM_VM_SMCCC_CTRL,
            attr: u64::from(KVM_ARM_VM_SMCCC_FILTER),
            addr: std::ptr::from_ref(&filter) as u64,
        };
        if vm.fd().has_device_attr(&attribute).is_err() {
            return Ok(false);
        }
        // The kernel reads the filter while it is borrowed.
        vm.fd()
            .set_device_attr(&attribute)
            .map_err(HypervisorError::kvm("forward PSCI calls"))?;
    }
    Ok(true)
}

/// Serves the forwarded calls.
pub(super) struct Psci {
    processors: Mutex<Processors>,
    /// What resets a vCPU: that which made it.
    init: kvm_vcpu_init,
}

impl Psci {
    /// For vCPUs that are made with `init`.
    pub(super) fn new(processors: Processors, init: kvm_vcpu_init) -> Self {
        Self {
            processors: Mutex::new(processors),
            init,
        }
    }

    /// For vCPUs with these affinity fields, of a guest that was saved.
    pub(super) fn restored(saved: impl IntoIterator<Item = (u64, PsciV1)>, init: kvm_vcpu_init) -> Self {
        let standing = |(affinity, saved): (u64, PsciV1)| {
            let start = saved.entry.map(|entry| (entry, saved.context.unwrap_or(0)));
            let PsciV1 {
                enabled, ran, told, on, ..
            } = saved;
            let standing = Standing {
                enabled,
                ran,
                told,
                on,
                start,
            };
            (affinity, standing)
        };
        Self::new(Processors::restored(saved.into_iter().map(standing)), init)
    }

    fn processors(&self) -> MutexGuard<'_, Processors> {
        self.processors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells KVM, which answers AFFINITY_INFO, whether the vCPU runs.
fn set_state(vcpu: &Vcpu, mp_state: u32) -> Result<(), HypervisorError> {
    vcpu.fd()
        .set_mp_state(kvm_mp_state { mp_state })
        .map_err(HypervisorError::kvm("start or stop a vCPU"))
}

impl Firmware for Psci {
    fn call(&self, index: usize, caller: &Vcpu, function: u64) -> Result<bool, HypervisorError> {
        let mut arguments = [0; 3];
        for (argument, number) in arguments.iter_mut().zip(1..) {
            // One X register is two of the words that KVM counts.
            *argument = get_register(caller, X0 + 2 * number)?;
        }
        let answer = self.processors().call(index, function as u32, arguments);
        match answer {
            Answer::Value(value) => set_register(caller, X0, value as u64)?,
            Answer::Stopped => set_state(caller, KVM_MP_STATE_STOPPED)?,
        }
        Ok(true)
    }

    fn runs(&self, index: usize) -> bool {
        self.processors().runs(index)
    }

    fn prepare(&self, index: usize, vcpu: &Vcpu) -> Result<(), HypervisorError> {
        let Some(start) = self.processors().take_start(index) else {
            return Ok(());
        };
        if start.again {
            vcpu.fd()
                .vcpu_init(&self.init)
                .map_err(HypervisorError::kvm("reset a vCPU"))?;
        }
        set_register(vcpu, PC, start.entry)?;
        set_register(vcpu, X0, start.context)?;
        set_state(vcpu, KVM_MP_STATE_RUNNABLE)
    }

    /// What runs was started, and that is known before it does.
    fn waits(&self, _index: usize) -> bool {
        false
    }

    fn started(&self, index: usize, _vcpu: &Vcpu) -> bool {
        self.processors().take_first_start(index)
    }

    /// KVM, which answers AFFINITY_INFO, has it stopped; its registers are reset when it is started again.
    fn rest(&self, index: usize, vcpu: &Vcpu) -> Result<(), HypervisorError> {
        match self.processors().is_enabled(index) {
            true => Ok(()),
            false => set_state(vcpu, KVM_MP_STATE_STOPPED),
        }
    }

    fn rested(&self, _index: usize) -> bool {
        true
    }

    fn plug(&self, index: usize) {
        self.processors().enable(index);
    }

    fn unplug(&self, index: usize) {
        self.processors().disable(index);
    }

    fn save(&self) -> FirmwareStateV1 {
        let saved = |standing: Standing| PsciV1 {
            enabled: standing.enabled,
            ran: standing.ran,
            told: standing.told,
            on: standing.on,
            entry: standing.start.map(|(entry, _)| entry),
            context: standing.start.map(|(_, context)| context),
        };
        FirmwareStateV1::Psci(self.processors().standings().map(saved).collect())
    }
}
