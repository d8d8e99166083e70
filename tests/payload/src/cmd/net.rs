//! `net N ...`: enough of Ethernet, ARP, IPv4, ICMP, UDP and TCP to prove a NIC.

use crate::Guest;
use crate::clock::{self, Deadline};
use crate::data;
use crate::dev::Setup;
use crate::dev::net::{HEADER, Net, Offload, feature};
use crate::shell::{Args, Reply};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

mod dhcp;
mod loads;

const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
/// IEEE 802 local experimental ethertype 1.
const EXPERIMENT: u16 = 0x88b5;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;

type Ip = [u8; 4];

fn ip(args: &mut Args, what: &str) -> Result<Ip, String> {
    let word = args.word(what)?;
    let mut address = [0; 4];
    let mut parts = word.split('.');
    for byte in &mut address {
        *byte = parts
            .next()
            .and_then(|part| part.parse().ok())
            .ok_or_else(|| format!("{what} is no address: {word}"))?;
    }
    Ok(address)
}

fn mac_text(mac: &[u8]) -> String {
    mac.iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(":")
}

fn parse_mac(word: &str) -> Result<Vec<u8>, String> {
    let bytes: Option<Vec<u8>> = word.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    bytes
        .filter(|bytes| bytes.len() == 6)
        .ok_or_else(|| format!("no MAC: {word}"))
}

/// Runs one command on a NIC.
pub fn run(guest: &mut Guest, args: &mut Args) -> Reply {
    let index = args.number("NIC number")? as usize;
    let what = args.word("command")?;
    if what == "init" {
        guest.restart("net", index, &Setup::of(args))?;
        let nic = guest.net(index)?;
        return Ok(format!("features={:#x} pairs={}", nic.features, nic.pairs()));
    }
    let nic = guest.net(index)?;
    match what {
        "info" => info(nic),
        "send" => send(nic, args),
        "expect" => expect(nic, args),
        "ping" => ping(nic, args),
        "serve" => serve(nic, args),
        "udp" => udp(nic, args),
        "tso" => tso(nic, args),
        "dhcp" => dhcp::run(nic, args),
        "flood" | "sink" | "turns" | "answer" => loads::run(nic, what, args),
        "mac" => {
            let mac = parse_mac(args.word("MAC")?)?;
            nic.command(1, 1, &mac)?;
            nic.mac.copy_from_slice(&mac);
            Ok(mac_text(&nic.registers().config(0, 6)?))
        }
        "promisc" => nic
            .command(0, 0, &[args.number_to("0 or 1", 1)? as u8])
            .map(|()| String::new()),
        "command" => {
            let (class, command) = (
                args.number_to("CLASS", 255)? as u8,
                args.number_to("COMMAND", 255)? as u8,
            );
            let mut bytes = Vec::new();
            while let Ok(byte) = args.number_to("BYTE", 255) {
                bytes.push(byte as u8);
            }
            nic.command(class, command, &bytes).map(|()| String::new())
        }
        other => Err(format!("net {other}?")),
    }
}

fn info(nic: &mut Net) -> Reply {
    let config = nic.registers();
    let mut text = format!(
        "mac={} features={:#x} offered={:#x} pairs={}",
        mac_text(&nic.mac),
        nic.features,
        config.offered(),
        nic.pairs()
    );
    for (bit, name, offset) in [
        (feature::MTU, "mtu", 10),
        (feature::STATUS, "link", 6),
        (feature::MQ, "max_pairs", 8),
    ] {
        if config.offered() & bit != 0 {
            let _ = write!(text, " {name}={}", config.config_number(offset, 2)?);
        }
    }
    Ok(text)
}

fn ethernet(to: &[u8], from: &[u8], kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [to, from, &kind.to_be_bytes(), payload].concat();
    if frame.len() < 60 {
        frame.resize(60, 0);
    }
    frame
}

