//! Where an initramfs lands.

use std::path::Path;

use super::images::{Elf, bzimage, code, setup_header};
use super::{Guest, MIB, chain, file};
use crate::{InitramfsProblem, LoadedInitramfs, LoadedKernel, load_initramfs};

fn place(guest: &Guest, kernel: &LoadedKernel, bytes: &[u8]) -> Result<LoadedInitramfs, crate::InitramfsError> {
    load_initramfs(&guest.target(), kernel, &mut file(bytes), Path::new("i"))
}

#[test]
fn highest_page_of_memory() {
    let guest = Guest::new(64 * MIB);
    let kernel = guest.load(&Elf::pvh().build()).unwrap();
    let archive = code(5000);
    let placed = place(&guest, &kernel, &archive).unwrap();
    assert_eq!((placed.start.0, placed.size), (64 * MIB - 8192, 5000));
    assert_eq!(guest.bytes(placed.start.0, 5000), archive);
}

#[test]
fn below_the_kernels_limit_and_the_hole() {
    let mut guest = Guest::new(64 * MIB);
    let code = code(4096);
    let mut header = setup_header(code.len());
    header.initrd_addr_max = 0x2ff_ffff.into();
    let kernel = guest.load(&bzimage(&header, &code)).unwrap();
    let placed = place(&guest, &kernel, &[1; 4096]).unwrap();
    assert_eq!(placed.start.0, 0x2ff_f000);
    guest.layout.device_hole_start = 0x200_0000;
    let placed = place(&guest, &kernel, &[1; 4096]).unwrap();
    assert_eq!(placed.start.0, 0x1ff_f000);
}

#[test]
fn clear_of_the_kernel() {
    let guest = Guest::new(24 * MIB);
    let code = code(4096);
    // Occupies 1 to 24 MiB: nothing is left above, and below 1 MiB is boot data.
    let kernel = guest.load(&bzimage(&setup_header(code.len()), &code)).unwrap();
    let error = place(&guest, &kernel, &[1; 100]).unwrap_err();
    assert!(matches!(
        error.source,
        InitramfsProblem::TooLarge { size: 100, room: 0, .. }
    ));
}

#[test]
fn too_large_names_both_sizes() {
    let guest = Guest::new(25 * MIB);
    let code = code(4096);
    let kernel = guest.load(&bzimage(&setup_header(code.len()), &code)).unwrap();
    assert!(place(&guest, &kernel, &vec![1; MIB as usize]).is_ok());
    let error = place(&guest, &kernel, &vec![1; MIB as usize + 1]).unwrap_err();
    let text = chain(&error);
    assert!(
        text.starts_with("cannot use initramfs 'i': it has 1048577 bytes, but only 1048576 bytes"),
        "{text}"
    );
}

#[test]
fn empty_is_refused() {
    let guest = Guest::new(64 * MIB);
    let kernel = guest.load(&Elf::pvh().build()).unwrap();
    let error = place(&guest, &kernel, b"").unwrap_err();
    assert!(chain(&error).contains("the file is empty"));
}
