//! As much of device trees as it takes to read a property (Devicetree Specification 0.4, chapter 5).

use crate::memory::bytes;

const MAGIC: u32 = 0xd00d_feed;
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROPERTY: u32 = 3;
const NOP: u32 = 4;
/// Larger than this no tree is.
const LARGEST: usize = 2 << 20;

/// A tree in memory.
pub struct Tree {
    structure: &'static [u8],
    strings: &'static [u8],
}

fn cell(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Text up to its NUL.
pub fn text(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or(bytes)
}

/// A big-endian number of one or two cells.
pub fn number(bytes: &[u8]) -> Option<u64> {
    match bytes.len() {
        4 => cell(bytes, 0).map(u64::from),
        8 => Some(u64::from(cell(bytes, 0)?) << 32 | u64::from(cell(bytes, 4)?)),
        _ => None,
    }
}

impl Tree {
    /// The tree at `address`; `None` when there is none.
    ///
    /// # Safety
    /// `address` is what the VMM passed, mapped RAM that nobody writes.
    pub unsafe fn at(address: u64) -> Option<Self> {
        // SAFETY: by contract; the header says how long the rest is.
        let header = unsafe { bytes(address, 40) };
        let field = |n: usize| cell(header, 4 * n).map(|value| value as usize);
        let size = field(1)?;
        if cell(header, 0)? != MAGIC || size > LARGEST {
            return None;
        }
        // SAFETY: as above.
        let all = unsafe { bytes(address, size) };
        let part = |start: usize, len: usize| all.get(start..start.checked_add(len)?);
        Some(Self {
            structure: part(field(2)?, field(9)?)?,
            strings: part(field(3)?, field(8)?)?,
        })
    }

    /// The value of the property `name` of the root's child `node`.
    pub fn property(&self, node: &str, name: &str) -> Option<&'static [u8]> {
        let (mut at, mut depth, mut inside) = (0, 0, false);
        loop {
            let token = cell(self.structure, at)?;
            at += 4;
            match token {
                BEGIN_NODE => {
                    let found = text(self.structure.get(at..)?);
                    depth += 1;
                    inside = inside || depth == 2 && found == node.as_bytes();
                    at = (at + found.len() + 1).next_multiple_of(4);
                }
                END_NODE if inside && depth == 2 => return None,
                END_NODE => depth -= 1,
                PROPERTY => {
                    let (len, key) = (
                        cell(self.structure, at)? as usize,
                        cell(self.structure, at + 4)? as usize,
                    );
                    let value = self.structure.get(at + 8..at + 8 + len)?;
                    if inside && depth == 2 && text(self.strings.get(key..)?) == name.as_bytes() {
                        return Some(value);
                    }
                    at = (at + 8 + len).next_multiple_of(4);
                }
                NOP => {}
                _ => return None,
            }
        }
    }
}
