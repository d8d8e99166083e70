//! Whether a guest can go on on another host: every register is compared, feature by feature.
//!
//! Pure: the same two descriptions give the same verdict on every machine, in the order of the registers.

mod verdict;

use std::collections::BTreeMap;

pub use verdict::{Blocker, Verdict};

use crate::features::{Feature, Output, Register, Rule, Table};
use crate::listing::lowest;
use crate::{Arm64, GuestProcessor, Host, HostProcessor, Processor, Vendor, X86};
use verdict::{Remedy, Shown};

/// KVM itself does not scale a TSC that is as near to the guest's as this, in parts per million.
const TSC_TOLERANCE: u64 = 250;

/// Whether a guest with `guest` can run on `host`: it can if all that the guest was given is there, and can be set where it is less
/// than the host has.
///
/// CPUs of two vendors are never compared feature by feature: their registers mean different things, and only a guest that was given
/// what both have can go from one to the other.
pub fn compare(guest: &GuestProcessor, host: &HostProcessor) -> Verdict {
    let (guest, host) = (guest.processor(), host.host());
    let mut verdict = Verdict::default();
    match (guest, &host.processor) {
        (Processor::X86(guest_x86), Processor::X86(host_x86)) => {
            if !same_vendor(guest_x86, host_x86) {
                verdict.refuse(Blocker::vendor(&guest_x86.vendor_name(), &host_x86.vendor_name()));
                return verdict;
            }
            tsc(guest_x86, host_x86, host, &mut verdict);
        }
        (Processor::Arm64(guest), Processor::Arm64(host)) => arm(guest, host, &mut verdict),
        (guest, host) => {
            verdict.refuse(Blocker::architecture(guest, host));
            return verdict;
        }
    }
    Comparison {
        table: guest.features(),
        vendor: guest.vendor(),
        guest: guest.registers(),
        offered: host.processor.registers(),
        host,
    }
    .run(&mut verdict);
    verdict
}

/// Zhaoxin's CPUs have one of two names; of vendors nobody knows only the name tells.
fn same_vendor(guest: &X86, host: &X86) -> bool {
    match (guest.cpuid.vendor(), host.cpuid.vendor()) {
        (Vendor::Other, Vendor::Other) => guest.vendor_name() == host.vendor_name(),
        (guest, host) => guest == host,
    }
}

/// Two registers and what is between them.
struct Comparison<'a> {
    table: &'static Table,
    vendor: Option<Vendor>,
    guest: BTreeMap<Register, u64>,
    offered: BTreeMap<Register, u64>,
    host: &'a Host,
}

impl Comparison<'_> {
    fn run(&self, verdict: &mut Verdict) {
        let mut registers: Vec<Register> = self.guest.keys().chain(self.offered.keys()).copied().collect();
        registers.sort_unstable();
        registers.dedup();
        for register in registers {
            if self.table.ignored(register).is_none() && !self.lacks_component(register) {
                self.register(register, verdict);
            }
        }
    }

    /// Whether it tells how XSAVE lays out what the host does not have. That it has it not XCR0 and XSS tell, by name.
    fn lacks_component(&self, register: Register) -> bool {
        let Register::Cpuid {
            leaf: leaf @ 0xd,
            subleaf: subleaf @ 2..,
            ..
        } = register
        else {
            return false;
        };
        let output = Output::Eax;
        let size = Register::Cpuid { leaf, subleaf, output };
        self.offered.get(&size).is_none_or(|size| *size == 0)
    }

    fn register(&self, register: Register, verdict: &mut Verdict) {
        let given = self.guest.get(&register).copied();
        let (guest, host) = (given.unwrap_or(0), self.offered.get(&register).copied().unwrap_or(0));
        let mut unnamed = u64::MAX;
        for feature in self.table.fields(register, self.vendor) {
            unnamed &= !feature.mask();
            // What a guest was never told, it does not count on.
            if feature.rule == Rule::Exact && given.is_none() {
                continue;
            }
            let shown = Shown::named(self.table, register, feature);
            self.feature(register, feature, [guest, host], shown, verdict);
        }
        let (guest, host) = (guest & unnamed, host & unnamed);
        let mut rest = match register.needs_leave() {
            true => guest ^ host,
            false => guest & !host,
        };
        while let Some(low) = lowest(register, rest) {
            let field = Table::anonymous(register, low);
            rest &= !field.mask();
            let shown = Shown::by_place(self.table, register, &field);
            self.feature(register, &field, [guest, host], shown, verdict);
        }
    }

    fn feature(
        &self,
        register: Register,
        feature: &Feature,
        values: [u64; 2],
        shown: impl Fn() -> Shown,
        verdict: &mut Verdict,
    ) {
        let [guest, host] = values.map(|value| feature.value(value));
        if guest == 0 && feature.needs.is_some_and(|needs| !self.guest_has(needs)) {
            return;
        }
        if !feature.fits(guest, host) {
            verdict.refuse_with(|| Blocker::of(feature, shown(), [guest, host], Remedy::of(feature.rule)));
        } else if guest != host && feature.rule != Rule::Ignored && !self.may_set(register, feature) {
            let remedy = Remedy::Kernel(self.host.kernel.clone());
            verdict.refuse_with(|| Blocker::of(feature, shown(), [guest, host], remedy));
        }
    }

    fn guest_has(&self, name: &str) -> bool {
        let found = self.table.find(name);
        found.is_some_and(|(register, feature)| feature.value(self.guest.get(&register).copied().unwrap_or(0)) != 0)
    }

    /// Whether the host's KVM lets a guest have another value than the host's.
    fn may_set(&self, register: Register, feature: &Feature) -> bool {
        let Register::Kvm(number) = register else {
            return true;
        };
        let writable = self.host.writable.get(&number).copied().unwrap_or(0);
        !register.needs_leave() || feature.mask() & !writable == 0
    }
}

/// KVM gives a guest the frequency it had, if the CPU can.
fn tsc(guest: &X86, host: &X86, can: &Host, verdict: &mut Verdict) {
    let Some(khz) = guest.tsc_khz.filter(|_| !can.tsc_scaling) else {
        return;
    };
    let (wanted, offered) = (u64::from(khz), u64::from(host.tsc_khz.unwrap_or(0)));
    if wanted.abs_diff(offered) * 1_000_000 > wanted * TSC_TOLERANCE {
        verdict.refuse(Blocker::frequency(
            "tsc_khz",
            "kHz",
            wanted,
            host.tsc_khz.map(u64::from),
        ));
    }
}

fn arm(guest: &Arm64, host: &Arm64, verdict: &mut Verdict) {
    if guest.counter_hz != host.counter_hz {
        verdict.refuse(Blocker::frequency(
            "CNTFRQ_EL0",
            "Hz",
            guest.counter_hz,
            Some(host.counter_hz),
        ));
    }
    if guest.address_bits > host.address_bits {
        verdict.refuse(Blocker::address_bits(guest.address_bits, host.address_bits));
    }
    // A host can leave out its longest vectors, none in between (Linux, Documentation/virt/kvm/api.rst, KVM_REG_ARM64_SVE_VLS).
    if !host.vector_lengths.starts_with(&guest.vector_lengths) {
        verdict.refuse(Blocker::vector_lengths(&guest.vector_lengths, &host.vector_lengths));
    }
}
