//! Slots of the bus, of which some have several functions: a guest finds those by function 0, and gives back slots as a whole.

use triarch_api::VmConfig;
use triarch_pci::PciAddress;

use super::{Devices, Placed};
use crate::configured::DeviceConfig;

impl Devices {
    /// Keeps the slots free that devices of `config` have to be in, whatever comes before them.
    pub(super) fn reserve(&mut self, config: &VmConfig) {
        let mut reserved = 0;
        for (device, place) in DeviceConfig::all(config).filter_map(|device| Some((device, device.place()?))) {
            reserved |= 1 << place.device();
            self.places.entry(device.id().to_owned()).or_insert(place);
        }
        self.host.root.reserve(reserved);
    }

    /// The devices in `slot` that can be taken, with their functions there, from the last to the first.
    pub(crate) fn removable_in(&self, slot: u8) -> Vec<(u8, &str)> {
        let in_slot = |placed: &&Placed| placed.address.device() == slot && placed.removable;
        let found = self.functions.iter().filter(in_slot);
        let mut found: Vec<_> = found
            .map(|placed| (placed.address.function(), placed.id.as_str()))
            .collect();
        found.sort_by(|one, other| other.cmp(one));
        found
    }

    /// The devices that go when the one called `id` goes, it among them: those of its slot, if it is function 0 of that, by which
    /// the guest finds them. From the last function to the first.
    pub(crate) fn going_with(&self, id: &str) -> Vec<String> {
        match self.find(id) {
            Some((address, true)) if address.function() == 0 => {
                let all = self.removable_in(address.device()).into_iter();
                all.map(|(_, id)| id.to_owned()).collect()
            }
            Some((_, true)) => vec![id.to_owned()],
            _ => Vec::new(),
        }
    }

    /// Function 0 of the slot at `address`, by its id.
    pub(crate) fn first_of(&self, address: PciAddress) -> Option<&str> {
        let first = |placed: &&Placed| placed.address.device() == address.device() && placed.address.function() == 0;
        self.functions.iter().find(first).map(|placed| placed.id.as_str())
    }

    /// Bit n: there is a device in slot n, be it that the guest cannot find it yet.
    pub(crate) fn taken_slots(&self) -> u32 {
        let bits = self.functions.iter().map(|placed| 1 << placed.address.device());
        bits.fold(1, |all, bit: u32| all | bit)
    }

    /// Bit n: slot n has a device that the guest finds; and: it stays.
    pub(crate) fn slots(&self) -> (u32, u32) {
        // The host bridge.
        let (mut present, mut fixed) = (1, 1);
        for placed in self.functions.iter().filter(|placed| placed.address.function() == 0) {
            let bit = 1u32.checked_shl(placed.address.device().into()).unwrap_or(0);
            present |= bit;
            fixed |= if placed.removable { 0 } else { bit };
        }
        (present, fixed)
    }
}
