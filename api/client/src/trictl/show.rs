//! Answers as tables.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use triarch_api::server::Identity;
use triarch_api::{
    ConsoleConfig, ConsoleMode, CpusConfig, DeviceLink, DeviceTree, DiskConfig, LinkPath, LinkState, MemoryCounts,
    MigrationCheck, MigrationPart, MigrationPhase, MigrationProgress, MigrationSide, NetConfig, VcpuCounts, VmConfig,
    VmInfo, ZoneCounts,
};

use crate::table::{Side, Table};
use crate::units::{bytes, clean, duration};

/// `vmm.ping`.
pub(crate) fn ping(body: &str) -> serde_json::Result<String> {
    let Identity {
        build_version,
        pid,
        features,
        ..
    } = serde_json::from_str(body)?;
    Ok(facts(&[
        ("Version", build_version),
        ("Process", pid.to_string()),
        ("Features", features.join(", ")),
    ]))
}

/// `vm.info`.
pub(crate) fn info(body: &str) -> serde_json::Result<String> {
    let VmInfo {
        config,
        state,
        memory_actual_size,
        device_tree,
        vcpus,
        memory: counts,
        memory_zones,
        links,
    } = serde_json::from_str(body)?;
    let cpus = &config.cpus;
    let mut lines = vec![
        ("State", state.name().to_owned()),
        ("vCPUs", processors(cpus, vcpus)),
        ("Memory", memory(&config, memory_actual_size, counts)),
    ];
    if let Some(payload) = &config.payload {
        let path = |path: &Option<std::path::PathBuf>| path.as_deref().map(shown);
        for (name, value) in [
            ("Kernel", path(&payload.kernel)),
            ("Firmware", path(&payload.firmware)),
            ("Initramfs", path(&payload.initramfs)),
            ("Command line", payload.cmdline.clone()),
        ] {
            lines.extend(value.map(|value| (name, value)));
        }
    }
    for (name, console) in [("Serial", &config.serial), ("Console", &config.console)] {
        lines.push((name, terminal(console)));
    }
    let mut text = facts(&lines);
    if !config.memory.zones().is_empty() {
        text.push('\n');
        text.push_str(&zones(&config, &memory_zones).text());
    }
    let devices = devices(&config, &device_tree);
    if !devices.is_empty() {
        text.push('\n');
        text.push_str(&devices.text());
    }
    if !links.is_empty() {
        text.push('\n');
        text.push_str(&daemons(&links).text());
    }
    Ok(text)
}

/// `vm.migration-progress`.
pub(crate) fn migration(body: &str) -> serde_json::Result<String> {
    let found: MigrationProgress = serde_json::from_str(body)?;
    let side = match found.side {
        MigrationSide::Source => "to",
        MigrationSide::Destination => "from",
    };
    let phase = match found.phase {
        MigrationPhase::Connecting => "connecting",
        MigrationPhase::Copying => "copying, the guest runs",
        MigrationPhase::HandingOver => "memory is handed over, the guest runs",
        MigrationPhase::Switching => "the guest stands still",
        MigrationPhase::Committed => "the guest was given away",
        MigrationPhase::PostCopy => "the guest runs there, and memory follows",
        MigrationPhase::PostCopyPaused => "the guest lacks memory there, and the connection is lost",
        MigrationPhase::Done => "done",
        MigrationPhase::Failed => "failed",
    };
    let mut lines = vec![
        ("Migration", format!("job {}, {side} {}", found.job, found.address)),
        ("Phase", phase.to_owned()),
        ("Time", format!("{:.1} s", found.elapsed_ms as f64 / 1e3)),
        ("Round", found.rounds.to_string()),
        ("Left", format!("{} of {}", bytes(found.remaining), bytes(found.total))),
        ("Sent", bytes(found.wire_bytes)),
        ("Rate", format!("{} a second", bytes(found.rate))),
        ("Written", format!("{} a second by the guest", bytes(found.dirty_rate))),
    ];
    if let Some(downtime) = found.downtime_ms {
        let what = match found.phase {
            MigrationPhase::Done | MigrationPhase::PostCopy | MigrationPhase::PostCopyPaused => "Stood still",
            _ => "Would stand still",
        };
        lines.push((what, format!("{downtime} ms")));
    }
    if found.throttle > 0 {
        lines.push(("Held", format!("{} % of the time", found.throttle)));
    }
    if let Some(cap) = found.bandwidth {
        lines.push(("Cap", format!("{} a second", bytes(cap))));
    }
    lines.extend(found.error.map(|error| ("Error", clean(&error))));
    Ok(facts(&lines))
}

