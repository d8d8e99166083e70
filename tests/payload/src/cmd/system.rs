//! Commands about the machine: greeting, ACPI, time, processors, power.

use crate::acpi::Affinity;
use crate::arch::{NAME, commands, interrupts::processor_id, power};
use crate::clock::{self, Deadline};
use crate::interrupts::WAKE_VECTOR;
use crate::shell::{Args, Reply};
use crate::{Guest, interrupts, smp};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

/// `hello`
pub fn hello(guest: &Guest) -> Reply {
    let platform = &guest.platform;
    Ok(format!(
        "triarch-payload arch={NAME} ram={} modules={} cpu={} cmdline={}",
        platform.ram(),
        platform.modules,
        processor_id(),
        platform.cmdline
    ))
}

/// `acpi`
pub fn acpi(guest: &Guest) -> Reply {
    let acpi = guest.acpi()?;
    let enabled = acpi.processors.iter().filter(|processor| processor.enabled).count();
    let mut text = format!(
        "tables={} processors={} enabled={enabled}",
        acpi.tables.join(","),
        acpi.processors.len()
    );
    if let Some((base, last)) = acpi.ecam {
        let _ = write!(text, " ecam={base:#x} buses={}", u16::from(last) + 1);
    }
    if let Some((port, value)) = acpi.reset {
        let _ = write!(text, " reset={port:#x}:{value:#x}");
    }
    if let Some(port) = acpi.sleep_control {
        let _ = write!(text, " sleep={port:#x}");
    }
    let _ = write!(text, " reduced={}", u8::from(acpi.hardware_reduced));
    Ok(text)
}

/// `numa`: processors and memory with their nodes, `!` before what may come only later, then rows of distances.
pub fn numa(guest: &Guest) -> Reply {
    let acpi = guest.acpi()?;
    let mut text = String::new();
    for affinity in &acpi.affinities {
        let _ = match *affinity {
            Affinity::Processor(id, node) => write!(text, "cpu{id}@{node} "),
            Affinity::Memory(base, size, node, later) => {
                write!(text, "{}{base:#x}+{size:#x}@{node} ", if later { "!" } else { "" })
            }
        };
    }
    let Some((count, distances)) = &acpi.distances else {
        return Ok(format!("{text}no distances"));
    };
    let rows = distances.chunks((*count).max(1) as usize);
    let rows: Vec<String> = rows
        .map(|row| row.iter().map(|far| format!("{far},")).collect())
        .collect();
    Ok(format!("{text}{}", rows.join(" ")))
}

/// `sleep MS`: halted, woken by the timer; answers how long it took in microseconds.
pub fn sleep(args: &mut Args) -> Reply {
    let ms = args.number_to("MS", 600_000)?;
    let start = clock::ticks();
    let deadline = Deadline::after_ms(ms);
    while let Some(left) = deadline.left() {
        interrupts::sleep(0, interrupts::count(0), left);
    }
    Ok(format!("us={}", clock::nanoseconds(clock::ticks() - start) / 1000))
}

/// `count VECTOR`
pub fn count(args: &mut Args) -> Reply {
    let vector = args.number_to("VECTOR", 255)?;
    Ok(format!("{}", interrupts::count(vector as u8)))
}

fn start_processors(guest: &mut Guest) -> Result<&[smp::Processor], String> {
    if guest.processors.is_none() {
        let acpi = guest.acpi()?;
        let ids: Vec<u64> = acpi
            .processors
            .iter()
            .filter(|processor| processor.enabled)
            .map(|processor| processor.id)
            .collect();
        guest.processors = Some(smp::start_all(&ids)?);
    }
    Ok(guest.processors.as_deref().unwrap_or_default())
}

/// `cpus`
pub fn cpus(guest: &mut Guest) -> Reply {
    let processors = start_processors(guest)?;
    let mut text = format!("count={} ids={}", processors.len() + 1, processor_id());
    for processor in processors {
        let _ = write!(text, ",{}", processor.id);
    }
    Ok(text)
}

/// `ipi [ROUNDS]`
pub fn ipi(guest: &mut Guest, args: &mut Args) -> Reply {
    let rounds = args.number("ROUNDS").unwrap_or(1);
    let processors = start_processors(guest)?;
    let start = clock::ticks();
    for _ in 0..rounds {
        for processor in processors {
            processor.ping()?;
        }
    }
    let total = rounds * processors.len() as u64;
    Ok(format!(
        "sent={total} vector={WAKE_VECTOR:#x} us={}",
        clock::nanoseconds(clock::ticks() - start) / 1000
    ))
}

/// `pm WAY`: no answer when it works.
pub fn pm(guest: &Guest, args: &mut Args) -> Reply {
    match args.word("what")? {
        "halt" => power::park(),
        way => commands::power(guest.acpi(), way)?,
    }
    // The VMM may act a little later.
    let deadline = Deadline::after_ms(1000);
    while let Some(left) = deadline.left() {
        interrupts::sleep(0, interrupts::count(0), left);
    }
    Err("still running".into())
}
