//! Registers of what comes and goes: processors, memory devices and the slots of the PCI bus each have such a block.

use crate::arch::io::Mmio;
use crate::arch::smp::take_events;
use crate::pci;
use crate::shell::Args;
use alloc::format;
use alloc::string::String;

/// Offsets of the registers that all of a block share.
const COUNT: u64 = 0x0;
const NEXT: u64 = 0x4;
/// Bytes of one's registers, which are behind as many that all share; memory has more of them.
pub const STRIDE: u64 = 0x10;
const STATUS: u64 = 0x0;
const EJECT: u64 = 0x4;
const OST_EVENT: u64 = 0x8;
const OST_STATUS: u64 = 0xc;
/// Values of notices: something vanished, came, or is to be given back.
pub const VANISHED: u32 = 0;
pub const CHECK: u32 = 1;
pub const EJECT_REQUEST: u32 = 3;
/// The status of what is there.
pub const PRESENT: u32 = 0xf;

/// A block of registers.
pub struct Block {
    registers: Mmio,
    /// What it has, in words and answers.
    name: &'static str,
    most: u64,
    stride: u64,
}

impl Block {
    /// The block at `address`, of `most` that are called `name` and have `stride` bytes of registers each.
    pub fn map(address: u64, name: &'static str, most: u64, stride: u64) -> Result<Self, String> {
        let registers = pci::map_registers(address, stride * (most + 1))?;
        Ok(Self {
            registers,
            name,
            most,
            stride,
        })
    }

    /// One's register at this offset.
    pub fn read(&self, index: u32, register: u64) -> u32 {
        self.registers.read32(self.stride * (u64::from(index) + 1) + register)
    }

    fn write(&self, index: u32, register: u64, value: u32) {
        self.registers
            .write32(self.stride * (u64::from(index) + 1) + register, value);
    }

    /// What `_STA` answers.
    pub fn status(&self, index: u32) -> u32 {
        self.read(index, STATUS)
    }

    /// `_EJ0`.
    pub fn eject(&self, index: u32) {
        self.write(index, EJECT, 1);
    }

    /// `_OST`.
    pub fn ost(&self, index: u32, event: u32, status: u32) {
        self.write(index, OST_EVENT, event);
        self.write(index, OST_STATUS, status);
    }

    /// The next notice: for which, and its value.
    pub fn next(&self) -> Option<(u32, u32)> {
        match self.registers.read32(NEXT) {
            0 => None,
            notice => Some((notice >> 8, notice & 0xff)),
        }
    }

    /// Number of one as an argument.
    pub fn index(&self, args: &mut Args) -> Result<u32, String> {
        let last = self.most.saturating_sub(1);
        args.number_to(self.name, last).map(|index| index as u32)
    }

    /// `count|events|next|status|eject|ost`; nothing for another word.
    pub fn run(&self, what: &str, args: &mut Args) -> Result<Option<String>, String> {
        Ok(Some(match what {
            "count" => format!("{}", self.registers.read32(COUNT)),
            "events" => format!("{:#x}", take_events()?),
            "next" => self.next().map_or_else(
                || String::from("none"),
                |(index, value)| format!("{}={index} value={value}", self.name),
            ),
            "status" => format!("{:#x}", self.status(self.index(args)?)),
            // As it is, with whatever driver there is.
            "eject" => {
                self.eject(self.index(args)?);
                String::new()
            }
            "ost" => {
                let index = self.index(args)?;
                let event = args.number_to("EVENT", u32::MAX.into())? as u32;
                self.ost(index, event, args.number_to("STATUS", u32::MAX.into())? as u32);
                String::new()
            }
            _ => return Ok(None),
        }))
    }
}
