//! Model-specific registers.

use std::collections::BTreeMap;

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::Kvm;
use triarch_cpu_model::features::Register;
use triarch_hypervisor::{HypervisorError, Vcpu};

use super::NumberedV1;
use crate::StateError;

pub(super) const TSC: u32 = 0x10;
pub(super) const TSC_DEADLINE: u32 = 0x6e0;
/// IA32_APIC_BASE, which is among the special registers and has to be set before the local APIC.
const APIC_BASE: u32 = 0x1b;
/// HV_X64_MSR_TIME_REF_COUNT and HV_X64_MSR_VP_RUNTIME, which show KVM's clock and how long the vCPU's thread has run. Guests are not
/// told of them.
const REFERENCE_TIME: u32 = 0x4000_0020;
const RUNTIME: u32 = 0x4000_0010;
/// IA32_EFER, which is among the special registers.
const EFER: u32 = 0xc000_0080;
/// IA32_MCG_CAP: how many banks of machine-check registers there are.
const MCG_CAP: u32 = 0x179;
/// The first register of the first bank: control, status, address and more of it, then the next bank (SDM volume 3, 16.3.2).
const MACHINE_CHECKS: u32 = 0x400;
/// Banks KVM knows at most.
const MAX_BANKS: u32 = 32;

/// MTRRs, which KVM keeps and does not list: variable ranges, fixed ranges, what holds elsewhere (SDM volume 3, 12.11).
const MEMORY_TYPES: [u32; 28] = [
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d, 0x20e, 0x20f,
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x2ff,
];

/// Registers that tell of the host at this moment, which a guest has to expect to change: the revision of its microcode, its speed.
const OF_THE_HOST: [u32; 2] = [0x8b, 0x198];

/// More registers than any CPU has.
const MAX: usize = 4096;

fn entries(list: &[NumberedV1]) -> Result<Msrs, HypervisorError> {
    let entry = |msr: &NumberedV1| kvm_msr_entry {
        index: msr.index,
        data: msr.value,
        ..Default::default()
    };
    let list: Vec<_> = list.iter().map(entry).collect();
    Msrs::from_entries(&list).map_err(|_| HypervisorError::Capability("room for MSRs"))
}

/// Reads the registers `indexes` in as few calls as there can be. One that the vCPU does not have is left out.
pub(in crate::x86_64) fn read(vcpu: &Vcpu, indexes: &[u32]) -> Result<Vec<NumberedV1>, HypervisorError> {
    read_by(indexes, |batch| {
        vcpu.fd().get_msrs(batch).map_err(HypervisorError::kvm("read MSRs"))
    })
}

/// The most that KVM offers in those of `indexes` that are features of its own.
pub(in crate::x86_64) fn offered(kvm: &Kvm, indexes: &[u32]) -> Result<Vec<NumberedV1>, HypervisorError> {
    // Kernels before 4.17 cannot be asked.
    read_by(indexes, |batch| Ok(kvm.get_msrs(batch).unwrap_or(0)))
}

