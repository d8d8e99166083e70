//! The ITS (IHI 0069, 12.18; Linux, devices/arm-vgic-its.rst). What it knows of devices and their messages is in tables in guest memory,
//! which KVM writes when the guest is saved.

use kvm_bindings::{
    KVM_DEV_ARM_ITS_RESTORE_TABLES, KVM_DEV_ARM_ITS_SAVE_TABLES, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
};
use kvm_ioctls::DeviceFd;
use triarch_hypervisor::HypervisorError;

use super::ItsV1;
use super::attribute::Group;
use crate::StateError;

const CONTROL: u64 = 0;
const IMPLEMENTATION: u64 = 4;
const COMMANDS: u64 = 0x80;
const COMMANDS_WRITTEN: u64 = 0x88;
const COMMANDS_READ: u64 = 0x90;
const TABLES: u64 = 0x100;

fn registers<'a>(its: &'a DeviceFd, what: &'static str) -> Group<'a> {
    Group {
        device: its,
        number: KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
        what,
    }
}

fn tables<'a>(its: &'a DeviceFd, what: &'static str) -> Group<'a> {
    Group {
        device: its,
        number: KVM_DEV_ARM_VGIC_GRP_CTRL,
        what,
    }
}

/// Writes the tables and reads the registers.
pub(super) fn save(its: &DeviceFd) -> Result<ItsV1, HypervisorError> {
    tables(its, "write the ITS's tables").command(KVM_DEV_ARM_ITS_SAVE_TABLES)?;
    let registers = registers(its, "read the ITS");
    let mut tables = [0; 8];
    for (table, at) in tables.iter_mut().zip((TABLES..).step_by(8)) {
        *table = registers.get(at)?;
    }
    Ok(ItsV1 {
        control: registers.get(CONTROL)?,
        implementation: registers.get(IMPLEMENTATION)?,
        commands: registers.get(COMMANDS)?,
        commands_read: registers.get(COMMANDS_READ)?,
        commands_written: registers.get(COMMANDS_WRITTEN)?,
        tables,
    })
}

/// Sets the registers and has KVM read the tables.
pub(super) fn restore(its: &DeviceFd, saved: &ItsV1) -> Result<(), StateError> {
    let registers = registers(its, "set the ITS");
    // Not what is as it was: of an address that was never set, KVM makes one with attributes.
    let set = |at: u64, value: u64| match registers.get::<u64>(at)? == value {
        true => Ok(()),
        false => registers.set(at, value),
    };
    set(IMPLEMENTATION, saved.implementation)?;
    // Where the commands are sets back how far they were read.
    set(COMMANDS, saved.commands)?;
    set(COMMANDS_READ, saved.commands_read)?;
    set(COMMANDS_WRITTEN, saved.commands_written)?;
    for (table, at) in saved.tables.iter().zip((TABLES..).step_by(8)) {
        set(at, *table)?;
    }
    tables(its, "read the ITS's tables")
        .command(KVM_DEV_ARM_ITS_RESTORE_TABLES)
        .map_err(|error| {
            use std::error::Error;
            let cause = error.source().map(ToString::to_string).unwrap_or_default();
            StateError::damaged(
                "the ITS",
                format!("KVM cannot read its tables in guest memory ({cause})"),
            )
        })?;
    // On from here it translates.
    Ok(set(CONTROL, saved.control)?)
}
