//! `balloon ...` and `vmem ...`

use crate::Guest;
use crate::arch::paging;
use crate::clock::Deadline;
use crate::dev::Setup;
use crate::dev::vmem::request;
use crate::shell::{Args, Reply};
use alloc::format;
use alloc::string::String;

/// `balloon sizes | inflate ADDR PAGES | deflate ADDR PAGES | report ADDR LEN | free BYTES | wanted | wait PAGES MS | init ...`
pub fn balloon(guest: &mut Guest, args: &mut Args) -> Reply {
    let word = args.word("command")?;
    if word == "init" {
        return guest.restart("balloon", 0, &Setup::of(args)).map(|()| String::new());
    }
    let balloon = guest.balloon(0)?;
    match word {
        "sizes" => {
            let (target, actual) = balloon.sizes()?;
            Ok(format!("target={target} actual={actual}"))
        }
        "inflate" | "deflate" => {
            let (start, pages) = (args.number("ADDR")?, args.number_to("PAGES", 1 << 24)?);
            balloon.change(word == "inflate", start, pages).map(|()| String::new())
        }
        "report" => {
            let (start, len) = (args.number("ADDR")?, args.number_to("LEN", 1 << 31)?);
            balloon.report(start, len as u32).map(|()| String::new())
        }
        "free" => balloon.tell_free(args.number("BYTES")?).map(|()| String::new()),
        "wanted" => balloon.wait_wanted().map(|()| String::new()),
        // Until the host wants so many pages.
        "wait" => {
            let (pages, ms) = (args.number("PAGES")?, args.number_to("MS", 60_000)?);
            let deadline = Deadline::after_ms(ms);
            while balloon.sizes()?.0 != pages {
                if deadline.left().is_none() {
                    return Err(format!("the host wants {} pages", balloon.sizes()?.0));
                }
                core::hint::spin_loop();
            }
            Ok(String::new())
        }
        other => Err(format!("balloon {other}?")),
    }
}

/// `vmem N info | wait BYTES MS | reach BYTES | plug ADDR BLOCKS | unplug ADDR BLOCKS | unplug-all | state ADDR BLOCKS | ask KIND ADDR
/// BLOCKS | peek ADDR | poke ADDR VALUE | init ...`
pub fn vmem(guest: &mut Guest, args: &mut Args) -> Reply {
    let index = args.number("device number")? as usize;
    let word = args.word("command")?;
    if word == "init" {
        return guest.restart("vmem", index, &Setup::of(args)).map(|()| String::new());
    }
    let vmem = guest.vmem(index)?;
    let config = vmem.config()?;
    match word {
        "info" => {
            let room = config.addr..config.addr.saturating_add(config.region);
            guest.platform.add_room(room);
            return Ok(format!(
                "block={} addr={:#x} region={} usable={} plugged={} requested={}",
                config.block, config.addr, config.region, config.usable, config.plugged, config.requested
            ));
        }
        // Until the host wants so many bytes.
        "wait" => {
            let (bytes, ms) = (args.number("BYTES")?, args.number_to("MS", 60_000)?);
            let deadline = Deadline::after_ms(ms);
            while vmem.config()?.requested != bytes {
                if deadline.left().is_none() {
                    return Err(format!("the host wants {} bytes", vmem.config()?.requested));
                }
                core::hint::spin_loop();
            }
            return Ok(String::new());
        }
        "reach" => return vmem.reach(args.number("BYTES")?).map(|()| String::new()),
        "peek" => return Ok(format!("{:#x}", word_at(args.number("ADDR")?)?.read())),
        "poke" => {
            let (word, value) = (word_at(args.number("ADDR")?)?, args.number("VALUE")?);
            word.write(value);
            return Ok(String::new());
        }
        _ => {}
    }
    let kind = match word {
        "plug" => request::PLUG,
        "unplug" => request::UNPLUG,
        "unplug-all" => request::UNPLUG_ALL,
        "state" => request::STATE,
        "ask" => args.number_to("KIND", u16::MAX.into())? as u16,
        other => return Err(format!("vmem {other}?")),
    };
    let (addr, blocks) = match kind {
        request::UNPLUG_ALL => (0, 0),
        _ => (args.number("ADDR")?, args.number_to("BLOCKS", u16::MAX.into())? as u16),
    };
    let (answer, state) = vmem.ask(kind, addr, blocks)?;
    let name = |names: &[&'static str], at: u16| names.get(usize::from(at)).copied().unwrap_or("unknown");
    let answer = name(&["ack", "nack", "busy", "error"], answer);
    Ok(match (kind, answer) {
        (request::STATE, "ack") => format!("{answer} {}", name(&["plugged", "unplugged", "mixed"], state)),
        _ => answer.into(),
    })
}

/// Eight bytes at an address that may be no memory.
struct Word(*mut u64);

fn word_at(address: u64) -> Result<Word, String> {
    let end = address
        .checked_add(8)
        .filter(|_| address.is_multiple_of(8))
        .ok_or("bad address")?;
    match paging::map(&(address..end), true) {
        Some(at) => Ok(Word(at as *mut u64)),
        None => Err("out of reach of the page tables".into()),
    }
}

impl Word {
    fn read(&self) -> u64 {
        // SAFETY: mapped just now; the room of a memory device is used by commands only, one at a time.
        unsafe { self.0.read_volatile() }
    }

    fn write(&self, value: u64) {
        // SAFETY: as above.
        unsafe { self.0.write_volatile(value) };
    }
}
