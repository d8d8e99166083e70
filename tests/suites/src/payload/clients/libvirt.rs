//! libvirt's ch driver: libcurl for most, and a raw socket for network interfaces.

use super::{Field, MEMORY, PATIENCE, required, state};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};
use triarch_harness::wire::Wire;

/// Bytes of the one receive, and how long it waits.
const RECEIVE: usize = 1023;
const POLL: Duration = Duration::from_millis(500);

pub(super) fn drive(field: &mut Field) -> Result<()> {
    let mut curl = Curl(Wire::connect(&field.socket, PATIENCE)?);
    curl.get("vmm.ping", false)?;
    let (console, kernel, disk) = (r#"{"mode":"Pty"}"#, &field.kernel, &field.disk);
    let create = format!(
        r#"{{"console":{console},"serial":{{"mode":"Pty"}},"cpus":{{"boot_vcpus":1,"max_vcpus":2}},"memory":{{"size":{MEMORY}}},"payload":{{"kernel":"{kernel}","cmdline":"console=ttyS0"}},"disks":[{{"path":"{disk}","readonly":true}}]}}"#
    );
    curl.put_json("vm.create", &create)?;
    let fds: Vec<_> = field.tap.iter().map(AsFd::as_fd).collect();
    add_net(&field.socket, &fds)?;
    field.tap.clear();
    curl.put("vm.boot")?;
    let info = curl.get("vm.info", true)?;
    state(&info, "Running")?;
    ensure!(info["config"]["net"][0]["id"] == "net_0", "{info}");
    // Where virsh console goes.
    for device in ["serial", "console"] {
        let path = required(&info, &format!("/config/{device}/file"), Value::is_string)?;
        let path = path.as_str().unwrap_or_default();
        ensure!(fs::metadata(path).is_ok(), "{device}: there is no {path}");
    }
    threads(field.vm.pid())?;
    curl.put("vm.pause")?;
    state(&curl.get("vm.info", true)?, "Paused")?;
    curl.put("vm.resume")?;
    curl.put("vm.reboot")?;
    state(&curl.get("vm.info", true)?, "Running")?;
    curl.put("vm.shutdown")?;
    curl.put("vmm.shutdown")
}

/// The driver pins vCPUs by the names of their threads.
fn threads(pid: u32) -> Result<()> {
    let mut names = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        names.push(fs::read_to_string(thread?.path().join("comm"))?.trim().to_owned());
    }
    let vcpu = names
        .iter()
        .filter_map(|name| name.strip_prefix("vcpu")?.parse::<u32>().ok());
    ensure!(vcpu.eq([0]), "{names:?}");
    Ok(())
}

/// One sendmsg with the text and the descriptors; one receive, of which only the first line is read.
fn add_net(socket: &Path, fds: &[BorrowedFd<'_>]) -> Result<()> {
    let body = r#"{"id":"net_0","mac":"52:54:00:e3:f0:11","num_queues":2,"mtu":1500}"#;
    let request = format!(
        "PUT /api/v1/vm.add-net HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut wire = Wire::connect(socket, POLL)?;
    wire.send_with(request.as_bytes(), fds)?;
    let since = Instant::now();
    let answer = wire.read_some(RECEIVE).context("poll timed out")?;
    ensure!(since.elapsed() <= POLL, "poll timed out");
    // sscanf(answer, "HTTP/1.%*d %d").
    let text = String::from_utf8_lossy(&answer).into_owned();
    let status = text
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split_whitespace().nth(1));
    ensure!(
        matches!(status, Some("200" | "204")),
        "unexpected response from CH: {text}"
    );
    // The next request on this connection must not meet the rest of this answer.
    ensure!(text.ends_with("\r\n\r\n"), "{text}");
    Ok(())
}

/// A libcurl handle: one connection as long as the server keeps it.
struct Curl(Wire);

impl Curl {
    fn get(&mut self, route: &str, json: bool) -> Result<Value> {
        let fields = match json {
            true => "Accept: application/json\r\nContent-Type: application/json\r\n",
            false => "Accept: */*\r\n",
        };
        let (status, body) = self.call(&format!(
            "GET /api/v1/{route} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n"
        ))?;
        ensure!(status == 200 || status == 204, "{route}: {status} {body}");
        Ok(serde_json::from_str(&body)?)
    }

    /// An upload of nothing.
    fn put(&mut self, route: &str) -> Result<()> {
        let head = format!(
            "PUT /api/v1/{route} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\nContent-Length: 0\r\n\r\n"
        );
        let (status, body) = self.call(&head)?;
        ensure!(status == 200 || status == 204, "{route}: {status} {body}");
        Ok(())
    }

    fn put_json(&mut self, route: &str, body: &str) -> Result<()> {
        let (status, answer) = self.call(&format!(
            "PUT /api/v1/{route} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        ))?;
        ensure!(status == 200 || status == 204, "{route}: {status} {answer}");
        Ok(())
    }

    fn call(&mut self, request: &str) -> Result<(u16, String)> {
        self.0.send(request.as_bytes())?;
        let mut text = String::new();
        loop {
            let more = self.0.read_some(16384)?;
            ensure!(!more.is_empty(), "server returned nothing (no headers, no data)");
            text.push_str(std::str::from_utf8(&more)?);
            let Some((head, body)) = text.split_once("\r\n\r\n") else {
                continue;
            };
            let length = head.split("\r\n").find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length")
                    .then(|| value.trim().parse::<usize>())
            });
            let status = head.split_whitespace().nth(1).context("no status")?.parse()?;
            match length.transpose()? {
                None if status == 204 => return Ok((status, String::new())),
                Some(length) if body.len() >= length => return Ok((status, body[..length].to_owned())),
                Some(_) => {}
                None => anyhow::bail!("a body of unknown length: {head}"),
            }
        }
    }
}
