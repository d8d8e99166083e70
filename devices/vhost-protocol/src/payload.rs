//! What follows a header ("Payload").

/// A payload, or the beginning of one.
pub trait Payload: Sized {
    /// Takes it from what is left of a payload; `None` if that is too short. What the numbers say is not looked at.
    fn read(from: &mut Reader<'_>) -> Option<Self>;

    /// Puts it behind `to`.
    fn write(&self, to: &mut Vec<u8>);

    /// It alone.
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write(&mut bytes);
        bytes
    }
}

/// The numbers of a payload, one after the other.
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// From the beginning of `payload`.
    pub fn new(payload: &'a [u8]) -> Self {
        Self(payload)
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// What was not read.
    pub fn rest(self) -> &'a [u8] {
        self.0
    }
}

fn put(to: &mut Vec<u8>, numbers: &[u64]) {
    to.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
}

fn put_halves(to: &mut Vec<u8>, numbers: &[u32]) {
    to.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
}

/// "A single 64-bit integer".
impl Payload for u64 {
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        from.u64()
    }

    fn write(&self, to: &mut Vec<u8>) {
        put(to, &[*self]);
    }
}

/// "A vring state description": a ring, and a number for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringState {
    /// The ring.
    pub index: u32,
    /// What it means depends on the request.
    pub number: u32,
}

impl Payload for VringState {
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            index: from.u32()?,
            number: from.u32()?,
        })
    }

    fn write(&self, to: &mut Vec<u8>) {
        put_halves(to, &[self.index, self.number]);
    }
}

/// "A vring address description". Addresses of its three parts are the front end's own ("user addresses").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringAddress {
    /// The ring.
    pub index: u32,
    /// [`VringAddress::LOG`].
    pub flags: u32,
    /// Its descriptor table.
    pub descriptors: u64,
    /// Its used ring.
    pub used: u64,
    /// Its available ring.
    pub available: u64,
    /// Where writes to the used ring are logged, as if they went to this GPA.
    pub log: u64,
}

impl VringAddress {
    /// Flag VHOST_VRING_F_LOG: writes to the used ring are logged.
    pub const LOG: u32 = 1 << 0;
}

impl Payload for VringAddress {
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            index: from.u32()?,
            flags: from.u32()?,
            descriptors: from.u64()?,
            used: from.u64()?,
            available: from.u64()?,
            log: from.u64()?,
        })
    }

    fn write(&self, to: &mut Vec<u8>) {
        put_halves(to, &[self.index, self.flags]);
        put(to, &[self.descriptors, self.used, self.available, self.log]);
    }
}

/// Payload of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR: which ring the descriptor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringFd {
    /// The ring, up to 255.
    pub index: u16,
    /// There is no descriptor.
    pub none: bool,
}

impl VringFd {
    /// The bits of the ring's number, and the one that says that there is no descriptor.
    const INDEX: u64 = 0xff;
    const NONE: u64 = 1 << 8;
}

impl Payload for VringFd {
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let bits = from.u64()?;
        Some(Self {
            index: (bits & Self::INDEX) as u16,
            none: bits & Self::NONE != 0,
        })
    }

    fn write(&self, to: &mut Vec<u8>) {
        let none = if self.none { Self::NONE } else { 0 };
        put(to, &[u64::from(self.index) | none]);
    }
}

/// A region of the front end's memory ("Memory regions description").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Where guests see it (GPA).
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Where the front end sees it; addresses of rings are given so.
    pub user: u64,
    /// Where it begins in its file, in bytes.
    pub offset: u64,
}

impl Payload for Region {
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            gpa: from.u64()?,
            size: from.u64()?,
            user: from.u64()?,
            offset: from.u64()?,
        })
    }

    fn write(&self, to: &mut Vec<u8>) {
        put(to, &[self.gpa, self.size, self.user, self.offset]);
    }
}

impl Region {
    /// It alone ("Single memory region description"): payload of ADD_MEM_REG and REM_MEM_REG.
    pub fn encode_single(&self) -> Vec<u8> {
        let mut bytes = 0u64.encode();
        self.write(&mut bytes);
        bytes
    }

    /// The one of ADD_MEM_REG and REM_MEM_REG; `None` if the payload is too short.
    pub fn read_single(from: &mut Reader<'_>) -> Option<Self> {
        let _padding = from.u64()?;
        Self::read(from)
    }
}

