//! The GIC: distributor, redistributors, CPU interfaces (IHI 0069, 12.8 to 12.11; Linux, devices/arm-vgic-v3.rst).

use kvm_bindings::{
    KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO,
    KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT, KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT,
    VGIC_LEVEL_INFO_LINE_LEVEL,
};
use kvm_ioctls::DeviceFd;
use triarch_hypervisor::HypervisorError;

use super::attribute::Group;
use super::{DistributorV1, GicCpuV1, InterfaceV1, RedistributorV1};
use crate::StateError;
use crate::aarch64::cpu::affinity;
use crate::aarch64::layout::interrupt::FIRST_SHARED;
use crate::aarch64::platform::INTERRUPTS;

/// Registers of a distributor, and with [`PRIVATE`] of a redistributor.
const CONTROL: u64 = 0;
const IMPLEMENTATION: u64 = 8;
const GROUPS: u64 = 0x80;
const SET_ENABLED: u64 = 0x100;
const CLEAR_ENABLED: u64 = 0x180;
const SET_PENDING: u64 = 0x200;
const SET_ACTIVE: u64 = 0x300;
const CLEAR_ACTIVE: u64 = 0x380;
const PRIORITIES: u64 = 0x400;
const CONFIGURATION: u64 = 0xc00;
const ROUTES: u64 = 0x6000;
/// Registers of a redistributor.
const PROPERTIES: u64 = 0x70;
const PENDING_TABLE: u64 = 0x78;
const PRIVATE: u64 = 0x1_0000;

/// Words of private priorities: a byte for each of 32.
const PRIVATE_PRIORITIES: u64 = 8;
/// Shared interrupts.
const SHARED: u64 = (INTERRUPTS - FIRST_SHARED) as u64;

/// Encodings of the CPU interface's registers.
const fn icc(crn: u64, crm: u64, op2: u64) -> u64 {
    3 << 14 | crn << 7 | crm << 3 | op2
}
const ICC_PMR: u64 = icc(4, 6, 0);
const ICC_BPR: [u64; 2] = [icc(12, 8, 3), icc(12, 12, 3)];
const ICC_AP0R: u64 = icc(12, 8, 4);
const ICC_AP1R: u64 = icc(12, 9, 0);
const ICC_CTLR: u64 = icc(12, 12, 4);
const ICC_SRE: u64 = icc(12, 12, 5);
const ICC_IGRPEN: [u64; 2] = [icc(12, 12, 6), icc(12, 12, 7)];

/// Word `n` of registers with `bits` for each interrupt, from the first shared one on.
fn shared(base: u64, bits: u64) -> impl Iterator<Item = u64> + Clone {
    let first = u64::from(FIRST_SHARED) * bits / 8;
    (0..SHARED * bits / 32).map(move |word| base + first + 4 * word)
}

/// A list of registers as long as it has to be.
fn check(list: usize, offsets: impl Iterator<Item = u64>) -> Result<(), StateError> {
    match offsets.count() {
        wanted if wanted == list => Ok(()),
        wanted => {
            let problem = format!("a list of its registers has {list} of {wanted}");
            Err(StateError::damaged("the interrupt controller", problem))
        }
    }
}

fn group<'a>(device: &'a DeviceFd, number: u32, what: &'static str) -> Group<'a> {
    Group { device, number, what }
}

/// Two registers of 32 bits.
fn get_long(group: &Group<'_>, at: u64) -> Result<u64, HypervisorError> {
    let (low, high) = (group.get::<u32>(at)?, group.get::<u32>(at + 4)?);
    Ok(u64::from(high) << 32 | u64::from(low))
}

/// Sets two registers of 32 bits, unless they are as they were: of addresses that were never set, KVM makes some with attributes.
fn set_long(group: &Group<'_>, at: u64, value: u64) -> Result<(), HypervisorError> {
    if get_long(group, at)? == value {
        return Ok(());
    }
    group.set(at, value as u32)?;
    group.set(at + 4, (value >> 32) as u32)
}

fn set_all(group: &Group<'_>, offsets: impl Iterator<Item = u64> + Clone, values: &[u32]) -> Result<(), StateError> {
    check(values.len(), offsets.clone())?;
    for (offset, value) in offsets.zip(values) {
        group.set(offset, *value)?;
    }
    Ok(())
}

