//! Bytes of the other side to messages.

use super::{
    HEAD, Hello, Kind, MAGIC, MAX_BATCH, MAX_CONFIG, MAX_CPU, MAX_RUNS, MAX_STATE, MAX_STREAMS, MAX_TEXT, MAX_WANTED,
    Message, Offer, Pages, Progress, Role, Runs, VERSION, WireError,
};
use crate::blocker::{Blocker, MAX_BLOCKERS, Part};
use crate::hand_over::MAX_FILES;
use crate::memory::{Layout, MAX_REGIONS, PAGE, Region};

/// Bytes that a message of pages begins with, at least: how they are compressed, how many runs follow, and the first of them.
pub(crate) const LIST: usize = 8 + RUN;
/// Bytes of a run.
const RUN: usize = 16;

pub(super) const NONE: &str = "a message about no page";
const MANY: &str = "more runs of pages than a message may have";

/// Kind and length of the body that follows.
pub(crate) fn head(bytes: [u8; HEAD]) -> Result<(Kind, usize), WireError> {
    let [k0, k1, r0, r1, l0, l1, l2, l3] = bytes;
    let kind = Kind::from_number(u16::from_le_bytes([k0, k1]))?;
    if [r0, r1] != [0, 0] {
        return Err(WireError::Reserved);
    }
    let (len, limit) = (u32::from_le_bytes([l0, l1, l2, l3]) as usize, kind.limit());
    match len > limit {
        true => Err(WireError::TooLong { len, limit }),
        false => Ok((kind, len)),
    }
}

/// The message with this body.
pub(crate) fn body(kind: Kind, bytes: &[u8]) -> Result<Message<'_>, WireError> {
    let mut rest = Rest(bytes);
    let message = match kind {
        Kind::Hello => Message::Hello(hello(&mut rest)?),
        Kind::Welcome => {
            begins(&mut rest)?;
            Message::Welcome(rest.text()?.to_owned())
        }
        Kind::Offer => Message::Offer(offer(&mut rest)?),
        Kind::Accepted => Message::Accepted,
        Kind::Pages => Message::Pages(pages(&mut rest)?),
        Kind::Zeroes => Message::Zeroes(runs(&mut rest)?),
        Kind::RoundEnd => Message::RoundEnd(rest.u32()?),
        Kind::RoundDone => Message::RoundDone(rest.u32()?),
        Kind::Switch => Message::Switch,
        Kind::State => {
            let total = rest.u64()?;
            let part = rest.all();
            if total > MAX_STATE || part.is_empty() || part.len() as u64 > total {
                return Err(WireError::Invalid("more saved state than any guest has, or none"));
            }
            Message::State { total, part }
        }
        Kind::Complete => Message::Complete,
        Kind::Ready => Message::Ready,
        Kind::Go => Message::Go,
        Kind::Running => Message::Running,
        Kind::Abort => Message::Abort(rest.text()?),
        Kind::Progress => Message::Progress(Progress {
            round: rest.u32()?,
            remaining: rest.u64()?,
        }),
        Kind::Alive => Message::Alive,
        Kind::End => Message::End,
        Kind::Blockers => Message::Blockers(blockers(&mut rest)?),
        Kind::Files => files(&mut rest)?,
        Kind::Device => device(&mut rest)?,
        Kind::Missing => Message::Missing(runs(&mut rest)?),
        Kind::Lacks => Message::Lacks(runs(&mut rest)?),
        Kind::Serve => Message::Serve,
        Kind::Want => Message::Want(wanted(&mut rest)?),
        Kind::Served => Message::Served,
    };
    match rest.0.is_empty() {
        true => Ok(message),
        false => Err(WireError::Left),
    }
}

fn begins(rest: &mut Rest) -> Result<(), WireError> {
    if rest.array::<8>()? != MAGIC {
        return Err(WireError::Magic);
    }
    match rest.u32()? {
        VERSION => Ok(()),
        found => Err(WireError::Version { found }),
    }
}

fn hello(rest: &mut Rest) -> Result<Hello, WireError> {
    begins(rest)?;
    let token = rest.array()?;
    let (role, index, streams) = (rest.u16()?, rest.u16()?, rest.u16()?);
    if !(1..=MAX_STREAMS).contains(&streams) || index >= streams {
        return Err(WireError::Invalid("a number of streams that is not from 1 to 16"));
    }
    let role = match (role, index) {
        (0, 0) => Role::Control,
        (1, index) => Role::Data(index),
        (2, 0) => Role::Ask,
        (3, 0) => Role::Check,
        (4, 0) => Role::PostCopy,
        (5, 0) => Role::Demand,
        (6, 0) => Role::Push,
        (7, 0) => Role::CheckPostCopy,
        _ => return Err(WireError::Invalid("a stream that is for nothing known")),
    };
    let vmm = rest.text()?.to_owned();
    Ok(Hello {
        token,
        role,
        streams,
        vmm,
    })
}

fn offer<'a>(rest: &mut Rest<'a>) -> Result<Offer<'a>, WireError> {
    let count = rest.u32()? as usize;
    if count > MAX_REGIONS {
        return Err(WireError::Invalid("more regions of memory than any guest has"));
    }
    let pairs = rest.pairs(count)?;
    let layout = Layout::new(pairs.map(|(gpa, len)| Region { gpa, len }).collect())?;
    let (config, cpu) = (rest.u32()? as usize, rest.u32()? as usize);
    if config > MAX_CONFIG || cpu > MAX_CPU {
        return Err(WireError::Invalid("a configuration that is larger than any"));
    }
    Ok(Offer {
        layout,
        config: rest.take(config)?,
        cpu: rest.take(cpu)?,
        post_copy: false,
    })
}