/// `send LEN SEED COUNT [pair=N]`: broadcast frames of LEN pattern bytes, seeds counting up.
fn send(nic: &mut Net, args: &mut Args) -> Reply {
    let (len, seed, count) = (
        args.number_to("LEN", 65000)?,
        args.number("SEED")?,
        args.number("COUNT")?,
    );
    let pair = args.option("pair", 0) as usize;
    let mut payload = alloc::vec![0; len as usize];
    for n in 0..count {
        data::fill(&mut payload, seed + n, 0);
        let frame = ethernet(&[0xff; 6], &nic.mac, EXPERIMENT, &payload);
        nic.send(pair, &frame, Offload::default())?;
    }
    Ok(String::new())
}

/// `expect LEN SEED COUNT MS`: such frames must come in, in order; others are skipped.
fn expect(nic: &mut Net, args: &mut Args) -> Reply {
    let (len, seed, count, ms) = (
        args.number_to("LEN", 65000)?,
        args.number("SEED")?,
        args.number("COUNT")?,
        args.number_to("MS", 60_000)?,
    );
    let deadline = Deadline::after_ms(ms);
    let mut expected = alloc::vec![0; len as usize];
    let mut skipped = 0;
    for n in 0..count {
        data::fill(&mut expected, seed + n, 0);
        loop {
            let frame = nic
                .receive(deadline)
                .ok_or_else(|| format!("frame {n} did not come, {skipped} others"))?;
            let payload = frame.get(HEADER + 14..).ok_or("runt frame")?;
            if frame[HEADER + 12..HEADER + 14] != EXPERIMENT.to_be_bytes() {
                skipped += 1;
            } else if payload.starts_with(&expected) {
                break;
            } else {
                return Err(format!("frame {n} came changed ({} bytes)", payload.len()));
            }
        }
    }
    Ok(format!("skipped={skipped}"))
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let mut sum = bytes.chunks(2).fold(0u64, |sum, pair| {
        sum + (u64::from(pair[0]) << 8) + pair.get(1).map_or(0, |low| u64::from(*low))
    });
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn ipv4(kind: u8, from: Ip, to: Ip, payload: &[u8]) -> Vec<u8> {
    let mut header = [0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    header[2..4].copy_from_slice(&(20 + payload.len() as u16).to_be_bytes());
    header[12..16].copy_from_slice(&from);
    header[16..20].copy_from_slice(&to);
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [&header[..], payload].concat()
}

fn arp(operation: u16, mac: &[u8; 6], from: Ip, to_mac: &[u8], to: Ip) -> Vec<u8> {
    [
        &[0, 1, 8, 0, 6, 4][..],
        &operation.to_be_bytes(),
        mac,
        &from,
        to_mac,
        &to,
    ]
    .concat()
}

/// A received frame: its ethertype and what follows.
fn open(frame: &[u8]) -> Option<(u16, &[u8])> {
    let frame = frame.get(HEADER..)?;
    Some((u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]), &frame[14..]))
}

/// An IPv4 packet of `kind` to `to`: sender and payload.
fn open_ipv4(packet: &[u8], kind: u8, to: Ip) -> Option<(Ip, &[u8])> {
    let header = packet.get(..20)?;
    let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if header[9] != kind || header[16..20] != to {
        return None;
    }
    Some((header[12..16].try_into().ok()?, packet.get(20..len)?))
}

fn is_arp_for(packet: &[u8], operation: u8, target: Ip) -> bool {
    packet.len() >= 28 && packet[7] == operation && packet[24..28] == target
}

