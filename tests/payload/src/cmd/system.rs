//! Commands about the machine: greeting, ACPI, time, processors, power.

use crate::clock::{self, Deadline};
use crate::io::{inb, inl, inw, outb, outl, outw};
use crate::shell::{Args, Reply};
use crate::{Guest, interrupts, ring0, serial, smp};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

/// `hello`
pub fn hello(guest: &Guest) -> Reply {
    let platform = &guest.platform;
    Ok(format!(
        "triarch-payload ram={} modules={} apic={} cmdline={}",
        platform.ram(),
        platform.modules,
        interrupts::apic_id(),
        platform.cmdline
    ))
}

/// `outs TEXT`
pub fn string_io(args: &Args) -> Reply {
    let text = args.rest();
    serial::write_string_io(&text);
    serial::write("\n");
    Ok(format!("{}", text.len()))
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

fn cmos(register: u8) -> u8 {
    outb(0x70, register);
    inb(0x71)
}

/// `time`
pub fn time() -> Reply {
    let pm = clock::measure_by_pm_timer();
    let apic = clock::measure_by_apic_timer();
    let bcd = |register| {
        let value = cmos(register);
        if cmos(0xb) & 4 == 0 {
            (value >> 4) * 10 + (value & 15)
        } else {
            value
        }
    };
    let (century, year, month, day) = (cmos(0x32), bcd(9), bcd(8), bcd(7));
    let century = if cmos(0xb) & 4 == 0 {
        (century >> 4) * 10 + (century & 15)
    } else {
        century
    };
    let pm = pm.map_or_else(|| String::from("none"), |khz| format!("{khz}"));
    Ok(format!(
        "tsc_khz_pm={pm} tsc_khz_apic={apic} tsc={} pm={} rtc={:02}{year:02}-{month:02}-{day:02}T{:02}:{:02}:{:02}",
        clock::tsc(),
        clock::pm_timer(),
        century,
        bcd(4),
        bcd(2),
        bcd(0)
    ))
}

/// `sleep MS`: halted, woken by the APIC timer; answers how long it took in microseconds.
pub fn sleep(args: &mut Args) -> Reply {
    let ms = args.number_to("MS", 600_000)?;
    let start = clock::tsc();
    let deadline = Deadline::after_ms(ms);
    while let Some(left) = deadline.left() {
        interrupts::sleep(0, interrupts::count(0), left);
    }
    Ok(format!("us={}", clock::nanoseconds(clock::tsc() - start) / 1000))
}

/// `count VECTOR`
pub fn count(args: &mut Args) -> Reply {
    let vector = args.number_to("VECTOR", 255)?;
    Ok(format!("{}", interrupts::count(vector as u8)))
}

fn start_processors(guest: &mut Guest) -> Result<&[smp::Processor], String> {
    if guest.processors.is_none() {
        let acpi = guest.acpi()?;
        let ids: Vec<u32> = acpi
            .processors
            .iter()
            .filter(|processor| processor.enabled)
            .map(|processor| processor.apic_id)
            .collect();
        guest.processors = Some(smp::start_all(&ids)?);
    }
    Ok(guest.processors.as_deref().unwrap_or_default())
}

/// `cpus`
pub fn cpus(guest: &mut Guest) -> Reply {
    let processors = start_processors(guest)?;
    let mut text = format!("count={} ids={}", processors.len() + 1, interrupts::apic_id());
    for processor in processors {
        let _ = write!(text, ",{}", processor.apic_id);
    }
    Ok(text)
}

/// `ipi [ROUNDS]`
pub fn ipi(guest: &mut Guest, args: &mut Args) -> Reply {
    let rounds = args.number("ROUNDS").unwrap_or(1);
    let processors = start_processors(guest)?;
    let start = clock::tsc();
    for _ in 0..rounds {
        for processor in processors {
            processor.ping()?;
        }
    }
    let total = rounds * processors.len() as u64;
    Ok(format!(
        "sent={total} us={}",
        clock::nanoseconds(clock::tsc() - start) / 1000
    ))
}

/// `cpuid LEAF [SUBLEAF]`
pub fn cpuid(args: &mut Args) -> Reply {
    let (leaf, subleaf) = (
        args.number_to("LEAF", u32::MAX.into())?,
        args.number("SUBLEAF").unwrap_or(0),
    );
    let found = core::arch::x86_64::__cpuid_count(leaf as u32, subleaf as u32);
    Ok(format!(
        "eax={:#x} ebx={:#x} ecx={:#x} edx={:#x}",
        found.eax, found.ebx, found.ecx, found.edx
    ))
}

/// `msr read INDEX` or `msr write INDEX VALUE`
pub fn msr(args: &mut Args) -> Reply {
    let what = args.word("read or write")?;
    let index = args.number_to("INDEX", u32::MAX.into())? as u32;
    match what {
        "read" => Ok(format!("{:#x}", ring0::rdmsr(index))),
        "write" => {
            ring0::wrmsr(index, args.number("VALUE")?);
            Ok(String::new())
        }
        other => Err(format!("msr {other}?")),
    }
}

/// `port in PORT [WIDTH]` or `port out PORT VALUE [WIDTH]`
pub fn port(args: &mut Args) -> Reply {
    let what = args.word("in or out")?;
    let port = args.number_to("PORT", 0xffff)? as u16;
    if what == "in" {
        let value = match args.number("WIDTH").unwrap_or(1) {
            1 => inb(port).into(),
            2 => inw(port).into(),
            4 => inl(port),
            other => return Err(format!("width {other}?")),
        };
        return Ok(format!("{value:#x}"));
    }
    let value = args.number_to("VALUE", u32::MAX.into())? as u32;
    match (what, args.number("WIDTH").unwrap_or(1)) {
        ("out", 1) => outb(port, value as u8),
        ("out", 2) => outw(port, value as u16),
        ("out", 4) => outl(port, value),
        _ => return Err("port in|out PORT [VALUE] [WIDTH 1|2|4]".into()),
    }
    Ok(String::new())
}

/// `pm off|reset|i8042|cf9|triple|halt`: no answer when it works.
pub fn pm(guest: &Guest, args: &mut Args) -> Reply {
    const SLEEP_CONTROL: u16 = 0x600;
    const S5: u8 = 0x34;
    match args.word("what")? {
        "off" => outb(
            guest
                .acpi()
                .ok()
                .and_then(|acpi| acpi.sleep_control)
                .unwrap_or(SLEEP_CONTROL),
            S5,
        ),
        "reset" => {
            let (port, value) = guest.acpi()?.reset.ok_or("no reset register")?;
            outb(port, value);
        }
        "i8042" => outb(0x64, 0xfe),
        "cf9" => outb(0xcf9, 6),
        "triple" => ring0::triple_fault(),
        "halt" => ring0::park(),
        other => return Err(format!("pm {other}?")),
    }
    // The VMM may act a little after the write.
    let deadline = Deadline::after_ms(1000);
    while let Some(left) = deadline.left() {
        interrupts::sleep(0, interrupts::count(0), left);
    }
    Err("still running".into())
}