fn read_by(
    indexes: &[u32],
    mut get: impl FnMut(&mut Msrs) -> Result<usize, HypervisorError>,
) -> Result<Vec<NumberedV1>, HypervisorError> {
    let mut read = Vec::with_capacity(indexes.len());
    let mut rest = indexes;
    while !rest.is_empty() {
        let asked = rest.get(..KVM_MAX_MSR_ENTRIES).unwrap_or(rest);
        let blank = |index: &u32| NumberedV1 {
            index: *index,
            value: 0,
        };
        let mut batch = entries(&asked.iter().map(blank).collect::<Vec<_>>())?;
        let count = get(&mut batch)?;
        let known = batch.as_slice().iter().take(count);
        read.extend(known.map(|entry| NumberedV1 {
            index: entry.index,
            value: entry.data,
        }));
        // KVM stops at one it cannot read.
        let done = if count < asked.len() { count + 1 } else { count };
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(read)
}

/// Reads one register; `None` if the vCPU does not have it.
pub(super) fn read_one(vcpu: &Vcpu, index: u32) -> Result<Option<u64>, HypervisorError> {
    Ok(read(vcpu, &[index])?.first().map(|msr| msr.value))
}

/// Sets one register; false if KVM refuses it.
pub(super) fn write_one(vcpu: &Vcpu, index: u32, value: u64) -> Result<bool, HypervisorError> {
    let count = vcpu.fd().set_msrs(&entries(&[NumberedV1 { index, value }])?);
    Ok(count.map_err(HypervisorError::kvm("set MSRs"))? == 1)
}

/// Everything a vCPU has of those `listed` by KVM and those it does not list, but time.
pub(super) fn save(vcpu: &Vcpu, listed: &[u32]) -> Result<Vec<NumberedV1>, HypervisorError> {
    let elsewhere = [TSC, TSC_DEADLINE, REFERENCE_TIME, RUNTIME, APIC_BASE, EFER];
    let wanted: Vec<u32> = listed
        .iter()
        .copied()
        .filter(|index| !elsewhere.contains(index))
        .chain(MEMORY_TYPES.into_iter().filter(|index| !listed.contains(index)))
        .collect();
    let mut saved = read(vcpu, &wanted)?;
    // A bank that never reported anything is all zeros, also in a new vCPU.
    let banks = read_one(vcpu, MCG_CAP)?
        .map_or(0, |cap| cap as u32 & 0xff)
        .min(MAX_BANKS);
    let machine_checks: Vec<u32> = (MACHINE_CHECKS..MACHINE_CHECKS + 4 * banks).collect();
    saved.extend(read(vcpu, &machine_checks)?.into_iter().filter(|msr| msr.value != 0));
    Ok(saved)
}

/// Sets the registers that are not as they were saved: those that cannot be set are few then. One that KVM refuses is an error unless
/// it tells of the host.
pub(super) fn restore(vcpu: &Vcpu, saved: &[NumberedV1]) -> Result<(), StateError> {
    if saved.len() > MAX {
        return Err(StateError::damaged("a vCPU", format!("it has {} MSRs", saved.len())));
    }
    let indexes: Vec<u32> = saved.iter().map(|msr| msr.index).collect();
    let here: BTreeMap<u32, u64> = read(vcpu, &indexes)?.iter().map(|msr| (msr.index, msr.value)).collect();
    let changed = saved.iter().filter(|msr| here.get(&msr.index) != Some(&msr.value));
    let changed: Vec<NumberedV1> = changed.copied().collect();
    let mut rest = changed.as_slice();
    while !rest.is_empty() {
        let (batch, after) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let count = vcpu.fd().set_msrs(&entries(batch)?);
        let count = count.map_err(HypervisorError::kvm("set MSRs"))?;
        let Some(refused) = batch.get(count) else {
            rest = after;
            continue;
        };
        if !OF_THE_HOST.contains(&refused.index) {
            return Err(refusal(refused, here.get(&refused.index).copied()));
        }
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(())
}

fn refusal(msr: &NumberedV1, here: Option<u64>) -> StateError {
    let register = Register::Msr(msr.index);
    let table = triarch_cpu_model::features::x86();
    // The names of what the guest has and this host has not.
    let differs = msr.value ^ here.unwrap_or(0);
    let named = table.fields(register, None).filter(|field| field.mask() & differs != 0);
    let names: BTreeMap<_, _> = named.map(|field| (field.low, field.name_in(register))).collect();
    let names: Vec<_> = names.into_values().collect();
    StateError::Register {
        name: match names.as_slice() {
            [] => register.to_string(),
            names => format!("{register} ({})", names.join(", ")),
        },
        saved: format!("{:#x}", msr.value),
        here: match here {
            Some(value) => format!("has {value:#x} and does not let it be set"),
            None => "does not know it".to_owned(),
        },
    }
}
