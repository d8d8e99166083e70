//! The VMM as an agent starts it: a file that is a VM, a service manager that listens, an agent that dies.

use super::ends::{signal, started_by};
use super::guest::{Guest, SERIAL, builder, has_ended};
use super::payload_tests;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::api::Api;
use triarch_harness::freeze::Frozen;
use triarch_harness::net::inheritable;
use triarch_harness::suite::{Context, Outcome};
use triarch_harness::terminal::Terminal;
use triarch_harness::vm::VmBuilder;

payload_tests!("launch":
    from_a_file,
    tells_its_service_manager,
    tells_a_manager_that_does_not_listen,
    on_a_socket_of_its_manager,
    outlives_its_agent,
    ends_with_the_terminal_of_its_guest,
    ends_at_once_when_told_twice,
    under_another_name;
    x86: says_that_the_guest_failed: "code of its own that runs where there is no memory",
);

const SOON: Duration = Duration::from_secs(5);

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("the test directory's name is not UTF-8")
}

/// The body of `vm.create` for the payload, with its serial line where [`Guest`] looks for it.
fn description(context: &Context, vm: &VmBuilder) -> Result<Value> {
    Ok(json!({
        "payload": {"kernel": text(&context.images.path("triarch-payload")?)?},
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
        "memory": {"size": 64 << 20},
        "serial": {"mode": "Socket", "socket": text(&vm.dir().join(SERIAL))?},
    }))
}

fn from_a_file(context: &Context) -> Result<Outcome> {
    let file = context.dir.join("vm.json");
    for from_stdin in [false, true] {
        let started = match from_stdin {
            true => started_by(context, "exec", &format!("<'{}'", file.display()))?,
            false => context.clone(),
        };
        let vm = VmBuilder::new(&started)?.api();
        let mut description = description(context, &vm)?;
        description["memory"]["sise"] = json!(1);
        fs::write(&file, description.to_string())?;
        let path = if from_stdin { Path::new("-") } else { &file };
        let guest = Guest::start(vm.flag("--config", path))?;
        let info: Value = serde_json::from_str(&guest.vm().api()?.request("GET", "vm.info", None)?.body)?;
        ensure!(
            info["state"] == "Running" && info["config"]["cpus"]["boot_vcpus"] == 2,
            "{info}"
        );
        let stderr = guest.power_off()?.stderr;
        let name = if from_stdin { "standard input" } else { text(&file)? };
        let [line] = stderr.lines().collect::<Vec<_>>()[..] else {
            bail!("not one warning: {stderr}");
        };
        ensure!(line.contains(&format!("{name}: memory.sise is no field")), "{line}");
    }
    Ok(Outcome::Passed)
}

