//! Where a function sits.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

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

    /// The slot of bus 0 that leads there: its own, or that of the root port above, which gives its number to its bus
    /// ([`PciRoot`](crate::PciRoot)).
    pub const fn slot(self) -> u8 {
        if self.bus == 0 { self.device } else { self.bus }
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
