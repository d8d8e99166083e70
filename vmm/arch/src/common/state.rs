//! What of a guest's processors is saved and set again, whatever the architecture.
//!
//! The formats are ours: fields with names, numbers as the architecture's manuals define them. Whatever is read is hostile until it was
//! checked; KVM checks the rest, and what it refuses is an error with the name of the register.
//!
//! # Order
//!
//! Saving, while no vCPU runs and no device raises interrupts any more:
//!
//! 1. `save_vcpu` of each vCPU, on its own thread.
//! 2. `Platform::save`. On ARM it lets KVM write what the interrupt controller holds into guest memory.
//! 3. Guest memory.
//!
//! Restoring, onto a fresh VM:
//!
//! 1. `saved_processor`, and [`check_processor`] with what this host offers. Nothing is made yet.
//! 2. `CpuPlan::restore`; then a VM whose memory is mapped and filled, with its `Platform`.
//! 3. `recreate_vcpus`, which makes them and sets their registers. Before their threads begin.
//! 4. `Platform::restore`. On ARM it reads guest memory. Interrupts of devices that come earlier are lost.
//! 5. `restore_time`, as late as possible: the guest's time goes on from here.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;
use triarch_cpu_model::{GuestProcessor, HostProcessor, Verdict, compare};
use triarch_hypervisor::{FirmwareStateV1, HypervisorError, StartV1};

use crate::CpuError;

/// Why processors could not be saved, or not be set as they were saved.
#[derive(Debug, Error)]
pub enum StateError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] HypervisorError),
    /// The vCPUs could not be made.
    #[error("cannot make vCPUs as they were saved")]
    Cpu(#[from] CpuError),
    /// The CPU here lacks something, or has something else.
    #[error("{0}; restore the guest on a host with the CPU features it was started with")]
    Processor(Box<Verdict>),
    /// The parts do not belong together.
    #[error("the saved state has {found} vCPUs, where {expected}; its parts are not of one guest")]
    Count {
        /// vCPUs that were saved.
        found: usize,
        /// What there has to be.
        expected: String,
    },
    /// Not what this program writes.
    #[error("the saved state of {what} is damaged: {problem}; take another copy of it")]
    Damaged {
        /// Of what.
        what: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A register that KVM does not let be what it was.
    #[error(
        "the guest has {name} = {saved}, and KVM here {here}; restore it on a host with the CPU and kernel it comes from, or newer ones"
    )]
    Register {
        /// Name of the register, with the names of the fields that differ where they are known.
        name: String,
        /// The saved value.
        saved: String,
        /// What is here instead.
        here: String,
    },
    /// Time cannot go on at its pace.
    #[error(
        "the guest's {clock} runs at {saved} {unit}, this host's at {here} {unit}, and {why}; restore it on a host with this frequency{or}"
    )]
    Frequency {
        /// The counter.
        clock: &'static str,
        /// Unit of both frequencies.
        unit: &'static str,
        /// The guest's.
        saved: u64,
        /// The host's.
        here: u64,
        /// Why the host's cannot be adapted.
        why: &'static str,
        /// What else would do.
        or: &'static str,
    },
    /// The host lacks a part of the machine.
    #[error("the guest has {what}, which this host's KVM lacks; restore it on a host that has it")]
    Lacks {
        /// What the guest has.
        what: String,
    },
    /// This program or kernel cannot tell all.
    #[error("KVM reports {what}, which this version of Triarch cannot save; use a newer one")]
    Unknown {
        /// What is unknown.
        what: String,
    },
}

impl StateError {
    pub(crate) fn damaged(what: &'static str, problem: impl fmt::Display) -> Self {
        Self::Damaged {
            what,
            problem: problem.to_string(),
        }
    }
}

