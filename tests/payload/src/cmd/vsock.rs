//! `vsock ...`

use crate::Guest;
use crate::clock::Deadline;
use crate::data;
use crate::dev::Setup;
use crate::dev::vsock::Vsock;
use crate::shell::{Args, Reply};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const TIMEOUT_MS: u64 = 10_000;

fn pattern(len: u64, seed: u64) -> Vec<u8> {
    let mut bytes = alloc::vec![0; len as usize];
    data::fill(&mut bytes, seed, 0);
    bytes
}

/// Runs one command on the first socket device.
pub fn run(guest: &mut Guest, args: &mut Args) -> Reply {
    let word = args.word("command")?;
    if word == "init" {
        return guest.restart("vsock", 0, &Setup::of(args)).map(|()| String::new());
    }
    let vsock = guest.vsock(0)?;
    let deadline = Deadline::after_ms(TIMEOUT_MS);
    match word {
        "info" => Ok(format!("cid={}", vsock.cid)),
        "connect" => {
            let port = args.number_to("PORT", u32::MAX.into())?;
            let ms = args.number("MS").unwrap_or(TIMEOUT_MS);
            vsock
                .connect(port as u32, Deadline::after_ms(ms))
                .map(|id| format!("{id}"))
        }
        "accept" => {
            let (port, ms) = (args.number_to("PORT", u32::MAX.into())?, args.number_to("MS", 60_000)?);
            vsock
                .accept(port as u32, Deadline::after_ms(ms))
                .map(|id| format!("{id}"))
        }
        "send" => {
            let (id, len, seed) = (
                args.number("ID")? as usize,
                args.number_to("LEN", 1 << 20)?,
                args.number("SEED")?,
            );
            let bytes = pattern(len, seed);
            vsock.send(id, &bytes, deadline)?;
            Ok(format!("crc32={:#010x}", data::crc32(0, &bytes)))
        }
        "recv" => {
            let (id, len) = (args.number("ID")? as usize, args.number_to("LEN", 1 << 20)?);
            let bytes = vsock.receive(id, len as usize, deadline)?;
            Ok(format!("len={} crc32={:#010x}", bytes.len(), data::crc32(0, &bytes)))
        }
        "echo" => {
            let (port, len, seed) = (
                args.number_to("PORT", u32::MAX.into())?,
                args.number_to("LEN", 1 << 20)?,
                args.number("SEED")?,
            );
            let id = vsock.connect(port as u32, deadline)?;
            there_and_back(vsock, id, &pattern(len, seed), deadline)?;
            vsock.close(id, deadline)?;
            Ok(format!("len={len}"))
        }
        "serve" => {
            let (port, ms) = (args.number_to("PORT", u32::MAX.into())?, args.number_to("MS", 60_000)?);
            let deadline = Deadline::after_ms(ms);
            let id = vsock.accept(port as u32, deadline)?;
            serve(vsock, id, deadline).map(|bytes| format!("len={bytes}"))
        }
        "close" => vsock
            .close(args.number("ID")? as usize, deadline)
            .map(|()| String::new()),
        other => Err(format!("vsock {other}?")),
    }
}

/// Sends `bytes` and takes them in again at the same time: the other side echoes.
fn there_and_back(vsock: &mut Vsock, id: usize, bytes: &[u8], deadline: Deadline) -> Result<(), String> {
    let (mut sent, mut back) = (0, Vec::new());
    while back.len() < bytes.len() {
        let now = vsock.send_some(id, &bytes[sent..])?;
        sent += now;
        let got = vsock.take(id, bytes.len() - back.len())?;
        if now == 0 && got.is_empty() {
            if deadline.left().is_none() || vsock.ended(id)? {
                return Err(format!("{sent} of {} bytes sent, {} back", bytes.len(), back.len()));
            }
            vsock.wait(deadline)?;
        }
        back.extend(got);
    }
    if back == bytes {
        Ok(())
    } else {
        Err("bytes came back changed".into())
    }
}

/// Echoes until the peer ends; the number of bytes.
fn serve(vsock: &mut Vsock, id: usize, deadline: Deadline) -> Result<usize, String> {
    let mut total = 0;
    loop {
        let bytes = vsock.take(id, 65536)?;
        total += bytes.len();
        vsock.send(id, &bytes, deadline)?;
        if bytes.is_empty() {
            if vsock.ended(id)? {
                vsock.close(id, deadline)?;
                return Ok(total);
            }
            if deadline.left().is_none() {
                return Err(format!("peer does not end after {total} bytes"));
            }
            vsock.wait(deadline)?;
        }
    }
}
