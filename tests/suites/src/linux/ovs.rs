//! A Linux guest on a bridge of Open vSwitch with DPDK, whose other port is an interface of the host.

use super::net::{configure, ping, tcp_both_ways};
use crate::storage::{soon, wait_state};
use crate::switches::{BRIDGE, Program, Switch, skipped};
use anyhow::{Context as _, Result, ensure};
use std::net::Ipv4Addr;
use std::time::Duration;
use triarch_guest_init::interface_up;
use triarch_harness::agent::Exec;
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::net;
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("ovs::guest_and_host_talk", |c| guest_and_host_talk(c, Kernel::V6_1)).within(LONG),
    Test::nested("ovs::guest_and_host_talk_on_linux_6_12", |c| {
        guest_and_host_talk(c, Kernel::V6_12)
    })
    .within(LONG),
];

const LONG: Duration = Duration::from_secs(900);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 1, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 1, 2);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

fn guest_and_host_talk(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let Some(mut switch) = Switch::find(Program::OpenVswitch, context, 1)? else {
        return skipped();
    };
    start(&mut switch)?;
    let flag = format!(
        "vhost_user=on,vhost_mode=server,socket={},id=served",
        switch.socket(0).display()
    );
    let guest = LinuxBuilder::new(context, kernel)?
        .vm(|vm| vm.api().flag("--net", flag))
        .boot()?;
    talk(&guest, &mut switch).with_context(|| {
        let (vmm, switch) = (guest.vm().last_words(), switch.last_words());
        format!("last words of the VMM:{vmm}, of the switch:{switch}")
    })?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// The bridge's own interface comes and goes with the switch.
fn start(switch: &mut Switch) -> Result<()> {
    switch.start()?;
    net::add_address(BRIDGE, HOST, MASK)?;
    Ok(interface_up(BRIDGE)?)
}

fn talk(guest: &LinuxVm, switch: &mut Switch) -> Result<()> {
    configure(guest, GUEST)?;
    wait_state(guest.vm(), "Connected")?;
    forwarded(guest)?;
    ping(guest, HOST, 56)?;
    // The connection outlives the switch.
    tcp_both_ways(guest, (HOST, HOST), || {
        switch.kill();
        wait_state(guest.vm(), "Disconnected")?;
        start(switch)?;
        let link = wait_state(guest.vm(), "Connected")?;
        ensure!(link["reconnects"].as_u64() == Some(1), "{link}");
        Ok(())
    })?;
    ping(guest, HOST, 1472)
}

/// Waits until what the guest sends arrives: a switch that is connected fills a pool of buffers before it forwards, for which an emulated
/// host with another one beside it needs longer than the guest asks for an address before it gives up.
fn forwarded(guest: &LinuxVm) -> Result<()> {
    let seconds = 4 * soon().as_secs();
    let script =
        format!("for n in $(seq {seconds}); do ping -c 1 -W 1 {HOST} > /tmp/ping && exit; done; cat /tmp/ping; false");
    let patience = Duration::from_secs(4 * seconds);
    guest.agent().check(&Exec::shell(&script).timeout(patience))?;
    Ok(())
}
