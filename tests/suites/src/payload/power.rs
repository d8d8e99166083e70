//! The guest ends, or begins anew.

use super::guest::{Guest, builder, number, test_ram};
use super::payload_tests;
use anyhow::{Result, ensure};
use triarch_harness::suite::{Context, Outcome};

payload_tests!("power":
    powers_off,
    resets,
    resets_ten_times,
    resets_with_all_processors;
    x86:
    resets_by_keyboard_controller: "keyboard controller",
    resets_by_triple_fault: "triple faults",
);

fn powers_off(context: &Context) -> Result<Outcome> {
    Guest::start(builder(context)?)?.power_off()?;
    Ok(Outcome::Passed)
}

fn resets_by(context: &Context, way: &str) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?)?;
    guest.ask(&format!("mem fill {:#x} 0x10000 1", test_ram()))?;
    guest.send(&format!("pm {way}"))?;
    guest.wait_ready()?;
    guest.ask("hello")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// By the platform's own way: the register that ACPI names, or PSCI.
fn resets(context: &Context) -> Result<Outcome> {
    resets_by(context, "reset")
}

fn resets_by_keyboard_controller(context: &Context) -> Result<Outcome> {
    resets_by(context, "i8042")
}

fn resets_by_triple_fault(context: &Context) -> Result<Outcome> {
    resets_by(context, "triple")
}

fn resets_ten_times(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?)?;
    for round in 0..10 {
        let hello = guest.ask("hello")?;
        ensure!(number(&hello, "cpu")? == 0, "round {round}: {hello}");
        guest.send("pm reset")?;
        guest.wait_ready()?;
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn resets_with_all_processors(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.cpus(3))?;
    for _ in 0..2 {
        ensure!(number(&guest.ask("cpus")?, "count")? == 3);
        guest.send("pm reset")?;
        guest.wait_ready()?;
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}
