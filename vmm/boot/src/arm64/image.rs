//! Loading an `Image` and an initramfs.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use flate2::read::GzDecoder;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use crate::identify::{FileKind, GuestArch, PROBE_SIZE, identify};
use crate::initramfs::{InitramfsError, LoadedInitramfs, place};
use crate::kernel::{self, KernelError, KernelProblem};
use crate::layout::{MemRange, MemoryLayout};

/// Bytes of the header.
const HEADER: usize = 64;
const MAGIC: &[u8; 4] = b"ARM\x64";
/// Kernels want a multiple of this, and then their text offset.
const ALIGN: u64 = 2 << 20;
/// What kernels from before 3.17 have, which leave the header's fields empty.
const OLD_TEXT_OFFSET: u64 = 0x8_0000;
const FLAG_BIG_ENDIAN: u64 = 1;
/// How far from the kernel an initramfs may be.
const INITRAMFS_WINDOW: u64 = 32 << 30;
/// Bytes copied at a time.
const CHUNK: usize = 256 << 10;
/// What gzip files begin with.
const GZIP: &[u8] = b"\x1f\x8b\x08";

/// A kernel in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Where the first vCPU starts.
    pub entry: GuestAddress,
    /// All that the kernel occupies before it knows its memory map.
    pub occupied: MemRange,
}

/// Loads the kernel in `file` at the first place from `lowest` on; `path` is only for messages.
///
/// Files that are no arm64 kernel, and kernels that do not fit, are errors; then part of the memory may have been written.
pub fn load_image<M: GuestMemory + ?Sized>(
    mem: &M,
    memory: &MemoryLayout,
    lowest: u64,
    file: &mut File,
    path: &Path,
) -> Result<Image, KernelError> {
    load(mem, memory, lowest, file).map_err(|source| KernelError {
        path: path.into(),
        source,
    })
}

fn load<M: GuestMemory + ?Sized>(
    mem: &M,
    memory: &MemoryLayout,
    lowest: u64,
    file: &mut File,
) -> Result<Image, KernelProblem> {
    let source = kernel::Image::new(file, GuestArch::Aarch64)?;
    let head = source.read_up_to(0, PROBE_SIZE)?;
    let len = source.len();
    let kind = identify(&head);
    let wanted = GuestArch::Aarch64;
    match kind {
        FileKind::Arm64Image => {
            let needed = promised_by_sections(&head);
            if needed > len {
                return Err(KernelProblem::Truncated { needed, found: len });
            }
            file.rewind().map_err(KernelProblem::Read)?;
            Copier { mem, memory, lowest }.copy(file, Some(len))
        }
        FileKind::EfiZboot => {
            let (start, size) = zboot_payload(&head, len)?;
            file.seek(SeekFrom::Start(start)).map_err(KernelProblem::Read)?;
            Copier { mem, memory, lowest }.copy(GzDecoder::new(file.take(size)), None)
        }
        _ if head.starts_with(GZIP) => {
            file.rewind().map_err(KernelProblem::Read)?;
            Copier { mem, memory, lowest }.copy(GzDecoder::new(file), None)
        }
        _ if kind.arch().is_some_and(|arch| arch != wanted) => Err(KernelProblem::WrongArch { found: kind, wanted }),
        FileKind::Elf { machine } if kind.arch().is_none() => Err(KernelProblem::WrongArch {
            found: FileKind::Elf { machine },
            wanted,
        }),
        found => Err(KernelProblem::NotAKernel { found, wanted }),
    }
}

/// Bytes that the file of a kernel has which is an EFI application too, by its section table and its signature (Microsoft PE/COFF, 3, 4
/// and 5.7); 0 when it tells nothing in its first bytes. The Linux header itself tells only the memory it needs, which is more.
fn promised_by_sections(head: &[u8]) -> u64 {
    const COFF: usize = 24;
    const SECTION: usize = 40;
    const PE32_PLUS: usize = 0x20b;
    /// In the optional header of PE32+: the directory's entry of the certificates.
    const CERTIFICATES: usize = 112 + 4 * 8;
    let half = |at: usize| {
        let bytes = head.get(at..at + 2);
        bytes.map_or(0, |b| usize::from(u16::from_le_bytes([b[0], b[1]])))
    };
    let word = |at: usize| {
        let bytes = head.get(at..at + 4);
        bytes.map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    };
    let at = word(60) as usize;
    if !head.starts_with(b"MZ") || !head.get(at..).is_some_and(|rest| rest.starts_with(b"PE\0\0")) {
        return 0;
    }
    let (optional, size) = (at + COFF, half(at + 20));
    // Place in the file and size, which a section has the other way round.
    let end = |place: usize, size: usize| u64::from(word(place)) + u64::from(word(size));
    let section = |n: usize| optional + size + n * SECTION;
    let sections = (0..half(at + 6)).map(section).take_while(|at| *at < head.len());
    let signed = half(optional) == PE32_PLUS && size >= CERTIFICATES + 8;
    let signature = signed.then(|| end(optional + CERTIFICATES, optional + CERTIFICATES + 4));
    let ends = sections.map(|at| end(at + 20, at + 16));
    ends.chain(signature).max().unwrap_or(0)
}