/// Levels of the 32 lines from `first` on.
fn levels(first: u64) -> u64 {
    u64::from(VGIC_LEVEL_INFO_LINE_LEVEL) << KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT | first
}

fn lines() -> impl Iterator<Item = u64> + Clone {
    (u64::from(FIRST_SHARED)..u64::from(INTERRUPTS)).step_by(32).map(levels)
}

pub(super) fn save_distributor(gic: &DeviceFd) -> Result<DistributorV1, HypervisorError> {
    let what = "read the GIC's distributor";
    let registers = group(gic, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, what);
    let words = |base, bits| {
        shared(base, bits)
            .map(|at| registers.get(at))
            .collect::<Result<Vec<u32>, _>>()
    };
    let level_info = group(gic, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, what);
    let numbers = u64::from(FIRST_SHARED)..u64::from(INTERRUPTS);
    Ok(DistributorV1 {
        control: registers.get(CONTROL)?,
        implementation: registers.get(IMPLEMENTATION)?,
        groups: words(GROUPS, 1)?,
        priorities: words(PRIORITIES, 8)?,
        configuration: words(CONFIGURATION, 2)?,
        routes: numbers
            .map(|number| get_long(&registers, ROUTES + 8 * number))
            .collect::<Result<_, _>>()?,
        enabled: words(SET_ENABLED, 1)?,
        pending: words(SET_PENDING, 1)?,
        active: words(SET_ACTIVE, 1)?,
        lines: lines().map(|at| level_info.get(at)).collect::<Result<_, _>>()?,
    })
}

pub(super) fn restore_distributor(gic: &DeviceFd, saved: &DistributorV1) -> Result<(), StateError> {
    let what = "set the GIC's distributor";
    let registers = group(gic, KVM_DEV_ARM_VGIC_GRP_DIST_REGS, what);
    let none = vec![u32::MAX; shared(CLEAR_ENABLED, 1).count()];
    // How KVM is to understand what follows.
    if registers.get::<u32>(IMPLEMENTATION)? != saved.implementation {
        registers.set(IMPLEMENTATION, saved.implementation)?;
    }
    registers.set(CONTROL, saved.control)?;
    set_all(&registers, shared(CLEAR_ENABLED, 1), &none)?;
    set_all(&registers, shared(GROUPS, 1), &saved.groups)?;
    set_all(&registers, shared(PRIORITIES, 8), &saved.priorities)?;
    set_all(&registers, shared(CONFIGURATION, 2), &saved.configuration)?;
    let routes = (u64::from(FIRST_SHARED)..u64::from(INTERRUPTS)).map(|number| ROUTES + 8 * number);
    check(saved.routes.len(), routes.clone())?;
    for (at, route) in routes.zip(&saved.routes) {
        set_long(&registers, at, *route)?;
    }
    let level_info = group(gic, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, what);
    set_all(&level_info, lines(), &saved.lines)?;
    set_all(&registers, shared(SET_PENDING, 1), &saved.pending)?;
    set_all(&registers, shared(CLEAR_ACTIVE, 1), &none)?;
    set_all(&registers, shared(SET_ACTIVE, 1), &saved.active)?;
    set_all(&registers, shared(SET_ENABLED, 1), &saved.enabled)
}

/// Attributes of vCPU `index`.
fn of_cpu(index: u32) -> u64 {
    affinity(index) << KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT
}

/// How many registers there are for active priorities, by the number of priorities that ICC_CTLR_EL1 tells (IHI 0069, 12.2.5).
fn active_registers(control: u64) -> u64 {
    match (control >> 8 & 7) + 1 {
        0..=5 => 1,
        6 => 2,
        _ => 4,
    }
}

fn private_priorities(cpu: u64) -> impl Iterator<Item = u64> + Clone {
    (0..PRIVATE_PRIORITIES).map(move |word| cpu | (PRIVATE + PRIORITIES + 4 * word))
}

