//! PCI devices that come and go: what an operating system does by the methods in the DSDT, done by hand.

use super::notices::{Block, CHECK, EJECT_REQUEST, PRESENT, STRIDE, VANISHED};
use crate::arch::config::SLOTS;
use crate::arch::smp::take_events;
use crate::clock::{self, Deadline};
use crate::dev::blk::SoakPlan;
use crate::pci::{self, Function};
use crate::shell::{Args, Reply};
use crate::virtio::kind;
use crate::{Guest, interrupts};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// The event register's bit for PCI devices.
const PCI: u8 = 4;

/// `slots count|status|next|eject|give|ost|events|look|serve|timed|busy`
pub fn run(guest: &mut Guest, args: &mut Args) -> Reply {
    // As many as there are buses: each root bus has 32 of both.
    let count = guest.acpi().ok().and_then(|acpi| acpi.ecam).map_or(0, |(_, last)| last);
    let slots = Block::map(SLOTS, "slot", u64::from(count) + 1, STRIDE)?;
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
        "busy" => busy(guest, &slots, args)?,
        "timed" => {
            let (answer, us) = serve(guest, &slots, args)?;
            format!("{answer} us={us}")
        }
        other => return Err(format!("slots {other}?")),
    })
}

fn function(guest: &Guest, slot: u32) -> Result<Function, String> {
    let access = guest.functions.first().ok_or("no PCI")?.access();
    Ok(Function::in_slot(access, slot as u8))
}

/// `slots look SLOT`: finds out what is in a slot, as a scan of the bus does.
fn look(guest: &mut Guest, slot: u32) -> Result<String, String> {
    let function = function(guest, slot)?;
    let known = guest.functions.iter().position(|known| known.bdf == function.bdf);
    match (function.id() as u16 != 0xffff, known) {
        (true, None) => {
            guest.add_function(function);
            for below in pci::scan_below(function) {
                guest.add_function(below);
            }
        }
        (false, Some(_)) => forget(guest, slot, false),
        _ => {}
    }
    Ok(format!("id={:#x} kind={}", function.id(), kind(function).unwrap_or(0)))
}

/// Stops the driver of what is in `slot`, if it can be reached, and forgets both.
fn forget(guest: &mut Guest, slot: u32, reachable: bool) {
    // What is below a port goes before it. The VMM numbers the bus like the slot.
    let below = guest.functions.iter().map(|function| function.bdf);
    let below: Vec<u16> = below.filter(|bdf| u32::from(bdf >> 8) == slot).collect();
    for bdf in below {
        guest.remove_function(bdf, reachable);
    }
    if let Ok(function) = function(guest, slot) {
        guest.remove_function(function.bdf, reachable);
    }
}

/// What was done about notices.
#[derive(Default)]
struct Served {
    came: u64,
    went: u64,
    lost: u64,
    /// When the first was heard of.
    heard: Option<u64>,
}

impl Served {
    fn all(&self) -> u64 {
        self.came + self.went + self.lost
    }

    fn text(&self) -> String {
        format!("came={} went={} lost={}", self.came, self.went, self.lost)
    }

    /// Does what notices ask for, if there are any, as an operating system would; tells whether there were.
    fn look(&mut self, guest: &mut Guest, slots: &Block) -> Result<bool, String> {
        if take_events()? & PCI == 0 {
            return Ok(false);
        }
        self.heard.get_or_insert_with(clock::ticks);
        while let Some((slot, value)) = slots.next() {
            self.notice(guest, slots, slot, value)?;
        }
        Ok(true)
    }

    fn notice(&mut self, guest: &mut Guest, slots: &Block, slot: u32, value: u32) -> Result<(), String> {
        match value {
            CHECK => {
                look(guest, slot)?;
                if slots.status(slot) != PRESENT || function(guest, slot)?.id() as u16 == 0xffff {
                    return Err(format!("the device in slot {slot} was announced and is not there"));
                }
                slots.ost(slot, CHECK, 0);
                self.came += 1;
            }
            EJECT_REQUEST => {
                forget(guest, slot, true);
                slots.eject(slot);
                slots.ost(slot, EJECT_REQUEST, 0);
                self.went += 1;
            }
            VANISHED => {
                if function(guest, slot)?.id() as u16 != 0xffff {
                    return Err(format!(
                        "the device in slot {slot} is said to have vanished and is there"
                    ));
                }
                forget(guest, slot, false);
                self.lost += 1;
            }
            other => return Err(format!("notice {other} for slot {slot}?")),
        }
        Ok(())
    }
}

/// `slots serve N MS`: does what N notices ask for, and gives up after so many milliseconds. `slots timed` also tells how many
/// microseconds it took from the first interrupt on.
fn serve(guest: &mut Guest, slots: &Block, args: &mut Args) -> Result<(String, u64), String> {
    let wanted = args.number("N")?;
    let deadline = Deadline::after_ms(args.number_to("MS", 600_000)?);
    let mut served = Served::default();
    while served.all() < wanted {
        if deadline.left().is_none() {
            return Err(format!("{} and no more notices", served.text()));
        }
        if !served.look(guest, slots)? {
            interrupts::sleep(0, interrupts::count(0), 200_000);
        }
    }
    let us = served
        .heard
        .map_or(0, |heard| clock::nanoseconds(clock::ticks() - heard) / 1000);
    Ok((served.text(), us))
}

/// `slots busy N MS DEPTH SEED BLOCKS`: the same while the first disk works as `blk 0 soak` lets it.
fn busy(guest: &mut Guest, slots: &Block, args: &mut Args) -> Reply {
    let wanted = args.number("N")?;
    let deadline = Deadline::after_ms(args.number_to("MS", 600_000)?);
    let depth = args.number_to("DEPTH", 128)?.max(1);
    let plan = SoakPlan {
        count: 0,
        depth: depth as usize,
        seed: args.number("SEED")?,
        blocks: args.number_to("BLOCKS", 1 << 20)?.max(2 * depth),
    };
    let mut served = Served::default();
    let mut disk = guest.take_disk()?;
    let soak = disk.soak_while(&plan, &mut |_| {
        if deadline.left().is_none() {
            return Err(format!("{} and no more notices", served.text()));
        }
        served.look(guest, slots)?;
        Ok(served.all() < wanted)
    });
    guest.give_disk(disk);
    Ok(format!("{} requests={}", served.text(), soak?.requests))
}
