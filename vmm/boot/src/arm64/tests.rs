use std::fs::File;
use std::io::{Seek, Write};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::layout::{MemRange, MemoryLayout};

const MIB: u64 = 1 << 20;
const RAM: u64 = 0x4000_0000;
const LOWEST: u64 = RAM + 4 * MIB;

fn guest(mib: u64) -> (GuestMemoryMmap, MemoryLayout) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(RAM), (mib * MIB) as usize)]).unwrap();
    let range = MemRange {
        start: RAM,
        size: mib * MIB,
    };
    (memory, MemoryLayout::new(vec![range], vec![]).unwrap())
}

/// A kernel of `len` bytes that asks for `size` bytes of memory.
fn image(len: usize, size: u64) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|n| ((n * 31) >> 3) as u8).collect();
    bytes[..64].fill(0);
    bytes[16..24].copy_from_slice(&size.to_le_bytes());
    bytes[24] = 0xa;
    bytes[56..60].copy_from_slice(b"ARM\x64");
    bytes
}

/// The same as an EFI application with two sections, and a signature of 100 bytes at the file's end.
fn efi_image(len: usize, size: u64) -> Vec<u8> {
    let mut bytes = image(len, size);
    bytes[..2].copy_from_slice(b"MZ");
    bytes[60..64].copy_from_slice(&64u32.to_le_bytes());
    bytes[64..68].copy_from_slice(b"PE\0\0");
    bytes[70..72].copy_from_slice(&2u16.to_le_bytes());
    bytes[84..86].copy_from_slice(&160u16.to_le_bytes());
    bytes[88..90].copy_from_slice(&0x20bu16.to_le_bytes());
    bytes[232..236].copy_from_slice(&((len - 100) as u32).to_le_bytes());
    bytes[236..240].copy_from_slice(&100u32.to_le_bytes());
    for (section, from, to) in [(0, 0, len / 2), (1, len / 2, len - 100)] {
        let at = 64 + 24 + 160 + 40 * section;
        bytes[at + 16..at + 20].copy_from_slice(&((to - from) as u32).to_le_bytes());
        bytes[at + 20..at + 24].copy_from_slice(&(from as u32).to_le_bytes());
    }
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packer = GzEncoder::new(Vec::new(), Compression::fast());
    packer.write_all(bytes).unwrap();
    packer.finish().unwrap()
}

fn zboot(method: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 0x100];
    bytes[..2].copy_from_slice(b"MZ");
    bytes[4..8].copy_from_slice(b"zimg");
    bytes[8..12].copy_from_slice(&0x100u32.to_le_bytes());
    bytes[12..16].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes[24..24 + method.len()].copy_from_slice(method);
    bytes.extend(payload);
    bytes
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// The kernel, or the whole chain of reasons against it.
fn boot(bytes: &[u8], mib: u64) -> Result<(Image, GuestMemoryMmap), String> {
    let (mem, layout) = guest(mib);
    match load_image(&mem, &layout, LOWEST, &mut file(bytes), Path::new("k")) {
        Ok(image) => Ok((image, mem)),
        Err(error) => Err(format!("{error}: {}", error.source)),
    }
}

#[test]
fn plain_gzip_and_zboot_are_the_same_kernel() {
    let plain = image(700_001, 3 * MIB);
    for packed in [plain.clone(), gzip(&plain), zboot(b"gzip", &gzip(&plain))] {
        let (image, mem) = boot(&packed, 64).unwrap();
        assert_eq!(image.entry, GuestAddress(LOWEST));
        assert_eq!(image.occupied.size, 3 * MIB);
        let mut there = vec![0; plain.len()];
        mem.read_slice(&mut there, image.entry).unwrap();
        assert!(there == plain);
    }
}

#[test]
fn old_kernels_have_a_text_offset() {
    let (image, _) = boot(&image(4096, 0), 64).unwrap();
    assert_eq!(image.entry, GuestAddress(LOWEST + 0x8_0000));
}

#[test]
fn a_kernel_that_is_cut_off_is_refused() {
    let whole = efi_image(700_000, 3 * MIB);
    assert_eq!(boot(&whole, 64).unwrap().0.occupied.size, 3 * MIB);
    for len in [699_999, 400_000, 5000] {
        let refusal = boot(&whole[..len], 64).unwrap_err();
        assert!(
            refusal.contains("promise 700000 bytes") && refusal.contains(&len.to_string()),
            "{refusal}"
        );
    }
}

