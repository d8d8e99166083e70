//! Each kind of device comes, is used by the guest, and goes, and the host has all of it back.

use super::{LIMIT, Plug, SIZE, image};
use crate::held::Held;
use crate::payload::data::{crc32, pattern};
use crate::payload::ends::started_by;
use crate::payload::guest::{Guest, builder, number};
use crate::payload::nursery::children;
use crate::payload::vsock::echo_once;
use crate::storage::{Daemon, Program};
use crate::virtiofsd::{self, Virtiofsd};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;
use triarch_harness::jobs::wait;
use triarch_harness::net::{self, Tap};
use triarch_harness::suite::{Context, Outcome, Test, is_patient, patient};

/// This module's tests.
pub const TESTS: &[Test] = &[
    Test::payload("plug::a_vsock_comes_and_goes", vsock),
    Test::payload("plug::vhost_fs::a_file_system_comes_and_goes", file_system).within(Duration::from_secs(30)),
    Test::payload("plug::a_device_of_any_type_comes_and_goes", any_type),
    Test::payload("plug::a_disk_of_a_daemon_comes_and_goes", disk_of_a_daemon),
    Test::payload("plug::a_disk_of_blkd_comes_and_goes", disk_of_blkd).within(Duration::from_secs(30)),
    Test::payload("plug::a_nic_comes_and_goes", nic),
    Test::payload("plug::a_nic_comes_open_and_goes", nic_that_is_open),
    Test::payload("plug::a_nic_of_netd_comes_and_goes", nic_of_netd).within(Duration::from_secs(30)),
];

const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 2);
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
const SHARED: (&str, &str) = ("--memory", "size=64M,shared=on");
const PORT: u32 = 52;

/// How often each comes and goes: once each way, and then again.
fn rounds() -> u64 {
    if is_patient() { 3 } else { 6 }
}

/// Something that comes and goes.
struct Kind<'a> {
    id: &'a str,
    /// Adds it; returns its slot.
    add: &'a mut dyn FnMut(&Plug, u64) -> Result<u64>,
    /// The guest does something with it.
    work: &'a mut dyn FnMut(&mut Guest, u64) -> Result<()>,
    /// What else of it has to be gone.
    gone: &'a mut dyn FnMut(&Plug) -> Result<()>,
}

