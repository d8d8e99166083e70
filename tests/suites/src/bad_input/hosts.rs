//! Hosts that cannot run a VM.

use super::{HOST, builder, ended, failed, payload_tests, surrounded};
use anyhow::{Context as _, Result};
use triarch_harness::suite::{Context, Outcome};

payload_tests!("bad_input":
    hosts_without_kvm,
    few_descriptors,
);

/// The command that runs what follows it with a /dev of its own, made by `script`.
fn with_dev(script: &str, runner: &str) -> String {
    format!("exec unshare -m sh -ec 'mount -t tmpfs none /dev; {script}; exec {runner} \"$@\"' sh")
}

fn hosts_without_kvm(context: &Context) -> Result<Outcome> {
    let weak = "setpriv --bounding-set=-dac_override,-dac_read_search";
    let remedy = match std::env::consts::ARCH {
        "aarch64" => "start this host's kernel at EL2",
        _ => "load the kvm module",
    };
    let cases: [(&str, &str, &str, &[&str]); 5] = [
        ("missing", "true", "", &["/dev/kvm does not exist", remedy]),
        (
            "no-driver",
            "mknod /dev/kvm c 10 9999",
            "",
            &["/dev/kvm does not exist", remedy],
        ),
        (
            "forbidden",
            "mknod -m 600 /dev/kvm c 10 232; chown 65533 /dev/kvm",
            weak,
            &["/dev/kvm may not be opened", "group kvm"],
        ),
        (
            "null",
            "mknod /dev/kvm c 1 3",
            "",
            &["/dev/kvm is there but is not KVM", "check what"],
        ),
        (
            "directory",
            "mkdir /dev/kvm",
            "",
            &["/dev/kvm cannot be opened", "Is a directory"],
        ),
    ];
    for (name, script, runner, words) in cases {
        match surrounded(context, name, &with_dev(script, runner))? {
            Err(why) => return Ok(Outcome::Skipped(why)),
            Ok(context) => ended(&context, builder(&context)?, HOST, words).context(name)?,
        }
    }
    Ok(Outcome::Passed)
}

/// Whatever the first descriptor is that the process may not have any more, it says so and goes.
fn few_descriptors(context: &Context) -> Result<Outcome> {
    let disk = triarch_harness::disk::DiskImage::empty(context.dir.join("disk"), 1 << 20)?;
    // With three it cannot even be loaded on every system; with 14 the last devices are made.
    for limit in 5..=14 {
        let name = format!("limit-{limit}");
        let few = match surrounded(context, &name, &format!("ulimit -n {limit}; exec"))? {
            Err(why) => return Ok(Outcome::Skipped(why)),
            Ok(context) => context,
        };
        let vm = builder(&few)?;
        let vsock = format!("cid=3,socket={}", vm.dir().join("v.sock").display());
        let vm = vm.disk(disk.path(), "").flag("--vsock", vsock);
        failed(&few, vm, &["Too many open files"]).context(name)?;
    }
    Ok(Outcome::Passed)
}
