//! The root: which function sits where, and what of it the guest's address spaces show.

mod ports;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use thiserror::Error;
use triarch_device_core::{AccessError, Bus, BusDevice, BusError, RateLimit};

use crate::access::split;
use crate::{BUSES_OF_ROOT, Bar, BarAllocator, BarKind, Bridge, HostBridge, PciAddress, PciFunction, ROM_BAR, lock};
use ports::Port;

const COMMAND: usize = 0x04;
const HEADER_TYPE: usize = 0x0e;
const BAR0: usize = 0x10;
const AFTER_BARS: usize = 0x28;
const ROM: usize = 0x30;
/// With that of the ROM.
const BARS: usize = ROM_BAR as usize + 1;
const MULTI_FUNCTION: u8 = 0x80;
/// Slots of a root bus.
const SLOTS: u8 = 32;

/// Why a function could not be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum AddError {
    /// Every slot is taken.
    #[error("all 32 PCI slots of segment {0:#06x} are taken")]
    Full(u16),
    /// Every slot of another root bus is taken.
    #[error("all 31 PCI slots of bus {0:#04x} are taken")]
    FullBus(u8),
    /// The wanted place is taken.
    #[error("there is a device at {0} already")]
    Taken(PciAddress),
    /// The wanted place is on another bus.
    #[error("there is no bus for {0}, or something else is in its slot")]
    NoBus(PciAddress),
    /// The windows have no room.
    #[error("no room for BAR {bar} of {size:#x} bytes in the PCI windows")]
    NoRoom {
        /// Which BAR.
        bar: usize,
        /// Its size in bytes.
        size: u64,
    },
    /// The function comes with a BAR that is in use or outside of the windows.
    #[error("BAR {bar} cannot be decoded at {address:#x}")]
    Decode {
        /// Which BAR.
        bar: usize,
        /// Its address.
        address: u64,
    },
}

/// Why a function could not be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RemoveError {
    /// Nothing sits there.
    #[error("there is no device at {0}")]
    Absent(PciAddress),
}

/// Bus 0 of a segment, with the host bridge at 00.0, other root buses, and the buses below root ports.
///
/// Root bus r has the number 32 r, windows of its own, and slots from 1 on. The slots of all root buses have one numbering: slot 32 r + n is the n-th of
/// bus 32 r. Each has functions or a root port, and the bus below the port in slot s is called s here, whatever number a guest gives
/// it. So the address of a function never changes for the VMM: `0000:06:00.1` is function 1 below the port in slot 6 of bus 0, and `0000:26:00.1` the
/// same of bus 32. Only
/// [`config_read`](Self::config_read) and [`config_write`](Self::config_write) take addresses as the guest has them.
pub struct PciRoot {
    segment: u16,
    mmio: Weak<Bus>,
    io: Weak<Bus>,
    /// Of each root bus.
    windows: Vec<BarAllocator>,
    slots: Mutex<Slots>,
    /// Only who wants these slots gets them.
    reserved: Mutex<BTreeSet<u8>>,
    log: RateLimit,
}

/// All functions by bus, device and function, as the VMM calls them ([`PciAddress::requester`]).
type Slots = BTreeMap<u16, Slot>;

/// Addresses that are taken: first and last of each range.
type Spans = Vec<(u64, u64)>;

struct Slot {
    function: Arc<dyn PciFunction>,
    /// The root bus that leads there: this many times 32.
    root: u8,
    /// It is a root port.
    port: Option<Port>,
    /// Address each BAR is claimed at.
    claims: [Option<u64>; BARS],
    /// Address each BAR was given at first: it stays reserved while a guest moves the BAR about.
    assigned: [Option<u64>; BARS],
    /// Bit `n`: BAR `n` should be decoded but something is in its way.
    blocked: u8,
    /// The guest accessed its configuration space.
    touched: AtomicBool,
}

/// A function that the guest accesses.
struct Found {
    key: u16,
    function: Arc<dyn PciFunction>,
    /// Its device has more than this one.
    multi: bool,
}

/// A BAR as the address space sees it.
struct BarDevice {
    function: Arc<dyn PciFunction>,
    bar: u8,
}

