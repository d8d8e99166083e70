//! Processors that come and go: what an operating system does by the methods in the DSDT, done by hand.

use crate::arch::io::Mmio;
use crate::arch::smp as arch;
use crate::clock::{self, Deadline};
use crate::shell::{Args, Reply};
use crate::{Guest, interrupts, pci};
use alloc::format;
use alloc::string::String;

/// Offsets of the registers that all processors share.
const COUNT: u64 = 0x0;
const NEXT: u64 = 0x4;
/// A processor's registers: its first is at this much for the first, and so much further for the next.
const STRIDE: u64 = 0x10;
const STATUS: u64 = 0x0;
const EJECT: u64 = 0x4;
const OST_EVENT: u64 = 0x8;
const OST_STATUS: u64 = 0xc;
/// Values of notices.
const CHECK: u32 = 1;
const EJECT_REQUEST: u32 = 3;
/// The event register's bit for processors.
const CPUS: u8 = 1;

struct Controller(Mmio);

impl Controller {
    fn find(guest: &Guest) -> Result<Self, String> {
        let most = guest.acpi()?.processors.len() as u64;
        pci::map_registers(arch::HOTPLUG, STRIDE * (most + 1)).map(Self)
    }

    fn read(&self, index: u32, register: u64) -> u32 {
        self.0.read32(STRIDE * (u64::from(index) + 1) + register)
    }

    fn write(&self, index: u32, register: u64, value: u32) {
        self.0.write32(STRIDE * (u64::from(index) + 1) + register, value);
    }

    fn ost(&self, index: u32, event: u32, status: u32) {
        self.write(index, OST_EVENT, event);
        self.write(index, OST_STATUS, status);
    }

    /// The next notice: processor and value.
    fn next(&self) -> Option<(u32, u32)> {
        match self.0.read32(NEXT) {
            0 => None,
            notice => Some((notice >> 8, notice & 0xff)),
        }
    }
}

/// `hot count|status|next|eject|ost|start|ping|events|serve|timed`
pub fn run(guest: &mut Guest, args: &mut Args) -> Reply {
    let cpus = Controller::find(guest)?;
    let what = args.word("what")?;
    let index = |args: &mut Args| args.number_to("INDEX", 4095).map(|index| index as u32);
    Ok(match what {
        "count" => format!("{}", cpus.0.read32(COUNT)),
        "events" => format!("{:#x}", arch::take_events()?),
        "next" => cpus.next().map_or_else(
            || String::from("none"),
            |(index, value)| format!("index={index} value={value}"),
        ),
        "status" => format!("{:#x}", cpus.read(index(args)?, STATUS)),
        "eject" => {
            cpus.write(index(args)?, EJECT, 1);
            String::new()
        }
        "ost" => {
            let index = index(args)?;
            let event = args.number_to("EVENT", u32::MAX.into())? as u32;
            cpus.ost(index, event, args.number_to("STATUS", u32::MAX.into())? as u32);
            String::new()
        }
        "start" => {
            let index = index(args)?;
            start(guest, index)?;
            String::new()
        }
        "ping" => {
            let index = index(args)?;
            let added = guest.added.iter().find(|(number, _)| *number == index);
            added.ok_or("it was not started")?.1.ping()?;
            String::new()
        }
        "serve" => serve(guest, &cpus, args)?.0,
        "timed" => {
            let (answer, us) = serve(guest, &cpus, args)?;
            format!("{answer} us={us}")
        }
        other => return Err(format!("hot {other}?")),
    })
}

/// Starts processor `index` of the MADT.
fn start(guest: &mut Guest, index: u32) -> Result<(), String> {
    let id = guest
        .acpi()?
        .processors
        .get(index as usize)
        .ok_or("no such processor")?
        .id;
    let processor = arch::start(index as usize, id)?;
    guest.added.retain(|(number, _)| *number != index);
    guest.added.push((index, processor));
    Ok(())
}

/// `hot serve N MS`: does what N notices ask for as an operating system would, and gives up after so many milliseconds. `hot timed` also
/// tells how many microseconds it took from the first interrupt on.
fn serve(guest: &mut Guest, cpus: &Controller, args: &mut Args) -> Result<(String, u64), String> {
    let wanted = args.number("N")?;
    let deadline = Deadline::after_ms(args.number_to("MS", 600_000)?);
    let (mut started, mut ejected) = (0u64, 0u64);
    let mut heard = None;
    while started + ejected < wanted {
        if deadline.left().is_none() {
            return Err(format!("started={started} ejected={ejected} and no more notices"));
        }
        if arch::take_events()? & CPUS == 0 {
            interrupts::sleep(0, interrupts::count(0), 200_000);
            continue;
        }
        heard.get_or_insert_with(clock::ticks);
        while let Some((index, value)) = cpus.next() {
            match value {
                CHECK => {
                    if cpus.read(index, STATUS) != 0xf {
                        return Err(format!("processor {index} was announced and is not there"));
                    }
                    start(guest, index)?;
                    cpus.ost(index, CHECK, 0);
                    started += 1;
                }
                EJECT_REQUEST => {
                    guest.added.retain(|(number, _)| *number != index);
                    cpus.write(index, EJECT, 1);
                    cpus.ost(index, EJECT_REQUEST, 0);
                    ejected += 1;
                }
                other => return Err(format!("notice {other} for processor {index}?")),
            }
        }
    }
    let us = heard.map_or(0, |heard| clock::nanoseconds(clock::ticks() - heard) / 1000);
    Ok((format!("started={started} ejected={ejected}"), us))
}
