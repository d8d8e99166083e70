//! A device of which the VMM knows no more than its type: here a disk, so that the guest can tell whether all of it works.

use super::data::pattern;
use super::guest::number;
use super::vhost::{Rig, SIZE, on_rig};
use crate::storage::Program;
use anyhow::{Result, ensure};
use std::time::Duration;
use triarch_harness::suite::{Context, Outcome, Test};

/// This module's tests.
pub const TESTS: &[Test] = &[
    // QEMU's keeps no record of what it has, ours does.
    Test::payload("vhost::generic::qemus_daemon_serves_one", |c| {
        serves(c, Program::Qemu, "", "relay")
    })
    .within(LONG),
    Test::payload("vhost::generic::blkd_serves_one", |c| {
        serves(c, Program::Blkd, "", "direct")
    })
    .within(LONG),
    Test::payload("vhost::generic::blkd_serves_one_behind_the_relay", |c| {
        serves(c, Program::Blkd, ",datapath=relay", "relay")
    })
    .within(LONG),
];

const LONG: Duration = Duration::from_secs(60);
/// virtio 1.2, 5.
const BLOCK: u16 = 2;
const QUEUES: u16 = 2;

/// `option` chooses who works on the guest's rings, `path` is who does.
fn serves(context: &Context, whose: Program, option: &str, path: &str) -> Result<Outcome> {
    let rig = Rig::with(context, whose, QUEUES, |daemon| {
        let socket = daemon.socket().display();
        let value = format!("device_type={BLOCK},socket={socket},queue_sizes=[64,128],id=served{option}");
        ("--generic-vhost-user", value)
    })?;
    on_rig(rig, |rig| {
        // The configuration space and the features of the type are the daemon's.
        let info = rig.guest.ask("blk 0 info")?;
        ensure!(number(&info, "sectors")? == SIZE / 512, "{info}");
        ensure!(number(&info, "queues")? == u64::from(QUEUES), "{info}");
        rig.guest.ask("blk 0 verify 0 2048 1")?;
        rig.guest.ask("blk 0 write 7 9 3")?;
        rig.guest.ask("blk 0 flush")?;
        let data = rig.image.read(7 * 512, 9 * 512)?;
        ensure!(data == pattern(3, 7, 9 * 512), "the image has something else");
        rig.guest.refused(&format!("blk 0 write {} 1 1", SIZE / 512))?;
        // A driver that comes again, on a machine that starts again, and one that stands still in between.
        rig.guest.ask("blk 0 init queues=2 size=32 indirect=0")?;
        rig.guest.ask("blk 0 stress 800 8 12")?;
        rig.guest.send("pm reset")?;
        rig.guest.wait_ready()?;
        rig.guest.ask("blk 0 init queues=2")?;
        rig.guest.send("blk 0 stress 1500 32 13")?;
        for _ in 0..5 {
            rig.guest.vm().pause()?;
            rig.guest.vm().resume()?;
        }
        rig.guest.answer()?;
        ensure!(rig.image.read(0, 1500 * 4096)? == pattern(13, 0, 1500 * 4096));
        rig.outlives_daemons(path, false)
    })
}
