//! What the kernel is told, read back the way a kernel reads it.

use vm_memory::{Bytes, GuestAddress};

use super::images::{ENTRY, Elf, bzimage, code, setup_header};
use super::{Guest, MIB};
use crate::layout::{MemKind, MemMapEntry, MemRange, MemoryLayout};
use crate::{
    BootDataError, BootEntry, BootParams, CmdlineError, EntryMode, LoadedInitramfs, LoadedKernel, write_boot_data,
};

const INITRAMFS: LoadedInitramfs = LoadedInitramfs {
    start: GuestAddress(0x300_0000),
    size: 0x1_2345,
};
const MAP: [(u64, u64, u32); 3] = [(0, 0x9_FC00, 1), (0x9_FC00, MIB - 0x9_FC00, 2), (MIB, 63 * MIB, 1)];

fn write(guest: &Guest, kernel: &LoadedKernel, cmdline: &str) -> Result<BootEntry, BootDataError> {
    write_boot_data(
        &guest.target(),
        &BootParams {
            kernel,
            initramfs: Some(INITRAMFS),
            cmdline,
            rsdp: Some(GuestAddress(0xE_0000)),
        },
    )
}

fn u32_at(guest: &Guest, at: u64) -> u32 {
    guest.mem.read_obj(GuestAddress(at)).unwrap()
}

fn u64_at(guest: &Guest, at: u64) -> u64 {
    guest.mem.read_obj(GuestAddress(at)).unwrap()
}

#[test]
fn pvh_start_info() {
    let guest = Guest::new(64 * MIB);
    let kernel = guest.load(&Elf::pvh().build()).unwrap();
    let entry = write(&guest, &kernel, "console=ttyS0").unwrap();
    assert_eq!(entry.mode, EntryMode::Pvh32);
    assert_eq!(entry.rip.0, u64::from(ENTRY));
    let info = entry.params.0;
    assert_eq!(info, guest.layout.start_info);
    assert_eq!(u32_at(&guest, info), 0x336e_c578);
    assert_eq!(u32_at(&guest, info + 4), 1);
    assert_eq!(u32_at(&guest, info + 12), 1);
    let module = u64_at(&guest, info + 16);
    assert_eq!(u64_at(&guest, module), INITRAMFS.start.0);
    assert_eq!(u64_at(&guest, module + 8), INITRAMFS.size);
    let cmdline = u64_at(&guest, info + 24);
    assert_eq!(guest.bytes(cmdline, 14), b"console=ttyS0\0");
    assert_eq!(u64_at(&guest, info + 32), 0xE_0000);
    let map = u64_at(&guest, info + 40);
    assert_eq!(u32_at(&guest, info + 48), 3);
    for (entry, expected) in MAP.iter().enumerate() {
        let at = map + 24 * entry as u64;
        let read = (u64_at(&guest, at), u64_at(&guest, at + 8), u32_at(&guest, at + 16));
        assert_eq!(read, *expected);
    }
}

#[test]
fn zero_page() {
    let guest = Guest::new(64 * MIB);
    let code = code(4096);
    let kernel = guest.load(&bzimage(&setup_header(code.len()), &code)).unwrap();
    let entry = write(&guest, &kernel, "console=ttyS0").unwrap();
    assert_eq!((entry.mode, entry.rip.0), (EntryMode::Long64, MIB + 0x200));
    let page = entry.params.0;
    assert_eq!(page, guest.layout.zero_page);
    assert_eq!(u64_at(&guest, page + 0x70), 0xE_0000, "acpi_rsdp_addr");
    assert_eq!(u32_at(&guest, page + 0x202), u32::from_le_bytes(*b"HdrS"));
    assert_eq!(guest.bytes(page + 0x210, 1), [0xff], "type_of_loader");
    assert_eq!(
        guest.bytes(page + 0x1ef, 1),
        [0],
        "sentinel: not zero means a loader that copied too much"
    );
    assert_eq!(u32_at(&guest, page + 0x218), INITRAMFS.start.0 as u32);
    assert_eq!(u32_at(&guest, page + 0x21c), INITRAMFS.size as u32);
    let cmdline = u64::from(u32_at(&guest, page + 0x228));
    assert_eq!(guest.bytes(cmdline, 14), b"console=ttyS0\0");
    assert_eq!(guest.bytes(page + 0x1e8, 1), [3], "e820_entries");
    for (entry, expected) in MAP.iter().enumerate() {
        let at = page + 0x2d0 + 20 * entry as u64;
        let read = (u64_at(&guest, at), u64_at(&guest, at + 8), u32_at(&guest, at + 16));
        assert_eq!(read, *expected);
    }
}

#[test]
fn command_line_limits() {
    let guest = Guest::new(64 * MIB);
    let code = code(4096);
    let mut header = setup_header(code.len());
    header.cmdline_size = 20.into();
    let bz = guest.load(&bzimage(&header, &code)).unwrap();
    let elf = guest.load(&Elf::pvh().build()).unwrap();
    for (kernel, max) in [(bz, 20), (elf, 2047)] {
        assert!(write(&guest, &kernel, &"x".repeat(max)).is_ok());
        assert!(matches!(
            write(&guest, &kernel, &"x".repeat(max + 1)),
            Err(BootDataError::Cmdline(CmdlineError::TooLong { len, max: told })) if len == max + 1 && told == max
        ));
    }
}

#[test]
fn a_map_longer_than_the_protocol_is_an_error() {
    let mut guest = Guest::new(64 * MIB);
    let kernel = guest.load(&Elf::pvh().build()).unwrap();
    let holes = |count: u64| {
        (0..count)
            .map(|n| MemMapEntry {
                range: MemRange {
                    start: 32 * MIB + n * 0x2000,
                    size: 0x1000,
                },
                kind: MemKind::Reserved,
            })
            .collect()
    };
    let ram = MemRange {
        start: 0,
        size: 64 * MIB,
    };
    // The last hole is followed by RAM, the first by the RAM before it: two entries a hole, and no more.
    guest.memory = MemoryLayout::new(vec![ram], holes(63)).unwrap();
    assert_eq!(guest.memory.map().len(), 127);
    assert!(write(&guest, &kernel, "").is_ok());
    guest.memory = MemoryLayout::new(vec![ram], holes(64)).unwrap();
    assert!(matches!(
        write(&guest, &kernel, ""),
        Err(BootDataError::TooManyRanges { len: 129, max: 128 })
    ));
}
