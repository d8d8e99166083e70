//! A page of figures, cut to the size of the screen.

use super::rates::{Cpu, Disk, Nic, Rates};
use crate::progress::bar;
use crate::table::{Side, Table};
use crate::units::{bit_rate, byte_rate, bytes, clean, duration, rate};

/// Whether lines may have colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    Colour,
}

/// Lines that each section gets before any gets more: its names, one row, and how many more there are.
const LEAST: usize = 3;
/// Characters of bars.
const BAR: usize = 20;
/// Characters of a device's id that are shown: a row has to fit in 80 columns.
const NAME: usize = 9;

/// What is shown.
#[derive(Debug)]
pub(super) struct Page {
    name: String,
    rates: Rates,
}

impl Page {
    /// The page of the VM called `name`.
    pub(super) fn new(name: &str, rates: Rates) -> Self {
        let name = clean(name);
        Self { name, rates }
    }

    /// Its lines, each at most `width` characters, at most `height` of them.
    pub(super) fn lines(&self, width: usize, height: Option<usize>, style: Style) -> Vec<String> {
        let mut lines = vec![self.title(), self.memory()];
        let sections: Vec<Vec<String>> = [cpus(&self.rates.cpus), disks(&self.rates.disks), nics(&self.rates.nics)]
            .into_iter()
            .filter(|lines| !lines.is_empty())
            .collect();
        if sections.is_empty() {
            lines.push(String::new());
            lines.push("No guest runs.".to_owned());
        }
        let mut names = vec![0];
        let room = height.map(|height| height.saturating_sub(lines.len() + sections.len()));
        for section in fit(sections, room) {
            lines.push(String::new());
            names.push(lines.len());
            lines.extend(section);
        }
        lines.truncate(height.unwrap_or(usize::MAX));
        for line in &mut lines {
            *line = line.chars().take(width).collect();
        }
        if style == Style::Colour {
            for at in names {
                if let Some(line) = lines.get_mut(at) {
                    // Reverse video (ECMA-48, SGR 7), as wide as the screen.
                    *line = format!("\u{1b}[7m{line:<width$}\u{1b}[0m");
                }
            }
        }
        lines
    }

    fn title(&self) -> String {
        let Self { name, rates } = self;
        let total: f64 = rates.cpus.iter().map(Cpu::total).sum();
        let state = match rates.state.as_str() {
            "none" => "no VM",
            state => state,
        };
        match rates.cpus.len() {
            0 => format!("{name}  {}", clean(state)),
            1 => format!("{name}  {}  1 vCPU at {total:.0} %", clean(state)),
            count => format!("{name}  {}  {count} vCPUs at {total:.0} %", clean(state)),
        }
    }

    fn memory(&self) -> String {
        match self.rates.memory {
            None => String::new(),
            Some((size, None)) => format!("memory {}", bytes(size as u64)),
            Some((size, Some(resident))) => {
                let part = if size > 0.0 { resident / size } else { 0.0 };
                let (size, resident) = (bytes(size as u64), bytes(resident as u64));
                format!("memory [{}] {resident} resident of {size}", bar(part, BAR))
            }
        }
    }
}

/// Sections in so many lines together: short ones whole, long ones cut.
fn fit(sections: Vec<Vec<String>>, room: Option<usize>) -> Vec<Vec<String>> {
    let Some(mut room) = room else {
        return sections;
    };
    let mut shares: Vec<usize> = sections.iter().map(|lines| lines.len().min(LEAST)).collect();
    room = room.saturating_sub(shares.iter().sum());
    // One line after the other to whoever has most left to show and least room, until all is given.
    while room > 0 {
        let hungry = (0..sections.len()).filter(|at| shares[*at] < sections[*at].len());
        let Some(next) = hungry.min_by_key(|at| shares[*at]) else {
            break;
        };
        shares[next] += 1;
        room -= 1;
    }
    sections
        .into_iter()
        .zip(shares)
        .map(|(lines, share)| cut(lines, share))
        .collect()
}

