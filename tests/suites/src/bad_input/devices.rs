//! Disks, and what else is a file.

use super::{WITHOUT_RIGHTS, builder, each, each_fails, failed, give_away, payload_tests, refused, surrounded, text};
use crate::payload::guest::Guest;
use anyhow::Result;
use std::path::Path;
use triarch_harness::disk::DiskImage;
use triarch_harness::pci;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("bad_input":
    disks,
    disks_of_others,
    disk_in_use,
    entropy_sources,
    functions_that_are_none,
    identities,
);

fn path(path: &Path) -> String {
    format!("path={}", path.display())
}

fn disks(context: &Context) -> Result<Outcome> {
    let dir = text(&context.dir)?;
    let odd = DiskImage::empty(context.dir.join("odd"), 1000)?;
    let empty = DiskImage::empty(context.dir.join("empty"), 0)?;
    let disk = DiskImage::empty(context.dir.join("disk"), 1 << 20)?;
    let good = path(disk.path());
    let missing = format!("path={dir}/missing");
    each_fails(
        context,
        "--disk",
        &[
            (&missing, &[&missing["path=".len()..], "does not exist", "create it"]),
            (&format!("path={dir}"), &[dir, "is a directory", "block device"]),
            (&path(odd.path()), &["odd", "1000 bytes", "512"]),
            (&path(empty.path()), &["is empty", "truncate"]),
            ("path=/dev/null", &["/dev/null", "character device"]),
        ],
    )?;
    each(
        context,
        "--disk",
        &[
            ("readonly=on", &["disks[0].path is missing", "a file or a block device"]),
            ("path=", &["disks[0].path is missing", "a file or a block device"]),
            (text(disk.path())?, &["not key=value", "path"]),
            (&format!("{good},queue_size=3"), &["queue_size is 3", "power of two"]),
            (&format!("{good},queue_size=70000"), &["queue_size=70000", "too large"]),
            (&format!("{good},num_queues=0"), &["num_queues is 0", "between 1"]),
            (
                &format!("{good},num_queues=some"),
                &["num_queues=some", "no whole number"],
            ),
            (&format!("{good},serial=123456789012345678901"), &["at most 20"]),
            (&format!("{good},image_type=qcow2"), &["qcow2", "raw"]),
            (&format!("{good},speed=fast"), &["speed", "readonly"]),
        ],
    )?;
    let twice = builder(context)?.disk(disk.path(), "").disk(disk.path(), "");
    refused(
        context,
        twice,
        &["disks[1].path", text(disk.path())?, "make both readonly"],
    )?;
    Ok(Outcome::Passed)
}

fn disks_of_others(context: &Context) -> Result<Outcome> {
    let disk = DiskImage::empty(context.dir.join("disk"), 1 << 20)?;
    if let Some(why) = give_away(disk.path()) {
        return Ok(Outcome::Skipped(why));
    }
    match surrounded(context, "without-rights", WITHOUT_RIGHTS)? {
        Err(why) => Ok(Outcome::Skipped(why)),
        Ok(context) => each_fails(
            &context,
            "--disk",
            &[(
                &path(disk.path()),
                &["no permission", text(disk.path())?, "owner or mode"],
            )],
        ),
    }
}

fn disk_in_use(context: &Context) -> Result<Outcome> {
    let disk = DiskImage::empty(context.dir.join("disk"), 1 << 20)?;
    let _first = Guest::start(builder(context)?.disk(disk.path(), ""))?;
    let words = ["in use", text(disk.path())?, "readonly=on"];
    failed(context, builder(context)?.disk(disk.path(), ""), &words)?;
    failed(context, builder(context)?.disk(disk.path(), "readonly=on"), &words)?;
    Ok(Outcome::Passed)
}

fn entropy_sources(context: &Context) -> Result<Outcome> {
    let dir = format!("src={}", context.dir.display());
    each_fails(
        context,
        "--rng",
        &[
            ("src=/nonexistent", &["/nonexistent", "No such file", "/dev/urandom"]),
            (&dir, &["is a directory", "/dev/urandom"]),
        ],
    )?;
    each(
        context,
        "--rng",
        &[
            ("src=", &["rng.src is empty", "/dev/urandom"]),
            ("/dev/urandom", &["not key=value", "src"]),
        ],
    )
}

fn identities(context: &Context) -> Result<Outcome> {
    each(
        context,
        "--platform",
        &[
            ("uuid=1", &["'1'", "8-4-4-4-12"]),
            ("uuid=zzzzzzzz-0000-0000-0000-000000000000", &["zzzzzzzz", "8-4-4-4-12"]),
            ("uid=1", &["'uid'", "uuid"]),
            ("oem_strings=[a,b", &["[a,b", "not closed"]),
        ],
    )?;
    let [one, two] = ["one", "two"].map(|name| DiskImage::empty(context.dir.join(name), 1 << 20));
    let (one, two) = (one?, two?);
    let same = builder(context)?.disk(one.path(), "id=a").disk(two.path(), "id=a");
    refused(context, same, &["id 'a'", "each its own"])?;
    let reserved = builder(context)?.disk(one.path(), "id=__disk7");
    refused(context, reserved, &["'__disk7'", "leading '__'"])?;
    let vm = builder(context)?;
    let vsock = format!("cid=3,id=a,socket={}", vm.dir().join("v.sock").display());
    let kinds = vm.disk(one.path(), "id=a").flag("--vsock", vsock);
    refused(context, kinds, &["id 'a'", "each its own"])?;
    Ok(Outcome::Passed)
}

fn functions_that_are_none(context: &Context) -> Result<Outcome> {
    if let Some(why) = pci::unable(&context.triarch)? {
        return Ok(Outcome::Skipped(why));
    }
    let dir = text(&context.dir)?;
    each_fails(
        context,
        "--device",
        &[
            (
                &format!("path={dir}/missing"),
                &["there is no device", "missing", "/sys/bus/pci/devices"],
            ),
            (&format!("path={dir}"), &["there is no device", dir]),
            ("path=/dev/null", &["there is no device", "/dev/null"]),
        ],
    )
}
