//! What a port may do.

use std::fmt;
use std::str::FromStr;

use super::bucket::Limit;
use super::frame::Mac;
use super::guard::Guard;

/// The VLAN of frames without a tag where nothing else is said.
pub const DEFAULT_VLAN: u16 = 1;
/// VLANs are 1 to this.
pub const MAX_VLAN: u16 = 4094;

/// A set of VLANs.
#[derive(Clone, PartialEq, Eq)]
pub struct VlanSet(Box<[u64; 64]>);

impl VlanSet {
    /// Whether `vlan` is one of them.
    pub fn contains(&self, vlan: u16) -> bool {
        self.0
            .get(usize::from(vlan / 64))
            .is_some_and(|word| word >> (vlan % 64) & 1 != 0)
    }

    fn insert(&mut self, vlan: u16) {
        if let Some(word) = self.0.get_mut(usize::from(vlan / 64)) {
            *word |= 1 << (vlan % 64);
        }
    }
}

impl FromStr for VlanSet {
    type Err = String;

    /// `1+2+10-20`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut set = Self(Box::new([0; 64]));
        for part in text.split('+') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (vlan(first)?, vlan(last)?);
            if first > last {
                return Err(format!("'{part}' runs backwards; write {last}-{first}"));
            }
            (first..=last).for_each(|vlan| set.insert(vlan));
        }
        Ok(set)
    }
}

impl fmt::Display for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        let mut vlan = 1;
        while vlan <= MAX_VLAN {
            if !self.contains(vlan) {
                vlan += 1;
                continue;
            }
            let first = vlan;
            while self.contains(vlan + 1) {
                vlan += 1;
            }
            write!(f, "{separator}{first}")?;
            if vlan > first {
                write!(f, "-{vlan}")?;
            }
            separator = "+";
            vlan += 1;
        }
        Ok(())
    }
}

impl fmt::Debug for VlanSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VlanSet({self})")
    }
}

/// Reads the number of a VLAN.
pub fn vlan(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(vlan @ 1..=MAX_VLAN) => Ok(vlan),
        _ => Err(format!("'{text}' is no VLAN; write a number from 1 to {MAX_VLAN}")),
    }
}

/// Which VLANs a port is in (802.1Q).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Vlans {
    /// In one, without tags.
    Access(u16),
    /// In all of these, with tags.
    Trunk {
        /// Which.
        tagged: VlanSet,
        /// The one whose frames have no tag, if any; it need not be among the others.
        native: Option<u16>,
    },
}

impl Default for Vlans {
    fn default() -> Self {
        Self::Access(DEFAULT_VLAN)
    }
}

impl Vlans {
    /// The VLAN a frame with this tag belongs to when it comes in; `None`: it may not.
    pub fn classify(&self, tci: Option<u16>) -> Option<u16> {
        // A tag of VLAN 0 has a priority and nothing else.
        let tag = tci.map(|tci| tci & 0xfff).filter(|vlan| *vlan != 0);
        match (self, tag) {
            (Self::Access(vlan), None) => Some(*vlan),
            (Self::Access(_), Some(_)) => None,
            (Self::Trunk { native, .. }, None) => *native,
            (Self::Trunk { tagged, .. }, Some(vlan)) => tagged.contains(vlan).then_some(vlan),
        }
    }

    /// Whether frames of `vlan` go out here, and if so whether with a tag.
    pub fn admits(&self, vlan: u16) -> Option<bool> {
        match self {
            Self::Access(own) => (*own == vlan).then_some(false),
            Self::Trunk { native, .. } if *native == Some(vlan) => Some(false),
            Self::Trunk { tagged, .. } => tagged.contains(vlan).then_some(true),
        }
    }

    /// Those in which the port's own address is known from the start.
    pub fn all(&self) -> Vec<u16> {
        match self {
            Self::Access(vlan) => vec![*vlan],
            Self::Trunk { .. } => (1..=MAX_VLAN).filter(|vlan| self.admits(*vlan).is_some()).collect(),
        }
    }
}

/// What a port may do, all of which can be changed at any time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Its hardware address, if that is configured: frames to it go there and nowhere else.
    pub mac: Option<Mac>,
    /// Which VLANs it is in.
    pub vlans: Vlans,
    /// What it may say it is; `None`: anything.
    pub guard: Option<Guard>,
    /// What it may send.
    pub tx: Limit,
    /// What is sent to it.
    pub rx: Limit,
    /// The largest frame without its Ethernet header, in bytes.
    pub mtu: Option<u16>,
    /// Addresses that are learnt there.
    pub max_macs: usize,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            mac: None,
            vlans: Vlans::default(),
            guard: None,
            tx: Limit::default(),
            rx: Limit::default(),
            mtu: None,
            max_macs: 1024,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_vlans_are_written_as_they_are_read() {
        for text in ["1", "1+2", "1-2+10-20+4094", "63-65"] {
            let set: VlanSet = text.parse().expect(text);
            let text = text.replace("1+2", "1-2");
            assert_eq!(set.to_string(), text);
        }
        for bad in ["", "0", "4095", "2-1", "1+", "a", "1-2-3", "65536"] {
            bad.parse::<VlanSet>().expect_err(bad);
        }
    }

    #[test]
    fn tags_belong_on_trunks() {
        let access = Vlans::Access(7);
        assert_eq!(access.classify(None), Some(7));
        assert_eq!(access.classify(Some(0xa000)), Some(7));
        assert_eq!(access.classify(Some(7)), None);
        assert_eq!((access.admits(7), access.admits(8)), (Some(false), None));
        let trunk = Vlans::Trunk {
            tagged: "10-20".parse().expect("a set"),
            native: Some(3),
        };
        assert_eq!(trunk.classify(Some(0x600a)), Some(10));
        assert_eq!(trunk.classify(Some(9)), None);
        assert_eq!(trunk.classify(None), Some(3));
        assert_eq!(trunk.classify(Some(0)), Some(3));
        assert_eq!(
            (trunk.admits(10), trunk.admits(3), trunk.admits(9)),
            (Some(true), Some(false), None)
        );
    }
}
