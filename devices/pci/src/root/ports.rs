//! Root ports in the slots of root buses, and the functions below them.

use std::sync::Arc;

use super::{AddError, COMMAND, PciRoot, Slot, Slots, bars, in_slot};
use crate::{BUSES_OF_ROOT, Bar, BarKind, Bridge, PciAddress, PciFunction, RootPort, command, lock};

/// What a window begins and ends at multiples of (PCI-to-PCI Bridge Architecture 1.2, 3.2.5.8).
const WINDOW_ALIGN: u64 = 1 << 20;
const BUSES: u16 = 0x18;
const WINDOWS: [u16; 2] = [0x20, 0x24];
const WINDOW_UPPER: u16 = 0x28;

/// What the root knows of a port.
pub(super) struct Port {
    port: Arc<RootPort>,
    /// Its registers, as they stand.
    now: Bridge,
    /// The windows it was given at first: they stay reserved while a guest moves them about.
    granted: [Option<(u64, u64)>; 2],
    /// A guest has set it up: the VMM does not.
    restored: bool,
}

impl Port {
    /// Addresses that are no others' to use.
    pub(super) fn reserved(&self) -> impl Iterator<Item = (u64, u64)> {
        self.granted.into_iter().chain(self.now.windows).flatten()
    }
}

/// Whether the port `above` a function, if there is one, lets accesses to `bar` through.
pub(super) fn passes(above: Option<Bridge>, bar: &Bar) -> bool {
    let Some(above) = above else { return true };
    let span = bar.span().filter(|_| bar.kind != BarKind::Io);
    span.is_some_and(|(first, last)| above.forwards(first, last))
}

/// Which of a port's windows a BAR goes into: what is not prefetchable does not fit behind addresses of 64 bits. I/O ports have none.
fn window_of(kind: BarKind) -> Option<usize> {
    match kind {
        BarKind::Memory32 { .. } | BarKind::Memory64 { prefetchable: false } => Some(0),
        BarKind::Memory64 { prefetchable: true } => Some(1),
        BarKind::Io => None,
    }
}

/// The functions below the port in `slot`.
fn below(slots: &Slots, slot: u8) -> Vec<u16> {
    let first = u16::from(slot) << 8;
    slots.range(first..=first | 0xff).map(|(key, _)| *key).collect()
}

/// Where function 0 of `slot` is on its root bus.
pub(super) fn port_key(slot: u8) -> u16 {
    PciAddress::in_slot(0, slot, 0, false).requester()
}

/// The slot of the port at `key`.
fn slot_of(key: u16) -> u8 {
    (key >> 8) as u8 | (key as u8) >> 3
}

/// A plan for the BARs below a port.
#[derive(Default)]
struct Plan {
    /// Function, number of the BAR, address.
    bars: Vec<(u16, usize, u64)>,
    windows: [Option<(u64, u64)>; 2],
}

impl PciRoot {
    /// The root ports by their slots, each with what a guest may have written into it.
    pub fn ports(&self) -> Vec<(u8, Vec<u8>)> {
        let slots = lock(&self.slots);
        let port = |(key, slot): (&u16, &Slot)| Some((slot_of(*key), slot.port.as_ref()?.port.save()));
        slots.iter().filter_map(port).collect()
    }

    /// Makes a port in `slot` that goes on with what was saved. What comes below it brings the addresses of its BARs.
    ///
    /// # Errors
    /// There can be none.
    pub fn restore_port(&self, slot: u8, saved: &[u8]) -> Result<(), AddError> {
        let mut slots = lock(&self.slots);
        let address = self.at(slot, 0);
        if address.is_on_root() || !self.can_be(&slots, address) || slots.contains_key(&port_key(slot)) {
            return Err(AddError::NoBus(address));
        }
        let port = self.new_port(&mut slots, slot)?;
        port.restore(saved);
        if let Some(known) = slots.get_mut(&port_key(slot)).and_then(|slot| slot.port.as_mut()) {
            (known.now, known.restored) = (port.bridge().unwrap_or_default(), true);
        }
        Ok(())
    }