/// Where the packed kernel is in an EFI application of Linux (drivers/firmware/efi/libstub/zboot-header.S): offset, size.
fn zboot_payload(head: &[u8], len: u64) -> Result<(u64, u64), KernelProblem> {
    let number = |at: usize| {
        head.get(at..at + 4)
            .map(|b| u64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])))
    };
    let (Some(start), Some(size), Some(method)) = (number(8), number(12), head.get(24..56)) else {
        return Err(KernelProblem::Truncated { needed: 56, found: len });
    };
    let method = method.split(|byte| *byte == 0).next().unwrap_or_default();
    if method != b"gzip" {
        let method = String::from_utf8_lossy(method);
        return Err(KernelProblem::Compression(
            method.chars().filter(char::is_ascii_graphic).collect(),
        ));
    }
    let needed = start.saturating_add(size);
    if needed > len {
        return Err(KernelProblem::Truncated { needed, found: len });
    }
    Ok((start, size))
}

/// The header's fields that matter (Linux, Documentation/arch/arm64/booting.rst).
struct Header {
    text_offset: u64,
    /// Bytes from the start of the image to the end of what it needs; 0 when it does not tell.
    size: u64,
}

impl Header {
    fn parse(bytes: &[u8; HEADER]) -> Result<Self, KernelProblem> {
        let field = |at: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(number)
        };
        if &bytes[56..60] != MAGIC {
            return Err(KernelProblem::NotAKernel {
                found: identify(bytes),
                wanted: GuestArch::Aarch64,
            });
        }
        let (text_offset, size, flags) = (field(8), field(16), field(24));
        if flags & FLAG_BIG_ENDIAN != 0 {
            return Err(KernelProblem::BigEndian);
        }
        if text_offset >= ALIGN {
            return Err(KernelProblem::Malformed(format!("its text offset is {text_offset:#x}")));
        }
        Ok(match size {
            0 => Self {
                text_offset: OLD_TEXT_OFFSET,
                size,
            },
            _ => Self { text_offset, size },
        })
    }
}

struct Copier<'a, M: ?Sized> {
    mem: &'a M,
    memory: &'a MemoryLayout,
    lowest: u64,
}

impl<M: GuestMemory + ?Sized> Copier<'_, M> {
    /// Copies a kernel of `len` bytes; `None` when only unpacking it tells how many there are.
    fn copy(&self, mut from: impl Read, len: Option<u64>) -> Result<Image, KernelProblem> {
        let mut head = [0; HEADER];
        let packed = len.is_none();
        let failed = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof if packed => {
                KernelProblem::Malformed("its compressed data end too early".into())
            }
            std::io::ErrorKind::InvalidInput | std::io::ErrorKind::InvalidData if packed => {
                KernelProblem::Malformed("its compressed data are invalid".into())
            }
            std::io::ErrorKind::UnexpectedEof => KernelProblem::Truncated {
                needed: HEADER as u64,
                found: len.unwrap_or_default(),
            },
            _ => KernelProblem::Read(error),
        };
        from.read_exact(&mut head).map_err(failed)?;
        let header = Header::parse(&head)?;
        let start = self
            .lowest
            .checked_next_multiple_of(ALIGN)
            .and_then(|base| base.checked_add(header.text_offset))
            .ok_or_else(|| KernelProblem::Malformed("there is no place for it".into()))?;
        // A plain file tells its size; what unpacks is stopped where the header says it ends.
        let size = header.size.max(len.unwrap_or(HEADER as u64));
        let limit = match (header.size, len) {
            (0, None) => self.room_from(start),
            _ => size,
        };
        let occupied = MemRange { start, size };
        self.check(&occupied)?;
        let write = |at: u64, bytes: &[u8]| {
            self.mem
                .write_slice(bytes, GuestAddress(at))
                .map_err(KernelProblem::Memory)
        };
        write(start, &head)?;
        let mut done = HEADER as u64;
        let mut chunk = vec![0; CHUNK];
        loop {
            let n = match from.read(&mut chunk) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed(error)),
            };
            if done + n as u64 > limit {
                let more = "it has more bytes than its header says".into();
                return Err(KernelProblem::Malformed(more));
            }
            write(start + done, &chunk[..n])?;
            done += n as u64;
        }
        if let Some(len) = len.filter(|len| done < *len) {
            return Err(KernelProblem::Truncated {
                needed: len,
                found: done,
            });
        }
        Ok(Image {
            entry: GuestAddress(start),
            occupied: MemRange {
                start,
                size: size.max(done),
            },
        })
    }

    fn check(&self, range: &MemRange) -> Result<(), KernelProblem> {
        if range.start.checked_add(range.size).is_some() && self.memory.is_usable(range) {
            return Ok(());
        }
        Err(KernelProblem::DoesNotFit {
            start: range.start,
            end: range.end(),
            lowest: self.lowest,
            ram_start: self.memory.ram().first().map_or(0, |ram| ram.start),
        })
    }

    fn room_from(&self, start: u64) -> u64 {
        let here = MemRange { start, size: 1 };
        let ram = self.memory.usable().into_iter().find(|ram| ram.contains(&here));
        ram.map_or(0, |ram| ram.end() - start)
    }
}

/// Loads the initramfs in `file` at the highest page of free RAM that the kernel can reach, clear of it; `path` is only for messages.
pub fn load_initramfs<M: GuestMemory + ?Sized>(
    mem: &M,
    memory: &MemoryLayout,
    kernel: &Image,
    file: &mut File,
    path: &Path,
) -> Result<LoadedInitramfs, InitramfsError> {
    // Both have to lie in one window of 32 GiB that starts at a multiple of 1 GiB.
    let start = kernel.occupied.start & !((1 << 30) - 1);
    let reach = start.saturating_add(INITRAMFS_WINDOW);
    let ram_end = memory.ram().last().map_or(0, |ram| ram.end());
    let window = MemRange::from_bounds(kernel.occupied.start, reach.min(ram_end));
    let occupied = [kernel.occupied];
    place(mem, memory, &window, &occupied, file).map_err(|source| InitramfsError {
        path: path.into(),
        source,
    })
}
