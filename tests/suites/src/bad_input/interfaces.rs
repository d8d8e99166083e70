//! Network interfaces.

use super::{STRANGER, WITHOUT_RIGHTS, builder, each, each_fails, failed, payload_tests, surrounded};
use anyhow::{Context as _, Result, ensure};
use std::net::Ipv4Addr;
use std::process::Command;
use triarch_harness::net::{self, Tap, attach, inheritable, interfaces};
use triarch_harness::suite::{Context, Outcome};

payload_tests!("bad_input":
    interface_flags,
    interface_kinds,
    taps_without_permission,
    no_tap_driver,
);

fn interface_flags(context: &Context) -> Result<Outcome> {
    each(
        context,
        "--net",
        &[
            ("num_queues=3", &["num_queues is 3", "even"]),
            ("num_queues=0", &["num_queues is 0", "between 1"]),
            ("mac=12:34", &["12:34", "six hexadecimal bytes"]),
            ("mac=01:00:00:00:00:00", &["01:00:00:00:00:00", "unicast"]),
            ("mtu=10", &["mtu is 10", "at least 68"]),
            ("ip=1.2.3,mask=255.0.0.0", &["ip=1.2.3", "IP address"]),
            ("ip=10.0.0.1", &["net[0].ip needs net[0].mask", "give both"]),
            ("mask=255.0.0.0", &["net[0].mask needs net[0].ip", "give both"]),
            ("fd=-1", &["fds is -1", "inherited descriptor"]),
            ("fd=x", &["fd=[x]", "fd=3"]),
            ("fd=[0,1],num_queues=2", &["2 descriptors", "1 queue pairs"]),
            ("tap=t,fd=0", &["both a tap and descriptors", "one of them"]),
        ],
    )?;
    each_fails(
        context,
        "--net",
        &[
            (
                "tap=a_name_that_is_too_long",
                &["a_name_that_is_too_long", "1 to 15 characters"],
            ),
            ("tap=", &["1 to 15 characters"]),
            ("fd=99", &["_net0", "descriptor 99", "not inherited"]),
            ("fd=0", &["descriptor number 1", "not an attached tap"]),
        ],
    )
}

fn interface_kinds(context: &Context) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let [address, mask] = [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(255, 0, 0, 0)];
    let used = Tap::create("used0", address, mask, false)?;
    let _user = attach(used.name(), false)?;
    Tap::create("single0", address, mask, false)?;
    let before = interfaces()?;
    each_fails(
        context,
        "--net",
        &[
            ("tap=lo", &["lo is not a tap", "ip tuntap add"]),
            ("tap=used0", &["used0 is in use", "another"]),
            ("tap=single0,num_queues=4", &["single0", "multi_queue", "num_queues=2"]),
            // Made for the VM, and gone with it.
            ("tap=new0,ip=10.0.0.2,mask=255.0.255.0", &["255.0.255.0", "netmask"]),
        ],
    )?;
    let single = inheritable(attach("single0", false)?)?;
    let other = inheritable(attach("other0", false)?)?;
    let fds = {
        use std::os::fd::AsRawFd;
        format!("fd=[{},{}]", single.as_raw_fd(), other.as_raw_fd())
    };
    each_fails(
        context,
        "--net",
        &[(&fds, &["different interfaces", "single0", "other0"])],
    )?;
    drop(other);
    ensure!(interfaces()? == before, "{:?}, before them {before:?}", interfaces()?);
    Ok(Outcome::Passed)
}

fn taps_without_permission(context: &Context) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let poor = match surrounded(context, "without-rights", WITHOUT_RIGHTS)? {
        Err(why) => return Ok(Outcome::Skipped(why)),
        Ok(context) => context,
    };
    let words = &["no interface new0", "no permission", "ip tuntap add new0"];
    each_fails(&poor, "--net", &[("tap=new0", words)])?;
    let owner = STRANGER.to_string();
    let make = ["tuntap", "add", "dev", "theirs0", "mode", "tap", "user", &owner];
    match Command::new("ip").args(make).status() {
        Ok(status) => ensure!(status.success(), "ip tuntap: {status}"),
        Err(e) => return Ok(Outcome::Skipped(format!("no interface of another user: ip: {e}"))),
    }
    let before = interfaces()?;
    let words = &["no permission to use tap theirs0", "user USER"];
    each_fails(&poor, "--net", &[("tap=theirs0", words)])?;
    ensure!(interfaces()? == before, "{:?}, before {before:?}", interfaces()?);
    Ok(Outcome::Passed)
}

fn no_tap_driver(context: &Context) -> Result<Outcome> {
    let script = "exec unshare -m sh -ec 'mount -t tmpfs none /dev; mknod -m 600 /dev/kvm c 10 232; mknod /dev/urandom c 1 9; exec \"$@\"' sh";
    match surrounded(context, "without-tun", script)? {
        Err(why) => Ok(Outcome::Skipped(why)),
        Ok(context) => failed(
            &context,
            builder(&context)?.flag("--net", "tap=t0"),
            &["/dev/net/tun", "modprobe tun"],
        )
        .context("a host without the driver")
        .map(|()| Outcome::Passed),
    }
}
