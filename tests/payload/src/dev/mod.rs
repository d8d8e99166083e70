//! Drivers, made when first used and kept until the command `init` makes them anew.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod flood;
pub mod fs;
pub mod iommu;
pub mod load;
pub mod net;
pub mod rng;
pub mod vmem;
pub mod vsock;

use crate::Guest;
use crate::pci::Function;
use crate::shell::Args;
use crate::virtio::ring::Queue;
use crate::virtio::{Transport, feature, kind};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use balloon::Balloon;
use blk::Blk;
use console::Console;
use fs::Fs;
use iommu::Iommu;
use net::Net;
use rng::Rng;
use vmem::Vmem;
use vsock::Vsock;

/// Virtio device types that have a driver here.
pub const KINDS: [(&str, u16); 9] = [
    ("net", 1),
    ("blk", 2),
    ("console", 3),
    ("rng", 4),
    ("balloon", 5),
    ("vsock", 19),
    ("iommu", 23),
    ("vmem", 24),
    ("fs", 26),
];

/// Receive buffers of a NIC's queue pair unless told otherwise.
const BUFFERS: u64 = 32;

/// What a driver asks the device for.
#[derive(Clone, Copy)]
pub struct Setup {
    /// Accept the event index.
    pub event_idx: bool,
    /// Accept indirect descriptors.
    pub indirect: bool,
    /// Largest queue size.
    pub size: u16,
    /// Queues (pairs, for a NIC).
    pub queues: u16,
    /// Accept receive offloads (NIC).
    pub offload: bool,
    /// Receive buffers of each queue pair (NIC).
    pub buffers: usize,
    /// How much higher the device has memory than it is (disk).
    pub offset: u64,
}

impl Setup {
    /// From `event_idx= indirect= size= queues= offload= buffers= offset=`.
    pub fn of(args: &Args) -> Self {
        let flag = |key| args.option(key, 1) != 0;
        Self {
            event_idx: flag("event_idx"),
            indirect: flag("indirect"),
            size: args.option("size", 128).clamp(1, 32768) as u16,
            queues: args.option("queues", 1).clamp(1, 64) as u16,
            offload: args.option("offload", 0) != 0,
            buffers: args.option("buffers", BUFFERS).clamp(1, 1024) as usize,
            offset: args.option("offset", 0),
        }
    }

    /// The transport's features to ask for.
    pub fn features(&self) -> u64 {
        let bit = |wanted, bit| if wanted { bit } else { 0 };
        let own = bit(self.event_idx, feature::EVENT_IDX) | bit(self.indirect, feature::INDIRECT_DESC);
        own | feature::ACCESS_PLATFORM
    }
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            event_idx: true,
            indirect: true,
            size: 128,
            queues: 1,
            offload: false,
            buffers: BUFFERS as usize,
            offset: 0,
        }
    }
}

/// What all drivers have.
pub trait Driver {
    /// Resets the device and starts it.
    fn start(function: Function, setup: &Setup) -> Result<Self, String>
    where
        Self: Sized;
    /// The device's registers.
    fn transport(&mut self) -> &mut Transport;
    /// Its queues.
    fn queues(&mut self) -> Vec<&mut Queue>;
    /// Number of the queue to misuse in ring tests: one the guest sends on.
    fn victim(&self) -> u16;
    /// Some work that proves the device works.
    fn prove(&mut self) -> Result<(), String>;
    /// After the BAR moved.
    fn remap(&mut self) -> Result<(), String>;
}

/// The drivers in use, by device type and position among the devices of that type.
#[derive(Default)]
pub struct Devices {
    blk: BTreeMap<usize, Box<Blk>>,
    net: BTreeMap<usize, Box<Net>>,
    console: BTreeMap<usize, Box<Console>>,
    rng: BTreeMap<usize, Box<Rng>>,
    vsock: BTreeMap<usize, Box<Vsock>>,
    balloon: BTreeMap<usize, Box<Balloon>>,
    vmem: BTreeMap<usize, Box<Vmem>>,
    fs: BTreeMap<usize, Box<Fs>>,
    iommu: BTreeMap<usize, Box<Iommu>>,
}

fn function(functions: &[Function], name: &str, index: usize) -> Result<Function, String> {
    let wanted = KINDS.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind);
    let mut all = functions
        .iter()
        .copied()
        .filter(|function| kind(*function) == wanted && wanted.is_some());
    all.nth(index).ok_or_else(|| format!("no {name} device {index}"))
}

