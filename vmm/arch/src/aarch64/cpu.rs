//! vCPUs: which features of the host's they have, and where they start.

use kvm_bindings::{
    KVM_ARM_VCPU_PMU_V3, KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_INIT, KVM_ARM_VCPU_PMU_V3_IRQ,
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_ARM_VCPU_PTRAUTH_ADDRESS, KVM_ARM_VCPU_PTRAUTH_GENERIC,
    KVM_ARM_VCPU_SVE, KVM_MP_STATE_STOPPED, kvm_device_attr, kvm_vcpu_init,
};
use std::sync::Arc;

use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;
use triarch_cpu_model::psci::Processors;
use triarch_cpu_model::{DescriptionError, Topology, TopologyError};
use triarch_hypervisor::{Firmware, HypervisorError, Vcpu, Vm};

use super::processor::VECTOR_LENGTHS;
use super::psci::Psci;
use super::{Entry, Platform, layout, processor, psci};
use crate::starts::Starts;
use crate::{CpuCount, Vcpus};

/// Addresses of guests where the host does not tell.
const DEFAULT_ADDRESS_BITS: u8 = 40;

/// KVM's numbers of registers (Linux, Documentation/virt/kvm/api.rst, 4.68): core registers of 64 bits by their index in 32-bit
/// words, and system registers by their encoding.
const CORE_REGISTER: u64 = 0x6030_0000_0010_0000;
pub(super) const X0: u64 = CORE_REGISTER;
pub(super) const PC: u64 = CORE_REGISTER | 64;
const MPIDR_EL1: u64 = 0x6030_0000_0013_c005;
/// Affinity fields of MPIDR_EL1.
const AFFINITY: u64 = 0xff_00ff_ffff;

