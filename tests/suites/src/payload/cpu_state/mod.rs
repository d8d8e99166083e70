//! What is saved of processors, interrupt controllers and clocks, and that a fresh VM goes on with it.

mod bad;
mod bed;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use triarch_arch::Elapsed;
use triarch_harness::suite::{Context, Outcome, Test, is_patient};

use super::guest::is_arm;
use super::payload_tests;
use bad::{refuses_what_is_damaged, refuses_what_is_not_of_one_guest};
use bed::{Bed, Reads, Running, Saved, count, mark};

payload_tests!(
    "cpu_state": comes_back_as_it_was, goes_on_in_another_vm, what_was_read_is_not_read_again, time_goes_on_and_never_back, refuses_what_is_not_of_one_guest,
    refuses_what_is_damaged
);

/// The same with the KVM of x86 hosts' processors; on ARM hosts the tests above run.
pub const NESTED: &[Test] = &[
    Test::nested("cpu_state::comes_back_as_it_was", |context| {
        on_x86(context, comes_back_as_it_was)
    }),
    Test::nested("cpu_state::goes_on_in_another_vm", |context| {
        on_x86(context, goes_on_in_another_vm)
    }),
    Test::nested("cpu_state::time_goes_on_and_never_back", |context| {
        on_x86(context, time_goes_on_and_never_back)
    }),
    Test::nested("cpu_state::counters_stay_with_the_clock", |context| {
        on_x86(context, counters_stay_with_the_clock)
    }),
];

fn on_x86(context: &Context, test: fn(&Context) -> Result<Outcome>) -> Result<Outcome> {
    if is_arm() {
        return Ok(Outcome::Skipped("payload::cpu_state does this".into()));
    }
    test(context)
}

/// Takes from a state what differs from one moment to the next.
fn without_time(mut saved: Saved) -> Saved {
    for vcpu in &mut saved.vcpus {
        for time in ["value", "host", "offset"] {
            if let Some(tsc) = vcpu.get_mut("tsc") {
                tsc[time] = Value::Null;
            }
        }
        if let Some(counters) = vcpu.get_mut("counters") {
            *counters = Value::Null;
        }
    }
    saved.platform["clock"] = Value::Null;
    saved
}

/// Where two states differ first.
fn difference(path: &str, a: &Value, b: &Value) -> Option<String> {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) if a.len() == b.len() => a
            .iter()
            .find_map(|(key, value)| difference(&format!("{path}.{key}"), value, b.get(key)?)),
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            let mut pairs = a.iter().zip(b).enumerate();
            pairs.find_map(|(index, (a, b))| difference(&format!("{path}[{index}]"), a, b))
        }
        (a, b) => (a != b).then(|| format!("{path}: {a} {b}")),
    }
}

fn ensure_same(a: &Saved, b: &Saved) -> Result<()> {
    let (a, b) = (without_time(a.clone()), without_time(b.clone()));
    let parts = |saved: &Saved| {
        Value::Array(
            [
                vec![saved.plan.clone(), saved.platform.clone(), saved.firmware.clone()],
                saved.vcpus.clone(),
            ]
            .concat(),
        )
    };
    let difference = difference("", &parts(&a), &parts(&b));
    ensure!(a == b, "{}", difference.unwrap_or_default());
    Ok(())
}

fn comes_back_as_it_was(_: &Context) -> Result<Outcome> {
    let fresh = Bed::new(2, 3)?;
    let mut saved = fresh.save()?;
    let again = Bed::restore(&saved, &fresh.memory, Elapsed::Stands)?;
    ensure_same(&saved, &again.save()?)?;
    mark(&mut saved)?;
    ensure!(ensure_same(&saved, &again.save()?).is_err(), "nothing is marked");
    let marked = Bed::restore(&saved, &fresh.memory, Elapsed::Stands)?;
    ensure_same(&saved, &marked.save()?)?;
    Ok(Outcome::Passed)
}

