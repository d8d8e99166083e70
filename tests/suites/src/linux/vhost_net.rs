//! Two guests on a switch that is another process: DPDK's testpmd, or triarch-netd.

use super::net::{configure, ping};
use crate::storage::wait_state;
use crate::switches::{Program, Switch, skipped};
use anyhow::{Context as _, Result, ensure};
use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::agent::Exec;
use triarch_harness::disk::pattern;
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("vhost_net::guests_talk_over_testpmd", |c| {
        guests_talk(c, Program::Testpmd)
    })
    .within(LONG),
    Test::nested("vhost_net::guests_talk_over_netd", |c| guests_talk(c, Program::Netd)).within(LONG),
];

const LONG: Duration = Duration::from_secs(900);
/// How long what is sent may take to arrive.
const TRANSFER: Duration = Duration::from_secs(240);
/// The guests' hardware addresses and addresses.
const GUESTS: [(&str, Ipv4Addr); 2] = [
    ("52:54:00:00:09:01", Ipv4Addr::new(10, 9, 0, 1)),
    ("52:54:00:00:09:02", Ipv4Addr::new(10, 9, 0, 2)),
];
const PORT: u16 = 5000;
/// What is sent, in pieces; the second half when the sender is told to go on, so that a switch can die in the midst of it however fast or
/// slow the host is.
const PIECES: usize = 16;
const PIECE: usize = 32 << 10;
/// A full frame: what is longer than that on average went as segments that nobody cut.
const FRAME: u64 = 1514;

fn guests_talk(context: &Context, kind: Program) -> Result<Outcome> {
    let Some(switch) = Switch::find(kind, context, 1)? else {
        return skipped();
    };
    let mut switch = switch.nice();
    switch.start()?;
    let guests =
        boot_two(context, &switch).with_context(|| format!("the switch's last words:{}", switch.last_words()))?;
    talk(&mut switch, kind, &guests).with_context(|| {
        let [first, second] = guests.each_ref().map(|guest| guest.vm().last_words());
        let switch = switch.last_words();
        format!("last words of the VMMs:{first}{second}, of the switch:{switch}")
    })?;
    for guest in guests {
        guest.power_off()?;
    }
    Ok(Outcome::Passed)
}

fn boot_two(context: &Context, switch: &Switch) -> Result<[LinuxVm; 2]> {
    let boot = |n: usize| {
        let (mac, address) = GUESTS[n];
        let flag = format!(
            "vhost_user=on,socket={},mac={mac},id=served",
            switch.socket(n).display()
        );
        let guest = LinuxBuilder::new(context, Kernel::ALL[n])?
            .vm(|vm| vm.api().flag("--net", flag))
            .boot()?;
        configure(&guest, address)?;
        Ok::<_, anyhow::Error>(guest)
    };
    Ok([boot(0)?, boot(1)?])
}

fn talk(switch: &mut Switch, kind: Program, guests: &[LinuxVm; 2]) -> Result<()> {
    let [first, second] = guests;
    ping(first, GUESTS[1].1, 56)?;
    let before = received(second)?;
    send(first, second, GUESTS[1].1, || go_on(first))?;
    let after = received(second)?;
    let (bytes, packets) = (after.0 - before.0, after.1 - before.1);
    ensure!(bytes >= (PIECES * PIECE) as u64, "only {bytes} bytes are counted");
    if kind == Program::Netd {
        // From the first guest's memory to the second's as its kernel made them.
        ensure!(bytes > FRAME * packets, "{bytes} bytes came in {packets} packets");
    }
    // The other way the switch dies in the midst of it.
    send(second, first, GUESTS[0].1, || {
        wait_received(first, PIECES * PIECE / 4)?;
        switch.kill();
        for guest in guests {
            wait_state(guest.vm(), "Disconnected")?;
        }
        go_on(second)?;
        let came = arrived(first)?;
        ensure!(came < PIECES * PIECE, "all had come before the switch died");
        switch.start()
    })?;
    for guest in guests {
        let link = wait_state(guest.vm(), "Connected")?;
        ensure!(link["reconnects"].as_u64() == Some(1), "{link}");
    }
    ping(first, GUESTS[1].1, 56)
}

/// Bytes and packets that the guest's driver counted as received.
fn received(guest: &LinuxVm) -> Result<(u64, u64)> {
    let counters = guest.shell("cd /sys/class/net/eth0/statistics; echo $(cat rx_bytes rx_packets)")?;
    let (bytes, packets) = counters.trim().split_once(' ').context("no counters")?;
    Ok((bytes.parse()?, packets.parse()?))
}

/// Bytes of what is sent that arrived so far.
fn arrived(guest: &LinuxVm) -> Result<usize> {
    Ok(guest.shell("wc -c < /tmp/received")?.trim().parse()?)
}

fn wait_received(guest: &LinuxVm, bytes: usize) -> Result<()> {
    let deadline = Instant::now() + TRANSFER;
    loop {
        let came = arrived(guest)?;
        if came >= bytes {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{came} bytes came, not {bytes}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// The guest that sends goes on with the second half.
fn go_on(guest: &LinuxVm) -> Result<()> {
    guest.shell("touch /tmp/go").map(drop)
}

/// Sends bytes over TCP from one guest to the other, at `address`, while `meanwhile` is done, and compares them.
fn send(from: &LinuxVm, to: &LinuxVm, address: Ipv4Addr, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
    let content = pattern(7, PIECES * PIECE);
    from.agent().put("/tmp/content", 0o600, &content)?;
    let give = format!(
        "#!/bin/sh\nfor n in $(seq 0 {}); do\n[ $n -lt {} ] || while [ ! -e /tmp/go ]; do usleep 10000; done\n\
         dd if=/tmp/content bs={PIECE} skip=$n count=1 2>/dev/null\ndone\n",
        PIECES - 1,
        PIECES / 2
    );
    from.shell("rm -f /tmp/go")?;
    from.agent().put("/tmp/give", 0o700, give.as_bytes())?;
    to.agent()
        .put("/tmp/take", 0o700, b"#!/bin/sh\nexec cat > /tmp/received\n")?;
    to.shell("rm -f /tmp/received; touch /tmp/received")?;
    let shell = |script: &str| Exec::shell(script).timeout(TRANSFER);
    let listening = to.agent().start(&shell(&format!("nc -l -p {PORT} -e /tmp/take")))?;
    to.shell(&format!(
        "while ! cat /proc/net/tcp* | grep -q ':{PORT:04X} .* 0A '; do usleep 10000; done"
    ))?;
    let sending = from
        .agent()
        .start(&shell(&format!("nc {address} {PORT} -e /tmp/give")))?;
    meanwhile()?;
    let mut said = String::new();
    for running in [sending, listening] {
        let exit = running.wait(|_, data| said += &String::from_utf8_lossy(data))?;
        ensure!(exit.code == Some(0), "{exit:?}: {said}");
    }
    ensure!(to.agent().get("/tmp/received")? == content, "something else arrived");
    Ok(())
}
