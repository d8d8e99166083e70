//! PCI devices that come and go: what an operating system does by the methods in the DSDT, done by hand.

use super::notices::{Block, CHECK, EJECT_REQUEST, PRESENT, VANISHED};
use crate::arch::config::SLOTS;
use crate::arch::smp::take_events;
use crate::clock::{self, Deadline};
use crate::pci::Function;
use crate::shell::{Args, Reply};
use crate::virtio::kind;
use crate::{Guest, interrupts};
use alloc::format;
use alloc::string::String;

const SLOT_COUNT: u64 = 32;
/// The event register's bit for PCI devices.
const PCI: u8 = 4;

/// `slots count|status|next|eject|give|ost|events|look|serve|timed`
pub fn run(guest: &mut Guest, args: &mut Args) -> Reply {
    let slots = Block::map(SLOTS, "slot", SLOT_COUNT)?;
    let what = args.word("what")?;
    if let Some(answer) = slots.run(what, args)? {
        return Ok(answer);
    }
    Ok(match what {
        // In good order.
        "give" => {
            let slot = slots.index(args)?;
            forget(guest, slot, true);
            slots.eject(slot);
            String::new()
        }
        "look" => look(guest, slots.index(args)?)?,
        "serve" => serve(guest, &slots, args)?.0,
        "timed" => {
            let (answer, us) = serve(guest, &slots, args)?;
            format!("{answer} us={us}")
        }
        other => return Err(format!("slots {other}?")),
    })
}

fn function(guest: &Guest, slot: u32) -> Result<Function, String> {
    let access = guest.functions.first().ok_or("no PCI")?.access();
    Ok(Function::at(access, (slot as u16) << 3))
}

/// `slots look SLOT`: finds out what is in a slot, as a scan of the bus does.
fn look(guest: &mut Guest, slot: u32) -> Result<String, String> {
    let function = function(guest, slot)?;
    let known = guest.functions.iter().position(|known| known.bdf == function.bdf);
    match (function.id() as u16 != 0xffff, known) {
        (true, None) => guest.add_function(function),
        (false, Some(_)) => forget(guest, slot, false),
        _ => {}
    }
    Ok(format!("id={:#x} kind={}", function.id(), kind(function).unwrap_or(0)))
}

/// Stops the driver of what is in `slot`, if it can be reached, and forgets both.
fn forget(guest: &mut Guest, slot: u32, reachable: bool) {
    guest.remove_function((slot as u16) << 3, reachable);
}

/// `slots serve N MS`: does what N notices ask for as an operating system would, and gives up after so many milliseconds. `slots timed`
/// also tells how many microseconds it took from the first interrupt on.
fn serve(guest: &mut Guest, slots: &Block, args: &mut Args) -> Result<(String, u64), String> {
    let wanted = args.number("N")?;
    let deadline = Deadline::after_ms(args.number_to("MS", 600_000)?);
    let (mut came, mut went, mut lost) = (0u64, 0u64, 0u64);
    let mut heard = None;
    while came + went + lost < wanted {
        if deadline.left().is_none() {
            return Err(format!("came={came} went={went} lost={lost} and no more notices"));
        }
        if take_events()? & PCI == 0 {
            interrupts::sleep(0, interrupts::count(0), 200_000);
            continue;
        }
        heard.get_or_insert_with(clock::ticks);
        while let Some((slot, value)) = slots.next() {
            match value {
                CHECK => {
                    look(guest, slot)?;
                    if slots.status(slot) != PRESENT || function(guest, slot)?.id() as u16 == 0xffff {
                        return Err(format!("the device in slot {slot} was announced and is not there"));
                    }
                    slots.ost(slot, CHECK, 0);
                    came += 1;
                }
                EJECT_REQUEST => {
                    forget(guest, slot, true);
                    slots.eject(slot);
                    slots.ost(slot, EJECT_REQUEST, 0);
                    went += 1;
                }
                VANISHED => {
                    if function(guest, slot)?.id() as u16 != 0xffff {
                        return Err(format!(
                            "the device in slot {slot} is said to have vanished and is there"
                        ));
                    }
                    forget(guest, slot, false);
                    lost += 1;
                }
                other => return Err(format!("notice {other} for slot {slot}?")),
            }
        }
    }
    let us = heard.map_or(0, |heard| clock::nanoseconds(clock::ticks() - heard) / 1000);
    Ok((format!("came={came} went={went} lost={lost}"), us))
}
