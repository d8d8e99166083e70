//! Virtio over PCI, modern transport (virtio 1.2 §4.1).

pub mod ring;

use crate::arch::interrupts::connect;
use crate::arch::io::Mmio;
use crate::interrupts::Message;
use crate::pci::{Function, Msix};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use ring::{Options, Queue};

const VENDOR_CAPABILITY: u8 = 9;

/// Device status bits (virtio 1.2 §2.1).
pub mod status {
    /// The guest saw the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver.
    pub const DRIVER: u8 = 2;
    /// The driver runs.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed.
    pub const FEATURES_OK: u8 = 8;
    /// The device gave up.
    pub const NEEDS_RESET: u8 = 0x40;
}

/// Feature bits of the transport.
pub mod feature {
    /// Indirect descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Event index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Virtio 1.
    pub const VERSION_1: u64 = 1 << 32;
    /// Addresses are those of the platform's IOMMU.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
}

/// Offsets in the common configuration (virtio 1.2 §4.1.4.3).
mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 0xc;
    pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const CONFIG_GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
}

/// One device's registers.
pub struct Transport {
    /// Its PCI function.
    pub function: Function,
    /// Virtio device type: 1 net, 2 block, 3 console, 4 rng, 19 vsock.
    pub kind: u16,
    common: Mmio,
    notify: Mmio,
    notify_multiplier: u32,
    config: Option<Mmio>,
    /// BAR that holds the registers.
    pub bar: u8,
    /// Its MSI-X table.
    pub msix: Msix,
    config_message: Message,
}

/// The virtio device type of a function, `None` when it is not a virtio device.
pub fn kind(function: Function) -> Option<u16> {
    let id = function.id();
    match (id & 0xffff, id >> 16) {
        (0x1af4, device @ 0x1040..=0x107f) => Some((device - 0x1040) as u16),
        (0x1af4, 0x1000..=0x103f) => Some(function.read16(0x2e)),
        _ => None,
    }
}

impl Transport {
    /// Finds the registers of `function` and turns decoding on.
    pub fn new(function: Function) -> Result<Self, String> {
        let kind = kind(function).ok_or("not a virtio device")?;
        function.enable();
        let mut places = [None; 5];
        let mut notify_multiplier = 0;
        for (id, at) in function.capabilities() {
            let what = usize::from(function.read8(at + 3));
            if id != VENDOR_CAPABILITY || !(1..5).contains(&what) || places[what].is_some() {
                continue;
            }
            places[what] = Some((
                function.read8(at + 4),
                u64::from(function.read32(at + 8)),
                u64::from(function.read32(at + 12)),
            ));
            if what == 2 {
                notify_multiplier = function.read32(at + 16);
            }
        }
        let map = |what: usize| -> Result<Mmio, String> {
            let (bar, offset, len) = places[what].ok_or_else(|| format!("no virtio capability of type {what}"))?;
            function.map_bar(bar, offset, len.max(64))
        };
        Ok(Self {
            function,
            kind,
            common: map(1)?,
            notify: map(2)?,
            notify_multiplier,
            config: map(4).ok(),
            bar: places[1].map_or(0, |(bar, ..)| bar),
            msix: Msix::find(function)?,
            config_message: connect(function.bdf, 0)?,
        })
    }

    /// Vector of configuration changes.
    pub fn config_vector(&self) -> u8 {
        self.config_message.vector
    }

    /// The device status register.
    pub fn status(&self) -> u8 {
        self.common.read8(common::DEVICE_STATUS)
    }

    fn add_status(&self, bits: u8) {
        self.common.write8(common::DEVICE_STATUS, self.status() | bits);
    }

    /// Resets the device and waits until it says so.
    pub fn reset(&self) {
        self.common.write8(common::DEVICE_STATUS, 0);
        while self.status() != 0 {
            core::hint::spin_loop();
        }
    }

    /// What the device offers.
    pub fn offered(&self) -> u64 {
        (0..2).fold(0, |all, half| {
            self.common.write32(common::DEVICE_FEATURE_SELECT, half);
            all | u64::from(self.common.read32(common::DEVICE_FEATURE)) << (32 * half)
        })
    }

    /// Number of queues.
    pub fn queues(&self) -> u16 {
        self.common.read16(common::NUM_QUEUES)
    }

