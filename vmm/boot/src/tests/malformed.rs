//! Files made to break a loader: whatever the headers say, loading ends with a kernel inside of memory or an error.

use proptest::prelude::*;

use super::images::{Elf, bzimage, code, setup_header};
use super::{Guest, MIB};
use crate::layout::MemRange;

/// Loads `image` and checks what must hold of every kernel that was accepted.
fn load(image: &[u8]) -> Result<(), TestCaseError> {
    let guest = Guest::new(32 * MIB);
    let Ok(kernel) = guest.load(image) else {
        return Ok(());
    };
    let ram = MemRange::from_bounds(MIB, 32 * MIB);
    for range in &kernel.occupied {
        prop_assert!(ram.contains(range), "{range:?}");
    }
    prop_assert!(
        kernel
            .occupied
            .iter()
            .any(|r| r.start <= kernel.entry.0 && kernel.entry.0 < r.end())
    );
    Ok(())
}

/// Values that headers get wrong in interesting ways.
fn nasty() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(u64::MAX),
        Just(u64::MAX - 4095),
        Just(1 << 63),
        Just(u64::from(u32::MAX)),
        Just(32 * MIB),
        any::<u64>(),
    ]
}

proptest! {
    #[test]
    fn overwritten_elf_headers(
        class in 1u8..=2,
        changes in proptest::collection::vec((4usize..260, 1usize..=8, nasty()), 1..5),
    ) {
        let mut image = Elf { class, ..Elf::pvh() }.build();
        for (at, size, value) in changes {
            let end = (at + size).min(image.len());
            let at = at.min(end);
            image[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
        }
        load(&image)?;
    }

    #[test]
    fn overwritten_setup_headers(
        changes in proptest::collection::vec((0x1f1usize..0x290, 1usize..=8, nasty()), 1..5),
    ) {
        let code = code(2000);
        let mut image = bzimage(&setup_header(code.len()), &code);
        for (at, size, value) in changes {
            image[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        }
        load(&image)?;
    }

    #[test]
    fn arbitrary_notes(notes in proptest::collection::vec(any::<u8>(), 0..200), align in nasty()) {
        load(&Elf { notes, note_align: align, ..Elf::pvh() }.build())?;
    }

    #[test]
    fn arbitrary_bytes_behind_a_magic(
        elf in any::<bool>(),
        bytes in proptest::collection::vec(any::<u8>(), 0x300),
    ) {
        let mut image = bytes;
        if elf {
            image[..6].copy_from_slice(b"\x7fELF\x02\x01");
            image[18..20].copy_from_slice(&[62, 0]);
        } else {
            image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
            image[0x202..0x206].copy_from_slice(b"HdrS");
        }
        load(&image)?;
    }
}
