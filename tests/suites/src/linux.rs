//! Tests with stock Linux guests, one module a subject.

use triarch_harness::suite::Test;

mod acpi;
mod balloon;
mod blk;
mod boot;
mod clock;
mod console;
mod device_tree;
mod dimms;
mod hotplug;
mod iommu;
mod load;
mod lost;
mod migration;
mod moving;
mod net;
mod nodes;
mod numa;
mod ovs;
mod pair;
mod passt;
mod pause;
mod place;
mod plug;
mod plug_kinds;
mod ports;
mod power;
mod refusals;
mod rng;
mod snapshot;
mod vfio;
mod vfio_given;
mod vfio_host;
mod vfio_plug;
mod vfio_refusals;
mod vfio_slots;
mod vfio_speed;
mod vhost;
mod vhost_fs;
mod vhost_net;
mod virtio_mem;
mod vsock;

/// All of them, cheap ones first.
pub fn tests() -> Vec<Test> {
    [
        refusals::TESTS,
        boot::TESTS,
        acpi::TESTS,
        device_tree::TESTS,
        clock::TESTS,
        power::TESTS,
        console::TESTS,
        rng::TESTS,
        balloon::TESTS,
        blk::TESTS,
        vfio_refusals::TESTS,
        vfio::TESTS,
        vfio_given::TESTS,
        vfio_host::TESTS,
        iommu::TESTS,
        vfio_plug::TESTS,
        vfio_slots::TESTS,
        vfio_speed::TESTS,
        vhost::TESTS,
        vhost_fs::TESTS,
        vhost_net::TESTS,
        net::TESTS,
        ovs::TESTS,
        passt::TESTS,
        vsock::TESTS,
        pause::TESTS,
        snapshot::TESTS,
        migration::TESTS,
        pair::TESTS,
        hotplug::TESTS,
        dimms::TESTS,
        virtio_mem::TESTS,
        numa::TESTS,
        plug::TESTS,
        plug_kinds::TESTS,
        ports::TESTS,
        nodes::TESTS,
    ]
    .concat()
}
