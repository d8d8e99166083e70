//! Kata's runtime in Go: a client generated from Cloud Hypervisor's OpenAPI file, on Go's net/http. Its maps are written sorted by key.

use super::{Field, MEMORY, PATIENCE, required, state, within};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};
use triarch_harness::wire::Wire;

/// Time the runtime gives a request, and those that build a VM.
const SHORT: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(10);

pub(super) fn drive(field: &mut Field) -> Result<()> {
    let mut client = Client::connect(&field.socket)?;
    let ping = client.get("vmm.ping")?;
    required(&ping, "/version", Value::is_string)?;
    required(&ping, "/pid", Value::is_i64)?;
    client.put("vm.create", Some(&create(field)), LONG)?;
    state(&info(&mut client)?, "Created")?;
    add_net(field)?;
    client.put("vm.boot", None, LONG)?;
    let booted = info(&mut client)?;
    state(&booted, "Running")?;
    ensure!(booted["config"]["net"][0]["mac"] == "02:42:ac:11:00:02", "{booted}");
    field.wait_for_guest()?;

    // The number that the VM has, asked for as often as the runtime likes; another one is answered before the guest has it.
    let vcpus = booted["config"]["cpus"]["boot_vcpus"].clone();
    client.put("vm.resize", Some(&json!({ "desired_vcpus": vcpus })), SHORT)?;
    client.put("vm.resize", Some(&json!({ "desired_vcpus": vcpus })), SHORT)?;
    client.put(
        "vm.resize",
        Some(&json!({ "desired_ram": booted["config"]["memory"]["size"] })),
        SHORT,
    )?;
    client.put("vm.resize", Some(&json!({ "desired_vcpus": 2 })), SHORT)?;
    client.put("vm.resize", Some(&json!({ "desired_vcpus": vcpus })), SHORT)?;
    let (status, body) = client.call("PUT", "vm.resize", Some(&json!({ "desired_vcpus": 5 })))?;
    ensure!(status == 400 && body["error"].is_string(), "{status} {body}");
    // The runtime repeats a resize for ever when it reads this.
    ensure!(!body.to_string().contains("Too Many Requests"), "{body}");

    client.put("vm.pause", None, SHORT)?;
    state(&info(&mut client)?, "Paused")?;
    client.put("vm.resume", None, SHORT)?;
    state(&info(&mut client)?, "Running")?;
    client.put("vm.shutdown", None, SHORT)?;
    state(&info(&mut client)?, "Shutdown")?;
    client.put("vmm.shutdown", None, SHORT)
}

/// What the generated types insist on: a missing or a null number is an error of the decoder, or a zero that the runtime computes with.
fn info(client: &mut Client) -> Result<Value> {
    let info = client.get("vm.info")?;
    for pointer in ["/config/cpus/boot_vcpus", "/config/cpus/max_vcpus"] {
        required(&info, pointer, |v| v.as_i64().is_some_and(|n| i32::try_from(n).is_ok()))?;
    }
    for pointer in [
        "/config/memory/size",
        "/config/memory/hotplug_size",
        "/memory_actual_size",
    ] {
        required(&info, pointer, Value::is_i64)?;
    }
    required(&info, "/config/payload", Value::is_object)?;
    required(&info, "/config/serial/mode", Value::is_string)?;
    required(&info, "/config/rng/src", Value::is_string)?;
    required(&info, "/state", Value::is_string)?;
    Ok(info)
}

/// The configuration of a sandbox with its root image and the serial port on, as with debugging.
fn create(field: &Field) -> Value {
    json!({
        "cpus": {
            "boot_vcpus": 1, "max_vcpus": 4, "kvm_hyperv": false, "nested": true,
            "topology": { "threads_per_core": 1, "cores_per_die": 4, "dies_per_package": 1, "packages": 1 },
        },
        "memory": {
            "size": MEMORY, "hotplug_size": 2_147_483_648_u64, "hotplug_method": "Acpi", "mergeable": false, "shared": true,
            "hugepages": false, "prefault": false, "thp": true,
        },
        "payload": { "kernel": field.kernel, "cmdline": "root=/dev/vda1 rootflags=ro console=ttyS0" },
        "disks": [{
            "path": field.disk, "readonly": true, "direct": false, "iommu": false, "num_queues": 1, "queue_size": 128,
            "vhost_user": false, "backing_files": false, "sparse": true, "image_type": "Raw",
        }],
        "rng": { "src": "/dev/urandom", "iommu": false },
        "serial": { "mode": "Tty", "iommu": false },
        "console": { "mode": "Off", "iommu": false },
        "vsock": { "cid": 3, "socket": field.path("clh.sock"), "iommu": false },
        "platform": { "num_pci_segments": 2, "tdx": false, "sev_snp": false },
        "iommu": false, "watchdog": false, "pvpanic": false, "landlock_enable": false,
    })
}