/// `vm.check-migration`: a block of lines for each thing that is in the way.
pub(crate) fn check(check: &MigrationCheck) -> String {
    if check.blockers.is_empty() {
        return "Nothing is in the way.\n".to_owned();
    }
    let mut text = String::new();
    for blocker in &check.blockers {
        let what = match blocker.what {
            MigrationPart::Host => "host",
            MigrationPart::Cpu => "CPU",
            MigrationPart::Clock => "clock",
            MigrationPart::Memory => "memory",
            MigrationPart::Disk => "disk",
            MigrationPart::Device => "device",
            MigrationPart::Configuration => "configuration",
        };
        text.push_str(what);
        if let Some(name) = &blocker.name {
            text.push(' ');
            text.push_str(&clean(name));
        }
        text.push_str(&format!(": {}\n", clean(&blocker.reason)));
        if !blocker.remedy.is_empty() {
            text.push_str(&format!("    {}\n", clean(&blocker.remedy)));
        }
    }
    text
}

/// `2 of 4 at most`, and what is under way.
fn processors(cpus: &CpusConfig, counts: Option<VcpuCounts>) -> String {
    let mut text = format!("{} of {} at most", cpus.boot_vcpus, cpus.max_vcpus);
    if let Some(VcpuCounts {
        target,
        present,
        started,
    }) = counts
        && (target, present) != (started, started)
    {
        text.push_str(&format!("; it was given {present} and should have {target}"));
    }
    text
}

/// What each memory zone has, and what it can have.
fn zones(config: &VmConfig, counts: &[ZoneCounts]) -> Table {
    let mut table = Table::new(&[
        ("ZONE", Side::Left),
        ("MEMORY", Side::Left),
        ("TARGET", Side::Left),
        ("AT MOST", Side::Left),
    ]);
    for zone in config.memory.zones() {
        let told = counts.iter().find(|counts| counts.id == zone.id);
        let (actual, target) = told.map_or((zone.size, zone.size), |told| (told.actual, told.target));
        let most = zone.size.saturating_add(zone.hotplug_room());
        table.row([clean(&zone.id), bytes(actual), bytes(target), bytes(most)]);
    }
    table
}

fn memory(config: &VmConfig, actual: u64, counts: Option<MemoryCounts>) -> String {
    let memory = &config.memory;
    let mut text = bytes(actual);
    if actual != memory.boot_size() {
        text.push_str(&format!(" of {}", bytes(memory.boot_size())));
    }
    for (is, name) in [
        (memory.shared, "shared"),
        (memory.hugepages, "huge pages"),
        (memory.prefault, "prefaulted"),
        (memory.mergeable, "mergeable"),
    ] {
        if is {
            text.push_str(", ");
            text.push_str(name);
        }
    }
    if let Some(MemoryCounts { target, present, taken }) = counts
        && (target, present) != (taken, taken)
    {
        let (present, target) = (bytes(present), bytes(target));
        text.push_str(&format!("; it was given {present} and should have {target}"));
    }
    text
}

fn terminal(console: &ConsoleConfig) -> String {
    let place = console.file.as_deref().or(console.socket.as_deref());
    let mode = match console.mode {
        ConsoleMode::Off => "off",
        ConsoleMode::Null => "null",
        ConsoleMode::Pty => "pty",
        ConsoleMode::Tty => "tty",
        ConsoleMode::File => "file",
        ConsoleMode::Socket => "socket",
    };
    match place {
        Some(place) => format!("{mode} {}", shown(place)),
        None => mode.to_owned(),
    }
}

