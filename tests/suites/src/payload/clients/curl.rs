//! The real curl, with the options that libvirt's ch driver sets in libcurl.

use super::{Field, MEMORY, required, state};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use triarch_harness::wire::Wire;

/// Whether it is installed.
pub fn exists() -> bool {
    let version = Command::new("curl").arg("--version").stdout(Stdio::null()).status();
    version.is_ok_and(|status| status.success())
}

/// What curl got.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub content_type: String,
    pub body: String,
}

/// Calls curl with `options` for `/api/v1/ROUTE` on `socket`.
///
/// # Errors
/// curl failed.
pub fn curl(socket: &Path, route: &str, options: &[&str]) -> Result<Answer> {
    // Behind the body, on a line of its own.
    let wanted = "\n%{http_code} %{content_type}";
    let output = Command::new("curl")
        .args([
            "--silent",
            "--show-error",
            "--max-time",
            "10",
            "--write-out",
            wanted,
            "--unix-socket",
        ])
        .arg(socket)
        .args(options)
        .arg(format!("http://localhost/api/v1/{route}"))
        .stdin(Stdio::null())
        .output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "curl {route}: {} {errors}", output.status);
    let text = String::from_utf8(output.stdout)?;
    let (body, figures) = text.rsplit_once('\n').context("curl printed nothing")?;
    let (status, content_type) = figures.split_once(' ').context("curl printed something else")?;
    Ok(Answer {
        status: status.parse()?,
        content_type: content_type.to_owned(),
        body: body.to_owned(),
    })
}

pub(super) fn drive(field: &mut Field) -> Result<()> {
    let socket = field.socket.clone();
    let done = |route: &str, options: &[&str]| -> Result<()> {
        let answer = curl(&socket, route, options)?;
        ensure!(answer.status == 204, "{route}: {answer:?}");
        Ok(())
    };
    let accept = ["-H", "Accept: application/json"];
    let content = ["-H", "Content-Type: application/json"];
    let info = || -> Result<Value> {
        let answer = curl(&socket, "vm.info", &[accept, content].concat())?;
        ensure!(answer.status == 200, "{answer:?}");
        Ok(serde_json::from_str(&answer.body)?)
    };
    let create = json!({
        "console": { "mode": "Pty" }, "serial": { "mode": "Tty" }, "cpus": { "boot_vcpus": 1, "max_vcpus": 1 },
        "memory": { "size": MEMORY }, "payload": { "kernel": field.kernel }, "disks": [{ "path": field.disk }],
    })
    .to_string();
    done(
        "vm.create",
        &[&accept[..], &content, &["-X", "PUT", "-d", &create]].concat(),
    )?;
    // curl cannot pass descriptors.
    let mut wire = Wire::connect(&socket, super::PATIENCE)?;
    let body = r#"{"id":"net_0"}"#;
    let request = format!(
        "PUT /api/v1/vm.add-net HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    wire.send_with(request.as_bytes(), &[field.tap[0].as_fd()])?;
    ensure!(wire.read_some(1023)?.starts_with(b"HTTP/1.1 204 "));
    // An upload of nothing.
    let nothing = field.path("nothing");
    fs::write(&nothing, "")?;
    let upload = [&accept[..], &["-T", &nothing]].concat();
    done("vm.boot", &upload)?;
    let booted = info()?;
    state(&booted, "Running")?;
    required(&booted, "/config/console/file", Value::is_string)?;
    field.wait_for_guest()?;
    done("vm.resize", &["-X", "PUT", "-d", r#"{"desired_vcpus":1}"#])?;
    let other = curl(&socket, "vm.resize", &["-X", "PUT", "-d", r#"{"desired_vcpus":2}"#])?;
    ensure!(other.status == 501 || other.status == 400, "{other:?}");
    done("vm.pause", &upload)?;
    state(&info()?, "Paused")?;
    done("vm.resume", &upload)?;
    done("vm.shutdown", &upload)?;
    state(&info()?, "Shutdown")?;
    done("vmm.shutdown", &upload)
}
