//! Descriptor table and page tables that both entry modes start with.
//!
//! The Linux protocol asks for `__BOOT_CS` 0x10 and `__BOOT_DS` 0x18 as flat segments and an identity mapping of kernel,
//! zero page and command line; PVH for flat 32-bit segments and a task state segment of limit 0x67. One table serves both.

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

use crate::boot_data::EntryMode;
use crate::layout::{BootLayout, PAGE};

/// Selectors of the segments in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentSelectors {
    /// Code: execute and read, accessed.
    pub code: u16,
    /// Data and stack: read and write, accessed.
    pub data: u16,
    /// Task state segment, busy, base 0, limit 0x67.
    pub task: u16,
}

/// What the segment and control registers of the first vCPU refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuTables {
    /// Base of the descriptor table.
    pub gdt_base: GuestAddress,
    /// Its limit: size less one, in bytes.
    pub gdt_limit: u16,
    /// The selectors.
    pub selectors: SegmentSelectors,
    /// For `cr3`, in long mode; the first 4 GiB are mapped to themselves.
    pub page_table: Option<GuestAddress>,
}

const PRESENT_WRITABLE: u64 = 0x3;
const LARGE_PAGE: u64 = 0x80;
const LARGE_PAGE_SIZE: u64 = 2 << 20;
const ENTRIES: u64 = 512;
/// Second-level entries, one GiB each.
const GIBS: u64 = 4;

/// A descriptor with base 0 and a limit of 4 GiB (Intel SDM 3A, 3.4.5).
const fn flat(access: u8, flags: u8) -> u64 {
    0x000f_0000_0000_ffff | (access as u64) << 40 | (flags as u64) << 52
}

const CODE: u8 = 0x9b;
const DATA: u8 = 0x93;
const FLAGS_LONG: u8 = 0xa;
const FLAGS_32: u8 = 0xc;
/// Base 0, limit 0x67, busy 32- or 64-bit task state segment; the upper half of a 64-bit one is zero.
const TASK: u64 = 0x0000_8b00_0000_0067;

impl CpuTables {
    /// Writes the tables for `mode` where `layout` has them.
    pub fn write<M: GuestMemory + ?Sized>(
        mem: &M,
        layout: &BootLayout,
        mode: EntryMode,
    ) -> Result<Self, GuestMemoryError> {
        let code_flags = match mode {
            EntryMode::Long64 => FLAGS_LONG,
            EntryMode::Pvh32 => FLAGS_32,
        };
        let gdt = [0, 0, flat(CODE, code_flags), flat(DATA, FLAGS_32), TASK, 0];
        mem.write_slice(&to_bytes(&gdt), GuestAddress(layout.gdt))?;
        let page_table = match mode {
            EntryMode::Pvh32 => None,
            EntryMode::Long64 => Some(write_identity_map(mem, layout.page_tables)?),
        };
        Ok(Self {
            gdt_base: GuestAddress(layout.gdt),
            gdt_limit: (BootLayout::GDT_SIZE - 1) as u16,
            selectors: SegmentSelectors {
                code: 0x10,
                data: 0x18,
                task: 0x20,
            },
            page_table,
        })
    }
}

fn to_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn write_identity_map<M: GuestMemory + ?Sized>(mem: &M, at: u64) -> Result<GuestAddress, GuestMemoryError> {
    let second = at + PAGE;
    let third = second + PAGE;
    let mut tables = vec![0; (BootLayout::PAGE_TABLES_SIZE / 8) as usize];
    tables[0] = second | PRESENT_WRITABLE;
    for gib in 0..GIBS {
        tables[(ENTRIES + gib) as usize] = (third + gib * PAGE) | PRESENT_WRITABLE;
    }
    for page in 0..GIBS * ENTRIES {
        tables[(2 * ENTRIES + page) as usize] = (page * LARGE_PAGE_SIZE) | LARGE_PAGE | PRESENT_WRITABLE;
    }
    mem.write_slice(&to_bytes(&tables), GuestAddress(at))?;
    Ok(GuestAddress(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    type Memory = vm_memory::GuestMemoryMmap<()>;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    #[test]
    fn identity_map_translates_every_gib() {
        let mem = memory();
        let tables = CpuTables::write(&mem, &BootLayout::X86_64, EntryMode::Long64).unwrap();
        let entry = |table: u64, index: u64| -> u64 {
            let entry: u64 = mem.read_obj(GuestAddress(table + index * 8)).unwrap();
            assert_eq!(entry & PRESENT_WRITABLE, PRESENT_WRITABLE);
            entry & !0xfff
        };
        for address in [0u64, 0x20_0000, 0x4000_0000, 0xC123_4567, 0xFFFF_FFFF] {
            let top = entry(tables.page_table.unwrap().0, address >> 39);
            let second = entry(top, address >> 30 & 511);
            let page = entry(second, address >> 21 & 511);
            assert_eq!(page | (address & (LARGE_PAGE_SIZE - 1)), address);
        }
    }

    #[test]
    fn descriptors_of_each_mode() {
        let mem = memory();
        let layout = BootLayout::X86_64;
        for (mode, code) in [
            (EntryMode::Long64, 0x00af_9b00_0000_ffff_u64),
            (EntryMode::Pvh32, 0x00cf_9b00_0000_ffff),
        ] {
            let tables = CpuTables::write(&mem, &layout, mode).unwrap();
            let at = |selector: u16| GuestAddress(tables.gdt_base.0 + u64::from(selector));
            let read = |selector| mem.read_obj::<u64>(at(selector)).unwrap();
            assert_eq!(read(tables.selectors.code), code);
            assert_eq!(read(tables.selectors.data), 0x00cf_9300_0000_ffff);
            assert_eq!(read(tables.selectors.task), 0x0000_8b00_0000_0067);
            assert_eq!(tables.page_table.is_some(), mode == EntryMode::Long64);
        }
    }

    #[test]
    fn a_table_outside_of_memory_is_an_error() {
        let layout = BootLayout {
            page_tables: 4 << 20,
            ..BootLayout::X86_64
        };
        assert!(CpuTables::write(&memory(), &layout, EntryMode::Long64).is_err());
        assert!(CpuTables::write(&memory(), &layout, EntryMode::Pvh32).is_ok());
    }
}