impl BusDevice for BarDevice {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        self.function.bar_read(self.bar, offset, data)
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        self.function.bar_write(self.bar, offset, data)
    }
}

impl PciRoot {
    /// A root for `segment` with one root bus, whose functions' BARs appear on `mmio` and `io`, inside `windows`. It does not keep
    /// the buses alive: what is claimed there keeps the root alive.
    pub fn new(segment: u16, mmio: Arc<Bus>, io: Arc<Bus>, windows: BarAllocator) -> Self {
        Self::with_roots(segment, mmio, io, vec![windows])
    }

    /// The same with as many root buses as there are `windows`, of which 8 have numbers. Windows must not overlap.
    pub fn with_roots(segment: u16, mmio: Arc<Bus>, io: Arc<Bus>, windows: Vec<BarAllocator>) -> Self {
        let bridge = Slot::new(Arc::new(HostBridge::new()), 0);
        Self {
            segment,
            mmio: Arc::downgrade(&mmio),
            io: Arc::downgrade(&io),
            windows,
            slots: Mutex::new(BTreeMap::from([(0, bridge)])),
            reserved: Mutex::default(),
            log: RateLimit::default(),
        }
    }

    /// Segment group.
    pub fn segment(&self) -> u16 {
        self.segment
    }

    /// The windows BARs of each root bus are decoded in: what ACPI's `_CRS` of it must list.
    pub fn windows(&self) -> &[BarAllocator] {
        &self.windows
    }

    /// How many buses configuration space has room for: [`BUSES_OF_ROOT`] for each root bus.
    pub fn buses(&self) -> u64 {
        self.windows.len() as u64 * u64::from(BUSES_OF_ROOT)
    }

    /// Keeps slots free for who wants them by [`add`](Self::add).
    pub fn reserve(&self, slots: impl IntoIterator<Item = u8>) {
        *lock(&self.reserved) = slots.into_iter().collect();
    }

    /// A place for function 0 on a root bus, in the first slot that is free, or below a port there that comes with it.
    pub fn free_place(&self, root: u8, below_port: bool) -> Result<PciAddress, AddError> {
        let slot = self.free_slot(&lock(&self.slots), root)?;
        Ok(PciAddress::in_slot(self.segment, slot, 0, below_port))
    }

    /// Puts a function at `wanted`, or as function 0 into the first free slot of bus 0, and places those of its BARs that have no address. Where
    /// `wanted` is on a bus below a port that is not there yet, it comes with the function. On error nothing changed.
    pub fn add(&self, function: Arc<dyn PciFunction>, wanted: Option<PciAddress>) -> Result<PciAddress, AddError> {
        let mut slots = lock(&self.slots);
        let address = self.choose(&slots, wanted)?;
        if !address.is_on_root() {
            self.add_below(&mut slots, address, function)?;
            return Ok(address);
        }
        let mut slot = Slot::new(function, address.root());
        let placed = self.place_bars(&slots, &slot)?;
        slot.function.attach(address, address.slot());
        for (bar, at) in placed {
            slot.assign(bar, at);
        }
        self.reconcile(&mut slot, None);
        self.check(&mut slot)?;
        slots.insert(address.requester(), slot);
        Ok(address)
    }

    /// Takes back `slot`, which was to come, if one of its BARs cannot be decoded.
    fn check(&self, slot: &mut Slot) -> Result<(), AddError> {
        let Some(bar) = (0..BARS).find(|bar| slot.blocked & 1 << bar != 0) else {
            return Ok(());
        };
        self.withdraw(slot);
        slot.function.detach();
        let address = bars(&*slot.function)[bar].map_or(0, |b| b.address);
        Err(AddError::Decode { bar, address })
    }

    /// Takes a function out, but never the host bridge: its addresses are free when this returns, and it is idle. A port goes with the last
    /// function below it.
    pub fn remove(&self, address: PciAddress) -> Result<Arc<dyn PciFunction>, RemoveError> {
        let mut slots = lock(&self.slots);
        let key = self.key(address).filter(|key| *key != 0);
        let key = key.filter(|key| slots.get(key).is_some_and(|slot| slot.port.is_none()));
        let found = key.and_then(|key| slots.remove(&key));
        let mut slot = found.ok_or(RemoveError::Absent(address))?;
        self.withdraw(&mut slot);
        if !address.is_on_root() {
            Self::close_port(&mut slots, address.slot());
        }
        self.unblock(&mut slots);
        drop(slots);
        // May wait for what the device has in flight: not with every other function's accesses waiting too.
        slot.function.detach();
        Ok(slot.function)
    }

