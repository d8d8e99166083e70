use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::server::{Action, Method};
use crate::{
    CheckMigration, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, Operation, PayloadConfig,
    ReceiveMigration, RemoveDevice, Resize, ResizeDisk, ResizeZone, RestoreConfig, SendMigration, SetMigration,
    SnapshotConfig, VmConfig, VsockConfig, read_object,
};

/// Checks values against a schema of the document.
fn validator(document: &Value, schema: &Value) -> jsonschema::Validator {
    let mut root = schema.clone();
    root["components"] = document["components"].clone();
    jsonschema::draft202012::new(&root).expect("a schema")
}

fn named(document: &Value, name: &str) -> jsonschema::Validator {
    validator(document, &json!({ "$ref": format!("#/components/schemas/{name}") }))
}

#[test]
fn the_file_is_what_the_types_say() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    let file = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        file == text(),
        "docs/openapi.json is out of date; `cargo xtask openapi` writes it"
    );
}

#[test]
fn every_route_is_described_with_its_method_and_what_it_can_answer() {
    let document = document();
    assert_eq!(document["paths"].as_object().expect("paths").len(), ROUTES.len());
    for route in ROUTES {
        let method = if route.method == Method::Get { "get" } else { "put" };
        let operation = &document["paths"][format!("/{}", route.name)][method];
        let responses = operation["responses"].as_object().expect("responses");
        let has = |status: u16| responses.contains_key(&status.to_string());
        assert!(has(400) && has(501) && has(503), "{}", route.name);
        match route.action {
            Action::Missing => assert!(!has(200) && !has(204), "{}", route.name),
            Action::Ping | Action::Metrics | Action::Events | Action::Jobs | Action::Job => {
                assert!(has(200) && !has(500), "{}", route.name);
            }
            Action::Vm(operation) => {
                // What is added to a guest that runs has a place; before the boot there is nothing to tell.
                let adds = route.name.starts_with("vm.add-");
                assert!(has(200) || has(204), "{}", route.name);
                assert_eq!(has(200) && has(204), adds, "{}", route.name);
                for phase in crate::Phase::ALL {
                    if let Err(error) = operation.check(phase) {
                        assert!(has(error.status()), "{} in {phase:?}", route.name);
                    }
                }
            }
        }
        for response in responses.values() {
            let target = response["$ref"].as_str().map(|name| name.trim_start_matches('#'));
            let found = target.is_none_or(|pointer| document.pointer(pointer).is_some());
            assert!(found, "{}: {response}", route.name);
        }
    }
}

#[test]
fn names_for_functions_differ() {
    let document = document();
    let mut ids: Vec<_> = ROUTES
        .iter()
        .flat_map(|route| {
            document["paths"][format!("/{}", route.name)]
                .as_object()
                .expect("a path")
                .values()
        })
        .map(|operation| operation["operationId"].as_str().expect("an id").to_owned())
        .collect();
    assert!(ids.contains(&"vmAddDisk".to_owned()), "{ids:?}");
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), ROUTES.len());
}

/// Reads a body as the server does; the configuration of a VM must be one that can be booted, and nothing may be ignored.
fn read<T: DeserializeOwned>(body: &Value) -> Result<T, String> {
    let (read, ignored) = read_object(body.to_string().as_bytes()).map_err(|error| error.to_string())?;
    if ignored.is_empty() {
        Ok(read)
    } else {
        Err(format!("ignored: {ignored:?}"))
    }
}

/// A configuration that boots, with `edit` made to it.
fn valid(edit: impl FnOnce(&mut VmConfig)) -> Result<(), String> {
    let payload = PayloadConfig {
        kernel: Some("vmlinuz".into()),
        ..PayloadConfig::default()
    };
    let mut config = VmConfig {
        payload: Some(payload),
        ..VmConfig::default()
    };
    edit(&mut config);
    config.validate().map_err(|error| error.to_string())
}

