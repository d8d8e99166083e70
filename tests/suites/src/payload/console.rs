//! The virtio console carries bytes both ways.

use super::data::{crc32, pattern};
use super::guest::{Guest, builder, number};
use super::payload_tests;
use anyhow::{Result, ensure};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use triarch_harness::agent::connect_socket;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("console":
    writes,
    reads,
    writes_to_a_file,
);

fn start(context: &Context) -> Result<(Guest, UnixStream)> {
    let vm = builder(context)?;
    let socket = vm.dir().join("console.sock");
    let guest = Guest::start(vm.set("--console", format!("socket={}", socket.display())))?;
    let host = connect_socket(&socket, Duration::from_secs(5))?;
    host.set_read_timeout(Some(Duration::from_secs(5)))?;
    Ok((guest, host))
}

fn writes(context: &Context) -> Result<Outcome> {
    let (mut guest, mut host) = start(context)?;
    for options in ["event_idx=1 indirect=1", "event_idx=0 indirect=0 size=4"] {
        guest.ask(&format!("console init {options}"))?;
        guest.ask("console write hello host")?;
        let mut text = [0; 11];
        host.read_exact(&mut text)?;
        ensure!(&text == b"hello host\n", "{:?}", String::from_utf8_lossy(&text));
        let checksum = number(&guest.ask("console fill 40000 3")?, "crc32")?;
        let mut bytes = vec![0; 40000];
        host.read_exact(&mut bytes)?;
        ensure!(u64::from(crc32(&bytes)) == checksum, "40000 bytes came changed");
    }
    Ok(Outcome::Passed)
}

fn reads(context: &Context) -> Result<Outcome> {
    let (mut guest, mut host) = start(context)?;
    guest.ask("console init")?;
    host.write_all(b"hello guest\n")?;
    let line = guest.ask("console read 2000")?;
    ensure!(line == "hello guest", "{line}");
    // Many more bytes than the guest has buffers for: none may be lost.
    guest.send("console verify 60000 9 5000")?;
    host.write_all(&pattern(9, 0, 60000))?;
    guest.answer()?;
    Ok(Outcome::Passed)
}

fn writes_to_a_file(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let file = vm.dir().join("console.txt");
    let mut guest = Guest::start(vm.set("--console", format!("file={}", file.display())))?;
    guest.ask("console write into a file")?;
    let text = std::fs::read_to_string(&file)?;
    ensure!(text == "into a file\n", "{text:?}");
    Ok(Outcome::Passed)
}
