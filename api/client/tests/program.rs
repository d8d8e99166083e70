//! The program against the API's server and a fake VM.

#[path = "../../tests/server/common.rs"]
#[allow(dead_code, reason = "the server's own tests need more of it")]
mod common;

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use common::Running;
use triarch_api::events::kind;
use triarch_api::server::Limits;
use triarch_api::{Operation, VmConfig};

const MINIMAL: &str = r#"{"payload":{"kernel":"/k"},"memory":{"size":1048576}}"#;

/// What a run left.
#[derive(Debug, PartialEq, Eq)]
struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trictl"));
    command.env_remove("TRIARCH_API_SOCKET");
    command
}

/// Runs `trictl` for the VMM on `socket`, with `input` on its standard input.
fn run_with(socket: &Path, words: &[&str], input: &str) -> Ran {
    let mut child = program()
        .arg("-s")
        .arg(socket)
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("trictl");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(input.as_bytes()).expect("input");
    drop(stdin);
    let output = child.wait_with_output().expect("output");
    Ran {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).expect("UTF-8"),
        err: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

fn run(socket: &Path, words: &[&str]) -> Ran {
    run_with(socket, words, "")
}

/// Runs what has to succeed without a word on standard error; its output.
fn done(socket: &Path, words: &[&str]) -> String {
    let ran = run(socket, words);
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""), "{words:?}");
    ran.out
}

#[test]
fn a_vm_goes_through_its_life() {
    let (server, _vm) = Running::api(Limits::default());
    let socket = &server.path;
    let created = run_with(socket, &["create"], MINIMAL);
    assert_eq!((created.code, created.out.as_str()), (Some(0), ""), "{created:?}");
    assert_eq!(done(socket, &["resize", "--cpus", "2", "--memory", "1G"]), "");
    assert_eq!(done(socket, &["add-disk", "path=/d,readonly=on"]), "");
    assert_eq!(done(socket, &["add-vsock", "cid=3,socket=/v"]), "");
    assert_eq!(done(socket, &["remove-device", "_disk0"]), "");
    for (command, state) in [
        ("boot", "Running"),
        ("pause", "Paused"),
        ("resume", "Running"),
        ("reboot", "Running"),
        ("power-button", "Running"),
        ("nmi", "Running"),
        ("shutdown", "Shutdown"),
    ] {
        assert_eq!(done(socket, &[command]), "", "{command}");
        let info = done(socket, &["info"]);
        assert!(info.starts_with(&format!("State    {state}\n")), "{command}: {info}");
        if state == "Paused" {
            assert_eq!(done(socket, &["snapshot", "/s"]), "");
        }
    }
    assert_eq!(done(socket, &["delete"]), "");
    assert_eq!(done(socket, &["restore", "--memory", "mapped", "--resume", "/s"]), "");
    assert_eq!(done(socket, &["vmm-shutdown"]), "");
}

#[test]
fn answers_are_tables_for_people_and_json_for_programs() {
    let (server, vm) = Running::api(Limits::default());
    let socket = &server.path;
    assert_eq!(
        done(socket, &["ping"]),
        "Version   v1.2.3\nProcess   42\nFeatures  kvm\n"
    );
    let json = "{\"build_version\":\"v1.2.3\",\"version\":\"1.2.3\",\"pid\":42,\"features\":[\"kvm\"]}\n";
    assert_eq!(done(socket, &["--json", "ping"]), json);
    assert_eq!(done(socket, &["raw", "get", "vmm.ping"]), json);
    assert_eq!(
        done(socket, &["cpu-features"]),
        "Host       HygonGenuine\nFeatures   avx2\nValues     physical_address_bits=48\nVM         no guest has been booted\n"
    );
    assert!(done(socket, &["--json", "cpu-features"]).starts_with("{\"host\":{\"architecture\""));
    vm.create(VmConfig::default());
    assert!(done(socket, &["counters"]).starts_with("No device counts"));
    assert_eq!(done(socket, &["--json", "counters"]), "{}\n");
    assert!(done(socket, &["metrics"]).contains("# TYPE triarch_vm_state gauge\n"));
    assert!(done(socket, &["top", "--once"]).ends_with("\nNo guest runs.\n"));
    let two = done(socket, &["top", "--iterations", "2", "--interval", "50"]);
    assert_eq!(two.matches("No guest runs.").count(), 2, "{two}");
    assert!(done(socket, &["jobs"]).starts_with("No job"));
    vm.jobs.begin("vm.boot").finish(Ok(()));
    assert!(done(socket, &["jobs"]).contains("\n 1  vm.boot  done "));
    assert!(done(socket, &["--json", "jobs", "1"]).starts_with("{\"id\":1,\"kind\":\"vm.boot\",\"state\":\"done\""));
}