/// What the server makes of a body.
fn accepts(operation: Operation, body: &Value) -> Result<(), String> {
    match operation {
        Operation::Create => read::<VmConfig>(body)?.validate().map_err(|e| e.to_string()),
        Operation::AddDisk => read::<DiskConfig>(body).and_then(|disk| valid(|c| c.disks = Some(vec![disk]))),
        Operation::AddNet => read::<NetConfig>(body).and_then(|net| valid(|c| c.net = Some(vec![net]))),
        Operation::AddFs => read::<FsConfig>(body).and_then(|fs| valid(|c| c.fs = Some(vec![fs]))),
        Operation::AddGenericVhostUser => {
            read::<GenericVhostUserConfig>(body).and_then(|device| valid(|c| c.generic_vhost_user = Some(vec![device])))
        }
        Operation::AddDevice => read::<DeviceConfig>(body).and_then(|device| valid(|c| c.devices = Some(vec![device]))),
        Operation::AddVsock => read::<VsockConfig>(body).and_then(|vsock| valid(|c| c.vsock = Some(vsock))),
        Operation::Resize => read::<Resize>(body).and_then(|target| {
            valid(|c| {
                c.cpus.max_vcpus = 254;
                c.cpus.boot_vcpus = target.desired_vcpus.unwrap_or(1);
                c.memory.size = target.desired_ram.unwrap_or(1 << 20);
            })
        }),
        Operation::ResizeDisk => read::<ResizeDisk>(body).map(drop),
        Operation::ResizeZone => read::<ResizeZone>(body).map(drop),
        Operation::RemoveDevice => read::<RemoveDevice>(body).map(drop),
        Operation::Snapshot => read::<SnapshotConfig>(body).map(drop),
        Operation::Restore => read::<RestoreConfig>(body).map(drop),
        Operation::SendMigration => read::<SendMigration>(body)?.validate().map_err(|e| e.to_string()),
        Operation::ReceiveMigration => read::<ReceiveMigration>(body).map(drop),
        Operation::CheckMigration => read::<CheckMigration>(body).map(drop),
        Operation::SetMigration => read::<SetMigration>(body).map(drop),
        other => Err(format!("{other:?} has no body")),
    }
}

#[test]
fn examples_are_accepted_by_the_reader_and_by_their_schemas() {
    let document = document();
    let mut seen = 0;
    for route in ROUTES {
        let method = if route.method == Method::Get { "get" } else { "put" };
        let operation = &document["paths"][format!("/{}", route.name)][method];
        let body = &operation["requestBody"]["content"]["application/json"];
        let answer = operation["responses"]["200"]["content"].as_object();
        let answer = answer.and_then(|media| media.values().next()).unwrap_or(&Value::Null);
        for (content, is_body) in [(body, true), (answer, false)] {
            let Some(examples) = content["examples"].as_object() else {
                continue;
            };
            assert!(!examples.is_empty(), "{} has a body without an example", route.name);
            let validator = validator(&document, &content["schema"]);
            for (name, example) in examples {
                let value = &example["value"];
                let problems: Vec<_> = validator.iter_errors(value).map(|e| e.to_string()).collect();
                assert!(problems.is_empty(), "{} {name}: {problems:?}", route.name);
                if let (true, Action::Vm(operation)) = (is_body, route.action) {
                    accepts(operation, value).unwrap_or_else(|e| panic!("{} {name}: {e}", route.name));
                }
                seen += 1;
            }
        }
    }
    assert!(seen >= 10, "{seen} examples");
}

/// Every object there is, so that each of its fields can be set.
fn everything() -> Value {
    json!({
        "cpus": { "boot_vcpus": 1, "max_vcpus": 254, "max_phys_bits": 46,
            "topology": { "threads_per_core": 1, "cores_per_die": 254, "dies_per_package": 1, "packages": 1 } },
        "memory": { "size": 536_870_912, "hugepages": true, "hugepage_size": 2_097_152 },
        "payload": { "kernel": "vmlinuz" },
        "disks": [{ "path": "disk.img" }],
        "net": [{ "mac": "02:00:00:00:00:01" }],
        "rng": { "src": "/dev/urandom" },
        "serial": { "mode": "Null" }, "console": { "mode": "Off" }, "debug_console": { "mode": "Off" },
        "fs": [{ "tag": "shared", "socket": "fs.sock" }],
        "generic_vhost_user": [{ "device_type": 25, "socket": "sound.sock", "queue_sizes": [64] }],
        "devices": [{ "path": "/sys/bus/pci/devices/0000:01:00.0" }],
        "vsock": { "cid": 3, "socket": "vm.sock" },
        "balloon": { "size": 0 },
        "platform": { "uuid": "0e2f2a5e-5d3a-4ce5-8d22-5c6a1a1f8b1e" },
    })
}

/// A number's field, and its schema.
fn numbers(document: &Value, schema: &Value, at: &str, found: &mut Vec<(String, Value)>) {
    if let Some(target) = schema["$ref"].as_str() {
        let target = document.pointer(target.trim_start_matches('#')).expect("a schema");
        return numbers(document, target, at, found);
    }
    for variant in schema["anyOf"].as_array().into_iter().flatten() {
        numbers(document, variant, at, found);
    }
    if schema["format"]
        .as_str()
        .is_some_and(|format| format.starts_with("uint"))
    {
        found.push((at.to_owned(), schema.clone()));
    }
    if schema["items"].is_object() {
        numbers(document, &schema["items"], &format!("{at}/0"), found);
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        numbers(document, field, &format!("{at}/{name}"), found);
    }
}