/// Asks for `peer`'s address, and again when no answer comes: a switch that has just begun, or a peer without buffers, drops frames.
fn resolve(nic: &mut Net, own: Ip, peer: Ip, deadline: Deadline) -> Result<Vec<u8>, String> {
    let request = arp(1, &nic.mac, own, &[0; 6], peer);
    let frame = ethernet(&[0xff; 6], &nic.mac, ARP, &request);
    while deadline.left().is_some() {
        nic.send(0, &frame, Offload::default())?;
        let again = Deadline::after_ms(500);
        while let Some(frame) = nic.receive(again) {
            match open(&frame) {
                Some((ARP, packet)) if is_arp_for(packet, 2, own) && packet[14..18] == peer => {
                    return Ok(packet[8..14].to_vec());
                }
                Some((ARP, packet)) if is_arp_for(packet, 1, own) => answer_arp(nic, own, packet)?,
                _ => {}
            }
        }
    }
    Err("no answer to ARP".into())
}

fn answer_arp(nic: &mut Net, own: Ip, request: &[u8]) -> Result<(), String> {
    let peer = [request[14], request[15], request[16], request[17]];
    let reply = arp(2, &nic.mac, own, &request[8..14], peer);
    let frame = ethernet(&request[8..14], &nic.mac, ARP, &reply);
    nic.send(0, &frame, Offload::default())
}

