//! FADT (ACPI 5.2.9).

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::config::AcpiConfig;
use super::table::{CREATOR_ID, CREATOR_REVISION, OEM_ID, OEM_REVISION, OEM_TABLE_ID};

/// IA-PC boot flags (table 5.11): what a PC usually has and this one has not.
const VGA_NOT_PRESENT: u16 = 1 << 2;
const NO_ASPM: u16 = 1 << 4;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;
/// ARM boot flags (table 5.12).
const PSCI_COMPLIANT: u16 = 1 << 0;
const PSCI_USES_HVC: u16 = 1 << 1;
/// Where the RTC counts centuries, as on every PC.
const CENTURY_INDEX: u8 = 0x32;

pub(super) fn fadt(config: &AcpiConfig, dsdt: u64) -> Vec<u8> {
    let pm = &config.pm;
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        // Both buttons, if there, are devices of the DSDT and not fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::Headless);
    fadt.creator_id = CREATOR_ID;
    fadt.creator_revision = CREATOR_REVISION;
    fadt.sleep_control_reg = io_byte(pm.sleep_control);
    fadt.sleep_status_reg = io_byte(pm.sleep_status);
    if let Some(port) = pm.pm_timer {
        fadt.pm_tmr_blk = u32::from(port).into();
        fadt.pm_tmr_len = 4;
        fadt.x_pm_tmr_blk = GAS::new(AddressSpace::SystemIo, 32, 0, AccessSize::DwordAccess, port.into());
        fadt = fadt.flag(Flags::TmrValExt);
    }
    if let Some(reset) = pm.reset {
        fadt.reset_reg = io_byte(reset.port);
        fadt.reset_value = reset.value;
        fadt = fadt.flag(Flags::ResetRegSup);
    }
    let mut boot_flags = VGA_NOT_PRESENT | NO_ASPM;
    match config.rtc {
        Some(_) => fadt.century = CENTURY_INDEX,
        None => boot_flags |= CMOS_RTC_NOT_PRESENT,
    }
    fadt.iapc_boot_arch = boot_flags.into();
    let mut bytes = Vec::new();
    fadt.finalize().to_aml_bytes(&mut bytes);
    bytes
}

/// No registers at all: power is PSCI's, called by HVC.
pub(super) fn arm_fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Headless);
    fadt.creator_id = CREATOR_ID;
    fadt.creator_revision = CREATOR_REVISION;
    fadt.arm_boot_arch = (PSCI_COMPLIANT | PSCI_USES_HVC).into();
    let mut bytes = Vec::new();
    fadt.finalize().to_aml_bytes(&mut bytes);
    bytes
}

fn io_byte(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}
