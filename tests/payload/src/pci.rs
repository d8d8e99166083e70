//! PCI functions of segment 0: configuration space by ECAM and by ports, capabilities, BARs, MSI-X.

use crate::arch::config::Ports;
use crate::arch::io::Mmio;
use crate::arch::paging;
use crate::interrupts::Message;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const COMMAND: u16 = 4;
const COMMAND_MEMORY: u16 = 2;
const COMMAND_MASTER: u16 = 4;
const CAPABILITY_MSIX: u8 = 0x11;

/// A way to configuration space.
#[derive(Clone, Copy)]
pub enum Access {
    /// By I/O ports, where there are any.
    Ports(Ports),
    /// Memory-mapped at this base.
    Ecam(Mmio),
}

/// One function.
#[derive(Clone, Copy)]
pub struct Function {
    access: Access,
    /// Bus, device and function number as in a requester id.
    pub bdf: u16,
}

/// A memory BAR.
#[derive(Clone, Copy)]
pub struct Bar {
    /// Number of its first register, 0 to 5.
    pub index: u8,
    /// Guest-physical address.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
    /// Takes two registers.
    pub wide: bool,
    /// An I/O BAR instead.
    pub io: bool,
}

impl Function {
    /// The function at `bdf`, whether or not there is one.
    pub fn at(access: Access, bdf: u16) -> Self {
        Self { access, bdf }
    }

    /// Function 0 in `slot`: root buses have 32 each, one behind the other.
    pub fn in_slot(access: Access, slot: u8) -> Self {
        let bus = slot & !(BUSES_OF_ROOT - 1);
        Self::at(access, u16::from(bus) << 8 | u16::from(slot % BUSES_OF_ROOT) << 3)
    }

    /// The way to it.
    pub fn access(self) -> Access {
        self.access
    }

    /// The same function by another access.
    pub fn by(self, access: Access) -> Self {
        Self { access, ..self }
    }

    fn offset(self, register: u16) -> u64 {
        u64::from(self.bdf) << 12 | u64::from(register)
    }

    /// Reads 8 bits of configuration space.
    pub fn read8(self, register: u16) -> u8 {
        match self.access {
            Access::Ports(ports) => ports.read8(self.bdf, register),
            Access::Ecam(base) => base.read8(self.offset(register)),
        }
    }

    /// Reads 16 bits.
    pub fn read16(self, register: u16) -> u16 {
        match self.access {
            Access::Ports(ports) => ports.read16(self.bdf, register),
            Access::Ecam(base) => base.read16(self.offset(register)),
        }
    }

    /// Reads 32 bits.
    pub fn read32(self, register: u16) -> u32 {
        match self.access {
            Access::Ports(ports) => ports.read32(self.bdf, register),
            Access::Ecam(base) => base.read32(self.offset(register)),
        }
    }

    /// Writes 8 bits.
    pub fn write8(self, register: u16, value: u8) {
        match self.access {
            Access::Ports(ports) => ports.write8(self.bdf, register, value),
            Access::Ecam(base) => base.write8(self.offset(register), value),
        }
    }

    /// Writes 16 bits.
    pub fn write16(self, register: u16, value: u16) {
        match self.access {
            Access::Ports(ports) => ports.write16(self.bdf, register, value),
            Access::Ecam(base) => base.write16(self.offset(register), value),
        }
    }

    /// Writes 32 bits.
    pub fn write32(self, register: u16, value: u32) {
        match self.access {
            Access::Ports(ports) => ports.write32(self.bdf, register, value),
            Access::Ecam(base) => base.write32(self.offset(register), value),
        }
    }

    /// Vendor id in the low half, device id in the high.
    pub fn id(self) -> u32 {
        self.read32(0)
    }

    /// `BB:DD.F`.
    pub fn name(self) -> String {
        format!("{:02x}:{:02x}.{}", self.bdf >> 8, self.bdf >> 3 & 31, self.bdf & 7)
    }

