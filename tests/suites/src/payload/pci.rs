//! The bus is what the platform contract says; BARs can be moved and interrupts masked while devices run.

use super::guest::{Guest, builder, field, number};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("pci":
    lists_functions,
    sizes_bars,
    moves_bars,
    moves_there_and_back,
    masks_interrupts,
);

/// A guest with every device that needs nothing from the host but files.
fn full(context: &Context) -> Result<Guest> {
    let vm = builder(context)?;
    let disk = DiskImage::empty(vm.dir().join("disk"), 1 << 20)?;
    let console = format!("socket={}", vm.dir().join("console.sock").display());
    let vsock = format!("cid=3,socket={}", vm.dir().join("vsock.sock").display());
    Guest::start(
        vm.disk(disk.path(), "")
            .set("--console", console)
            .flag("--vsock", vsock),
    )
}

const DEVICES: [&str; 4] = ["blk0", "rng0", "console0", "vsock0"];

fn lists_functions(context: &Context) -> Result<Outcome> {
    let mut guest = full(context)?;
    let pci = guest.ask("pci")?;
    ensure!(field(&pci, "00:00.0")? == "8086:0d57:060000", "{pci}");
    for id in ["1af4:1042", "1af4:1043", "1af4:1044", "1af4:1053"] {
        ensure!(pci.contains(&format!("={id}:")), "no {id} in {pci}");
    }
    ensure!(number(&pci, "functions")? == 5, "{pci}");
    Ok(Outcome::Passed)
}

fn sizes_bars(context: &Context) -> Result<Outcome> {
    let mut guest = full(context)?;
    for device in DEVICES {
        let bars = guest.ask(&format!("bars {device}"))?;
        for bar in bars.split(' ') {
            let (place, size) = bar
                .split_once('+')
                .with_context(|| format!("{device}: no BAR in `{bars}`"))?;
            let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16);
            let (address, size) = (hex(place.rsplit(':').next().unwrap_or_default())?, hex(size)?);
            ensure!(
                size.is_power_of_two() && address != 0 && address % size == 0,
                "{device}: {bar}"
            );
        }
    }
    Ok(Outcome::Passed)
}

fn moves_bars(context: &Context) -> Result<Outcome> {
    let mut guest = full(context)?;
    for device in DEVICES {
        let moved = guest.ask(&format!("bar-move {device}"))?;
        ensure!(number(&moved, "old")? != number(&moved, "new")?, "{device}: {moved}");
        ensure!(
            number(&moved, "old_reads")? == 0xffff_ffff,
            "{device} still answers at its old place: {moved}"
        );
    }
    // Starting a driver anew finds the device at its new place.
    guest.ask("blk 0 init")?;
    guest.ask("blk 0 read 0 8")?;
    Ok(Outcome::Passed)
}

fn moves_there_and_back(context: &Context) -> Result<Outcome> {
    let mut guest = full(context)?;
    let first = guest.ask("bar-move blk0")?;
    let home = field(&first, "old")?;
    for _ in 0..5 {
        guest.ask(&format!("bar-move blk0 {home}"))?;
        guest.ask(&format!("bar-move blk0 {}", field(&first, "new")?))?;
    }
    Ok(Outcome::Passed)
}

fn masks_interrupts(context: &Context) -> Result<Outcome> {
    let mut guest = full(context)?;
    for device in DEVICES {
        let masked = guest.ask(&format!("msix {device}"))?;
        ensure!(number(&masked, "delivered")? == 2, "{device}: {masked}");
    }
    Ok(Outcome::Passed)
}
