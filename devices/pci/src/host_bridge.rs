//! The function every guest finds at 00:00.0.

use std::sync::Mutex;

use crate::{ConfigSpace, Identity, PciFunction, lock};

/// The host bridge 8086:0d57. It only says that there is a bus.
pub struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    /// A bridge with nothing set.
    pub fn new() -> Self {
        Self(Mutex::new(ConfigSpace::new(&Identity {
            vendor: 0x8086,
            device: 0x0d57,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        })))
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        lock(&self.0).read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        lock(&self.0).write(offset, data);
    }
}
