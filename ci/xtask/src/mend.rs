//! Takes a fault out of the QEMU that emulates AMD and Hygon hosts: it gave guests of such a host an interrupt twice.
//!
//! VMRUN with an interrupt to be injected, `helper_vmrun` in QEMU's `target/i386/tcg/system/svm_helper.c`, notes the vector as an exception
//! that is still to come (`cs->exception_index`), and then delivers it at once. The note stays until something else happens to that processor.
//! If meanwhile another thread of QEMU wants its processor loop to be left without an interrupt of its own, as freeing old memory maps does
//! 10 ms after each change to them, the loop takes the note for an exception and delivers the vector once more, whatever the interrupt flag
//! says. A guest whose kernel then was in this vector's handler and held its lock hangs.
//!
//! Only injected exceptions need the note, for the loop delivers those, and forgets it. [`STORE`] writes that of an interrupt; six bytes of it
//! become a NOP.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cache::{self, Recipe};

/// Changes whenever this file makes another program of the same one.
const SCRIPT: &str = "1";
/// Where the INTR case of `helper_vmrun` writes `exception_index`, and what it writes after that: `exception_is_int` = 0, `exception_next_eip`
/// = -1. Debian's 11.1 has it once.
const STORE: [u8; 27] = [
    0x89, 0xb3, 0x50, 0xc2, 0xff, 0xff, // mov %esi,-0x3db0(%rbx)
    0xc7, 0x83, 0x84, 0x34, 0, 0, 0, 0, 0, 0, // movl $0,0x3484(%rbx)
    0x48, 0xc7, 0x83, 0x88, 0x34, 0, 0, 0xff, 0xff, 0xff, 0xff, // movq $-1,0x3488(%rbx)
];
/// A NOP as long as the store.
const NOP: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0, 0];

/// The emulator without the fault, made from `program`, whose version the file `packages` names; one that is not known stays as it is.
///
/// # Errors
/// It cannot be read or written.
pub fn emulator(program: &Path, packages: &Path) -> Result<PathBuf> {
    let recipe = Recipe::new("qemu-mended")
        .with("script", SCRIPT)
        .with_file("packages", packages)?;
    let name = program.file_name().unwrap_or_default();
    let dir = cache::ensure(&recipe, |dir| {
        let mut bytes = fs::read(program)?;
        if !mend(&mut bytes) {
            eprintln!(
                "  this QEMU is not known: its AMD hosts may give guests an interrupt twice (docs/test-hosts.md); {}",
                program.display()
            );
        }
        fs::write(dir.join(name), bytes)?;
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o755))?;
        Ok(())
    })?;
    Ok(dir.join(name))
}

/// Takes the store out, if it is there exactly once.
fn mend(program: &mut [u8]) -> bool {
    let mut places = program
        .windows(STORE.len())
        .enumerate()
        .filter(|(_, bytes)| *bytes == STORE)
        .map(|(place, _)| place);
    let (Some(place), None) = (places.next(), places.next()) else {
        return false;
    };
    program[place..place + NOP.len()].copy_from_slice(&NOP);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_store_changes() {
        let mut program = [&[1, 2, 3][..], &STORE, &[4]].concat();
        assert!(mend(&mut program));
        assert_eq!(program, [&[1, 2, 3][..], &NOP, &STORE[NOP.len()..], &[4]].concat());
        // It is gone.
        assert!(!mend(&mut program));
    }

    #[test]
    fn another_program_stays_as_it_is() {
        for program in [vec![], vec![0x89; 100], [STORE, STORE].concat()] {
            let mut same = program.clone();
            assert!(!mend(&mut same));
            assert_eq!(same, program);
        }
    }
}