    /// Where `address` is in the slots, if it can be anywhere there.
    fn key(&self, address: PciAddress) -> Option<u16> {
        (address.segment() == self.segment).then(|| address.requester())
    }

    /// Reads configuration space of the function that the guest has at `address` from byte `offset`; all ones when there is none.
    pub fn config_read(&self, address: PciAddress, offset: u16, data: &mut [u8]) {
        let Some(Found { function, multi, .. }) = self.find(address) else {
            data.fill(0xff);
            return;
        };
        for (at, size) in split(offset, data.len()) {
            let register = usize::from(offset).saturating_add(at);
            match data.get_mut(at..at + size) {
                Some(piece) if register + size <= 0x1000 => function.config_read(register as u16, piece),
                Some(piece) => piece.fill(0xff),
                None => {}
            }
        }
        let header_type = HEADER_TYPE
            .checked_sub(usize::from(offset))
            .and_then(|i| data.get_mut(i));
        if let (true, Some(header_type)) = (multi, header_type) {
            *header_type |= MULTI_FUNCTION;
        }
    }

    /// Writes configuration space of the function that the guest has at `address` from byte `offset`.
    pub fn config_write(&self, address: PciAddress, offset: u16, data: &[u8]) {
        let Some(Found { function, key, .. }) = self.find(address) else {
            return;
        };
        for (at, size) in split(offset, data.len()) {
            let register = usize::from(offset).saturating_add(at);
            if let Some(piece) = data.get(at..at + size).filter(|_| register + size <= 0x1000) {
                function.config_write(register as u16, piece);
            }
        }
        if function.bridge().is_some() {
            return self.port_changed(key);
        }
        let (first, end) = (usize::from(offset), usize::from(offset).saturating_add(data.len()));
        let touches = |from: usize, to: usize| first < to && from < end;
        if touches(COMMAND, COMMAND + 2) || touches(BAR0, AFTER_BARS) || touches(ROM, ROM + 4) {
            self.bars_changed(&[key]);
        }
    }

    /// The BARs of the functions at `keys` may have changed.
    fn bars_changed(&self, keys: &[u16]) {
        let mut slots = lock(&self.slots);
        let mut freed = false;
        for key in keys {
            let above = Self::above(&slots, *key);
            freed |= slots.get_mut(key).is_some_and(|slot| self.reconcile(slot, above));
        }
        if freed {
            self.unblock(&mut slots);
        }
    }

    /// Whether the guest has accessed configuration space of the function at `address`: it may know of it.
    pub fn touched(&self, address: PciAddress) -> bool {
        let slots = lock(&self.slots);
        let slot = self.key(address).and_then(|key| slots.get(&key));
        slot.is_some_and(|slot| slot.touched.load(Ordering::Relaxed))
    }

    /// Notes that the guest has.
    pub fn touch(&self, address: PciAddress) {
        let slots = lock(&self.slots);
        if let Some(slot) = self.key(address).and_then(|key| slots.get(&key)) {
            slot.touched.store(true, Ordering::Relaxed);
        }
    }

    /// The function that the guest has at `address`.
    fn find(&self, address: PciAddress) -> Option<Found> {
        if address.segment() != self.segment {
            return None;
        }
        let slots = lock(&self.slots);
        let bus = self.called(&slots, address.bus())?;
        let key = u16::from(bus) << 8 | u16::from(address.devfn());
        let slot = slots.get(&key)?;
        slot.touched.store(true, Ordering::Relaxed);
        let function = slot.function.clone();
        let multi = key & 7 == 0 && slots.range(key | 1..=key | 7).next().is_some();
        Some(Found { key, function, multi })
    }

    fn choose(&self, slots: &Slots, wanted: Option<PciAddress>) -> Result<PciAddress, AddError> {
        match wanted {
            Some(address) if !self.can_be(slots, address) => Err(AddError::NoBus(address)),
            Some(address) if slots.contains_key(&address.requester()) => Err(AddError::Taken(address)),
            Some(address) => Ok(address),
            None => self.free_slot(slots, 0).map(|slot| self.at(0, slot << 3)),
        }
    }