/// "Memory regions description": payload of SET_MEM_TABLE. Reading takes as many regions as the payload says and has.
impl Payload for Vec<Region> {
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let (count, _padding) = (from.u32()?, from.u32()?);
        (0..count).map(|_| Region::read(from)).collect()
    }

    fn write(&self, to: &mut Vec<u8>) {
        put_halves(to, &[self.len() as u32, 0]);
        for region in self {
            region.write(to);
        }
    }
}

/// "Log description": payload of SET_LOG_BASE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogArea {
    /// Bytes.
    pub bytes: u64,
    /// Where the bit of GPA 0 is in the file, in bytes.
    pub offset: u64,
}

impl Payload for LogArea {
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            bytes: from.u64()?,
            offset: from.u64()?,
        })
    }

    fn write(&self, to: &mut Vec<u8>) {
        put(to, &[self.bytes, self.offset]);
    }
}

/// "Virtio device config space" without the bytes that follow: payload of GET_CONFIG, its answer, and SET_CONFIG.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigRange {
    /// The first byte's place in the configuration space.
    pub offset: u32,
    /// How many bytes follow; none in an answer that says that it failed.
    pub size: u32,
    /// Whom a write serves; 0 for one of the driver's.
    pub flags: u32,
}

impl ConfigRange {
    /// Bytes of the range itself.
    pub const BYTES: usize = 12;

    /// The whole payload, for a driver's access to `data` at `offset`.
    pub fn encode_with(offset: u32, data: &[u8]) -> Vec<u8> {
        let range = Self {
            offset,
            size: data.len() as u32,
            flags: 0,
        };
        let mut bytes = range.encode();
        bytes.extend(data);
        bytes
    }
}

impl Payload for ConfigRange {
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            offset: from.u32()?,
            size: from.u32()?,
            flags: from.u32()?,
        })
    }

    fn write(&self, to: &mut Vec<u8>) {
        put_halves(to, &[self.offset, self.size, self.flags]);
    }
}

/// "Inflight description": payload of GET_INFLIGHT_FD, its answer, and SET_INFLIGHT_FD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InflightShape {
    /// Bytes.
    pub bytes: u64,
    /// Where it begins in the file, in bytes.
    pub offset: u64,
    /// Queues that have a part in it.
    pub queues: u16,
    /// Descriptors of each.
    pub size: u16,
}

impl Payload for InflightShape {
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        // The structure is padded to a whole number of 64 bits, which not everybody sends.
        Some(Self {
            bytes: from.u64()?,
            offset: from.u64()?,
            queues: from.u16()?,
            size: from.u16()?,
        })
    }

    fn write(&self, to: &mut Vec<u8>) {
        put(to, &[self.bytes, self.offset]);
        to.extend([self.queues.to_le_bytes(), self.size.to_le_bytes(), [0; 2], [0; 2]].concat());
    }
}

/// "Device state transfer parameters": payload of SET_DEVICE_STATE_FD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateTransfer {
    /// [`StateTransfer::SAVE`] or [`StateTransfer::LOAD`].
    pub direction: u32,
    /// [`StateTransfer::STOPPED`].
    pub phase: u32,
}

impl StateTransfer {
    /// Direction: from the back end to the front end.
    pub const SAVE: u32 = 0;
    /// Direction: from the front end to the back end.
    pub const LOAD: u32 = 1;
    /// Phase: all rings have stopped. There is no other yet.
    pub const STOPPED: u32 = 0;
}

impl Payload for StateTransfer {
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            direction: from.u32()?,
            phase: from.u32()?,
        })
    }

    fn write(&self, to: &mut Vec<u8>) {
        put_halves(to, &[self.direction, self.phase]);
    }
}

/// What SET_DEVICE_STATE_FD is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateAnswer {
    /// 0 if it worked.
    pub error: u8,
    /// There is no descriptor with it: the one that came with the request is used.
    pub none: bool,
}

