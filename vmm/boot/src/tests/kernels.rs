//! Good kernels load, bad ones are refused with the reason.

use vm_memory::{Bytes, GuestAddress};

use super::images::{BODY, BSS, ENTRY, Elf, SEGMENT_AT, bzimage, code, note, setup_header};
use super::{Guest, MIB, chain};
use crate::kernel::{BootProtocol, KernelProblem};
use crate::layout::{MemKind, MemMapEntry, MemRange, MemoryLayout};

#[test]
fn pvh_elf_of_both_classes() {
    for (class, machine) in [(2, 62), (1, 3)] {
        let guest = Guest::new(64 * MIB);
        let elf = Elf {
            class,
            machine,
            ..Elf::pvh()
        };
        let kernel = guest.load(&elf.build()).unwrap();
        assert_eq!(kernel.entry.0, u64::from(ENTRY));
        assert!(matches!(kernel.protocol, BootProtocol::Pvh));
        assert_eq!(kernel.end.0, SEGMENT_AT + BODY.len() as u64 + BSS);
        assert_eq!(guest.bytes(SEGMENT_AT, BODY.len()), BODY);
    }
}

#[test]
fn notes_padded_to_eight() {
    let mut notes = note(b"GNU\0", 5, &[1; 4]);
    notes.resize(notes.len().next_multiple_of(8), 0);
    notes.extend(note(b"Xen\0", 18, &ENTRY.to_le_bytes()));
    let elf = Elf {
        notes,
        note_align: 8,
        ..Elf::pvh()
    };
    let kernel = Guest::new(64 * MIB).load(&elf.build()).unwrap();
    assert_eq!(kernel.entry.0, u64::from(ENTRY));
}

#[test]
fn clears_what_the_file_leaves_out() {
    let mut guest = Guest::new(64 * MIB);
    let end = SEGMENT_AT + BODY.len() as u64 + BSS;
    let dirt = vec![0xaa; 0x8000];
    guest.mem.write_slice(&dirt, GuestAddress(SEGMENT_AT)).unwrap();
    guest.load(&Elf::pvh().build()).unwrap();
    assert_eq!(guest.bytes(end - 1, 2), [0xaa, 0xaa], "fresh memory is not written");
    guest.is_zero = false;
    guest.load(&Elf::pvh().build()).unwrap();
    let bss = guest.bytes(SEGMENT_AT + BODY.len() as u64, BSS as usize);
    assert!(bss.iter().all(|&byte| byte == 0));
    assert_eq!(guest.bytes(end, 1), [0xaa], "nothing behind it is written");
}

#[test]
fn bzimage_at_its_64_bit_entry() {
    let guest = Guest::new(64 * MIB);
    let code = code(70_000);
    let mut image = bzimage(&setup_header(code.len()), &code);
    // A signature behind the code, as in distribution kernels, is not part of it.
    image.extend_from_slice(&[0xee; 1000]);
    let kernel = guest.load(&image).unwrap();
    assert_eq!(kernel.entry.0, MIB + 0x200);
    assert_eq!(guest.bytes(MIB, code.len()), code);
    let loaded = code.len().next_multiple_of(16) as u64;
    assert_eq!(guest.bytes(MIB + loaded, 16), [0; 16]);
    // init_size counts from the preferred address.
    assert_eq!(kernel.occupied, [MemRange::from_bounds(MIB, 16 * MIB + 8 * MIB)]);
    let BootProtocol::Linux64 { setup_header } = kernel.protocol else {
        panic!("wrong protocol");
    };
    assert_eq!(setup_header.initrd_addr_max.get(), 0x7fff_ffff);
}

#[test]
fn zero_setup_sectors_mean_four() {
    let guest = Guest::new(64 * MIB);
    let code = code(4096);
    let mut header = setup_header(code.len());
    header.setup_sects = 0;
    guest.load(&bzimage(&header, &code)).unwrap();
    assert_eq!(guest.bytes(MIB, code.len()), code);
}

#[test]
fn header_bytes_behind_its_stated_end_are_not_taken() {
    let code = code(4096);
    let mut header = setup_header(code.len());
    // The header states its end in the displacement of its jump.
    header.jump[1] = 0x62; // 0x264 - 0x202
    header.handover_offset = 0x1234_5678.into();
    header.later = [0xff; 36];
    let kernel = Guest::new(64 * MIB).load(&bzimage(&header, &code)).unwrap();
    let BootProtocol::Linux64 { setup_header } = kernel.protocol else {
        panic!("wrong protocol");
    };
    assert_eq!(setup_header.init_size.get(), 0x80_0000);
    assert_eq!(setup_header.handover_offset.get(), 0);
    assert_eq!(setup_header.later, [0; 36]);
}

fn refused(guest: &Guest, image: &[u8]) -> String {
    chain(&guest.load(image).expect_err("must be refused"))
}