/// A service manager's end: its socket, and how to call it.
fn manager(context: &Context, hidden: bool) -> Result<(UnixDatagram, String)> {
    let path = context.dir.join("notify");
    let (socket, name) = if hidden {
        let name = format!("triarch-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name)?;
        (UnixDatagram::bind_addr(&address)?, format!("@{name}"))
    } else {
        (UnixDatagram::bind(&path)?, text(&path)?.to_owned())
    };
    socket.set_read_timeout(Some(SOON))?;
    Ok((socket, name))
}

/// The next message that is no sign of life, and how many of those came before it.
fn message(socket: &UnixDatagram) -> Result<(String, usize)> {
    let mut buffer = [0; 1024];
    let mut alive = 0;
    loop {
        let n = socket.recv(&mut buffer).context("no message")?;
        let text = std::str::from_utf8(&buffer[..n])?;
        if text != "WATCHDOG=1" {
            return Ok((text.to_owned(), alive));
        }
        alive += 1;
    }
}

fn tells_its_service_manager(context: &Context) -> Result<Outcome> {
    for hidden in [false, true] {
        let (socket, name) = manager(context, hidden)?;
        let next = |expected: &str| {
            let (text, _) = message(&socket).with_context(|| format!("instead of {expected:?}"))?;
            ensure!(text == expected, "{text:?} instead of {expected:?}");
            anyhow::Ok(())
        };
        let script = format!("export NOTIFY_SOCKET='{name}' WATCHDOG_USEC=100000; exec");
        let started = started_by(context, &script, "")?;
        let vm = builder(&started)?.api();
        let mut guest = Guest::start(vm)?;
        next("READY=1\nSTATUS=The guest runs")?;
        guest.vm().pause()?;
        next("STATUS=The guest is paused")?;
        thread::sleep(Duration::from_millis(300));
        guest.vm().resume()?;
        let (status, alive) = message(&socket)?;
        ensure!(status == "STATUS=The guest runs", "{status}");
        ensure!(alive >= 3, "only {alive} signs of life in six periods");
        guest.ask("hello")?;
        signal(&guest, "TERM")?;
        next("STOPPING=1\nSTATUS=Ending")?;
        guest.expect_end(0)?;

        // It does not say that it is ready when it is not.
        let vm = builder(&started)?.set("--kernel", "/nonexistent/k");
        vm.start()?.expect_end(1)?;
        let vm = VmBuilder::new(&started)?.api().start()?;
        next("READY=1\nSTATUS=Waiting for vm.create")?;
        let ping = vm.api()?.request("GET", "vmm.ping", None)?;
        ensure!(ping.status == 200, "ready, and yet {ping:?}");
        vm.api()?.put("vmm.shutdown", None)?;
        vm.expect_end(0)?;
        if !hidden {
            fs::remove_file(name)?;
        }
    }
    Ok(Outcome::Passed)
}

fn tells_a_manager_that_does_not_listen(context: &Context) -> Result<Outcome> {
    let (socket, name) = manager(context, true)?;
    // Five hundred signs of life a second fill the socket before anything else happens.
    let script = format!("export NOTIFY_SOCKET='{name}' WATCHDOG_USEC=4000; exec");
    let started = started_by(context, &script, "")?;
    let mut guest = Guest::start(builder(&started)?.api())?;
    for _ in 0..50 {
        guest.vm().pause()?;
        guest.vm().resume()?;
        thread::sleep(Duration::from_millis(5));
    }
    guest.ask("hello")?;
    drop(socket);
    guest.vm().pause()?;
    guest.vm().resume()?;
    guest.power_off()?;
    for nonsense in ["notify", "vsock:2:1"] {
        let started = started_by(context, &format!("export NOTIFY_SOCKET={nonsense}; exec"), "")?;
        let stderr = Guest::start(builder(&started)?)?.power_off()?.stderr;
        ensure!(stderr.contains(&format!("NOTIFY_SOCKET={nonsense}: ")), "{stderr}");
    }
    Ok(Outcome::Passed)
}

fn on_a_socket_of_its_manager(context: &Context) -> Result<Outcome> {
    let path = context.dir.join("api.sock");
    let listener = inheritable(OwnedFd::from(UnixListener::bind(&path)?).into())?;
    let api = Api::new(&path);
    // A client that comes first is what starts the VMM.
    let early = thread::spawn({
        let api = api.clone();
        move || api.request("GET", "vmm.ping", None)
    });
    let streams = format!("3<&{}", listener.as_raw_fd());
    let started = started_by(context, "LISTEN_FDS=1 LISTEN_PID=1 LISTEN_FDNAMES=api exec", &streams)?;
    let vm = VmBuilder::new(&started)?.flag("--api-socket", "fd=3").start()?;
    let Ok(answer) = early.join() else {
        bail!("the client panicked")
    };
    ensure!(answer?.status == 200, "no ping");
    api.put("vmm.shutdown", None)?;
    vm.expect_end(0)?;
    ensure!(path.exists(), "a socket of somebody else was removed");
    fs::remove_file(path)?;
    Ok(Outcome::Passed)
}

/// Starts an agent that is the leader of a session on `terminal`, and the VMM as its child, with `flags`; kills the agent when the
/// VMM runs. Whatever the VMM writes to goes with it. Returns the VMM's process id.
fn lose_agent(context: &Context, terminal: &Terminal, api: &Api, flags: &[&str]) -> Result<u32> {
    let tty = terminal.path().display();
    let mut agent = Command::new("setsid")
        .args(["-c", "sh", "-c", &format!("\"$@\" <'{tty}' & wait"), "agent"])
        .arg(&context.triarch)
        .args(["--cpus", "1", "--memory", "64M", "--log-level", "info", "--kernel"])
        .arg(context.images.path("triarch-payload")?)
        .arg("--api-socket")
        .arg(api.socket())
        .args(flags)
        .stdin(File::options().read(true).write(true).open(terminal.path())?)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("setsid")?;
    let found = || -> Result<u32> {
        let deadline = Instant::now() + SOON;
        loop {
            let info: Value = serde_json::from_str(&api.request("GET", "vm.info", None)?.body)?;
            if info["state"] == "Running" {
                break;
            }
            ensure!(Instant::now() < deadline, "{info}");
            thread::sleep(Duration::from_millis(2));
        }
        let ping: Value = serde_json::from_str(&api.request("GET", "vmm.ping", None)?.body)?;
        let pid = ping["pid"].as_u64().context("no pid")?;
        Ok(u32::try_from(pid)?)
    }();
    drop((agent.stdout.take(), agent.stderr.take()));
    agent.kill()?;
    agent.wait()?;
    found
}

fn wait_for_end(pid: u32) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !has_ended(pid) {
        if Instant::now() >= deadline {
            let _ = Command::new("kill").args(["-s", "KILL", &pid.to_string()]).status();
            bail!("it is still there");
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn outlives_its_agent(context: &Context) -> Result<Outcome> {
    let terminal = Terminal::new(80, 25)?;
    let socket = context.dir.join("api.sock");
    let api = Api::new(&socket);
    let pid = lose_agent(context, &terminal, &api, &["--console", "null"])?;
    // Long enough for whatever the agent's death sends, and for log lines that nobody takes.
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(20));
        api.put("vm.pause", None)?;
        api.put("vm.resume", None)?;
    }
    api.put("vmm.shutdown", None)?;
    wait_for_end(pid)?;
    ensure!(!socket.exists(), "its socket is left behind");
    Ok(Outcome::Passed)
}

fn ends_with_the_terminal_of_its_guest(context: &Context) -> Result<Outcome> {
    let log = context.dir.join("log");
    let log = text(&log)?;
    for flags in [&["--console", "tty"][..], &["--console", "tty", "--log-file", log]] {
        let terminal = Terminal::new(80, 25)?;
        let socket = context.dir.join("api.sock");
        let pid = lose_agent(context, &terminal, &Api::new(&socket), flags)?;
        wait_for_end(pid)?;
        ensure!(!socket.exists(), "its socket is left behind");
    }
    Ok(Outcome::Passed)
}

fn ends_at_once_when_told_twice(context: &Context) -> Result<Outcome> {
    let terminal = Terminal::new(80, 25)?;
    let before = terminal.settings()?;
    let path = terminal.path().display();
    let started = started_by(context, "exec", &format!("<'{path}' >'{path}'"))?;
    let mut guest = Guest::start(builder(&started)?.set("--console", "tty"))?;
    guest.ask("console init")?;
    ensure!(terminal.settings()? != before, "the terminal is not in raw mode");
    let frozen = match Frozen::thread(guest.vm().pid(), "vcpu0") {
        Ok(frozen) => frozen,
        Err(error) => return Ok(Outcome::Skipped(format!("no thread can be stopped: {error:#}"))),
    };
    signal(&guest, "TERM")?;
    thread::sleep(Duration::from_millis(100));
    signal(&guest, "INT")?;
    thread::sleep(Duration::from_millis(900));
    ensure!(!has_ended(guest.vm().pid()), "it was not stuck, or took two for one");
    signal(&guest, "TERM")?;
    frozen.wait_for_end();
    // The serial line's socket is left, and replaced by whoever comes next.
    let socket = guest.vm().dir().join(SERIAL);
    fs::remove_file(socket)?;
    guest.expect_end(5)?;
    ensure!(terminal.settings()? == before, "the terminal has other settings");
    Ok(Outcome::Passed)
}

/// The payload with other code where it is entered: a jump to where there is no memory.
fn lost_kernel(image: &[u8]) -> Result<Vec<u8>> {
    let u64_at = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 8).context("too short")?;
        Ok(u64::from_le_bytes(bytes.try_into()?).try_into()?)
    };
    // The note that tells the entry (type 18, owner Xen), then the segment it is in (ELF64, physical address at 24).
    let note = image.windows(8).position(|w| w == b"\x12\0\0\0Xen\0");
    let entry = u64_at(note.context("no PVH note")? + 8)? & 0xffff_ffff;
    let headers = u64_at(32)?;
    let segment = (0..8).map(|i| headers + i * 56).find_map(|header| {
        let (offset, address, size) = (
            u64_at(header + 8).ok()?,
            u64_at(header + 24).ok()?,
            u64_at(header + 32).ok()?,
        );
        (address..address + size)
            .contains(&entry)
            .then(|| offset + entry - address)
    });
    let at = segment.context("the entry is in no segment")?;
    let mut image = image.to_vec();
    // mov eax, 0xd0000000; jmp eax
    image[at..at + 7].copy_from_slice(&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0]);
    Ok(image)
}

