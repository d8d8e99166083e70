//! All processors start, and interrupt each other.

use super::guest::{Guest, builder, field, is_arm, number};
use super::payload_tests;
use anyhow::{Result, ensure};
use triarch_harness::suite::{Context, Outcome};

payload_tests!("smp":
    starts_four,
    starts_sixteen,
    starts_the_most,
    interrupts_others;
    x86:
    numbers_threads_and_cores: "APIC ids",
);

fn starts(context: &Context, count: u32) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.cpus(count))?;
    let cpus = guest.ask("cpus")?;
    ensure!(number(&cpus, "count")? == u64::from(count), "{cpus}");
    // Sixteen share the lowest affinity level of ARM's MPIDR.
    let id = |n: u32| if is_arm() { n >> 4 << 8 | n & 15 } else { n };
    let ids: Vec<String> = (0..count).map(|n| id(n).to_string()).collect();
    ensure!(field(&cpus, "ids")? == ids.join(","), "{cpus}");
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn starts_four(context: &Context) -> Result<Outcome> {
    starts(context, 4)
}

fn starts_sixteen(context: &Context) -> Result<Outcome> {
    starts(context, 16)
}

fn starts_the_most(context: &Context) -> Result<Outcome> {
    // Every KVM has room for so many on x86; on ARM the redistributors and the tables have another limit, and a host that is
    // emulated there starts them one by one.
    starts(context, if is_arm() { 40 } else { 254 })
}

fn numbers_threads_and_cores(context: &Context) -> Result<Outcome> {
    // Three cores of two threads: core numbers take two bits, so the second package begins at 8.
    let flag = "boot=12,topology=2:3:1:2";
    let mut guest = Guest::start(builder(context)?.set("--cpus", flag))?;
    let cpus = guest.ask("cpus")?;
    ensure!(field(&cpus, "ids")? == "0,1,2,3,4,5,8,9,10,11,12,13", "{cpus}");
    Ok(Outcome::Passed)
}

fn interrupts_others(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.cpus(3))?;
    let sent = guest.ask("ipi 50")?;
    ensure!(number(&sent, "sent")? == 100, "{sent}");
    // The vector that wakes a processor, counted by all of them.
    let vector = field(&sent, "vector")?;
    ensure!(guest.ask(&format!("count {vector}"))? == "100");
    Ok(Outcome::Passed)
}
