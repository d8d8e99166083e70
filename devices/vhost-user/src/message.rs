//! What front end and daemon say to each other: numbers and layouts of the vhost-user protocol (QEMU's docs/interop/vhost-user.rst).
//!
//! All numbers are of the machine's byte order, which is little-endian on every host Triarch runs on.

/// Bytes of a header: request, flags, size of the payload.
pub(crate) const HEADER: usize = 12;
/// More payload than any message we take has.
pub(crate) const MAX_PAYLOAD: usize = 4096;
/// Version 1, the only one, in the lowest two bits of the flags.
pub(crate) const VERSION: u32 = 1;
/// Bits of the flags with the version.
pub(crate) const VERSION_MASK: u32 = 3;
/// The message answers another one.
pub(crate) const REPLY: u32 = 1 << 2;
/// The sender wants to hear whether it worked.
pub(crate) const NEED_REPLY: u32 = 1 << 3;

/// Requests of the front end that are used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(non_camel_case_types, clippy::upper_case_acronyms)] // the protocol's own names, to be found in its text
pub(crate) enum Request {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    SET_MEM_TABLE = 5,
    SET_LOG_BASE = 6,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
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
}

/// The daemon's own request: its configuration space changed.
pub(crate) const CONFIG_CHANGE: u32 = 2;

/// Feature bit with which a daemon says that it has protocol features.
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Feature bit with which a daemon says that it can log which pages it writes, and is told to.
pub(crate) const LOG_ALL: u64 = 1 << 26;

/// Protocol features that are used here.
pub(crate) mod protocol {
    pub(crate) const MQ: u64 = 1 << 0;
    pub(crate) const LOG_SHMFD: u64 = 1 << 1;
    pub(crate) const RARP: u64 = 1 << 2;
    pub(crate) const REPLY_ACK: u64 = 1 << 3;
    pub(crate) const NET_MTU: u64 = 1 << 4;
    pub(crate) const BACKEND_REQ: u64 = 1 << 5;
    pub(crate) const CONFIG: u64 = 1 << 9;
    pub(crate) const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub(crate) const RESET_DEVICE: u64 = 1 << 13;
    pub(crate) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub(crate) const STATUS: u64 = 1 << 16;
    /// Those that are of use to all devices.
    pub(crate) const ALL: u64 = MQ
        | LOG_SHMFD
        | REPLY_ACK
        | BACKEND_REQ
        | CONFIG
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS
        | STATUS;
}

/// Descriptors in one SET_MEM_TABLE at most.
pub(crate) const MAX_REGIONS: usize = 8;

/// A region of memory a daemon maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    /// Where guests see it.
    pub(crate) gpa: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// Where it begins in its file.
    pub(crate) offset: u64,
}

impl Region {
    /// As the protocol has it. Ring addresses are given as "user addresses", which only have to be the same in both messages: GPAs are
    /// used, so that no daemon learns where the VMM has its memory.
    fn encode(self) -> Vec<u8> {
        numbers(&[self.gpa, self.size, self.gpa, self.offset])
    }
}

/// 64-bit numbers one after another.
pub(crate) fn numbers(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Two 32-bit numbers: a ring and a number that belongs to it.
pub(crate) fn ring_state(index: u16, number: u32) -> Vec<u8> {
    [u32::from(index), number]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect()
}

/// Payload of SET_VRING_ADDR; with `log` the daemon logs what it writes into the used ring.
pub(crate) fn ring_addresses(index: u16, descriptors: u64, used: u64, available: u64, log: bool) -> Vec<u8> {
    let at = if log { used } else { 0 };
    let addresses = numbers(&[descriptors, used, available, at]);
    [ring_state(index, log.into()), addresses].concat()
}

/// Payload of SET_MEM_TABLE.
pub(crate) fn memory_table(regions: &[Region]) -> Vec<u8> {
    let mut payload = numbers(&[regions.len() as u64]);
    payload.extend(regions.iter().flat_map(|region| region.encode()));
    payload
}

/// Payload of ADD_MEM_REG.
pub(crate) fn memory_region(region: Region) -> Vec<u8> {
    [numbers(&[0]), region.encode()].concat()
}

/// Payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD: `size` bytes from the beginning of the file.
pub(crate) fn inflight(size: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut payload = numbers(&[size, 0]);
    payload.extend([queues.to_le_bytes(), queue_size.to_le_bytes(), [0; 2], [0; 2]].concat());
    payload
}

/// Payload of GET_CONFIG and SET_CONFIG, for `data` at byte `offset`.
pub(crate) fn config(offset: u32, data: &[u8]) -> Vec<u8> {
    let head = [offset, data.len() as u32, 0];
    let head = head.iter().flat_map(|v| v.to_le_bytes());
    head.chain(data.iter().copied()).collect()
}

/// Bytes before the data in GET_CONFIG's answer.
pub(crate) const CONFIG_HEAD: usize = 12;

/// A whole message.
pub(crate) fn encode(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let head = [request, VERSION | flags, payload.len() as u32];
    let head = head.iter().flat_map(|v| v.to_le_bytes());
    head.chain(payload.iter().copied()).collect()
}

/// A header's three numbers.
pub(crate) fn decode(header: &[u8; HEADER]) -> [u32; 3] {
    let mut values = [0; 3];
    for (value, bytes) in values.iter_mut().zip(header.as_chunks::<4>().0) {
        *value = u32::from_le_bytes(*bytes);
    }
    values
}