    fn at(&self, bus: u8, devfn: u8) -> PciAddress {
        PciAddress::from_devfn(self.segment, bus, devfn)
    }

    /// The first slot of a root bus that nobody has and nobody else is to get.
    fn free_slot(&self, slots: &Slots, root: u8) -> Result<u8, AddError> {
        let (reserved, bus) = (lock(&self.reserved), root * BUSES_OF_ROOT);
        let free = |slot: &u8| !reserved.contains(slot) && in_slot(slots, *slot).next().is_none();
        (1..SLOTS).map(|slot| bus | slot).find(free).ok_or(match root {
            0 => AddError::Full(self.segment),
            _ => AddError::FullBus(bus),
        })
    }

    /// The windows of a root bus, if there is such a bus.
    fn windows_of(&self, root: u8) -> Option<&BarAllocator> {
        self.windows.get(usize::from(root))
    }

    /// What `slots` take of memory and of I/O ports.
    fn taken<'a>(slots: impl Iterator<Item = &'a Slot>) -> (Spans, Spans) {
        let (mut memory, mut ports) = (Spans::new(), Spans::new());
        for slot in slots {
            memory.extend(slot.port.iter().flat_map(Port::reserved));
            for (bar, assigned) in bars(&*slot.function).into_iter().zip(slot.assigned) {
                let Some(bar) = bar else { continue };
                let taken = if bar.kind == BarKind::Io {
                    &mut ports
                } else {
                    &mut memory
                };
                let home = assigned.map(|address| Bar { address, ..bar });
                taken.extend(
                    [Some(bar).filter(|b| b.address != 0), home]
                        .iter()
                        .flatten()
                        .filter_map(Bar::span),
                );
            }
        }
        (memory, ports)
    }

    /// Addresses for the BARs of `slot` that have none.
    fn place_bars(&self, slots: &Slots, slot: &Slot) -> Result<Vec<(usize, u64)>, AddError> {
        let (mut memory, mut ports) = Self::taken(slots.values().chain([slot]));
        let mut placed = Vec::new();
        for (index, bar) in bars(&*slot.function).into_iter().enumerate() {
            let Some(bar) = bar.filter(|b| b.address == 0) else {
                continue;
            };
            let taken = if bar.kind == BarKind::Io {
                &mut ports
            } else {
                &mut memory
            };
            let windows = self.windows_of(slot.root);
            let at = windows.and_then(|windows| windows.place(bar.kind, bar.size, taken));
            let at = at.ok_or(AddError::NoRoom {
                bar: index,
                size: bar.size,
            })?;
            taken.extend(Bar { address: at, ..bar }.span());
            placed.push((index, at));
        }
        Ok(placed)
    }

    /// The address space of a BAR, while the machine stands.
    fn bus(&self, kind: BarKind) -> Option<Arc<Bus>> {
        match kind {
            BarKind::Io => self.io.upgrade(),
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => self.mmio.upgrade(),
        }
    }

    /// Makes the address spaces show the BARs where the function's registers put them, as far as the port `above` lets accesses through.
    /// Returns whether an address was given up.
    fn reconcile(&self, slot: &mut Slot, above: Option<Bridge>) -> bool {
        let mut freed = false;
        slot.blocked = 0;
        for (index, bar) in bars(&*slot.function).into_iter().enumerate() {
            let Some(bar) = bar else { continue };
            let before = slot.claims[index];
            let wanted = (bar.decoded && ports::passes(above, &bar)).then_some(bar.address);
            if before == wanted {
                continue;
            }
            let now = match self.show(slot, index, &bar, before, wanted) {
                Ok(now) => now,
                Err(error) => {
                    slot.blocked |= 1 << index;
                    self.warn(index, &bar, error);
                    None
                }
            };
            freed |= before.is_some() && before != now;
            slot.claims[index] = now;
            if before != now {
                slot.function.bar_moved(index as u8, now);
            }
        }
        freed
    }

    /// Moves one BAR on its bus; on error it is nowhere.
    fn show(
        &self,
        slot: &Slot,
        index: usize,
        bar: &Bar,
        before: Option<u64>,
        wanted: Option<u64>,
    ) -> Result<Option<u64>, Option<BusError>> {
        let Some(bus) = self.bus(bar.kind) else {
            return Ok(None);
        };
        let forwards = |(first, last)| Some(self.windows_of(slot.root)?.forwards(bar.kind, first, last));
        let forwarded = bar.span().and_then(forwards).unwrap_or(false);
        let outcome = match (before, wanted) {
            (_, Some(_)) if !forwarded => Err(None),
            (Some(from), Some(to)) => bus.relocate(from, to).map_err(Some),
            (None, Some(at)) => {
                let device = BarDevice {
                    function: slot.function.clone(),
                    bar: index as u8,
                };
                bus.claim(at, bar.size, Arc::new(device)).map_err(Some)
            }
            (_, None) => Ok(()),
        };
        if let (Some(from), false) = (before, outcome.is_ok() && wanted.is_some()) {
            // Claimed by this root and by nothing else, so it is there.
            let _ = bus.release(from);
        }
        outcome.map(|()| wanted)
    }

    /// Tries again what was in the way of a BAR that has moved on.
    fn unblock(&self, slots: &mut Slots) {
        let blocked = slots.iter().filter(|(_, slot)| slot.blocked != 0);
        let blocked: Vec<u16> = blocked.map(|(key, _)| *key).collect();
        for key in blocked {
            let above = Self::above(slots, key);
            slots.get_mut(&key).map(|slot| self.reconcile(slot, above));
        }
    }

    /// Takes the BARs of `slot` off the buses.
    fn withdraw(&self, slot: &mut Slot) {
        for (index, bar) in bars(&*slot.function).into_iter().enumerate() {
            if let (Some(bar), Some(at)) = (bar, slot.claims[index].take()) {
                let _ = self.bus(bar.kind).map(|bus| bus.release(at));
                slot.function.bar_moved(index as u8, None);
            }
        }
    }

    fn warn(&self, index: usize, bar: &Bar, error: Option<BusError>) {
        if bar.is_being_sized() {
            return;
        }
        if let Some(held_back) = self.log.admit() {
            let why = error.map_or_else(|| "it is outside of the PCI windows".to_owned(), |e| e.to_string());
            let (address, size) = (bar.address, bar.size);
            tracing::warn!(
                held_back,
                "the guest put BAR {index} of {size:#x} bytes at {address:#x}, not decoded: {why}"
            );
        }
    }
}

