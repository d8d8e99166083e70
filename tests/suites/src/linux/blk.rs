//! Disks: what the guest reads and writes is what the host's file holds.

use anyhow::{Result, ensure};
use std::process::Command;
use triarch_harness::disk::{DiskImage, pattern};
use triarch_harness::images::Kernel;
use triarch_harness::linux::{BOOT, LinuxBuilder, LinuxVm};
use triarch_harness::process::run;
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("blk::data_matches_the_hosts_file", |c| {
        data_matches(c, Kernel::V6_1, "")
    }),
    Test::nested("blk::data_matches_on_linux_6_12", |c| {
        data_matches(c, Kernel::V6_12, "")
    }),
    Test::nested("blk::data_matches_without_io_uring", |c| {
        data_matches(c, Kernel::V6_1, "io_uring=off")
    }),
    Test::nested("blk::direct_on_a_block_device", direct_on_a_block_device),
    Test::nested("blk::discards_and_zeroes", discards),
    Test::nested("blk::read_only", read_only),
    Test::nested("blk::serial_number_and_size", serial_number),
    Test::nested("blk::several_queues", several_queues),
    Test::nested("blk::a_second_writer_is_refused", second_writer),
];

/// Size of the disk: every byte is compared several times, in a guest that may be emulated twice.
pub(super) const SIZE: usize = 2 << 20;
const KIB: usize = 1 << 10;

/// Makes an image with known content, `pattern(1)`, and a guest that has it as /dev/vda.
fn guest_with_disk(context: &Context, kernel: Kernel, cpus: u32, options: &str) -> Result<(DiskImage, LinuxVm)> {
    let image = DiskImage::with(context.dir.join("disk.img"), &pattern(1, SIZE))?;
    let guest = LinuxBuilder::new(context, kernel)?.vm(|vm| vm.cpus(cpus).disk(image.path(), options));
    Ok((image, guest.boot()?))
}

