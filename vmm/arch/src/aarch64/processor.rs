//! What CPU a guest has, and what this host offers, as data.

use std::arch::asm;
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;

use kvm_bindings::{RegList, reg_mask_range};
use kvm_ioctls::Kvm;
use triarch_cpu_model::{Arm64, GuestProcessor, Host, HostProcessor, Processor};
use triarch_hypervisor::{HypervisorError, Vcpu, Vm};

use super::cpu::{CpuError, CpuPlan, create_vcpus};
use super::platform::Platform;
use super::state::{CpuPlanStateV1, PlatformStateV1, VcpuStateV1};
use crate::common::kernel_release;
use crate::common::state::no_vcpus;
use crate::{CpuCount, StateError};

/// Registers that KVM can list at most.
pub(super) const MAX_REGISTERS: usize = 500;
/// The lengths of a vCPU's SVE vectors: a bit for each multiple of 128 bits (KVM_REG_ARM64_SVE_VLS).
pub(super) const VECTOR_LENGTHS: u64 = 0x6060_0000_0015_ffff;
/// Steps of 128 bits up to the longest vector there is.
const MAX_STEPS: u16 = 16;
/// KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES, since Linux 6.7.
const CAP_REGISTER_MASKS: u64 = 230;
/// KVM_ARM_GET_REG_WRITABLE_MASKS.
const GET_REGISTER_MASKS: libc::Ioctl = 0x8040_aeb6_u32 as libc::Ioctl;
/// Its range of registers that tell features: op1 0, 1 and 3, CRm 0 to 7, op2 0 to 7.
const MASKS: usize = 3 * 8 * 8;

/// Kinds of registers, by bits 16 to 31 of their numbers (Linux, Documentation/virt/kvm/api.rst, 4.68).
const DEMULTIPLEXED: u16 = 0x0011;
const SYSTEM: u16 = 0x0013;
const FIRMWARE: u16 = 0x0014;
const FIRMWARE_FEATURES: u16 = 0x0016;

/// The CPU that `vcpu` was made with from `plan`, with `init` as its features.
pub(super) fn of_vcpu(vcpu: &Vcpu, plan: &CpuPlan, init: u32) -> Result<GuestProcessor, CpuError> {
    let mut list = RegList::new(MAX_REGISTERS).map_err(|_| HypervisorError::Capability("room for all registers"))?;
    vcpu.fd()
        .get_reg_list(&mut list)
        .map_err(HypervisorError::kvm("list registers"))?;
    let mut registers = BTreeMap::new();
    let mut vector_lengths = Vec::new();
    for number in list.as_slice() {
        if *number == VECTOR_LENGTHS {
            vector_lengths = lengths(&read::<64>(vcpu, *number)?);
        } else if tells(*number) {
            // Those of 32 bits are the lower half of it.
            let bytes: [u8; 8] = read(vcpu, *number)?;
            registers.insert(*number as u32, u64::from_le_bytes(bytes));
        }
    }
    Ok(GuestProcessor::new(Processor::Arm64(Arm64 {
        registers,
        init,
        vector_lengths,
        counter_hz: counter_hz(),
        address_bits: plan.address_bits(),
    }))?)
}

/// Whether a register tells what the CPU can do.
fn tells(number: u64) -> bool {
    match (number >> 16) as u16 {
        DEMULTIPLEXED | FIRMWARE | FIRMWARE_FEATURES => true,
        // op0 3, op1 0, 1 or 3, CRn 0, CRm 0 to 7.
        SYSTEM => number as u16 >> 14 == 3 && matches!(number >> 11 & 7, 0 | 1 | 3) && number >> 6 & 0x1f == 0,
        _ => false,
    }
}

/// Reads a register of `N` bytes or less.
fn read<const N: usize>(vcpu: &Vcpu, number: u64) -> Result<[u8; N], HypervisorError> {
    let mut bytes = [0; N];
    let size = 1_usize << (number >> 52 & 0xf);
    let value = bytes
        .get_mut(..size)
        .ok_or(HypervisorError::Capability("registers of the sizes it says"))?;
    vcpu.fd()
        .get_one_reg(number, value)
        .map_err(HypervisorError::kvm("read registers"))?;
    Ok(bytes)
}

/// The lengths of vectors in bits: bit n stands for n + 1 steps.
fn lengths(bitmap: &[u8]) -> Vec<u16> {
    let has = |step: &u16| {
        bitmap
            .get(usize::from(*step / 8))
            .is_some_and(|byte| byte >> (step % 8) & 1 == 1)
    };
    (0..MAX_STEPS).filter(has).map(|step| (step + 1) * 128).collect()
}

/// Frequency of the counter, the host's and its guests'.
pub(super) fn counter_hz() -> u64 {
    let hz: u64;
    // SAFETY: it reads a register that Linux lets user space read, and does nothing else.
    unsafe { asm!("mrs {}, cntfrq_el0", out(reg) hz, options(nomem, nostack, preserves_flags)) };
    hz
}

