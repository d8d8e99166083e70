//! Commands about root ports: `root-port SLOT look`, `number N`, `shut`, `move DISK`, `reset`.

use crate::Guest;
use crate::pci::{Function, map_registers};
use crate::shell::{Args, Reply};
use alloc::format;
use alloc::string::String;

const COMMAND: u16 = 4;
const COMMAND_MEMORY: u16 = 2;
const BUSES: u16 = 0x18;
const PREFETCHABLE: u16 = 0x24;
const PREFETCHABLE_UPPER: u16 = 0x28;
const BRIDGE_CONTROL: u16 = 0x3e;
const BUS_RESET: u16 = 1 << 6;
const EXPRESS: u8 = 0x10;

/// `root-port SLOT WHAT`
pub fn run(guest: &mut Guest, args: &mut Args) -> Reply {
    let access = guest.functions.first().ok_or("no PCI")?.access();
    let slot = args.number_to("SLOT", 255)? as u8;
    let port = Function::in_slot(access, slot);
    let bus = port.secondary().ok_or_else(|| format!("no port in slot {slot}"))?;
    let below = Function::at(access, u16::from(bus) << 8);
    match args.word("what")? {
        "look" => look(port, below),
        "number" => {
            let number = args.number_to("N", 255)? as u8;
            renumber(guest, port, below, number)
        }
        "shut" => shut(port, below),
        "move" => {
            let disk = args.number("DISK")? as usize;
            move_window(guest, port, below, disk)
        }
        "reset" => reset(port, below),
        other => Err(format!("root-port {other}?")),
    }
}

/// What the port says of itself.
fn look(port: Function, below: Function) -> Reply {
    let capabilities = port.capabilities();
    let express = capabilities.iter().find(|(id, _)| *id == EXPRESS);
    let (_, at) = express.ok_or("the port has no PCI Express capability")?;
    Ok(format!(
        "id={:#x} class={:#x} type={} link={:#x} acs={:#x} bus={} below={:#x}",
        port.id(),
        port.read32(8) >> 8,
        port.read16(at + 2) >> 4 & 0xf,
        port.read16(at + 0x12),
        port.read32(0x100),
        below.bdf >> 8,
        below.id(),
    ))
}

/// Gives the bus another number: what is below is there and not where it was.
fn renumber(guest: &mut Guest, port: Function, below: Function, number: u8) -> Reply {
    let id = below.id();
    port.write32(BUSES, u32::from(number) << 16 | u32::from(number) << 8);
    let moved = Function::at(port.access(), u16::from(number) << 8);
    for function in &mut guest.functions {
        if function.bdf >> 8 == below.bdf >> 8 {
            function.bdf = u16::from(number) << 8 | function.bdf & 0xff;
        }
    }
    Ok(format!(
        "before={id:#x} there={:#x} old={:#x}",
        moved.id(),
        if moved.bdf == below.bdf { !0 } else { below.id() }
    ))
}

/// What a register of the function below reads while the port lets memory through, while it does not, and again.
fn shut(port: Function, below: Function) -> Reply {
    below.enable();
    let registers = below.map_bar(0, 0, 0x40)?;
    let command = port.read16(COMMAND);
    let open = registers.read32(0x10);
    port.write16(COMMAND, command & !COMMAND_MEMORY);
    let closed = registers.read32(0x10);
    port.write16(COMMAND, command);
    Ok(format!(
        "open={open:#x} shut={closed:#x} again={:#x}",
        registers.read32(0x10)
    ))
}

/// Moves the window of the port, and the BAR of disk `disk` below with it, 16 MiB up; without the window it is nowhere.
fn move_window(guest: &mut Guest, port: Function, below: Function, disk: usize) -> Reply {
    const DISTANCE: u64 = 16 << 20;
    below.enable();
    let bar = below.bars().into_iter().next().ok_or("no BAR")?;
    let to = bar.address + DISTANCE;
    below.move_bar(&bar, to);
    let read = |at: u64| -> Result<u32, String> { Ok(map_registers(at, 0x40)?.read32(0x10)) };
    let outside = read(to)?;
    let window = (to >> 16) as u32 & 0xfff0;
    port.write32(PREFETCHABLE, window | window << 16);
    port.write32(PREFETCHABLE_UPPER, (to >> 32) as u32);
    port.write32(PREFETCHABLE_UPPER + 4, (to >> 32) as u32);
    let (inside, old) = (read(to)?, read(bar.address)?);
    let driver = guest.driver("blk", disk)?;
    driver.remap()?;
    driver.prove()?;
    Ok(format!("outside={outside:#x} inside={inside:#x} old={old:#x}"))
}

/// Resets the bus below: the function has its address and decodes nothing until it is switched on again.
fn reset(port: Function, below: Function) -> Reply {
    below.enable();
    let before = below.read16(COMMAND);
    let control = port.read16(BRIDGE_CONTROL);
    port.write16(BRIDGE_CONTROL, control | BUS_RESET);
    port.write16(BRIDGE_CONTROL, control);
    let after = below.read16(COMMAND);
    below.enable();
    Ok(format!("before={before:#x} after={after:#x}"))
}
