//! Sockets, file systems, and what daemons serve come and go under a stock kernel.

use super::plug::Subject;
use super::vsock::echoed;
use crate::storage::{Daemon, Program};
use crate::virtiofsd::Virtiofsd;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::net::Ipv4Addr;
use std::time::Duration;
use triarch_harness::agent::Exec;
use triarch_harness::disk::{DiskImage, pattern};
use triarch_harness::images::Kernel;
use triarch_harness::linux::{Channel, LinuxBuilder};
use triarch_harness::net::{self, Tap};
use triarch_harness::suite::{Context, Outcome, Test};
use triarch_harness::vsock;

pub const TESTS: &[Test] = &[
    Test::nested("plug::vhost_fs::all_kinds_come_and_go_under_linux_6_1", |c| {
        all_kinds(c, Kernel::V6_1)
    })
    .within(LONG),
    Test::nested("plug::vhost_fs::all_kinds_come_and_go_under_linux_6_12", |c| {
        all_kinds(c, Kernel::V6_12)
    })
    .within(LONG),
];

const LONG: Duration = Duration::from_secs(600);
const LIMIT: Duration = Duration::from_secs(60);
const SIZE: usize = 256 << 10;
const PORT: u32 = 5000;
const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 248, 1);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const GUEST: &str = "192.168.248.2";

fn all_kinds(context: &Context, kernel: Kernel) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let tap = Tap::create("tap0", HOST, MASK, false)?;
    // The agent's own vsock would stay.
    let builder = LinuxBuilder::new(context, kernel)?
        .channel(Channel::Console)
        .vm(|vm| vm.set("--memory", "size=256M,shared=on").switch("--daemons"));
    let s = Subject::boot(builder)?;
    vsock(&s).context("a vsock")?;
    file_system(context, &s).context("a file system")?;
    disks(context, &s).context("a disk")?;
    interface(&s, &tap).context("an interface")?;
    s.end()
}

fn vsock(s: &Subject) -> Result<()> {
    const FILE: &str = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio*";
    let socket = s.guest.vm().dir().join("talk.sock");
    let body = json!({ "id": "talk", "cid": 7, "socket": socket });
    let bdf = s.add("vm.add-vsock", &body, FILE)?;
    let listen = Exec::new(["/init", "vsock-echo", &PORT.to_string()]);
    s.guest.agent().detach(&listen)?;
    echoed(&vsock::connect(&socket, PORT, LIMIT)?, &pattern(1, SIZE))?;
    s.remove("talk", &bdf, FILE)?;
    ensure!(!socket.exists(), "its socket stays");
    Ok(())
}

fn file_system(context: &Context, s: &Subject) -> Result<()> {
    const FILE: &str = "/sys/bus/virtio/drivers/virtiofs/virtio*";
    let Some(mut daemon) = Virtiofsd::find(context)? else {
        return Ok(());
    };
    fs::write(daemon.shared().join("file"), pattern(2, SIZE))?;
    daemon.start()?;
    let body = json!({ "id": "files", "tag": "shared", "socket": daemon.socket() });
    // Some kernels have it built in.
    s.guest
        .shell("grep -q virtiofs /proc/filesystems || /init load virtiofs")?;
    let bdf = s.add("vm.add-fs", &body, FILE)?;
    // The driver has the device before it has looked at it, and knows its tag.
    let mount = "mount -t virtiofs shared /tmp/shared";
    s.guest.shell(&format!(
        "mkdir -p /tmp/shared; n=0; until {mount}; do n=$((n + 1)); [ $n -lt 100 ]; sleep 0.2; done"
    ))?;
    ensure!(
        s.guest.agent().get("/tmp/shared/file")? == pattern(2, SIZE),
        "the guest reads something else"
    );
    s.guest
        .shell("cp /tmp/shared/file /tmp/shared/copy; umount /tmp/shared")?;
    ensure!(
        fs::read(daemon.shared().join("copy"))? == pattern(2, SIZE),
        "the host reads something else"
    );
    s.remove("files", &bdf, FILE)?;
    daemon.expect_end()
}

/// A disk of a daemon, the same as a device of any type, and one of a daemon that the VMM starts.
fn disks(context: &Context, s: &Subject) -> Result<()> {
    let dir = tempfile::Builder::new().prefix("daemon").tempdir_in(&context.dir)?;
    let image = DiskImage::with(dir.path().join("disk"), &pattern(0, SIZE))?;
    let mut daemon = Daemon::find(Program::Blkd, context, dir.path(), 1).context("no triarch-blkd")?;
    daemon.start(image.path())?;
    let socket = daemon.socket().to_owned();
    let served = json!({ "id": "served", "vhost_user": true, "vhost_socket": socket });
    let any = json!({ "id": "served", "device_type": 2, "socket": socket, "queue_sizes": [64] });
    disk(s, "vm.add-disk", &served, &image, 0)?;
    disk(s, "vm.add-generic-vhost-user", &any, &image, 1)?;
    drop(daemon);
    let own = json!({ "id": "served", "path": image.path(), "backend": "blkd" });
    disk(s, "vm.add-disk", &own, &image, 2)
}

/// The guest finds the pattern of `seed` on a disk, and leaves the next one.
fn disk(s: &Subject, route: &str, body: &Value, image: &DiskImage, seed: u64) -> Result<()> {
    const FILE: &str = "/sys/block/vda";
    let what = || body.to_string();
    let bdf = s.add(route, body, FILE).with_context(what)?;
    let read = s.guest.agent().get("/dev/vda")?;
    ensure!(read == pattern(seed, SIZE), "the guest reads something else: {body}");
    let next = pattern(seed + 1, SIZE);
    s.guest.agent().put("/tmp/next", 0o600, &next)?;
    s.guest.shell("dd if=/tmp/next of=/dev/vda bs=64k conv=fsync")?;
    s.remove("served", &bdf, FILE).with_context(what)?;
    ensure!(image.read(0, SIZE)? == next, "a write is lost: {body}");
    Ok(())
}

/// An interface that triarch-netd leads to a tap.
fn interface(s: &Subject, tap: &Tap) -> Result<()> {
    const FILE: &str = "/sys/class/net/eth0";
    let body = json!({ "id": "nic", "tap": tap.name(), "backend": "netd" });
    let bdf = s.add("vm.add-net", &body, FILE)?;
    s.guest.shell(&format!(
        "ip addr add {GUEST}/24 dev eth0; ip link set eth0 up; ping -c 3 -i 0.2 -W 20 {HOST}"
    ))?;
    s.remove("nic", &bdf, FILE)?;
    net::attach(tap.name(), false).context("somebody uses the tap")?;
    Ok(())
}
