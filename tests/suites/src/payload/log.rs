//! The VMM's log: what it looks like, and what cannot stop the VMM.

use super::ends::signal;
use super::guest::{Guest, builder};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::api::Api;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("log":
    begins_anew_after_a_hang_up,
    has_levels_by_module,
    does_not_need_its_disk,
    does_not_wait_for_its_reader,
);

const SOON: Duration = Duration::from_secs(5);

/// Waits until the file has `text`, and returns all that it has.
fn wait_for(path: &Path, text: &str) -> Result<String> {
    let deadline = Instant::now() + SOON;
    loop {
        let content = fs::read_to_string(path).unwrap_or_default();
        if content.contains(text) && content.ends_with('\n') {
            return Ok(content);
        }
        ensure!(
            Instant::now() < deadline,
            "no `{text}` in {}: {content}",
            path.display()
        );
        thread::sleep(Duration::from_millis(2));
    }
}

fn records(text: &str) -> Result<Vec<Value>> {
    let parse = |line| serde_json::from_str(line).with_context(|| format!("`{line}` is no JSON"));
    text.lines().map(parse).collect()
}

fn begins_anew_after_a_hang_up(context: &Context) -> Result<Outcome> {
    let log = context.dir.join("log");
    let vm = builder(context)?.api().flag("--log-file", &log);
    let vm = vm.flag("--log-format", "json").flag("--log-level", "info");
    let mut guest = Guest::start(vm)?;
    guest.vm().pause()?;
    let old = context.dir.join("log.1");
    fs::rename(&log, &old)?;
    guest.vm().resume()?;
    signal(&guest, "HUP")?;
    wait_for(&log, "new file")?;
    guest.vm().api()?.put("vm.reboot", None)?;
    guest.wait_ready()?;
    let ended = guest.power_off()?;
    ensure!(ended.stderr.is_empty(), "beside the file: {}", ended.stderr);
    let (old, new) = (fs::read_to_string(&old)?, fs::read_to_string(&log)?);
    for (text, has, lacks) in [(&old, "vm.resume", "vm.reboot"), (&new, "vm.reboot", "vm.resume")] {
        ensure!(text.contains(has) && !text.contains(lacks), "{text}");
        for record in records(text)? {
            let time = record["timestamp"].as_str().unwrap_or_default();
            ensure!(
                time.len() > 20 && &time[10..11] == "T" && time.ends_with('Z'),
                "{record}"
            );
            ensure!(record["level"] == "INFO", "{record}");
            ensure!(
                record["target"].as_str().is_some_and(|t| t.starts_with("triarch")),
                "{record}"
            );
            ensure!(record["message"].is_string(), "{record}");
        }
    }
    Ok(Outcome::Passed)
}

fn has_levels_by_module(context: &Context) -> Result<Outcome> {
    for (flags, api, machine) in [
        ("error", false, false),
        ("info", true, true),
        ("warn,machine=info", false, true),
        ("info,machine=off", true, false),
    ] {
        let guest = Guest::start(builder(context)?.api().flag("--log-level", flags))?;
        guest.vm().pause()?;
        guest.vm().resume()?;
        let stderr = guest.power_off()?.stderr;
        let has = |module: &str| {
            stderr
                .lines()
                .any(|line| line.contains(&format!(" INFO triarch_{module}::")))
        };
        ensure!((has("api"), has("machine")) == (api, machine), "with {flags}: {stderr}");
    }
    Ok(Outcome::Passed)
}

fn does_not_need_its_disk(context: &Context) -> Result<Outcome> {
    let log = context.dir.join("log");
    std::os::unix::fs::symlink("/dev/full", &log)?;
    let vm = builder(context)?
        .api()
        .flag("--log-file", &log)
        .flag("--log-level", "info");
    let mut guest = Guest::start(vm)?;
    guest.vm().pause()?;
    guest.vm().resume()?;
    guest.ask("hello")?;
    // Somebody makes room.
    fs::remove_file(&log)?;
    signal(&guest, "HUP")?;
    let text = wait_for(&log, "new file")?;
    let first = text.lines().next().unwrap_or_default();
    ensure!(first.contains("log lines were lost lines="), "{text}");
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn does_not_wait_for_its_reader(context: &Context) -> Result<Outcome> {
    let dir = context.dir.join("vm");
    fs::create_dir(&dir)?;
    let socket = dir.join("api.sock");
    for gone in [false, true] {
        let mut child = Command::new(&context.triarch)
            .args([
                "--log-level",
                "info",
                "--log-format",
                "json",
                "--console",
                "off",
                "--kernel",
            ])
            .arg(context.images.path("triarch-payload")?)
            .arg("--api-socket")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        if gone {
            drop(child.stderr.take());
        }
        let api = Api::new(&socket);
        // Four lines each, more than a pipe holds.
        for _ in 0..150 {
            api.put("vm.pause", None)?;
            api.put("vm.resume", None)?;
        }
        api.put("vmm.shutdown", None)?;
        let status = child.wait()?;
        ensure!(status.success(), "without a reader: {gone}: {status}");
        if let Some(mut stderr) = child.stderr.take() {
            let mut text = String::new();
            std::io::Read::read_to_string(&mut stderr, &mut text)?;
            ensure!(text.len() > 60_000, "the pipe was not full: {} bytes", text.len());
            records(&text)?;
        }
    }
    Ok(Outcome::Passed)
}
