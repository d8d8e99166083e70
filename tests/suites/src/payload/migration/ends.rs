//! A guest that ends or resets, and a VMM that is ended, while the guest is moved.

use super::super::guest::{Guest, builder, test_ram};
use super::super::payload_tests;
use super::{MIB, Waiting, begin, copying, joined};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("migration::ends":
    a_guest_that_resets_stays,
    a_guest_that_powers_off_is_off,
    a_vmm_that_ends_ends_the_migration,
);

/// A guest that is being moved, slowly.
fn moving(context: &Context) -> Result<(Guest, Waiting, std::thread::JoinHandle<Result<String>>)> {
    let mut guest = Guest::start(builder(context)?.api())?;
    guest.ask(&format!("mem fill {} {} 5", test_ram(), 40 * MIB))?;
    let waiting = Waiting::start(context, "unix", &json!({}))?;
    let sending = begin(&guest, &waiting.address, &json!({ "bandwidth": MIB }))?;
    copying(guest.vm().api()?)?;
    Ok((guest, waiting, sending))
}

fn a_guest_that_resets_stays(context: &Context) -> Result<Outcome> {
    let (mut guest, waiting, sending) = moving(context)?;
    guest.send("pm reset")?;
    let failed = joined(sending);
    let error = format!("{:#}", failed.err().context("it was moved")?);
    ensure!(error.contains("reset") && error.contains("409"), "{error}");
    waiting.failed()?;
    guest.wait_ready()?;
    guest.ask("hello")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_guest_that_powers_off_is_off(context: &Context) -> Result<Outcome> {
    let (guest, waiting, sending) = moving(context)?;
    guest.power_off()?;
    ensure!(sending.join().is_ok_and(|result| result.is_err()), "it was moved");
    waiting.failed()?;
    Ok(Outcome::Passed)
}

fn a_vmm_that_ends_ends_the_migration(context: &Context) -> Result<Outcome> {
    let (guest, waiting, sending) = moving(context)?;
    guest.vm().api()?.put("vmm.shutdown", None)?;
    guest.expect_end(0)?;
    ensure!(sending.join().is_ok_and(|result| result.is_err()), "it was moved");
    waiting.failed()?;
    // The same at the other end.
    let (mut guest, waiting, sending) = moving(context)?;
    waiting.api()?.put("vmm.shutdown", None)?;
    let failed = joined(sending);
    let error = format!("{:#}", failed.err().context("it was moved")?);
    ensure!(error.contains("runs here"), "{error}");
    ensure!(
        waiting.received.join().is_ok_and(|result| result.is_err()),
        "a guest came"
    );
    waiting.vm.expect_end(0)?;
    guest.ask(&format!("mem verify {} {} 5", test_ram(), 40 * MIB))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
