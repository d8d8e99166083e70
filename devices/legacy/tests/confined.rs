//! Consoles under the system call filters of the threads that use them. A call that a filter does not know kills the process.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use triarch_device_core::mock::CountingLine;
use triarch_device_core::{BusDevice, ThreadClass};
use triarch_legacy::console::{Backend, Console};
use triarch_legacy::{Serial, SerialPort};
use triarch_sandbox::{Mode, Seccomp};

/// Which [`Backend`] the child uses, when this runs as one.
const CHILD: &str = "TRIARCH_TEST_CONFINED";

/// Runs `work` on a thread of `class`.
fn on<T: Send + 'static>(sandbox: &Arc<Seccomp>, class: ThreadClass, work: impl FnOnce() -> T + Send + 'static) -> T {
    let sandbox = sandbox.clone();
    let thread = thread::spawn(move || {
        sandbox.apply(class).unwrap();
        work()
    });
    thread.join().unwrap()
}

/// All that a guest does to a console, each part on the thread that does it in a VM. Not a test by itself.
#[test]
#[ignore = "started by other tests"]
fn child() {
    let Ok(backend) = std::env::var(CHILD) else { return };
    let (kind, path) = backend.split_once(' ').unwrap();
    let backend = match kind {
        "tty" => Backend::Tty,
        "pty" => Backend::Pty,
        "file" => Backend::File(path.into()),
        _ => Backend::Socket(path.into()),
    };
    let sandbox = Arc::new(Seccomp::new(Mode::Enforce, triarch_arch::OLDER_SYSCALLS));
    let (serial, mut user) = on(&sandbox, ThreadClass::Control, move || {
        let console = Arc::new(Console::open(&backend).unwrap());
        let serial = Arc::new(Serial::new(console, Arc::new(CountingLine::default())));
        let user: Option<fs::File> = match &backend {
            Backend::Pty => {
                let path = serial.console().path().unwrap();
                Some(fs::OpenOptions::new().read(true).write(true).open(path).unwrap())
            }
            Backend::Socket(path) => Some(std::os::fd::OwnedFd::from(UnixStream::connect(path).unwrap()).into()),
            _ => None,
        };
        serial.on_event();
        let _ = serial.console().size();
        (serial, user)
    });
    let port = serial.clone();
    on(&sandbox, ThreadClass::Vcpu, move || {
        // More than any host takes at once from a user that does not read.
        for _ in 0..100_000 {
            port.write(0, b"x").unwrap();
        }
        port.read(0, &mut [0]).unwrap();
        // Whatever goes wrong, the terminal is given back, and the reason can be read.
        std::panic::catch_unwind(|| panic!("on purpose")).unwrap_err();
    });
    if let Some(user) = &mut user {
        user.write_all(b"input").unwrap();
    }
    for class in [ThreadClass::Control, ThreadClass::Device] {
        let console = serial.console().clone();
        on(&sandbox, class, move || {
            console.write(b"y");
            console.service(&mut [0; 64]);
            console.drain(Duration::from_millis(10));
            let _ = console.size();
        });
    }
    drop(user);
    on(&sandbox, ThreadClass::Device, {
        let console = serial.console().clone();
        move || console.service(&mut [0; 64])
    });
    on(&sandbox, ThreadClass::Control, move || drop(serial));
}

/// The child's way to end, with `backend` and its standard streams led to `terminal`.
fn run(backend: &str, terminal: Option<&Console>) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env(CHILD, backend)
        // Which would read our own file, and no thread may do that.
        .env_remove("RUST_BACKTRACE");
    if let Some(console) = terminal {
        let slave = || {
            fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(console.path().unwrap())
                .unwrap()
        };
        command.stdin(slave()).stdout(slave());
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        console.write(b"typed");
        for _ in 0..3000 {
            console.service(&mut [0; 4096]);
            console.room();
            if let Some(status) = child.try_wait().unwrap() {
                assert!(status.success(), "{backend:?}: {status}");
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        child.kill().unwrap();
        panic!("{backend:?}: still running");
    }
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{backend:?}: {} {error}", output.status);
}

#[test]
fn files_need_only_what_the_filters_allow() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    run(&format!("file {}", path.display()), None);
    assert_eq!(fs::metadata(path).unwrap().len(), 100_002);
}

#[test]
fn sockets_need_only_what_the_filters_allow() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    run(&format!("socket {}", path.display()), None);
    assert!(!path.exists());
    // One that was left behind has to be removed first.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    run(&format!("socket {}", path.display()), None);
}

#[test]
fn ptys_need_only_what_the_filters_allow() {
    run("pty ", None);
}

#[test]
fn terminals_need_only_what_the_filters_allow() {
    let console = Console::open(&Backend::Pty).unwrap();
    run("tty ", Some(&console));
}

#[test]
fn pipes_and_sockets_as_standard_streams_do_too() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut child = command
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env(CHILD, "tty ")
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::piped())
        .stdout(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Otherwise the end of the output would wait for our own copy of the other end.
    drop(command);
    child.stdin.take().unwrap().write_all(b"typed").unwrap();
    let mut output = Vec::new();
    (&ours).read_to_end(&mut output).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(output.iter().filter(|b| **b == b'x').count() > 100);
}
