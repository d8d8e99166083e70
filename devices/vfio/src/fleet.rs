//! All devices of a guest that go with it.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use crate::HostDevice;
use crate::lock;
use crate::mover::{Immovable, MoveError, Mover, Piece};

/// Most ranges of memory that a device is asked to log: drivers have few registers for it.
const RANGES: usize = 8;
/// Where memory that devices of 32 bits reach ends.
const LOW: u64 = 1 << 32;

/// How the writes of a device are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Log {
    /// It has none: it stands still.
    Needless,
    /// It logs them.
    On,
    /// Nobody knows them.
    Unknown,
}

/// The devices of a guest that go with it, in their order.
#[derive(Clone, Default)]
pub struct Fleet {
    movers: Vec<Mover>,
    logs: Arc<Mutex<Vec<Log>>>,
}

impl Fleet {
    /// Of these.
    pub fn new(movers: Vec<Mover>) -> Self {
        Self {
            movers,
            logs: Arc::default(),
        }
    }

    /// Those of `devices`, all that a guest has, that stand still while it is paused: all of them, or none if one cannot, which others might
    /// reach in vain. `peers`: they reach each other.
    pub fn paused(devices: &[Arc<HostDevice>], peers: bool) -> Self {
        let movers: Result<Vec<_>, _> = devices.iter().map(|device| device.mover()).collect();
        let together = movers.and_then(|movers| Self::check_together(&movers, peers).map(|()| movers));
        together.map(Self::new).unwrap_or_default()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.movers.is_empty()
    }

    /// Whether they can stand still together. `peers`: they reach each other.
    ///
    /// # Errors
    /// The first that cannot.
    pub fn check_together(movers: &[Mover], peers: bool) -> Result<(), Immovable> {
        let alone = movers.iter().find(|mover| !mover.has_p2p());
        match alone.filter(|_| peers && movers.len() > 1) {
            Some(mover) => Err(Immovable::Peers(mover.name().to_owned())),
            None => Ok(()),
        }
    }

    /// Has all of them stand still: first none begins anything, then none does anything. Those that fail work on.
    pub fn pause(&self) {
        self.movers.iter().for_each(Mover::quiet);
        self.movers.iter().for_each(Mover::stop);
    }

    /// Has all of them work.
    pub fn resume(&self) {
        self.movers.iter().for_each(Mover::wake);
        self.movers.iter().for_each(Mover::run);
    }

    /// About how many bytes they would have if they stood still now.
    pub fn size(&self) -> u64 {
        self.movers.iter().map(Mover::size).fold(0, u64::saturating_add)
    }

    /// How many bytes they have to tell while the guest runs. They begin to, if they can.
    pub fn ahead(&self) -> u64 {
        self.movers.iter().map(Mover::ahead).fold(0, u64::saturating_add)
    }

    /// The next data, and the number of the device they are of. `None`: there are none now, and if the guest stands still, none at all.
    ///
    /// # Errors
    /// A driver fails.
    pub fn read(&self, buffer: &mut [u8]) -> Result<Option<(usize, Piece)>, MoveError> {
        for (number, mover) in self.movers.iter().enumerate() {
            if let Some(piece) = mover.read(buffer)? {
                return Ok(Some((number, piece)));
            }
        }
        Ok(None)
    }

    /// Takes data for device `number`, which begin anew if it `begins`.
    ///
    /// # Errors
    /// There is no such device, or its driver does not want them.
    pub fn load(&self, number: usize, begins: bool, bytes: &[u8]) -> Result<(), MoveError> {
        let unknown = || MoveError::Unasked(format!("number {number}"));
        let mover = self.movers.get(number).ok_or_else(unknown)?;
        if begins {
            mover.begin_load()?;
        }
        match bytes.is_empty() {
            true => Ok(()),
            false => mover.load(bytes),
        }
    }

    /// Nobody reads any more what they are.
    pub fn finish(&self) {
        self.movers.iter().for_each(Mover::finish);
    }

    /// Has those that can log what they write of `memory`, whose ranges are in order. What others write nobody knows.
    pub fn start_log(&self, page: u64, memory: &[Range<u64>]) {
        let ranges = merged(memory);
        let begin = |mover: &Mover| {
            if mover.is_still() {
                return Log::Needless;
            }
            let file = &mover.handle().file;
            if !file.can_log() {
                tracing::info!(
                    "the device {} does not log what it writes: any page may be",
                    mover.name()
                );
                return Log::Unknown;
            }
            match file.start_log(page, &ranges) {
                Ok(()) => Log::On,
                Err(error) => {
                    tracing::warn!("the device {} cannot log what it writes: {error}", mover.name());
                    Log::Unknown
                }
            }
        };
        *lock(&self.logs) = self.movers.iter().map(begin).collect();
    }

    /// Adds to `words` a bit for each page of `memory` that they wrote, as far as that is known.
    pub fn take_log(&self, page: u64, memory: Range<u64>, words: &mut Vec<u64>) {
        let len = memory.end - memory.start;
        let need = len.div_ceil(page).div_ceil(64) as usize;
        for (mover, log) in self.movers.iter().zip(lock(&self.logs).iter_mut()) {
            if *log != Log::On {
                continue;
            }
            if words.len() < need {
                words.resize(need, 0);
            }
            if let Err(error) = mover.handle().file.take_log(page, memory.start, len, words) {
                tracing::warn!("the device {} does not tell what it wrote: {error}", mover.name());
                *log = Log::Unknown;
            }
        }
    }

    /// Whether some may have written anything.
    pub fn wrote_anything(&self) -> bool {
        lock(&self.logs).contains(&Log::Unknown)
    }

    /// Ends the log.
    pub fn stop_log(&self) {
        let logs = std::mem::take(&mut *lock(&self.logs));
        for (mover, log) in self.movers.iter().zip(logs) {
            if log == Log::On
                && let Err(error) = mover.handle().file.stop_log()
            {
                tracing::warn!("the device {} goes on logging what it writes: {error}", mover.name());
            }
        }
    }
}

/// What a device is asked to log: address and length of few ranges that have all of `memory`.
fn merged(memory: &[Range<u64>]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for part in memory {
        match ranges.last_mut() {
            Some(last) if last.end == part.start => last.end = part.end,
            _ => ranges.push(part.clone()),
        }
    }
    if ranges.len() > RANGES {
        let (low, high): (Vec<_>, Vec<_>) = ranges.iter().partition(|range| range.end <= LOW);
        let span = |ranges: &[&Range<u64>]| Some(ranges.first()?.start..ranges.last()?.end);
        ranges = [span(&low), span(&high)].into_iter().flatten().collect();
    }
    let pair = |range: &Range<u64>| (range.start, range.end - range.start);
    ranges.iter().map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_ranges_have_all_memory() {
        assert_eq!(merged(&[0..4, 4..8, 9..10]), [(0, 8), (9, 1)]);
        let many: Vec<_> = (0..20).map(|i| (i << 30)..(i << 30) + 4096).collect();
        assert_eq!(merged(&many), [(0, (3 << 30) + 4096), (4 << 30, (15 << 30) + 4096)]);
        assert_eq!(merged(&[]), []);
    }
}
