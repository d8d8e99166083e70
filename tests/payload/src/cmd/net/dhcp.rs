//! `net N dhcp`: an address from a server (RFC 2131).

use super::{IPV4, Ip, UDP, checksum, ethernet, ipv4, open, pseudo};
use crate::clock::Deadline;
use crate::dev::net::{Net, Offload};
use crate::shell::{Args, Reply};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const NOBODY: Ip = [0; 4];
const EVERYBODY: Ip = [255; 4];
const SERVER: u16 = 67;
const CLIENT: u16 = 68;
/// What is asked here is answered with the same number.
const TRANSACTION: [u8; 4] = *b"Triv";
const MAGIC: [u8; 4] = [99, 130, 83, 99];
/// Where the magic number stands in a message.
const MAGIC_AT: usize = 236;
/// Options (RFC 2132).
const MASK: u8 = 1;
const ROUTER: u8 = 3;
const ADDRESS: u8 = 50;
const KIND: u8 = 53;
const SERVED_BY: u8 = 54;
const WANTED: u8 = 55;
const END: u8 = 255;
/// Kinds of message.
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;

/// `dhcp [ms=N]`: DISCOVER, OFFER, REQUEST, ACK.
pub fn run(nic: &mut Net, args: &mut Args) -> Reply {
    let ms = args.option("ms", 2000).min(60_000);
    let offer = ask(nic, DISCOVER, &[], OFFER, ms)?;
    let server = option(&offer, SERVED_BY).ok_or("the offer names no server")?;
    let wanted = [&[ADDRESS, 4][..], &offer[16..20], &[SERVED_BY, 4], &server].concat();
    let ack = ask(nic, REQUEST, &wanted, ACK, ms)?;
    if ack[16..20] != offer[16..20] {
        return Err("another address than the one offered".into());
    }
    let text = |ip: Option<Ip>| ip.map_or_else(|| "none".into(), |[a, b, c, d]| format!("{a}.{b}.{c}.{d}"));
    let own = [ack[16], ack[17], ack[18], ack[19]];
    Ok(format!(
        "address={} mask={} router={}",
        text(Some(own)),
        text(option(&ack, MASK)),
        text(option(&ack, ROUTER))
    ))
}

/// Sends a message with `options` and waits for one of kind `answer`.
fn ask(nic: &mut Net, kind: u8, options: &[u8], answer: u8, ms: u64) -> Result<Vec<u8>, String> {
    let mut message = alloc::vec![0; MAGIC_AT];
    // A request over Ethernet, whose answer goes to everybody.
    message[..4].copy_from_slice(&[1, 1, 6, 0]);
    message[4..8].copy_from_slice(&TRANSACTION);
    message[10] = 0x80;
    message[28..34].copy_from_slice(&nic.mac);
    message.extend_from_slice(&MAGIC);
    message.extend_from_slice(&[KIND, 1, kind]);
    message.extend_from_slice(options);
    message.extend_from_slice(&[WANTED, 2, MASK, ROUTER, END]);
    let len = 8 + message.len() as u16;
    let head = [CLIENT, SERVER, len, 0].map(u16::to_be_bytes).concat();
    let mut datagram = [head, message].concat();
    let sum = pseudo(NOBODY, EVERYBODY, UDP, datagram.len());
    let sum = checksum(&[&sum.to_be_bytes(), &datagram]);
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    let packet = ipv4(UDP, NOBODY, EVERYBODY, &datagram);
    let frame = ethernet(&[0xff; 6], &nic.mac, IPV4, &packet);
    nic.send(0, &frame, Offload::default())?;
    let deadline = Deadline::after_ms(ms);
    loop {
        let frame = nic.receive(deadline).ok_or_else(|| format!("no answer to {kind}"))?;
        let Some((IPV4, packet)) = open(&frame) else { continue };
        if let Some(message) = opened(packet).filter(|message| option(message, KIND) == Some([answer; 4])) {
            return Ok(message.to_vec());
        }
    }
}

/// The message in a packet for a client that asked here.
fn opened(packet: &[u8]) -> Option<&[u8]> {
    let datagram = packet.get(20..).filter(|_| packet[9] == UDP)?;
    let message = datagram.get(8..).filter(|_| datagram[2..4] == CLIENT.to_be_bytes())?;
    let ours = message.first() == Some(&2) && message.get(4..8)? == TRANSACTION;
    (ours && message.get(MAGIC_AT..MAGIC_AT + 4)? == MAGIC).then_some(message)
}

/// The four bytes of an option; of one with a single byte, that byte four times.
fn option(message: &[u8], wanted: u8) -> Option<Ip> {
    let mut rest = message.get(MAGIC_AT + 4..)?;
    loop {
        match *rest {
            [0, ..] => rest = &rest[1..],
            [code, len, ref values @ ..] if code != END => {
                let (value, behind) = values.split_at_checked(usize::from(len))?;
                match *value {
                    [byte] if code == wanted => return Some([byte; 4]),
                    [a, b, c, d, ..] if code == wanted => return Some([a, b, c, d]),
                    _ => rest = behind,
                }
            }
            _ => return None,
        }
    }
}
