//! passt, which gives a guest the network that a program of the host has: its address by DHCP, its connections as sockets.

use super::data::pattern;
use super::guest::{Guest, builder, field};
use crate::storage::{soon, wait_link, wait_state};
use anyhow::{Context as _, Result, ensure};
use std::net::{Ipv4Addr, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::net::{self, Tap};
use triarch_harness::process::Process;
use triarch_harness::suite::{Context, Outcome, Test};

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("passt::a_guest_has_an_address_and_sockets", serves).within(LONG),
    Test::payload("passt::it_may_die", may_die).within(LONG),
];

const LONG: Duration = Duration::from_secs(60);
const PROGRAM: &str = "passt";
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// The interface it takes the guest's network from.
const INTERFACE: &str = "tap9";
const HOST: Ipv4Addr = Ipv4Addr::new(10, 8, 7, 9);
/// What it gives the guest; the router stands for the host's loopback interface.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 8, 7, 2);
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 8, 7, 1);

/// passt, for one guest.
struct Passt {
    program: PathBuf,
    socket: PathBuf,
    process: Option<Process>,
    // Last: what is in it outlives the rest.
    _dir: tempfile::TempDir,
}

impl Passt {
    fn start(&mut self) -> Result<()> {
        self.process = None;
        let _ = std::fs::remove_file(&self.socket);
        let mut command = Command::new(&self.program);
        command.args(["--vhost-user", "--foreground", "--runas", "0", "--ipv4-only"]);
        command.arg("--socket").arg(&self.socket);
        command.args(["--interface", INTERFACE, "--netmask", "24", "--dns", "none"]);
        command.arg("--address").arg(GUEST.to_string());
        command.arg("--gateway").arg(ROUTER.to_string());
        let process = self.process.insert(Process::start(&mut command)?);
        let deadline = Instant::now() + soon();
        while !self.socket.exists() {
            let words = process.last_words();
            ensure!(Instant::now() < deadline, "it does not listen{words}");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// Runs `test` with a guest on a passt in a network namespace of their own.
fn with_passt(context: &Context, test: fn(&mut Guest, &mut Passt) -> Result<()>) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    let Ok(program) = context.images.path(PROGRAM) else {
        return Ok(Outcome::Skipped(format!("there is no {PROGRAM} among the images")));
    };
    net::enter_namespace()?;
    Tap::create(INTERFACE, HOST, MASK, false)?;
    let dir = tempfile::Builder::new().prefix("passt").tempdir_in(&context.dir)?;
    let mut passt = Passt {
        program,
        socket: dir.path().join("net.sock"),
        process: None,
        _dir: dir,
    };
    passt.start()?;
    let flag = format!("vhost_user=on,socket={},id=served", passt.socket.display());
    let mut guest = Guest::start(builder(context)?.api().flag("--net", flag))?;
    test(&mut guest, &mut passt).with_context(|| {
        let words = passt.process.as_ref().map(Process::last_words).unwrap_or_default();
        format!("last words of passt:{words}")
    })?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// The guest takes its address and sends a datagram to the host, which sends it back.
fn talk(guest: &mut Guest, seed: u64) -> Result<()> {
    let lease = guest.ask("net 0 dhcp ms=5000")?;
    ensure!(field(&lease, "address")? == GUEST.to_string(), "{lease}");
    ensure!(field(&lease, "mask")? == MASK.to_string(), "{lease}");
    ensure!(field(&lease, "router")? == ROUTER.to_string(), "{lease}");
    for (len, seed) in [(1, seed), (700, seed + 1), (1472, seed + 2)] {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.set_read_timeout(Some(soon()))?;
        let port = socket.local_addr()?.port();
        guest.send(&format!("net 0 udp {GUEST} {ROUTER} {port} {len} {seed} echo"))?;
        let mut buffer = [0; 2000];
        let came = socket.recv_from(&mut buffer);
        if let Ok((n, from)) = came {
            socket.send_to(&buffer[..n], from)?;
        }
        // It says best what went wrong.
        guest.answer()?;
        ensure!(buffer[..came?.0] == pattern(seed, 0, len), "{len} bytes came changed");
    }
    Ok(())
}

fn serves(context: &Context) -> Result<Outcome> {
    with_passt(context, |guest, _| {
        talk(guest, 1)?;
        // A driver that merges buffers, one that has less, and a guest that stood still.
        guest.ask("net 0 init offload=1")?;
        talk(guest, 10)?;
        guest.ask("net 0 init event_idx=0 indirect=0 size=64")?;
        talk(guest, 20)?;
        guest.vm().pause()?;
        guest.vm().resume()?;
        talk(guest, 30)
    })
}

fn may_die(context: &Context) -> Result<Outcome> {
    with_passt(context, |guest, passt| {
        talk(guest, 1)?;
        for round in 1..=5 {
            // It dies while frames flow that nobody answers.
            guest.send("net 0 send 400 7 100")?;
            thread::sleep(Duration::from_millis(round));
            passt.process = None;
            wait_link(guest.vm(), "without a daemon", |link| link["state"] == "Disconnected")?;
            passt.start()?;
            guest.answer()?;
            let link = wait_state(guest.vm(), "Connected")?;
            ensure!(link["reconnects"].as_u64() == Some(round), "{link}");
            talk(guest, 100 * round)?;
        }
        Ok(())
    })
}
