//! ELF kernels and firmware with a PVH entry point.
//!
//! Our own reader: the one in `linux-loader` builds on x86 hosts only, leaves `p_memsz` unchecked against memory
//! and does not clear what `p_filesz` leaves out, which matters for a reboot in place.

use vm_memory::{GuestAddress, GuestMemory};

use crate::kernel::{BootProtocol, Image, KernelProblem, LoadedKernel};
use crate::layout::{BootTarget, MemRange};

const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const DATA_LITTLE_ENDIAN: u64 = 1;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Linux has five; anything near this is not a kernel.
const MAX_SEGMENTS: u16 = 256;
/// A kernel's notes are some hundred bytes.
const MAX_NOTES: u64 = 64 << 10;
/// Note type and name that hold the 32-bit entry point (Xen's `elfnote.h`).
const NOTE_PHYS32_ENTRY: u32 = 18;
const NOTE_NAME: &[u8] = b"Xen\0";

/// One program header, of either class.
#[derive(Clone, Copy, Debug)]
struct Segment {
    kind: u32,
    offset: u64,
    paddr: u64,
    file_size: u64,
    mem_size: u64,
    align: u64,
}

pub(crate) fn load<M: GuestMemory + ?Sized>(
    target: &BootTarget<'_, M>,
    image: &mut Image<'_>,
) -> Result<LoadedKernel, KernelProblem> {
    let segments = segments(image)?;
    // Find the entry before anything is copied: the likeliest mistake is an ELF file that is no kernel.
    let entry = pvh_entry(image, &segments)?.ok_or(KernelProblem::NoPvhEntry)?;

    let mut occupied = Vec::new();
    for segment in segments.iter().filter(|s| s.kind == PT_LOAD && s.mem_size > 0) {
        occupied.push(check_segment(target, image, segment)?);
    }
    if !occupied.iter().any(|range| range.start <= entry && entry < range.end()) {
        return Err(KernelProblem::Malformed(format!(
            "its PVH entry point {entry:#x} lies in none of its segments"
        )));
    }
    for segment in segments.iter().filter(|s| s.kind == PT_LOAD && s.mem_size > 0) {
        image.copy_to(target.mem, segment.offset, segment.paddr, segment.file_size)?;
        target.clear(&MemRange {
            start: segment.paddr + segment.file_size,
            size: segment.mem_size - segment.file_size,
        })?;
    }
    let end = occupied.iter().map(MemRange::end).max().unwrap_or(entry);
    Ok(LoadedKernel {
        entry: GuestAddress(entry),
        protocol: BootProtocol::Pvh,
        occupied,
        end: GuestAddress(end),
    })
}

/// Checks one loadable segment; afterwards sums of its fields cannot overflow.
fn check_segment<M: GuestMemory + ?Sized>(
    target: &BootTarget<'_, M>,
    image: &Image<'_>,
    segment: &Segment,
) -> Result<MemRange, KernelProblem> {
    let range = MemRange {
        start: segment.paddr,
        size: segment.mem_size,
    };
    if segment.file_size > segment.mem_size || range.start.checked_add(range.size).is_none() {
        return Err(KernelProblem::Malformed(format!(
            "its segment at {:#x} has {:#x} bytes in the file and {:#x} in memory",
            segment.paddr, segment.file_size, segment.mem_size
        )));
    }
    target.check_kernel_range(&range)?;
    image.check(segment.offset, segment.file_size)?;
    Ok(range)
}

/// Little-endian integer at `offset` of `bytes`, of `size` bytes; absent bytes read as a truncated file.
fn field(bytes: &[u8], offset: usize, size: usize) -> Option<u64> {
    let bytes = bytes.get(offset..offset.checked_add(size)?)?;
    Some(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

fn segments(image: &Image<'_>) -> Result<Vec<Segment>, KernelProblem> {
    let header = image.read_up_to(0, 64)?;
    let short = || KernelProblem::Truncated {
        needed: 64,
        found: image.len(),
    };
    let class = *header.get(4).ok_or_else(short)?;
    let get = |offset, size| field(&header, offset, size).ok_or_else(short);
    if get(5, 1)? != DATA_LITTLE_ENDIAN {
        return Err(KernelProblem::Malformed("it is big-endian".into()));
    }
    // (offset of e_phoff, its size, offset of e_phentsize, size of a program header)
    let (phoff_at, word, phentsize_at, entry_size) = match class {
        CLASS_32 => (28, 4, 42, 32u64),
        CLASS_64 => (32, 8, 54, 56u64),
        _ => {
            return Err(KernelProblem::Malformed(format!("its ELF class is {class}")));
        }
    };
    if get(phentsize_at, 2)? != entry_size {
        return Err(KernelProblem::Malformed(
            "its program headers have a size that ELF does not know".into(),
        ));
    }
    let count = get(phentsize_at + 2, 2)?;
    if count == 0 || count > u64::from(MAX_SEGMENTS) {
        return Err(KernelProblem::Malformed(format!("it has {count} program headers")));
    }
    let table_offset = get(phoff_at, word)?;
    let table_size = count * entry_size;
    image.check(table_offset, table_size)?;
    let table = image.read_up_to(table_offset, table_size as usize)?;
    table
        .chunks_exact(entry_size as usize)
        .map(|entry| segment(entry, class).ok_or_else(short))
        .collect()
}

fn segment(entry: &[u8], class: u8) -> Option<Segment> {
    let kind = field(entry, 0, 4)? as u32;
    let at = |narrow, wide| {
        if class == CLASS_32 {
            field(entry, narrow, 4)
        } else {
            field(entry, wide, 8)
        }
    };
    Some(Segment {
        kind,
        offset: at(4, 8)?,
        paddr: at(12, 24)?,
        file_size: at(16, 32)?,
        mem_size: at(20, 40)?,
        align: at(28, 48)?,
    })
}

/// The 32-bit entry point in the notes, if there is one.
fn pvh_entry(image: &Image<'_>, segments: &[Segment]) -> Result<Option<u64>, KernelProblem> {
    for segment in segments.iter().filter(|s| s.kind == PT_NOTE) {
        image.check(segment.offset, segment.file_size)?;
        let size = segment.file_size.min(MAX_NOTES) as usize;
        let notes = image.read_up_to(segment.offset, size)?;
        // Notes are padded to 4 bytes, in segments of alignment 8 to 8 (System V gABI, "Note Section").
        let align = if segment.align == 8 { 8 } else { 4 };
        if let Some(entry) = find_entry(&notes, align) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

fn find_entry(mut notes: &[u8], align: usize) -> Option<u64> {
    loop {
        let name_size = field(notes, 0, 4)? as usize;
        let desc_size = field(notes, 4, 4)? as usize;
        let kind = field(notes, 8, 4)? as u32;
        let desc_at = 12usize.checked_add(name_size)?.checked_next_multiple_of(align)?;
        if kind == NOTE_PHYS32_ENTRY && notes.get(12..12 + name_size)? == NOTE_NAME {
            // Linux writes 8 bytes, Xen's own kernels 4; the address is below 4 GiB in either case.
            return match desc_size {
                4 | 8 => field(notes, desc_at, desc_size).filter(|&at| at <= u64::from(u32::MAX)),
                _ => None,
            };
        }
        let next = desc_at.checked_add(desc_size)?.checked_next_multiple_of(align)?;
        notes = notes.get(next..)?;
    }
}