/// The same with memory in zones, of which there is none otherwise.
fn in_zones() -> Value {
    let mut config = everything();
    config["memory"] = json!({ "size": 0, "hotplug_method": "VirtioMem", "zones": [
        { "id": "a", "size": 1_048_576, "hugepages": true, "hotplug_size": 4_194_304 },
    ] });
    config["numa"] = json!([
        { "guest_numa_id": 0, "cpus": [0], "memory_zones": ["a"], "distances": [{ "destination": 1, "distance": 20 }] },
        { "guest_numa_id": 1, "cpus": [253] },
    ]);
    config
}

/// The same with the devices that can be behind an IOMMU, and all of them there.
fn behind_iommu() -> Value {
    let mut config = everything();
    config["platform"]["iommu_segments"] = json!([0]);
    let fields = config.as_object_mut().expect("an object");
    fields.retain(|name, _| !["fs", "generic_vhost_user"].contains(&&**name));
    config
}

/// `everything` with a number at `pointer`.
fn with(pointer: &str, number: &Value) -> Value {
    let mut config = match pointer {
        _ if pointer.starts_with("/numa") || pointer.starts_with("/memory/zones") => in_zones(),
        _ if pointer.starts_with("/platform/iommu_segments") => behind_iommu(),
        _ => everything(),
    };
    let (parent, name) = pointer.rsplit_once('/').expect("a field");
    match config.pointer_mut(parent) {
        Some(Value::Array(items)) => items[0] = number.clone(),
        Some(object) => object[name] = number.clone(),
        None => panic!("no {parent}"),
    }
    config
}

/// Numbers of zones and nodes that others limit: blocks by the size of huge pages, nodes by how many there are, those of devices, too, vCPUs by who has them.
fn depends_on_others(pointer: &str) -> bool {
    let zone = ["hotplug_size", "hotplugged_size", "hugepage_size"].map(|name| format!("/memory/zones/0/{name}"));
    let node = ["guest_numa_id", "cpus/0", "distances/0/destination"].map(|name| format!("/numa/0/{name}"));
    let devices = ["disks", "net", "devices"].map(|list| format!("/{list}/0/guest_numa_id"));
    zone.iter()
        .chain(&node)
        .chain(&devices)
        .any(|limited| limited == pointer)
}

#[test]
fn numbers_have_the_limits_that_the_server_has() {
    let document = document();
    let schema = named(&document, "VmConfig");
    let server = |config: &Value| accepts(Operation::Create, config);
    server(&everything()).expect("valid");
    let mut fields = Vec::new();
    numbers(
        &document,
        &json!({ "$ref": "#/components/schemas/VmConfig" }),
        "",
        &mut fields,
    );
    let names: Vec<_> = fields.iter().map(|(name, _)| name.as_str()).collect();
    for name in [
        "/cpus/boot_vcpus",
        "/memory/size",
        "/disks/0/queue_size",
        "/net/0/mtu",
        "/fs/0/num_queues",
        "/generic_vhost_user/0/device_type",
        "/generic_vhost_user/0/queue_sizes/0",
        "/vsock/cid",
    ] {
        assert!(names.contains(&name), "{names:?}");
    }
    for (pointer, limits) in fields {
        let (least, greatest) = (
            limits["minimum"].as_u64().expect("minimum"),
            limits["maximum"].as_u64().expect("maximum"),
        );
        let mut candidates = vec![
            json!(-1),
            json!(1.5),
            json!(least),
            json!(least + 1),
            json!(greatest),
            json!(3),
            json!(4),
        ];
        candidates.extend(least.checked_sub(1).map(Value::from));
        candidates.extend(greatest.checked_add(1).map(Value::from));
        for number in candidates {
            let config = with(&pointer, &number);
            let (by_schema, by_server) = (schema.is_valid(&config), server(&config));
            if ["/balloon/size", "/memory/hotplug_size"].contains(&&*pointer) && number == json!(greatest) {
                // More than the guest has, or more than there can be together with what it has.
                assert!(by_server.is_err());
                continue;
            }
            if pointer == "/memory/hotplugged_size" && by_server.is_err() {
                // Not without virtio-mem.
                continue;
            }
            if depends_on_others(&pointer) && by_schema && by_server.is_err() {
                continue;
            }
            // One thing depends on another here, which a schema cannot say: cores and dies make vCPUs.
            assert_eq!(by_schema, by_server.is_ok(), "{pointer} = {number}: {by_server:?}");
        }
    }
}

