//! Streams between guest and host, opened from either side.

use super::data::{crc32, pattern};
use super::guest::{Guest, builder, number};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;
use triarch_harness::suite::{Context, Outcome};
use triarch_harness::vsock;

payload_tests!("vsock":
    guest_connects,
    host_connects,
    refuses_unknown_ports,
    closes_from_the_host,
    keeps_to_credit,
);

const LIMIT: Duration = Duration::from_secs(5);

fn start(context: &Context) -> Result<(Guest, PathBuf)> {
    let vm = builder(context)?;
    let socket = vm.dir().join("vsock.sock");
    let guest = Guest::start(vm.flag("--vsock", format!("cid=42,socket={}", socket.display())))?;
    Ok((guest, socket))
}

/// Takes one connection to `port` and sends back what comes.
pub(super) fn echo_once(socket: &Path, port: u32) -> Result<thread::JoinHandle<std::io::Result<u64>>> {
    let listener = vsock::listen(socket, port)?;
    Ok(thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut copy = stream.try_clone()?;
        std::io::copy(&mut stream, &mut copy)
    }))
}

fn guest_connects(context: &Context) -> Result<Outcome> {
    let (mut guest, socket) = start(context)?;
    ensure!(number(&guest.ask("vsock info")?, "cid")? == 42);
    for (port, options) in [(52, "event_idx=1 indirect=1"), (53, "event_idx=0 indirect=0 size=16")] {
        guest.ask(&format!("vsock init {options}"))?;
        let host = echo_once(&socket, port)?;
        // Several times what either side has room for.
        guest.ask(&format!("vsock echo {port} 500000 7"))?;
        let carried = host.join().ok().context("the host's side panicked")??;
        ensure!(carried == 500_000, "{carried} bytes");
    }
    Ok(Outcome::Passed)
}

fn host_connects(context: &Context) -> Result<Outcome> {
    let (mut guest, socket) = start(context)?;
    guest.send("vsock serve 1024 6000")?;
    let mut stream = vsock::connect(&socket, 1024, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let sent = pattern(11, 0, 300_000);
    let mut writer = stream.try_clone()?;
    let data = sent.clone();
    let writing = thread::spawn(move || writer.write_all(&data));
    let mut back = vec![0; sent.len()];
    stream.read_exact(&mut back)?;
    writing.join().ok().context("the writer panicked")??;
    ensure!(back == sent, "bytes came back changed");
    stream.shutdown(Shutdown::Both)?;
    drop(stream);
    ensure!(number(&guest.answer()?, "len")? == 300_000);
    Ok(Outcome::Passed)
}

fn refuses_unknown_ports(context: &Context) -> Result<Outcome> {
    let (mut guest, socket) = start(context)?;
    let refused = guest.refused("vsock connect 99 3000")?;
    ensure!(refused.contains("refused"), "{refused}");
    // Nobody listens in the guest either; it answers by a reset while it looks at its queue.
    guest.send("vsock accept 7 400")?;
    let error = vsock::connect(&socket, 8, Duration::ZERO);
    ensure!(error.is_err(), "connected to a port nobody listens on");
    ensure!(guest.read_line()?.contains("nobody came"));
    Ok(Outcome::Passed)
}

fn closes_from_the_host(context: &Context) -> Result<Outcome> {
    let (mut guest, socket) = start(context)?;
    guest.send("vsock accept 1024 5000")?;
    let mut stream = vsock::connect(&socket, 1024, LIMIT)?;
    let id = guest.answer()?;
    stream.write_all(b"the last words")?;
    drop(stream);
    let got = guest.ask(&format!("vsock recv {id} 1000"))?;
    ensure!(number(&got, "len")? == 14, "{got}");
    ensure!(number(&got, "crc32")? == u64::from(crc32(b"the last words")), "{got}");
    Ok(Outcome::Passed)
}

fn keeps_to_credit(context: &Context) -> Result<Outcome> {
    let (mut guest, socket) = start(context)?;
    guest.send("vsock accept 1024 5000")?;
    let mut stream = vsock::connect(&socket, 1024, LIMIT)?;
    let id = guest.answer()?;
    // The guest takes in 64 KiB without reading; the rest has to wait at the host. The guest fails if more comes.
    let writing = thread::spawn(move || stream.write_all(&pattern(2, 0, 400_000)).map(|()| stream));
    thread::sleep(Duration::from_millis(50));
    let got = guest.ask(&format!("vsock recv {id} 400000"))?;
    ensure!(number(&got, "len")? == 400_000, "{got}");
    ensure!(
        number(&got, "crc32")? == u64::from(crc32(&pattern(2, 0, 400_000))),
        "{got}"
    );
    writing.join().ok().context("the writer panicked")??;
    Ok(Outcome::Passed)
}
