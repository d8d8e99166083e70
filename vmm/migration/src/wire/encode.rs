//! Messages to bytes.

use crate::blocker::{Blocker, MAX_BLOCKERS};

use super::{HEAD, Hello, Kind, MAGIC, MAX_TEXT, Message, Offer, Pages, Role, Runs, VERSION};

/// Puts `message` into `out`, which is emptied first, but for the bytes that end a message of pages or saved state: those are
/// returned, to be sent after it without being copied.
pub(crate) fn message<'a>(message: &Message<'a>, out: &mut Vec<u8>) -> &'a [u8] {
    start(message.kind(), out);
    let tail = body(message, out);
    end(tail.len(), out);
    tail
}

/// Puts a message of pages that are not compressed into `out`, but for what is on them.
pub(crate) fn pages(runs: &Runs, out: &mut Vec<u8>) {
    start(Kind::Pages, out);
    put_list(runs, false, out);
    end(runs.len() as usize, out);
}

fn start(kind: Kind, out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(&(kind as u16).to_le_bytes());
    // Reserved, and the length, which comes when it is known.
    out.extend_from_slice(&[0; HEAD - 2]);
}

/// The message in `out` ends with so many bytes more.
fn end(more: usize, out: &mut [u8]) {
    let len = (out.len() - HEAD + more) as u32;
    out[HEAD - 4..HEAD].copy_from_slice(&len.to_le_bytes());
}

fn body<'a>(message: &Message<'a>, out: &mut Vec<u8>) -> &'a [u8] {
    match message {
        Message::Hello(hello) => put_hello(hello, out),
        Message::Welcome(vmm) => {
            begin(out);
            put_text(vmm, out);
        }
        Message::Offer(offer) => put_offer(offer, out),
        Message::Pages(Pages { runs, packed, bytes }) => {
            put_list(runs, *packed, out);
            return bytes;
        }
        Message::Zeroes(runs) | Message::Missing(runs) | Message::Lacks(runs) | Message::Want(runs) => {
            put_runs(runs, out);
        }
        Message::RoundEnd(round) | Message::RoundDone(round) => put_u32(*round, out),
        Message::State { total, part } => {
            put_u64(*total, out);
            return part;
        }
        Message::Device { device, begins, part } => {
            put_u32((*device).into(), out);
            put_u32((*begins).into(), out);
            return part;
        }
        Message::Abort(reason) => put_text(reason, out),
        Message::Progress(progress) => {
            put_u32(progress.round, out);
            put_u64(progress.remaining, out);
        }
        Message::Blockers(blockers) => put_blockers(blockers, out),
        Message::Files { count, places } => {
            put_u32(*count, out);
            put_u32(places.len() as u32, out);
            for (file, offset) in places {
                put_u64(*file, out);
                put_u64(*offset, out);
            }
        }
        Message::Accepted
        | Message::Switch
        | Message::Complete
        | Message::Ready
        | Message::Go
        | Message::Running
        | Message::Alive
        | Message::End
        | Message::Serve
        | Message::Served => {}
    }
    &[]
}

fn put_u32(value: u32, out: &mut Vec<u8>) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(value: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn begin(out: &mut Vec<u8>) {
    out.extend_from_slice(&MAGIC);
    put_u32(VERSION, out);
}

/// As much of `text` as a message takes.
fn put_text(text: &str, out: &mut Vec<u8>) {
    let text = &text[..text.floor_char_boundary(MAX_TEXT)];
    put_u32(text.len() as u32, out);
    out.extend_from_slice(text.as_bytes());
}

fn put_hello(hello: &Hello, out: &mut Vec<u8>) {
    begin(out);
    out.extend_from_slice(&hello.token);
    let (role, index) = match hello.role {
        Role::Control => (0, 0),
        Role::Data(index) => (1, index),
        Role::Ask => (2, 0),
        Role::Check => (3, 0),
        Role::PostCopy => (4, 0),
        Role::Demand => (5, 0),
        Role::Push => (6, 0),
        Role::CheckPostCopy => (7, 0),
    };
    for number in [role, index, hello.streams] {
        out.extend_from_slice(&u16::to_le_bytes(number));
    }
    put_text(&hello.vmm, out);
}

fn put_offer(offer: &Offer, out: &mut Vec<u8>) {
    let regions = offer.layout.regions();
    put_u32(regions.len() as u32, out);
    for region in regions {
        put_u64(region.gpa, out);
        put_u64(region.len, out);
    }
    put_u32(offer.config.len() as u32, out);
    put_u32(offer.cpu.len() as u32, out);
    out.extend_from_slice(offer.config);
    out.extend_from_slice(offer.cpu);
}

/// As many of them as a message takes.
fn put_blockers(blockers: &[Blocker], out: &mut Vec<u8>) {
    let blockers = &blockers[..blockers.len().min(MAX_BLOCKERS)];
    put_u32(blockers.len() as u32, out);
    for blocker in blockers {
        put_u32(blocker.what as u32, out);
        for text in [&blocker.name, &blocker.reason, &blocker.remedy] {
            put_text(text, out);
        }
    }
}

fn put_list(runs: &Runs, packed: bool, out: &mut Vec<u8>) {
    put_u32(u32::from(packed), out);
    put_runs(runs, out);
}

fn put_runs(runs: &Runs, out: &mut Vec<u8>) {
    put_u32(runs.iter().count() as u32, out);
    for (gpa, len) in runs.iter() {
        put_u64(gpa, out);
        put_u64(len, out);
    }
}
