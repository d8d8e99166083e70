//! The server holds to its own description, docs/openapi.json: asked by curl for every route in every phase, and by schemathesis, which
//! makes requests from the description.

use super::clients::curl::{self, Answer, curl};
use super::guest::IMAGE;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use triarch_harness::api::Api;
use triarch_harness::process;
use triarch_harness::suite::{Context, Outcome, Test};
use triarch_harness::vm::{Vm, VmBuilder};
use triarch_harness::wire::Bridge;

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("openapi::every_route_in_every_phase", every_route_in_every_phase).within(Duration::from_secs(120)),
    Test::payload("openapi::schemathesis_finds_nothing", schemathesis_finds_nothing).within(Duration::from_secs(400)),
];

const DOCUMENT: &str = include_str!("../../../../docs/openapi.json");
/// Names the program `st` of schemathesis; `cargo xtask test` installs it.
const SCHEMATHESIS: &str = "TRIARCH_SCHEMATHESIS";
/// Address space of a VMM that gets random configurations: they ask for the host's whole memory, and to have it touched.
const ADDRESS_SPACE: u64 = 3 << 30;
const PHASES: [&str; 5] = ["none", "Created", "Running", "Paused", "Shutdown"];

/// The description.
struct Document(Value);

impl Document {
    fn read() -> Result<Self> {
        Ok(Self(serde_json::from_str(DOCUMENT)?))
    }

    /// Each route: its path, method, and description.
    fn operations(&self) -> impl Iterator<Item = (&str, &str, &Value)> {
        let paths = self.0["paths"].as_object().into_iter().flatten();
        paths.flat_map(|(path, item)| {
            let methods = item.as_object().into_iter().flatten();
            methods.map(move |(method, operation)| (path.trim_start_matches('/'), method.as_str(), operation))
        })
    }

    /// What `operation` says of an answer with `status`.
    fn response<'a>(&'a self, operation: &'a Value, status: u16) -> Result<&'a Value> {
        let response = &operation["responses"][status.to_string()];
        match response["$ref"].as_str() {
            Some(target) => self
                .0
                .pointer(target.trim_start_matches('#'))
                .context("a reference to nothing"),
            None if response.is_object() => Ok(response),
            None => bail!("the status {status} is not described"),
        }
    }

    /// Checks an answer: its status, its type, and what it says.
    fn check(&self, operation: &Value, answer: &Answer) -> Result<()> {
        let Some(content) = self.response(operation, answer.status)?["content"].as_object() else {
            ensure!(answer.body.is_empty(), "a body is not described");
            return Ok(());
        };
        let media = content.get(&answer.content_type);
        let media = media.with_context(|| format!("the type `{}` is not described", answer.content_type))?;
        let body = match answer.content_type.as_str() {
            "application/json" => serde_json::from_str(&answer.body).context("not JSON")?,
            _ => Value::String(answer.body.clone()),
        };
        let mut schema = media["schema"].clone();
        schema["components"] = self.0["components"].clone();
        let validator = jsonschema::draft202012::new(&schema)?;
        let errors: Vec<String> = validator
            .iter_errors(&body)
            .map(|e| format!("{}: {e}", e.instance_path()))
            .collect();
        ensure!(errors.is_empty(), "not as described: {errors:?}");
        Ok(())
    }
}

/// A VMM without a VM, and what brings one into each phase.
struct Subject {
    vm: Vm,
    api: Api,
    create: String,
}

impl Subject {
    fn start(context: &Context) -> Result<Self> {
        let vm = VmBuilder::new(context)?.api().start()?;
        let disk = vm.dir().join("disk");
        std::fs::write(&disk, [0; 1 << 16])?;
        std::fs::write(vm.dir().join("more"), [0; 1 << 16])?;
        let create = json!({
            "payload": { "kernel": context.images.path(IMAGE)? }, "memory": { "size": 0, "zones": [{ "id": "fast", "size": 64 << 20 }] },
            "disks": [{ "path": disk, "id": "root" }],
        });
        let subject = Self {
            api: vm.api()?.clone(),
            vm,
            create: create.to_string(),
        };
        subject.bring_into("Paused")?;
        let to = json!({ "destination_url": subject.url("saved") }).to_string();
        subject.api.put("vm.snapshot", Some(&to))?;
        Ok(subject)
    }