macro_rules! accessors {
    ($($name:ident: $driver:ty),*) => {$(
        impl Guest {
            /// The driver of this device, started when it is not yet.
            pub fn $name(&mut self, index: usize) -> Result<&mut $driver, String> {
                if !self.devices.$name.contains_key(&index) {
                    let function = function(&self.functions, stringify!($name), index)?;
                    self.devices.$name.insert(index, Box::new(<$driver>::start(function, &Setup::default())?));
                }
                self.devices.$name.get_mut(&index).map(|driver| &mut **driver).ok_or_else(|| "no driver".into())
            }
        }
    )*
        impl Guest {
            /// The driver of a device by its names (`blk`, 0).
            pub fn driver(&mut self, name: &str, index: usize) -> Result<&mut dyn Driver, String> {
                match name {
                    $(stringify!($name) => self.$name(index).map(|driver| driver as &mut dyn Driver),)*
                    _ => Err(format!("no driver for {name}")),
                }
            }

            /// Resets the device and forgets its driver and buffers.
            pub fn drop_driver(&mut self, name: &str, index: usize) {
                match name {
                    $(stringify!($name) => if let Some(mut driver) = self.devices.$name.remove(&index) {
                        driver.transport().reset();
                    },)*
                    _ => {}
                }
            }

            /// The devices of this type from `index` on have become one more (`more`) or one less: their drivers move along.
            fn shift_drivers(&mut self, name: &str, index: usize, more: bool) {
                match name {
                    $(stringify!($name) => {
                        let moved = self.devices.$name.split_off(&index);
                        let to = |index: usize| if more { index + 1 } else { index - 1 };
                        self.devices.$name.extend(moved.into_iter().map(|(index, driver)| (to(index), driver)));
                    })*
                    _ => {}
                }
            }

            /// Forgets a driver whose device cannot be reached.
            fn lose_driver(&mut self, name: &str, index: usize) {
                match name {
                    $(stringify!($name) => drop(self.devices.$name.remove(&index)),)*
                    _ => {}
                }
            }

            /// Starts the device anew as `setup` wants it.
            pub fn restart(&mut self, name: &str, index: usize, setup: &Setup) -> Result<(), String> {
                let function = function(&self.functions, name, index)?;
                self.drop_driver(name, index);
                match name {
                    $(stringify!($name) => {
                        self.devices.$name.insert(index, Box::new(<$driver>::start(function, setup)?));
                    })*
                    _ => return Err(format!("no driver for {name}")),
                }
                Ok(())
            }
        }
    };
}

accessors!(blk: Blk, net: Net, console: Console, rng: Rng, vsock: Vsock, balloon: Balloon, vmem: Vmem, fs: Fs, iommu: Iommu);

impl Guest {
    /// Name of the type of the function at `place` of all, and its position among those of that type.
    fn place_of(&self, place: usize) -> Option<(&'static str, usize)> {
        let wanted = self.kinds.get(place).copied()?;
        let name = KINDS
            .iter()
            .find(|(_, known)| *known == wanted)
            .map(|(name, _)| *name)?;
        let before = &self.kinds[..place];
        Some((name, before.iter().filter(|known| **known == wanted).count()))
    }

    /// A function that came.
    pub fn add_function(&mut self, function: Function) {
        let place = self.functions.partition_point(|known| known.bdf < function.bdf);
        self.functions.insert(place, function);
        self.kinds.insert(place, kind(function).unwrap_or(0));
        if let Some((name, index)) = self.place_of(place) {
            self.shift_drivers(name, index, true);
        }
    }

    /// Takes the driver of the first disk, for work while other devices come and go; [`give_disk`](Self::give_disk) puts it back.
    pub fn take_disk(&mut self) -> Result<Box<Blk>, String> {
        self.blk(0)?;
        self.devices.blk.remove(&0).ok_or_else(|| "no driver".into())
    }

    /// Puts back what [`take_disk`](Self::take_disk) took.
    pub fn give_disk(&mut self, disk: Box<Blk>) {
        self.devices.blk.insert(0, disk);
    }

    /// A function that goes, in good order if it is `reachable`.
    pub fn remove_function(&mut self, bdf: u16, reachable: bool) {
        let Some(place) = self.functions.iter().position(|known| known.bdf == bdf) else {
            return;
        };
        if let Some((name, index)) = self.place_of(place) {
            if reachable {
                self.drop_driver(name, index);
            } else {
                self.lose_driver(name, index);
            }
            self.shift_drivers(name, index + 1, false);
        }
        self.functions.remove(place);
        self.kinds.remove(place);
    }
}

/// Splits `blk0` into its name and number.
pub fn device_name(word: &str) -> Result<(&str, usize), String> {
    let split = word.find(|c: char| c.is_ascii_digit()).unwrap_or(word.len());
    let (name, number) = word.split_at(split);
    let index = if number.is_empty() {
        0
    } else {
        number.parse().map_err(|_| format!("bad device {word}"))?
    };
    Ok((name, index))
}
