//! Devices of the host whose descriptors somebody hands over to a VMM that may not open them.

use super::load::{self, LIMIT};
use super::vfio::{LONG, NVME, load_on, on_host, with};
use anyhow::{Context as _, Result, ensure};
use rustix::process::{Resource, Rlimit, setrlimit};
use serde_json::json;
use std::fs::{self, File, Permissions};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use triarch_harness::images::Kernel;
use triarch_harness::linux::LinuxBuilder;
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[Test::nested("vfio::a_disk_comes_by_descriptors", by_descriptors).within(LONG)];

/// A user without any right.
const USER: u32 = 4711;

fn open(path: &str) -> Result<File> {
    let file = File::options().read(true).write(true).open(path);
    file.with_context(|| path.to_owned())
}

/// Which devices a process has open: other descriptors come and go with its clients and the guest.
fn devices(pid: u32) -> Result<Vec<String>> {
    let mut open = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // One that ends meanwhile is gone.
        let link = fs::read_link(entry?.path()).unwrap_or_default();
        let link = link.to_string_lossy().into_owned();
        open.extend(link.starts_with("/dev/").then_some(link));
    }
    open.sort();
    Ok(open)
}

/// By its group and a container, as this host's kernel has no iommufd. What is wrong is told, and nothing of it stays open.
fn by_descriptors(context: &Context) -> Result<Outcome> {
    with(context, &[NVME], |functions| {
        let function = &functions[0];
        let group = fs::read_link(function.path().join("iommu_group"))?;
        let group = format!("/dev/vfio/{}", group.file_name().context("no group")?.to_string_lossy());
        fs::set_permissions(&group, Permissions::from_mode(0o600))?;
        fs::set_permissions("/dev/kvm", Permissions::from_mode(0o666))?;
        fs::set_permissions(&context.dir, Permissions::from_mode(0o755))?;
        let all = Rlimit {
            current: None,
            maximum: None,
        };
        setrlimit(Resource::Memlock, all)?;
        let guest = LinuxBuilder::new(context, Kernel::V6_12)?
            .vm(|vm| vm.api().user(USER))
            .boot()?;
        let api = guest.vm().api()?.within(LIMIT);
        let before = devices(guest.vm().pid())?;
        let add = |body: serde_json::Value, fds: &[BorrowedFd<'_>]| {
            api.request_with("PUT", "vm.add-device", Some(&body.to_string()), fds)
        };
        let refused = |body, fds: &[BorrowedFd<'_>], words: &str| -> Result<()> {
            let answer = add(body, fds)?;
            ensure!(
                answer.status == 400 && answer.body.contains(words),
                "{words}: {} {}",
                answer.status,
                answer.body
            );
            Ok(())
        };
        let spare = || json!({ "id": "spare", "fd": 41 });
        let container = open("/dev/vfio/vfio")?;
        let (null, of_all) = (open("/dev/null")?, container.as_fd());
        refused(
            json!({ "path": function.path() }),
            &[],
            &format!("{group} cannot be opened"),
        )?;
        refused(spare(), &[], "path is missing")?;
        refused(spare(), &[null.as_fd(), of_all], "a descriptor is no device's")?;
        refused(spare(), &[of_all], "there is no descriptor of a device")?;
        let mut device = Some(open(&group)?);
        let first = device.as_ref().context("a group")?.as_fd();
        refused(spare(), &[first], "the VM has no /dev/vfio/vfio")?;
        refused(spare(), &[first, first, of_all], "several descriptors of the same kind")?;
        refused(
            json!({ "path": function.path(), "x_nv_gpudirect_clique": 16 }),
            &[first, of_all],
            "at most 15",
        )?;
        let after = devices(guest.vm().pid())?;
        ensure!(after == before, "{after:?}, not {before:?}");

        let mut table = Vec::new();
        for seed in 1..3 {
            // The first is closed here and there when there is a second: a group is open once.
            let device = device.take().map_or_else(|| open(&group), Ok)?;
            let fds = [device.as_fd(), of_all];
            // The VM keeps the container for the next device.
            let fds = if seed == 1 { &fds[..] } else { &fds[..1] };
            let answer = add(spare(), fds)?;
            ensure!(answer.status == 200, "{} {}", answer.status, answer.body);
            drop(device);
            let info = api.get("vm.info")?;
            ensure!(
                info["config"]["devices"][0]["path"] == json!(function.path()),
                "{}",
                info["config"]["devices"]
            );
            if seed == 1 {
                refused(spare(), &[null.as_fd()], "a descriptor is no device's")?;
            } else {
                guest.agent().put(load::TABLE, 0o600, &table)?;
            }
            table = load_on(&guest, seed)?;
            api.put("vm.remove-device", Some(&json!({ "id": "spare" }).to_string()))?;
            api.is_done("vm.remove-device", LIMIT, "the guest gave back 'spare'")?;
        }
        let mut after = devices(guest.vm().pid())?;
        let kept = after.iter().position(|open| open == "/dev/vfio/vfio");
        after.remove(kept.context("the VM did not keep the container")?);
        ensure!(after == before, "{after:?}, not {before:?}");
        // The host has it back, while the guest goes on.
        let data = on_host(function)?;
        guest.shell("true")?;
        guest.power_off()?;
        load::compare(&data, &table)
    })
}
