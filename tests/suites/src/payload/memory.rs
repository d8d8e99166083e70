//! RAM is where the map says, holds what is written, and takes writes at any rate.

use super::data::{crc32, pattern};
use super::guest::{Guest, builder, is_arm, number, ram_start, test_ram};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use std::time::Duration;
use triarch_harness::suite::{Context, Outcome, patient};

payload_tests!("memory":
    holds_data,
    goes_around_the_hole,
    takes_odd_sizes,
    is_dirtied_at_a_rate,
);

/// The test ranges: (start, length).
fn arenas(guest: &mut Guest) -> Result<Vec<(u64, u64)>> {
    let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16);
    let answer = guest.ask("mem arenas")?;
    let ranges = answer.split(' ').map(|range| {
        let (start, len) = range.split_once('+').with_context(|| format!("no range: {range}"))?;
        Ok((hex(start)?, hex(len)?))
    });
    ranges.collect()
}

fn holds_data(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?)?;
    let ranges = arenas(&mut guest)?;
    let start = test_ram();
    ensure!(ranges == [(start, 48 << 20)], "{ranges:x?}");
    guest.ask(&format!("mem fill {start:#x} 0x800000 5"))?;
    guest.ask(&format!("mem verify {start:#x} 0x800000 5"))?;
    guest.refused(&format!("mem verify {start:#x} 0x800000 6"))?;
    let checksum = number(&guest.ask(&format!("mem checksum {start:#x} 0x10000"))?, "crc32")?;
    ensure!(checksum == u64::from(crc32(&pattern(5, 0, 0x1_0000))), "{checksum:#x}");
    Ok(Outcome::Passed)
}

fn goes_around_the_hole(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.memory_mib(3584))?;
    let ranges = arenas(&mut guest)?;
    // Only x86 has the hole.
    let expected = if is_arm() {
        vec![(test_ram(), (3584 << 20) - (16 << 20))]
    } else {
        vec![(test_ram(), (3 << 30) - (16 << 20)), (4 << 30, 512 << 20)]
    };
    ensure!(ranges == expected, "{ranges:x?}");
    // The last and the first pages of each part.
    for (seed, (start, len)) in ranges.into_iter().enumerate() {
        for at in [start, start + len - 0x4000] {
            guest.ask(&format!("mem fill {at:#x} 0x4000 {seed}"))?;
            guest.ask(&format!("mem verify {at:#x} 0x4000 {seed}"))?;
        }
    }
    guest.ask(&format!("mem verify {:#x} 0x4000 0", test_ram()))?;
    Ok(Outcome::Passed)
}

fn takes_odd_sizes(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.set("--memory", "size=66M"))?;
    let (start, len) = arenas(&mut guest)?[0];
    ensure!(
        start + len == ram_start() + (66 << 20),
        "RAM ends at {:#x}",
        start + len
    );
    Ok(Outcome::Passed)
}

fn is_dirtied_at_a_rate(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?)?;
    // Once, so that the host has the pages: giving them takes some hosts longer than the rate allows.
    guest.ask(&format!("mem fill {:#x} {:#x} 1", test_ram(), 1000 * 4096))?;
    guest.send("dirty 1000 20000 0")?;
    std::thread::sleep(patient(Duration::from_millis(300)));
    guest.send("")?;
    let dirty = guest.answer()?;
    let rate = number(&dirty, "rate")?;
    ensure!((12_000..=22_000).contains(&rate), "{dirty}");
    Ok(Outcome::Passed)
}
