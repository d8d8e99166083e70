//! A system call that a thread's class does not need kills the process, in real processes with the real filters.

#![allow(unsafe_code)] // system calls by number

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::thread;

use triarch_device_core::ThreadClass::{self, Control, Device, Disk, Http, Net, Report, Switch, Vcpu, Vsock};
use triarch_sandbox::{Mode, Seccomp};

/// Number of the class, the mode and the number of the call, when this runs as a child.
const CHILD: &str = "TRIARCH_TEST_FORBIDDEN";

const CLASSES: [ThreadClass; 9] = [Control, Http, Report, Vcpu, Disk, Net, Switch, Vsock, Device];

/// A system call with arguments that make it fail, or do nothing, where it is served.
struct Call {
    name: &'static str,
    number: libc::c_long,
    arguments: [libc::c_long; 3],
    /// The classes that need it.
    needed_by: &'static [ThreadClass],
}

const fn call(name: &'static str, number: libc::c_long, arguments: [libc::c_long; 3]) -> Call {
    let needed_by = &[];
    Call {
        name,
        number,
        arguments,
        needed_by,
    }
}

/// Calls of those who have taken a VMM over.
const CALLS: [Call; 18] = [
    call("ptrace", libc::SYS_ptrace, [-1, 0, 0]),
    call("mount", libc::SYS_mount, [0, 0, 0]),
    call("execve", libc::SYS_execve, [0, 0, 0]),
    call("kill", libc::SYS_kill, [0, 0, 0]),
    call("unshare", libc::SYS_unshare, [0, 0, 0]),
    call("setuid", libc::SYS_setuid, [-1, 0, 0]),
    call("chroot", libc::SYS_chroot, [0, 0, 0]),
    call("bpf", libc::SYS_bpf, [-1, 0, 0]),
    call("keyctl", libc::SYS_keyctl, [-1, 0, 0]),
    call("init_module", libc::SYS_init_module, [0, 0, 0]),
    call("perf_event_open", libc::SYS_perf_event_open, [0, 0, 0]),
    call("process_vm_readv", libc::SYS_process_vm_readv, [0, 0, 0]),
    Call {
        needed_by: &[Control],
        ..call("openat", libc::SYS_openat, [-1, 0, 0])
    },
    // A terminal is asked for its size, never typed into.
    Call {
        needed_by: &[Control],
        ..call("ioctl TIOCSTI", libc::SYS_ioctl, [-1, 0x5412, 0])
    },
    // Sockets that threads make are unix sockets; taps need another kind to be set up.
    Call {
        needed_by: &[Control],
        ..call(
            "socket AF_INET",
            libc::SYS_socket,
            [libc::AF_INET as libc::c_long, -1, 0],
        )
    },
    Call {
        needed_by: &[Control, Http, Vsock, Device],
        ..call("recvmsg", libc::SYS_recvmsg, [-1, 0, 0])
    },
    // Packets of a network card, with what is told beside them.
    Call {
        needed_by: &[Control, Http, Vsock, Device, Switch],
        ..call(
            "recvmsg MSG_DONTWAIT",
            libc::SYS_recvmsg,
            [-1, 0, libc::MSG_DONTWAIT as libc::c_long],
        )
    },
    Call {
        needed_by: &CLASSES,
        ..call("getpid", libc::SYS_getpid, [0, 0, 0])
    },
];

/// Makes the call on a thread of the class. Not a test by itself.
#[test]
#[ignore = "started by other tests"]
fn child() {
    let Ok(order) = std::env::var(CHILD) else { return };
    let [class, mode, call]: [usize; 3] = order
        .split(' ')
        .map(|n| n.parse().unwrap())
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    let (class, mode, call) = (CLASSES[class], [Mode::Enforce, Mode::Log][mode], &CALLS[call]);
    let sandbox = Arc::new(Seccomp::new(mode, triarch_arch::OLDER_SYSCALLS));
    let confined = thread::spawn(move || {
        sandbox.apply(class).unwrap();
        let [a, b, c] = call.arguments;
        // SAFETY: with these arguments the call fails or changes nothing, and reads no memory of ours.
        unsafe { libc::syscall(call.number, a, b, c, 0, 0, 0) };
    });
    confined.join().unwrap();
    println!("survived");
}

fn run(class: usize, mode: usize, call: usize) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env(CHILD, format!("{class} {mode} {call}"))
        .env_remove("RUST_BACKTRACE");
    command.stderr(Stdio::null()).output().unwrap()
}

fn survived(output: &Output) -> bool {
    let said = String::from_utf8_lossy(&output.stdout).contains("survived");
    assert_eq!(said, output.status.success(), "{}", output.status);
    said
}

#[test]
fn a_forbidden_call_kills_the_process() {
    for (number, class) in CLASSES.iter().enumerate() {
        for (index, call) in CALLS.iter().enumerate() {
            let output = run(number, 0, index);
            let name = call.name;
            if call.needed_by.contains(class) {
                assert!(survived(&output), "{name} kills {class:?}: {}", output.status);
            } else {
                let signal = output.status.signal();
                assert_eq!(signal, Some(libc::SIGSYS), "{name} on {class:?}: {}", output.status);
            }
        }
    }
}

#[test]
fn a_forbidden_call_is_only_logged_if_so_wished() {
    for (number, class) in CLASSES.iter().enumerate() {
        for (index, call) in CALLS.iter().enumerate() {
            let output = run(number, 1, index);
            assert!(survived(&output), "{} kills {class:?}: {}", call.name, output.status);
        }
    }
}
