//! `boot_params`, the page that the Linux 64-bit boot protocol passes in `rsi`.
//!
//! Layout: Linux `Documentation/arch/x86/zero-page.rst` and `boot.rst`, "The Real-Mode Kernel Header".

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::layout::{MemKind, MemMapEntry};

/// Offset of the setup header in a bzImage and in the zero page.
pub(crate) const SETUP_HEADER_AT: usize = 0x1f1;
/// Entries of the E820 table in the zero page.
pub(crate) const E820_MAX: usize = 128;
/// "Some loader that has no number assigned."
const LOADER_UNDEFINED: u8 = 0xff;
const VIDEO_MODE_NORMAL: u16 = 0xffff;

/// The real-mode kernel header of boot protocol 2.15, followed by room for later fields.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[allow(missing_docs, reason = "field names are those of Linux' boot.rst")]
pub struct SetupHeader {
    pub setup_sects: u8,
    pub root_flags: U16,
    pub syssize: U32,
    pub ram_size: U16,
    pub vid_mode: U16,
    pub root_dev: U16,
    pub boot_flag: U16,
    pub jump: [u8; 2],
    pub header: [u8; 4],
    pub version: U16,
    pub realmode_swtch: U32,
    pub start_sys_seg: U16,
    pub kernel_version: U16,
    pub type_of_loader: u8,
    pub loadflags: u8,
    pub setup_move_size: U16,
    pub code32_start: U32,
    pub ramdisk_image: U32,
    pub ramdisk_size: U32,
    pub bootsect_kludge: U32,
    pub heap_end_ptr: U16,
    pub ext_loader_ver: u8,
    pub ext_loader_type: u8,
    pub cmd_line_ptr: U32,
    pub initrd_addr_max: U32,
    pub kernel_alignment: U32,
    pub relocatable_kernel: u8,
    pub min_alignment: u8,
    pub xloadflags: U16,
    pub cmdline_size: U32,
    pub hardware_subarch: U32,
    pub hardware_subarch_data: U64,
    pub payload_offset: U32,
    pub payload_length: U32,
    pub setup_data: U64,
    pub pref_address: U64,
    pub init_size: U32,
    pub handover_offset: U32,
    pub kernel_info_offset: U32,
    pub later: [u8; 0x290 - 0x26c],
}

/// One line of the E820 table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct E820Entry {
    addr: U64,
    size: U64,
    kind: U32,
}

/// The zero page. Parts that no loader of ours fills are byte arrays.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct ZeroPage {
    _screen_info_to_0x70: [u8; 0x70],
    acpi_rsdp_addr: U64,
    _to_0xc0: [u8; 0xc0 - 0x78],
    ext_ramdisk_image: U32,
    ext_ramdisk_size: U32,
    ext_cmd_line_ptr: U32,
    _to_0x1e8: [u8; 0x1e8 - 0xcc],
    e820_entries: u8,
    _to_0x1f1: [u8; 0x1f1 - 0x1e9],
    hdr: SetupHeader,
    _to_0x2d0: [u8; 0x2d0 - 0x290],
    e820_table: [E820Entry; E820_MAX],
    _to_end: [u8; 0x1000 - 0xcd0],
}

const _: () = assert!(size_of::<ZeroPage>() == 4096);
const _: () = assert!(std::mem::offset_of!(ZeroPage, acpi_rsdp_addr) == 0x70);
const _: () = assert!(std::mem::offset_of!(ZeroPage, ext_ramdisk_image) == 0xc0);
const _: () = assert!(std::mem::offset_of!(ZeroPage, e820_entries) == 0x1e8);
const _: () = assert!(std::mem::offset_of!(ZeroPage, hdr) == SETUP_HEADER_AT);
const _: () = assert!(std::mem::offset_of!(ZeroPage, e820_table) == 0x2d0);
const _: () = assert!(SETUP_HEADER_AT + std::mem::offset_of!(SetupHeader, xloadflags) == 0x236);
const _: () = assert!(SETUP_HEADER_AT + std::mem::offset_of!(SetupHeader, init_size) == 0x260);
const _: () = assert!(SETUP_HEADER_AT + std::mem::offset_of!(SetupHeader, later) == 0x26c);

/// What the zero page tells the kernel. Addresses and sizes are checked by the caller.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ZeroPageContents<'a> {
    pub setup_header: &'a SetupHeader,
    pub cmdline_at: u64,
    pub initramfs: Option<(u64, u64)>,
    pub rsdp: u64,
    /// At most [`E820_MAX`] entries.
    pub map: &'a [MemMapEntry],
}

impl ZeroPage {
    pub(crate) fn new(contents: &ZeroPageContents<'_>) -> Self {
        let mut page = Self::new_zeroed();
        page.hdr = *contents.setup_header;
        page.hdr.type_of_loader = LOADER_UNDEFINED;
        page.hdr.vid_mode = VIDEO_MODE_NORMAL.into();
        // Each address goes into a low half in the header and a high half outside of it.
        page.hdr.cmd_line_ptr = (contents.cmdline_at as u32).into();
        page.ext_cmd_line_ptr = ((contents.cmdline_at >> 32) as u32).into();
        let (image, size) = contents.initramfs.unwrap_or((0, 0));
        page.hdr.ramdisk_image = (image as u32).into();
        page.ext_ramdisk_image = ((image >> 32) as u32).into();
        page.hdr.ramdisk_size = (size as u32).into();
        page.ext_ramdisk_size = ((size >> 32) as u32).into();
        page.acpi_rsdp_addr = contents.rsdp.into();
        page.e820_entries = contents.map.len().min(E820_MAX) as u8;
        for (slot, entry) in page.e820_table.iter_mut().zip(contents.map) {
            *slot = E820Entry {
                addr: entry.range.start.into(),
                size: entry.range.size.into(),
                kind: (entry.kind as u32).into(),
            };
        }
        page
    }
}

/// The E820 type numbers are those of [`MemKind`].
const _: () = assert!(MemKind::Ram as u32 == 1 && MemKind::Pmem as u32 == 7);
