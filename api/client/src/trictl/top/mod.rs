//! `trictl top`: the VM at work, twice a second.

mod page;
mod rates;
mod screen;

use std::io::{self, IsTerminal};
use std::thread;
use std::time::{Duration, Instant};

use triarch_client::Client;

use crate::cli;
use crate::output::{Failure, print};
use page::{Page, Style};
use rates::Shot;
use screen::{Key, Screen};

/// Text that goes to no terminal is so wide, and as long as it needs to be.
const PLAIN_WIDTH: usize = 80;
/// A VMM answers questions at once; while it is waited for, keys are not heard.
const LIMIT: Duration = Duration::from_secs(2);

/// Shows pages until told to end: on the terminal, or as text.
pub(crate) fn run(client: &Client, arguments: &cli::Top) -> Result<(), Failure> {
    let client = &mut client.another().limit(LIMIT);
    let interval = Duration::from_millis(arguments.interval);
    let pages = if arguments.once { Some(1) } else { arguments.iterations };
    let name = client.socket().display().to_string();
    let terminal = pages.is_none() && io::stdout().is_terminal() && io::stdin().is_terminal();
    let first = Shot::take(client)?;
    if terminal {
        return interactive(client, &name, first, interval);
    }
    text(client, &name, first, interval, pages)
}

fn text(client: &mut Client, name: &str, mut old: Shot, interval: Duration, pages: Option<u64>) -> Result<(), Failure> {
    let mut printed = 0;
    while pages.is_none_or(|pages| printed < pages) {
        thread::sleep(interval);
        let new = Shot::take(client)?;
        let page = Page::new(name, rates::between(&old, &new));
        let separator = if printed > 0 { "\n" } else { "" };
        print(&format!(
            "{separator}{}",
            page.lines(PLAIN_WIDTH, None, Style::Plain).join("\n")
        ))?;
        old = new;
        printed += 1;
    }
    Ok(())
}

fn interactive(client: &mut Client, name: &str, first: Shot, interval: Duration) -> Result<(), Failure> {
    let style = if std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) {
        Style::Plain
    } else {
        Style::Colour
    };
    let mut screen = Screen::enter()?;
    let mut old = first;
    let mut page = Page::new(name, rates::between(&old, &old));
    loop {
        let (width, height) = screen.size();
        screen.draw(&page.lines(width, Some(height), style))?;
        let end = Instant::now() + interval;
        loop {
            match screen.wait(end.saturating_duration_since(Instant::now()))? {
                Key::Quit => return Ok(()),
                // Of another size now: the same page again.
                Key::Resized => {
                    let (width, height) = screen.size();
                    screen.draw(&page.lines(width, Some(height), style))?;
                }
                Key::Other => {}
                Key::None => break,
            }
        }
        let new = Shot::take(client)?;
        page = Page::new(name, rates::between(&old, &new));
        old = new;
    }
}