#[test]
fn events_are_lines_or_json() {
    let (server, vm) = Running::api(Limits::default());
    let socket = &server.path;
    vm.events.post(&kind::VM_CREATED, &[]);
    vm.events.post(&kind::DEVICE_RESET, &[("id", "_disk0".into())]);
    let text = done(socket, &["events", "--no-follow"]);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(lines[0].ends_with("ID  SOURCE         EVENT         PROPERTIES"));
    assert!(
        lines[2].ends_with("    2  virtio-device  reset         id=_disk0"),
        "{text}"
    );
    assert_eq!(
        done(socket, &["events", "--no-follow", "--since", "1"]).lines().count(),
        2
    );
    let json = done(socket, &["events", "--no-follow", "--json"]);
    assert!(json.starts_with("[{\"id\":1,") && json.ends_with("}]\n"), "{json}");
    // One that follows ends well when the VMM does.
    let path = server.path.clone();
    let follower = std::thread::spawn(move || run(&path, &["events", "--since", "1"]));
    while vm.events.clock().as_millis() < 300 {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    server.stop();
    let ran = follower.join().expect("no panic");
    assert_eq!((ran.code, ran.out.lines().count()), (Some(0), 2), "{ran:?}");
}

#[test]
fn a_job_is_watched_to_its_end() {
    let (server, vm) = Running::api(Limits::default());
    let job = vm.jobs.begin("vm.boot");
    job.note("memory");
    let path = server.path.clone();
    let watcher = std::thread::spawn(move || run(&path, &["jobs", "1", "--watch"]));
    std::thread::sleep(std::time::Duration::from_millis(300));
    job.finish(Err("no kernel"));
    let ran = watcher.join().expect("no panic");
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert_eq!(
        ran.out,
        "1 vm.boot, running, memory\n1 vm.boot, failed, memory, no kernel\n"
    );
    assert_eq!(ran.err, "trictl: job 1 (vm.boot) failed: no kernel\n");
}

#[test]
fn refusals_are_one_sentence_and_exit_code_1() {
    let (server, vm) = Running::api(Limits::default());
    let socket = &server.path;
    let refused = |words: &[&str], sentence: &str| {
        let ran = run(socket, words);
        let expected = (Some(1), String::new(), format!("trictl: {sentence}\n"));
        assert_eq!((ran.code, ran.out, ran.err), expected, "{words:?}");
    };
    refused(&["boot"], "vm.boot: there is no VM; create one with vm.create");
    vm.create(VmConfig::default());
    refused(&["resume"], "vm.resume: the VM is Created, it must be Paused");
    refused(&["--json", "pause"], "vm.pause: the VM is Created, it must be Running");
    refused(
        &["raw", "PUT", "vm.coredump"],
        "vm.coredump is not supported by this version",
    );
    refused(&["raw", "GET", "/x"], "there is no such path in this API");
    refused(
        &["jobs", "7"],
        "vm.job: there is no such job; vm.jobs tells which there are",
    );
}

#[test]
fn mistakes_on_the_command_line_are_exit_code_2() {
    let (server, _vm) = Running::api(Limits::default());
    let socket = &server.path;
    for (words, part) in [
        (
            &["add-disk", "pth=/d"][..],
            "add-disk: there is no key 'pth'; it takes path,",
        ),
        (
            &["add-vsock", "cid=3"],
            "add-vsock: it needs a path on the host; write socket=PATH",
        ),
        (&["add-net", "--fd", "77"], "descriptor 77 is not open"),
        (
            &["create", "/nonexistent.json"],
            "cannot read /nonexistent.json: No such file",
        ),
        (&["raw", "GET", "vm info"], "'vm info' is no route"),
        (&["resize"], "--cpus"),
        (&["fly"], "fly"),
    ] {
        let ran = run(socket, words);
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert!(ran.err.contains(part) && ran.out.is_empty(), "{ran:?}");
    }
    let ran = program().arg("ping").output().expect("trictl");
    assert_eq!(ran.status.code(), Some(2));
    let text = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(text.contains("TRIARCH_API_SOCKET"), "{text}");
    let by_environment = program().arg("ping").env("TRIARCH_API_SOCKET", socket).output();
    assert!(by_environment.expect("trictl").status.success());
}

#[test]
fn no_answer_is_exit_code_3() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("api.sock");
    let missing = run(&socket, &["info"]);
    assert_eq!(missing.code, Some(3), "{missing:?}");
    let expected = format!(
        "trictl: cannot connect to {}: there is no such socket; start triarch with --api-socket, or name its socket\n",
        socket.display()
    );
    assert_eq!(missing.err, expected);
    drop(UnixListener::bind(&socket).expect("bind"));
    let dead = run(&socket, &["top", "--once"]);
    assert_eq!(dead.code, Some(3), "{dead:?}");
    assert!(dead.err.contains("the VMM has ended; start it again"), "{dead:?}");
    let (server, vm) = Running::api(Limits::default());
    vm.create(VmConfig::default());
    vm.hold_boots();
    let late = run(&server.path, &["--timeout", "1", "boot"]);
    assert_eq!(late.code, Some(3), "{late:?}");
    assert!(late.err.contains("vm.boot: no answer within 1 s"), "{late:?}");
}

