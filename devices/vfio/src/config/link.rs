//! What a device below a root port shows of its link.

use super::{Config, LEGACY_SIZE, SIZE, u16_of, u32_of};

/// Offsets in the PCI Express capability (PCI Express 4.0, 7.5.3).
const FLAGS: usize = 0x02;
const LINK_CAPABILITIES: usize = 0x0c;
const LINK_CONTROL: usize = 0x10;
const LINK_STATUS: usize = 0x12;
const LINK_CAPABILITIES_2: usize = 0x2c;
/// Device types.
const LEGACY_ENDPOINT: u16 = 1;
const ENDPOINT: u16 = 0;
/// Speed and number of lanes, in capabilities and status.
const SPEED_AND_LANES: u16 = 0x03ff;
/// What a part of the root complex has, which has no link: the slowest, with one lane.
const ONE_LANE: u16 = 0x0011;
/// Bits of the control register that stick. They do nothing: the link of the device is the host's.
const CONTROL: u16 = 0x00cb;
/// Supported speeds.
const SPEEDS: u32 = 0xfe;

impl Config {
    /// Shows it as an endpoint, with the speed and the lanes that `device` has. Power management of the link is
    /// not shown: the host does that.
    pub(crate) fn show_link(&mut self, device: &[u8; SIZE]) {
        let Some(at) = self.express else { return };
        let kind = match u16_of(device, at + FLAGS) >> 4 & 0xf {
            LEGACY_ENDPOINT => LEGACY_ENDPOINT,
            _ => ENDPOINT,
        };
        let flags = u16_of(&self.bytes[..], at + FLAGS) & 0xf | kind << 4;
        let own = u16_of(device, at + LINK_CAPABILITIES) & SPEED_AND_LANES;
        let status = u16_of(device, at + LINK_STATUS) & SPEED_AND_LANES;
        let most = if own == 0 { ONE_LANE } else { own };
        // One that tells nothing works all the same.
        let now = if status == 0 { most } else { status };
        let mut put = |offset: usize, value: u16| {
            self.bytes[at + offset..at + offset + 2].copy_from_slice(&value.to_le_bytes());
        };
        put(FLAGS, flags);
        put(LINK_CAPABILITIES, most);
        put(LINK_STATUS, now);
        let mut mask = |offset: usize, bits: u16| {
            self.writable[at + offset..at + offset + 2].copy_from_slice(&bits.to_le_bytes());
        };
        mask(LINK_CONTROL, CONTROL);
        let second = at + LINK_CAPABILITIES_2;
        if flags & 0xf >= 2 && second + 4 <= LEGACY_SIZE {
            let speeds = u32_of(device, second) & SPEEDS;
            self.bytes[second..second + 4].copy_from_slice(&speeds.to_le_bytes());
        }
    }
}
