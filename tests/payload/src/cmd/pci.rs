//! Commands about PCI: enumeration, BARs and their relocation, MSI-X masking.

use crate::arch::config::Ports;
use crate::dev::device_name;
use crate::pci::{self, Access, Bar, Function};
use crate::shell::{Args, Reply, parse};
use crate::{Guest, interrupts};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

/// `pci`: lists root buses and what is below, read by both ways where there are two.
pub fn list(guest: &Guest) -> Reply {
    let ports = Ports::find().map(Access::Ports);
    let last = guest.acpi().ok().and_then(|acpi| acpi.ecam).map_or(0, |(_, last)| last);
    if let Some(by_ports) = ports.map(|ports| pci::scan(ports, last))
        && by_ports.len() != guest.functions.len()
    {
        return Err(format!(
            "{} functions by ports, {} by ECAM",
            by_ports.len(),
            guest.functions.len()
        ));
    }
    let mut text = format!("functions={}", guest.functions.len());
    for function in &guest.functions {
        for (register, access) in (0..64).step_by(4).zip(ports.iter().copied().cycle()) {
            let (ecam, ports) = (function.read32(register), function.by(access).read32(register));
            if ecam != ports {
                return Err(format!(
                    "{} register {register:#x}: {ecam:#x} by ECAM, {ports:#x} by ports",
                    function.name()
                ));
            }
        }
        let (id, class) = (function.id(), function.read32(8) >> 8);
        let _ = write!(
            text,
            " {}={:04x}:{:04x}:{class:06x}",
            function.name(),
            id & 0xffff,
            id >> 16
        );
    }
    Ok(text)
}

fn find(guest: &mut Guest, args: &mut Args) -> Result<(String, usize), String> {
    let (name, index) = device_name(args.word("device")?)?;
    guest.driver(name, index)?;
    Ok((name.into(), index))
}

fn describe(bar: &Bar) -> String {
    let kind = match (bar.io, bar.wide) {
        (true, _) => "io",
        (false, true) => "m64",
        (false, false) => "m32",
    };
    format!("{}:{kind}:{:#x}+{:#x}", bar.index, bar.address, bar.size)
}

/// `bars DEV`
pub fn bars(guest: &mut Guest, args: &mut Args) -> Reply {
    let (name, index) = find(guest, args)?;
    let bars = guest.driver(&name, index)?.transport().function.bars();
    Ok(bars.iter().map(describe).collect::<Vec<_>>().join(" "))
}

/// A free, aligned place for `bar` above all other BARs of its window (or, at the window's end, below them).
fn free_place(functions: &[Function], bar: &Bar, ecam: u64) -> Result<u64, String> {
    const FOUR_GIB: u64 = 1 << 32;
    let high = bar.address >= FOUR_GIB;
    let used: Vec<Bar> = functions
        .iter()
        .flat_map(|function| function.bars())
        .filter(|other| !other.io && (other.address >= FOUR_GIB) == high)
        .collect();
    let top = used
        .iter()
        .map(|other| other.address + other.size)
        .max()
        .unwrap_or(bar.address)
        .next_multiple_of(bar.size);
    // Below 4 GiB the window ends where ECAM begins.
    if high || top + bar.size <= ecam {
        return Ok(top);
    }
    let bottom = used.iter().map(|other| other.address).min().unwrap_or(bar.address);
    bottom
        .checked_sub(bar.size)
        .map(|place| place & !(bar.size - 1))
        .ok_or_else(|| "no free place".into())
}

/// `bar-move DEV [ADDR]`: moves the BAR with the device's registers while the device runs.
pub fn move_bar(guest: &mut Guest, args: &mut Args) -> Reply {
    let (name, index) = find(guest, args)?;
    let wanted = args
        .word("ADDR")
        .ok()
        .map(|word| parse(word).ok_or("ADDR is not a number"))
        .transpose()?;
    let functions = guest.functions.clone();
    let ecam = guest.acpi()?.ecam.ok_or("no ECAM")?.0;
    let driver = guest.driver(&name, index)?;
    driver.prove().map_err(|why| format!("before the move: {why}"))?;
    let (function, number) = (driver.transport().function, driver.transport().bar);
    let bar = function
        .bars()
        .into_iter()
        .find(|bar| bar.index == number)
        .ok_or("no BAR")?;
    let place = match wanted {
        Some(place) => place,
        None => free_place(&functions, &bar, ecam)?,
    };
    let old = driver.transport().raw_common();
    let status = driver.transport().status();
    function.move_bar(&bar, place);
    driver.remap()?;
    if function.bar_address(number) != place {
        return Err(format!(
            "BAR reads {:#x} after writing {place:#x}",
            function.bar_address(number)
        ));
    }
    let left_behind = old.read32(0x14);
    if driver.transport().status() != status {
        return Err(format!(
            "status {status:#x} before, {:#x} after",
            driver.transport().status()
        ));
    }
    driver.prove().map_err(|why| format!("after the move: {why}"))?;
    Ok(format!(
        "bar={number} old={:#x} new={place:#x} size={:#x} old_reads={left_behind:#x}",
        bar.address, bar.size
    ))
}

/// `msix DEV`: an interrupt that comes while its entry, then while the function is masked stays pending and is
/// delivered on unmasking.
pub fn msix(guest: &mut Guest, args: &mut Args) -> Reply {
    let (name, index) = find(guest, args)?;
    let driver = guest.driver(&name, index)?;
    driver.prove()?;
    let victim = driver.victim();
    let (vector, entry) = driver
        .queues()
        .into_iter()
        .find(|queue| queue.index == victim)
        .map(|queue| (queue.vector, queue.msix_entry))
        .ok_or("no queue")?;
    let mut delivered = Vec::new();
    for whole in [false, true] {
        let mask = |driver: &mut dyn crate::dev::Driver, masked| {
            let msix = &driver.transport().msix;
            if whole {
                msix.mask_function(masked);
            } else {
                msix.mask(entry, masked);
            }
        };
        let before = interrupts::count(vector);
        mask(driver, true);
        // The driver sleeps in steps here: its completion comes, its interrupt does not.
        let proved = prove_polled(driver);
        // The device completes first and interrupts then.
        let deadline = crate::clock::Deadline::after_ms(1000);
        while !driver.transport().msix.is_pending(entry) && deadline.left().is_some() {
            core::hint::spin_loop();
        }
        let (pending, during) = (
            driver.transport().msix.is_pending(entry),
            interrupts::count(vector) - before,
        );
        mask(driver, false);
        proved?;
        let deadline = crate::clock::Deadline::after_ms(100);
        while interrupts::count(vector) == before {
            let Some(left) = deadline.left() else { break };
            interrupts::sleep(vector, before, left);
        }
        let after = interrupts::count(vector) - before;
        if during != 0 || !pending || after != 1 {
            let what = if whole { "function" } else { "entry" };
            return Err(format!(
                "{what} masked: pending={} during={during} after={after}",
                u8::from(pending)
            ));
        }
        delivered.push(after);
    }
    Ok(format!(
        "entry={entry} vector={vector:#x} delivered={}",
        delivered.iter().sum::<u64>()
    ))
}

/// Some work without a need for interrupts.
fn prove_polled(driver: &mut dyn crate::dev::Driver) -> Result<(), String> {
    crate::virtio::ring::SPIN_ONLY.store(true, core::sync::atomic::Ordering::Relaxed);
    let result = driver.prove();
    crate::virtio::ring::SPIN_ONLY.store(false, core::sync::atomic::Ordering::Relaxed);
    result
}