    /// Capabilities: (id, offset) in list order; at most 48, so that a loop ends.
    pub fn capabilities(self) -> Vec<(u8, u16)> {
        let mut found = Vec::new();
        if self.read16(6) & 0x10 == 0 {
            return found;
        }
        let mut at = u16::from(self.read8(0x34) & 0xfc);
        while at != 0 && found.len() < 48 {
            found.push((self.read8(at), at));
            at = u16::from(self.read8(at + 1) & 0xfc);
        }
        found
    }

    /// Turns memory decoding and bus mastering on.
    pub fn enable(self) {
        self.write16(COMMAND, self.read16(COMMAND) | COMMAND_MEMORY | COMMAND_MASTER);
    }

    /// Runs `work` with memory and I/O decoding off.
    fn undecoded<T>(self, work: impl FnOnce() -> T) -> T {
        let command = self.read16(COMMAND);
        self.write16(COMMAND, command & !3);
        let result = work();
        self.write16(COMMAND, command);
        result
    }

    /// The address in a memory BAR without sizing it.
    pub fn bar_address(self, index: u8) -> u64 {
        let register = 0x10 + 4 * u16::from(index);
        let low = self.read32(register);
        let high = if low & 6 == 4 { self.read32(register + 4) } else { 0 };
        u64::from(high) << 32 | u64::from(low & !15)
    }

    /// Number of the bus below, if it is a bridge that has one.
    pub fn secondary(self) -> Option<u8> {
        let bridge = self.id() as u16 != 0xffff && self.read8(0xe) & 0x7f == 1;
        bridge.then(|| self.read8(0x19)).filter(|bus| *bus != 0)
    }

    /// All BARs with their sizes (by writing ones, PCI 3.0 §6.2.5.1).
    pub fn bars(self) -> Vec<Bar> {
        let mut bars = Vec::new();
        let mut index = 0;
        let count = if self.read8(0xe) & 0x7f == 1 { 2 } else { 6 };
        while index < count {
            let register = 0x10 + 4 * u16::from(index);
            let low = self.read32(register);
            let (io, wide) = (low & 1 != 0, low & 7 == 4);
            let mask = self.undecoded(|| {
                self.write32(register, !0);
                let mut mask = u64::from(self.read32(register)) | !0 << 32;
                self.write32(register, low);
                if wide {
                    let high = self.read32(register + 4);
                    self.write32(register + 4, !0);
                    mask = mask & 0xffff_ffff | u64::from(self.read32(register + 4)) << 32;
                    self.write32(register + 4, high);
                }
                mask & if io { !3 } else { !15 }
            });
            if mask as u32 != 0 || wide && mask >> 32 != 0 {
                let address = if io {
                    u64::from(low & !3)
                } else {
                    self.bar_address(index)
                };
                bars.push(Bar {
                    index,
                    address,
                    size: mask.wrapping_neg(),
                    wide,
                    io,
                });
            }
            index += if wide { 2 } else { 1 };
        }
        bars
    }

    /// Moves a memory BAR to `address`.
    pub fn move_bar(self, bar: &Bar, address: u64) {
        let register = 0x10 + 4 * u16::from(bar.index);
        self.undecoded(|| {
            self.write32(register, address as u32);
            if bar.wide {
                self.write32(register + 4, (address >> 32) as u32);
            }
        });
    }

    /// The registers of a memory BAR, mapped.
    pub fn map_bar(self, index: u8, offset: u64, len: u64) -> Result<Mmio, String> {
        let base = self.bar_address(index);
        if base == 0 {
            return Err(format!("{} BAR {index} has no address", self.name()));
        }
        map_registers(base + offset, len)
    }
}

/// Registers at a guest-physical address, mapped.
pub fn map_registers(address: u64, len: u64) -> Result<Mmio, String> {
    let end = address.checked_add(len).ok_or("registers wrap")?;
    let mapped =
        paging::map(&(address..end), false).ok_or_else(|| format!("registers at {address:#x} are out of reach"))?;
    // SAFETY: a BAR or ECAM range, mapped for good just now.
    Ok(unsafe { Mmio::new(mapped) })
}

