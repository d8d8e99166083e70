//! PCI devices that come and go: what an operating system does by the methods in the DSDT, done by hand.

use crate::arch::config::SLOTS;
use crate::arch::io::Mmio;
use crate::arch::smp::take_events;
use crate::clock::Deadline;
use crate::pci::{self, Function};
use crate::shell::{Args, Reply};
use crate::virtio::kind;
use crate::{Guest, interrupts};
use alloc::format;
use alloc::string::String;

/// Offsets of the registers that all slots share.
const COUNT: u64 = 0x0;
const NEXT: u64 = 0x4;
/// A slot's registers: its first is at this much for the first, and so much further for the next.
const STRIDE: u64 = 0x10;
const STATUS: u64 = 0x0;
const EJECT: u64 = 0x4;
const OST_EVENT: u64 = 0x8;
const OST_STATUS: u64 = 0xc;
const SLOT_COUNT: u64 = 32;
/// Values of notices.
const VANISHED: u32 = 0;
const CHECK: u32 = 1;
const EJECT_REQUEST: u32 = 3;
/// The event register's bit for PCI devices.
const PCI: u8 = 4;

struct Slots(Mmio);

impl Slots {
    fn find() -> Result<Self, String> {
        pci::map_registers(SLOTS, STRIDE * (SLOT_COUNT + 1)).map(Self)
    }

    fn read(&self, slot: u32, register: u64) -> u32 {
        self.0.read32(STRIDE * (u64::from(slot) + 1) + register)
    }

    fn write(&self, slot: u32, register: u64, value: u32) {
        self.0.write32(STRIDE * (u64::from(slot) + 1) + register, value);
    }

    fn ost(&self, slot: u32, event: u32, status: u32) {
        self.write(slot, OST_EVENT, event);
        self.write(slot, OST_STATUS, status);
    }

    /// The next notice: slot and value.
    fn next(&self) -> Option<(u32, u32)> {
        match self.0.read32(NEXT) {
            0 => None,
            notice => Some((notice >> 8, notice & 0xff)),
        }
    }
}

/// `slots count|status|next|eject|give|ost|events|look|serve`
pub fn run(guest: &mut Guest, args: &mut Args) -> Reply {
    let slots = Slots::find()?;
    let what = args.word("what")?;
    let slot = |args: &mut Args| args.number_to("SLOT", SLOT_COUNT - 1).map(|slot| slot as u32);
    Ok(match what {
        "count" => format!("{}", slots.0.read32(COUNT)),
        "events" => format!("{:#x}", take_events()?),
        "next" => slots.next().map_or_else(
            || String::from("none"),
            |(slot, value)| format!("slot={slot} value={value}"),
        ),
        "status" => format!("{:#x}", slots.read(slot(args)?, STATUS)),
        // As it is, with whatever driver there is.
        "eject" => {
            slots.write(slot(args)?, EJECT, 1);
            String::new()
        }
        // In good order.
        "give" => {
            let slot = slot(args)?;
            forget(guest, slot, true);
            slots.write(slot, EJECT, 1);
            String::new()
        }
        "ost" => {
            let slot = slot(args)?;
            let event = args.number_to("EVENT", u32::MAX.into())? as u32;
            slots.ost(slot, event, args.number_to("STATUS", u32::MAX.into())? as u32);
            String::new()
        }
        "look" => look(guest, slot(args)?)?,
        "serve" => serve(guest, &slots, args)?,
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

/// `slots serve N MS`: does what N notices ask for as an operating system would, and gives up after so many milliseconds.
fn serve(guest: &mut Guest, slots: &Slots, args: &mut Args) -> Reply {
    let wanted = args.number("N")?;
    let deadline = Deadline::after_ms(args.number_to("MS", 600_000)?);
    let (mut came, mut went, mut lost) = (0u64, 0u64, 0u64);
    while came + went + lost < wanted {
        if deadline.left().is_none() {
            return Err(format!("came={came} went={went} lost={lost} and no more notices"));
        }
        if take_events()? & PCI == 0 {
            interrupts::sleep(0, interrupts::count(0), 200_000);
            continue;
        }
        while let Some((slot, value)) = slots.next() {
            match value {
                CHECK => {
                    look(guest, slot)?;
                    if slots.read(slot, STATUS) != 0xf || function(guest, slot)?.id() as u16 == 0xffff {
                        return Err(format!("the device in slot {slot} was announced and is not there"));
                    }
                    slots.ost(slot, CHECK, 0);
                    came += 1;
                }
                EJECT_REQUEST => {
                    forget(guest, slot, true);
                    slots.write(slot, EJECT, 1);
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
    Ok(format!("came={came} went={went} lost={lost}"))
}
