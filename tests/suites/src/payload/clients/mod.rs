//! Clients that speak as those in the field do, byte by byte, and read as strictly: whoever drives Cloud Hypervisor drives this.
//!
//! Each takes a VM through its whole life with a tap that it opened itself.

pub(crate) mod curl;
mod kata_go;
mod kata_rust;
mod libvirt;

use super::guest::builder;
use super::payload_tests;
use anyhow::{Result, ensure};
use serde_json::Value;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use triarch_harness::disk::DiskImage;
use triarch_harness::net::{self, Tap};
use triarch_harness::suite::{Context, Outcome};
use triarch_harness::vm::{Vm, VmBuilder};

payload_tests!("clients":
    kata_in_go_is_served,
    kata_in_rust_is_served,
    libvirt_is_served,
    curl_is_served_as_libvirt_uses_it,
);

/// What the guest prints when it runs.
const READY: &str = "triarch-payload ready";
const MEMORY: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(8);

/// A VMM that waits for its client, and what the client brings.
struct Field {
    vm: Vm,
    socket: PathBuf,
    kernel: String,
    disk: String,
    /// A tap, opened once for each of its queue pairs.
    tap: Vec<File>,
}

impl Field {
    /// The process is started as agents do it: with a socket and nothing else.
    fn prepare(context: &Context, pairs: usize) -> Result<Self> {
        net::enter_namespace()?;
        let tap = Tap::create(
            "tap0",
            Ipv4Addr::new(10, 9, 8, 1),
            Ipv4Addr::new(255, 255, 255, 0),
            pairs > 1,
        )?;
        let files: Result<Vec<_>, _> = (0..pairs).map(|_| net::attach(tap.name(), pairs > 1)).collect();
        let vm = VmBuilder::new(context)?.api();
        let disk = DiskImage::with(vm.dir().join("disk"), &[7; 1 << 20])?;
        let vm = vm.start()?;
        Ok(Self {
            socket: vm.api()?.socket().to_owned(),
            kernel: context.images.path(super::guest::IMAGE)?.display().to_string(),
            disk: disk.path().display().to_string(),
            tap: files?,
            vm,
        })
    }

    fn path(&self, name: &str) -> String {
        self.vm.dir().join(name).display().to_string()
    }

    /// Waits for the guest's first line on the VMM's standard output.
    fn wait_for_guest(&self) -> Result<()> {
        self.vm.output().wait_for(READY, 0, PATIENCE).map(drop)
    }
}

/// Runs a client, where taps can be made.
fn with_field(context: &Context, pairs: usize, client: impl FnOnce(&mut Field) -> Result<()>) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    // It is what tests of the payload stand on; without it they are skipped here, too.
    drop(builder(context)?);
    let mut field = Field::prepare(context, pairs)?;
    client(&mut field)?;
    field.vm.expect_end(0)?;
    Ok(Outcome::Passed)
}

fn kata_in_go_is_served(context: &Context) -> Result<Outcome> {
    with_field(context, 2, kata_go::drive)
}

fn kata_in_rust_is_served(context: &Context) -> Result<Outcome> {
    with_field(context, 1, kata_rust::drive)
}

fn libvirt_is_served(context: &Context) -> Result<Outcome> {
    with_field(context, 1, libvirt::drive)
}

fn curl_is_served_as_libvirt_uses_it(context: &Context) -> Result<Outcome> {
    if !curl::exists() {
        return Ok(Outcome::Skipped("curl is not installed".into()));
    }
    with_field(context, 1, curl::drive)
}

/// The value at `pointer`, which has to be there and of the kind that `kind` accepts.
fn required<'v>(info: &'v Value, pointer: &str, kind: impl Fn(&Value) -> bool) -> Result<&'v Value> {
    let value = info.pointer(pointer).filter(|value| kind(value));
    value.ok_or_else(|| anyhow::anyhow!("{pointer} is missing or of the wrong kind: {info}"))
}

fn state(info: &Value, expected: &str) -> Result<()> {
    ensure!(info["state"] == expected, "the VM is not {expected}: {info}");
    Ok(())
}

/// Fails when `what` took longer than the client waits.
fn within(what: &str, limit: Duration, since: Instant) -> Result<()> {
    let took = since.elapsed();
    ensure!(took <= limit, "{what} took {took:?}, the client waits {limit:?}");
    Ok(())
}
