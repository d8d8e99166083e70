//! Sockets between guest and host.

use anyhow::{Result, ensure};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;
use triarch_harness::agent::Exec;
use triarch_harness::disk::pattern;
use triarch_harness::images::Kernel;
use triarch_harness::linux::LinuxBuilder;
use triarch_harness::suite::{Context, Outcome, Test};
use triarch_harness::vsock;

pub const TESTS: &[Test] = &[
    Test::nested("vsock::host_reaches_guest", |c| host_reaches_guest(c, Kernel::V6_1)),
    Test::nested("vsock::host_reaches_guest_on_linux_6_12", |c| {
        host_reaches_guest(c, Kernel::V6_12)
    }),
    Test::nested("vsock::guest_reaches_host", guest_reaches_host),
    Test::nested("vsock::a_port_without_listener_is_refused", refused),
    Test::nested("vsock::survives_a_restart", survives_a_restart),
];

const LIMIT: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

/// Three connections at a time, each with its own data, to a program in the guest that sends back
/// what it gets.
fn host_reaches_guest(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, kernel)?.boot()?;
    guest.agent().detach(&Exec::new(["/init", "vsock-echo", "5000"]))?;
    let socket = guest.vsock_socket();
    thread::scope(|scope| -> Result<()> {
        let talk = |seed: u64| {
            let stream = vsock::connect(&socket, 5000, LIMIT)?;
            echoed(&stream, &pattern(seed, MIB))
        };
        let all: Vec<_> = (1..=3).map(|seed| scope.spawn(move || talk(seed))).collect();
        for one in all {
            one.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(())
    })?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// Sends `content` and reads it back at the same time: the other side need not keep it all.
pub(super) fn echoed(stream: &UnixStream, content: &[u8]) -> Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    thread::scope(|scope| {
        let sending = scope.spawn(|| -> Result<()> {
            let mut stream = stream;
            stream.write_all(content)?;
            Ok(stream.shutdown(Shutdown::Write)?)
        });
        let mut received = Vec::new();
        let mut reader = stream;
        reader.read_to_end(&mut received)?;
        sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        ensure!(
            received == content,
            "{} bytes came back, changed or cut",
            received.len()
        );
        Ok(())
    })
}

fn guest_reaches_host(context: &Context) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, Kernel::V6_1)?.boot()?;
    let content = pattern(9, MIB);
    guest.agent().put("/tmp/up", 0o600, &content)?;
    let listener = vsock::listen(&guest.vsock_socket(), 6000)?;
    thread::scope(|scope| -> Result<()> {
        let serving = scope.spawn(|| -> Result<Vec<u8>> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(LIMIT))?;
            let mut received = Vec::new();
            stream.read_to_end(&mut received)?;
            stream.write_all(&received)?;
            Ok(received)
        });
        let talk = Exec::shell("/init vsock-connect 2 6000 < /tmp/up > /tmp/down").timeout(LIMIT);
        guest.agent().check(&talk)?;
        let received = serving.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
        ensure!(
            received == content,
            "the host got {} bytes, changed or cut",
            received.len()
        );
        Ok(())
    })?;
    ensure!(
        guest.agent().get("/tmp/down")? == content,
        "the guest got something else back"
    );
    // The socket is the listener's; the VMM has no part in it.
    std::fs::remove_file(vsock::host_socket(&guest.vsock_socket(), 6000))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn refused(context: &Context) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, Kernel::V6_1)?.boot()?;
    let answer = vsock::connect(&guest.vsock_socket(), 4999, Duration::ZERO);
    ensure!(answer.is_err(), "a connection to a port on which nobody listens");
    let exec = Exec::shell("/init vsock-connect 2 4998 < /dev/null").timeout(LIMIT);
    let output = guest.agent().output(&exec)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.exit.code == Some(1), "{:?}: {said}", output.exit);
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn survives_a_restart(context: &Context) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, Kernel::V6_1)?.boot()?;
    let guest = guest.reboot()?;
    ensure!(guest.shell("echo here")? == "here");
    guest.power_off()?;
    Ok(Outcome::Passed)
}