/// It comes and goes, in turns given back by the guest and taken by force.
fn come_and_go(p: &mut Plug, kind: Kind<'_>) -> Result<()> {
    let before = Held::at_rest(p.guest.vm())?;
    let mut first: Option<Held> = None;
    for round in 0..rounds() {
        let by_force = round % 2 == 1;
        let mut turn = || -> Result<()> {
            let slot = (kind.add)(p, round)?;
            p.takes(1)?;
            ensure!(p.guest.ask(&format!("slots status {slot}"))? == "0xf");
            (kind.work)(&mut p.guest, round)?;
            if by_force {
                p.remove(kind.id, true)?;
                p.done(&format!("'{}' was taken by force", kind.id))?;
                ensure!(p.guest.ask("slots serve 1 5000")? == "came=0 went=0 lost=1");
            } else {
                p.gives(kind.id)?;
            }
            ensure!(p.is_gone(kind.id)? && p.guest.ask(&format!("slots status {slot}"))? == "0x0");
            (kind.gone)(p)?;
            before.is_all_of_beside_memory(p.guest.vm())?;
            match &first {
                Some(first) => first.is_all_of(p.guest.vm())?,
                // One of each way.
                None if by_force => first = Some(Held::at_rest(p.guest.vm())?),
                None => {}
            }
            Ok(())
        };
        turn().with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

fn vsock(context: &Context) -> Result<Outcome> {
    let mut p = Plug::start(context, &[])?;
    let socket = p.guest.vm().dir().join("vsock.sock");
    let kind = Kind {
        id: "talk",
        add: &mut |p, round| {
            let body = json!({ "id": "talk", "cid": 42 + round, "socket": socket });
            p.add("vm.add-vsock", &body)
        },
        work: &mut |guest, round| {
            ensure!(number(&guest.ask("vsock info")?, "cid")? == 42 + round);
            let host = echo_once(&socket, PORT)?;
            guest.ask(&format!("vsock echo {PORT} 300000 {round}"))?;
            let carried = host.join().ok().context("the host's side panicked")??;
            ensure!(carried == 300_000, "{carried} bytes");
            fs::remove_file(format!("{}_{PORT}", socket.display()))?;
            Ok(())
        },
        gone: &mut |_| {
            ensure!(!socket.exists(), "its socket stays");
            Ok(())
        },
    };
    come_and_go(&mut p, kind)?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn file_system(context: &Context) -> Result<Outcome> {
    let Some(daemon) = Virtiofsd::find(context)? else {
        return Ok(Outcome::Skipped(virtiofsd::missing()));
    };
    let (socket, shared) = (daemon.socket().to_owned(), daemon.shared().to_owned());
    fs::write(shared.join("file"), pattern(3, 0, 200_000))?;
    fs::write(shared.join("written"), "")?;
    let mut p = Plug::start(context, &[SHARED])?;
    let daemon = std::cell::RefCell::new(daemon);
    let kind = Kind {
        id: "files",
        add: &mut |p, _| {
            daemon.borrow_mut().start()?;
            p.add(
                "vm.add-fs",
                &json!({ "id": "files", "tag": "shared", "socket": socket }),
            )
        },
        work: &mut |guest, round| {
            ensure!(guest.ask("fs 0 tag")? == "shared");
            let read = guest.ask("fs 0 read file")?;
            ensure!(number(&read, "len")? == 200_000, "{read}");
            ensure!(
                number(&read, "crc32")? == u64::from(crc32(&pattern(3, 0, 200_000))),
                "{read}"
            );
            guest.ask(&format!("fs 0 write written 100000 {round}"))?;
            ensure!(
                fs::read(shared.join("written"))? == pattern(round, 0, 100_000),
                "the host reads something else"
            );
            guest.refused("fs 0 read missing")?;
            Ok(())
        },
        gone: &mut |_| daemon.borrow_mut().expect_end(),
    };
    come_and_go(&mut p, kind)?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

/// Work on a disk of `SIZE` whose content is the pattern of `round`, and which gets that of `round` + 1.
fn on_a_disk(guest: &mut Guest, round: u64) -> Result<()> {
    ensure!(number(&guest.ask("blk 0 info")?, "sectors")? == SIZE / 512);
    guest.ask(&format!("blk 0 verify 0 2048 {round}"))?;
    guest.ask(&format!("blk 0 write 0 2048 {}", round + 1))?;
    guest.ask("blk 0 flush")?;
    guest.ask(&format!("blk 0 verify 0 2048 {}", round + 1)).map(drop)
}

/// A disk that a daemon of ours serves, as `body` of its socket says.
fn served(context: &Context, route: &str, body: impl Fn(&Path) -> Value) -> Result<Outcome> {
    let dir = tempfile::Builder::new().prefix("daemon").tempdir_in(&context.dir)?;
    let disk = image(context, "disk", 0)?;
    let mut daemon = Daemon::find(Program::Blkd, context, dir.path(), 1).context("no daemon")?;
    daemon.start(disk.path())?;
    let body = body(daemon.socket());
    let mut p = Plug::start(context, &[SHARED])?;
    let kind = Kind {
        id: "served",
        add: &mut |p, _| p.add(route, &body),
        work: &mut on_a_disk,
        gone: &mut |p| {
            ensure!(p.api.get("vm.info")?["links"]["served"].is_null(), "its link stays");
            Ok(())
        },
    };
    come_and_go(&mut p, kind)?;
    ensure!(disk.read(0, SIZE as usize)? == pattern(rounds(), 0, SIZE as usize));
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn any_type(context: &Context) -> Result<Outcome> {
    served(
        context,
        "vm.add-generic-vhost-user",
        |socket| json!({ "id": "served", "device_type": 2, "socket": socket, "queue_sizes": [64] }),
    )
}

fn disk_of_a_daemon(context: &Context) -> Result<Outcome> {
    served(
        context,
        "vm.add-disk",
        |socket| json!({ "id": "served", "vhost_user": true, "vhost_socket": socket }),
    )
}

/// The processes that the VMM's helper has started.
fn daemons(p: &Plug, name: &str) -> Result<Vec<u32>> {
    let helpers = children(p.guest.vm().pid(), "triarch")?;
    ensure!(helpers.len() == 1, "{helpers:?} start daemons");
    children(helpers[0], name)
}

/// A VMM that may start daemons, whose sockets are below `run` in the test's directory.
fn with_helper(context: &Context) -> Result<Plug> {
    let run = context.dir.join("run");
    fs::create_dir(&run)?;
    let script = format!("export RUNTIME_DIRECTORY='{}'; exec", run.display());
    let (memory, size) = SHARED;
    Plug::of(
        builder(&started_by(context, &script, "")?)?
            .set(memory, size)
            .switch("--daemons"),
    )
}

/// No daemon of this name is left, and none of its files.
fn left(context: &Context, p: &Plug, name: &str) -> Result<()> {
    wait(&format!("{name} does not end"), patient(LIMIT), || {
        Ok(daemons(p, name)?.is_empty().then_some(()))
    })?;
    let mut places = vec![context.dir.join("run")];
    while let Some(place) = places.pop() {
        for entry in fs::read_dir(place)? {
            let entry = entry?;
            ensure!(entry.file_type()?.is_dir(), "{} stays", entry.path().display());
            places.push(entry.path());
        }
    }
    Ok(())
}

fn disk_of_blkd(context: &Context) -> Result<Outcome> {
    let disk = image(context, "disk", 0)?;
    let mut p = with_helper(context)?;
    let kind = Kind {
        id: "served",
        add: &mut |p, _| {
            let slot = p.add(
                "vm.add-disk",
                &json!({ "id": "served", "path": disk.path(), "backend": "blkd" }),
            )?;
            ensure!(daemons(p, "triarch-blkd")?.len() == 1);
            Ok(slot)
        },
        work: &mut on_a_disk,
        gone: &mut |p| left(context, p, "triarch-blkd"),
    };
    come_and_go(&mut p, kind)?;
    ensure!(disk.read(0, SIZE as usize)? == pattern(rounds(), 0, SIZE as usize));
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn pings(guest: &mut Guest, _: u64) -> Result<()> {
    let answer = guest.ask(&format!("net 0 ping {GUEST} {HOST} 10"))?;
    ensure!(number(&answer, "echoes")? == 10, "{answer}");
    guest.ask(&format!("net 0 ping {GUEST} {HOST} 3 len=1472")).map(drop)
}

fn nic(context: &Context) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let mut p = Plug::start(context, &[])?;
    let kind = Kind {
        id: "nic",
        add: &mut |p, _| {
            p.add(
                "vm.add-net",
                &json!({ "id": "nic", "tap": "tap0", "ip": HOST, "mask": MASK }),
            )
        },
        work: &mut pings,
        gone: &mut |_| {
            ensure!(net::interfaces()? == ["lo"], "its tap stays");
            Ok(())
        },
    };
    come_and_go(&mut p, kind)?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

/// A client gives the descriptor of its tap with the request.
fn nic_that_is_open(context: &Context) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let tap = Tap::create("tap0", HOST, MASK, false)?;
    let mut p = Plug::start(context, &[])?;
    let kind = Kind {
        id: "nic",
        add: &mut |p, _| {
            let file = net::attach(tap.name(), false)?;
            let body = json!({ "id": "nic", "fds": [41], "num_queues": 2 }).to_string();
            let answer = p.api.request_with("PUT", "vm.add-net", Some(&body), &[file.as_fd()])?;
            ensure!(answer.status == 200, "{} {}", answer.status, answer.body);
            p.slot_of(&serde_json::from_str(&answer.body)?)
        },
        work: &mut pings,
        gone: &mut |_| {
            // It is free for somebody else.
            net::attach(tap.name(), false).context("somebody uses the tap")?;
            Ok(())
        },
    };
    come_and_go(&mut p, kind)?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}

fn nic_of_netd(context: &Context) -> Result<Outcome> {
    if let Some(why) = net::unavailable() {
        return Ok(Outcome::Skipped(why));
    }
    net::enter_namespace()?;
    let tap = Tap::create("tap0", HOST, MASK, false)?;
    let mut p = with_helper(context)?;
    let kind = Kind {
        id: "nic",
        add: &mut |p, _| {
            let slot = p.add(
                "vm.add-net",
                &json!({ "id": "nic", "tap": tap.name(), "backend": "netd" }),
            )?;
            ensure!(daemons(p, "triarch-netd")?.len() == 1);
            Ok(slot)
        },
        work: &mut pings,
        gone: &mut |p| left(context, p, "triarch-netd"),
    };
    come_and_go(&mut p, kind)?;
    net::attach(tap.name(), false).context("somebody uses the tap")?;
    p.guest.power_off()?;
    Ok(Outcome::Passed)
}