/// Checks that a host which offers `host` can run the guest with `guest`: every register that tells features is compared. What stands in the
/// way is in [`StateError::Processor`], by name.
pub fn check_processor(guest: &GuestProcessor, host: &HostProcessor) -> Result<(), StateError> {
    let verdict = compare(guest, host);
    match verdict.is_accepted() {
        true => Ok(()),
        false => Err(StateError::Processor(Box::new(verdict))),
    }
}

pub(crate) fn no_vcpus() -> StateError {
    StateError::Count {
        found: 0,
        expected: "there is at least one in every guest".to_owned(),
    }
}

/// What becomes of the time between saving and restoring, for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elapsed {
    /// It did not pass: the guest's clocks go on from where they stood. Its wall clock is late until it is told the time.
    Stands,
    /// It passed, by this host's clock: the guest's counters are ahead by it, and timers that are due fire. A host whose clock is behind
    /// the saved time lets no time pass.
    Passes,
}

impl Elapsed {
    /// The time that passed for the guest since `saved_ns`, in nanoseconds since 1970 as [`now_ns`] tells.
    pub(crate) fn since(self, saved_ns: u64) -> Duration {
        match self {
            Self::Stands => Duration::ZERO,
            Self::Passes => Duration::from_nanos(now_ns().saturating_sub(saved_ns)),
        }
    }
}