fn says_that_the_guest_failed(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?.api();
    let kernel = context.dir.join("kernel");
    fs::write(
        &kernel,
        lost_kernel(&fs::read(context.images.path("triarch-payload")?)?)?,
    )?;
    let ended = vm.set("--kernel", &kernel).start()?.expect_end(4)?;
    ensure!(ended.stderr.starts_with("triarch: vCPU 0 failed: "), "{}", ended.stderr);
    Ok(Outcome::Passed)
}

fn under_another_name(context: &Context) -> Result<Outcome> {
    let other = context.dir.join("cloud-hypervisor");
    std::os::unix::fs::symlink(&context.triarch, &other)?;
    for (program, flags) in [
        (&other, &["--version"][..]),
        (&context.triarch, &["--compat", "cloud-hypervisor", "--version"]),
    ] {
        let output = Command::new(program).args(flags).output()?;
        let text = String::from_utf8(output.stdout)?;
        ensure!(
            output.status.success() && text == "cloud-hypervisor v53.0.0\n",
            "{text}"
        );
    }
    let other = Context {
        triarch: other,
        ..context.clone()
    };
    for (context, version) in [(context, "0.1.0"), (&other, "53.0.0")] {
        let vm = VmBuilder::new(context)?.api().start()?;
        let ping: Value = serde_json::from_str(&vm.api()?.request("GET", "vmm.ping", None)?.body)?;
        ensure!(ping["version"] == version, "{ping}");
        ensure!(ping["build_version"] == format!("v{version}"), "{ping}");
        vm.api()?.put("vmm.shutdown", None)?;
        vm.expect_end(0)?;
    }
    Ok(Outcome::Passed)
}
