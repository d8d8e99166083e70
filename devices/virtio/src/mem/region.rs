//! The blocks of a region and the parts they are in: what may be plugged and unplugged, and what the host does about it.

use std::io;
use std::ops::Range;

use thiserror::Error;

use super::blocks::Blocks;
use super::request::{Answer, Span, State};
use super::shared::BlockRunV1;
use super::{MIN_BLOCK, MemError, MemOptions, MemoryHost};

/// Why blocks that were plugged when a guest was saved cannot be plugged again.
#[derive(Debug, Error)]
pub enum PlugError {
    /// They are none of this region.
    #[error("{count} blocks from block {first} on are not in the region, or plugged twice")]
    Blocks {
        /// The first of them.
        first: u64,
        /// How many.
        count: u64,
    },
    /// It is another region.
    #[error("the state is of another region")]
    Other,
    /// The host does not give the memory.
    #[error("the host does not give the memory")]
    Host(#[source] io::Error),
}

/// What the host did not do for the guest.
#[derive(Debug)]
pub(super) struct Trouble {
    /// What it was.
    pub(super) what: &'static str,
    /// Cause.
    pub(super) error: io::Error,
}

/// Some blocks of one part.
struct Piece {
    part: usize,
    blocks: Range<usize>,
}

/// A region and its host.
pub(super) struct Region {
    options: MemOptions,
    blocks: Blocks,
    /// Whether the guest can reach each part.
    parts: Vec<bool>,
    /// Bytes of those it can.
    open: u64,
    host: Box<dyn MemoryHost>,
    /// What the host did not do since somebody last [`asked`](Self::take_trouble).
    trouble: Option<Trouble>,
}

impl Region {
    pub(super) fn new(options: MemOptions, host: Box<dyn MemoryHost>) -> Result<Self, MemError> {
        let MemOptions {
            addr,
            size,
            block,
            part,
            ..
        } = options;
        let whole = block.is_power_of_two()
            && block >= MIN_BLOCK
            && [addr, size, part].iter().all(|value| value.is_multiple_of(block))
            && size > 0
            && part > 0
            && addr.checked_add(size).is_some();
        if !whole {
            return Err(MemError::Geometry {
                addr,
                size,
                block,
                part,
            });
        }
        Ok(Self {
            options,
            blocks: Blocks::new((size / block) as usize),
            parts: vec![false; size.div_ceil(part) as usize],
            open: 0,
            host,
            trouble: None,
        })
    }

    /// Whether the host may want `bytes` of it.
    pub(super) fn check_size(&self, bytes: u64) -> Result<(), MemError> {
        let MemOptions { size, block, .. } = self.options;
        match bytes <= size && bytes.is_multiple_of(block) {
            true => Ok(()),
            false => Err(MemError::Size { bytes, block, size }),
        }
    }

    /// Bytes that are plugged.
    pub(super) fn plugged(&self) -> u64 {
        self.blocks.plugged() as u64 * self.options.block
    }

    /// Bytes that the guest can reach.
    pub(super) fn open(&self) -> u64 {
        self.open
    }

    /// What the host did not do, once.
    pub(super) fn take_trouble(&mut self) -> Option<Trouble> {
        self.trouble.take()
    }

    /// Plugs blocks, of which the host wants `requested` bytes in all. Between parts `stop` can end it; then it has done nothing.
    pub(super) fn plug(&mut self, span: Span, requested: u64, stop: &mut dyn FnMut() -> bool) -> Answer {
        let Some(blocks) = self.find(span) else {
            return Answer::Error;
        };
        if self.blocks.count(blocks.clone()) != 0 {
            return Answer::Error;
        }
        let more = blocks.len() as u64 * self.options.block;
        if self.plugged().saturating_add(more) > requested {
            return Answer::Nack;
        }
        if !self.may_open(&blocks, requested) {
            return Answer::Busy;
        }
        match self.take(blocks, stop) {
            Ok(true) => Answer::Ack,
            Ok(false) => Answer::Busy,
            Err(error) => {
                self.trouble = Some(Trouble {
                    what: "give the guest memory",
                    error,
                });
                Answer::Busy
            }
        }
    }

    /// Whether the parts of `blocks` may be opened. One block opens all of its part; so a guest that spreads what it may have over the
    /// region would reach more. It gets no further part when those that are open are enough.
    fn may_open(&self, blocks: &Range<usize>, requested: u64) -> bool {
        let part = self.options.part;
        let closed = self
            .pieces(blocks.clone())
            .into_iter()
            .filter(|piece| !self.parts[piece.part]);
        let more: u64 = closed
            .map(|piece| self.part(piece.part))
            .map(|part| part.end - part.start)
            .sum();
        let enough = requested.div_ceil(part).saturating_add(1).saturating_mul(part);
        more == 0 || self.open.saturating_add(more) <= enough
    }

    /// Plugs `blocks`, or nothing. `false`: it was stopped.
    fn take(&mut self, blocks: Range<usize>, stop: &mut dyn FnMut() -> bool) -> io::Result<bool> {
        let pieces = self.pieces(blocks);
        for (at, piece) in pieces.iter().enumerate() {
            let done = match stop() {
                true => Ok(false),
                false => self.take_piece(piece).map(|()| true),
            };
            if !matches!(done, Ok(true)) {
                for piece in &pieces[..at] {
                    // What cannot be given back costs memory until it is plugged again, and nothing else.
                    let _ = self.give_piece(piece);
                }
                return done;
            }
        }
        Ok(true)
    }

