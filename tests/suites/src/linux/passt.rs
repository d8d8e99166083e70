//! A Linux guest on passt.

use super::net::{configure, ping, tcp_both_ways};
use crate::passt::{GUEST, Passt, ROUTER, with_passt};
use crate::storage::wait_state;
use anyhow::{Result, ensure};
use std::net::Ipv4Addr;
use std::time::Duration;
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("passt::guest_and_host_talk", |c| guest_and_host_talk(c, Kernel::V6_1)).within(LONG),
    Test::nested("passt::guest_and_host_talk_on_linux_6_12", |c| {
        guest_and_host_talk(c, Kernel::V6_12)
    })
    .within(LONG),
];

const LONG: Duration = Duration::from_secs(600);

fn guest_and_host_talk(context: &Context, kernel: Kernel) -> Result<Outcome> {
    with_passt(context, |passt| {
        let flag = format!("vhost_user=on,socket={},id=served", passt.socket().display());
        let guest = LinuxBuilder::new(context, kernel)?
            .vm(|vm| vm.api().flag("--net", flag))
            .boot()?;
        configure(&guest, GUEST)?;
        talk(&guest)?;
        restart(&guest, passt)?;
        talk(&guest)?;
        guest.power_off()?;
        Ok(())
    })
}

/// Connections of the guest end at the host's loopback interface, where they come in as its own.
fn talk(guest: &LinuxVm) -> Result<()> {
    ping(guest, ROUTER, 56)?;
    tcp_both_ways(guest, (Ipv4Addr::LOCALHOST, ROUTER), || Ok(()))
}

fn restart(guest: &LinuxVm, passt: &mut Passt) -> Result<()> {
    passt.kill();
    wait_state(guest.vm(), "Disconnected")?;
    passt.start()?;
    let link = wait_state(guest.vm(), "Connected")?;
    ensure!(link["reconnects"].as_u64() == Some(1), "{link}");
    Ok(())
}
