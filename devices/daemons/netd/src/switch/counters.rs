//! What a port counts. Directions are the guest's: it sends (tx) and receives (rx).

/// Why a frame was not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Drop {
    /// It is no frame, or its virtio header contradicts it.
    Malformed,
    /// It is for bridges only (01-80-C2).
    Reserved,
    /// The port is not in its VLAN.
    Vlan,
    /// It came from the port it was to go to.
    Hairpin,
    /// Its source hardware address is not the port's, or another port's.
    SpoofedMac,
    /// ARP in another's name.
    SpoofedArp,
    /// An IPv4 source that is not the port's.
    SpoofedIpv4,
    /// An IPv6 source that is not the port's.
    SpoofedIpv6,
    /// Neighbour discovery in another's name.
    SpoofedNd,
    /// A protocol whose addresses cannot be checked.
    SpoofedProtocol,
    /// It is longer than the MTU allows or the receiver's buffers hold.
    TooLong,
    /// The receiver's limit is used up.
    Rate,
    /// The receiver has no free buffers.
    NoBuffers,
    /// Nobody is connected to the port.
    Down,
    /// The host's interface did not take it.
    Host,
    /// The port does not exist any more.
    NoPort,
}

impl Drop {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::Malformed,
        Self::Reserved,
        Self::Vlan,
        Self::Hairpin,
        Self::SpoofedMac,
        Self::SpoofedArp,
        Self::SpoofedIpv4,
        Self::SpoofedIpv6,
        Self::SpoofedNd,
        Self::SpoofedProtocol,
        Self::TooLong,
        Self::Rate,
        Self::NoBuffers,
        Self::Down,
        Self::Host,
        Self::NoPort,
    ];

    /// Its name in figures.
    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Reserved => "reserved",
            Self::Vlan => "vlan",
            Self::Hairpin => "hairpin",
            Self::SpoofedMac => "spoofed_mac",
            Self::SpoofedArp => "spoofed_arp",
            Self::SpoofedIpv4 => "spoofed_ipv4",
            Self::SpoofedIpv6 => "spoofed_ipv6",
            Self::SpoofedNd => "spoofed_nd",
            Self::SpoofedProtocol => "spoofed_protocol",
            Self::TooLong => "too_long",
            Self::Rate => "rate",
            Self::NoBuffers => "no_buffers",
            Self::Down => "down",
            Self::Host => "host",
            Self::NoPort => "no_port",
        }
    }
}

/// Packets as they are on a wire, and bytes of frames.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counters {
    /// Packets the port sent.
    pub tx_packets: u64,
    /// Bytes of them.
    pub tx_bytes: u64,
    /// Packets the port received.
    pub rx_packets: u64,
    /// Bytes of them.
    pub rx_bytes: u64,
    drops: [u64; Drop::ALL.len()],
}

impl Counters {
    pub(super) fn sent(&mut self, packets: u32, bytes: usize) {
        self.tx_packets += u64::from(packets);
        self.tx_bytes += bytes as u64;
    }

    pub(super) fn received(&mut self, packets: u32, bytes: usize) {
        self.rx_packets += u64::from(packets);
        self.rx_bytes += bytes as u64;
    }

    pub(super) fn dropped(&mut self, reason: Drop) {
        self.drops[reason as usize] += 1;
    }

    /// Frames lost for this reason: those the port sent and those that were for it.
    pub fn drops(&self, reason: Drop) -> u64 {
        self.drops[reason as usize]
    }
}
