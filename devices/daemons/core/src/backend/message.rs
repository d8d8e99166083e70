//! Numbers and layouts of the vhost-user protocol (QEMU's docs/interop/vhost-user.rst), from the back end's side.
//!
//! All numbers are of the machine's byte order, which is little-endian on every host Triarch runs on.

/// Bytes of a header: request, flags, size of the payload.
pub(crate) const HEADER: usize = 12;
/// More payload than any message we take has: a configuration space of 256 bytes, eight regions of memory.
pub(crate) const MAX_PAYLOAD: usize = 1024;
/// Descriptors that may come with one message: as many as SET_MEM_TABLE has regions.
pub(crate) const MAX_FDS: usize = 8;
/// Version 1, the only one, in the lowest two bits of the flags.
pub(crate) const VERSION: u32 = 1;
/// Bits of the flags with the version.
pub(crate) const VERSION_MASK: u32 = 3;
/// The message answers another one.
pub(crate) const REPLY: u32 = 1 << 2;
/// The sender wants to hear whether it worked.
pub(crate) const NEED_REPLY: u32 = 1 << 3;

/// The back end's own request: its configuration space changed.
pub(crate) const CONFIG_CHANGE: u32 = 2;

/// Instead of a descriptor: there is none.
pub(crate) const NO_FD: u64 = 1 << 8;

macro_rules! requests {
    ($($name:ident = $number:literal,)*) => {
        /// Requests of a front end that are understood.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(non_camel_case_types, clippy::upper_case_acronyms)] // the protocol's own names, to be found in its text
        pub(crate) enum Request { $($name = $number,)* }

        impl Request {
            /// The request of this number.
            pub(crate) fn of(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

requests! {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    RESET_OWNER = 4,
    SET_MEM_TABLE = 5,
    SET_LOG_BASE = 6,
    SET_LOG_FD = 7,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    SET_VRING_ERR = 14,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    GET_QUEUE_NUM = 17,
    SET_VRING_ENABLE = 18,
    SEND_RARP = 19,
    NET_SET_MTU = 20,
    SET_BACKEND_REQ_FD = 21,
    GET_CONFIG = 24,
    SET_CONFIG = 25,
    GET_INFLIGHT_FD = 31,
    SET_INFLIGHT_FD = 32,
    RESET_DEVICE = 34,
    GET_MAX_MEM_SLOTS = 36,
    ADD_MEM_REG = 37,
    REM_MEM_REG = 38,
    SET_STATUS = 39,
    GET_STATUS = 40,
}

impl Request {
    /// Whether the answer has a payload of its own, so that no other is sent.
    pub(crate) fn is_question(self) -> bool {
        use Request::*;
        matches!(
            self,
            GET_FEATURES
                | GET_PROTOCOL_FEATURES
                | GET_QUEUE_NUM
                | GET_VRING_BASE
                | GET_CONFIG
                | GET_INFLIGHT_FD
                | GET_MAX_MEM_SLOTS
                | GET_STATUS
                | SET_LOG_BASE
        )
    }
}

/// Feature bits that belong to the protocol and not to the device.
pub(crate) mod feature {
    /// Writes into the guest's memory are logged.
    pub(crate) const LOG_ALL: u64 = 1 << 26;
    /// There are protocol features.
    pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
}

/// Protocol features.
pub mod protocol {
    /// Several queues.
    pub const MQ: u64 = 1 << 0;
    /// The log of written pages comes as a file.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// The network is told where a guest is now.
    pub const RARP: u64 = 1 << 2;
    /// Orders can be confirmed.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// The front end says how large packets are.
    pub const NET_MTU: u64 = 1 << 4;
    /// The back end has requests of its own.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// The configuration space is the back end's.
    pub const CONFIG: u64 = 1 << 9;
    /// What is in flight is written down where a crash does not lose it.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// A device can be reset.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// Memory comes and goes in parts.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// The back end hears of the driver's status.
    pub const STATUS: u64 = 1 << 16;
    /// What every device offers.
    pub const COMMON: u64 = MQ
        | LOG_SHMFD
        | REPLY_ACK
        | BACKEND_REQ
        | CONFIG
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS
        | STATUS;
}

/// The numbers of a payload, one after the other.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(payload: &'a [u8]) -> Self {
        Self(payload)
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// A region of the front end's memory, as SET_MEM_TABLE and ADD_MEM_REG describe it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    /// Where guests see it.
    pub(crate) gpa: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// Where the front end sees it; addresses of rings are given so.
    pub(crate) user: u64,
    /// Where it begins in its file.
    pub(crate) offset: u64,
}

impl Region {
    pub(crate) fn read(reader: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            gpa: reader.u64()?,
            size: reader.u64()?,
            user: reader.u64()?,
            offset: reader.u64()?,
        })
    }
}

/// Two 32-bit numbers: a ring and a number that belongs to it.
pub(crate) fn ring_state(index: u32, number: u32) -> Vec<u8> {
    [index, number].iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// A whole message.
pub(crate) fn encode(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let head = [request, VERSION | flags, payload.len() as u32];
    let head = head.iter().flat_map(|v| v.to_le_bytes());
    head.chain(payload.iter().copied()).collect()
}