#[test]
fn wrong_files_are_named() {
    let guest = Guest::new(64 * MIB);
    assert_eq!(
        refused(&guest, b""),
        "cannot boot kernel 'k': the file is empty; give an x86-64 bzImage (vmlinuz) or a vmlinux ELF"
    );
    let mut arm = vec![0; 4096];
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    assert_eq!(
        refused(&guest, &arm),
        "cannot boot kernel 'k': it is an arm64 Linux Image, but this guest is x86-64; give a kernel built for x86-64"
    );
    let arm_elf = Elf {
        machine: 183,
        ..Elf::pvh()
    };
    assert!(refused(&guest, &arm_elf.build()).contains("it is an ELF file for arm64, but"));
    assert!(refused(&guest, b"\x1f\x8b\x08 and so on").contains("a gzip-compressed file"));
    let no_note = Elf {
        notes: note(b"GNU\0", 3, &[7; 20]),
        ..Elf::pvh()
    };
    assert!(refused(&guest, &no_note.build()).contains("CONFIG_PVH=y"));
}

#[test]
fn old_and_32_bit_bzimages() {
    let guest = Guest::new(64 * MIB);
    let code = code(4096);
    let with = |change: fn(&mut crate::SetupHeader)| {
        let mut header = setup_header(code.len());
        change(&mut header);
        refused(&guest, &bzimage(&header, &code))
    };
    assert!(with(|h| h.version = 0x0206.into()).contains("boot protocol 2.06 is too old"));
    assert!(with(|h| h.xloadflags = 0.into()).contains("32-bit kernel"));
    assert!(with(|h| h.kernel_alignment = 3.into()).contains("no power of two"));
    assert!(with(|h| h.pref_address = u64::MAX.into()).contains("prefers the address"));
    assert!(with(|h| h.syssize = 1.into()).contains("16 bytes of code"));
}

#[test]
fn truncated_at_every_length() {
    let code = code(3000);
    let bz = bzimage(&setup_header(code.len()), &code);
    let elf = Elf::pvh().build();
    let guest = Guest::new(64 * MIB);
    for (image, identified_from) in [(bz, 0x206), (elf, 20)] {
        for len in 0..image.len() {
            let error = guest.load(&image[..len]).expect_err("shorter is refused");
            if len >= identified_from {
                assert!(
                    matches!(error.source, KernelProblem::Truncated { found, .. } if found == len as u64),
                    "{len}: {}",
                    chain(&error)
                );
            }
        }
        assert!(guest.load(&image).is_ok());
    }
}

#[test]
fn memory_too_small_says_how_much() {
    let code = code(4096);
    let image = bzimage(&setup_header(code.len()), &code);
    let small = Guest::new(20 * MIB);
    assert!(refused(&small, &image).contains("give the guest at least 24 MiB"));
    assert!(Guest::new(24 * MIB).load(&image).is_ok());

    let elf = Elf {
        mem_size: 64 * MIB,
        ..Elf::pvh()
    };
    assert!(refused(&small, &elf.build()).contains("give the guest at least 66 MiB"));
}

#[test]
fn segments_stay_above_the_boot_data() {
    let guest = Guest::new(64 * MIB);
    for paddr in [0, 0x7000, 0x9_F000, MIB - 1] {
        let elf = Elf { paddr, ..Elf::pvh() };
        let text = refused(&guest, &elf.build());
        assert!(text.contains("link the kernel at 0x100000"), "{text}");
    }
}

#[test]
fn reserved_memory_is_not_loaded_over() {
    let mut guest = Guest::new(64 * MIB);
    let firmware = MemMapEntry {
        range: MemRange::from_bounds(SEGMENT_AT + 0x1000, SEGMENT_AT + 0x2000),
        kind: MemKind::Reserved,
    };
    guest.memory = MemoryLayout::new(guest.memory.ram().to_vec(), vec![firmware]).unwrap();
    assert!(refused(&guest, &Elf::pvh().build()).contains("is not free RAM"));
}

#[test]
fn contradictions_in_elf_headers() {
    let guest = Guest::new(64 * MIB);
    let with = |change: fn(&mut Elf)| {
        let mut elf = Elf::pvh();
        change(&mut elf);
        refused(&guest, &elf.build())
    };
    assert!(with(|e| e.mem_size = 1).contains("in memory"));
    assert!(with(|e| e.mem_size = u64::MAX).contains("the file is damaged"));
    assert!(with(|e| e.phentsize = Some(1)).contains("a size that ELF does not know"));
    assert!(with(|e| e.phnum = 0).contains("0 program headers"));
    assert!(with(|e| e.phnum = u16::MAX).contains("65535 program headers"));
    assert!(with(|e| e.notes = note(b"Xen\0", 18, &9u32.to_le_bytes())).contains("none of its segments"));
    assert!(with(|e| e.class = 9).contains("class is 9"));
}