/// `ping OWN PEER [COUNT] [len=N]`
fn ping(nic: &mut Net, args: &mut Args) -> Reply {
    let (own, peer) = (ip(args, "OWN")?, ip(args, "PEER")?);
    let count = args.number("COUNT").unwrap_or(1);
    let mut body = alloc::vec![0; args.option("len", 56).min(1472) as usize];
    let mac = resolve(nic, own, peer, Deadline::after_ms(2000))?;
    let mut best = u64::MAX;
    for n in 0..count {
        data::fill(&mut body, n, 0);
        let mut message = [&[8, 0, 0, 0, 0x54, 0x52][..], &(n as u16).to_be_bytes(), &body].concat();
        let sum = checksum(&[&message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        let frame = ethernet(&mac, &nic.mac, IPV4, &ipv4(ICMP, own, peer, &message));
        let start = clock::ticks();
        nic.send((n as usize) % nic.pairs(), &frame, Offload::default())?;
        let deadline = Deadline::after_ms(2000);
        loop {
            let frame = nic.receive(deadline).ok_or_else(|| format!("echo {n} lost"))?;
            match open(&frame) {
                Some((ARP, packet)) if is_arp_for(packet, 1, own) => answer_arp(nic, own, packet)?,
                Some((IPV4, packet)) => match open_ipv4(packet, ICMP, own) {
                    Some((from, reply))
                        if from == peer && reply.first() == Some(&0) && reply.get(4..) == Some(&message[4..]) =>
                    {
                        break;
                    }
                    _ => {}
                },
                _ => {}
            }
        }
        best = best.min(clock::nanoseconds(clock::ticks() - start) / 1000);
    }
    Ok(format!("echoes={count} us_min={best}"))
}

/// `serve OWN MS`: answers ARP and ICMP echoes.
fn serve(nic: &mut Net, args: &mut Args) -> Reply {
    let own = ip(args, "OWN")?;
    let deadline = Deadline::after_ms(args.number_to("MS", 600_000)?);
    let (mut arps, mut echoes) = (0, 0);
    while let Some(frame) = nic.receive(deadline) {
        let from = frame.get(HEADER + 6..HEADER + 12).ok_or("runt frame")?.to_vec();
        match open(&frame) {
            Some((ARP, packet)) if is_arp_for(packet, 1, own) => {
                answer_arp(nic, own, packet)?;
                arps += 1;
            }
            Some((IPV4, packet)) => {
                if let Some((peer, message)) =
                    open_ipv4(packet, ICMP, own).filter(|(_, message)| message.len() >= 8 && message[0] == 8)
                {
                    let mut reply = message.to_vec();
                    reply[0] = 0;
                    reply[2..4].fill(0);
                    let sum = checksum(&[&reply]);
                    reply[2..4].copy_from_slice(&sum.to_be_bytes());
                    let frame = ethernet(&from, &nic.mac, IPV4, &ipv4(ICMP, own, peer, &reply));
                    nic.send(0, &frame, Offload::default())?;
                    echoes += 1;
                }
            }
            _ => {}
        }
    }
    Ok(format!("arps={arps} echoes={echoes}"))
}

/// The one's complement sum of a pseudo header, folded but not inverted: what a device completes.
fn pseudo(own: Ip, peer: Ip, kind: u8, len: usize) -> u16 {
    !checksum(&[&own, &peer, &[0, kind], &(len as u16).to_be_bytes()])
}

/// `udp OWN PEER PORT LEN SEED [csum] [echo]`: one datagram; `csum` leaves its checksum to the device, `echo` waits for
/// the same data back.
fn udp(nic: &mut Net, args: &mut Args) -> Reply {
    let (own, peer, port) = (
        ip(args, "OWN")?,
        ip(args, "PEER")?,
        args.number_to("PORT", 65535)? as u16,
    );
    let (len, seed) = (args.number_to("LEN", 1472)? as usize, args.number("SEED")?);
    let mac = resolve(nic, own, peer, Deadline::after_ms(2000))?;
    let mut body = alloc::vec![0; len];
    data::fill(&mut body, seed, 0);
    let mut datagram = [
        &4000u16.to_be_bytes()[..],
        &port.to_be_bytes(),
        &(8 + len as u16).to_be_bytes(),
        &[0, 0],
        &body,
    ]
    .concat();
    let partial = pseudo(own, peer, UDP, datagram.len());
    let (sum, offload) = if args.has("csum") {
        (
            partial,
            Offload {
                checksum: Some((34, 6)),
                segment: None,
            },
        )
    } else {
        (checksum(&[&partial.to_be_bytes(), &datagram]), Offload::default())
    };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    let frame = ethernet(&mac, &nic.mac, IPV4, &ipv4(UDP, own, peer, &datagram));
    nic.send(0, &frame, offload)?;
    if args.has("echo") {
        let deadline = Deadline::after_ms(2000);
        loop {
            let frame = nic.receive(deadline).ok_or("datagram did not come back")?;
            match open(&frame) {
                Some((ARP, packet)) if is_arp_for(packet, 1, own) => answer_arp(nic, own, packet)?,
                Some((IPV4, packet)) => match open_ipv4(packet, UDP, own) {
                    Some((_, back)) if back.get(8..) == Some(&body[..]) => break,
                    Some(_) => return Err("datagram came back changed".into()),
                    None => {}
                },
                _ => {}
            }
        }
    }
    Ok(format!("crc32={:#010x}", data::crc32(0, &body)))
}

/// A TCP segment whose checksum the device completes.
fn tcp(own: Ip, peer: Ip, port: u16, body: &[u8]) -> Vec<u8> {
    let mut segment = [
        &4000u16.to_be_bytes()[..],
        &port.to_be_bytes(),
        &[0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0],
        body,
    ]
    .concat();
    let sum = pseudo(own, peer, TCP, segment.len());
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

/// `tso OWN PEER PORT LEN SEED MSS`: one TCP segment of LEN bytes for the device to cut.
fn tso(nic: &mut Net, args: &mut Args) -> Reply {
    let (own, peer, port) = (
        ip(args, "OWN")?,
        ip(args, "PEER")?,
        args.number_to("PORT", 65535)? as u16,
    );
    let (len, seed, mss) = (
        args.number_to("LEN", 65000)? as usize,
        args.number("SEED")?,
        args.number_to("MSS", 9000)? as u16,
    );
    let mac = resolve(nic, own, peer, Deadline::after_ms(2000))?;
    let mut body = alloc::vec![0; len];
    data::fill(&mut body, seed, 0);
    let segment = tcp(own, peer, port, &body);
    let frame = ethernet(&mac, &nic.mac, IPV4, &ipv4(TCP, own, peer, &segment));
    nic.send(
        0,
        &frame,
        Offload {
            checksum: Some((34, 16)),
            segment: Some((1, 54, mss)),
        },
    )?;
    Ok(format!("crc32={:#010x}", data::crc32(0, &body)))
}
