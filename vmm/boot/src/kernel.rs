//! Loading a kernel of any kind we boot.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use crate::identify::{FileKind, GuestArch, PROBE_SIZE, identify};
use crate::layout::{BootTarget, MemRange, PAGE};
use crate::zero_page::SetupHeader;
use crate::{bzimage, elf};

/// How the loaded kernel wants to be entered.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum BootProtocol {
    /// 32-bit protected mode without paging, `rbx` = start info.
    Pvh,
    /// Long mode, `rsi` = zero page.
    Linux64 {
        /// The kernel's own setup header, the base of the zero page's.
        setup_header: Box<SetupHeader>,
    },
}

/// A kernel in guest memory.
#[derive(Clone, Debug)]
pub struct LoadedKernel {
    /// Where the first vCPU starts.
    pub entry: GuestAddress,
    /// How it starts.
    pub protocol: BootProtocol,
    /// All that the kernel occupies or will occupy before it knows its memory map; the initramfs stays outside.
    pub occupied: Vec<MemRange>,
    /// First address behind [`Self::occupied`].
    pub end: GuestAddress,
}

/// A kernel file could not be loaded; the source says why and what to do.
#[derive(Debug, Error)]
#[error("cannot boot kernel '{}'", .path.display())]
pub struct KernelError {
    /// The file, as the user named it.
    pub path: PathBuf,
    /// The reason.
    pub source: KernelProblem,
}

/// What is wrong with a kernel file.
#[derive(Debug, Error)]
pub enum KernelProblem {
    /// The file cannot be read.
    #[error("reading the file failed")]
    Read(#[source] io::Error),
    /// The file has no bytes.
    #[error("the file is empty; give {}", wants(*.wanted))]
    Empty {
        /// The guest's architecture.
        wanted: GuestArch,
    },
    /// The file is a kernel of another architecture.
    #[error("it is {found}, but this guest is {wanted}; give a kernel built for {wanted}")]
    WrongArch {
        /// What the file is.
        found: FileKind,
        /// The guest's architecture.
        wanted: GuestArch,
    },
    /// The file is something else.
    #[error("it looks like {found}, not like a kernel; give {}", wants(*.wanted))]
    NotAKernel {
        /// What the file looks like.
        found: FileKind,
        /// The guest's architecture.
        wanted: GuestArch,
    },
    /// An EFI application that unpacks a kernel by a method we do not have.
    #[error("it is a kernel compressed by {0} for UEFI; give the plain Image, or one compressed by gzip")]
    Compression(String),
    /// The kernel wants its data the other way round.
    #[error("it is a big-endian kernel; give a little-endian one")]
    BigEndian,
    /// The file ends too early.
    #[error("the file is truncated: its headers promise {needed} bytes, it has {found}; copy it again")]
    Truncated {
        /// Bytes that the headers ask for.
        needed: u64,
        /// The file's length in bytes.
        found: u64,
    },
    /// The bzImage is from before the 64-bit entry point was announced.
    #[error("its boot protocol {major}.{minor:02} is too old, 2.12 is the least; give a kernel of Linux 3.8 or later")]
    TooOld {
        /// Major number in the setup header.
        major: u8,
        /// Minor number in the setup header.
        minor: u8,
    },
    /// The bzImage is a 32-bit kernel.
    #[error("it is a 32-bit kernel without a 64-bit entry point; give a kernel built for x86-64")]
    No64BitEntry,
    /// The ELF file has no PVH note.
    #[error("it is an ELF file without a PVH entry point; build the kernel with CONFIG_PVH=y or give its bzImage")]
    NoPvhEntry,
    /// A header contradicts itself.
    #[error("the file is damaged: {0}; build or copy it again")]
    Malformed(String),
    /// There is no memory where the kernel has to be.
    #[error(
        "it needs guest memory from {start:#x} to {end:#x}, which is not free RAM; {}",
        fit_advice(*.start, *.end, *.lowest, *.ram_start)
    )]
    DoesNotFit {
        /// First address that is needed.
        start: u64,
        /// First address behind.
        end: u64,
        /// Lowest address for kernels in this machine.
        lowest: u64,
        /// First address of RAM.
        ram_start: u64,
    },
    /// Guest memory refused the bytes.
    #[error("copying it into guest memory failed")]
    Memory(#[source] GuestMemoryError),
}

/// What a kernel has to be, in words.
fn wants(arch: GuestArch) -> &'static str {
    match arch {
        GuestArch::X86_64 => "an x86-64 bzImage (vmlinuz) or a vmlinux ELF",
        GuestArch::Aarch64 => "an arm64 Image, plain or compressed by gzip",
    }
}

fn fit_advice(start: u64, end: u64, lowest: u64, ram_start: u64) -> String {
    if start < lowest {
        format!("link the kernel at {lowest:#x} or above")
    } else {
        let mib = end.saturating_sub(ram_start).div_ceil(1 << 20);
        format!("give the guest at least {mib} MiB of memory")
    }
}

