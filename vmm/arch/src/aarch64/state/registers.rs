//! Registers of a vCPU, by KVM's numbers.

use kvm_bindings::RegList;
use triarch_cpu_model::features::{self, Register};
use triarch_hypervisor::{HypervisorError, Vcpu};

use super::{RegisterV1, time};
use crate::aarch64::processor::{MAX_REGISTERS, VECTOR_LENGTHS};
use crate::{HexBytes, StateError};

/// Bytes of the largest register, a vector's.
const MAX_SIZE: usize = 256;

/// Bytes of a register.
fn size(id: u64) -> Option<usize> {
    let size = 1_usize << (id >> 52 & 0xf);
    (size <= MAX_SIZE).then_some(size)
}

/// Numbers of all that a vCPU has.
pub(super) fn list(vcpu: &Vcpu) -> Result<Vec<u64>, HypervisorError> {
    let mut list = RegList::new(MAX_REGISTERS).map_err(|_| HypervisorError::Capability("room for all registers"))?;
    vcpu.fd()
        .get_reg_list(&mut list)
        .map_err(HypervisorError::kvm("list registers"))?;
    Ok(list.as_slice().to_vec())
}

fn get(vcpu: &Vcpu, id: u64) -> Result<Vec<u8>, kvm_ioctls::Error> {
    let mut value = vec![0; size(id).ok_or_else(|| kvm_ioctls::Error::new(libc::EINVAL))?];
    vcpu.fd().get_one_reg(id, &mut value)?;
    Ok(value)
}

/// Reads the registers `ids`, but the counters.
pub(super) fn save(vcpu: &Vcpu, ids: &[u64]) -> Result<Vec<RegisterV1>, HypervisorError> {
    let kept = ids.iter().filter(|id| ![time::VIRTUAL, time::PHYSICAL].contains(id));
    let read = |id: &u64| {
        let value = get(vcpu, *id).map_err(HypervisorError::kvm("read registers"))?;
        let value = HexBytes(value);
        Ok(RegisterV1 { id: *id, value })
    };
    kept.map(read).collect()
}

/// The lengths of vectors that a vCPU had, if it had some.
pub(super) fn vector_lengths(saved: &[RegisterV1]) -> Option<&[u8]> {
    let lengths = saved.iter().find(|register| register.id == VECTOR_LENGTHS)?;
    Some(&lengths.value.0)
}

/// Sets the registers. What is as it was saved stays: most of what tells what the CPU can do cannot be set. A register that is not
/// here and was 0 is missed by nobody.
pub(super) fn restore(vcpu: &Vcpu, saved: &[RegisterV1]) -> Result<(), StateError> {
    for RegisterV1 { id, value } in saved {
        let value = value.0.as_slice();
        if size(*id) != Some(value.len()) {
            let problem = format!("its register {id:#x} has {} bytes", value.len());
            return Err(StateError::damaged("a vCPU", problem));
        }
        // The counters are set when all else is.
        if [time::VIRTUAL, time::PHYSICAL].contains(id) {
            return Err(StateError::damaged("a vCPU", "a counter is among its registers"));
        }
        let here = match get(vcpu, *id) {
            Ok(here) if here == value => continue,
            Ok(here) => Some(here),
            Err(_) if value.iter().all(|byte| *byte == 0) => continue,
            Err(_) => None,
        };
        if here.is_none() || vcpu.fd().set_one_reg(*id, value).is_err() {
            return Err(refusal(*id, value, here.as_deref()));
        }
    }
    Ok(())
}

fn refusal(id: u64, saved: &[u8], here: Option<&[u8]>) -> StateError {
    let number = |bytes: &[u8]| {
        let word = bytes.first_chunk().copied().or_else(|| {
            let half: [u8; 4] = bytes.first_chunk().copied()?;
            Some(u64::from(u32::from_le_bytes(half)).to_le_bytes())
        });
        u64::from_le_bytes(word.unwrap_or_default())
    };
    let shown = |bytes: &[u8]| match bytes.len() {
        ..=8 => format!("{:#x}", number(bytes)),
        _ => format!("{:?}", HexBytes(bytes.to_vec())),
    };
    StateError::Register {
        name: name(id, number(saved) ^ here.map_or(0, number)),
        saved: shown(saved),
        here: match here {
            Some(here) => format!("has {} and does not let it be set", shown(here)),
            None => "does not know it".to_owned(),
        },
    }
}

/// The name of a register, and of the fields that the bits `differs` are in.
fn name(id: u64, differs: u64) -> String {
    let register = Register::Kvm(id as u32);
    let fields: Vec<_> = features::arm64().fields(register, None).collect();
    let Some((name, _)) = fields.first().and_then(|field| field.name.split_once('.')) else {
        return format!("{register} ({id:#x})");
    };
    let differ = fields.iter().filter(|field| field.mask() & differs != 0);
    let differ: Vec<_> = differ.map(|field| field.name_in(register)).collect();
    match differ.as_slice() {
        [] => name.to_owned(),
        differ => format!("{name} ({})", differ.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named() {
        // ID_AA64PFR1_EL1, whose SSBS is in bits 4 to 7.
        let id = 0x6030_0000_0013_0000 | 3 << 14 | 4 << 3 | 1;
        assert_eq!(name(id, 0x20), "ID_AA64PFR1_EL1 (ID_AA64PFR1_EL1.SSBS)");
        let error = refusal(id, &0x20_u64.to_le_bytes(), Some(&0x10_u64.to_le_bytes())).to_string();
        assert!(
            error.contains("= 0x20") && error.contains("has 0x10") && error.contains("SSBS"),
            "{error}"
        );
        let error = refusal(0x6030_0000_0010_0040, &[0; 8], None).to_string();
        assert!(error.contains("does not know it"), "{error}");
    }

    #[test]
    fn sizes_that_no_register_has_are_none() {
        assert_eq!(size(0x6030_0000_0010_0000), Some(8));
        assert_eq!(size(0x6080_0000_0015_0000), Some(256));
        assert_eq!(size(u64::MAX), None);
    }
}
