//! Devices of the host given to stock Linux guests, on emulated hosts, which have some to spare.

use super::load::{self, Load};
use anyhow::{Context as _, Result, ensure};
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use triarch_harness::agent::Power;
use triarch_harness::disk::pattern;
use triarch_harness::images::Kernel;
use triarch_harness::linux::{BANNER, BOOT, LinuxBuilder, LinuxVm};
use triarch_harness::nvme;
use triarch_harness::pci::{self, Function};
use triarch_harness::process::run;
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("vfio::nvme_data_matches_on_linux_6_1", |c| {
        data_matches(c, Kernel::V6_1, 1)
    })
    .within(LONG),
    Test::nested("vfio::nvme_data_matches_on_linux_6_12", |c| {
        data_matches(c, Kernel::V6_12, 2)
    })
    .within(LONG),
    Test::nested("vfio::a_restarted_guest_has_its_disk_again", restarts).within(LONG),
    Test::nested("vfio::a_killed_vmm_leaves_its_disk_to_the_next", killed).within(LONG),
    Test::nested("vfio::an_interface_talks", talks).within(LONG),
    Test::nested("vfio::a_virtual_function_is_a_disk", virtual_function).within(LONG),
    Test::nested("vfio::five_devices_at_once", five).within(LONG),
];

/// Places on emulated hosts (docs/test-hosts.md): a disk, two in one group, an interface, a display, a disk with virtual functions, the host's own
/// interface.
pub(super) const NVME: &str = "0000:00:05.0";
pub(super) const ONE_GROUP: [&str; 2] = ["0000:00:06.0", "0000:00:06.1"];
const NET: &str = "0000:00:08.0";
const DISPLAY: &str = "0000:00:09.0";
const PARENT: &str = "0000:01:00.0";
const PEER: &str = "0000:00:0a.0";
/// A host and a guest that are emulated, both.
pub(super) const LONG: Duration = Duration::from_secs(400);
/// How long there is load.
const ROUND: Duration = Duration::from_millis(1000);
const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 247, 1);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const GUEST: &str = "192.168.247.2";

/// Runs a test with the functions at these places, which a guest may get, or tells that there are none.
pub(super) fn with(
    context: &Context,
    places: &[&str],
    test: impl FnOnce(&[Function]) -> Result<()>,
) -> Result<Outcome> {
    if let Some(why) = pci::unavailable(&context.triarch)? {
        return Ok(Outcome::Skipped(why));
    }
    let functions: Vec<_> = places.iter().map(|place| Function::at(place)).collect();
    functions.iter().try_for_each(Function::spare)?;
    test(&functions)?;
    Ok(Outcome::Passed)
}

/// A guest that has these functions.
pub(super) fn guest_with(context: &Context, kernel: Kernel, functions: &[Function]) -> Result<LinuxBuilder> {
    let builder = LinuxBuilder::new(context, kernel)?;
    Ok(builder.vm(|vm| {
        let add = |vm: triarch_harness::vm::VmBuilder, (n, function): (usize, &Function)| {
            vm.flag("--device", format!("path={},id=host{n}", function.path().display()))
        };
        functions.iter().enumerate().fold(vm.api(), add)
    }))
}

/// Waits for the guest's NVMe disks, that many; their names.
pub(super) fn disks(guest: &LinuxVm, count: usize) -> Result<Vec<String>> {
    let script = format!(
        "for i in $(seq 600); do [ $(ls -d /dev/nvme?n1 2>/dev/null | wc -l) = {count} ] && break; usleep 100000; done; ls /dev/nvme?n1"
    );
    let said = guest.shell(&script).or_else(|_| guest.shell("dmesg | tail -n 30"))?;
    let names: Vec<_> = said.lines().map(str::to_owned).collect();
    ensure!(names.len() == count, "{count} disks, not {said}");
    Ok(names)
}

/// What the host finds on a disk, at its start.
pub(super) fn on_host(disk: &Function) -> Result<Vec<u8>> {
    let mut data = vec![0; load::BYTES];
    let path = disk.disk()?;
    // What the host has read of it before is not what the guest wrote.
    fs::write("/proc/sys/vm/drop_caches", "1")?;
    let file = File::open(path).context("the host's own disk")?;
    file.read_exact_at(&mut data, 0)?;
    Ok(data)
}

/// Which queues of the disk's for I/O have rung: `nvme0q1`, ...
const RUNG: &str = "awk '/nvme0q[1-9]/ { n = 0; for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) n += $i; if (n) print $NF }' /proc/interrupts";

/// Load on the guest's only NVMe disk, whose every byte is then known; the table of what was written.
pub(super) fn load_on(guest: &LinuxVm, seed: u64) -> Result<Vec<u8>> {
    let names = disks(guest, 1)?;
    Load::start(guest, &names[0], ROUND, seed)?.end()?;
    Ok(guest.agent().get(load::TABLE)?)
}

/// Each vCPU has a queue and an interrupt of its own.
fn data_matches(context: &Context, kernel: Kernel, cpus: u32) -> Result<Outcome> {
    with(context, &[NVME], |functions| {
        let guest = guest_with(context, kernel, functions)?.vm(|vm| vm.cpus(cpus)).boot()?;
        let table = load_on(&guest, 1)?;
        let rung = guest.shell(RUNG)?;
        ensure!(
            rung.split_whitespace().count() == cpus as usize,
            "interrupts of queues: {rung}"
        );
        let complaints = guest.shell("dmesg | grep -iE 'nvme.*(timeout|error|reset)' || true")?;
        ensure!(complaints.is_empty(), "{complaints}");
        guest.power_off()?;
        load::compare(&on_host(&functions[0])?, &table)
    })
}