    /// Resets the device and agrees on `wanted`, as far as it is offered; returns what was agreed.
    pub fn negotiate(&self, wanted: u64) -> Result<u64, String> {
        self.reset();
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        let features = self.offered() & (wanted | feature::VERSION_1);
        for half in 0..2 {
            self.common.write32(common::DRIVER_FEATURE_SELECT, half);
            self.common
                .write32(common::DRIVER_FEATURE, (features >> (32 * half)) as u32);
        }
        self.add_status(status::FEATURES_OK);
        if self.status() & status::FEATURES_OK == 0 {
            return Err(format!("features {features:#x} refused"));
        }
        self.msix.enable();
        self.msix.set(0, self.config_message);
        self.common.write16(common::CONFIG_MSIX_VECTOR, 0);
        Ok(features)
    }

    /// Makes queue `index`, of at most `limit` entries, with a vector of its own and with `options` taken from the
    /// agreed features.
    pub fn queue(&self, index: u16, limit: u16, options: Options) -> Result<Queue, String> {
        let queue = self.unplaced_queue(index, limit, options)?;
        let (desc, avail, used) = queue.addresses();
        self.place_rings(index, desc, avail, used);
        Ok(queue)
    }

    /// The same without telling the device where its rings are, and without enabling it.
    pub fn unplaced_queue(&self, index: u16, limit: u16, options: Options) -> Result<Queue, String> {
        self.common.write16(common::QUEUE_SELECT, index);
        let size = self.common.read16(common::QUEUE_SIZE).min(limit);
        if size == 0 {
            return Err(format!("queue {index} does not exist"));
        }
        self.common.write16(common::QUEUE_SIZE, size);
        let entry = (1 + index).min(self.msix.entries - 1);
        let message = connect(self.function.bdf, entry)?;
        self.msix.set(entry, message);
        self.common.write16(common::QUEUE_MSIX_VECTOR, entry);
        if self.common.read16(common::QUEUE_MSIX_VECTOR) != entry {
            return Err(format!("MSI-X vector {entry} refused for queue {index}"));
        }
        let offset = u64::from(self.common.read16(common::QUEUE_NOTIFY_OFF)) * u64::from(self.notify_multiplier);
        Queue::new(index, size, options, message.vector, entry, self.notify, offset)
    }

    /// Writes the addresses of queue `index`'s rings and enables it.
    pub fn place_rings(&self, index: u16, desc: u64, avail: u64, used: u64) {
        self.common.write16(common::QUEUE_SELECT, index);
        self.common.write64(common::QUEUE_DESC, desc);
        self.common.write64(common::QUEUE_DRIVER, avail);
        self.common.write64(common::QUEUE_DEVICE, used);
        self.common.write16(common::QUEUE_ENABLE, 1);
    }

    /// Starts the device.
    pub fn run(&self) {
        self.add_status(status::DRIVER_OK);
    }

    fn device_config(&self) -> Result<Mmio, String> {
        self.config.ok_or_else(|| "no device configuration".into())
    }

    /// Bytes of the device configuration, read in one generation.
    pub fn config(&self, offset: u64, len: u64) -> Result<Vec<u8>, String> {
        let config = self.device_config()?;
        loop {
            let generation = self.common.read8(common::CONFIG_GENERATION);
            let bytes = (offset..offset + len).map(|at| config.read8(at)).collect();
            if self.common.read8(common::CONFIG_GENERATION) == generation {
                return Ok(bytes);
            }
        }
    }

    /// A little-endian number of `len` bytes (at most 8) of the device configuration.
    pub fn config_number(&self, offset: u64, len: u64) -> Result<u64, String> {
        Ok(self
            .config(offset, len)?
            .iter()
            .rev()
            .fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// Writes one byte of the device configuration.
    pub fn write_config8(&self, offset: u64, value: u8) -> Result<(), String> {
        self.device_config()?.write8(offset, value);
        Ok(())
    }

    /// Writes 32 bits of the device configuration.
    pub fn write_config32(&self, offset: u64, value: u32) -> Result<(), String> {
        self.device_config()?.write32(offset, value);
        Ok(())
    }

    /// Maps everything again after the BAR was moved.
    pub fn remap(&mut self, queues: &mut [&mut Queue]) -> Result<(), String> {
        let fresh = Self::new(self.function)?;
        self.common = fresh.common;
        self.notify = fresh.notify;
        self.config = fresh.config;
        self.msix = fresh.msix;
        for queue in queues {
            queue.move_notify(self.notify);
        }
        Ok(())
    }

    /// The registers of the common configuration: for tests that look at them raw.
    pub fn raw_common(&self) -> Mmio {
        self.common
    }
}
