//! The entropy source.

use anyhow::{Result, ensure};
use std::collections::BTreeSet;
use triarch_harness::images::Kernel;
use triarch_harness::linux::LinuxBuilder;
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[Test::nested("rng::feeds_the_guest", feeds)];

fn feeds(context: &Context) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, Kernel::V6_1)?.boot()?;
    let source = guest.shell("cat /sys/class/misc/hw_random/rng_current")?;
    ensure!(source.starts_with("virtio_rng"), "the guest uses {source}");
    guest.shell("dd if=/dev/hwrng of=/tmp/random bs=512 count=16 iflag=fullblock")?;
    let random = guest.agent().get("/tmp/random")?;
    ensure!(random.len() == 8192, "{} of 8192 bytes", random.len());
    // A device that fills nothing, or always the same, shows at once: equal blocks of 16 bytes do
    // not happen by chance.
    let blocks: BTreeSet<_> = random.chunks(16).collect();
    ensure!(blocks.len() == 512, "only {} of 512 blocks differ", blocks.len());
    guest.power_off()?;
    Ok(Outcome::Passed)
}
