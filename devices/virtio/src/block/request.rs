//! What a chain asks for (virtio 1.2, 5.2.6).

use std::io::Read;

use smallvec::SmallVec;
use triarch_memory::GuestMemory;

use super::config::{MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, SECTOR, feature};
use crate::{Chain, RingFault, Segment};

const HEADER_LEN: u32 = 16;
const RANGE_LEN: u32 = 16;
const RANGE_UNMAP: u32 = 1;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// How a request ended: the value of its status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupp = 2,
}

/// Pieces of guest memory.
pub(super) type Segments = SmallVec<[Segment; 6]>;

/// A request, in bytes. Whether a range fits the disk and its blocks is for the disk to check.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read { offset: u64 },
    Write { offset: u64 },
    Flush,
    GetId,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

/// A chain taken apart.
#[derive(Debug)]
pub(super) struct Parsed {
    /// What to do, or the status to answer at once.
    pub(super) request: Result<Request, Status>,
    /// Data to read from or write to, without header and status.
    pub(super) data: Segments,
    /// Bytes of `data`.
    pub(super) len: u32,
    /// Bytes the device may write before the status.
    pub(super) room: u32,
    /// The status byte.
    pub(super) status: Segment,
}

/// Takes a chain apart. How its bytes are split into buffers means nothing (virtio 1.2, 2.6.4). A chain without room for a header and
/// a status cannot be answered at all, so it is a fault.
pub(super) fn parse(chain: &Chain, memory: &GuestMemory, features: u64) -> Result<Parsed, RingFault> {
    const SHORT: RingFault = RingFault::Request("a block request has no whole header or no status byte");
    let mut reader = chain.reader(memory);
    let mut header = [0; HEADER_LEN as usize];
    reader.read_exact(&mut header).map_err(|_| SHORT)?;
    let [kind, _, sector_low, sector_high] = words(&header);
    let sector = u64::from(sector_high) << 32 | u64::from(sector_low);

    let mut writer = chain.writer(memory);
    let room = writer.left().checked_sub(1).ok_or(SHORT)?;
    let data_in = writer.take_segments(room).map_err(|_| SHORT)?;
    let status = writer.take_segments(1).map_err(|_| SHORT)?;
    let status = *status.first().ok_or(SHORT)?;

    let (mut data, mut len) = (data_in, room);
    let request = match kind {
        T_IN => bytes(sector).map(|offset| Request::Read { offset }),
        T_OUT => {
            len = reader.left();
            data = reader.take_segments(len).map_err(|_| SHORT)?;
            bytes(sector).map(|offset| Request::Write { offset })
        }
        T_FLUSH => Ok(Request::Flush),
        T_GET_ID => Ok(Request::GetId),
        T_DISCARD if features & feature::DISCARD != 0 => range(&mut reader).and_then(|range| discard(&range)),
        T_WRITE_ZEROES if features & feature::WRITE_ZEROES != 0 => {
            range(&mut reader).and_then(|range| write_zeroes(&range))
        }
        _ => Err(Status::Unsupp),
    };
    Ok(Parsed {
        request,
        data,
        len,
        room,
        status,
    })
}

/// A position in bytes.
fn bytes(sector: u64) -> Result<u64, Status> {
    sector.checked_mul(SECTOR).ok_or(Status::IoErr)
}

/// One range of a discard or write-zeroes request.
struct Range {
    offset: u64,
    sectors: u32,
    flags: u32,
}

/// Reads the one range a request may have (`max_discard_seg` and `max_write_zeroes_seg` are 1).
fn range(reader: &mut crate::ChainReader<'_>) -> Result<Range, Status> {
    let mut raw = [0; RANGE_LEN as usize];
    if reader.left() != RANGE_LEN || reader.read_exact(&mut raw).is_err() {
        return Err(Status::IoErr);
    }
    let [low, high, sectors, flags] = words(&raw);
    let sector = u64::from(high) << 32 | u64::from(low);
    Ok(Range {
        offset: bytes(sector)?,
        sectors,
        flags,
    })
}

fn discard(range: &Range) -> Result<Request, Status> {
    // The unmap flag has no meaning here and must be refused like an unknown one (virtio 1.2, 5.2.6.2).
    if range.flags != 0 {
        return Err(Status::Unsupp);
    }
    if range.sectors > MAX_DISCARD_SECTORS {
        return Err(Status::IoErr);
    }
    Ok(Request::Discard {
        offset: range.offset,
        len: u64::from(range.sectors) * SECTOR,
    })
}

fn write_zeroes(range: &Range) -> Result<Request, Status> {
    if range.flags & !RANGE_UNMAP != 0 {
        return Err(Status::Unsupp);
    }
    if range.sectors > MAX_WRITE_ZEROES_SECTORS {
        return Err(Status::IoErr);
    }
    Ok(Request::WriteZeroes {
        offset: range.offset,
        len: u64::from(range.sectors) * SECTOR,
        unmap: range.flags & RANGE_UNMAP != 0,
    })
}

/// Four little-endian words.
fn words(bytes: &[u8; 16]) -> [u32; 4] {
    std::array::from_fn(|i| u32::from_le_bytes(std::array::from_fn(|j| bytes[4 * i + j])))
}
