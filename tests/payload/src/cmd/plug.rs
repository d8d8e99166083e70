//! `balloon ...`

use crate::Guest;
use crate::clock::Deadline;
use crate::dev::Setup;
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