fn devices(config: &VmConfig, tree: &DeviceTree) -> Table {
    let mut table = Table::new(&[
        ("DEVICE", Side::Left),
        ("KIND", Side::Left),
        ("PCI", Side::Left),
        ("DETAILS", Side::Left),
    ]);
    let mut add = |id: &Option<String>, kind: &str, details: String| {
        // Without a guest a device is nowhere; in one it is behind a PCI function.
        let node = id.as_ref().and_then(|id| tree.get(id));
        let function = node.and_then(|node| tree.get(node.parent.as_ref()?));
        let place = [node, function]
            .into_iter()
            .flatten()
            .find_map(|node| node.pci_bdf.clone());
        let cells = [id.clone(), Some(kind.to_owned()), place, Some(details)];
        table.row(cells.map(|cell| cell.unwrap_or_else(|| "-".to_owned())));
    };
    for disk in config.disks.iter().flatten() {
        add(&disk.id, "disk", disk_details(disk));
    }
    for net in config.net.iter().flatten() {
        add(&net.id, "net", net_details(net));
    }
    for fs in config.fs.iter().flatten() {
        let queues = queues(fs.num_queues, fs.queue_size);
        add(&fs.id, "fs", format!("tag {}, {}, {queues}", fs.tag, shown(&fs.socket)));
    }
    for device in config.generic_vhost_user.iter().flatten() {
        let details = format!("type {}, {}", device.device_type, shown(&device.socket));
        add(&device.id, "vhost-user", details);
    }
    for device in config.devices.iter().flatten() {
        add(
            &device.id,
            "host",
            device.path.as_deref().map(shown).unwrap_or_default(),
        );
    }
    if let Some(vsock) = &config.vsock {
        add(
            &vsock.id,
            "vsock",
            format!("cid {}, {}", vsock.cid, shown(&vsock.socket)),
        );
    }
    table
}

/// How devices stand with the daemons that serve them.
fn daemons(links: &BTreeMap<String, DeviceLink>) -> Table {
    let mut table = Table::new(&[
        ("DEVICE", Side::Left),
        ("DAEMON", Side::Left),
        ("RECONNECTS", Side::Right),
        ("LAST REASON", Side::Left),
    ]);
    for (id, link) in links {
        let state = match link.state {
            LinkState::Connected if link.datapath == LinkPath::Direct => "connected, direct",
            LinkState::Connected => "connected, relay",
            LinkState::Disconnected => "gone, requests wait",
            LinkState::Failing => "gone, requests fail",
        };
        let reason = link.reason.clone().unwrap_or_else(|| "-".to_owned());
        table.row([id.clone(), state.to_owned(), link.reconnects.to_string(), reason]);
    }
    table
}

fn disk_details(disk: &DiskConfig) -> String {
    let place = disk.path.as_deref().or(disk.vhost_socket.as_deref());
    let mut parts = vec![place.map_or_else(|| "no file".to_owned(), shown)];
    if disk.readonly {
        parts.push("read-only".to_owned());
    }
    if disk.direct {
        parts.push("direct".to_owned());
    }
    parts.push(queues(disk.num_queues, disk.queue_size));
    parts.join(", ")
}

fn net_details(net: &NetConfig) -> String {
    let place = match (&net.tap, &net.vhost_socket) {
        (Some(tap), _) => tap.clone(),
        (None, Some(socket)) => format!("daemon at {}", shown(socket)),
        (None, None) => "tap of the client".to_owned(),
    };
    let mut parts = vec![place];
    parts.extend(net.mac.map(|mac| mac.to_string()));
    parts.extend(net.mtu.map(|mtu| format!("MTU {mtu}")));
    parts.push(queues(net.num_queues, net.queue_size));
    parts.join(", ")
}

fn queues(count: u16, size: u16) -> String {
    let plural = if count == 1 { "queue" } else { "queues" };
    format!("{count} {plural} of {size}")
}

/// `vm.counters`.
pub(crate) fn counters(body: &str) -> serde_json::Result<String> {
    let devices: BTreeMap<String, BTreeMap<String, u64>> = serde_json::from_str(body)?;
    if devices.values().all(BTreeMap::is_empty) {
        return Ok("No device counts anything now.\n".to_owned());
    }
    let mut table = Table::new(&[
        ("DEVICE", Side::Left),
        ("COUNTER", Side::Left),
        ("VALUE", Side::Right),
        ("", Side::Right),
    ]);
    for (device, counters) in devices {
        for (name, value) in counters {
            let human = match name.as_str() {
                name if name.ends_with("_bytes") && value >= 1024 => bytes(value),
                // Microseconds.
                name if name.contains("_latency_") && value >= 1000 => duration(value as f64 / 1e6),
                _ => String::new(),
            };
            table.row([device.clone(), name, value.to_string(), human]);
        }
    }
    Ok(table.text())
}

/// The answer to a device that was added: nothing before the boot, or where the guest has it.
pub(crate) fn added(body: &str) -> String {
    #[derive(Deserialize)]
    struct Added {
        id: String,
        bdf: String,
    }
    match serde_json::from_str::<Added>(body) {
        Ok(Added { id, bdf }) => clean(&format!("{id} at {bdf}")),
        Err(_) => body.to_owned(),
    }
}