fn data_matches(context: &Context, kernel: Kernel, options: &str) -> Result<Outcome> {
    let (image, guest) = guest_with_disk(context, kernel, 1, options)?;
    read_and_write(&guest, |offset, len| image.read(offset, len))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// Reads all of a disk with content `pattern(1)`, writes to its middle, and compares with what
/// `host` reads; the write is flushed, and so has to be there while the guest still runs.
pub(super) fn read_and_write(guest: &LinuxVm, host: impl Fn(u64, usize) -> Result<Vec<u8>>) -> Result<()> {
    let mut expected = pattern(1, SIZE);
    ensure!(
        guest.agent().get("/dev/vda")? == expected,
        "the guest reads something else"
    );
    let fresh = pattern(2, 512 * KIB + 512);
    guest.agent().put("/tmp/fresh", 0o600, &fresh)?;
    // An odd place and length: no multiple of a page.
    guest.shell("dd if=/tmp/fresh of=/dev/vda bs=512 seek=1025 conv=fsync")?;
    let place = 1025 * 512;
    expected[place..place + fresh.len()].copy_from_slice(&fresh);
    ensure!(
        host(0, SIZE)? == expected,
        "the host's file differs after a flushed write"
    );
    guest.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    ensure!(
        guest.agent().get("/dev/vda")? == expected,
        "the guest reads back something else"
    );
    guest.shell("dd if=/dev/vda of=/tmp/all bs=64k iflag=direct")?;
    ensure!(guest.agent().get("/tmp/all")? == expected, "a direct read differs");
    Ok(())
}

/// A loop device of the host; gone with this value.
struct LoopDevice(String);

impl LoopDevice {
    fn new(image: &DiskImage) -> Result<Self> {
        let name = run(Command::new("losetup").arg("-f"))?;
        run(Command::new("losetup").arg(&name).arg(image.path()))?;
        Ok(Self(name))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(e) = run(Command::new("losetup").arg("-d").arg(&self.0)) {
            eprintln!("{} stays: {e:#}", self.0);
        }
    }
}

fn direct_on_a_block_device(context: &Context) -> Result<Outcome> {
    let image = DiskImage::with(context.dir.join("disk.img"), &pattern(1, SIZE))?;
    let device = match LoopDevice::new(&image) {
        Ok(device) => device,
        Err(e) => return Ok(Outcome::Skipped(format!("no loop device: {e:#}"))),
    };
    let path = std::path::Path::new(&device.0);
    let guest = LinuxBuilder::new(context, Kernel::V6_1)?
        .vm(|vm| vm.disk(path, "direct=on"))
        .boot()?;
    read_and_write(&guest, |offset, len| image.read(offset, len))?;
    guest.power_off()?;
    drop(device);
    Ok(Outcome::Passed)
}

fn discards(context: &Context) -> Result<Outcome> {
    let (image, guest) = guest_with_disk(context, Kernel::V6_1, 1, "")?;
    let before = image.allocated()?;
    guest.shell("blkdiscard -o $((256<<10)) -l $((1<<20)) /dev/vda")?;
    let mut expected = pattern(1, SIZE);
    expected[256 * KIB..1280 * KIB].fill(0);
    ensure!(
        image.read(0, SIZE)? == expected,
        "the host's file differs after a discard"
    );
    let freed = before.saturating_sub(image.allocated()?);
    ensure!(
        freed >= 768 << 10,
        "a discard of 1 MiB gave back {freed} bytes of {before}"
    );
    let limit = guest.shell("cat /sys/block/vda/queue/write_zeroes_max_bytes")?;
    ensure!(limit.parse::<u64>()? > 0, "the disk offers no WRITE_ZEROES");
    guest.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    ensure!(
        guest.agent().get("/dev/vda")? == expected,
        "the guest reads something else"
    );
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn read_only(context: &Context) -> Result<Outcome> {
    let (image, guest) = guest_with_disk(context, Kernel::V6_1, 1, "readonly=on")?;
    ensure!(
        guest.shell("cat /sys/block/vda/ro")? == "1",
        "the guest does not see that it is read-only"
    );
    ensure!(
        guest
            .shell("dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync")
            .is_err(),
        "it could be written"
    );
    ensure!(
        guest.agent().get("/dev/vda")? == pattern(1, SIZE),
        "the guest reads something else"
    );
    guest.power_off()?;
    ensure!(image.read(0, SIZE)? == pattern(1, SIZE), "the host's file has changed");
    Ok(Outcome::Passed)
}

fn serial_number(context: &Context) -> Result<Outcome> {
    let (_image, guest) = guest_with_disk(context, Kernel::V6_1, 1, "serial=tri-arch-42")?;
    ensure!(guest.shell("cat /sys/block/vda/serial")? == "tri-arch-42");
    ensure!(guest.shell("cat /sys/block/vda/size")? == (SIZE / 512).to_string());
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn several_queues(context: &Context) -> Result<Outcome> {
    let (image, guest) = guest_with_disk(context, Kernel::V6_1, 2, "num_queues=2")?;
    ensure!(
        guest.shell("ls /sys/block/vda/mq | wc -l")? == "2",
        "the guest does not see two queues"
    );
    // Each CPU has its own queue: write one half on each at the same time.
    let fresh = pattern(3, SIZE);
    guest.agent().put("/tmp/fresh", 0o600, &fresh)?;
    let half = |cpu: u32| {
        let place = cpu * 4;
        format!(
            "taskset {mask} dd if=/tmp/fresh of=/dev/vda bs=256k count=4 skip={place} seek={place} conv=fsync",
            mask = cpu + 1
        )
    };
    guest.shell(&format!("{} & first=$!; {}; wait $first", half(0), half(1)))?;
    ensure!(image.read(0, SIZE)? == fresh, "the host's file differs");
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn second_writer(context: &Context) -> Result<Outcome> {
    let (image, guest) = guest_with_disk(context, Kernel::V6_1, 1, "")?;
    let second = LinuxBuilder::new(context, Kernel::V6_1)?
        .vm(|vm| vm.disk(image.path(), ""))
        .run("true");
    let ended = second.start()?.expect_end_within(1, BOOT)?;
    ensure!(
        ended.stderr.contains("disk.img"),
        "the message does not name the file: {}",
        ended.stderr
    );
    ensure!(
        ended.stderr.contains("lock"),
        "the message does not name the lock: {}",
        ended.stderr
    );
    guest.shell("dd if=/dev/vda of=/dev/null bs=64k count=1 iflag=direct")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