/// What this host offers to guests: the CPU of a guest that gets all of it, and what can be set to less.
pub fn host_processor(kvm: &Kvm) -> Result<HostProcessor, CpuError> {
    let plan = CpuPlan::new(kvm, CpuCount::ONE, None)?;
    let vm = Vm::new(kvm)?;
    let platform = Platform::new(&vm)?;
    let made = create_vcpus(&vm, &plan, &platform)?;
    let guest = made.processor?;
    let Processor::Arm64(offered) = guest.processor() else {
        return Err(HypervisorError::Capability("registers of its own architecture").into());
    };
    Ok(HostProcessor::new(Host {
        processor: guest.processor().clone(),
        kernel: kernel_release(),
        tsc_scaling: false,
        writable: writable(&vm, offered)?,
    })?)
}

/// The CPU of a guest that was saved, as its first vCPU tells: to be compared with what a host offers.
pub fn saved_processor(
    cpus: &CpuPlanStateV1,
    vcpus: &[VcpuStateV1],
    platform: &PlatformStateV1,
) -> Result<GuestProcessor, StateError> {
    let first = vcpus.first().ok_or_else(no_vcpus)?;
    let mut registers = BTreeMap::new();
    let mut vector_lengths = Vec::new();
    for register in &first.registers {
        let bytes = register.value.0.as_slice();
        if register.id == VECTOR_LENGTHS {
            vector_lengths = lengths(bytes);
        } else if tells(register.id) {
            let mut value = [0; 8];
            value.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            registers.insert(register.id as u32, u64::from_le_bytes(value));
        }
    }
    let processor = Processor::Arm64(Arm64 {
        registers,
        init: first.features,
        vector_lengths,
        counter_hz: platform.clock.counter_hz,
        address_bits: cpus.address_bits,
    });
    GuestProcessor::new(processor).map_err(|error| StateError::damaged("a vCPU", error))
}

/// The bits of registers that KVM lets be set. Kernels that do not tell let none be set, or not all there are.
fn writable(vm: &Vm, offered: &Arm64) -> Result<BTreeMap<u32, u64>, HypervisorError> {
    if vm.fd().check_extension_raw(CAP_REGISTER_MASKS as libc::c_ulong) & 1 == 0 {
        return Ok(BTreeMap::new());
    }
    let mut masks = [0_u64; MASKS];
    let range = reg_mask_range {
        addr: masks.as_mut_ptr() as u64,
        range: 0,
        reserved: [0; 13],
    };
    // SAFETY: the kernel writes MASKS numbers to `addr`, where as many are, and keeps no pointer.
    let result = unsafe { libc::ioctl(vm.fd().as_raw_fd(), GET_REGISTER_MASKS, &raw const range) };
    if result != 0 {
        return Err(HypervisorError::Kvm {
            what: "tell which registers can be set",
            source: std::io::Error::last_os_error(),
        });
    }
    let mut writable = BTreeMap::new();
    for (index, mask) in (0_u32..).zip(masks).filter(|(_, mask)| *mask != 0) {
        let op1 = [0, 1, 3].get(index as usize >> 6).copied().unwrap_or(0);
        writable.insert(u32::from(SYSTEM) << 16 | 3 << 14 | op1 << 11 | index & 0x3f, mask);
    }
    // These kernels take any shape of a cache, and have no mask for it.
    let caches = offered
        .registers
        .keys()
        .filter(|number| **number >> 16 == u32::from(DEMULTIPLEXED));
    writable.extend(caches.map(|number| (*number, u64::MAX)));
    Ok(writable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_that_tell_features_are_known_by_their_numbers() {
        let system = |op0: u64, op1: u64, crn: u64, crm: u64, op2: u64| {
            0x6030_0000_0013_0000 | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
        };
        for number in [
            system(3, 0, 0, 0, 0),
            system(3, 0, 0, 4, 1),
            system(3, 0, 0, 7, 7),
            system(3, 1, 0, 0, 1),
            system(3, 3, 0, 0, 1),
            0x6020_0000_0011_0002,
            0x6030_0000_0014_0001,
            0x6030_0000_0016_0002,
        ] {
            assert!(tells(number), "{number:#x}");
        }
        for number in [
            system(3, 0, 1, 0, 0),
            system(3, 0, 0, 8, 0),
            system(3, 2, 0, 0, 0),
            system(3, 3, 14, 0, 1),
            system(2, 0, 0, 0, 4),
            0x6030_0000_0010_0000,
            VECTOR_LENGTHS,
        ] {
            assert!(!tells(number), "{number:#x}");
        }
    }

    #[test]
    fn a_bit_is_a_step_of_128_bits() {
        assert_eq!(lengths(&[0b1011, 0x80]), [128, 256, 512, 2048]);
        assert!(lengths(&[0; 64]).is_empty());
    }
}
