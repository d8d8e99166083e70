//! `state.json`.
//!
//! Its first line ends the part that tells what it is and the checksum of all bytes after that line; the whole is one JSON object.

use serde::{Deserialize, Serialize};

use crate::pages::{CHUNK, Pages};
use crate::payload::Payload;
use crate::{About, Base, PAGE, Payloads, SnapshotError, VERSION, VERSION_OF_ONE};

const BEGIN: &str = "{\"format\":\"triarch-snapshot\",\"checksum\":\"";
const BEGIN_END: &str = "\",\n";
/// Hexadecimal digits of a checksum.
const DIGITS: usize = 8;

/// Most regions of memory: more than KVM has slots.
const MAX_RANGES: usize = 65_536;

/// What any version has.
#[derive(Deserialize)]
struct Head {
    version: u32,
    vmm: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    version: u32,
    /// Version of the VMM that wrote it.
    vmm: String,
    arch: String,
    /// What it is called by those that build on it, if any may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    /// What it builds on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<Base>,
    memory: MemoryTable,
    payloads: Vec<Payload>,
}

/// Where in `memory-ranges` which memory is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MemoryTable {
    /// Bytes of a chunk; the last one of a region may have fewer.
    chunk: u64,
    pub(crate) ranges: Vec<MemoryRange>,
}

/// A region of guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryRange {
    /// Where the guest has it.
    pub gpa: u64,
    /// Its bytes: whole pages.
    pub size: u64,
    /// Where it begins in `memory-ranges`: at a whole page.
    pub offset: u64,
    /// CRC-32 of what is there of each chunk; none where that is zeroes only, which are holes.
    pub(crate) checksums: Vec<Option<u32>>,
    /// The pages that are there, one after the other; the others are those of the base. `None`: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pages: Option<Pages>,
}

impl MemoryRange {
    /// How many bytes `memory-ranges` has of it.
    pub(crate) fn bytes(&self) -> u64 {
        self.pages.as_ref().map_or(self.size, |pages| pages.count() * PAGE)
    }
}

impl MemoryTable {
    pub(crate) fn new(ranges: Vec<MemoryRange>) -> Self {
        Self {
            chunk: CHUNK as u64,
            ranges,
        }
    }

    /// Makes sure that it can be followed, with a file of `len` bytes.
    fn check(&self, len: u64) -> Result<(), SnapshotError> {
        let bad = |text: String| Err(SnapshotError::Memory(text));
        if self.chunk != CHUNK as u64 {
            return bad(format!("its chunks have {} bytes", self.chunk));
        }
        if self.ranges.len() > MAX_RANGES {
            return bad(format!("it has {} regions", self.ranges.len()));
        }
        let (mut gpa, mut file) = (0, 0);
        for range in &self.ranges {
            let MemoryRange {
                gpa: start,
                size,
                offset,
                checksums,
                pages,
            } = range;
            if let Some(pages) = pages
                && (pages.chunks() as u64 != size.div_ceil(self.chunk) || !pages.fit(*size))
            {
                return bad(format!("the region at {start:#x} has pages that are none of its own"));
            }
            let ends = start.checked_add(*size).zip(offset.checked_add(range.bytes()));
            let whole = [start, size, offset].iter().all(|value| value.is_multiple_of(PAGE));
            let Some((end, file_end)) = ends.filter(|_| whole && *size > 0) else {
                return bad(format!("a region of {size:#x} bytes at {start:#x} is none"));
            };
            if *start < gpa || *offset < file {
                return bad(format!("the region at {start:#x} overlaps the one before"));
            }
            if file_end > len {
                return bad(format!(
                    "memory-ranges has {len} bytes, and the region at {start:#x} ends at {file_end}; it was cut short"
                ));
            }
            if checksums.len() as u64 != size.div_ceil(self.chunk) {
                return bad(format!("the region at {start:#x} has {} checksums", checksums.len()));
            }
            (gpa, file) = (end, file_end);
        }
        Ok(())
    }
}

/// The text of `state.json`, and its checksum.
pub(crate) fn text(about: &About, memory: MemoryTable, payloads: Payloads) -> Result<(String, u32), SnapshotError> {
    let alone = about.id.is_none() && about.base.is_none();
    let body = Body {
        version: if alone { VERSION_OF_ONE } else { VERSION },
        vmm: about.vmm.clone(),
        arch: about.arch.clone(),
        id: about.id.clone(),
        base: about.base.clone(),
        memory,
        payloads: payloads.into_list(),
    };
    let body = serde_json::to_string(&body).map_err(SnapshotError::Document)?;
    // The object was begun on the first line.
    let body = body.strip_prefix('{').unwrap_or(&body);
    let checksum = crc32fast::hash(body.as_bytes());
    Ok((format!("{BEGIN}{checksum:08x}{BEGIN_END}{body}"), checksum))
}

/// What `state.json` tells.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) id: Option<String>,
    pub(crate) base: Option<Base>,
    pub(crate) memory: MemoryTable,
    pub(crate) payloads: Payloads,
    pub(crate) checksum: u32,
}

/// Reads `state.json` of a guest on `arch` with so many bytes in `memory-ranges`.
pub(crate) fn parse(text: &[u8], arch: &str, memory_len: u64) -> Result<Document, SnapshotError> {
    let rest = text.strip_prefix(BEGIN.as_bytes()).ok_or(SnapshotError::Format)?;
    let (digits, rest) = rest.split_at_checked(DIGITS).ok_or(SnapshotError::Format)?;
    let body = rest.strip_prefix(BEGIN_END.as_bytes()).ok_or(SnapshotError::Format)?;
    let told = str::from_utf8(digits)
        .ok()
        .and_then(|digits| u32::from_str_radix(digits, 16).ok());
    let checksum = crc32fast::hash(body);
    if told != Some(checksum) {
        return Err(SnapshotError::Damaged);
    }
    let mut object = Vec::with_capacity(body.len() + 1);
    object.push(b'{');
    object.extend_from_slice(body);
    let head: Head = serde_json::from_slice(&object).map_err(SnapshotError::Document)?;
    if !(VERSION_OF_ONE..=VERSION).contains(&head.version) {
        return Err(SnapshotError::Version {
            vmm: head.vmm,
            found: head.version,
            known: VERSION,
        });
    }
    let body: Body = serde_json::from_slice(&object).map_err(SnapshotError::Document)?;
    if body.arch != arch {
        return Err(SnapshotError::Architecture {
            found: body.arch,
            here: arch.to_owned(),
        });
    }
    body.memory.check(memory_len)?;
    let built = body.memory.ranges.iter().find(|range| range.pages.is_some());
    if let Some(range) = built.filter(|_| body.base.is_none()) {
        let text = format!("the region at {:#x} builds on a snapshot that is not told", range.gpa);
        return Err(SnapshotError::Memory(text));
    }
    let mut payloads = Payloads::default();
    body.payloads.into_iter().try_for_each(|one| payloads.insert(one))?;
    Ok(Document {
        id: body.id,
        base: body.base,
        memory: body.memory,
        payloads,
        checksum,
    })
}