    /// What the guest calls `bus`, as it is called here.
    pub(super) fn called(&self, slots: &Slots, bus: u8) -> Option<u8> {
        if self.is_root(bus) {
            return Some(bus);
        }
        let mut ports = slots.iter();
        let found = ports.find(|(_, slot)| slot.port.as_ref().is_some_and(|port| port.now.secondary == bus));
        found.map(|(key, _)| slot_of(*key))
    }

    fn is_root(&self, bus: u8) -> bool {
        bus.is_multiple_of(BUSES_OF_ROOT) && self.windows_of(bus / BUSES_OF_ROOT).is_some()
    }

    /// The port above the function at `key`, as it stands.
    pub(super) fn above(slots: &Slots, key: u16) -> Option<Bridge> {
        let slot = (key >> 8) as u8;
        let port = slots
            .get(&port_key(slot))
            .filter(|_| !slot.is_multiple_of(BUSES_OF_ROOT))?
            .port
            .as_ref();
        // What is below nothing passes nothing.
        Some(port.map_or(Bridge::default(), |port| port.now))
    }

    /// Whether a function can be at `address`, be there one or not: on a root bus, where no port is, or as device 0 below a port, in a slot that
    /// has no functions of its own. Slot 0 of bus 0 is the host bridge's, that of others nobody's.
    pub(super) fn can_be(&self, slots: &Slots, address: PciAddress) -> bool {
        let has_port = |slot| in_slot(slots, slot).any(|(_, slot)| slot.port.is_some());
        let empty = |slot| in_slot(slots, slot).next().is_none();
        address.segment() == self.segment
            && self.windows_of(address.root()).is_some()
            && match (address.is_on_root(), address.slot()) {
                (true, slot) => !has_port(slot) && (address.bus() == 0 || address.device() != 0),
                (false, slot) => address.device() == 0 && (has_port(slot) || empty(slot)),
            }
    }

    /// Puts a function at `address`, below the port in its slot. The BARs of all that is below it get their places anew, and the port the
    /// windows for them: a guest that runs does not know of any of that while function 0 is to come.
    pub(super) fn add_below(
        &self,
        slots: &mut Slots,
        address: PciAddress,
        function: Arc<dyn PciFunction>,
    ) -> Result<(), AddError> {
        let (bus, key) = (address.bus(), address.requester());
        if !slots.contains_key(&port_key(bus)) {
            self.new_port(slots, bus)?;
        }
        slots.insert(key, Slot::new(function.clone(), address.root()));
        let result = self.arrange(slots, bus).and_then(|plan| {
            let seen = Self::above(slots, key).map_or(0, |port| port.secondary);
            function.attach(self.at(seen, address.devfn()), bus);
            self.carry_out(slots, bus, plan);
            let checked = slots.get_mut(&key).map(|slot| self.check(slot));
            checked.unwrap_or(Ok(()))
        });
        if result.is_err() {
            slots.remove(&key);
            Self::close_port(slots, bus);
        }
        result
    }

    fn new_port(&self, slots: &mut Slots, slot: u8) -> Result<Arc<RootPort>, AddError> {
        let place = self.at(slot, 0);
        let port = RootPort::new().map_err(|_| AddError::NoBus(place))?;
        // The last bus below is the first: there are no bridges below.
        port.config_write(BUSES, &[place.root() * BUSES_OF_ROOT, slot, slot]);
        // Switched on, as firmware leaves it: Linux may take a port that comes later for set up before it knows its windows, and then
        // switches on nothing any more.
        port.config_write(COMMAND as u16, &(command::MEMORY | command::BUS_MASTER).to_le_bytes());
        let port = Arc::new(port);
        let mut new = Slot::new(port.clone(), place.root());
        new.port = Some(Port {
            now: port.bridge().unwrap_or_default(),
            port: port.clone(),
            granted: [None; 2],
            restored: false,
        });
        slots.insert(port_key(slot), new);
        Ok(port)
    }

    /// Takes the port in `slot` if nothing is below it any more.
    pub(super) fn close_port(slots: &mut Slots, slot: u8) {
        if below(slots, slot).is_empty() {
            slots.remove(&port_key(slot));
        }
    }