/// Waits until the guest has counted on from `from`.
fn wait_for_more(guest: &Running, from: u32) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while guest.counted()? <= from {
        ensure!(Instant::now() < deadline, "the guest stands at {from}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn goes_on_in_another_vm(_: &Context) -> Result<Outcome> {
    let device = Arc::<Reads>::default();
    let fresh = Bed::new(1, 2)?;
    let mut saved = fresh.save()?;
    count(&mut saved, &fresh.memory)?;
    let mut guest = Bed::restore(&saved, &fresh.memory, Elapsed::Stands)?.run(&device)?;
    wait_for_more(&guest, 0)?;
    for _ in 0..3 {
        ensure!(guest.refuses_errands(), "it runs");
        let saved = guest.pause_and_save()?;
        let stood = guest.counted()?;
        let next = Bed::restore(&saved, &guest.memory, Elapsed::Stands)?;
        ensure_same(&saved, &next.save()?)?;
        let next = next.run(&device)?;
        wait_for_more(&next, stood)?;
        ensure!(guest.counted()? == stood, "a guest that is paused runs");
        next.pause_and_save()?;
        guest.resume();
        wait_for_more(&guest, stood)?;
        guest.pause_and_save()?;
        next.resume();
        guest = next;
    }
    Ok(Outcome::Passed)
}

/// A guest that is always about to read from a device is moved again and again: no read is lost, none is done twice.
fn what_was_read_is_not_read_again(_: &Context) -> Result<Outcome> {
    let device = Arc::<Reads>::default();
    let fresh = Bed::new(1, 1)?;
    let mut saved = fresh.save()?;
    count(&mut saved, &fresh.memory)?;
    let mut guest = Bed::restore(&saved, &fresh.memory, Elapsed::Stands)?.run(&device)?;
    let rounds = if is_patient() { 5 } else { 20 };
    for round in 0..rounds {
        wait_for_more(&guest, guest.counted()?)?;
        let saved = guest.pause_and_save()?;
        let (reads, counted) = (device.count(), guest.counted()?);
        ensure!(
            [counted, counted + 1].contains(&reads),
            "{reads} reads and {counted} counted in round {round}"
        );
        guest = Bed::restore(&saved, &guest.memory, Elapsed::Stands)?.run(&device)?;
    }
    Ok(Outcome::Passed)
}

/// What the guest's clock stands at, and its frequency: ARM's counter, KVM's clock for x86 guests. The TSC is not looked at, a KVM in
/// software lets nobody set it.
fn counter(saved: &Saved) -> Result<(u64, u64)> {
    let clock = &saved.platform["clock"];
    let (count, hz) = match (is_arm(), saved.vcpus.first()) {
        (true, Some(first)) => (&first["counters"]["virtual"], clock["counter_hz"].as_u64()),
        _ => (&clock["guest_ns"], Some(1_000_000_000)),
    };
    Ok((count.as_u64().context("a counter")?, hz.context("its frequency")?))
}

fn time_goes_on_and_never_back(_: &Context) -> Result<Outcome> {
    let fresh = Bed::new(2, 2)?;
    let mut saved = fresh.save()?;
    let (before, hz) = counter(&saved)?;
    // As if it had been saved a day ago.
    let day = 86_400.0;
    let clock = &mut saved.platform["clock"]["host_ns"];
    *clock = (clock.as_u64().context("a clock")? - 86_400_000_000_000).into();
    let moved = |elapsed| -> Result<f64> {
        let again = Bed::restore(&saved, &fresh.memory, elapsed)?;
        let (after, _) = counter(&again.save()?)?;
        ensure!(after >= before, "time went back from {before} to {after}");
        Ok((after - before) as f64 / hz as f64)
    };
    let stood = moved(Elapsed::Stands)?;
    ensure!(stood < day / 2.0, "{stood} s passed while time stood still");
    let passed = moved(Elapsed::Passes)?;
    ensure!((day..1.5 * day).contains(&passed), "{passed} s passed of a day");
    Ok(Outcome::Passed)
}

/// A moment of an x86 guest: its clock in nanoseconds, and what each of its counters counts at that instant.
fn pair(saved: &Saved) -> Result<(u64, Vec<u64>)> {
    let number = |value: &Value, name: &str| value[name].as_u64().with_context(|| format!("{name} in {value}"));
    let clock = &saved.platform["clock"];
    let then = number(clock, "host_tsc")?;
    let counts = |vcpu: &Value| {
        let tsc = &vcpu["tsc"];
        Ok(number(tsc, "value")?.wrapping_add(then.wrapping_sub(number(tsc, "host")?)))
    };
    let counters = saved.vcpus.iter().map(counts).collect::<Result<_>>()?;
    Ok((number(clock, "guest_ns")?, counters))
}

/// A guest that compares its counters with the clock finds what it found before, and its counters do not drift apart.
fn counters_stay_with_the_clock(_: &Context) -> Result<Outcome> {
    let tolerance = if is_patient() { 1e6 } else { 20e3 };
    let fresh = Bed::new(2, 2)?;
    std::thread::sleep(Duration::from_millis(300));
    let mut saved = fresh.save()?;
    for _ in 0..3 {
        let khz = saved.vcpus[0]["tsc"]["khz"].as_f64().context("a frequency")?;
        let (before_ns, before) = pair(&saved)?;
        std::thread::sleep(Duration::from_millis(1500));
        let next = Bed::restore(&saved, &fresh.memory, Elapsed::Stands)?;
        std::thread::sleep(Duration::from_millis(300));
        saved = next.save()?;
        let (after_ns, after) = pair(&saved)?;
        let passed = (after_ns - before_ns) as f64;
        ensure!((0.3e9..1.5e9).contains(&passed), "{passed} ns passed");
        for (index, (before, after)) in before.iter().zip(&after).enumerate() {
            let counted = after.wrapping_sub(*before) as f64 / khz * 1e6;
            let apart = counted - passed;
            eprintln!("vCPU {index}: {passed} ns by the clock, {counted} by the counter");
            ensure!(apart.abs() < tolerance, "vCPU {index} is {apart} ns from the clock");
        }
        let offsets: Vec<_> = saved.vcpus.iter().map(|vcpu| &vcpu["tsc"]["offset"]).collect();
        ensure!(offsets.windows(2).all(|pair| pair[0] == pair[1]), "{offsets:?}");
    }
    Ok(Outcome::Passed)
}
