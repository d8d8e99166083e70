//! `net N flood|sink|turns|answer`: loads between two guests.

use super::{EXPERIMENT, IPV4, TCP, ethernet, ipv4, parse_mac, tcp};
use crate::clock;
use crate::dev::flood::Tally;
use crate::dev::net::{Net, Offload};
use crate::shell::{Args, Reply};
use alloc::format;
use alloc::vec::Vec;

const OWN: [u8; 4] = [10, 0, 0, 1];
const PEER: [u8; 4] = [10, 0, 0, 2];
const PORT: u16 = 5001;
const LONGEST_MS: u64 = 3_600_000;

/// Runs one of the commands.
pub fn run(nic: &mut Net, what: &str, args: &mut Args) -> Reply {
    match what {
        "flood" => flood(nic, args),
        "sink" => sink(nic, args),
        "turns" => turns(nic, args),
        _ => answer(nic, args),
    }
}

fn report(tally: &Tally) -> Reply {
    Ok(format!(
        "frames={} bytes={} us={} kicks={} interrupts={}",
        tally.frames,
        tally.bytes,
        clock::nanoseconds(tally.ticks) / 1000,
        tally.kicks,
        tally.interrupts
    ))
}

/// `PEER LEN`: a frame of LEN bytes to PEER.
fn frame(nic: &Net, args: &mut Args) -> Result<Vec<u8>, alloc::string::String> {
    let peer = parse_mac(args.word("PEER")?)?;
    let len = args.number_to("LEN", 9014)?.max(60) as usize;
    Ok(ethernet(&peer, &nic.mac, EXPERIMENT, &alloc::vec![0x5a; len - 14]))
}

/// `flood PEER LEN MS`, `flood PEER LEN MS mss=N`
fn flood(nic: &mut Net, args: &mut Args) -> Reply {
    let mss = args.option("mss", 0).min(9000) as u16;
    let tally = if mss == 0 {
        let frame = frame(nic, args)?;
        let ms = args.number_to("MS", LONGEST_MS)?;
        nic.flood(&Offload::default().header(), &frame, ms)?
    } else {
        let peer = parse_mac(args.word("PEER")?)?;
        let body = alloc::vec![0x5a; args.number_to("LEN", 65_481)? as usize];
        let ms = args.number_to("MS", LONGEST_MS)?;
        let packet = ipv4(TCP, OWN, PEER, &tcp(OWN, PEER, PORT, &body));
        let offload = Offload {
            checksum: Some((34, 16)),
            segment: Some((1, 54, mss)),
        };
        nic.flood(&offload.header(), &ethernet(&peer, &nic.mac, IPV4, &packet), ms)?
    };
    report(&tally)
}

/// `sink MS [tcp]`
fn sink(nic: &mut Net, args: &mut Args) -> Reply {
    let ms = args.number_to("MS", LONGEST_MS)?;
    let kind = if args.has("tcp") { IPV4 } else { EXPERIMENT };
    report(&nic.sink(kind, ms)?)
}

/// `turns PEER LEN MS`
fn turns(nic: &mut Net, args: &mut Args) -> Reply {
    let frame = frame(nic, args)?;
    let turns = nic.turns(&frame, EXPERIMENT, args.number_to("MS", LONGEST_MS)?)?;
    Ok(format!("turns={} {}", turns.count(), turns.report()))
}

/// `answer PEER LEN MS`
fn answer(nic: &mut Net, args: &mut Args) -> Reply {
    let frame = frame(nic, args)?;
    let count = nic.answer(&frame, EXPERIMENT, args.number_to("MS", LONGEST_MS)?)?;
    Ok(format!("answers={count}"))
}