impl Slot {
    fn new(function: Arc<dyn PciFunction>, root: u8) -> Self {
        Self {
            function,
            root,
            port: None,
            claims: [None; BARS],
            assigned: [None; BARS],
            blocked: 0,
            touched: AtomicBool::new(false),
        }
    }

    /// Gives BAR `bar` the address `at`.
    fn assign(&mut self, bar: usize, at: u64) {
        self.assigned[bar] = Some(at);
        write_bar(&*self.function, bar, at);
    }
}

/// What is in `slot` of its root bus.
fn in_slot(slots: &Slots, slot: u8) -> impl Iterator<Item = (&u16, &Slot)> {
    let first = ports::port_key(slot);
    slots.range(first..=first | 7)
}

/// All BARs of a function, that of its ROM the last.
fn bars(function: &dyn PciFunction) -> [Option<Bar>; BARS] {
    let mut all = [None; BARS];
    let (rom, others) = (function.rom(), function.bars());
    for (bar, own) in all.iter_mut().zip(others.into_iter().chain([rom])) {
        *bar = own;
    }
    all
}

/// Writes a BAR's address as firmware does. A ROM is not enabled.
fn write_bar(function: &dyn PciFunction, index: usize, address: u64) {
    let register = if index == usize::from(ROM_BAR) {
        ROM
    } else {
        BAR0 + 4 * index
    } as u16;
    function.config_write(register, &(address as u32).to_le_bytes());
    if let Some(Some(Bar {
        kind: BarKind::Memory64 { .. },
        ..
    })) = function.bars().get(index)
    {
        function.config_write(register + 4, &((address >> 32) as u32).to_le_bytes());
    }
}

#[cfg(test)]
mod tests;
