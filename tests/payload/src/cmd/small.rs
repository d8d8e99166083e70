//! `rng ...`, `console ...` and `fs ...`

use crate::Guest;
use crate::clock::Deadline;
use crate::data;
use crate::dev::Setup;
use crate::shell::{Args, Reply, parse};
use alloc::format;
use alloc::string::String;

/// The device number in front, 0 when there is none.
fn device<'a>(args: &mut Args<'a>, what: &str) -> Result<(usize, &'a str), String> {
    let word = args.word(what)?;
    Ok(match word.strip_prefix('#').and_then(parse) {
        Some(index) => (index as usize, args.word(what)?),
        None => (0, word),
    })
}

/// `rng [#N] LEN` or `rng [#N] init ...`
pub fn rng(guest: &mut Guest, args: &mut Args) -> Reply {
    let (index, word) = device(args, "LEN")?;
    if word == "init" {
        return guest.restart("rng", index, &Setup::of(args)).map(|()| String::new());
    }
    let len = parse(word)
        .filter(|len| (1..=65536).contains(len))
        .ok_or("LEN is 1 to 65536")? as usize;
    let bytes = guest.rng(index)?.read(len)?;
    let ones: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
    Ok(format!("len={len} ones={ones} crc32={:#010x}", data::crc32(0, bytes)))
}

/// `console [#N] write TEXT | fill LEN SEED | read MS | verify LEN SEED MS | size | init ...`
pub fn console(guest: &mut Guest, args: &mut Args) -> Reply {
    let (index, word) = device(args, "command")?;
    if word == "init" {
        return guest
            .restart("console", index, &Setup::of(args))
            .map(|()| String::new());
    }
    let console = guest.console(index)?;
    match word {
        "write" => console
            .write(format!("{}\n", args.rest()).as_bytes())
            .map(|()| String::new()),
        "fill" => {
            let (len, seed) = (args.number_to("LEN", 65536)?, args.number("SEED")?);
            let mut bytes = alloc::vec![0; len as usize];
            data::fill(&mut bytes, seed, 0);
            console.write(&bytes)?;
            Ok(format!("crc32={:#010x}", data::crc32(0, &bytes)))
        }
        "read" => {
            let text = console.read(4096, Deadline::after_ms(args.number_to("MS", 60_000)?));
            Ok(text
                .iter()
                .take_while(|byte| **byte != b'\n')
                .map(|byte| char::from(*byte))
                .collect())
        }
        "verify" => {
            let (len, seed, ms) = (
                args.number_to("LEN", 65536)? as usize,
                args.number("SEED")?,
                args.number_to("MS", 60_000)?,
            );
            let (mut expected, mut got) = (alloc::vec![0; len], alloc::vec::Vec::new());
            data::fill(&mut expected, seed, 0);
            let deadline = Deadline::after_ms(ms);
            while got.len() < len && deadline.left().is_some() {
                got.extend(console.read(len - got.len(), deadline));
            }
            if got == expected {
                Ok(String::new())
            } else {
                Err(format!(
                    "{} bytes of {len}, crc32={:#010x}",
                    got.len(),
                    data::crc32(0, &got)
                ))
            }
        }
        "size" => console
            .size()
            .map(|(columns, rows)| format!("columns={columns} rows={rows}")),
        other => Err(format!("console {other}?")),
    }
}

/// `fs N read NAME | write NAME LEN SEED | tag | init ...`
pub fn fs(guest: &mut Guest, args: &mut Args) -> Reply {
    let index = args.number("device number")? as usize;
    let word = args.word("command")?;
    if word == "init" {
        return guest.restart("fs", index, &Setup::of(args)).map(|()| String::new());
    }
    let fs = guest.fs(index)?;
    match word {
        "tag" => fs.tag(),
        "read" => {
            let bytes = fs.read(args.word("NAME")?)?;
            Ok(format!("len={} crc32={:#010x}", bytes.len(), data::crc32(0, &bytes)))
        }
        "write" => {
            let (name, len) = (args.word("NAME")?, args.number_to("LEN", 1 << 20)?);
            let mut bytes = alloc::vec![0; len as usize];
            data::fill(&mut bytes, args.number("SEED")?, 0);
            fs.write(name, &bytes)?;
            Ok(format!("crc32={:#010x}", data::crc32(0, &bytes)))
        }
        other => Err(format!("fs {other}?")),
    }
}
