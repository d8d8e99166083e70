//! Processors that come and go: what an operating system does by the methods in the DSDT, done by hand.

use super::notices::{Block, CHECK, EJECT_REQUEST, PRESENT, STRIDE};
use crate::arch::smp as arch;
use crate::clock::{self, Deadline};
use crate::shell::{Args, Reply};
use crate::{Guest, interrupts};
use alloc::format;
use alloc::string::String;

/// The event register's bit for processors.
const CPUS: u8 = 1;

/// `hot count|status|next|eject|ost|start|ping|events|serve|timed`
pub fn run(guest: &mut Guest, args: &mut Args) -> Reply {
    let cpus = Block::map(arch::HOTPLUG, "index", guest.acpi()?.processors.len() as u64, STRIDE)?;
    let what = args.word("what")?;
    if let Some(answer) = cpus.run(what, args)? {
        return Ok(answer);
    }
    Ok(match what {
        "start" => {
            let index = cpus.index(args)?;
            start(guest, index)?;
            String::new()
        }
        "ping" => {
            let index = cpus.index(args)?;
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
fn serve(guest: &mut Guest, cpus: &Block, args: &mut Args) -> Result<(String, u64), String> {
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
                    if cpus.status(index) != PRESENT {
                        return Err(format!("processor {index} was announced and is not there"));
                    }
                    start(guest, index)?;
                    cpus.ost(index, CHECK, 0);
                    started += 1;
                }
                EJECT_REQUEST => {
                    guest.added.retain(|(number, _)| *number != index);
                    cpus.eject(index);
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