/// On a connection of its own: one sendmsg with the whole request as `httputil.DumpRequest` prints it, and the descriptors.
fn add_net(field: &mut Field) -> Result<()> {
    let body = json!({
        "ip": "192.168.249.1", "mask": "255.255.255.0", "mac": "02:42:ac:11:00:02", "iommu": false, "num_queues": 4, "queue_size": 256,
        "vhost_user": false, "vhost_mode": "Client", "offload_tso": true, "offload_ufo": true, "offload_csum": true,
    })
    .to_string();
    let request = format!(
        "PUT /api/v1/vm.add-net HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\nContent-Length: {}\r\n\
         Content-Type: application/json\r\n\r\n{body}",
        body.len()
    );
    let mut wire = Wire::connect(&field.socket, PATIENCE)?;
    let fds: Vec<_> = field.tap.iter().map(AsFd::as_fd).collect();
    wire.send_with(request.as_bytes(), &fds)?;
    // The runtime closes its own when the pod's network is set up.
    field.tap.clear();
    let (status, body) = read_response(&mut wire)?;
    ensure!(status == 204, "vm.add-net: {status} {body}");
    Ok(())
}

/// An `http.Client`: one connection, used again and again.
struct Client(Wire);

impl Client {
    fn connect(socket: &Path) -> Result<Self> {
        Ok(Self(Wire::connect(socket, PATIENCE)?))
    }

    fn get(&mut self, route: &str) -> Result<Value> {
        let since = Instant::now();
        let (status, body) = self.call("GET", route, None)?;
        ensure!(status == 200, "{route}: {status} {body}");
        within(route, SHORT, since)?;
        Ok(body)
    }

    fn put(&mut self, route: &str, body: Option<&Value>, patience: Duration) -> Result<()> {
        let since = Instant::now();
        let (status, answer) = self.call("PUT", route, body)?;
        // Whatever is less than 300 is a success to the generated code.
        ensure!(status < 300, "{route}: {status} {answer}");
        within(route, patience, since)
    }

    /// Go writes Host, User-Agent, the length, then the fields of its map in their order, and what its transport adds.
    fn call(&mut self, method: &str, route: &str, body: Option<&Value>) -> Result<(u16, Value)> {
        let mut request = format!("{method} /api/v1/{route} HTTP/1.1\r\nHost: localhost\r\n");
        request += "User-Agent: OpenAPI-Generator/1.0.0/go\r\n";
        // json.Encoder ends with a newline, which counts.
        let text = body.map(|body| format!("{body}\n")).unwrap_or_default();
        match method {
            "GET" => request += "Accept: application/json\r\n",
            _ => request += &format!("Content-Length: {}\r\n", text.len()),
        }
        if body.is_some() {
            request += "Content-Type: application/json\r\n";
        }
        request += "Accept-Encoding: gzip\r\n\r\n";
        request += &text;
        self.0.send(request.as_bytes())?;
        read_response(&mut self.0).with_context(|| format!("{method} {route}"))
    }
}

/// As `http.ReadResponse` and `io.ReadAll`: the head line by line, then as many bytes as it says, and nothing behind them.
fn read_response(wire: &mut Wire) -> Result<(u16, Value)> {
    let mut data = Vec::new();
    let end = loop {
        if let Some(at) = data.windows(4).position(|w| w == b"\r\n\r\n") {
            break at;
        }
        let more = wire.read_some(4096)?;
        ensure!(!more.is_empty(), "unexpected EOF");
        data.extend(more);
    };
    let head = std::str::from_utf8(&data[..end])?;
    let mut lines = head.split("\r\n");
    let status_line = lines.next().unwrap_or_default();
    let (version, status) = status_line.split_once(' ').context("malformed HTTP response")?;
    let code = status.trim_start().split(' ').next().unwrap_or_default();
    ensure!(
        version == "HTTP/1.1" && code.len() == 3,
        "malformed HTTP status code in `{status_line}`"
    );
    let code = code.parse()?;
    let (mut length, mut json) = (0, false);
    for line in lines {
        let (name, value) = line
            .split_once(':')
            .with_context(|| format!("malformed MIME header line `{line}`"))?;
        ensure!(
            !name.is_empty() && !name.contains(' '),
            "malformed MIME header line `{line}`"
        );
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse::<usize>()?,
            "content-type" => json = value.contains("json"),
            "transfer-encoding" => bail!("{line}"),
            _ => {}
        }
    }
    let mut body = data.split_off(end + 4);
    while body.len() < length {
        let more = wire.read_some(4096)?;
        ensure!(!more.is_empty(), "unexpected EOF");
        body.extend(more);
    }
    ensure!(body.len() == length, "bytes behind the response: {:?}", &body[length..]);
    if body.is_empty() {
        return Ok((code, Value::Null));
    }
    // The decoder goes by the type.
    ensure!(json, "undefined response type");
    Ok((code, serde_json::from_slice(&body)?))
}