#[test]
fn inherited_descriptors_are_handed_on() {
    let (server, vm) = Running::api(Limits::default());
    vm.create(VmConfig::default());
    let script = r#"exec "$0" -s "$1" add-net mtu=1400,fd=4 --fd 3 3</dev/null 4</dev/zero"#;
    let status = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_trictl")])
        .arg(&server.path)
        .status();
    assert!(status.expect("sh").success());
    let (net, fds) = vm.handed.lock().unwrap().take().expect("an interface");
    assert_eq!((net.num_queues, net.mtu), (4, Some(1400)));
    let device = |fd| rustix::fs::fstat(fd).expect("fstat").st_rdev;
    let of = |path| rustix::fs::stat(path).expect("stat").st_rdev;
    let got: Vec<_> = fds.iter().map(device).collect();
    assert_eq!(got, [of("/dev/null"), of("/dev/zero")]);
}

#[test]
fn descriptors_of_a_device_are_handed_on() {
    let (server, vm) = Running::api(Limits::default());
    vm.create(VmConfig::default());
    for words in ["add-device id=gpu --fd 3 --fd 4", "add-device id=gpu,fd=3 --fd 4"] {
        let script = format!(r#"exec "$0" -s "$1" {words} 3</dev/null 4</dev/zero"#);
        let status = Command::new("sh")
            .args(["-c", &script, env!("CARGO_BIN_EXE_trictl")])
            .arg(&server.path)
            .status();
        assert!(status.expect("sh").success());
        let (device, fds) = vm.passed.lock().unwrap().take().expect("a device");
        assert_eq!(
            (device.id.as_deref(), device.fd, device.path),
            (Some("gpu"), None, None)
        );
        let device = |fd| rustix::fs::fstat(fd).expect("fstat").st_rdev;
        let of = |path| rustix::fs::stat(path).expect("stat").st_rdev;
        let got: Vec<_> = fds.iter().map(device).collect();
        assert_eq!(got, [of("/dev/null"), of("/dev/zero")]);
    }
}

#[test]
fn who_closes_the_pipe_hears_no_complaint() {
    let (server, _vm) = Running::api(Limits::default());
    let script = r#"("$0" -s "$1" metrics; echo "code $?" >&2) | true"#;
    let output = Command::new("bash")
        .args(["-c", &format!("sleep 0.2; {script}"), env!("CARGO_BIN_EXE_trictl")])
        .arg(&server.path)
        .output()
        .expect("bash");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "code 0\n");
}

#[test]
fn documents_need_no_vmm() {
    for words in [&["completion", "bash"][..], &["completion", "zsh"], &["man"]] {
        let output = program().args(words).output().expect("trictl");
        assert!(output.status.success() && output.stdout.len() > 1000, "{words:?}");
    }
    // What bash makes of it.
    let script = program().args(["completion", "bash"]).output().expect("trictl").stdout;
    let mut bash = Command::new("bash")
        .args(["-c", "source /dev/stdin; complete -p trictl"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("bash");
    bash.stdin.take().expect("a pipe").write_all(&script).expect("write");
    let said = bash.wait_with_output().expect("output");
    assert!(String::from_utf8_lossy(&said.stdout).contains("_trictl"));
}

#[test]
fn every_operation_that_needs_only_its_name_reaches_the_vmm() {
    let (server, _vm) = Running::api(Limits::default());
    for operation in Operation::ALL {
        let name = operation.name();
        let command = match operation {
            Operation::CpuFeatures => "cpu-features",
            _ => name.strip_prefix("vm.").unwrap_or("vmm-shutdown"),
        };
        let ran = run(&server.path, &[command]);
        let expected = match operation {
            Operation::VmmShutdown | Operation::CpuFeatures => Some(0),
            // Needs arguments, or input that is there.
            _ if ran.err.contains("Usage") => Some(2),
            _ => Some(1),
        };
        assert_eq!(ran.code, expected, "{ran:?}");
        assert!(
            ran.code != Some(1) || ran.err.starts_with(&format!("trictl: {name}: ")),
            "{ran:?}"
        );
    }
}
