//! Network interfaces on taps, each test in a network namespace of its own.

use anyhow::{Context as _, Result, ensure};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;
use triarch_harness::agent::Exec;
use triarch_harness::disk::pattern;
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::net::{self, Tap};
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("net::guest_and_host_talk", |c| {
        in_namespace(c, Kernel::V6_1, made_by_the_vmm)
    }),
    Test::nested("net::guest_and_host_talk_on_linux_6_12", |c| {
        in_namespace(c, Kernel::V6_12, made_by_the_vmm)
    }),
    Test::nested("net::existing_tap_and_mtu", |c| {
        in_namespace(c, Kernel::V6_1, existing_tap)
    }),
    Test::nested("net::several_queues", |c| in_namespace(c, Kernel::V6_1, several_queues)),
    Test::nested("net::without_offloads", |c| {
        in_namespace(c, Kernel::V6_1, without_offloads)
    }),
    Test::nested("net::tap_by_descriptor", |c| {
        in_namespace(c, Kernel::V6_1, by_descriptor)
    }),
];

const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 249, 1);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 249, 2);
const MAC: &str = "12:34:56:78:9a:bc";
const TAP: &str = "triarch0";
/// How long what is sent may take to arrive.
const TRANSFER: Duration = Duration::from_secs(120);
/// Feature bits of virtio 1.3, 5.1.3.
const CSUM: usize = 0;
const GUEST_CSUM: usize = 1;
const GUEST_TSO4: usize = 7;
const HOST_TSO4: usize = 11;
const OFFLOADS: [usize; 4] = [CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4];

fn in_namespace(context: &Context, kernel: Kernel, test: fn(&Context, LinuxBuilder) -> Result<()>) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    test(context, LinuxBuilder::new(context, kernel)?)?;
    Ok(Outcome::Passed)
}

fn with_net(builder: LinuxBuilder, value: &str) -> LinuxBuilder {
    builder.vm(|vm| vm.flag("--net", value))
}

fn made_by_the_vmm(_: &Context, builder: LinuxBuilder) -> Result<()> {
    let guest = with_net(builder, &format!("tap={TAP},mac={MAC},ip={HOST},mask={MASK}")).boot()?;
    ensure!(
        guest.shell("cat /sys/class/net/eth0/address")? == MAC,
        "another address in the guest"
    );
    let offered = features(&guest)?;
    for bit in OFFLOADS {
        ensure!(offered[bit], "feature {bit} is missing");
    }
    configure(&guest, GUEST)?;
    ping(&guest, HOST, 56)?;
    tcp_both_ways(&guest, (HOST, HOST), || Ok(()))?;
    guest.power_off()?;
    let left = net::interfaces()?;
    ensure!(left == ["lo"], "the VMM left {left:?}");
    Ok(())
}

fn existing_tap(_: &Context, builder: LinuxBuilder) -> Result<()> {
    Tap::create(TAP, HOST, MASK, false)?;
    let guest = with_net(builder, &format!("tap={TAP},mac={MAC},mtu=1400")).boot()?;
    ensure!(
        guest.shell("cat /sys/class/net/eth0/mtu")? == "1400",
        "another MTU in the guest"
    );
    configure(&guest, GUEST)?;
    // The largest that fits: 1400 less the headers of IPv4 and ICMP.
    ping(&guest, HOST, 1372)?;
    tcp_both_ways(&guest, (HOST, HOST), || Ok(()))?;
    guest.power_off()?;
    let left = net::interfaces()?;
    ensure!(
        left.iter().any(|name| name == TAP),
        "the tap was not the VMM's to remove: {left:?}"
    );
    Ok(())
}

fn several_queues(_: &Context, builder: LinuxBuilder) -> Result<()> {
    let value = format!("tap={TAP},mac={MAC},ip={HOST},mask={MASK},num_queues=4");
    let guest = with_net(builder, &value).vm(|vm| vm.cpus(2)).boot()?;
    ensure!(guest.shell("ls -d /sys/class/net/eth0/queues/rx-* | wc -l")? == "2");
    configure(&guest, GUEST)?;
    for cpu in [1, 2] {
        guest.shell(&format!("taskset {cpu} ping -c 3 -W 10 {HOST}"))?;
    }
    tcp_both_ways(&guest, (HOST, HOST), || Ok(()))?;
    guest.power_off()?;
    Ok(())
}

