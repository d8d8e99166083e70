//! Tests of the loaders together, on images made here.

mod boot_data;
mod images;
mod initramfs;
mod kernels;
mod malformed;

use std::fs::File;
use std::io::Write;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use crate::layout::{BootLayout, BootTarget, MemKind, MemMapEntry, MemRange, MemoryLayout};
use crate::{KernelError, LoadedKernel, load_kernel};

type Memory = vm_memory::GuestMemoryMmap<()>;

const MIB: u64 = 1 << 20;

/// A guest of `size` bytes with the legacy area reserved, as a machine sets it up.
struct Guest {
    mem: Memory,
    memory: MemoryLayout,
    layout: BootLayout,
    is_zero: bool,
}

impl Guest {
    fn new(size: u64) -> Self {
        let reserved = MemMapEntry {
            range: MemRange::from_bounds(0x9_FC00, MIB),
            kind: MemKind::Reserved,
        };
        Self {
            mem: Memory::from_ranges(&[(GuestAddress(0), size as usize)]).unwrap(),
            memory: MemoryLayout::new(vec![MemRange { start: 0, size }], vec![reserved]).unwrap(),
            layout: BootLayout::X86_64,
            is_zero: true,
        }
    }

    fn target(&self) -> BootTarget<'_, Memory> {
        BootTarget {
            mem: &self.mem,
            memory: &self.memory,
            layout: &self.layout,
            memory_is_zero: self.is_zero,
        }
    }

    fn load(&self, image: &[u8]) -> Result<LoadedKernel, KernelError> {
        load_kernel(&self.target(), &mut file(image), Path::new("k"))
    }

    fn bytes(&self, at: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        self.mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// The error with its causes, as the VMM prints it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += ": ";
        text += &error.to_string();
        cause = error.source();
    }
    text
}