/// Writes behind the known part of the disk without an end.
fn disturb(guest: &LinuxVm) -> Result<()> {
    let script = format!(
        "(while :; do dd if=/dev/zero of=/dev/nvme0n1 bs=64k seek={} count=256 oflag=direct; done) </dev/null >/dev/null 2>&1 &
        sleep 1",
        load::BYTES >> 16
    );
    guest.shell(&script).map(drop)
}

/// With requests in flight the guest resets itself: what was in flight then ends in nobody's memory, and the disk begins anew.
fn restarts(context: &Context) -> Result<Outcome> {
    with(context, &[NVME], |functions| {
        let mut guest = guest_with(context, Kernel::V6_12, functions)?.boot()?;
        let mut table = load_on(&guest, 1)?;
        for seed in 2..4 {
            disturb(&guest)?;
            guest = match seed {
                2 => guest.reboot()?,
                // As a kernel does that has no time to tell its devices.
                _ => reset_at_once(guest)?,
            };
            guest.agent().put(load::TABLE, 0o600, &table)?;
            table = load_on(&guest, seed)?;
        }
        guest.power_off()?;
        load::compare(&on_host(&functions[0])?, &table)
    })
}

pub(super) fn reset_at_once(guest: LinuxVm) -> Result<LinuxVm> {
    let before = guest.vm().output().len();
    guest.agent().power(Power::Panic)?;
    guest.vm().output().wait_for(BANNER, before, BOOT)?;
    LinuxVm::attach(guest.into_vm())
}

/// A VMM that dies lets go of the disk, whatever is in flight.
fn killed(context: &Context) -> Result<Outcome> {
    with(context, &[NVME], |functions| {
        let mut table = Vec::new();
        for seed in 1..3 {
            let guest = guest_with(context, Kernel::V6_12, functions)?.boot()?;
            if !table.is_empty() {
                guest.agent().put(load::TABLE, 0o600, &table)?;
            }
            table = load_on(&guest, seed)?;
            disturb(&guest)?;
            // As `kill -9` ends it.
            drop(guest);
        }
        load::compare(&on_host(&functions[0])?, &table)
    })
}

/// The host's own interface gets its address.
fn peer() -> Result<()> {
    let name = Function::at(PEER).interface()?;
    triarch_harness::net::add_address(&name, HOST, MASK)?;
    run(Command::new("ip").args(["link", "set", &name, "up"]))?;
    Ok(())
}

/// The guest's only interface talks to the host's.
fn ping(guest: &LinuxVm) -> Result<()> {
    guest.shell(&format!(
        "for i in $(seq 600); do [ -e /sys/class/net/eth0 ] && break; usleep 100000; done
        ip addr add {GUEST}/24 dev eth0; ip link set eth0 up; ping -c 5 -i 0.2 -s 1400 -W 30 {HOST}"
    ))?;
    Ok(())
}

fn talks(context: &Context) -> Result<Outcome> {
    with(context, &[NET], |functions| {
        peer()?;
        let guest = guest_with(context, Kernel::V6_1, functions)?.boot()?;
        ping(&guest)?;
        guest.power_off()?;
        Ok(())
    })
}

/// The guest has a virtual function of a disk whose other functions the host keeps: what one writes, the other reads.
fn virtual_function(context: &Context) -> Result<Outcome> {
    with(context, &[], |_| {
        let parent = Function::at(PARENT);
        let child = nvme::virtual_function(&parent)?;
        child.spare()?;
        let guest = guest_with(context, Kernel::V6_12, &[child])?.boot()?;
        let table = load_on(&guest, 1)?;
        guest.power_off()?;
        load::compare(&on_host(&parent)?, &table)
    })
}

/// Three disks, of which two are one group, an interface and a display.
fn five(context: &Context) -> Result<Outcome> {
    let places = [NVME, ONE_GROUP[0], ONE_GROUP[1], NET, DISPLAY];
    with(context, &places, |functions| {
        peer()?;
        let guest = guest_with(context, Kernel::V6_12, functions)?.boot()?;
        let names = disks(&guest, 3)?;
        ping(&guest)?;
        let mut written = Vec::new();
        for (n, name) in names.iter().enumerate() {
            let block = Path::new(name)
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let serial = guest.shell(&format!("cat /sys/block/{block}/device/serial"))?;
            let data = pattern(n as u64 + 1, 1 << 20);
            guest.agent().put("/tmp/data", 0o600, &data)?;
            guest.shell(&format!("dd if=/tmp/data of={name} bs=64k oflag=direct"))?;
            written.push((serial.trim().to_owned(), data));
        }
        frame_buffer(&guest)?;
        guest.power_off()?;
        written.sort();
        for ((serial, data), function) in written.iter().zip(functions) {
            let found = on_host(function)?;
            ensure!(found[..data.len()] == data[..], "another content on {serial}");
        }
        Ok(())
    })
}

/// What is written to the display's frame buffer stands there. Within 32 bytes of a page's end busybox maps the next one, too, which another
/// device's driver may have.
fn frame_buffer(guest: &LinuxVm) -> Result<()> {
    let script = "cd /sys/bus/pci/devices; d=$(grep -l 0x038000 */class); d=${d%/class}; [ -n \"$d\" ] && echo 1 >$d/enable
        set -- $(head -n 1 $d/resource); base=$1; size=$(($2-$1+1))
        for at in 0 4096 $((size-64)); do devmem $((base+at)) 32 $((at+0x1234)); done
        for at in 0 4096 $((size-64)); do [ $(($(devmem $((base+at)) 32))) = $((at+0x1234)) ] || echo $at differs; done; echo $size";
    let said = guest.shell(script)?;
    ensure!(said.trim() == (16 << 20).to_string(), "{said}");
    Ok(())
}