    /// Finds places for the BARs below the port in `slot`: the largest first, so that no gap is between them.
    fn arrange(&self, slots: &Slots, slot: u8) -> Result<Plan, AddError> {
        let (members, mut plan) = (below(slots, slot), Plan::default());
        let mut wanted: Vec<(u16, usize, Bar)> = Vec::new();
        for (key, function) in members.iter().filter_map(|key| Some((*key, slots.get(key)?))) {
            let all = (0..).zip(bars(&*function.function));
            wanted.extend(all.filter_map(|(index, bar)| Some((key, index, bar?))));
        }
        let restored = slots.get(&port_key(slot)).and_then(|slot| slot.port.as_ref());
        if restored.is_some_and(|port| port.restored) {
            return Ok(plan);
        }
        wanted.sort_by_key(|(.., bar)| std::cmp::Reverse(bar.size));
        let mine = |key: &u16| members.contains(key) || *key == port_key(slot);
        let others = slots.iter().filter(|(key, _)| !mine(key));
        let (mut taken, _) = Self::taken(others.map(|(_, slot)| slot));
        for (window, place) in plan.windows.iter_mut().enumerate() {
            let group = || wanted.iter().filter(|(.., bar)| window_of(bar.kind) == Some(window));
            let Some((_, index, largest)) = group().next() else {
                continue;
            };
            let no_room = AddError::NoRoom {
                bar: *index,
                size: largest.size,
            };
            let total = group().try_fold(0u64, |sum, (.., bar)| sum.checked_add(bar.size));
            let size = total.and_then(|total| total.checked_next_multiple_of(WINDOW_ALIGN));
            let kind = match window {
                0 => BarKind::Memory32 { prefetchable: false },
                _ => BarKind::Memory64 { prefetchable: true },
            };
            let align = largest.size.max(WINDOW_ALIGN);
            let windows = self.windows_of(self.at(slot, 0).root());
            let at = size.and_then(|size| windows?.place_aligned(kind, size, align, &taken));
            let (mut at, size) = at.zip(size).ok_or(no_room)?;
            *place = Some((at, at + (size - 1)));
            taken.extend(*place);
            for (key, index, bar) in group() {
                plan.bars.push((*key, *index, at));
                at += bar.size;
            }
        }
        Ok(plan)
    }

    /// Does what was planned for the port in `slot`.
    fn carry_out(&self, slots: &mut Slots, slot: u8, plan: Plan) {
        for (key, bar, at) in plan.bars {
            if let Some(slot) = slots.get_mut(&key) {
                slot.assign(bar, at);
            }
        }
        if let Some(known) = slots.get_mut(&port_key(slot)).and_then(|slot| slot.port.as_mut())
            && !known.restored
        {
            for (register, window) in WINDOWS.into_iter().zip(plan.windows) {
                // Base above limit: closed.
                let (first, last) = window.unwrap_or((0xfff0_0000, 0));
                let value = (first >> 16) as u32 & 0xfff0 | last as u32 & 0xfff0_0000;
                known.port.config_write(register, &value.to_le_bytes());
            }
            let (first, last) = plan.windows[1].unwrap_or_default();
            known
                .port
                .config_write(WINDOW_UPPER, &((first >> 32) as u32).to_le_bytes());
            known
                .port
                .config_write(WINDOW_UPPER + 4, &((last >> 32) as u32).to_le_bytes());
            known.granted = plan.windows;
            known.now = known.port.bridge().unwrap_or_default();
        }
        for key in below(slots, slot) {
            let above = Self::above(slots, key);
            slots.get_mut(&key).map(|slot| self.reconcile(slot, above));
        }
    }

    /// The guest wrote registers of the port at `key`.
    pub(super) fn port_changed(&self, key: u16) {
        let mut slots = lock(&self.slots);
        let Some(port) = slots.get_mut(&key).and_then(|slot| slot.port.as_mut()) else {
            return;
        };
        let now = port.port.bridge().unwrap_or_default();
        let before = std::mem::replace(&mut port.now, now);
        if before == now {
            return;
        }
        let slot = slot_of(key);
        let keys = below(&slots, slot);
        let functions = keys
            .iter()
            .filter_map(|key| Some((*key, slots.get(key)?.function.clone())));
        let functions: Vec<_> = functions.collect();
        drop(slots);
        for (key, function) in functions {
            if now.secondary != before.secondary && now.secondary != 0 {
                function.attach(self.at(now.secondary, key as u8), slot);
            }
            if now.reset && !before.reset {
                function.reset();
            }
        }
        self.bars_changed(&keys);
    }
}
