//! Examples of bodies and answers. Tests give each body to the server's reader, and hold each to its schema.

use serde_json::{Value, json};

/// Examples of the body of a route, by name.
pub(super) fn of_body(route: &str) -> Value {
    match route {
        "vm.create" => json!({
            "kernel": { "summary": "A kernel with a disk, its console on a terminal of its own", "value": create() },
            "zones": { "summary": "Two NUMA nodes, each with a memory zone of its own", "value": zones() },
            "smallest": { "summary": "Defaults for all but the kernel", "value": { "payload": { "kernel": "/boot/vmlinuz" } } },
        }),
        "vm.resize" => json!({
            "vcpus": { "value": { "desired_vcpus": 2 } },
            "memory": { "value": { "desired_ram": 1_073_741_824_u64 } },
        }),
        "vm.resize-zone" => one(json!({ "id": "fast", "desired_ram": 2_147_483_648_u64 })),
        "vm.resize-disk" => one(json!({ "id": "root", "desired_size": 10_737_418_240_u64 })),
        "vm.add-disk" => one(json!({ "path": "/var/lib/vm/data.img", "id": "data", "num_queues": 2, "direct": true })),
        "vm.add-net" => json!({
            "descriptor": {
                "summary": "The tap's descriptor comes with the request",
                "value": { "id": "net0", "mac": "52:54:00:12:34:56", "num_queues": 2, "queue_size": 256 },
            },
            "tap": { "summary": "A tap interface by name", "value": { "tap": "tap0" } },
        }),
        "vm.add-fs" => one(json!({ "tag": "shared", "socket": "/run/vm/fs.sock", "id": "shared" })),
        "vm.add-generic-vhost-user" => {
            one(json!({ "device_type": 25, "socket": "/run/vm/sound.sock", "queue_sizes": [64, 64, 64, 64] }))
        }
        "vm.add-vsock" => one(json!({ "cid": 3, "socket": "/run/vm/vsock.sock" })),
        "vm.add-device" => json!({
            "example": { "value": { "path": "/sys/bus/pci/devices/0000:01:00.0", "id": "gpu", "addr": "06.0" } },
            "descriptors": {
                "summary": "One whose descriptors come with the request, and which the path has to be of",
                "value": { "path": "/sys/bus/pci/devices/0000:02:00.0", "id": "nvme" },
            },
        }),
        "vm.remove-device" => one(json!({ "id": "data" })),
        "vm.snapshot" => json!({
            "example": { "value": { "destination_url": "file:///var/lib/vm/snapshot" } },
            "first": {
                "summary": "The first of several, whose next ones have only what was written since",
                "value": { "destination_url": "file:///var/lib/vm/monday", "track_writes": true },
            },
            "next": {
                "summary": "What was written since the one before",
                "value": {
                    "destination_url": "file:///var/lib/vm/tuesday", "base": "file:///var/lib/vm/monday", "track_writes": true,
                },
            },
        }),
        "vm.restore" => json!({
            "example": { "value": { "source_url": "file:///var/lib/vm/snapshot" } },
            "mapped": {
                "summary": "The guest goes on at once, and pages are copied when it writes to them",
                "value": { "source_url": "file:///var/lib/vm/snapshot", "memory_restore_mode": "Mapped", "resume": true },
            },
            "passed": {
                "summary": "The guest finds that time went on since it was saved",
                "value": { "source_url": "file:///var/lib/vm/snapshot", "clock": "Passes", "resume": true },
            },
        }),
        "vm.send-migration" => json!({
            "tls": {
                "summary": "Over a network, at no more than 400 MB a second; a guest that writes too fast may be slowed down",
                "value": {
                    "destination_url": "tcp:10.0.0.2:4444", "connections": 4, "bandwidth": 400_000_000_u64, "downtime_ms": 200, "throttle": 60,
                    "tls": {
                        "certificate": "/etc/triarch/host1.pem", "key": "/etc/triarch/host1.key", "ca": "/etc/triarch/ca.pem",
                        "peer": "host2.example.org",
                    },
                },
            },
            "unix": { "summary": "Within one host", "value": { "destination_url": "unix:/run/vm/move.sock" } },
            "local": {
                "summary": "To a newer VMM on the same host, which gets the guest's shared memory as it is",
                "value": { "destination_url": "unix:/run/vm/move.sock", "local": true },
            },
        }),
        "vm.receive-migration" => json!({
            "tls": {
                "value": {
                    "receiver_url": "tcp:10.0.0.2:4444",
                    "tls": {
                        "certificate": "/etc/triarch/host2.pem", "key": "/etc/triarch/host2.key", "ca": "/etc/triarch/ca.pem",
                        "peer": "host1.example.org",
                    },
                },
            },
            "unix": {
                "summary": "Within one host, with other paths",
                "value": {
                    "receiver_url": "unix:/run/vm/move.sock",
                    "config": { "serial": { "socket": "/run/vm/new-serial.sock" }, "net": [{ "id": "net0", "tap": "tap1" }] },
                },
            },
        }),
        "vm.check-migration" => one(json!({ "destination_url": "unix:/run/vm/move.sock" })),
        "vm.set-migration" => json!({
            "another bandwidth": { "value": { "bandwidth": 100_000_000_u64 } },
            "post-copy": { "value": { "post_copy": true } },
        }),
        _ => json!({}),
    }
}

