//! Commands that only this architecture has: port I/O, MSRs, CPUID, the PC's clocks; and its ways to end.

use super::clock;
use super::io::{inb, inl, inw, outb, outl, outw};
use super::{ring0, uart};
use crate::acpi::Acpi;
use crate::shell::{Args, Reply};
use alloc::format;
use alloc::string::String;

/// Runs `command` if it is one of these.
pub fn run(command: &str, args: &mut Args) -> Option<Reply> {
    Some(match command {
        "outs" => Ok(string_io(args)),
        "time" => Ok(time()),
        "cpuid" => cpuid(args),
        "msr" => msr(args),
        "port" => port(args),
        _ => return None,
    })
}

/// `outs TEXT`
fn string_io(args: &Args) -> String {
    let text = args.rest();
    uart::write_string_io(&text);
    uart::write("\n");
    format!("{}", text.len())
}

fn cmos(register: u8) -> u8 {
    outb(0x70, register);
    inb(0x71)
}

/// `time`
fn time() -> String {
    let pm = clock::measure_by_pm_timer();
    let apic = clock::measure_by_apic_timer();
    let binary = cmos(0xb) & 4 != 0;
    let number = |register| {
        let value = cmos(register);
        if binary {
            value
        } else {
            (value >> 4) * 10 + (value & 15)
        }
    };
    let (century, year, month, day) = (number(0x32), number(9), number(8), number(7));
    let pm = pm.map_or_else(|| String::from("none"), |khz| format!("{khz}"));
    format!(
        "khz={pm} khz_timer={apic} ticks={} pm={} rtc={century:02}{year:02}-{month:02}-{day:02}T{:02}:{:02}:{:02}",
        clock::ticks(),
        clock::pm_timer(),
        number(4),
        number(2),
        number(0)
    )
}

/// `cpuid LEAF [SUBLEAF]`
fn cpuid(args: &mut Args) -> Reply {
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
fn msr(args: &mut Args) -> Reply {
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
fn port(args: &mut Args) -> Reply {
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

/// Ends the machine: `off|reset|i8042|cf9|triple`. Returns when the VMM did not act yet.
pub fn power(acpi: Result<&Acpi, String>, way: &str) -> Result<(), String> {
    const SLEEP_CONTROL: u16 = 0x600;
    const S5: u8 = 0x34;
    match way {
        "off" => outb(
            acpi.ok().and_then(|acpi| acpi.sleep_control).unwrap_or(SLEEP_CONTROL),
            S5,
        ),
        "reset" => {
            let (port, value) = acpi?.reset.ok_or("no reset register")?;
            outb(port, value);
        }
        "i8042" => outb(0x64, 0xfe),
        "cf9" => outb(0xcf9, 6),
        "triple" => ring0::triple_fault(),
        other => return Err(format!("pm {other}?")),
    }
    Ok(())
}
