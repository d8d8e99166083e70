//! Random bytes are random enough, and as many as asked for.

use super::guest::{Guest, builder, field, number};
use super::payload_tests;
use anyhow::{Result, ensure};
use std::fs;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("rng":
    gives_random_bytes,
    takes_them_from_a_file,
);

fn gives_random_bytes(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?)?;
    let (first, second) = (guest.ask("rng 65536")?, guest.ask("rng 65536")?);
    for answer in [&first, &second] {
        // 524,288 fair bits: 20 standard deviations to either side.
        let ones = number(answer, "ones")?;
        ensure!(ones.abs_diff(262_144) < 7_240, "{answer}");
    }
    ensure!(
        field(&first, "crc32")? != field(&second, "crc32")?,
        "the same bytes twice"
    );
    guest.ask("rng 1")?;
    guest.ask("rng init event_idx=0 size=2")?;
    guest.ask("rng 4096")?;
    Ok(Outcome::Passed)
}

fn takes_them_from_a_file(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let file = vm.dir().join("source");
    fs::write(&file, [0xff; 4096])?;
    let mut guest = Guest::start(vm.flag("--rng", format!("src={}", file.display())))?;
    let answer = guest.ask("rng 512")?;
    ensure!(number(&answer, "ones")? == 4096, "not the file's bytes: {answer}");
    Ok(Outcome::Passed)
}
