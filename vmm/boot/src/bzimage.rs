//! bzImage kernels, entered at their 64-bit entry point.

use vm_memory::{GuestAddress, GuestMemory};
use zerocopy::{FromZeros, IntoBytes};

use crate::kernel::{BootProtocol, Image, KernelProblem, LoadedKernel};
use crate::layout::{BootTarget, MemRange};
use crate::zero_page::{SETUP_HEADER_AT, SetupHeader};

/// The protocol that introduced `xloadflags` and with it the announced 64-bit entry.
const MIN_VERSION: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
const SECTOR: u64 = 512;
/// The 64-bit entry point's distance from the load address (boot.rst, "64-bit Boot Protocol").
const ENTRY_64: u64 = 0x200;
/// Where `setup_sects` 0 stands for 4, as boot.rst has it.
const DEFAULT_SETUP_SECTS: u64 = 4;

pub(crate) fn load<M: GuestMemory + ?Sized>(
    target: &BootTarget<'_, M>,
    image: &mut Image<'_>,
    head: &[u8],
) -> Result<LoadedKernel, KernelProblem> {
    let header = setup_header(head).ok_or(KernelProblem::Truncated {
        needed: SETUP_HEADER_AT as u64 + size_of::<SetupHeader>() as u64,
        found: image.len(),
    })?;
    check_version(&header)?;

    let setup_size = match u64::from(header.setup_sects) {
        0 => DEFAULT_SETUP_SECTS + 1,
        sectors => sectors + 1,
    } * SECTOR;
    let code_size = u64::from(header.syssize.get()) * 16;
    image.check(setup_size, code_size)?;
    if code_size <= ENTRY_64 {
        return Err(KernelProblem::Malformed(format!(
            "it has only {code_size} bytes of code"
        )));
    }

    let load = MemRange {
        start: target.layout.kernel_start,
        size: code_size,
    };
    let run = run_range(&header, load.start)?;
    // The decompressor works between the load address and the end of the place it unpacks to.
    let occupied = MemRange::from_bounds(load.start, load.end().max(run.end()));
    target.check_kernel_range(&occupied)?;
    image.copy_to(target.mem, setup_size, load.start, code_size)?;

    Ok(LoadedKernel {
        entry: GuestAddress(load.start + ENTRY_64),
        protocol: BootProtocol::Linux64 {
            setup_header: Box::new(header),
        },
        occupied: vec![occupied],
        end: GuestAddress(occupied.end()),
    })
}

/// The header as the file has it, cleared behind the end that it states in the byte at 0x201.
fn setup_header(head: &[u8]) -> Option<SetupHeader> {
    let stated_end = 0x202 + usize::from(*head.get(0x201)?);
    let mut header = SetupHeader::new_zeroed();
    let end = stated_end.min(SETUP_HEADER_AT + size_of::<SetupHeader>());
    let bytes = head.get(SETUP_HEADER_AT..end)?;
    header.as_mut_bytes()[..bytes.len()].copy_from_slice(bytes);
    Some(header)
}

fn check_version(header: &SetupHeader) -> Result<(), KernelProblem> {
    let version = header.version.get();
    if version < MIN_VERSION {
        let [major, minor] = version.to_be_bytes();
        return Err(KernelProblem::TooOld { major, minor });
    }
    if header.loadflags & LOADED_HIGH == 0 || header.xloadflags.get() & XLF_KERNEL_64 == 0 {
        return Err(KernelProblem::No64BitEntry);
    }
    Ok(())
}

/// Where the kernel unpacks to and runs, with the memory it needs there before it reads its memory map
/// (boot.rst, `init_size`).
fn run_range(header: &SetupHeader, load: u64) -> Result<MemRange, KernelProblem> {
    let preferred = header.pref_address.get();
    let align = u64::from(header.kernel_alignment.get());
    let start = if header.relocatable_kernel == 0 {
        preferred
    } else if align.is_power_of_two() {
        load.next_multiple_of(align).max(preferred)
    } else {
        return Err(KernelProblem::Malformed(format!(
            "its alignment {align:#x} is no power of two"
        )));
    };
    let size = u64::from(header.init_size.get());
    if start.checked_add(size).is_none() {
        return Err(KernelProblem::Malformed(format!(
            "it prefers the address {preferred:#x}"
        )));
    }
    Ok(MemRange { start, size })
}