pub(super) fn save_cpu(gic: &DeviceFd, index: u32) -> Result<GicCpuV1, HypervisorError> {
    let what = "read what of the GIC a vCPU has";
    let cpu = of_cpu(index);
    let registers = group(gic, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, what);
    let level_info = group(gic, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, what);
    let private = |at: u64| registers.get::<u32>(cpu | (PRIVATE + at));
    let redistributor = RedistributorV1 {
        control: registers.get(cpu | CONTROL)?,
        properties: get_long(&registers, cpu | PROPERTIES)?,
        pending_table: get_long(&registers, cpu | PENDING_TABLE)?,
        group: private(GROUPS)?,
        priorities: private_priorities(cpu)
            .map(|at| registers.get(at))
            .collect::<Result<_, _>>()?,
        configuration: private(CONFIGURATION + 4)?,
        enabled: private(SET_ENABLED)?,
        pending: private(SET_PENDING)?,
        active: private(SET_ACTIVE)?,
        lines: level_info.get(cpu | levels(0))?,
    };
    let registers = group(gic, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, what);
    let get = |register: u64| registers.get::<u64>(cpu | register);
    let control = get(ICC_CTLR)?;
    let active = |first: u64| {
        (0..active_registers(control))
            .map(|n| get(first + n))
            .collect::<Result<Vec<_>, _>>()
    };
    let pair = |[first, second]: [u64; 2]| Ok::<_, HypervisorError>([get(first)?, get(second)?]);
    let interface = InterfaceV1 {
        system_registers: get(ICC_SRE)?,
        control,
        group_enabled: pair(ICC_IGRPEN)?,
        priority_mask: get(ICC_PMR)?,
        binary_point: pair(ICC_BPR)?,
        active0: active(ICC_AP0R)?,
        active1: active(ICC_AP1R)?,
    };
    Ok(GicCpuV1 {
        redistributor,
        interface,
    })
}

pub(super) fn restore_cpu(gic: &DeviceFd, index: u32, saved: &GicCpuV1) -> Result<(), StateError> {
    let what = "set what of the GIC a vCPU has";
    let cpu = of_cpu(index);
    let registers = group(gic, KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, what);
    let level_info = group(gic, KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, what);
    let GicCpuV1 {
        redistributor: theirs,
        interface,
    } = saved;
    let private = |at: u64, value: u32| registers.set(cpu | (PRIVATE + at), value);
    // Where the tables are, before they are used.
    set_long(&registers, cpu | PROPERTIES, theirs.properties)?;
    set_long(&registers, cpu | PENDING_TABLE, theirs.pending_table)?;
    registers.set(cpu | CONTROL, theirs.control)?;
    private(CLEAR_ENABLED, u32::MAX)?;
    private(GROUPS, theirs.group)?;
    set_all(&registers, private_priorities(cpu), &theirs.priorities)?;
    private(CONFIGURATION + 4, theirs.configuration)?;
    level_info.set(cpu | levels(0), theirs.lines)?;
    private(SET_PENDING, theirs.pending)?;
    private(CLEAR_ACTIVE, u32::MAX)?;
    private(SET_ACTIVE, theirs.active)?;
    private(SET_ENABLED, theirs.enabled)?;

    let registers = group(gic, KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, what);
    let set = |register: u64, value: u64| registers.set(cpu | register, value);
    set(ICC_SRE, interface.system_registers)?;
    let here: u64 = registers.get(cpu | ICC_CTLR)?;
    if here != interface.control {
        set(ICC_CTLR, interface.control).map_err(|_| StateError::Register {
            name: "ICC_CTLR_EL1".to_owned(),
            saved: format!("{:#x}", interface.control),
            here: format!("has {here:#x} and does not let it be set"),
        })?;
    }
    let wanted = active_registers(interface.control);
    for (first, values) in [(ICC_AP0R, &interface.active0), (ICC_AP1R, &interface.active1)] {
        check(values.len(), 0..wanted)?;
        for (register, value) in (first..).zip(values) {
            set(register, *value)?;
        }
    }
    set(ICC_PMR, interface.priority_mask)?;
    for at in 0..2 {
        set(ICC_BPR[at], interface.binary_point[at])?;
        set(ICC_IGRPEN[at], interface.group_enabled[at])?;
    }
    Ok(())
}