/// Why vCPUs could not be made as asked.
#[derive(Debug, Error)]
pub enum CpuError {
    /// The topology does not fit.
    #[error("the CPU topology is invalid")]
    Topology(#[from] TopologyError),
    /// More vCPUs than the host's KVM can run.
    #[error("{asked} vCPUs were asked for, the GIC of this host's KVM allows {max}; lower --cpus max")]
    TooMany {
        /// vCPUs asked for.
        asked: u32,
        /// vCPUs the host allows.
        max: usize,
    },
    /// The tables would lie.
    #[error("KVM gave vCPU {index} the MPIDR {found:#x} instead of {expected:#x}")]
    Affinity {
        /// Index of the vCPU.
        index: u32,
        /// What it has.
        found: u64,
        /// What the tables say.
        expected: u64,
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
    pub(super) topology: Topology,
    pub(super) count: CpuCount,
    pub(super) address_bits: u8,
    pub(super) features: Features,
}

/// Optional features, all of which a guest has where the host has them.
#[derive(Clone, Copy)]
pub(super) struct Features {
    pub(super) sve: bool,
    pub(super) pauth: bool,
    pub(super) pmu: bool,
}

/// The affinity fields of vCPU `index`, which KVM derives from its number: 16 to a level-0 group, since no more get an interrupt of
/// another by one write, and 256 to the next.
pub(super) fn affinity(index: u32) -> u64 {
    u64::from(index & 0xf | (index >> 4 & 0xff) << 8 | (index >> 12 & 0xff) << 16)
}

impl CpuPlan {
    /// Plans the vCPUs of `count`, shaped by `topology` (flat when `None`).
    pub fn new(kvm: &Kvm, count: CpuCount, topology: Option<Topology>) -> Result<Self, CpuError> {
        let max = count.max;
        let allowed = kvm.get_max_vcpus().min(layout::MAX_VCPUS as usize);
        if max as usize > allowed {
            return Err(CpuError::TooMany {
                asked: max,
                max: allowed,
            });
        }
        let topology = topology.unwrap_or_else(|| Topology::flat(max as u16));
        topology.check(max)?;
        if !kvm.check_extension(Cap::ArmPsci02) {
            return Err(HypervisorError::Capability("PSCI 0.2").into());
        }
        let has = |capability| kvm.check_extension(capability);
        Ok(Self {
            topology,
            count,
            address_bits: match kvm.get_host_ipa_limit() {
                limit @ 32..=52 => limit as u8,
                _ => DEFAULT_ADDRESS_BITS,
            },
            features: Features {
                sve: has(Cap::ArmSve),
                pauth: has(Cap::ArmPtrAuthAddress) && has(Cap::ArmPtrAuthGeneric),
                pmu: has(Cap::ArmPmuV3),
            },
        })
    }

    /// Lets guest physical addresses have `bits` bits at most.
    pub fn limit_address_bits(&mut self, bits: u8) {
        self.address_bits = self.address_bits.min(bits);
    }

    /// Width of a guest physical address in bits: the host's limit, which is lower than its CPU's on some.
    pub fn address_bits(&self) -> u8 {
        self.address_bits
    }

    /// vCPUs the guest starts with.
    pub fn boot_vcpus(&self) -> u32 {
        self.count.now
    }

    /// vCPUs it can have at most.
    pub fn max_vcpus(&self) -> u32 {
        self.count.max
    }

    /// vCPUs it cannot give back, from the first on: the MADT tells that they are enabled (ACPI 6.5, 5.2.12.14). All that came
    /// while a guest ran stay removable when that guest is reset.
    pub fn fixed_vcpus(&self) -> u32 {
        self.count.boot.min(self.count.now)
    }

    /// Their shape.
    pub(super) fn topology(&self) -> Topology {
        self.topology
    }

    /// Interrupt number of the performance monitors, if the vCPUs have them.
    pub(super) fn pmu_interrupt(&self) -> Option<u32> {
        self.features.pmu.then_some(layout::interrupt::PMU)
    }

    /// The affinity fields of vCPU `index`.
    pub fn hardware_id(&self, index: u32) -> u64 {
        affinity(index)
    }

    /// What a vCPU is made with; one that is `off` waits to be started.
    pub(super) fn init(&self, target: &kvm_vcpu_init, off: bool) -> kvm_vcpu_init {
        let Features { sve, pauth, pmu } = self.features;
        let mut init = *target;
        for (bit, on) in [
            (KVM_ARM_VCPU_PSCI_0_2, true),
            (KVM_ARM_VCPU_POWER_OFF, off),
            (KVM_ARM_VCPU_SVE, sve),
            (KVM_ARM_VCPU_PTRAUTH_ADDRESS, pauth),
            (KVM_ARM_VCPU_PTRAUTH_GENERIC, pauth),
            (KVM_ARM_VCPU_PMU_V3, pmu),
        ] {
            init.features[0] |= u32::from(on) << bit;
        }
        init
    }
}

/// Makes all vCPUs the guest may ever have, since KVM takes none once the GIC works, and starts the GIC. All but the first wait to be
/// started by it; those the guest does not start with are parked, see [`psci`].
pub fn create_vcpus(vm: &Vm, plan: &CpuPlan, platform: &Platform) -> Result<Vcpus, CpuError> {
    let forwarded = psci::forward(vm)?;
    let (target, mut running) = create_all(vm, plan, platform, None, |index| {
        index > 0 && (forwarded || index < plan.count.now)
    })?;
    let first = running
        .first()
        .ok_or(HypervisorError::Capability("a vCPU to start with"))?;
    let processor = processor::of_vcpu(first, plan, plan.init(&target, false).features[0]);
    let parked = running.split_off(plan.count.now as usize);
    let firmware: Arc<dyn Firmware> = if forwarded {
        let affinities = (0..plan.count.max).map(|index| plan.hardware_id(index));
        let processors = Processors::new(affinities, plan.count.now as usize);
        Arc::new(Psci::new(processors, plan.init(&target, true)))
    } else {
        Arc::new(Starts::new(plan.count.max, plan.count.now, KVM_MP_STATE_STOPPED))
    };
    Ok(Vcpus {
        processor,
        running,
        parked,
        firmware,
    })
}

/// Makes as many as there can be and starts the GIC. Those that are `off` wait to be started. SVE has the `lengths` of vectors of another
/// host's vCPU, or all of this host's.
pub(super) fn create_all(
    vm: &Vm,
    plan: &CpuPlan,
    platform: &Platform,
    lengths: Option<&[u8]>,
    off: impl Fn(u32) -> bool,
) -> Result<(kvm_vcpu_init, Vec<Vcpu>), CpuError> {
    platform.place_redistributors(plan.count.max)?;
    let mut target = kvm_vcpu_init::default();
    vm.fd()
        .get_preferred_target(&mut target)
        .map_err(HypervisorError::kvm("tell its kind of vCPU"))?;
    let made: Result<Vec<_>, _> = (0..plan.count.max)
        .map(|index| create(vm, plan, &plan.init(&target, off(index)), lengths, index))
        .collect();
    let made = made?;
    platform.start()?;
    if plan.features.pmu {
        made.iter().try_for_each(start_pmu)?;
    }
    Ok((target, made))
}

/// There is none to be made later: all were made with the guest.
pub fn create_later(_vm: &Vm, _plan: &CpuPlan, _index: u32) -> Result<Vcpu, CpuError> {
    Err(HypervisorError::Capability("vCPUs that are made while the guest runs").into())
}

fn create(vm: &Vm, plan: &CpuPlan, init: &kvm_vcpu_init, lengths: Option<&[u8]>, index: u32) -> Result<Vcpu, CpuError> {
    let vcpu = vm.create_vcpu(u64::from(index))?;
    vcpu.fd()
        .vcpu_init(init)
        .map_err(HypervisorError::kvm("give a vCPU the host's features"))?;
    if plan.features.sve {
        if let Some(lengths) = lengths {
            vcpu.fd()
                .set_one_reg(VECTOR_LENGTHS, lengths)
                .map_err(HypervisorError::kvm("give a vCPU the vector lengths that it had"))?;
        }
        vcpu.fd()
            .vcpu_finalize(&(KVM_ARM_VCPU_SVE as i32))
            .map_err(HypervisorError::kvm("give a vCPU SVE"))?;
    }
    let (found, expected) = (get_register(&vcpu, MPIDR_EL1)? & AFFINITY, plan.hardware_id(index));
    if found != expected {
        return Err(CpuError::Affinity { index, found, expected });
    }
    Ok(vcpu)
}

/// Connects a vCPU's performance monitors to the GIC.
fn start_pmu(vcpu: &Vcpu) -> Result<(), HypervisorError> {
    let interrupt = layout::interrupt::PMU;
    for (attr, addr) in [
        (KVM_ARM_VCPU_PMU_V3_IRQ, std::ptr::from_ref(&interrupt) as u64),
        (KVM_ARM_VCPU_PMU_V3_INIT, 0),
    ] {
        let attribute = kvm_device_attr {
            flags: 0,
            group: KVM_ARM_VCPU_PMU_V3_CTRL,
            attr: u64::from(attr),
            addr,
        };
        vcpu.fd()
            .set_device_attr(&attribute)
            .map_err(HypervisorError::kvm("start the performance monitors"))?;
    }
    Ok(())
}

/// Puts the first vCPU at the kernel's entry: at EL1, interrupts masked, as KVM makes it, with the device tree in x0.
pub fn set_entry(vcpu: &Vcpu, entry: &Entry) -> Result<(), HypervisorError> {
    set_register(vcpu, X0, entry.device_tree)?;
    set_register(vcpu, PC, entry.kernel)
}

/// Reads a register of 64 bits.
pub(super) fn get_register(vcpu: &Vcpu, register: u64) -> Result<u64, HypervisorError> {
    let mut value = [0; 8];
    vcpu.fd()
        .get_one_reg(register, &mut value)
        .map_err(HypervisorError::kvm("read registers"))?;
    Ok(u64::from_le_bytes(value))
}

/// Writes a register of 64 bits.
pub(super) fn set_register(vcpu: &Vcpu, register: u64, value: u64) -> Result<(), HypervisorError> {
    vcpu.fd()
        .set_one_reg(register, &value.to_le_bytes())
        .map_err(HypervisorError::kvm("set registers"))?;
    Ok(())
}