/// The first `count` lines; the last of them says how many others are missing.
fn cut(mut lines: Vec<String>, count: usize) -> Vec<String> {
    let missing = lines.len().saturating_sub(count);
    if missing > 0 {
        lines.truncate(count);
        if let Some(last) = lines.last_mut().filter(|_| count > 1) {
            *last = format!("... {} more", missing + 1);
        }
    }
    lines
}

fn cpus(cpus: &[Cpu]) -> Vec<String> {
    let mut table = Table::new(&[
        ("VCPU", Side::Right),
        ("%CPU", Side::Right),
        ("GUEST", Side::Right),
        ("USER", Side::Right),
        ("SYSTEM", Side::Right),
        ("WAIT", Side::Right),
        ("EXITS/S", Side::Right),
        ("", Side::Left),
    ])
    .at_least(&[4, 6, 6, 6, 6, 6]);
    let mut add = |cpu: &Cpu, name: &str, of: f64| {
        let figures = [cpu.total(), cpu.guest, cpu.user, cpu.system, cpu.wait].map(|value| format!("{value:.1}"));
        let bar = format!("[{}]", bar(cpu.total() / of, BAR));
        table.row(
            std::iter::once(name.to_owned())
                .chain(figures)
                .chain([rate(cpu.exits), bar]),
        );
    };
    if cpus.len() > 1 {
        let sum = |of: fn(&Cpu) -> f64| cpus.iter().map(of).sum();
        let all = Cpu {
            name: String::new(),
            guest: sum(|cpu| cpu.guest),
            user: sum(|cpu| cpu.user),
            system: sum(|cpu| cpu.system),
            wait: sum(|cpu| cpu.wait),
            exits: sum(|cpu| cpu.exits),
        };
        add(&all, "all", 100.0 * cpus.len() as f64);
    }
    for cpu in cpus {
        add(cpu, &cpu.name, 100.0);
    }
    shown(&table)
}

fn disks(disks: &[Disk]) -> Vec<String> {
    let mut table = Table::new(&[
        ("DISK", Side::Left),
        ("READS/S", Side::Right),
        ("BYTES/S", Side::Right),
        ("LATENCY", Side::Right),
        ("WRITES/S", Side::Right),
        ("BYTES/S", Side::Right),
        ("LATENCY", Side::Right),
        ("BUSY", Side::Right),
        ("ERRORS", Side::Right),
    ])
    .at_least(&[NAME, 7, 8, 7, 8, 8]);
    let time = |latency: Option<f64>| latency.map_or_else(|| "-".to_owned(), duration);
    for disk in disks {
        table.row([
            short(&disk.name),
            rate(disk.reads),
            byte_rate(disk.read_bytes),
            time(disk.read_latency),
            rate(disk.writes),
            byte_rate(disk.written_bytes),
            time(disk.write_latency),
            format!("{:.0}", disk.in_flight),
            rate(disk.errors),
        ]);
    }
    shown(&table)
}

fn nics(nics: &[Nic]) -> Vec<String> {
    let mut table = Table::new(&[
        ("NET", Side::Left),
        ("RX PACKETS/S", Side::Right),
        ("RX BITS/S", Side::Right),
        ("TX PACKETS/S", Side::Right),
        ("TX BITS/S", Side::Right),
        ("DROPPED/S", Side::Right),
    ])
    .at_least(&[NAME]);
    for nic in nics {
        table.row([
            short(&nic.name),
            rate(nic.received),
            bit_rate(nic.received_bits),
            rate(nic.sent),
            bit_rate(nic.sent_bits),
            rate(nic.dropped),
        ]);
    }
    shown(&table)
}

/// A device's id, so that one long name does not push all figures off the screen.
fn short(id: &str) -> String {
    if id.chars().count() <= NAME {
        return id.to_owned();
    }
    id.chars().take(NAME - 1).chain(['~']).collect()
}

