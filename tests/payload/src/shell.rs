//! The command interpreter: a line in, a line out.

use crate::{Guest, arch, cmd, serial};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// What a command answers: the text behind `ok` or behind `err`.
pub type Reply = Result<String, String>;

/// The words of a command line.
pub struct Args<'a> {
    words: Vec<&'a str>,
    next: usize,
}

/// A number, decimal or with 0x.
pub fn parse(word: &str) -> Option<u64> {
    match word.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => word.parse().ok(),
    }
}

impl<'a> Args<'a> {
    fn new(line: &'a str) -> Self {
        Self {
            words: line.split_ascii_whitespace().collect(),
            next: 0,
        }
    }

    /// The next word; `what` is named when it is missing.
    pub fn word(&mut self, what: &str) -> Result<&'a str, String> {
        let word = self
            .words
            .get(self.next)
            .copied()
            .ok_or_else(|| format!("missing {what}"))?;
        self.next += 1;
        Ok(word)
    }

    /// The next word as a number.
    pub fn number(&mut self, what: &str) -> Result<u64, String> {
        let word = self.word(what)?;
        parse(word).ok_or_else(|| format!("{what} is not a number: {word}"))
    }

    /// The next word as a number of at most `max`.
    pub fn number_to(&mut self, what: &str, max: u64) -> Result<u64, String> {
        match self.number(what)? {
            number if number <= max => Ok(number),
            number => Err(format!("{what} is {number}, at most {max} goes")),
        }
    }

    /// `key=number` anywhere in the rest, else `default`.
    pub fn option(&self, key: &str, default: u64) -> u64 {
        let value = |word: &str| word.strip_prefix(key)?.strip_prefix('=').and_then(parse);
        self.words[self.next.min(self.words.len())..]
            .iter()
            .find_map(|word| value(word))
            .unwrap_or(default)
    }

    /// Whether `word` stands anywhere in the rest.
    pub fn has(&self, word: &str) -> bool {
        self.words[self.next.min(self.words.len())..].contains(&word)
    }

    /// The rest, joined by single spaces.
    pub fn rest(&self) -> String {
        self.words[self.next.min(self.words.len())..].join(" ")
    }
}

/// Reads and answers commands for ever.
pub fn run(guest: &mut Guest) -> ! {
    loop {
        let line = serial::read_line();
        let (word, text) = match answer(guest, &line) {
            Ok(text) => ("ok", text),
            Err(text) => ("err", text),
        };
        let space = if text.is_empty() { "" } else { " " };
        serial::write(&format!("{word}{space}{text}\n"));
    }
}

fn answer(guest: &mut Guest, line: &str) -> Reply {
    let mut args = Args::new(line);
    match args.word("command")? {
        "hello" => cmd::system::hello(guest),
        "echo" => Ok(args.rest()),
        "acpi" => cmd::system::acpi(guest),
        "numa" => cmd::system::numa(guest),
        "sleep" => cmd::system::sleep(&mut args),
        "count" => cmd::system::count(&mut args),
        "cpus" => cmd::system::cpus(guest),
        "ipi" => cmd::system::ipi(guest, &mut args),
        "dimm" => cmd::dimm::run(guest, &mut args),
        "hot" => cmd::hotplug::run(guest, &mut args),
        "slots" => cmd::slots::run(guest, &mut args),
        "pm" => cmd::system::pm(guest, &mut args),
        "mem" => cmd::memory::run(guest, &mut args),
        "dirty" => cmd::memory::dirty(guest, &mut args),
        "pci" => cmd::pci::list(guest),
        "bars" => cmd::pci::bars(guest, &mut args),
        "bar-move" => cmd::pci::move_bar(guest, &mut args),
        "root-port" => cmd::root_port::run(guest, &mut args),
        "msix" => cmd::pci::msix(guest, &mut args),
        "fuzz-ring" => cmd::rings::fuzz(guest, &mut args),
        "blk" => cmd::blk::run(guest, &mut args),
        "net" => cmd::net::run(guest, &mut args),
        "balloon" => cmd::plug::balloon(guest, &mut args),
        "vmem" => cmd::plug::vmem(guest, &mut args),
        "rng" => cmd::small::rng(guest, &mut args),
        "console" => cmd::small::console(guest, &mut args),
        "fs" => cmd::small::fs(guest, &mut args),
        "iommu" => cmd::iommu::run(guest, &mut args),
        "vsock" => cmd::vsock::run(guest, &mut args),
        other => arch::commands::run(other, &mut args).unwrap_or_else(|| Err(format!("unknown command {other}"))),
    }
}
