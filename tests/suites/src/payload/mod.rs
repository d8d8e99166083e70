//! Tests with the bare-metal guest (tests/payload): it drives a device, the host checks what came of it. One module a
//! subject; they run on any KVM, also one in software.

mod abuse;
mod api;
mod backing;
mod balloon;
mod blk;
mod boot;
mod clients;
mod console;
mod cpu_features;
mod cpu_state;
pub(crate) mod data;
mod dimms;
mod dimms_soak;
mod edit;
mod ends;
mod events;
mod golden;
pub(crate) mod guest;
mod hand_over;
mod hotplug;
mod hotplug_random;
mod hotplug_soak;
mod iommu;
mod launch;
mod log;
mod memory;
mod metrics;
pub(crate) mod migration;
mod net;
mod netd;
mod nursery;
mod openapi;
mod passt;
mod pause;
mod pci;
mod plug;
mod power;
mod rings;
mod rng;
mod sandbox;
mod smp;
mod snapshot;
mod snapshot_cpu;
mod trictl;
mod vhost;
mod vhost_fs;
mod vhost_generic;
mod vhost_net;
mod virtio_mem;
mod vsock;
mod zones;

use triarch_harness::suite::Test;

/// This module's tests.
pub fn tests() -> Vec<Test> {
    [
        boot::TESTS,
        power::TESTS,
        memory::TESTS,
        backing::TESTS,
        balloon::TESTS,
        virtio_mem::TESTS,
        virtio_mem::SLOW,
        zones::TESTS,
        smp::TESTS,
        hotplug::TESTS,
        hotplug::SLOW,
        hotplug_soak::TESTS,
        hotplug_random::TESTS,
        dimms::TESTS,
        dimms::SLOW,
        dimms_soak::TESTS,
        &plug::tests(),
        pci::TESTS,
        blk::TESTS,
        net::TESTS,
        rng::TESTS,
        console::TESTS,
        cpu_features::TESTS,
        cpu_state::TESTS,
        cpu_state::NESTED,
        vsock::TESTS,
        iommu::TESTS,
        vhost::TESTS,
        vhost_generic::TESTS,
        vhost_fs::TESTS,
        hand_over::TESTS,
        vhost_net::TESTS,
        netd::TESTS,
        passt::TESTS,
        nursery::TESTS,
        rings::TESTS,
        &migration::tests(),
        pause::TESTS,
        &snapshot::tests(),
        snapshot_cpu::TESTS,
        golden::NESTED,
        ends::TESTS,
        sandbox::TESTS,
        api::TESTS,
        trictl::TESTS,
        clients::TESTS,
        abuse::TESTS,
        openapi::TESTS,
        metrics::TESTS,
        events::TESTS,
        launch::TESTS,
        log::TESTS,
        edit::TESTS,
    ]
    .concat()
}

/// Declares a module's tests: functions of a context, named after the subject. Behind `x86:` those that only an x86 guest can do, each
/// with what others lack.
macro_rules! payload_tests {
    ($subject:literal: $($name:ident),* $(,)? $(; x86: $($x86:ident: $lack:literal),* $(,)?)?) => {
        /// This module's tests.
        pub const TESTS: &[triarch_harness::suite::Test] = &[
            $(triarch_harness::suite::Test::payload(concat!($subject, "::", stringify!($name)), $name),)*
            $($(triarch_harness::suite::Test::payload(concat!($subject, "::", stringify!($x86)), |context| {
                if $crate::payload::guest::is_arm() {
                    return Ok(triarch_harness::suite::Outcome::Skipped(concat!("ARM guests have no ", $lack).into()));
                }
                $x86(context)
            }),)*)?
        ];
    };
}
pub(crate) use payload_tests;