#[test]
fn refusals_say_what_is_wrong() {
    let mut big_endian = image(4096, MIB);
    big_endian[24] |= 1;
    let mut bz = vec![0; 4096];
    bz[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bz[0x202..0x206].copy_from_slice(b"HdrS");
    let packed = gzip(&image(700_000, MIB));
    for (bytes, words) in [
        (vec![], "the file is empty; give an arm64 Image"),
        (bz, "it is an x86 bzImage, but this guest is arm64"),
        (
            b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0".to_vec(),
            "an ELF file for x86-64, but this guest is arm64",
        ),
        (
            zboot(b"zstd", &[1, 2, 3]),
            "compressed by zstd for UEFI; give the plain Image",
        ),
        (zboot(b"gzip", &packed)[..5000].to_vec(), "truncated"),
        (packed[..packed.len() / 2].to_vec(), "compressed data"),
        (gzip(b"hello"), "compressed data end too early"),
        (gzip(&[b'x'; 5000]), "it looks like a text file, not like a kernel"),
        (gzip(&image(700_000, 4096)), "more bytes than its header says"),
        (big_endian, "little-endian"),
        (image(4096, 64 * MIB), "give the guest at least 68 MiB"),
        (image(4096, u64::MAX - 5), "not free RAM"),
        (b"#!/bin/sh\n".to_vec(), "a script"),
        (
            b"\xfd7zXZ\0 and so on".to_vec(),
            "an xz-compressed file, not like a kernel; give an arm64 Image, plain or compressed by gzip",
        ),
        (b"\x28\xb5\x2f\xfd and so on".to_vec(), "a zstd-compressed file"),
        (b"BZh91AY&SY and so on".to_vec(), "a bzip2-compressed file"),
    ] {
        let refusal = boot(&bytes, 64).unwrap_err();
        assert!(refusal.contains(words), "{refusal} lacks {words}");
    }
}

#[test]
fn an_initramfs_lies_beside_the_kernel() {
    let (mem, layout) = guest(64);
    let kernel = load_image(&mem, &layout, LOWEST, &mut file(&image(4096, 8 * MIB)), Path::new("k")).unwrap();
    let archive = vec![7; 3000];
    let loaded = load_initramfs(&mem, &layout, &kernel, &mut file(&archive), Path::new("i")).unwrap();
    assert_eq!(loaded.start.0 % 4096, 0);
    assert!(loaded.start.0 >= kernel.occupied.end() && loaded.start.0 + loaded.size <= RAM + 64 * MIB);
    let sparse = tempfile::tempfile().unwrap();
    sparse.set_len(60 * MIB).unwrap();
    let error = load_initramfs(&mem, &layout, &kernel, &mut sparse.try_clone().unwrap(), Path::new("i")).unwrap_err();
    assert!(error.source.to_string().contains("give the guest more memory"));
}

fn machine(cpus: u64) -> DeviceTree {
    DeviceTree {
        ram: vec![(RAM, 64 * MIB)],
        cpus: (0..cpus).collect(),
        gic: Gic {
            distributor: (0x08ff_0000, 0x1_0000),
            redistributors: (0x0700_0000, 0x2_0000 * cpus),
            its: (0x0600_0000, 0x2_0000),
        },
        timer: Timer {
            secure: 29,
            physical: 30,
            virt: 27,
            hypervisor: 26,
        },
        pmu: Some(23),
        uart: Some((0x0900_0000, 0x1000, 33)),
        rtc: (0x0901_0000, 0x1000),
        keys: (0x0904_0000, 0x1000, 39, 3),
        pci: Pci {
            ecam: (0x3000_0000, MIB),
            last_bus: 0,
            mmio32: (0x1000_0000, 0x2000_0000),
            mmio64: (1 << 32, 1 << 32),
            wires: [48, 49, 50, 51],
            iommu: Some((0x08, vec![(0x10, 0x17)])),
        },
    }
}

fn chosen(cmdline: &str) -> Chosen<'_> {
    Chosen {
        cmdline,
        initramfs: None,
        room: 2 << 20,
    }
}

#[test]
fn trees_have_what_a_kernel_looks_for() {
    let full = device_tree(&chosen("quiet"), &machine(254)).unwrap();
    assert_eq!(full[..4], [0xd0, 0x0d, 0xfe, 0xed]);
    let has = |tree: &[u8], text: &str| tree.windows(text.len()).any(|w| w == text.as_bytes());
    for text in [
        "quiet",
        "cpu@fd",
        "arm,gic-v3-its",
        "pci-host-ecam-generic",
        "/pl011@9000000",
        "arm,pl031",
        "pl061@9040000",
        "gpio-keys",
        "iommu@1,0",
        "virtio,pci-iommu",
        "iommu-map",
    ] {
        assert!(has(&full, text), "{text}");
    }
    assert!(!has(&full, "linux,uefi"));
    let efi = EfiPointers {
        system_table: RAM,
        memory_map: RAM,
        memory_map_size: 48,
        descriptor_size: 48,
        descriptor_version: 1,
    };
    let stub = stub_device_tree(&chosen("quiet"), &efi).unwrap();
    assert!(has(&stub, "linux,uefi-system-table") && !has(&stub, "memory@"));
    let small = Chosen {
        room: 100,
        ..chosen("quiet")
    };
    assert!(matches!(stub_device_tree(&small, &efi), Err(FdtError::TooLarge { .. })));
    assert!(matches!(
        stub_device_tree(&chosen("a\0b"), &efi),
        Err(FdtError::Cmdline(_))
    ));
}

#[test]
fn pins_of_pci_devices_are_wired_in_turn() {
    let full = device_tree(&chosen("quiet"), &machine(1)).unwrap();
    // Device, two more cells of its address, pin; the GIC, its two cells; shared, number, level high.
    let has = |device: u32, pin: u32, number: u32| {
        let cells = [device << 11, 0, 0, pin, 1, 0, 0, 0, number, 4];
        let bytes: Vec<u8> = cells.iter().flat_map(|cell| cell.to_be_bytes()).collect();
        full.windows(bytes.len()).any(|part| part == bytes)
    };
    assert!(has(0, 1, 16) && has(0, 4, 19) && has(1, 1, 17) && has(3, 2, 16));
    assert!(!has(4, 1, 16) && !has(1, 1, 16));
}

proptest! {
    #[test]
    fn any_header_loads_or_is_refused(
        noise in proptest::collection::vec((0usize..340, any::<u8>()), 0..8),
        len in 400usize..5000,
        pack in any::<bool>(),
    ) {
        let mut bytes = efi_image(len, 8192);
        for (at, byte) in noise {
            bytes[at] = byte;
        }
        let bytes = if pack { gzip(&bytes) } else { bytes };
        if let Ok((image, _)) = boot(&bytes, 16) {
            prop_assert!(image.occupied.end() <= RAM + 16 * MIB);
        }
    }
}
