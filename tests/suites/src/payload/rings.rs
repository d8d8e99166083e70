//! Malformed chains and rings: the device asks for a reset, the VMM goes on, and after the reset the device works.

use super::guest::{Guest, builder, number};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use std::net::Ipv4Addr;
use triarch_harness::disk::DiskImage;
use triarch_harness::net;
use triarch_harness::suite::{Context, Outcome};
use triarch_harness::vm::VmBuilder;

payload_tests!("rings":
    disk_survives,
    nic_survives,
    rng_survives,
    console_survives,
    vsock_survives,
    iommu_survives,
);

/// Cases after which every device has to ask for a reset: they break the queue itself.
const BROKEN: [&str; 17] = [
    "loop",
    "self-loop",
    "next-out-of-range",
    "head-out-of-range",
    "address-nowhere",
    "address-wraps",
    "length-past-ram",
    "zero-length",
    "index-jump",
    "too-long",
    "indirect-nested",
    "indirect-odd-size",
    "indirect-empty",
    "indirect-nowhere",
    "indirect-loop",
    "ring-nowhere",
    "ring-misaligned",
];

fn survives(vm: VmBuilder, device: &str) -> Result<Outcome> {
    let mut guest = Guest::start(vm)?;
    let cases = guest.ask("fuzz-ring cases")?;
    for case in cases.split(' ') {
        // The guest itself fails unless the device works again after a reset.
        let outcome = guest
            .ask(&format!("fuzz-ring {device} {case}"))
            .with_context(|| case.to_owned())?;
        if BROKEN.contains(&case) {
            ensure!(number(&outcome, "needs_reset")? == 1, "{device} {case}: {outcome}");
            ensure!(
                number(&outcome, "told")? >= 1,
                "{device} {case}: no configuration interrupt: {outcome}"
            );
        }
    }
    ensure!(cases.split(' ').count() > BROKEN.len(), "cases are missing: {cases}");
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn disk_survives(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let disk = DiskImage::empty(vm.dir().join("disk"), 1 << 20)?;
    survives(vm.disk(disk.path(), ""), "blk0")
}

fn iommu_survives(context: &Context) -> Result<Outcome> {
    survives(builder(context)?.flag("--platform", "iommu=on"), "iommu0")
}

fn nic_survives(context: &Context) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let (address, mask) = (Ipv4Addr::new(10, 9, 8, 1), Ipv4Addr::new(255, 255, 255, 0));
    let tap = net::Tap::create("tap0", address, mask, false)?;
    survives(builder(context)?.flag("--net", format!("tap={}", tap.name())), "net0")
}

fn rng_survives(context: &Context) -> Result<Outcome> {
    survives(builder(context)?, "rng0")
}

fn console_survives(context: &Context) -> Result<Outcome> {
    survives(builder(context)?.set("--console", "null"), "console0")
}

fn vsock_survives(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let vsock = format!("cid=3,socket={}", vm.dir().join("vsock.sock").display());
    survives(vm.flag("--vsock", vsock), "vsock0")
}
