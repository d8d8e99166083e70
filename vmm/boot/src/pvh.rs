//! `hvm_start_info`, what the PVH protocol passes in `rbx` (Xen's `start_info.h`, version 1).

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::layout::MemMapEntry;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct StartInfo {
    pub magic: U32,
    pub version: U32,
    pub flags: U32,
    pub nr_modules: U32,
    pub modlist_paddr: U64,
    pub cmdline_paddr: U64,
    pub rsdp_paddr: U64,
    pub memmap_paddr: U64,
    pub memmap_entries: U32,
    pub reserved: U32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Module {
    pub paddr: U64,
    pub size: U64,
    pub cmdline_paddr: U64,
    pub reserved: U64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct MapEntry {
    pub addr: U64,
    pub size: U64,
    pub kind: U32,
    pub reserved: U32,
}

const _: () = assert!(size_of::<StartInfo>() == 56);
const _: () = assert!(size_of::<Module>() == 32);
const _: () = assert!(size_of::<MapEntry>() == 24);

const MODULES_AT: usize = 64;
const MAP_AT: usize = MODULES_AT + size_of::<Module>();
/// Entries that fit into the page together with the rest.
pub(crate) const MAP_MAX: usize = 128;
const _: () = assert!(MAP_AT + MAP_MAX * size_of::<MapEntry>() <= 4096);

/// Start info, module list and memory map for a page at `at`. `map` has at most [`MAP_MAX`] entries.
pub(crate) fn start_info(
    at: u64,
    cmdline_at: u64,
    initramfs: Option<(u64, u64)>,
    rsdp: u64,
    map: &[MemMapEntry],
) -> Vec<u8> {
    let info = StartInfo {
        magic: MAGIC.into(),
        version: VERSION.into(),
        flags: 0.into(),
        nr_modules: u32::from(initramfs.is_some()).into(),
        modlist_paddr: initramfs.map_or(0, |_| at + MODULES_AT as u64).into(),
        cmdline_paddr: cmdline_at.into(),
        rsdp_paddr: rsdp.into(),
        memmap_paddr: (at + MAP_AT as u64).into(),
        memmap_entries: (map.len() as u32).into(),
        reserved: 0.into(),
    };
    let (paddr, size) = initramfs.unwrap_or((0, 0));
    let module = Module {
        paddr: paddr.into(),
        size: size.into(),
        cmdline_paddr: 0.into(),
        reserved: 0.into(),
    };
    let mut page = info.as_bytes().to_vec();
    page.resize(MODULES_AT, 0);
    page.extend_from_slice(module.as_bytes());
    for entry in map {
        let entry = MapEntry {
            addr: entry.range.start.into(),
            size: entry.range.size.into(),
            kind: (entry.kind as u32).into(),
            reserved: 0.into(),
        };
        page.extend_from_slice(entry.as_bytes());
    }
    page
}