    fn take_piece(&mut self, piece: &Piece) -> io::Result<()> {
        let opened = !self.parts[piece.part];
        if opened {
            self.host.open(self.part(piece.part))?;
            self.note(piece.part, true);
        }
        if let Err(error) = self.host.fill(self.bytes(&piece.blocks)) {
            // Some of it may be there.
            let _ = self.host.discard(self.bytes(&piece.blocks));
            if opened && self.host.close(self.part(piece.part)).is_ok() {
                self.note(piece.part, false);
            }
            return Err(error);
        }
        self.blocks.set(piece.blocks.clone(), true);
        Ok(())
    }

    /// Unplugs blocks. Their memory is the host's before the driver has the answer.
    pub(super) fn unplug(&mut self, span: Span) -> Answer {
        match self.find(span) {
            Some(blocks) if self.blocks.count(blocks.clone()) == blocks.len() => self.give(vec![blocks]),
            _ => Answer::Error,
        }
    }

    /// Unplugs all blocks.
    pub(super) fn unplug_all(&mut self) -> Answer {
        let runs = self.blocks.runs();
        self.give(runs)
    }

    fn give(&mut self, runs: Vec<Range<usize>>) -> Answer {
        let pieces: Vec<_> = runs.into_iter().flat_map(|run| self.pieces(run)).collect();
        for (at, piece) in pieces.iter().enumerate() {
            if let Err(error) = self.give_piece(piece) {
                self.trouble = Some(Trouble {
                    what: "take memory back from the guest",
                    error,
                });
                // All or nothing. What is in the blocks, the driver gave up when it asked.
                for piece in &pieces[..at] {
                    let _ = self.take_piece(piece);
                }
                return Answer::Busy;
            }
        }
        Answer::Ack
    }

    /// Unplugs blocks of a part. On error they are still plugged.
    fn give_piece(&mut self, piece: &Piece) -> io::Result<()> {
        let whole = self.part_blocks(piece.part);
        let last = self.blocks.count(whole) == piece.blocks.len();
        if last && self.parts[piece.part] {
            // First, so that nobody writes there again.
            self.host.close(self.part(piece.part))?;
            self.note(piece.part, false);
        }
        if let Err(error) = self.host.discard(self.bytes(&piece.blocks)) {
            if last {
                self.host.open(self.part(piece.part))?;
                self.note(piece.part, true);
            }
            return Err(error);
        }
        self.blocks.set(piece.blocks.clone(), false);
        Ok(())
    }

    /// How blocks are.
    pub(super) fn state(&self, span: Span) -> Answer {
        let Some(blocks) = self.find(span) else {
            return Answer::Error;
        };
        Answer::State(match self.blocks.count(blocks.clone()) {
            0 => State::Unplugged,
            n if n == blocks.len() => State::Plugged,
            _ => State::Mixed,
        })
    }

    /// Runs of plugged blocks.
    pub(super) fn saved(&self) -> Vec<BlockRunV1> {
        let run = |run: Range<usize>| BlockRunV1 {
            first: run.start as u64,
            count: run.len() as u64,
        };
        self.blocks.runs().into_iter().map(run).collect()
    }

    /// Plugs `runs` of a region of which nothing is plugged.
    pub(super) fn restore(&mut self, runs: &[BlockRunV1]) -> Result<(), PlugError> {
        let len = self.options.size / self.options.block;
        for &BlockRunV1 { first, count } in runs {
            let blocks = match first.checked_add(count) {
                Some(end) if end <= len => first as usize..end as usize,
                _ => return Err(PlugError::Blocks { first, count }),
            };
            if self.blocks.count(blocks.clone()) != 0 {
                return Err(PlugError::Blocks { first, count });
            }
            self.take(blocks, &mut || false).map_err(PlugError::Host)?;
        }
        Ok(())
    }

    /// The blocks that a driver means, if they are some of the region.
    fn find(&self, span: Span) -> Option<Range<usize>> {
        let MemOptions { addr, size, block, .. } = self.options;
        let from = span.addr.checked_sub(addr)?;
        let bytes = u64::from(span.blocks).checked_mul(block)?;
        let end = from.checked_add(bytes)?;
        let fits = span.blocks > 0 && from.is_multiple_of(block) && end <= size;
        fits.then(|| (from / block) as usize..(end / block) as usize)
    }

    fn note(&mut self, part: usize, open: bool) {
        let range = self.part(part);
        let bytes = range.end - range.start;
        self.parts[part] = open;
        self.open = match open {
            true => self.open + bytes,
            false => self.open - bytes,
        };
    }

    fn blocks_of_part(&self) -> usize {
        (self.options.part / self.options.block) as usize
    }

    /// The blocks of a part.
    fn part_blocks(&self, part: usize) -> Range<usize> {
        let all = (self.options.size / self.options.block) as usize;
        let each = self.blocks_of_part();
        part * each..((part + 1) * each).min(all)
    }

    /// The GPAs of a part.
    fn part(&self, part: usize) -> Range<u64> {
        self.bytes(&self.part_blocks(part))
    }

    fn bytes(&self, blocks: &Range<usize>) -> Range<u64> {
        let at = |block: usize| self.options.addr + block as u64 * self.options.block;
        at(blocks.start)..at(blocks.end)
    }

    /// `blocks` by the parts they are in.
    fn pieces(&self, blocks: Range<usize>) -> Vec<Piece> {
        let parts = blocks.start / self.blocks_of_part()..blocks.end.div_ceil(self.blocks_of_part());
        let piece = |part| {
            let whole = self.part_blocks(part);
            Piece {
                part,
                blocks: whole.start.max(blocks.start)..whole.end.min(blocks.end),
            }
        };
        parts.map(piece).collect()
    }
}