fn without_offloads(_: &Context, builder: LinuxBuilder) -> Result<()> {
    let off = "offload_tso=off,offload_ufo=off,offload_csum=off";
    let guest = with_net(builder, &format!("tap={TAP},mac={MAC},ip={HOST},mask={MASK},{off}")).boot()?;
    let offered = features(&guest)?;
    for bit in OFFLOADS {
        ensure!(!offered[bit], "feature {bit} is there");
    }
    configure(&guest, GUEST)?;
    tcp_both_ways(&guest, (HOST, HOST), || Ok(()))?;
    guest.power_off()?;
    Ok(())
}

fn by_descriptor(_: &Context, builder: LinuxBuilder) -> Result<()> {
    Tap::create(TAP, HOST, MASK, false)?;
    let tap = net::inheritable(net::attach(TAP, false)?)?;
    let guest = with_net(builder, &format!("fd=[{}],mac={MAC}", tap.as_raw_fd())).boot()?;
    drop(tap);
    configure(&guest, GUEST)?;
    ping(&guest, HOST, 56)?;
    tcp_both_ways(&guest, (HOST, HOST), || Ok(()))?;
    guest.power_off()?;
    Ok(())
}

/// Gives the guest's interface an address.
pub(super) fn configure(guest: &LinuxVm, address: Ipv4Addr) -> Result<()> {
    guest.shell(&format!("ip addr add {address}/24 dev eth0; ip link set eth0 up"))?;
    Ok(())
}

/// `address` must answer three packets with so many bytes of payload.
pub(super) fn ping(guest: &LinuxVm, address: Ipv4Addr, size: u32) -> Result<()> {
    let said = guest.shell(&format!("ping -c 3 -W 10 -s {size} {address}"))?;
    ensure!(said.contains("3 packets received"), "{said}");
    Ok(())
}

/// The features that driver and device agreed on, by bit.
fn features(guest: &LinuxVm) -> Result<Vec<bool>> {
    let text = guest.shell("cat /sys/class/net/eth0/device/features")?;
    let bits: Vec<bool> = text.chars().map(|c| c == '1').collect();
    ensure!(bits.len() >= 64, "features: {text}");
    Ok(bits)
}

/// Sends 2 MiB to the guest and gets them back, compared byte by byte: segments that are cut or summed wrongly do not get through. The
/// host listens on the first of `addresses`, which the guest knows as the second. When half is sent, `between` is done.
pub(super) fn tcp_both_ways(
    guest: &LinuxVm,
    addresses: (Ipv4Addr, Ipv4Addr),
    between: impl FnOnce() -> Result<()> + Send,
) -> Result<()> {
    let content = pattern(5, 2 << 20);
    let listener = TcpListener::bind((addresses.0, 0)).context("cannot listen on the host's address")?;
    let target = format!("{} {}", addresses.1, listener.local_addr()?.port());
    let command = |script: &str| Exec::shell(&format!("nc {target} {script}")).timeout(TRANSFER);
    // The network namespace is this thread's, and passes to those that it starts.
    let talked = thread::scope(|scope| -> Result<()> {
        let serving = scope.spawn(|| serve(&listener, &content, between));
        guest.agent().check(&command("> /tmp/down < /dev/null"))?;
        ensure!(
            guest.agent().get("/tmp/down")? == content,
            "the guest got something else"
        );
        guest.agent().check(&command("< /tmp/down > /tmp/ack"))?;
        let received = serving.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
        ensure!(received == content, "the host got something else");
        Ok(())
    });
    talked.with_context(|| format!("the VMM's last words:{}", guest.vm().last_words()))
}

/// Sends `content` to a first client, with `between` in the midst of it, and gives what a second one sends.
fn serve(listener: &TcpListener, content: &[u8], between: impl FnOnce() -> Result<()>) -> Result<Vec<u8>> {
    let (mut first, _) = listener.accept()?;
    first.set_write_timeout(Some(TRANSFER))?;
    let (sooner, later) = content.split_at(content.len() / 2);
    first.write_all(sooner)?;
    between()?;
    first.write_all(later)?;
    first.shutdown(Shutdown::Write)?;
    let (mut second, _) = listener.accept()?;
    second.set_read_timeout(Some(TRANSFER))?;
    let mut received = vec![0; content.len()];
    second.read_exact(&mut received)?;
    Ok(received)
}
