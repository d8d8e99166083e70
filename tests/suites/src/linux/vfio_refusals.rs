//! Devices of the host that a guest cannot have, and what a guest that has one cannot do.

use super::load::LIMIT;
use super::vfio::{LONG, NVME, ONE_GROUP, guest_with, with};
use crate::bad_input::failed;
use anyhow::{Context as _, Result, ensure};
use rustix::process::{Resource, Rlimit, setrlimit};
use serde_json::json;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use triarch_harness::api::Api;
use triarch_harness::images::Kernel;
use triarch_harness::jobs::wait;
use triarch_harness::pci::Function;
use triarch_harness::suite::{Context, Outcome, Test};
use triarch_harness::vm::{Vm, VmBuilder};

pub const TESTS: &[Test] = &[
    Test::nested("vfio::what_cannot_be_had_is_refused", refusals).within(LONG),
    Test::nested("vfio::too_little_memory_may_be_locked", locked).within(LONG),
    Test::nested("vfio::a_guest_with_a_device_stays", stays).within(LONG),
];

/// A user without any right.
const USER: u32 = 4711;

/// A guest without a device.
fn builder(context: &Context) -> Result<VmBuilder> {
    let kernel = context.images.path(&Kernel::V6_1.elf())?;
    let initramfs = context.images.path(&Kernel::V6_1.initramfs())?;
    Ok(VmBuilder::new(context)?
        .flag("--kernel", kernel)
        .flag("--initramfs", initramfs)
        .flag("--serial", "null")
        .flag("--console", "off")
        .memory_mib(256))
}

/// The API of a VMM that has started its VM, for what takes its time: all of the guest's memory is locked for a device.
fn there(vm: &Vm) -> Result<Api> {
    let api = vm.api()?.within(LIMIT);
    wait("there is no VM", LIMIT, || {
        Ok(api.request("GET", "vm.info", None)?.is_success().then_some(()))
    })?;
    Ok(api)
}

fn refusals(context: &Context) -> Result<Outcome> {
    let places = [NVME, ONE_GROUP[0], ONE_GROUP[1]];
    with(context, &places, |functions| {
        let [disk, first, second] = functions else {
            return Ok(());
        };
        let absent = Function::at("0000:00:1d.7");
        // It is said at the start, and to whoever adds one later.
        let vm = builder(context)?.api().start()?;
        let api = there(&vm)?;
        let refused = |device: &Function, words: &[&str]| -> Result<()> {
            let path = device.path();
            let flag = format!("path={}", path.display());
            failed(context, builder(context)?.flag("--device", flag), words).with_context(|| format!("{words:?}"))?;
            let answer = api.request("PUT", "vm.add-device", Some(&json!({ "path": path }).to_string()))?;
            ensure!(!answer.is_success(), "{} {}", answer.status, answer.body);
            for word in words {
                ensure!(answer.body.contains(word), "no `{word}` in {}", answer.body);
            }
            Ok(())
        };
        refused(&absent, &["there is no device at", absent.place()])?;
        disk.give_to("nvme")?;
        let bind = format!("echo vfio-pci > {}/driver_override", disk.path().display());
        refused(disk, &[disk.place(), "driver nvme", &bind])?;
        disk.release()?;
        refused(disk, &[disk.place(), "no driver", &bind])?;
        // Two in one group: one stays the host's.
        second.give_to("nvme")?;
        refused(first, &[first.place(), "group", second.place(), "nvme"])?;
        second.spare()?;
        // One guest has it, another one wants it.
        disk.spare()?;
        api.put("vm.add-device", Some(&json!({ "path": disk.path() }).to_string()))?;
        let flag = format!("path={}", disk.path().display());
        failed(
            context,
            builder(context)?.flag("--device", flag),
            &[disk.place(), "in use"],
        )?;
        let again = api.request(
            "PUT",
            "vm.add-device",
            Some(&json!({ "path": disk.path() }).to_string()),
        )?;
        ensure!(!again.is_success() && again.body.contains("once"), "{}", again.body);
        Ok(())
    })
}

/// All of a guest's memory is locked, which not every user may do: the number needed is told before the guest starts.
fn locked(context: &Context) -> Result<Outcome> {
    with(context, &[NVME], |functions| {
        let group = fs::read_link(functions[0].path().join("iommu_group"))?;
        let group = group.file_name().context("no group")?;
        for device in [&format!("/dev/vfio/{}", group.to_string_lossy()), "/dev/kvm"] {
            fs::set_permissions(device, Permissions::from_mode(0o666))?;
        }
        fs::set_permissions(&context.dir, Permissions::from_mode(0o755))?;
        let limit = |mib: u64| {
            let bytes = Some(mib << 20);
            setrlimit(
                Resource::Memlock,
                Rlimit {
                    current: bytes,
                    maximum: bytes,
                },
            )
        };
        let flag = format!("path={}", functions[0].path().display());
        let vm = |user: u32| -> Result<VmBuilder> { Ok(builder(context)?.flag("--device", &flag).user(user)) };
        limit(1024)?;
        // Enough: it is there.
        let there = vm(USER)?.api().start()?;
        self::there(&there)?;
        drop(there);
        limit(64)?;
        failed(context, vm(USER)?, &["lock", "256 MiB", "64 MiB"])
    })
}

/// Nobody carries what a device holds to another process.
fn stays(context: &Context) -> Result<Outcome> {
    with(context, &[NVME], |functions| {
        let vm = guest_with(context, Kernel::V6_1, functions)?.start()?;
        let api = there(&vm)?;
        let to = vm.dir().join("snapshot");
        let snapshot = json!({ "destination_url": format!("file://{}", to.display()) });
        let socket = vm.dir().join("migration.sock");
        let migration = json!({ "destination_url": format!("unix:{}", socket.display()) });
        api.put("vm.pause", None)?;
        for (route, body) in [("vm.snapshot", snapshot), ("vm.send-migration", migration)] {
            let answer = api.request("PUT", route, Some(&body.to_string()))?;
            ensure!(!answer.is_success(), "{route}: {} {}", answer.status, answer.body);
            ensure!(answer.body.contains("host0"), "{route}: {}", answer.body);
        }
        ensure!(!to.exists(), "a snapshot was begun");
        api.put("vm.resume", None).map(drop)
    })
}