    /// A directory for a snapshot.
    fn url(&self, name: &str) -> String {
        format!("file://{}", self.vm.dir().join(name).display())
    }

    /// A new VM in `phase`.
    fn bring_into(&self, phase: &str) -> Result<()> {
        if self.api.request("GET", "vm.info", None)?.status == 200 {
            self.api.put("vm.delete", None)?;
        }
        let steps: &[&str] = match phase {
            "none" => return Ok(()),
            "Created" => &[],
            "Running" => &["vm.boot"],
            "Paused" => &["vm.boot", "vm.pause"],
            _ => &["vm.boot", "vm.shutdown"],
        };
        self.api.put("vm.create", Some(&self.create))?;
        for route in steps {
            self.api.put(route, None)?;
        }
        let info = self.api.request("GET", "vm.info", None)?.body;
        let info: Value = serde_json::from_str(&info)?;
        ensure!(info["state"] == phase, "{info}");
        Ok(())
    }
}

/// What a body has to be so that it is accepted, where the description's example is for another VM.
fn body(subject: &Subject, route: &str, operation: &Value) -> Option<String> {
    match route {
        "vm.create" => return Some(subject.create.clone()),
        "vm.resize" => return Some(json!({ "desired_vcpus": 1, "desired_balloon": 0 }).to_string()),
        "vm.resize-zone" => return Some(json!({ "id": "fast", "desired_ram": 64 << 20 }).to_string()),
        "vm.resize-disk" => return Some(json!({ "id": "root", "desired_size": 1 << 17 }).to_string()),
        "vm.remove-device" => return Some(json!({ "id": "root" }).to_string()),
        "vm.add-disk" => return Some(json!({ "path": subject.vm.dir().join("more") }).to_string()),
        "vm.snapshot" => return Some(json!({ "destination_url": subject.url("new") }).to_string()),
        "vm.restore" => return Some(json!({ "source_url": subject.url("saved") }).to_string()),
        "vm.add-vsock" => {
            let socket = subject.vm.dir().join("vsock");
            return Some(json!({ "cid": 3, "socket": socket }).to_string());
        }
        _ => {}
    }
    let examples = operation["requestBody"]["content"]["application/json"]["examples"].as_object()?;
    Some(examples.values().next()?["value"].to_string())
}

fn every_route_in_every_phase(context: &Context) -> Result<Outcome> {
    if !curl::exists() {
        return Ok(Outcome::Skipped("curl is not installed".into()));
    }
    let document = Document::read()?;
    let subject = Subject::start(context)?;
    let mut asked = BTreeSet::new();
    for phase in PHASES {
        let mut settled = false;
        for (route, method, operation) in document.operations().filter(|(route, ..)| *route != "vmm.shutdown") {
            if !settled {
                subject.bring_into(phase)?;
            }
            let answer = ask(&subject, route, method, operation)?;
            let what = || format!("{method} {route} in {phase}: {answer:?}");
            document.check(operation, &answer).with_context(what)?;
            let success = answer.status < 300;
            let accepted = phases(operation).contains(&phase);
            // A guest that runs gets a device at once, and this host has neither its tap, its daemon nor the device.
            let opens = ["vm.add-net", "vm.add-fs", "vm.add-generic-vhost-user", "vm.add-device"].contains(&route);
            let missing = opens && ["Running", "Paused"].contains(&phase) && answer.status == 400;
            // Nobody is there to move a guest to, or to take one from.
            let alone = route.ends_with("migration") || route == "vm.migration-progress";
            let alone = alone && [400, 404, 409].contains(&answer.status);
            ensure!(
                success == accepted || missing || alone,
                "{}; described: {accepted}",
                what()
            );
            // Whatever succeeded may have changed something.
            settled = !success || method == "get";
            asked.insert(route);
        }
    }
    let (.., operation) = document
        .operations()
        .find(|(route, ..)| *route == "vmm.shutdown")
        .context("no vmm.shutdown")?;
    document.check(operation, &ask(&subject, "vmm.shutdown", "put", operation)?)?;
    ensure!(asked.len() > 30, "{asked:?}");
    subject.vm.expect_end(0)?;
    Ok(Outcome::Passed)
}

fn phases(operation: &Value) -> Vec<&str> {
    let phases = operation["x-phases"].as_array().into_iter().flatten();
    phases.filter_map(Value::as_str).collect()
}

