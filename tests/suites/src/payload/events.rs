//! What a VMM tells of itself: events, jobs, and who asked for what.

use super::guest::{Guest, builder};
use super::payload_tests;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::api::Api;
use triarch_harness::disk::DiskImage;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("events":
    tell_a_whole_life_in_order,
    go_to_an_inherited_descriptor,
    wait_for_nobody_at_a_named_pipe,
    do_not_drown_in_what_a_guest_does,
    include_jobs,
    tell_why_a_boot_failed,
    have_an_audit_line_for_each_call,
    have_an_audit_log_that_rotates,
    have_audit_lines_for_a_daemon_that_was_restarted,
);

const PATIENCE: Duration = Duration::from_secs(10);

/// Begins to follow all events of a VMM, by the API.
fn follow(api: &Api) -> Result<BufReader<UnixStream>> {
    let mut stream = UnixStream::connect(api.socket())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "GET /api/v1/vm.events?since=0 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    )?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        ensure!(reader.read_line(&mut line)? > 0, "the connection was closed");
        ensure!(!line.contains("Content-Length"), "a stream has no length");
    }
    Ok(reader)
}

fn json(text: &str) -> Result<Value> {
    serde_json::from_str(text).with_context(|| format!("not JSON: {text}"))
}

/// `source event`, with the device or kind of job it is of.
fn name(event: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (source, event, properties) = (text(&event["source"]), text(&event["event"]), &event["properties"]);
    let of = [&properties["id"], &properties["kind"]].map(text).concat();
    format!("{source} {event} {of}").trim_end().to_owned()
}

/// All events so far.
fn so_far(api: &Api) -> Result<Vec<Value>> {
    let answer = api.request("GET", "vm.events?follow=false", None)?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(serde_json::from_str(&answer.body)?)
}

/// Events as lines: their numbers have to rise by one, from 1 on.
fn names(text: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let event = json(line)?;
        ensure!(event["id"] == at as u64 + 1, "{line} is number {}", at + 1);
        names.push(name(&event));
    }
    Ok(names)
}

const BOOT: [&str; 2] = ["vm booting", "vm booted"];

fn tell_a_whole_life_in_order(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?.api();
    let disk = DiskImage::empty(vm.dir().join("disk"), 1 << 20)?;
    let file = context.dir.join("events");
    let vm = vm.flag("--event-monitor", format!("path={}", file.display()));
    let mut guest = Guest::start(vm.disk(disk.path(), ""))?;
    let mut stream = follow(guest.vm().api()?)?;
    guest.vm().pause()?;
    guest.vm().resume()?;
    guest.ask("blk 0 init")?;
    guest.ask("blk 0 init")?;
    guest.send("pm reset")?;
    guest.wait_ready()?;
    guest.vm().api()?.put("vm.reboot", None)?;
    guest.wait_ready()?;
    guest.power_off()?;
    let mut streamed = String::new();
    stream.read_to_string(&mut streamed)?;
    let disk = ["activated", "reset", "activated"].map(|event| format!("virtio-device {event} _disk0"));
    let expected = [
        &["vmm starting", "vm created", "job started vm.boot"][..],
        &BOOT,
        &[
            "job done vm.boot",
            "vm pausing",
            "vm paused",
            "vm resuming",
            "vm resumed",
        ],
        &disk.each_ref().map(String::as_str),
        &["vm rebooting", "vm booting", "vm booted", "vm rebooted"],
        &[
            "job started vm.reboot",
            "vm rebooting",
            "vm booting",
            "vm booted",
            "vm rebooted",
            "job done vm.reboot",
        ],
        &["vm shutdown", "vm deleted", "vmm shutdown"],
    ]
    .concat();
    let seen = names(&streamed)?;
    ensure!(seen == expected, "{seen:#?}");
    ensure!(fs::read_to_string(&file)? == streamed, "the file has something else");
    Ok(Outcome::Passed)
}

fn go_to_an_inherited_descriptor(context: &Context) -> Result<Outcome> {
    // Standard output, which this VM does not use.
    let guest = Guest::start(builder(context)?.flag("--event-monitor", "fd=1"))?;
    let ended = guest.power_off()?;
    let seen = names(&ended.output)?;
    ensure!(seen.first().is_some_and(|first| first == "vmm starting"), "{seen:?}");
    ensure!(seen.last().is_some_and(|last| last == "vmm shutdown"), "{seen:?}");
    Ok(Outcome::Passed)
}

