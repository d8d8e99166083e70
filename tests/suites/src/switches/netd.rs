//! triarch-netd with ports of any kind.

use crate::storage::soon;
use anyhow::{Result, ensure};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::process::Process;
use triarch_harness::suite::Context;

/// Its name.
const PROGRAM: &str = "triarch-netd";

/// The program, which lies beside the VMM.
pub fn program(context: &Context) -> PathBuf {
    context.triarch.with_file_name(PROGRAM)
}

/// Starts it between a guest at `socket` and the host's end of the interface `tap`; it is asked at `control`.
///
/// # Errors
/// It does not answer.
pub fn between(context: &Context, socket: &Path, tap: &str, control: &Path) -> Result<Process> {
    let ports = [
        format!("name=guest,socket={}", socket.display()),
        format!("name=host,tap={tap}"),
    ];
    start(&program(context), &ports, control)
}

/// Starts it with these ports and waits until it answers at `control`.
///
/// # Errors
/// It does not.
pub fn start(program: &Path, ports: &[String], control: &Path) -> Result<Process> {
    let mut command = Command::new(program);
    for port in ports {
        command.args(["--port", port]);
    }
    command.arg("--control-socket").arg(control);
    let process = Process::start(&mut command)?;
    let deadline = Instant::now() + soon();
    while UnixStream::connect(control).is_err() {
        ensure!(
            Instant::now() < deadline,
            "{PROGRAM} does not listen{}",
            process.last_words()
        );
        thread::sleep(Duration::from_millis(1));
    }
    Ok(process)
}