/// Loads the kernel in `file` into `target`; `path` is only for messages.
///
/// Takes an ELF file with a PVH note ("PVH", also firmware) or a bzImage of protocol 2.12 and later with a 64-bit entry
/// point. Other files, and files whose headers ask for anything outside the target's free RAM, are errors; then part of the
/// memory may have been written.
pub fn load_kernel<M: GuestMemory + ?Sized>(
    target: &BootTarget<'_, M>,
    file: &mut File,
    path: &Path,
) -> Result<LoadedKernel, KernelError> {
    load(target, file).map_err(|source| KernelError {
        path: path.into(),
        source,
    })
}

fn load<M: GuestMemory + ?Sized>(target: &BootTarget<'_, M>, file: &mut File) -> Result<LoadedKernel, KernelProblem> {
    let mut image = Image::new(file, GuestArch::X86_64)?;
    let head = image.read_up_to(0, PROBE_SIZE)?;
    let kind = identify(&head);
    match kind.arch() {
        Some(GuestArch::X86_64) => {}
        Some(_) => return Err(wrong_arch(kind)),
        None => {
            return Err(match kind {
                FileKind::Elf { .. } | FileKind::EfiZboot => wrong_arch(kind),
                _ => KernelProblem::NotAKernel {
                    found: kind,
                    wanted: GuestArch::X86_64,
                },
            });
        }
    }
    match kind {
        FileKind::Elf { .. } => elf::load(target, &mut image),
        _ => bzimage::load(target, &mut image, &head),
    }
}

fn wrong_arch(found: FileKind) -> KernelProblem {
    KernelProblem::WrongArch {
        found,
        wanted: GuestArch::X86_64,
    }
}

/// A kernel file with its length: every read is checked against it.
#[derive(Debug)]
pub(crate) struct Image<'a> {
    file: &'a mut File,
    len: u64,
}

impl<'a> Image<'a> {
    pub(crate) fn new(file: &'a mut File, wanted: GuestArch) -> Result<Self, KernelProblem> {
        let len = file.metadata().map_err(KernelProblem::Read)?.len();
        if len == 0 {
            return Err(KernelProblem::Empty { wanted });
        }
        Ok(Self { file, len })
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Checks that the file holds `size` bytes at `offset`.
    pub(crate) fn check(&self, offset: u64, size: u64) -> Result<(), KernelProblem> {
        let needed = offset.saturating_add(size);
        if needed > self.len {
            return Err(KernelProblem::Truncated {
                needed,
                found: self.len,
            });
        }
        Ok(())
    }

    /// Reads `size` bytes at `offset`, fewer at the end of the file. `size` must not come from the file.
    pub(crate) fn read_up_to(&self, offset: u64, size: usize) -> Result<Vec<u8>, KernelProblem> {
        let there = self.len.saturating_sub(offset);
        let size = usize::try_from(there).map_or(size, |there| there.min(size));
        let mut bytes = vec![0; size];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(KernelProblem::Read)?;
        Ok(bytes)
    }

    /// Copies `size` bytes at `offset` to guest memory at `start`, where the caller checked that there is RAM.
    pub(crate) fn copy_to<M: GuestMemory + ?Sized>(
        &mut self,
        mem: &M,
        offset: u64,
        start: u64,
        size: u64,
    ) -> Result<(), KernelProblem> {
        self.check(offset, size)?;
        self.file.seek(SeekFrom::Start(offset)).map_err(KernelProblem::Read)?;
        let size = usize::try_from(size).map_err(|_| KernelProblem::Malformed(format!("a part of {size} bytes")))?;
        mem.read_exact_volatile_from(GuestAddress(start), &mut *self.file, size)
            .map_err(KernelProblem::Memory)
    }
}

impl<M: GuestMemory + ?Sized> BootTarget<'_, M> {
    /// Checks that `range` is free RAM at or above the lowest kernel address, also in the memory itself.
    pub(crate) fn check_kernel_range(&self, range: &MemRange) -> Result<(), KernelProblem> {
        let backed = usize::try_from(range.size).is_ok_and(|size| {
            self.mem
                .check_range(GuestAddress(range.start), size, Permissions::Write)
        });
        if range.start < self.layout.kernel_start || !self.memory.is_usable(range) || !backed {
            return Err(KernelProblem::DoesNotFit {
                start: range.start,
                end: range.end(),
                lowest: self.layout.kernel_start,
                ram_start: 0,
            });
        }
        Ok(())
    }

    /// Writes zeros over `range` unless the memory is known to be zero.
    pub(crate) fn clear(&self, range: &MemRange) -> Result<(), KernelProblem> {
        if self.memory_is_zero {
            return Ok(());
        }
        let zeros = [0; PAGE as usize];
        let mut at = range.start;
        while at < range.end() {
            let piece = (range.end() - at).min(PAGE) as usize;
            self.mem
                .write_slice(&zeros[..piece], GuestAddress(at))
                .map_err(KernelProblem::Memory)?;
            at += piece as u64;
        }
        Ok(())
    }
}