impl Payload for StateAnswer {
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let bits = from.u64()?;
        Some(Self {
            error: (bits & 0xff) as u8,
            none: bits & VringFd::NONE != 0,
        })
    }

    fn write(&self, to: &mut Vec<u8>) {
        let none = if self.none { VringFd::NONE } else { 0 };
        put(to, &[u64::from(self.error) | none]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written is so many bytes, is read again, and not from one byte less.
    fn there_and_back<T: Payload + PartialEq + std::fmt::Debug>(value: &T, bytes: usize, needed: usize) -> Vec<u8> {
        let written = value.encode();
        assert_eq!(written.len(), bytes);
        assert_eq!(T::read(&mut Reader::new(&written)).as_ref(), Some(value));
        assert_eq!(T::read(&mut Reader::new(&written[..needed - 1])), None);
        written
    }

    #[test]
    fn layouts_are_the_protocols() {
        assert_eq!(there_and_back(&0x0102u64, 8, 8), [2, 1, 0, 0, 0, 0, 0, 0]);
        let state = VringState { index: 3, number: 256 };
        assert_eq!(there_and_back(&state, 8, 8), [3, 0, 0, 0, 0, 1, 0, 0]);
        let addresses = VringAddress {
            index: 1,
            flags: VringAddress::LOG,
            descriptors: 2,
            used: 3,
            available: 4,
            log: 5,
        };
        let bytes = there_and_back(&addresses, 40, 40);
        assert_eq!([0, 4, 8, 16, 24, 32].map(|at| bytes[at]), [1, 1, 2, 3, 4, 5]);
        let config = ConfigRange {
            offset: 7,
            size: 8,
            flags: 1,
        };
        assert_eq!(
            there_and_back(&config, ConfigRange::BYTES, 12),
            [7, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0]
        );
        assert_eq!(
            ConfigRange::encode_with(7, &[9; 2]),
            [7, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 9, 9]
        );
        there_and_back(&LogArea { bytes: 1, offset: 2 }, 16, 16);
        let shape = InflightShape {
            bytes: 1,
            offset: 2,
            queues: 3,
            size: 4,
        };
        let bytes = there_and_back(&shape, 24, 20);
        assert_eq!([0, 8, 16, 18].map(|at| bytes[at]), [1, 2, 3, 4]);
    }

    #[test]
    fn memory_is_described_alone_and_in_tables() {
        let region = |n| Region {
            gpa: n,
            size: n + 1,
            user: n + 2,
            offset: n + 3,
        };
        let table = vec![region(10), region(20)];
        let bytes = there_and_back(&table, 8 + 2 * 32, 8 + 2 * 32);
        assert_eq!([0, 8, 16, 24, 32, 40].map(|at| bytes[at]), [2, 10, 11, 12, 13, 20]);
        // One says how many there are; the payload has to have them.
        let mut lie = table.encode();
        lie[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Vec::<Region>::read(&mut Reader::new(&lie)), None);
        let single = region(10).encode_single();
        assert_eq!((single.len(), single[8]), (40, 10));
        assert_eq!(Region::read_single(&mut Reader::new(&single)), Some(region(10)));
        assert_eq!(Region::read_single(&mut Reader::new(&single[..39])), None);
    }

    #[test]
    fn a_ring_may_have_no_descriptor() {
        let none = VringFd { index: 5, none: true };
        assert_eq!(there_and_back(&none, 8, 8)[..2], [5, 1]);
        let some = VringFd {
            index: 255,
            none: false,
        };
        assert_eq!(there_and_back(&some, 8, 8)[..2], [255, 0]);
        // Bits that nobody knows yet are not the ring's.
        let bits = (1u64 << 40 | 1 << 9 | 6).encode();
        let read = VringFd::read(&mut Reader::new(&bits));
        assert_eq!(read, Some(VringFd { index: 6, none: false }));
    }

    #[test]
    fn state_goes_one_way_or_the_other() {
        let load = StateTransfer {
            direction: StateTransfer::LOAD,
            phase: StateTransfer::STOPPED,
        };
        assert_eq!(there_and_back(&load, 8, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
        let failed = StateAnswer { error: 1, none: true };
        assert_eq!(there_and_back(&failed, 8, 8)[..2], [1, 1]);
        let taken = StateAnswer { error: 0, none: false };
        assert_eq!(there_and_back(&taken, 8, 8), [0; 8]);
    }

    #[test]
    fn what_follows_a_range_is_the_rest() {
        let bytes = ConfigRange::encode_with(0, &[4, 5]);
        let mut reader = Reader::new(&bytes);
        assert_eq!(ConfigRange::read(&mut reader).map(|range| range.size), Some(2));
        assert_eq!(reader.rest(), [4, 5]);
    }
}