/// Names and values below each other.
fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines = facts
        .iter()
        .map(|(name, value)| format!("{name:<width$}  {}\n", clean(value)));
    lines.collect()
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_shown_whole() {
        let body = r#"{"config":{"cpus":{"boot_vcpus":2,"max_vcpus":4},"memory":{"size":536870912,"shared":true},
            "payload":{"kernel":"/k","cmdline":"console=ttyS0"},
            "disks":[{"path":"/a.img","readonly":true,"id":"_disk0"},{"path":"/b.img","num_queues":2,"id":"data"}],
            "net":[{"tap":"tap0","mac":"12:34:56:78:9a:bc","mtu":1500,"id":"_net2"}],
            "serial":{"mode":"Pty","file":"/dev/pts/3"},"console":{"mode":"Off"},
            "vsock":{"cid":3,"socket":"/v.sock","id":"_vsock3"}},
            "state":"Running","memory_actual_size":268435456,"device_tree":{
            "_pci":{"id":"_pci","parent":null,"children":["_disk0"],"pci_bdf":"0000:00:02.0","resources":[]},
            "_disk0":{"id":"_disk0","parent":"_pci","children":[],"pci_bdf":null,"resources":[]}}}"#;
        assert_eq!(
            info(body).expect("a table"),
            "\
State         Running
vCPUs         2 of 4 at most
Memory        256 MiB of 512 MiB, shared
Kernel        /k
Command line  console=ttyS0
Serial        pty /dev/pts/3
Console       off

DEVICE   KIND   PCI           DETAILS
_disk0   disk   0000:00:02.0  /a.img, read-only, 1 queue of 128
data     disk   -             /b.img, 2 queues of 128
_net2    net    -             tap0, 12:34:56:78:9a:bc, MTU 1500, 2 queues of 256
_vsock3  vsock  -             cid 3, /v.sock
"
        );
        let growing = body.replace(
            r#""device_tree""#,
            r#""vcpus":{"target":4,"present":3,"started":2},"device_tree""#,
        );
        assert!(
            info(&growing)
                .expect("a table")
                .contains("vCPUs         2 of 4 at most; it was given 3 and should have 4\n")
        );
        let growing = body.replace(
            r#""device_tree""#,
            r#""memory":{"target":1073741824,"present":805306368,"taken":536870912},"device_tree""#,
        );
        let text = info(&growing).expect("a table");
        assert!(
            text.contains("shared; it was given 768 MiB and should have 1 GiB\n"),
            "{text}"
        );
        let zoned = r#"{"config":{"memory":{"size":0,"zones":[{"id":"a","size":1073741824,"hotplug_size":2147483648},
            {"id":"b","size":1073741824}]}},"state":"Running","memory_actual_size":2684354560,
            "memory_zones":[{"id":"a","target":2147483648,"actual":1610612736}]}"#;
        let text = info(zoned).expect("a table");
        let table = "ZONE  MEMORY   TARGET  AT MOST\na     1.5 GiB  2 GiB   3 GiB\nb     1 GiB    1 GiB   1 GiB\n";
        assert!(text.contains(table) && text.contains("2.5 GiB of 2 GiB"), "{text}");
        let bare = r#"{"config":{},"state":"Created","memory_actual_size":536870912}"#;
        let text = info(bare).expect("a table");
        assert!(
            text.contains("Memory   512 MiB\n") && !text.contains("DEVICE"),
            "{text}"
        );
        assert!(info("{}").is_err());
    }

    #[test]
    fn counters_are_shown_as_they_are_and_readable() {
        let body = r#"{"_net1":{"rx_frames":1},"_disk0":{"read_bytes":1048576,"read_ops":16,"read_latency_avg":2100}}"#;
        assert_eq!(
            counters(body).expect("a table"),
            "\
DEVICE  COUNTER             VALUE
_disk0  read_bytes        1048576   1 MiB
_disk0  read_latency_avg     2100  2.1 ms
_disk0  read_ops               16
_net1   rx_frames               1
"
        );
        assert!(counters("{}").expect("text").starts_with("No device"));
    }

    #[test]
    fn who_answers_and_what_was_added() {
        let body = r#"{"build_version":"v0.1.0-3","version":"0.1.0","pid":42,"features":["kvm"]}"#;
        let expected = "Version   v0.1.0-3\nProcess   42\nFeatures  kvm\n";
        assert_eq!(ping(body).expect("a table"), expected);
        assert_eq!(
            added(r#"{"id":"_disk3","bdf":"0000:00:04.0"}"#),
            "_disk3 at 0000:00:04.0"
        );
        assert_eq!(added(""), "");
    }
}
