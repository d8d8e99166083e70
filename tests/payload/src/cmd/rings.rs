//! `fuzz-ring DEV CASE`: one malformed chain or ring, then what the device says. The device is started anew afterwards
//! and has to work again.

use crate::Guest;
use crate::clock::Deadline;
use crate::dev::{Setup, device_name};
use crate::interrupts;
use crate::shell::{Args, Reply};
use crate::virtio::ring::{Dma, INDIRECT, NEXT, Options, Queue, WRITE, write_descriptor};
use crate::virtio::{Transport, status};
use alloc::format;
use alloc::string::String;

/// An address no RAM is at.
const NOWHERE: u64 = 1 << 45;

/// The cases, each with what it does.
pub const CASES: [&str; 21] = [
    "loop",
    "self-loop",
    "next-out-of-range",
    "head-out-of-range",
    "address-nowhere",
    "address-wraps",
    "length-past-ram",
    "zero-length",
    "wrong-direction",
    "no-status",
    "empty-header",
    "index-jump",
    "too-long",
    "indirect-nested",
    "indirect-odd-size",
    "indirect-empty",
    "indirect-nowhere",
    "indirect-loop",
    "indirect-next",
    "ring-nowhere",
    "ring-misaligned",
];

/// `fuzz-ring DEV CASE` or `fuzz-ring cases`
pub fn fuzz(guest: &mut Guest, args: &mut Args) -> Reply {
    let word = args.word("device")?;
    if word == "cases" {
        return Ok(CASES.join(" "));
    }
    let (name, index) = device_name(word)?;
    let case = args.word("CASE")?;
    if !CASES.contains(&case) {
        return Err(format!("no case {case}"));
    }
    let driver = guest.driver(name, index)?;
    driver.prove()?;
    let dma = Dma::new(8192)?;
    let victim = driver.victim();
    let config_vector = driver.transport().config_vector();
    let told_before = interrupts::count(config_vector);
    let outcome = if let Some(ring) = case.strip_prefix("ring-") {
        bad_ring(driver.transport(), victim, ring)
    } else {
        let queue = driver
            .queues()
            .into_iter()
            .find(|queue| queue.index == victim)
            .ok_or("no queue")?;
        bad_chain(queue, case, &dma)
    };
    // The device gives up, or completes the chain, as soon as its thread gets to it on a busy host.
    let deadline = Deadline::after_ms(1000);
    let mut completed = false;
    while driver.transport().status() & status::NEEDS_RESET == 0 && !completed {
        let Some(left) = deadline.left() else { break };
        interrupts::sleep(config_vector, told_before, left.min(1_000_000));
        let mut queues = driver.queues().into_iter();
        completed = queues.any(|queue| queue.index == victim && queue.poll().is_some());
    }
    let state = driver.transport().status();
    // The status changes before the interrupt comes.
    let deadline = Deadline::after_ms(if state & status::NEEDS_RESET != 0 { 1000 } else { 0 });
    while interrupts::count(config_vector) == told_before {
        let Some(left) = deadline.left() else { break };
        interrupts::sleep(config_vector, told_before, left);
    }
    let told = interrupts::count(config_vector) - told_before;
    guest.drop_driver(name, index);
    drop(dma);
    outcome?;
    guest
        .driver(name, index)?
        .prove()
        .map_err(|why| format!("does not work again after {case}: {why}"))?;
    let needs_reset = u8::from(state & status::NEEDS_RESET != 0);
    Ok(format!(
        "status={state:#x} needs_reset={needs_reset} completed={} told={told} recovered=1",
        u8::from(completed)
    ))
}

/// Restarts the device with queue `victim` at an impossible place.
fn bad_ring(transport: &mut Transport, victim: u16, case: &str) -> Result<(), String> {
    let setup = Setup::default();
    let features = transport.negotiate(setup.features())?;
    let mut queue = transport.unplaced_queue(victim, 64, Options::of(features))?;
    let (desc, avail, used) = queue.addresses();
    match case {
        "nowhere" => transport.place_rings(victim, NOWHERE, NOWHERE + 0x1000, NOWHERE + 0x2000),
        _ => transport.place_rings(victim, desc + 1, avail + 1, used + 1),
    }
    transport.run();
    queue.kick_anyway();
    // Its rings must not be used for anything else while the device runs.
    core::mem::forget(queue);
    Ok(())
}

/// Publishes one bad chain. `dma` serves as header, data and indirect table.
fn bad_chain(queue: &mut Queue, case: &str, dma: &Dma) -> Result<(), String> {
    let (buffer, table) = (dma.address(), dma.address() + 4096);
    let size = queue.size;
    let mut head = 0;
    match case {
        "loop" => {
            queue.set_descriptor(0, buffer, 16, NEXT, 1);
            queue.set_descriptor(1, buffer, 16, NEXT, 0);
        }
        "self-loop" => queue.set_descriptor(0, buffer, 16, NEXT, 0),
        "next-out-of-range" => queue.set_descriptor(0, buffer, 16, NEXT, size),
        "head-out-of-range" => head = size,
        "address-nowhere" => request(queue, NOWHERE, 16, buffer),
        "address-wraps" => request(queue, u64::MAX - 7, 16, buffer),
        "length-past-ram" => request(queue, buffer, u32::MAX, buffer),
        "zero-length" => queue.set_descriptor(0, buffer, 0, 0, 0),
        "wrong-direction" => {
            queue.set_descriptor(0, buffer, 512, WRITE | NEXT, 1);
            queue.set_descriptor(1, buffer, 16, 0, 0);
        }
        "no-status" => queue.set_descriptor(0, buffer, 16, 0, 0),
        "empty-header" => {
            queue.set_descriptor(0, buffer, 3, NEXT, 1);
            queue.set_descriptor(1, buffer + 1024, 1, WRITE, 0);
        }
        "index-jump" => {
            queue.set_available_index(0x8000);
            queue.kick_anyway();
            return Ok(());
        }
        "too-long" => {
            for at in 0..size {
                queue.set_descriptor(at, buffer, 16, NEXT, (at + 1) % size);
            }
        }
        _ => return bad_table(queue, case, buffer, table),
    }
    queue.publish(head);
    queue.kick_anyway();
    Ok(())
}

/// A three-part chain, as a disk wants it, with `address` and `len` in the middle.
fn request(queue: &Queue, address: u64, len: u32, buffer: u64) {
    queue.set_descriptor(0, buffer, 16, NEXT, 1);
    queue.set_descriptor(1, address, len, WRITE | NEXT, 2);
    queue.set_descriptor(2, buffer + 1024, 1, WRITE, 0);
}

/// Bad indirect tables.
fn bad_table(queue: &mut Queue, case: &str, buffer: u64, table: u64) -> Result<(), String> {
    let (mut address, mut len, mut flags) = (table, 32, INDIRECT);
    write_descriptor(table, buffer, 16, NEXT, 1);
    write_descriptor(table + 16, buffer + 1024, 1, WRITE, 0);
    match case {
        "indirect-nested" => write_descriptor(table, table, 32, INDIRECT, 0),
        "indirect-odd-size" => len = 17,
        "indirect-empty" => len = 0,
        "indirect-nowhere" => address = NOWHERE,
        "indirect-loop" => write_descriptor(table + 16, buffer, 16, NEXT, 0),
        "indirect-next" => flags = INDIRECT | NEXT,
        _ => return Err(format!("no case {case}")),
    }
    queue.set_descriptor(0, address, len, flags, 1);
    queue.set_descriptor(1, buffer, 16, 0, 0);
    queue.publish(0);
    queue.kick_anyway();
    Ok(())
}