fn shown(table: &Table) -> Vec<String> {
    if table.is_empty() { Vec::new() } else { table.lines() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(name: &str) -> Cpu {
        Cpu {
            name: name.into(),
            guest: 50.0,
            user: 1.0,
            system: 2.5,
            wait: 0.25,
            exits: 1234.0,
        }
    }

    fn rates(cpus: usize, devices: usize) -> Rates {
        let disk = |at: usize| Disk {
            name: format!("_disk{at}"),
            reads: 12.0,
            read_bytes: 49152.0,
            read_latency: Some(0.000_061),
            in_flight: 3.0,
            ..Disk::default()
        };
        let nic = |at: usize| Nic {
            name: format!("_net{at}_with_a_long_name"),
            received: 1e6,
            received_bits: 9.4e9,
            ..Nic::default()
        };
        Rates {
            state: "Running".into(),
            cpus: (0..cpus).map(|at| cpu(&at.to_string())).collect(),
            memory: Some((536_870_912.0, Some(134_217_728.0))),
            disks: (0..devices).map(disk).collect(),
            nics: (0..devices).map(nic).collect(),
        }
    }

    #[test]
    fn a_small_vm_fits_on_a_page() {
        let page = Page::new("api.sock", rates(2, 1));
        assert_eq!(
            page.lines(80, Some(24), Style::Plain).join("\n"),
            "\
api.sock  Running  2 vCPUs at 107 %
memory [#####...............] 128 MiB resident of 512 MiB

VCPU    %CPU   GUEST    USER  SYSTEM    WAIT  EXITS/S
 all   107.0   100.0     2.0     5.0     0.5     2.5k  [###########.........]
   0    53.5    50.0     1.0     2.5     0.2     1.2k  [###########.........]
   1    53.5    50.0     1.0     2.5     0.2     1.2k  [###########.........]

DISK       READS/S   BYTES/S  LATENCY  WRITES/S   BYTES/S  LATENCY  BUSY  ERRORS
_disk0          12  48.0 KiB    61 µs         0         0        -     3       0

NET        RX PACKETS/S  RX BITS/S  TX PACKETS/S  TX BITS/S  DROPPED/S
_net0_wi~          1.0M   9.4 Gbit             0          0          0"
        );
    }

    #[test]
    fn a_large_vm_is_cut_to_the_screen_and_says_so() {
        for (width, height) in [(80, 24), (80, 10), (20, 3), (1, 1), (300, 100)] {
            let page = Page::new("x", rates(254, 30));
            let lines = page.lines(width, Some(height), Style::Plain);
            assert!(lines.len() <= height, "{width}x{height}: {} lines", lines.len());
            assert!(lines.iter().all(|line| line.chars().count() <= width));
        }
        let text = Page::new("x", rates(254, 30))
            .lines(80, Some(24), Style::Plain)
            .join("\n");
        for name in ["VCPU", " all ", "DISK", "_disk0", "NET", "_net0", "more"] {
            assert!(text.contains(name), "{name}: {text}");
        }
        let shown = text
            .lines()
            .filter(|line| line.ends_with(']') && !line.contains("memory"))
            .count();
        let more = format!("... {} more", 255 - shown);
        assert!(text.contains(&more), "{more}: {text}");
        let whole = Page::new("x", rates(254, 30)).lines(80, None, Style::Plain);
        assert_eq!(whole.len(), 2 + 1 + 256 + 2 * (1 + 31));
    }

    #[test]
    fn colours_are_only_around_names() {
        let lines = Page::new("x", rates(1, 1)).lines(40, Some(24), Style::Colour);
        let coloured: Vec<_> = lines.iter().filter(|line| line.contains('\u{1b}')).collect();
        assert_eq!(coloured.len(), 4);
        for line in coloured {
            assert!(line.starts_with("\u{1b}[7m") && line.ends_with("\u{1b}[0m"));
            assert_eq!(line.chars().count(), 40 + 8);
        }
    }

    #[test]
    fn without_a_guest_it_says_so() {
        let none = Rates {
            state: "none".into(),
            ..Rates::default()
        };
        let lines = Page::new("a\u{1b}b", none).lines(80, Some(24), Style::Plain);
        assert_eq!(lines, ["a?b  no VM", "", "", "No guest runs."]);
    }
}
