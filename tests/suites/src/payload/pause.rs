//! Pausing loses nothing: no interrupt, no request, no byte.

use super::guest::{Guest, builder, number};
use super::payload_tests;
use anyhow::{Result, ensure};
use std::thread;
use std::time::Duration;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("pause":
    stops_and_goes_on,
    keeps_requests,
    keeps_processors,
);

fn stops_and_goes_on(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.api())?;
    guest.vm().pause()?;
    // Typed into the paused guest: answered when it runs again, not before.
    guest.send("hello")?;
    thread::sleep(Duration::from_millis(50));
    guest.vm().resume()?;
    guest.answer()?;
    for _ in 0..100 {
        guest.vm().pause()?;
        guest.vm().resume()?;
    }
    guest.ask("sleep 1")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn keeps_requests(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let disk = DiskImage::empty(vm.dir().join("disk"), 16 << 20)?;
    let mut guest = Guest::start(vm.disk(disk.path(), "num_queues=2").api())?;
    guest.ask("blk 0 init queues=2")?;
    guest.send("blk 0 stress 4000 32 6")?;
    for _ in 0..30 {
        guest.vm().pause()?;
        thread::sleep(Duration::from_millis(1));
        guest.vm().resume()?;
        thread::sleep(Duration::from_millis(3));
    }
    guest.answer()?;
    Ok(Outcome::Passed)
}

fn keeps_processors(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.cpus(3).api())?;
    guest.ask("cpus")?;
    guest.send("ipi 300")?;
    for _ in 0..20 {
        guest.vm().pause()?;
        guest.vm().resume()?;
        thread::sleep(Duration::from_millis(1));
    }
    let sent = guest.answer()?;
    ensure!(number(&sent, "sent")? == 600, "{sent}");
    Ok(Outcome::Passed)
}
