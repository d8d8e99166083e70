//! Devices that the host wants back from stock Linux guests.

use super::load::LIMIT;
use super::vfio::{LONG, NVME, disks, guest_with, with};
use anyhow::{Context as _, Result, ensure};
use std::thread::{self, JoinHandle};
use triarch_harness::api::Api;
use triarch_harness::images::Kernel;
use triarch_harness::jobs::wait;
use triarch_harness::linux::LinuxVm;
use triarch_harness::pci::Function;
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("vfio::the_host_gets_its_disk_back", given_back).within(LONG),
    Test::nested("vfio::a_paused_guest_loses_its_disk", taken).within(LONG),
];

/// Reads the disk as long as it is there.
const READ: &str =
    "(while dd if=/dev/nvme0n1 of=/dev/null bs=4k count=64 iflag=direct; do :; done) </dev/null >/dev/null 2>&1 &";

/// Somebody who takes it from VFIO, and waits until nobody has it open.
fn release(function: &Function) -> JoinHandle<Result<()>> {
    let function = function.clone();
    thread::spawn(move || function.release())
}

/// The kernel has let it go.
fn released(host: JoinHandle<Result<()>>, function: &Function) -> Result<()> {
    wait("the host still waits for it", LIMIT, || {
        Ok(host.is_finished().then_some(()))
    })?;
    host.join().ok().context("the host's thread ended badly")??;
    ensure!(function.driver().is_none(), "{function:?}");
    Ok(())
}

/// That it is wanted was told, once, and it is the guest's no more.
fn is_gone(api: &Api) -> Result<()> {
    let events = api.get("vm.events?since=0&follow=false")?;
    let mut told = events.as_array().context("no events")?.iter();
    let told = told.by_ref().filter(|event| event["event"] == "wanted").count();
    ensure!(told == 1, "told {told} times: {events}");
    let info = api.get("vm.info")?;
    let devices = info["config"]["devices"].as_array().map_or(0, Vec::len);
    ensure!(devices == 0 && info["device_tree"]["host0"].is_null(), "{info}");
    Ok(())
}

/// It works on the host again, and the guest goes on without it.
fn ends(guest: LinuxVm, function: &Function) -> Result<()> {
    guest.shell("true")?;
    let disk = function.disk()?;
    ensure!(disk.exists(), "{}", disk.display());
    guest.power_off()?;
    Ok(())
}

/// Whoever takes the disk from VFIO waits until the guest, which works with it and is asked for it, has given it back.
fn given_back(context: &Context) -> Result<Outcome> {
    with(context, &[NVME], |functions| {
        let function = &functions[0];
        let guest = guest_with(context, Kernel::V6_1, functions)?.boot()?;
        disks(&guest, 1)?;
        guest.shell(READ)?;
        let api = guest.vm().api()?.within(LIMIT);
        let host = release(function);
        released(host, function)?;
        api.is_done("vm.remove-device", LIMIT, "the guest gave back 'host0'")?;
        is_gone(&api)?;
        let left = guest.shell("ls /dev/nvme* 2>/dev/null || true")?;
        ensure!(left.is_empty(), "{left}");
        ends(guest, function)
    })
}

/// A guest that stands still cannot give anything back: it is taken when the kernel has asked a few times.
fn taken(context: &Context) -> Result<Outcome> {
    with(context, &[NVME], |functions| {
        let function = &functions[0];
        let guest = guest_with(context, Kernel::V6_1, functions)?.boot()?;
        disks(&guest, 1)?;
        let api = guest.vm().api()?.within(LIMIT);
        api.put("vm.pause", None)?;
        let host = release(function);
        released(host, function)?;
        is_gone(&api)?;
        api.put("vm.resume", None)?;
        ends(guest, function)
    })
}