#[test]
fn texts_have_the_limits_that_the_server_has() {
    let document = document();
    let schema = named(&document, "VmConfig");
    for (pointer, value) in [
        ("/disks/0/serial", json!("a".repeat(20))),
        ("/disks/0/serial", json!("a".repeat(21))),
        ("/disks/0/path", json!("")),
        ("/disks/0/path", json!(null)),
        ("/disks/0", json!({ "vhost_user": true, "vhost_socket": "s" })),
        (
            "/disks/0",
            json!({ "vhost_user": true, "vhost_socket": "s", "on_disconnect": "error-after=9" }),
        ),
        (
            "/disks/0",
            json!({ "vhost_user": true, "vhost_socket": "s", "on_disconnect": "wait" }),
        ),
        (
            "/disks/0",
            json!({ "vhost_user": true, "vhost_socket": "s", "datapath": "relay" }),
        ),
        (
            "/disks/0",
            json!({ "vhost_user": true, "vhost_socket": "s", "datapath": "Relay" }),
        ),
        ("/disks/0", json!({ "vhost_user": true })),
        ("/disks/0", json!({})),
        ("/disks/0/id", json!("")),
        ("/disks/0/id", json!("__root")),
        ("/disks/0/id", json!("_")),
        ("/disks/0/id", json!("a__")),
        ("/disks/0/image_type", json!("Qcow2")),
        ("/net/0/mac", json!("01:00:00:00:00:01")),
        ("/net/0/mac", json!("02:00:00:00:00")),
        ("/net/0/mac", json!("0e:FF:00:00:00:aa")),
        ("/net/0/tap", json!(7)),
        ("/net/0", json!({ "vhost_user": true, "vhost_socket": "s" })),
        ("/net/0", json!({ "vhost_user": true, "vhost_socket": "s", "tap": "t" })),
        (
            "/net/0",
            json!({ "vhost_user": true, "vhost_socket": "s", "vhost_mode": "Server" }),
        ),
        ("/net/0", json!({ "vhost_user": true })),
        ("/net/0", json!({ "vhost_socket": "s" })),
        ("/net/0", json!({ "on_disconnect": "error-after=3" })),
        ("/net/0", json!({ "datapath": "relay" })),
        (
            "/net/0",
            json!({ "vhost_user": true, "vhost_socket": "s", "datapath": "relay" }),
        ),
        ("/fs/0/tag", json!("")),
        ("/fs/0/tag", json!("t".repeat(36))),
        ("/fs/0/tag", json!("t".repeat(37))),
        ("/fs/0/socket", json!("")),
        ("/fs/0/on_disconnect", json!("error-after=3")),
        ("/fs/0/datapath", json!("direct")),
        ("/fs/0/datapath", json!("Direct")),
        ("/fs/0", json!({ "socket": "s" })),
        ("/generic_vhost_user/0/datapath", json!("relay")),
        ("/generic_vhost_user/0/datapath", json!("fast")),
        ("/generic_vhost_user/0/queue_sizes", json!([])),
        ("/generic_vhost_user/0/queue_sizes", json!([64, 65])),
        ("/rng/src", json!("")),
        ("/vsock/socket", json!("")),
        ("/serial/mode", json!("Loud")),
        ("/serial/mode", json!("Tty")),
        ("/payload/kernel", json!("")),
        ("/memory/shared", json!("yes")),
        ("/memory/size", json!(0)),
        ("/memory/zones", json!([])),
        ("/memory/zones", json!(null)),
        ("/memory/zones/0/id", json!("")),
        ("/memory/zones/0/id", json!("i".repeat(65))),
        ("/memory/zones/0", json!({ "id": "a" })),
        ("/memory/zones/0", json!({ "id": "a", "size": 2_097_152 })),
        ("/memory/zones/0/shared", json!(true)),
        ("/numa/0/distances/0", json!({ "destination": 1 })),
        ("/numa/0/cpus", json!(null)),
        ("/numa/1", json!({ "cpus": [1] })),
        ("/payload", json!(null)),
        ("/payload", json!({})),
        ("/payload", json!({ "firmware": "f" })),
        ("/cpus", json!([])),
    ] {
        let config = with(pointer, &value);
        let (by_schema, by_server) = (schema.is_valid(&config), accepts(Operation::Create, &config));
        assert_eq!(by_schema, by_server.is_ok(), "{pointer} = {value}: {by_server:?}");
    }
}
