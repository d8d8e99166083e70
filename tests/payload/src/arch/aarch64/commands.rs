//! Commands in this architecture's way: the time, and the machine's ends.

use super::io::Mmio;
use super::{clock, power};
use crate::acpi::Acpi;
use crate::shell::{Args, Reply};
use alloc::format;
use alloc::string::String;

/// The PL031, where the platform contract has it.
const RTC: u64 = 0x0901_0000;
/// Flag of the FADT: PSCI, to be called by HVC.
const PSCI_BY_HVC: u16 = 3;

/// Runs `command` if it is one of these.
pub fn run(command: &str, _: &mut Args) -> Option<Reply> {
    match command {
        "time" => Some(Ok(time())),
        _ => None,
    }
}

/// `time`
fn time() -> String {
    // SAFETY: device registers, mapped by boot.s.
    let rtc = unsafe { Mmio::new(RTC) }.read32(0);
    format!("khz={} ticks={} rtc={rtc}", clock::khz(), clock::ticks())
}

/// Ends the machine: `off|reset`, by PSCI. Returns only when the VMM refused.
pub fn power(acpi: Result<&Acpi, String>, way: &str) -> Result<(), String> {
    if acpi?.arm_boot & PSCI_BY_HVC != PSCI_BY_HVC {
        return Err("the FADT does not offer PSCI by HVC".into());
    }
    let error = match way {
        "off" => power::off(),
        "reset" => power::reset(),
        other => return Err(format!("pm {other}?")),
    };
    Err(format!("PSCI answers {error}"))
}