fn blockers(rest: &mut Rest) -> Result<Vec<Blocker>, WireError> {
    let count = rest.u32()? as usize;
    if count > MAX_BLOCKERS {
        return Err(WireError::Invalid("more that is in the way than a message may have"));
    }
    let mut blockers = Vec::new();
    for _ in 0..count {
        let what = Part::from_number(rest.u32()?);
        blockers.push(Blocker {
            what: what.ok_or(WireError::Invalid("something in the way that is nothing known"))?,
            name: rest.text()?.to_owned(),
            reason: rest.text()?.to_owned(),
            remedy: rest.text()?.to_owned(),
        });
    }
    Ok(blockers)
}

fn files(rest: &mut Rest) -> Result<Message<'static>, WireError> {
    let (count, regions) = (rest.u32()?, rest.u32()? as usize);
    if count == 0 || count as usize > MAX_FILES || regions > MAX_REGIONS {
        return Err(WireError::Invalid("more files of memory than any guest has, or none"));
    }
    let places: Vec<_> = rest.pairs(regions)?.collect();
    match places.iter().all(|(file, _)| *file < u64::from(count)) {
        true => Ok(Message::Files { count, places }),
        false => Err(WireError::Invalid("memory in a file that does not come")),
    }
}

fn device<'a>(rest: &mut Rest<'a>) -> Result<Message<'a>, WireError> {
    let number = u16::try_from(rest.u32()?);
    let begins = match rest.u32()? {
        0 => false,
        1 => true,
        _ => return Err(WireError::Invalid("a device that neither begins nor goes on")),
    };
    let part = rest.all();
    match number {
        // Nobody says nothing but that it begins.
        Ok(device) if begins || !part.is_empty() => Ok(Message::Device { device, begins, part }),
        _ => Err(WireError::Invalid(
            "the state of a device that no guest has, or nothing of it",
        )),
    }
}

fn runs(rest: &mut Rest) -> Result<Runs, WireError> {
    let count = rest.u32()? as usize;
    if count > MAX_RUNS {
        return Err(WireError::Invalid(MANY));
    }
    Runs::checked(rest.pairs(count)?.collect())
}

fn wanted(rest: &mut Rest) -> Result<Runs, WireError> {
    let runs = runs(rest)?;
    match runs.iter().count() <= MAX_WANTED && runs.iter().all(|(_, len)| len == PAGE) {
        true => Ok(runs),
        false => Err(WireError::Invalid("more pages at once than anybody waits for")),
    }
}

fn pages<'a>(rest: &mut Rest<'a>) -> Result<Pages<'a>, WireError> {
    let (packed, runs) = list(rest)?;
    let bytes = rest.all();
    fits(packed, &runs, bytes.len())?;
    Ok(Pages { runs, packed, bytes })
}

/// Bytes of the list that a message of pages begins with, by its first [`LIST`].
pub(crate) fn list_len(bytes: [u8; LIST]) -> Result<usize, WireError> {
    let [_, _, _, _, c0, c1, c2, c3, ..] = bytes;
    match u32::from_le_bytes([c0, c1, c2, c3]) as usize {
        0 => Err(WireError::Invalid(NONE)),
        count if count > MAX_RUNS => Err(WireError::Invalid(MANY)),
        count => Ok(LIST + RUN * (count - 1)),
    }
}

/// The pages of a message that begins with this list and has `more` bytes behind it; `None`: they are compressed.
pub(crate) fn pages_of(bytes: &[u8], more: usize) -> Result<Option<Runs>, WireError> {
    let mut rest = Rest(bytes);
    let (packed, runs) = list(&mut rest)?;
    fits(packed, &runs, more)?;
    match rest.0.is_empty() {
        true => Ok(Some(runs).filter(|_| !packed)),
        false => Err(WireError::Left),
    }
}

fn list(rest: &mut Rest) -> Result<(bool, Runs), WireError> {
    let packed = match rest.u32()? {
        0 => false,
        1 => true,
        _ => return Err(WireError::Invalid("pages in an unknown compression")),
    };
    Ok((packed, runs(rest)?))
}

/// Whether `bytes` can be what is on the pages of `runs`.
fn fits(packed: bool, runs: &Runs, bytes: usize) -> Result<(), WireError> {
    let len = runs.len();
    let fits = match packed {
        // What is longer than it was is sent as it was.
        true => bytes > 0 && (bytes as u64) < len,
        false => bytes as u64 == len,
    };
    debug_assert!(len.is_multiple_of(PAGE));
    match len <= MAX_BATCH as u64 && fits {
        true => Ok(()),
        false => Err(WireError::Invalid("pages of another length than their list says")),
    }
}

/// What is left of a body.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(WireError::Short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn all(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(WireError::Short)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    /// `count` pairs of u64; their bytes are there.
    fn pairs(&mut self, count: usize) -> Result<impl Iterator<Item = (u64, u64)> + use<'a>, WireError> {
        let bytes = self.take(count.checked_mul(16).ok_or(WireError::Short)?)?;
        let (numbers, _) = bytes.as_chunks::<8>();
        let pair = |pair: &[[u8; 8]]| match pair {
            [first, second] => (u64::from_le_bytes(*first), u64::from_le_bytes(*second)),
            _ => (0, 0),
        };
        Ok(numbers.chunks_exact(2).map(pair))
    }

    fn text(&mut self) -> Result<&'a str, WireError> {
        let len = self.u32()? as usize;
        if len > MAX_TEXT {
            return Err(WireError::Invalid("a sentence that is too long"));
        }
        let bytes = self.take(len)?;
        str::from_utf8(bytes).map_err(|_| WireError::Invalid("a sentence that is no UTF-8"))
    }
}
