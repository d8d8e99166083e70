//! Cutting large segments into packets, for receivers that cannot.

use super::checksum::Sum;
use super::{Gso, Kind, Partial};

const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// Cuts `frame` as `gso` says and gives each piece to `emit`, with all checksums right. `l3` is where its IP header begins. `gso` was
/// checked against the frame's head ([`Offload::read`](super::Offload::read)); `piece` is scratch memory.
pub fn cut(frame: &[u8], l3: usize, gso: &Gso, csum: Partial, piece: &mut Vec<u8>, mut emit: impl FnMut(&[u8])) {
    let Some((headers, payload)) = frame.split_at_checked(gso.headers) else {
        return;
    };
    let size = usize::from(gso.size);
    let count = payload.len().div_ceil(size).max(1);
    for index in 0..count {
        let from = index * size;
        let part = payload.get(from..payload.len().min(from + size)).unwrap_or_default();
        piece.clear();
        piece.extend_from_slice(headers);
        piece.extend_from_slice(part);
        let place = Place {
            index,
            from,
            last: index + 1 == count,
        };
        if fix(piece, l3, gso, csum, &place).is_some() {
            emit(piece);
        }
    }
}

struct Place {
    index: usize,
    /// Bytes of payload before it.
    from: usize,
    last: bool,
}

/// Makes a piece a packet of its own. `None`: its headers are not there, which the check before excludes.
fn fix(piece: &mut [u8], l3: usize, gso: &Gso, csum: Partial, place: &Place) -> Option<()> {
    let l4 = usize::from(csum.start);
    let length = u16::try_from(piece.len().checked_sub(l3)?).ok()?;
    let transport = piece.len().checked_sub(l4)?;
    let put = |piece: &mut [u8], at: usize, value: u16| {
        piece.get_mut(at..at + 2)?.copy_from_slice(&value.to_be_bytes());
        Some(())
    };
    let (addresses, protocol) = match gso.kind {
        Kind::Tcp4 | Kind::Udp4 => {
            put(piece, l3 + 2, length)?;
            let id = u16::from_be_bytes([*piece.get(l3 + 4)?, *piece.get(l3 + 5)?]);
            put(piece, l3 + 4, id.wrapping_add(place.index as u16))?;
            put(piece, l3 + 10, 0)?;
            let sum = Sum::default().bytes(piece.get(l3..l4)?).finish();
            put(piece, l3 + 10, sum)?;
            (l3 + 12..l3 + 20, piece.get(l3 + 9).copied()?)
        }
        Kind::Tcp6 | Kind::Udp6 => {
            put(piece, l3 + 4, length.checked_sub(40)?)?;
            let protocol = if gso.kind == Kind::Tcp6 { super::TCP } else { super::UDP };
            (l3 + 8..l3 + 40, protocol)
        }
    };
    match gso.kind {
        Kind::Tcp4 | Kind::Tcp6 => {
            let field = piece.get_mut(l4 + 4..l4 + 8)?;
            let sequence = u32::from_be_bytes([field[0], field[1], field[2], field[3]]);
            field.copy_from_slice(&sequence.wrapping_add(place.from as u32).to_be_bytes());
            let flags = piece.get_mut(l4 + 13)?;
            if !place.last {
                *flags &= !FIN_PSH;
            }
            if place.index > 0 {
                *flags &= !CWR;
            }
        }
        Kind::Udp4 | Kind::Udp6 => put(piece, l4 + 4, transport as u16)?,
    }
    let field = l4 + usize::from(csum.offset);
    put(piece, field, 0)?;
    let sum = Sum::default()
        .bytes(piece.get(addresses)?)
        .number(u32::from(protocol))
        .number(transport as u32)
        .bytes(piece.get(l4..)?)
        .finish();
    put(piece, field, if sum == 0 { 0xffff } else { sum })
}