fn wait_for_nobody_at_a_named_pipe(context: &Context) -> Result<Outcome> {
    let pipe = context.dir.join("pipe");
    ensure!(Command::new("mkfifo").arg(&pipe).status()?.success(), "mkfifo");
    let vm = builder(context)?.api();
    let guest = Guest::start(vm.flag("--event-monitor", format!("path={}", pipe.display())))?;
    // More than a pipe holds.
    for _ in 0..300 {
        guest.vm().pause()?;
        guest.vm().resume()?;
    }
    let mut reader = BufReader::new(OpenOptions::new().read(true).open(&pipe)?);
    let mut last = 0;
    while last < 1200 {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let event = json(&line)?;
        let id = event["id"].as_u64().context("no id")?;
        let lost = event["properties"]["count"].as_u64().unwrap_or(1);
        ensure!(id == last + lost, "{line} comes after {last}");
        last = id;
    }
    drop(reader);
    for _ in 0..300 {
        guest.vm().pause()?;
        guest.vm().resume()?;
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn do_not_drown_in_what_a_guest_does(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?.api();
    let disk = DiskImage::empty(vm.dir().join("disk"), 1 << 20)?;
    let mut guest = Guest::start(vm.disk(disk.path(), ""))?;
    for _ in 0..100 {
        guest.ask("blk 0 init")?;
    }
    let events = so_far(guest.vm().api()?)?;
    ensure!(name(&events[0]) == "vmm starting", "{}", events[0]);
    let of_disk = events
        .iter()
        .filter(|event| event["properties"]["id"] == "_disk0")
        .count();
    // One window or two: a slow host takes its time for a hundred.
    ensure!((1..=130).contains(&of_disk), "{of_disk} events of 199");
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn include_jobs(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.api())?;
    let api = guest.vm().api()?.clone();
    let get = |route: &str| -> Result<Value> {
        let answer = api.request("GET", route, None)?;
        ensure!(answer.status == 200, "{route}: {answer:?}");
        json(&answer.body)
    };
    let boot = get("vm.job/1")?;
    ensure!(
        (&boot["kind"], &boot["state"]) == (&"vm.boot".into(), &"done".into()),
        "{boot}"
    );
    ensure!(boot["phase"] == "kernel" && boot["error"].is_null(), "{boot}");
    api.put("vm.reboot", None)?;
    guest.wait_ready()?;
    api.put("vm.shutdown", None)?;
    ensure!(api.request("PUT", "vm.shutdown", None)?.status == 409);
    api.put("vm.delete", None)?;
    let jobs = get("vm.jobs")?;
    let kinds: Vec<_> = jobs.as_array().into_iter().flatten().map(|job| &job["kind"]).collect();
    ensure!(kinds == ["vm.boot", "vm.reboot", "vm.shutdown", "vm.delete"], "{jobs}");
    ensure!(api.request("GET", "vm.job/5", None)?.status == 404);
    Ok(Outcome::Passed)
}

fn tell_why_a_boot_failed(context: &Context) -> Result<Outcome> {
    let guest = Guest::start(builder(context)?.api())?;
    let api = guest.vm().api()?;
    api.put("vm.delete", None)?;
    api.put("vm.create", Some(r#"{"payload": {"kernel": "/nope"}}"#))?;
    let answer = api.request("PUT", "vm.boot", None)?;
    let error = json(&answer.body)?["error"].clone();
    let error = error.as_str().and_then(|error| error.strip_prefix("vm.boot: "));
    let error = error.with_context(|| format!("{answer:?}"))?;
    ensure!(answer.status == 400, "{answer:?}");
    let job = json(&api.request("GET", "vm.job/3", None)?.body)?;
    ensure!(job["state"] == "failed" && job["error"] == error, "{job}, not {error}");
    let events = so_far(api)?;
    let last = events.last().context("no events")?;
    ensure!(
        name(last) == "job failed vm.boot" && last["properties"]["error"] == error,
        "{last}"
    );
    Ok(Outcome::Passed)
}

/// Whether a line of the audit log is of a call by this process.
fn is_ours(line: &Value) -> Result<bool> {
    let owner = fs::metadata("/proc/self")?;
    let whole = line["time"]
        .as_str()
        .is_some_and(|time| time.len() == 27 && time.ends_with('Z'));
    Ok(whole && line["uid"] == owner.uid() && line["gid"] == owner.gid() && line["pid"] == std::process::id())
}

fn have_an_audit_line_for_each_call(context: &Context) -> Result<Outcome> {
    let file = context.dir.join("audit");
    let vm = builder(context)?.api();
    let guest = Guest::start(vm.flag("--audit-log", format!("file={}", file.display())))?;
    let api = guest.vm().api()?;
    api.request("GET", "vm.info", None)?;
    for route in ["vm.pause", "vm.pause", "vm.resume", "vm.coredump"] {
        api.request("PUT", route, None)?;
    }
    api.request("PUT", "vm.create", Some("{"))?;
    guest.power_off()?;
    let text = fs::read_to_string(&file)?;
    let lines = text.lines().map(json).collect::<Result<Vec<_>>>()?;
    let seen: Vec<_> = lines
        .iter()
        .map(|line| format!("{} {}", line["request"].as_str().unwrap_or_default(), line["status"]))
        .collect();
    let expected = [
        "vm.pause 204",
        "vm.pause 409",
        "vm.resume 204",
        "vm.coredump 501",
        "vm.create 400",
    ];
    ensure!(seen == expected, "{text}");
    ensure!(
        lines[1]["error"]
            .as_str()
            .is_some_and(|e| e.contains("must be Running")),
        "{text}"
    );
    for line in &lines {
        ensure!(is_ours(line)?, "{line}");
    }
    ensure!(
        fs::metadata(&file)?.mode() & 0o777 == 0o600,
        "anybody can read the audit log"
    );
    Ok(Outcome::Passed)
}

fn have_an_audit_log_that_rotates(context: &Context) -> Result<Outcome> {
    let (file, old) = (context.dir.join("audit"), context.dir.join("audit.1"));
    let vm = builder(context)?.api();
    let guest = Guest::start(vm.flag("--audit-log", format!("file={}", file.display())))?;
    let wait_for = |path: &Path, text: &str| -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !fs::read_to_string(path).is_ok_and(|lines| lines.contains(text)) {
            ensure!(Instant::now() < deadline, "no {text} in {}", path.display());
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    };
    guest.vm().pause()?;
    wait_for(&file, "vm.pause")?;
    fs::rename(&file, &old)?;
    let kill = format!("kill -HUP {}", guest.vm().pid());
    ensure!(Command::new("sh").args(["-c", &kill]).status()?.success(), "kill");
    wait_for(&file, "")?;
    guest.vm().resume()?;
    wait_for(&file, "vm.resume")?;
    ensure!(
        !fs::read_to_string(&old)?.contains("vm.resume"),
        "it goes on in the old file"
    );
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// The JSON text in the next message of a syslog client.
fn message(daemon: &UnixDatagram) -> Result<Value> {
    let mut buffer = [0; 8192];
    let count = daemon.recv(&mut buffer)?;
    let text = str::from_utf8(&buffer[..count])?;
    match text.split_once("]: ") {
        Some((head, text)) if head.starts_with("<86>") => json(text),
        _ => bail!("no message of syslog: {text}"),
    }
}

fn bind(path: &Path) -> Result<UnixDatagram> {
    let daemon = UnixDatagram::bind(path)?;
    daemon.set_read_timeout(Some(PATIENCE))?;
    Ok(daemon)
}

fn have_audit_lines_for_a_daemon_that_was_restarted(context: &Context) -> Result<Outcome> {
    let path = context.dir.join("log");
    let daemon = bind(&path)?;
    let vm = builder(context)?.api();
    let guest = Guest::start(vm.flag("--audit-log", format!("syslog={}", path.display())))?;
    guest.vm().pause()?;
    let line = message(&daemon)?;
    ensure!(line["request"] == "vm.pause" && is_ours(&line)?, "{line}");
    drop(daemon);
    fs::remove_file(&path)?;
    for _ in 0..10 {
        guest.vm().resume()?;
        guest.vm().pause()?;
    }
    let daemon = bind(&path)?;
    for _ in 0..10 {
        for route in ["vm.resume", "vm.pause"] {
            let line = message(&daemon)?;
            ensure!(line["request"] == route, "{line}");
        }
    }
    guest.vm().resume()?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