/// Nanoseconds since 1970 by the host's clock; 0 before that, and never again after 2554.
pub(crate) fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Ticks of a counter with `hz` in `time`.
pub(crate) fn ticks(time: Duration, hz: u64) -> u64 {
    let ticks = time.as_nanos().saturating_mul(u128::from(hz)) / 1_000_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// Checks that `vcpus` saved vCPUs and what is known of who runs are of a guest with at most `max`, and that none of those runs or may
/// be started that were not saved.
pub(crate) fn check_firmware(vcpus: usize, firmware: &FirmwareStateV1, max: u32) -> Result<(), StateError> {
    let count = |found, expected| Err(StateError::Count { found, expected });
    match (vcpus, firmware.vcpus()) {
        (0, _) => return Err(no_vcpus()),
        (some, _) if some > max as usize => return count(some, format!("the guest can have {max} at most")),
        (_, told) if told != max as usize => return count(told, format!("the guest may have {max}")),
        _ => {}
    }
    let stray = match firmware {
        FirmwareStateV1::StartedByKvm(all) => all.iter().skip(vcpus).position(|start| *start != StartV1::Left),
        FirmwareStateV1::Psci(all) => all.iter().skip(vcpus).position(|vcpu| vcpu.enabled || vcpu.on),
    };
    match stray {
        None => Ok(()),
        Some(stray) => count(vcpus, format!("the guest has vCPU {}", vcpus + stray)),
    }
}

/// Bytes of memory of a vCPU, such as its vector registers: no CPU has as many.
const MAX_BYTES: usize = 1 << 18;

/// Bytes, written as a hexadecimal string.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct HexBytes(pub Vec<u8>);

impl fmt::Debug for HexBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Serialize for HexBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 15)]);
        let text: String = self
            .0
            .iter()
            .flat_map(|byte| [digit(byte >> 4), digit(*byte)])
            .collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for HexBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Hex;
        impl Visitor<'_> for Hex {
            type Value = HexBytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "up to {MAX_BYTES} bytes as hexadecimal digits")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<HexBytes, E> {
                if text.len() > 2 * MAX_BYTES || !text.len().is_multiple_of(2) {
                    return Err(E::invalid_length(text.len(), &self));
                }
                let value = |digit: &u8| match digit {
                    b'0'..=b'9' => Ok(digit - b'0'),
                    b'a'..=b'f' => Ok(digit - b'a' + 10),
                    _ => Err(E::custom("a digit that is not hexadecimal")),
                };
                let byte = |pair: &[u8]| pair.iter().try_fold(0, |byte, digit| Ok(byte << 4 | value(digit)?));
                text.as_bytes()
                    .chunks(2)
                    .map(byte)
                    .collect::<Result<_, E>>()
                    .map(HexBytes)
            }
        }
        deserializer.deserialize_str(Hex).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use triarch_cpu_model::{CpuidEntry, Host, Processor, X86};

    use super::*;

    proptest! {
        #[test]
        fn bytes_come_back_as_they_were_and_nothing_else_is_taken(bytes: Vec<u8>, text in ".*") {
            let hex = HexBytes(bytes);
            let json = serde_json::to_string(&hex).unwrap();
            prop_assert_eq!(serde_json::from_str::<HexBytes>(&json).unwrap(), hex);
            let json = serde_json::to_string(&text).unwrap();
            let valid = text.len() % 2 == 0 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            prop_assert_eq!(serde_json::from_str::<HexBytes>(&json).is_ok(), valid);
        }

        #[test]
        fn ticks_never_overflow(ns: u64, hz: u64) {
            let exact = u128::from(ns) * u128::from(hz) / 1_000_000_000;
            prop_assert_eq!(u128::from(ticks(Duration::from_nanos(ns), hz)), exact.min(u128::from(u64::MAX)));
        }
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let leaf = |leaf, [eax, ebx, ecx, edx]: [u32; 4]| CpuidEntry {
            leaf,
            subleaf: 0,
            indexed: leaf == 7,
            eax,
            ebx,
            ecx,
            edx,
        };
        let amd = ["Auth", "enti", "cAMD"].map(|part| u32::from_le_bytes(part.as_bytes().try_into().unwrap()));
        let cpu = |[ebx, edx, ecx]: [u32; 3], features, weakness| {
            let zero = leaf(0, [7, ebx, ecx, edx]);
            Processor::X86(X86 {
                cpuid: [zero, leaf(7, [0, features, 0, 0])].into_iter().collect(),
                msrs: [(0x10a, weakness)].into(),
                tsc_khz: None,
            })
        };
        let guest = |processor| GuestProcessor::new(processor).unwrap();
        let host = HostProcessor::new(Host {
            processor: cpu(amd, 1 << 5, 1 << 19),
            kernel: "6.1".to_owned(),
            tsc_scaling: false,
            writable: BTreeMap::new(),
        })
        .unwrap();
        assert!(check_processor(&guest(cpu(amd, 1 << 5, 1 << 19)), &host).is_ok());
        // AVX2 and MPX, and not told of a weakness.
        let error = check_processor(&guest(cpu(amd, 1 << 5 | 1 << 14, 0)), &host).unwrap_err();
        let StateError::Processor(verdict) = &error else {
            panic!("{error}")
        };
        assert_eq!(verdict.names(), ["mpx", "rrsba"]);
        assert!(error.to_string().contains("mpx, rrsba; restore"), "{error}");
        // The other vendor's bits mean something else.
        let [ebx, ..] = amd;
        let error = check_processor(&guest(cpu([ebx, 0, 0], 1 << 14, 0)), &host).unwrap_err();
        assert!(matches!(&error, StateError::Processor(verdict) if verdict.names() == ["vendor"]));
    }

    #[test]
    fn as_many_as_the_guest_may_have_and_at_least_one_that_runs() {
        use StartV1::{Left, Started};
        let told = |n: usize| FirmwareStateV1::StartedByKvm([vec![Started], vec![Left; n - 1]].concat());
        assert!(check_firmware(1, &told(4), 4).is_ok() && check_firmware(4, &told(4), 4).is_ok());
        let stray = FirmwareStateV1::StartedByKvm(vec![Started, Left, Started]);
        assert!(check_firmware(3, &stray, 3).is_ok());
        for (vcpus, told, max) in [
            (0, told(4), 4),
            (5, told(4), 4),
            (2, told(4), 5),
            (2, told(4), 3),
            (2, stray, 3),
        ] {
            let error = check_firmware(vcpus, &told, max).unwrap_err();
            assert!(matches!(error, StateError::Count { .. }), "{error}");
        }
    }
}
