//! The XSAVE area, which is as large as the host's CPU makes it.

use kvm_bindings::{Xsave, kvm_xsave};
use triarch_hypervisor::{HypervisorError, Vcpu};

use crate::{HexBytes, StateError};

/// Size of the area in kernels before 5.17, and its least size in others.
const LEGACY: usize = size_of::<kvm_xsave>();
/// The part every CPU has: x87 and SSE, and the header of XSAVE (SDM volume 1, 13.4).
const LEAST: usize = 512 + 64;
const WORD: usize = size_of::<u32>();

/// What KVM says of an area: its size, or 0 where it has always [`LEGACY`].
fn larger(size: usize) -> Option<usize> {
    (size > LEGACY).then(|| (size - LEGACY).div_ceil(WORD))
}

fn room(words: usize) -> Result<Xsave, HypervisorError> {
    Xsave::new(words).map_err(|_| HypervisorError::Capability("an XSAVE area of the size it says"))
}

/// Reads the area; `size` is what KVM_CAP_XSAVE2 says.
pub(super) fn save(vcpu: &Vcpu, size: usize) -> Result<HexBytes, HypervisorError> {
    let failed = HypervisorError::kvm("read the XSAVE area");
    let mut words = match larger(size) {
        None => vcpu.fd().get_xsave().map_err(failed)?.region.to_vec(),
        Some(extra) => {
            let mut area = room(extra)?;
            // SAFETY: the area has the size that KVM said, and this process never enables more of the CPU for its guests.
            unsafe { vcpu.fd().get_xsave2(&mut area) }.map_err(failed)?;
            let first = area.as_fam_struct_ref().xsave.region;
            first.iter().chain(area.as_slice()).copied().collect()
        }
    };
    let used = words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
    words.truncate(used.max(LEAST / WORD));
    Ok(HexBytes(words.into_iter().flat_map(u32::to_le_bytes).collect()))
}

/// Sets the area, which has `size` bytes here.
pub(super) fn restore(vcpu: &Vcpu, size: usize, saved: &HexBytes) -> Result<(), StateError> {
    let bytes = saved.0.as_slice();
    let available = size.max(LEGACY);
    if bytes.len() < LEAST || !bytes.len().is_multiple_of(WORD) {
        let problem = format!("its XSAVE area has {} bytes, it takes {LEAST} at least", bytes.len());
        return Err(StateError::damaged("a vCPU", problem));
    }
    if bytes.len() > available {
        return Err(StateError::Lacks {
            what: format!(
                "an XSAVE area of {} bytes, which is more than the {available} here",
                bytes.len()
            ),
        });
    }
    let words: Vec<u32> = bytes.as_chunks().0.iter().copied().map(u32::from_le_bytes).collect();
    let (first, rest) = words.split_at(words.len().min(LEGACY / WORD));
    let mut area = room(larger(size).unwrap_or(0))?;
    for (to, from) in area.as_mut_slice().iter_mut().zip(rest) {
        *to = *from;
    }
    // SAFETY: the length of the array that follows the fixed part stays as it is.
    let fixed = unsafe { area.as_mut_fam_struct() };
    for (to, from) in fixed.xsave.region.iter_mut().zip(first) {
        *to = *from;
    }
    // SAFETY: the area has the size that KVM said, and this process never enables more of the CPU for its guests.
    unsafe { vcpu.fd().set_xsave2(&area) }.map_err(|error| StateError::Register {
        name: "an XSAVE area".to_owned(),
        saved: "parts of the CPU".to_owned(),
        here: format!("refuses it ({error})"),
    })
}
