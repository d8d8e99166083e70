//! Kernel images with nothing but headers and recognisable bytes.

use zerocopy::{FromZeros, IntoBytes};

use crate::zero_page::{SETUP_HEADER_AT, SetupHeader};

pub(super) const SEGMENT_AT: u64 = 0x20_0000;
pub(super) const ENTRY: u32 = 0x20_0010;
pub(super) const BODY: &[u8] = b"the kernel's first bytes, and its entry";
/// Bytes behind the body that the kernel wants zeroed.
pub(super) const BSS: u64 = 0x3000;

/// An ELF file to be: fields as in the headers, in any class.
#[derive(Clone)]
pub(super) struct Elf {
    pub class: u8,
    pub machine: u16,
    pub paddr: u64,
    pub file_size: u64,
    pub mem_size: u64,
    pub phentsize: Option<u16>,
    pub phnum: u16,
    pub notes: Vec<u8>,
    pub note_align: u64,
}

pub(super) fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [name.len() as u32, desc.len() as u32, kind] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    for part in [name, desc] {
        bytes.extend_from_slice(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

impl Elf {
    /// A PVH kernel as Linux builds them.
    pub(super) fn pvh() -> Self {
        // Other notes come first, as in a real vmlinux.
        let mut notes = note(b"GNU\0", 3, &[7; 20]);
        notes.extend(note(b"Xen\0", 6, b"linux\0"));
        notes.extend(note(b"Xen\0", 18, &u64::from(ENTRY).to_le_bytes()));
        Self {
            class: 2,
            machine: 62,
            paddr: SEGMENT_AT,
            file_size: BODY.len() as u64,
            mem_size: BODY.len() as u64 + BSS,
            phentsize: None,
            phnum: 2,
            notes,
            note_align: 4,
        }
    }

    pub(super) fn build(&self) -> Vec<u8> {
        let wide = self.class == 2;
        let (header_size, entry_size) = if wide { (64u64, 56u64) } else { (52, 32) };
        let mut out = b"\x7fELF".to_vec();
        out.extend_from_slice(&[self.class, 1, 1]);
        out.resize(16, 0);
        let word = |out: &mut Vec<u8>, value: u64| {
            let bytes = value.to_le_bytes();
            out.extend_from_slice(if wide { &bytes } else { &bytes[..4] });
        };
        out.extend_from_slice(&2u16.to_le_bytes());
        out.extend_from_slice(&self.machine.to_le_bytes());
        out.extend_from_slice(&1u32.to_le_bytes());
        for value in [0x100_0000, header_size, 0] {
            word(&mut out, value);
        }
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&(header_size as u16).to_le_bytes());
        out.extend_from_slice(&self.phentsize.unwrap_or(entry_size as u16).to_le_bytes());
        out.extend_from_slice(&self.phnum.to_le_bytes());
        out.resize(header_size as usize, 0);

        let notes_at = header_size + 2 * entry_size;
        let body_at = notes_at + self.notes.len() as u64;
        let notes_len = self.notes.len() as u64;
        for (kind, offset, paddr, file_size, mem_size, align) in [
            (4u32, notes_at, 0, notes_len, notes_len, self.note_align),
            (1, body_at, self.paddr, self.file_size, self.mem_size, 4096),
        ] {
            out.extend_from_slice(&kind.to_le_bytes());
            if wide {
                out.extend_from_slice(&7u32.to_le_bytes());
            }
            for value in [offset, 0xffff_8000_0000, paddr, file_size, mem_size] {
                word(&mut out, value);
            }
            if !wide {
                out.extend_from_slice(&7u32.to_le_bytes());
            }
            word(&mut out, align);
        }
        out.extend_from_slice(&self.notes);
        out.extend_from_slice(BODY);
        out
    }
}

/// A bzImage header as Linux 6.x has it, 64-bit, for 16 MiB.
pub(super) fn setup_header(code_size: usize) -> SetupHeader {
    let mut header = SetupHeader::new_zeroed();
    header.setup_sects = 3;
    header.syssize = (code_size.div_ceil(16) as u32).into();
    header.boot_flag = 0xaa55.into();
    header.jump = [0xeb, 0x6a];
    header.header = *b"HdrS";
    header.version = 0x020f.into();
    header.loadflags = 1;
    header.code32_start = 0x10_0000.into();
    header.initrd_addr_max = 0x7fff_ffff.into();
    header.kernel_alignment = 0x20_0000.into();
    header.relocatable_kernel = 1;
    header.xloadflags = 0x3f.into();
    header.cmdline_size = 2047.into();
    header.pref_address = 0x100_0000.into();
    header.init_size = 0x80_0000.into();
    header
}

/// A bzImage with `header` and `code` behind its setup sectors.
pub(super) fn bzimage(header: &SetupHeader, code: &[u8]) -> Vec<u8> {
    let sectors = match header.setup_sects {
        0 => 5,
        sectors => usize::from(sectors) + 1,
    };
    let mut image = vec![0; sectors * 512];
    image[..2].copy_from_slice(b"MZ");
    let bytes = header.as_bytes();
    image[SETUP_HEADER_AT..SETUP_HEADER_AT + bytes.len()].copy_from_slice(bytes);
    image.extend_from_slice(code);
    image.resize(image.len().next_multiple_of(16), 0);
    image
}

/// Code of which every byte tells its place.
pub(super) fn code(size: usize) -> Vec<u8> {
    (0..size).map(|at| (at % 251) as u8).collect()
}
