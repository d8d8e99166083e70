//! Where a function sits.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Buses that belong to a root bus: itself, and those below the ports in its slots. So the root buses are 0, 32, 64 and so on.
pub const BUSES_OF_ROOT: u8 = 32;

/// Segment, bus, device and function: `0000:00:01.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    segment: u16,
    bus: u8,
    device: u8,
    function: u8,
}

/// A text that is no PCI address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("not a PCI address of the form SSSS:BB:DD.F with a device up to 1f and a function up to 7")]
pub struct ParseAddressError;

impl PciAddress {
    /// The address, or `None` when `device` is above 31 or `function` above 7.
    pub const fn new(segment: u16, bus: u8, device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 {
            Some(Self {
                segment,
                bus,
                device,
                function,
            })
        } else {
            None
        }
    }

    /// Function `devfn & 7` of device `devfn >> 3`.
    pub const fn from_devfn(segment: u16, bus: u8, devfn: u8) -> Self {
        Self {
            segment,
            bus,
            device: devfn >> 3,
            function: devfn & 7,
        }
    }

    /// Segment group.
    pub const fn segment(self) -> u16 {
        self.segment
    }

    /// Bus in the segment.
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// Device (slot) on the bus, 0 to 31.
    pub const fn device(self) -> u8 {
        self.device
    }

    /// Function of the device, 0 to 7.
    pub const fn function(self) -> u8 {
        self.function
    }

    /// Device and function in one byte.
    pub const fn devfn(self) -> u8 {
        self.device << 3 | self.function
    }

    /// The slot that leads there: its own on a root bus, or that of the root port above, which gives its number to its bus
    /// ([`PciRoot`](crate::PciRoot)). Slots are numbered over all root buses: slot 33 is slot 1 of bus 32.
    pub const fn slot(self) -> u8 {
        if self.is_on_root() {
            self.bus | self.device
        } else {
            self.bus
        }
    }

    /// Which root bus leads there: this many times 32.
    pub const fn root(self) -> u8 {
        self.bus / BUSES_OF_ROOT
    }

    /// Whether it is on a root bus itself.
    pub const fn is_on_root(self) -> bool {
        self.bus.is_multiple_of(BUSES_OF_ROOT)
    }

    /// Function `function`, 0 to 7, in `slot` or below the root port there.
    pub const fn in_slot(segment: u16, slot: u8, function: u8, below_port: bool) -> Self {
        let (bus, device) = if below_port {
            (slot, 0)
        } else {
            (slot & !(BUSES_OF_ROOT - 1), slot % BUSES_OF_ROOT)
        };
        Self::from_devfn(segment, bus, device << 3 | function & 7)
    }

    /// Requester id: bus, device and function as they stand in a transaction (PCI Express 4.0, 2.2.6.2).
    pub const fn requester(self) -> u16 {
        (self.bus as u16) << 8 | self.devfn() as u16
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{:x}",
            self.segment, self.bus, self.device, self.function
        )
    }
}

impl FromStr for PciAddress {
    type Err = ParseAddressError;

    /// Accepts the segment or not: `0000:00:01.0` or `00:01.0`, in hexadecimal.
    fn from_str(text: &str) -> Result<Self, ParseAddressError> {
        let (rest, function) = text.rsplit_once('.').ok_or(ParseAddressError)?;
        let (rest, device) = rest.rsplit_once(':').ok_or(ParseAddressError)?;
        let (segment, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
        let hex = |digits: &str, most: usize| {
            let plain = digits.len() <= most && digits.bytes().all(|b| b.is_ascii_hexdigit());
            u16::from_str_radix(if plain { digits } else { "" }, 16).map_err(|_| ParseAddressError)
        };
        let byte = |digits: &str, most| hex(digits, most).map(|n| n as u8); // at most two digits
        Self::new(hex(segment, 4)?, byte(bus, 2)?, byte(device, 2)?, byte(function, 1)?).ok_or(ParseAddressError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_parses() {
        let address = PciAddress::new(1, 0x2a, 0x1f, 7).expect("address");
        assert_eq!(address.to_string(), "0001:2a:1f.7");
        assert_eq!("0001:2a:1f.7".parse(), Ok(address));
        assert_eq!("00:01.0".parse::<PciAddress>(), Ok(PciAddress::from_devfn(0, 0, 8)));
        assert_eq!(address.requester(), 0x2aff);
    }

    #[test]
    fn slots_are_numbered_over_all_root_buses() {
        for (slot, below, place) in [
            (6, false, "0000:00:06.1"),
            (6, true, "0000:06:00.1"),
            (33, false, "0000:20:01.1"),
            (33, true, "0000:21:00.1"),
            (255, false, "0000:e0:1f.1"),
        ] {
            let address = PciAddress::in_slot(0, slot, 1, below);
            assert_eq!((address.to_string().as_str(), address.slot()), (place, slot));
            assert_eq!((address.root(), address.is_on_root()), (slot / 32, !below));
        }
    }

    #[test]
    fn refuses_what_is_no_address() {
        for bad in [
            "",
            "1",
            "00:01",
            "00:20.0",
            "00:01.8",
            "00:01.",
            ":01.0",
            "00000:00:01.0",
            "0:0:0:1.0",
            "00:+1.0",
            "00:100.0",
            "00:01.0 ",
        ] {
            assert_eq!(bad.parse::<PciAddress>(), Err(ParseAddressError), "{bad:?}");
        }
    }
}
