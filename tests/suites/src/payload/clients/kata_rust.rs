//! Kata's runtime in Rust: Cloud Hypervisor's own client library, which ch-remote uses as well. One connection for everything; requests
//! go out in several writes, descriptors with the first.

use super::{Field, MEMORY, PATIENCE, required, state};
use anyhow::{Context as _, Result};
use serde_json::Value;
use std::os::fd::{AsFd, BorrowedFd};
use triarch_harness::wire::Wire;

pub(super) fn drive(field: &mut Field) -> Result<()> {
    let mut wire = Wire::connect(&field.socket, PATIENCE)?;
    call(&mut wire, "GET", "vmm.ping", None, &[])?.context("vmm.ping tells nothing")?;
    call(&mut wire, "PUT", "vm.create", Some(&create(field)), &[])?;
    let fds: Vec<_> = field.tap.iter().map(AsFd::as_fd).collect();
    // Numbers of the runtime's own descriptors, which mean nothing here.
    let net = r#"{"ip":"192.168.249.1","mask":"255.255.255.0","mac":"02:42:ac:11:00:03","iommu":false,"num_queues":2,"queue_size":256,"vhost_user":false,"vhost_mode":"Client","fds":[41]}"#;
    call(&mut wire, "PUT", "vm.add-net", Some(net), &fds)?;
    field.tap.clear();
    call(&mut wire, "PUT", "vm.boot", None, &[])?;
    state(&info(&mut wire)?, "Running")?;
    field.wait_for_guest()?;

    let same = format!(r#"{{"desired_vcpus":1,"desired_ram":{MEMORY},"desired_balloon":null}}"#);
    call(&mut wire, "PUT", "vm.resize", Some(&same), &[])?;
    let more = r#"{"desired_vcpus":2,"desired_ram":null,"desired_balloon":null}"#;
    call(&mut wire, "PUT", "vm.resize", Some(more), &[])?;
    // The guest did not look at it, so it is taken back at once.
    call(&mut wire, "PUT", "vm.resize", Some(&same), &[])?;

    call(&mut wire, "PUT", "vm.pause", None, &[])?;
    state(&info(&mut wire)?, "Paused")?;
    call(&mut wire, "PUT", "vm.resume", None, &[])?;
    state(&info(&mut wire)?, "Running")?;
    call(&mut wire, "PUT", "vm.shutdown", None, &[])?;
    state(&info(&mut wire)?, "Shutdown")?;
    call(&mut wire, "PUT", "vmm.shutdown", None, &[]).map(drop)
}

/// The fields without which the runtime's types cannot be made from the answer.
fn info(wire: &mut Wire) -> Result<Value> {
    let text = call(wire, "GET", "vm.info", None, &[])?.context("failed to get vminfo")?;
    let info: Value = serde_json::from_str(&text)?;
    let up_to = |greatest: u64| move |v: &Value| v.as_u64().is_some_and(|n| n <= greatest);
    for (pointer, greatest) in [
        ("/config/cpus/boot_vcpus", u32::MAX.into()),
        ("/config/cpus/max_vcpus", u32::MAX.into()),
        ("/config/cpus/max_phys_bits", u8::MAX.into()),
        ("/config/memory/size", u64::MAX),
        ("/config/memory/hotplug_size", u64::MAX),
        ("/config/disks/0/num_queues", u64::MAX),
        ("/config/disks/0/queue_size", u16::MAX.into()),
        ("/config/vsock/cid", u32::MAX.into()),
        ("/memory_actual_size", u64::MAX),
    ] {
        required(&info, pointer, up_to(greatest))?;
    }
    for pointer in [
        "/config/rng/src",
        "/config/vsock/socket",
        "/config/disks/0/path",
        "/config/net/0/mac",
        "/state",
    ] {
        required(&info, pointer, Value::is_string)?;
    }
    for pointer in ["/config/net/0/ip", "/config/net/0/mask"] {
        required(&info, pointer, |v| {
            v.as_str()
                .is_some_and(|text| text.parse::<std::net::Ipv4Addr>().is_ok())
        })?;
    }
    for pointer in ["/config/serial/mode", "/config/console/mode"] {
        required(&info, pointer, |v| {
            matches!(v.as_str(), Some("Off" | "Pty" | "Tty" | "File" | "Null"))
        })?;
    }
    required(&info, "/config/disks/0/image_type", |v| {
        matches!(v.as_str(), Some("FixedVhd" | "Qcow2" | "Raw" | "Vhdx" | "Unknown"))
    })?;
    Ok(info)
}

/// In the order of the runtime's structs.
fn create(field: &Field) -> String {
    let (kernel, disk, vsock) = (&field.kernel, &field.disk, field.path("ch-vm.sock"));
    [
        r#"{"cpus":{"boot_vcpus":1,"max_vcpus":4,"topology":{"threads_per_core":1,"cores_per_die":4,"dies_per_package":1,"packages":1},"#,
        r#""kvm_hyperv":false,"max_phys_bits":46,"features":{"amx":false}},"#,
        &format!(r#""memory":{{"size":{MEMORY},"mergeable":false,"hotplug_method":"Acpi","hotplug_size":2147483648,"#),
        r#""shared":true,"hugepages":false,"prefault":false},"#,
        &format!(r#""payload":{{"firmware":null,"kernel":"{kernel}","cmdline":"root=/dev/vda1 console=ttyS0","#),
        r#""initramfs":null,"mrconfigid":null,"host_data":null},"#,
        &format!(r#""disks":[{{"path":"{disk}","readonly":true,"direct":false,"iommu":false,"num_queues":1,"queue_size":128,"#),
        r#""vhost_user":false,"vhost_socket":null,"rate_limiter_config":null,"id":null,"disable_io_uring":false,"pci_segment":0,"#,
        r#""sparse":true,"image_type":"Unknown"}],"rng":{"src":"/dev/urandom","iommu":false},"#,
        r#""serial":{"file":null,"mode":"Tty","iommu":false},"console":{"file":null,"mode":"Off","iommu":false},"#,
        &format!(r#""vsock":{{"cid":3,"socket":"{vsock}","iommu":false,"id":null,"pci_segment":0}},"iommu":false,"watchdog":false}}"#),
    ]
    .concat()
}

/// One request; the body of its answer, if it has one. An error is what the library makes of a status that is no success.
fn call(
    wire: &mut Wire,
    method: &str,
    route: &str,
    body: Option<&str>,
    fds: &[BorrowedFd<'_>],
) -> Result<Option<String>> {
    let head = format!("{method} /api/v1/{route} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
    wire.send_with(head.as_bytes(), fds)?;
    if let Some(body) = body {
        wire.send(format!("Content-Length: {}\r\n", body.len()).as_bytes())?;
    }
    wire.send(b"\r\n")?;
    if let Some(body) = body {
        wire.send(body.as_bytes())?;
    }
    let (status, body) = read_response(wire).with_context(|| format!("{method} {route}"))?;
    match status {
        100 | 200 | 204 => Ok(body),
        other => anyhow::bail!("{other}: {}", body.unwrap_or_default()),
    }
}

/// Portions of 256 bytes, each text by itself; a header is found by its exact spelling wherever it stands; what stands between the
/// version and the end of the line has to be a number.
fn read_response(wire: &mut Wire) -> Result<(u16, Option<String>)> {
    let mut text = String::new();
    let (mut start, mut length) = (None, None::<usize>);
    loop {
        let portion = wire.read_some(256)?;
        if portion.is_empty() {
            break;
        }
        text.push_str(std::str::from_utf8(&portion)?);
        if let Some(end) = text.find("\r\n\r\n") {
            start = Some(end + 4);
            length = header(&text, "Content-Length")
                .map(|value| value.trim().parse())
                .transpose()?;
            if length.is_none() {
                break;
            }
        }
        if let (Some(start), Some(length)) = (start, length)
            && text.len() >= start + length
        {
            break;
        }
    }
    let at = text.find("HTTP/1.1").context("missing protocol")?;
    let line = text[at..].split('\r').next().unwrap_or_default();
    let number = line["HTTP/1.1".len()..].trim();
    let status = number
        .parse()
        .with_context(|| format!("status code parsing: `{number}`"))?;
    let body = length.and(start).map(|start| text[start..].to_owned());
    Ok((status, body))
}

fn header<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let at = text.find(&format!("{name}: "))? + name.len() + 2;
    text[at..].split('\r').next()
}