fn ask(subject: &Subject, route: &str, method: &str, operation: &Value) -> Result<Answer> {
    let path = match route {
        // A stream has no end.
        "vm.events" => "vm.events?follow=false".to_owned(),
        // There was a boot before any phase but the first; a job that is not there is not found.
        route => route.replace("{id}", &first_job(subject)?),
    };
    let method = method.to_ascii_uppercase();
    let mut options = vec!["-X", &method];
    let body = body(subject, route, operation);
    if let Some(body) = &body {
        options.extend(["-H", "Content-Type: application/json", "-d", body]);
    }
    curl(subject.api.socket(), &path, &options)
}

/// The number of a job that is remembered; there is one, since a VM is deleted even where none was.
fn first_job(subject: &Subject) -> Result<String> {
    let jobs: Value = serde_json::from_str(&subject.api.request("GET", "vm.jobs", None)?.body)?;
    match jobs[0]["id"].as_u64() {
        Some(id) => Ok(id.to_string()),
        None => {
            subject.bring_into("Running")?;
            subject.bring_into("none")?;
            Ok("1".to_owned())
        }
    }
}

fn schemathesis_finds_nothing(context: &Context) -> Result<Outcome> {
    let Some(program) = std::env::var_os(SCHEMATHESIS).map(PathBuf::from) else {
        return Ok(Outcome::Skipped(format!(
            "{SCHEMATHESIS} names no schemathesis; cargo xtask test installs it"
        )));
    };
    if !program.is_file() {
        // What its installation said.
        return Ok(Outcome::Skipped(program.display().to_string()));
    }
    // Random configurations name files; those are made here.
    std::env::set_current_dir(&context.dir)?;
    process::limit_address_space(ADDRESS_SPACE)?;
    // What leads out of the phase is left to the first run.
    for (phase, without) in [
        ("none", &[][..]),
        ("Created", &["/vm.delete"]),
        ("Running", &["/vm.delete", "/vm.shutdown"]),
    ] {
        let subject = Subject::start(context)?;
        subject.bring_into(phase)?;
        let bridge = Bridge::to(subject.api.socket())?;
        run_schemathesis(&program, &context.dir, &bridge, without).with_context(|| format!("beginning in {phase}"))?;
        drop(bridge);
        subject.api.put("vmm.shutdown", None)?;
        let ended = subject.vm.expect_end(0)?;
        ensure!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    }
    Ok(Outcome::Passed)
}

fn run_schemathesis(program: &Path, dir: &Path, bridge: &Bridge, without: &[&str]) -> Result<()> {
    let (file, settings) = (dir.join("openapi.json"), dir.join("schemathesis.toml"));
    std::fs::write(&file, testable(without)?.to_string())?;
    // What this version lacks is answered with 501, and too many clients with 503: neither is a failure of the server.
    std::fs::write(
        &settings,
        "[checks.not_a_server_error]\nexpected-statuses = [\"2xx\", \"4xx\", 501, 503]\n",
    )?;
    let output = Command::new(program)
        .arg("--config-file")
        .arg(&settings)
        .arg("run")
        .arg(&file)
        .args(["--url", &format!("http://{}/api/v1", bridge.address())])
        .args([
            "--phases",
            "examples,coverage,fuzzing",
            "--max-examples",
            "25",
            "--generation-deterministic",
        ])
        .args([
            "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance",
        ])
        .args([
            "--checks",
            "response_schema_conformance,unsupported_method,negative_data_rejection",
        ])
        .args(["--no-color", "--workers", "1", "--request-timeout", "10"])
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "schemathesis: {}\n{said}\n{errors}",
        output.status
    );
    Ok(())
}

/// The description without some paths, and without what cannot be tried at random: the end of the process, a stream without an end, and
/// what waits for a guest.
fn testable(without: &[&str]) -> Result<Value> {
    let mut document = Document::read()?.0;
    let paths: &mut Map<String, Value> = document["paths"].as_object_mut().context("no paths")?;
    for path in ["/vmm.shutdown", "/vm.events", "/vm.receive-migration"]
        .iter()
        .chain(without)
    {
        paths.remove(*path).with_context(|| format!("no {path}"))?;
    }
    Ok(document)
}
