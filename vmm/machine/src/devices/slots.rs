//! Slots of the bus, of which some have several functions: a guest finds those by function 0, and gives back slots as a whole.

use std::collections::BTreeSet;

use triarch_api::{DeviceNode, DeviceTree, VmConfig};
use triarch_pci::PciAddress;

use super::{Devices, Placed};
use crate::MachineError;
use crate::configured::DeviceConfig;

impl Devices {
    /// Keeps the slots free that devices of `config` have to be in, whatever comes before them.
    pub(super) fn reserve(&mut self, config: &VmConfig) {
        let mut reserved = Vec::new();
        for (device, place) in DeviceConfig::all(config).filter_map(|device| Some((device, device.place()?))) {
            reserved.push(place.slot());
            self.places.entry(device.id().to_owned()).or_insert(place);
        }
        self.host.root.reserve(reserved);
    }

    /// Finds a slot for `device`, if it is to have a root port above it, or to be in another node than 0, and has no place yet.
    pub(super) fn find_place(&mut self, device: DeviceConfig<'_>) -> Result<(), MachineError> {
        let id = device.id();
        let special = device.below_port() || device.root() != 0;
        if special && !self.places.contains_key(id) {
            let place = self.host.root.free_place(device.root(), device.below_port());
            let place = place.map_err(|source| MachineError::Slot {
                id: id.to_owned(),
                source,
            })?;
            self.places.insert(id.to_owned(), place);
        }
        Ok(())
    }

    /// Root ports as `vm.info` shows them, with what is below them: that has the port as its parent.
    pub(super) fn show_ports(&self, tree: &mut DeviceTree) {
        for placed in self.functions.iter().filter(|placed| !placed.address.is_on_root()) {
            let slot = placed.address.slot();
            let id = format!("_root-port-{slot:02x}");
            let shown = match placed.function.virtio() {
                Some(_) => format!("_virtio-pci-{}", placed.id),
                None => placed.id.clone(),
            };
            if let Some(node) = tree.get_mut(&shown) {
                node.parent = Some(id.clone());
            }
            let port = tree.entry(id.clone()).or_insert_with(|| DeviceNode {
                id,
                parent: None,
                children: Vec::new(),
                pci_bdf: Some(PciAddress::in_slot(0, slot, 0, false).to_string()),
            });
            port.children.push(shown);
        }
    }

    /// The devices in `slot` that can be taken, with their functions there, from the last to the first.
    pub(crate) fn removable_in(&self, slot: u8) -> Vec<(u8, &str)> {
        let in_slot = |placed: &&Placed| placed.address.slot() == slot && placed.removable;
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
                let all = self.removable_in(address.slot()).into_iter();
                all.map(|(_, id)| id.to_owned()).collect()
            }
            Some((_, true)) => vec![id.to_owned()],
            _ => Vec::new(),
        }
    }

    /// Function 0 of the slot at `address`, by its id.
    pub(crate) fn first_of(&self, address: PciAddress) -> Option<&str> {
        let first = |placed: &&Placed| placed.address.slot() == address.slot() && placed.address.function() == 0;
        self.functions.iter().find(first).map(|placed| placed.id.as_str())
    }

    /// Slots with a device, be it that the guest cannot find it yet.
    pub(crate) fn taken_slots(&self) -> BTreeSet<u8> {
        self.functions.iter().map(|placed| placed.address.slot()).collect()
    }

    /// Whether there is a root bus of the guest's node that `device` is to be in.
    pub(crate) fn has_root(&self, device: DeviceConfig<'_>) -> bool {
        usize::from(device.root()) < self.windows().len()
    }

    /// Slots with a device that the guest finds; and bit n: the one in slot n of bus 0 stays.
    pub(crate) fn slots(&self) -> (Vec<u8>, u32) {
        // The host bridge.
        let (mut present, mut fixed) = (vec![0], 1);
        for placed in self.functions.iter().filter(|placed| placed.address.function() == 0) {
            let slot = placed.address.slot();
            present.push(slot);
            let bit = 1u32.checked_shl(slot.into()).unwrap_or(0);
            fixed |= if placed.removable { 0 } else { bit };
        }
        (present, fixed)
    }
}
