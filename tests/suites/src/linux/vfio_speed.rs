//! What a guest's I/O on a device of the host costs: no exit to the VMM, and what the guest takes longer than the host.

use super::vfio::{LONG, NVME, disks, guest_with, with};
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::process::Command;
use std::time::Duration;
use triarch_guest_init::reading::{self, Seen};
use triarch_harness::images::Kernel;
use triarch_harness::linux::LinuxVm;
use triarch_harness::process::run;
use triarch_harness::suite::{Context, Outcome, SECONDS, Test, figure, number};

pub const TESTS: &[Test] = &[Test::nested("vfio::a_disk_that_works_never_leaves_the_guest", works_alone).within(LONG)];

/// Where KVM shows what it counts of all guests, in debugfs.
const KVM: &str = "/sys/kernel/debug/kvm";
/// Requests in flight: one, where the way there and back counts, and many.
const THREADS: [u32; 2] = [1, 16];

/// What has been counted so far of exits.
#[derive(Clone, Copy, Debug)]
struct Exits {
    /// To the VMM, for registers of devices.
    registers: u64,
    /// Of those, for registers of the device of the host.
    device: u64,
    /// To KVM, of all kinds, if it tells.
    all: Option<u64>,
}

impl Exits {
    fn of(guest: &LinuxVm) -> Result<Self> {
        let metrics = guest.vm().api()?.request("GET", "metrics", None)?.body;
        let sum = |name: &str, words: &[&str]| -> Result<u64> {
            let lines = metrics.lines().filter(|line| line.starts_with(name));
            let wanted = lines.filter(|line| words.iter().any(|word| line.contains(&format!("\"{word}\""))));
            let values: Vec<u64> = wanted
                .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
                .collect();
            ensure!(!values.is_empty(), "no {name} in {metrics}");
            Ok(values.iter().sum())
        };
        let kinds = ["mmio_read", "mmio_write", "port_read", "port_write"];
        Ok(Self {
            registers: sum("triarch_vcpu_exits_total", &kinds)?,
            device: sum("triarch_passthrough_register_accesses_total", &["host0"])?,
            all: fs::read_to_string(format!("{KVM}/exits"))
                .ok()
                .and_then(|text| text.trim().parse().ok()),
        })
    }
}

/// Blocks in a second.
fn rate(seen: Seen) -> f64 {
    seen.requests as f64 / seen.time.as_secs_f64()
}

fn understood(said: &str) -> Result<Seen> {
    reading::parse(said).with_context(|| format!("no figures: {said}"))
}

/// Once it runs the VMM has nothing to do with its I/O. With `TRIARCH_SECONDS` this is the benchmark: it takes that long each time, and the
/// host reads the same disk before.
fn works_alone(context: &Context) -> Result<Outcome> {
    with(context, &[NVME], |functions| {
        // Where it is mounted already, or not there, nothing is lost.
        let _ = run(Command::new("mount").args(["-t", "debugfs", "none", "/sys/kernel/debug"]));
        let seconds = number(SECONDS);
        let time = Duration::from_secs(seconds.unwrap_or(1).into()).as_millis().to_string();
        let own = |threads: u32| -> Result<Seen> {
            let disk = functions[0].disk()?;
            let words = ["disk-read", &disk.display().to_string(), &threads.to_string(), &time];
            understood(&run(Command::new("/init").args(words))?)
        };
        let host = match seconds {
            Some(_) => THREADS.map(own).into_iter().collect::<Result<Vec<_>>>()?,
            None => Vec::new(),
        };
        functions[0].spare()?;
        let guest = guest_with(context, Kernel::V6_1, functions)?.boot()?;
        let disk = disks(&guest, 1)?.remove(0);
        // The first time pages of registers and of memory are met, and interrupts are wired.
        guest.shell(&format!("/init disk-read {disk} 16 300"))?;
        for (n, threads) in THREADS.into_iter().enumerate() {
            let before = Exits::of(&guest)?;
            let seen = understood(&guest.shell(&format!("/init disk-read {disk} {threads} {time}"))?)?;
            let after = Exits::of(&guest)?;
            let registers = after.registers - before.registers;
            ensure!(seen.requests > 100, "{seen:?}");
            ensure!(
                after.device == before.device,
                "{} register accesses took the guest to the VMM in {seen:?}",
                after.device - before.device
            );
            // Whoever asks and answers uses other devices, and the kernel compares its clocks.
            ensure!(
                registers * 20 < seen.requests,
                "{registers} exits to the VMM in {seen:?}"
            );
            let each = |count: u64| count as f64 / seen.requests as f64;
            let all = before.all.zip(after.all);
            let all = all.map_or("?".to_owned(), |(before, after)| format!("{:.2}", each(after - before)));
            let own = host.get(n).map(|seen| rate(*seen));
            let compared = own.map_or(String::new(), |own| {
                format!(", by the host {own:.0}, ratio {:.2}", rate(seen) / own)
            });
            figure(&format!(
                "reads of 4 KiB with {threads} in flight: {:.0} a second by the guest{compared}; exits for each: {all}, to the VMM {:.4}",
                rate(seen),
                each(registers)
            ))?;
        }
        guest.power_off()?;
        Ok(())
    })
}
