//! A guest that goes on with other taps and consoles.

use super::super::data::{crc32, pattern};
use super::super::guest::{Guest, SERIAL, builder, number};
use super::super::payload_tests;
use super::{another, crash, edit, restore_with, snapshot, url};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use triarch_harness::agent::connect_socket;
use triarch_harness::net::{self, Tap};
use triarch_harness::suite::{Context, Outcome, patient};
use triarch_harness::vm::VmBuilder;

payload_tests!("snapshot::elsewhere":
    another_tap,
    a_tap_that_a_client_opened,
    another_console,
);

const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

/// The host's and the guest's address at interface `n`.
fn addresses(n: u8) -> (Ipv4Addr, Ipv4Addr) {
    (Ipv4Addr::new(10, 9, n, 1), Ipv4Addr::new(10, 9, n, 2))
}

/// Interface `n` of the host.
fn tap(n: u8) -> Result<Tap> {
    Tap::create(&format!("tap{n}"), addresses(n).0, MASK, false)
}

fn pings(guest: &mut Guest, n: u8) -> Result<()> {
    let (host, own) = addresses(n);
    let echoes = number(&guest.ask(&format!("net 0 ping {own} {host} 5"))?, "echoes")?;
    ensure!(echoes == 5, "{echoes} of 5 came back");
    Ok(())
}

/// Saves the guest after `change` and ends it.
fn saved(guest: Guest, kept: &Path) -> Result<PathBuf> {
    guest.vm().pause()?;
    let directory = kept.join("snapshot");
    snapshot(guest.vm().api()?, &directory)?;
    crash(guest);
    Ok(directory)
}

fn another_tap(context: &Context) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let kept = tempfile::tempdir_in(&context.dir)?;
    let (first, second) = (tap(1)?, tap(2)?);
    let vm = builder(context)?.flag("--net", format!("tap={},id=nic,mac=02:00:00:00:00:07", first.name()));
    let mut guest = Guest::start(vm.api())?;
    pings(&mut guest, 1)?;
    let directory = saved(guest, kept.path())?;
    edit(&directory, |config| config["net"][0]["tap"] = json!(second.name()))?;
    let mut guest = restore_with(context, &directory, json!({}))?;
    // It goes on with the queues that it has.
    pings(&mut guest, 2)?;
    guest.ask("net 0 init")?;
    pings(&mut guest, 2)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn a_tap_that_a_client_opened(context: &Context) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let kept = tempfile::tempdir_in(&context.dir)?;
    let (first, second) = (tap(1)?, tap(2)?);
    let mut guest = Guest::start(builder(context)?.api())?;
    let api = guest.vm().api()?.clone();
    let open = net::attach(first.name(), false)?;
    let body = json!({ "id": "nic", "fds": [41], "num_queues": 2 }).to_string();
    let answer = api.request_with("PUT", "vm.add-net", Some(&body), &[open.as_fd()])?;
    ensure!(answer.status == 200, "{} {}", answer.status, answer.body);
    drop(open);
    guest.ask("slots serve 1 2000")?;
    pings(&mut guest, 1)?;
    let directory = saved(guest, kept.path())?;

    // With the request.
    let (vm, api) = another(context)?;
    let serial = vm.dir().join(SERIAL);
    edit(&directory, |config| config["serial"]["socket"] = json!(serial))?;
    let from = url("source_url", &directory);
    api.refused("vm.restore", &from, 400, &["net_fds", "nic"])?;
    let request = |id: &str, fds: usize| -> Value {
        json!({ "source_url": from["source_url"], "resume": true, "net_fds": [{ "id": id, "num_fds": fds }] })
    };
    let restore = |id: &str, fds| -> Result<(u16, String)> {
        let open = net::attach(second.name(), false).context("somebody kept the tap of a request that failed")?;
        let body = request(id, fds).to_string();
        let answer = api.request_with("PUT", "vm.restore", Some(&body), &[open.as_fd()])?;
        Ok((answer.status, answer.body))
    };
    for (id, fds, words) in [
        ("other", 1, "give its descriptors with net_fds"),
        ("nic", 2, "1 descriptors"),
    ] {
        let (status, body) = restore(id, fds)?;
        ensure!(status == 400 && body.contains(words), "{id} {fds}: {status} {body}");
    }
    let (status, body) = restore("nic", 1)?;
    ensure!(status == 204, "{status} {body}");
    let mut guest = Guest::attach_restored(vm, &serial)?;
    pings(&mut guest, 2)?;
    crash(guest);

    // Inherited.
    let open = net::inheritable(net::attach(first.name(), false)?)?;
    let vm = VmBuilder::new(context)?;
    let serial = vm.dir().join(SERIAL);
    edit(&directory, |config| config["serial"]["socket"] = json!(serial))?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&open);
    let value = format!(
        "source_url=file://{},resume=on,net_fds=[nic@[{number}]]",
        directory.display()
    );
    let vm = vm.flag("--restore", value).start()?;
    drop(open);
    let mut guest = Guest::attach_restored(vm, &serial)?;
    pings(&mut guest, 1)?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn host_end(socket: &Path) -> Result<UnixStream> {
    let host = connect_socket(socket, patient(Duration::from_secs(5)))?;
    host.set_read_timeout(Some(patient(Duration::from_secs(5))))?;
    Ok(host)
}

fn another_console(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let socket = kept.path().join("first.sock");
    let vm = builder(context)?.set("--console", format!("socket={}", socket.display()));
    let mut guest = Guest::start(vm.api())?;
    let mut host = host_end(&socket)?;
    guest.ask("console init")?;
    guest.ask("console write before")?;
    let mut text = [0; 7];
    host.read_exact(&mut text)?;
    ensure!(&text == b"before\n", "{:?}", String::from_utf8_lossy(&text));
    let directory = saved(guest, kept.path())?;

    // Both of its queues go on, at another socket.
    let socket = kept.path().join("second.sock");
    edit(&directory, |config| config["console"]["socket"] = json!(socket))?;
    let mut guest = restore_with(context, &directory, json!({}))?;
    let mut host = host_end(&socket)?;
    let checksum = number(&guest.ask("console fill 40000 3")?, "crc32")?;
    let mut bytes = vec![0; 40000];
    host.read_exact(&mut bytes)?;
    ensure!(u64::from(crc32(&bytes)) == checksum, "40000 bytes came changed");
    guest.send("console verify 60000 9 5000")?;
    host.write_all(&pattern(9, 0, 60000))?;
    guest.answer()?;
    crash(guest);

    // And into a file, which needs nobody at the other end.
    let file = kept.path().join("console.txt");
    edit(&directory, |config| {
        config["console"] = json!({ "mode": "File", "file": file });
    })?;
    let mut guest = restore_with(context, &directory, json!({}))?;
    guest.ask("console write into a file")?;
    let text = std::fs::read_to_string(&file)?;
    ensure!(text == "into a file\n", "{text:?}");
    guest.power_off()?;
    Ok(Outcome::Passed)
}
