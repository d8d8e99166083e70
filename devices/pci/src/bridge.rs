//! Root ports: bridges on bus 0 with a bus of their own below.

use std::sync::Mutex;

use crate::{ConfigSpace, Identity, LayoutError, PciFunction, lock};

/// Red Hat's PCI Express root port, which drivers know.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x000c,
    revision: 0,
    class: 0x06_04_00,
    subsystem_vendor: 0,
    subsystem: 0,
};
const MSI: u8 = 0x05;
/// Message control: addresses of 64 bits, one vector. Body and bits that can be written.
const MSI_BODY: [u8; 12] = [0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const MSI_WRITABLE: [u8; 12] = [1, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
const EXPRESS: u8 = 0x10;
/// Registers of the PCI Express capability (PCI Express 4.0, 7.5.3): offset behind its id and link, value, bits that can be written. The slot
/// below is no slot, so there is no hot-plug of its own. A link at 16 GT/s with 16 lanes is up.
const EXPRESS_REGISTERS: [(usize, u32, u32); 8] = [
    // Version 2, root port.
    (0x00, 0x0042, 0),
    // Errors are told by their role.
    (0x02, 0x8000, 0),
    (0x06, 0, 0x7fff),
    (0x0a, 4 | 16 << 4 | 1 << 20, 0),
    // Control; status: the same speed and lanes, the link is active.
    (0x0e, (4 | 16 << 4 | 1 << 13) << 16, 0x00cb),
    (0x1a, 0, 0x000f),
    // Speeds up to that; the one wanted.
    (0x2a, 0x1e, 0),
    (0x2e, 4, 0x000f),
];
const EXPRESS_LEN: usize = 0x3a;
/// Access control services (PCI Express 4.0, 7.7.8): all that a root port can do to keep what is below apart.
const ACS: u16 = 0x0d;
const ACS_SERVICES: u8 = 0x1f;
/// Bytes of its registers, the last of which are those of the services.
const STATE: usize = 0x108;

/// What a bridge lets through, as its registers stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bridge {
    /// Number of the bus below; 0: none yet.
    pub secondary: u8,
    /// First and last address of the windows: for any memory, for prefetchable memory. `None` when nothing passes.
    pub windows: [Option<(u64, u64)>; 2],
    /// The bus below is held in reset.
    pub reset: bool,
}

impl Bridge {
    /// Whether accesses to memory from `first` to `last` reach the bus below.
    pub fn forwards(&self, first: u64, last: u64) -> bool {
        let inside = |window: &(u64, u64)| window.0 <= first && last <= window.1;
        self.windows.iter().flatten().any(inside)
    }
}

/// A PCI Express root port. What is below it, it does not know: that is [`PciRoot`](crate::PciRoot)'s.
pub struct RootPort(Mutex<ConfigSpace>);

impl RootPort {
    /// A port with nothing set.
    pub fn new() -> Result<Self, LayoutError> {
        let mut space = ConfigSpace::bridge(&IDENTITY);
        // A driver that waits for events of the port wants an interrupt; there are no events.
        space.add_capability(MSI, &MSI_BODY, &MSI_WRITABLE)?;
        let (mut body, mut writable) = ([0; EXPRESS_LEN], [0; EXPRESS_LEN]);
        for (at, value, bits) in EXPRESS_REGISTERS {
            // The first two are neighbours of 16 bits.
            let len = if at == 0 { 2 } else { 4 };
            body[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
            writable[at..at + len].copy_from_slice(&bits.to_le_bytes()[..len]);
        }
        space.add_capability(EXPRESS, &body, &writable)?;
        space.add_extended_capability(ACS, 1, &[ACS_SERVICES, 0, 0, 0], &[0, 0, ACS_SERVICES, 0])?;
        Ok(Self(Mutex::new(space)))
    }

    /// All that a guest may have written.
    pub fn save(&self) -> Vec<u8> {
        let mut bytes = vec![0; STATE];
        lock(&self.0).read(0, &mut bytes);
        bytes
    }

    /// Takes over what was saved, as far as a guest may have written it.
    pub fn restore(&self, saved: &[u8]) {
        let saved = saved.get(..STATE).unwrap_or(saved);
        lock(&self.0).write(0, saved);
    }
}

impl PciFunction for RootPort {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        lock(&self.0).read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        lock(&self.0).write(offset, data);
    }
    fn bridge(&self) -> Option<Bridge> {
        Some(lock(&self.0).forwards())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn register(port: &RootPort, offset: u16) -> u32 {
        let mut data = [0; 4];
        port.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_port_is_a_bridge_with_a_link_and_access_control() {
        let port = RootPort::new().expect("a port");
        assert_eq!(register(&port, 0), 0x000c_1b36);
        assert_eq!(register(&port, 8) >> 8, 0x06_0400);
        assert_eq!(register(&port, 0x0c) >> 16, 1, "header type 1");
        assert_eq!(register(&port, 0x1c), 0, "no I/O window");
        let mut capabilities = Vec::new();
        let mut at = register(&port, 0x34) as u16 & 0xff;
        while at != 0 {
            capabilities.push((register(&port, at) as u8, at));
            at = (register(&port, at) >> 8) as u16 & 0xff;
        }
        let [(MSI, _), (EXPRESS, express)] = capabilities[..] else {
            panic!("{capabilities:x?}")
        };
        assert_eq!(register(&port, express) >> 16, 0x42, "version 2, root port, no slot");
        assert_eq!(register(&port, express + 0xc), 0x10_0104);
        assert_eq!(register(&port, express + 0x10) >> 16, 0x2104);
        assert_eq!((register(&port, 0x100), register(&port, 0x104)), (0x1_000d, 0x1f));
        port.config_write(0x106, &[0xff; 2]);
        assert_eq!(register(&port, 0x104), 0x1f_001f);
    }

    #[test]
    fn windows_pass_what_lies_in_them_while_memory_is_enabled() {
        let port = RootPort::new().expect("a port");
        let now = || port.bridge().expect("a bridge");
        port.config_write(4, &[6]);
        assert_eq!(now(), Bridge::default(), "closed, without a bus");
        port.config_write(0x18, &[0, 5, 7, 0xff]);
        port.config_write(0x20, &[0x10, 0xc0, 0x20, 0xc0]);
        port.config_write(0x24, &[0x00, 0x40, 0xf0, 0x4f]);
        port.config_write(0x28, &[2, 0, 0, 0]);
        port.config_write(0x2c, &[2, 0, 0, 0]);
        let open = now();
        assert_eq!(open.secondary, 5);
        assert_eq!(
            open.windows,
            [Some((0xc010_0000, 0xc02f_ffff)), Some((0x2_4000_0000, 0x2_4fff_ffff))]
        );
        assert!(open.forwards(0xc02f_f000, 0xc02f_ffff) && open.forwards(0x2_4000_0000, 0x2_4fff_ffff));
        assert!(!open.forwards(0xc02f_f000, 0xc030_0fff) && !open.forwards(0x4000_0000, 0x4000_0fff));
        port.config_write(0x3e, &[0x40, 0]);
        assert!(now().reset);
        port.config_write(0x3e, &[0, 0]);
        let saved = port.save();
        port.config_write(4, &[4]);
        assert_eq!(now().windows, [None, None], "memory is off");
        let other = RootPort::new().expect("a port");
        other.restore(&saved);
        assert_eq!((other.bridge(), other.save()), (Some(open), saved));
    }
}