/// Examples of what a route answers, by name.
pub(super) fn of_answer(route: &str) -> Value {
    match route {
        "vmm.ping" => one(json!({ "build_version": "v0.1.0", "version": "0.1.0", "pid": 4711, "features": ["kvm"] })),
        "vm.info" => {
            let mut config = create();
            config["serial"]["file"] = "/dev/pts/3".into();
            one(json!({ "config": config, "state": "Running", "memory_actual_size": 536_870_912 }))
        }
        "vm.counters" => one(json!({
            "_disk0": { "read_ops": 310, "read_bytes": 12_697_600, "read_latency_min": 41, "read_latency_max": 902, "read_latency_avg": 77 },
            "net0": { "rx_frames": 12, "rx_bytes": 1_210, "tx_frames": 9, "tx_bytes": 846 },
        })),
        "vmm.cpu-features" => one(json!({
            "host": {
                "architecture": "x86_64", "vendor": "HygonGenuine",
                "signature": { "family": 24, "model": 16, "stepping": 0 },
                "kernel": "6.12.0", "tsc_khz": 2_600_000, "tsc_scaling": true,
                "features": ["pni", "aes", "avx2", "sha_ni"],
                "values": { "physical_address_bits": 48, "xsave_area_size": 832 },
                "unnamed": [],
            },
        })),
        "vm.migration-progress" => one(json!({
            "side": "source", "phase": "copying", "job": 7, "address": "tcp:10.0.0.2:4444", "elapsed_ms": 5_310, "rounds": 3,
            "total": 4_294_967_296_u64, "remaining": 61_440_000, "pages": 731_004, "zero_pages": 402_118, "wire_bytes": 2_998_104_220_u64,
            "rate": 564_000_000, "dirty_rate": 104_857_600, "downtime_ms": 128, "retreats": 0, "throttle": 0, "bandwidth": null, "error": null,
        })),
        "vm.check-migration" => one(json!({ "blockers": [
            {
                "what": "cpu", "name": "avx512_vnni",
                "reason": "avx512_vnni (CPUID.7.0:ECX[11]): the guest has 1, the destination 0",
                "remedy": "boot the guest with a CPU that has no more than this destination's, or choose a destination that has it (a \
                           newer CPU, microcode or kernel)",
            },
            {
                "what": "disk", "name": "data", "reason": "the disk /srv/data.img does not exist",
                "remedy": "give it under this path there, or its path there with config of vm.receive-migration",
            },
        ] })),
        "vm.add-disk" => one(added("data", 5)),
        "vm.add-net" => one(added("net0", 6)),
        "vm.add-fs" => one(added("shared", 7)),
        "vm.add-generic-vhost-user" => one(added("_generic_vhost_user0", 8)),
        "vm.add-vsock" => one(added("_vsock0", 9)),
        "vm.add-device" => one(added("gpu", 10)),
        "vm.events" => one(json!([event()])),
        "vm.jobs" => one(json!([job()])),
        "vm.job/{id}" => one(job()),
        "metrics" => one(json!(
            "# HELP triarch_memory_size_bytes RAM of the guest\n# TYPE triarch_memory_size_bytes gauge\n"
        )),
        _ => json!({}),
    }
}

fn added(id: &str, slot: u8) -> Value {
    json!({ "id": id, "bdf": format!("0000:00:{slot:02x}.0") })
}

fn event() -> Value {
    json!({
        "id": 3, "timestamp": { "secs": 4, "nanos": 91_310_007 }, "source": "job", "event": "started",
        "properties": { "job": 1, "kind": "vm.boot" },
    })
}

fn job() -> Value {
    json!({
        "id": 1, "kind": "vm.boot", "state": "running", "phase": "devices", "progress": { "done": 2, "total": 5, "unit": "devices" },
        "started": { "secs": 4, "nanos": 91_310_007 }, "ended": null, "error": null,
    })
}

fn one(value: Value) -> Value {
    json!({ "example": { "value": value } })
}

fn zones() -> Value {
    let zone = |id: &str, node| json!({ "id": id, "size": 1_073_741_824_u64, "host_numa_node": node, "hotplug_size": 4_294_967_296_u64 });
    json!({
        "cpus": { "boot_vcpus": 4, "max_vcpus": 4 },
        "memory": { "size": 0, "hotplug_method": "VirtioMem", "zones": [zone("fast", 0), zone("far", 1)] },
        "numa": [
            { "guest_numa_id": 0, "cpus": [0, 1], "memory_zones": ["fast"], "distances": [{ "destination": 1, "distance": 21 }] },
            { "guest_numa_id": 1, "cpus": [2, 3], "memory_zones": ["far"] },
        ],
        "payload": { "kernel": "/boot/vmlinuz" },
    })
}

fn create() -> Value {
    json!({
        "cpus": { "boot_vcpus": 2, "max_vcpus": 2 },
        "memory": { "size": 536_870_912 },
        "payload": { "kernel": "/boot/vmlinuz", "cmdline": "console=ttyS0 root=/dev/vda" },
        "disks": [{ "path": "/var/lib/vm/root.img", "id": "root" }],
        "rng": { "src": "/dev/urandom" },
        "serial": { "mode": "Pty" },
        "console": { "mode": "Off" },
    })
}