/// Buses that belong to a root bus: root buses are 0, 32 and so on.
pub const BUSES_OF_ROOT: u8 = 32;

/// All functions of root buses up to `last`, and of the buses below their bridges, which let everything through from now on.
pub fn scan(access: Access, last: u8) -> Vec<Function> {
    let roots = (0..=last).step_by(BUSES_OF_ROOT.into());
    let mut found: Vec<Function> = roots.flat_map(|bus| scan_bus(access, bus)).collect();
    for bridge in found.clone() {
        found.extend(scan_below(bridge));
    }
    found.sort_by_key(|function| function.bdf);
    found
}

/// All functions below `bridge`, if it is one; it lets everything through from now on.
pub fn scan_below(bridge: Function) -> Vec<Function> {
    let Some(bus) = bridge.secondary() else {
        return Vec::new();
    };
    bridge.enable();
    scan_bus(bridge.access(), bus)
}

fn scan_bus(access: Access, bus: u8) -> Vec<Function> {
    let mut found = Vec::new();
    for device in 0..32u16 {
        for function in 0..8 {
            let candidate = Function::at(access, u16::from(bus) << 8 | device << 3 | function);
            if candidate.id() as u16 != 0xffff {
                found.push(candidate);
            }
            if function == 0 && (candidate.id() as u16 == 0xffff || candidate.read8(0xe) & 0x80 == 0) {
                break;
            }
        }
    }
    found
}

/// The MSI-X structure of a function (PCI 3.0 §6.8.2).
pub struct Msix {
    function: Function,
    capability: u16,
    /// Number of table entries.
    pub entries: u16,
    table: Mmio,
    pending: Mmio,
}

impl Msix {
    /// Finds and maps it.
    pub fn find(function: Function) -> Result<Self, String> {
        let (_, at) = function
            .capabilities()
            .into_iter()
            .find(|(id, _)| *id == CAPABILITY_MSIX)
            .ok_or("no MSI-X capability")?;
        let entries = (function.read16(at + 2) & 0x7ff) + 1;
        let map = |register, len| {
            let place = function.read32(register);
            function.map_bar((place & 7) as u8, u64::from(place & !7), len)
        };
        let table = map(at + 4, u64::from(entries) * 16)?;
        let pending = map(at + 8, u64::from(entries).div_ceil(64) * 8)?;
        Ok(Self {
            function,
            capability: at,
            entries,
            table,
            pending,
        })
    }

    /// Turns the whole function's MSI-X on, unmasked.
    pub fn enable(&self) {
        self.function.write16(
            self.capability + 2,
            self.function.read16(self.capability + 2) & 0x3fff | 0x8000,
        );
    }

    /// Masks or unmasks all entries at once (the function mask).
    pub fn mask_function(&self, masked: bool) {
        let control = self.function.read16(self.capability + 2) & !0x4000;
        self.function
            .write16(self.capability + 2, if masked { control | 0x4000 } else { control });
    }

    /// Programs `entry` with a message and unmasks it. It may be changed only while it is masked (PCI 3.0 §6.8.2.9), and
    /// QEMU goes by that.
    pub fn set(&self, entry: u16, Message { address, data, .. }: Message) {
        let at = u64::from(entry) * 16;
        self.mask(entry, true);
        self.table.write32(at, address as u32);
        self.table.write32(at + 4, (address >> 32) as u32);
        self.table.write32(at + 8, data);
        self.mask(entry, false);
    }

    /// Masks or unmasks `entry`.
    pub fn mask(&self, entry: u16, masked: bool) {
        self.table.write32(u64::from(entry) * 16 + 12, u32::from(masked));
    }

    /// The pending bit of `entry`.
    pub fn is_pending(&self, entry: u16) -> bool {
        self.pending.read32(u64::from(entry / 32) * 4) >> (entry % 32) & 1 != 0
    }
}
