//! The tables that people read.

use super::net::{self, Switch, Traffic};
use super::setup::{Back, Front, Setup};
use super::{Rest, Sample, Samples, Work};
use crate::bench::shown;
use crate::table;

/// One table a back end that compares the VMMs, then one of what they cost at rest.
pub fn disks(setups: &[Setup], works: &[Work], samples: &Samples, rests: &[Rest]) -> String {
    let at = |front, back| setups.iter().position(|s| (s.front, s.back) == (front, back));
    let mut text = String::new();
    for back in Back::ALL {
        if let (Some(ours), Some(theirs)) = (at(Front::Triarch, back), at(Front::Qemu, back)) {
            text += &format!("\nServed by {back}\n\n");
            text += &table::format(&compare(works, samples, ours, theirs, back));
        }
    }
    text += &format!("\n{} in place of {}\n\n", Back::Blkd, Back::StorageDaemon);
    text += &table::format(&daemons(setups, works, samples));
    text += "\nAt rest: memory beside guest RAM, CPU time in a second\n\n";
    text + &table::format(&at_rest(setups, rests))
}

fn compare(works: &[Work], samples: &Samples, ours: usize, theirs: usize, back: Back) -> Vec<Vec<String>> {
    let served = back != Back::Own;
    let mut heading = vec![
        "",
        "triarch",
        "QEMU",
        "ratio",
        "(of each round)",
        "CPU",
        "p50 us",
        "p99 us",
        "VMM us",
        "vCPU us",
    ];
    if served {
        heading.push("daemon us");
    }
    let mut lines = vec![heading.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    for (work, samples) in works.iter().zip(samples) {
        let (ours, theirs) = (&samples[ours], &samples[theirs]);
        let pair = |value: fn(&Sample) -> f64| {
            let (ours, theirs) = (median(ours.iter().map(value)), median(theirs.iter().map(value)));
            format!("{} : {}", shown(ours), shown(theirs))
        };
        let [ratio, rounds] = spread(&ratios(ours, theirs, |s| s.rate));
        let mut line = vec![
            work.name(),
            rate(work, ours),
            rate(work, theirs),
            ratio,
            rounds,
            cpu_ratio(&ratios(theirs, ours, |s| s.vmm + s.vcpu + s.daemon)),
            pair(|s| s.p50),
            pair(|s| s.p99),
            pair(|s| s.vmm),
            pair(|s| s.vcpu),
        ];
        if served {
            line.push(pair(|s| s.daemon));
        }
        lines.push(line);
    }
    lines
}

/// How many times what QEMU's daemon does this project's does, under each VMM.
fn daemons(setups: &[Setup], works: &[Work], samples: &Samples) -> Vec<Vec<String>> {
    let fronts = [Front::Triarch, Front::Qemu];
    let at = |front, back| setups.iter().position(|s| (s.front, s.back) == (front, back));
    let mut lines = vec![vec![String::new()]];
    for front in fronts {
        lines[0].extend([format!("under {front}"), "(of each round)".to_owned(), "CPU".to_owned()]);
    }
    for (work, samples) in works.iter().zip(samples) {
        let mut line = vec![work.name()];
        for front in fronts {
            if let (Some(ours), Some(theirs)) = (at(front, Back::Blkd), at(front, Back::StorageDaemon)) {
                let (ours, theirs) = (&samples[ours], &samples[theirs]);
                line.extend(spread(&ratios(ours, theirs, |s| s.rate)));
                line.push(cpu_ratio(&ratios(theirs, ours, |s| s.vmm + s.vcpu + s.daemon)));
            }
        }
        lines.push(line);
    }
    lines
}

/// One line for each kind of traffic and switch.
pub fn network(setups: &[net::Setup], traffics: &[Traffic], samples: &net::Samples) -> String {
    let heading = [
        "",
        "triarch",
        "QEMU",
        "ratio",
        "(of each round)",
        "CPU",
        "p50 us",
        "p99 us",
        "CPU us each",
        "lost %",
    ];
    let mut lines = vec![heading.map(str::to_owned).to_vec()];
    for (traffic, samples) in traffics.iter().zip(samples) {
        for switch in Switch::ALL {
            let at = |front| setups.iter().position(|s| (s.front, s.switch) == (front, switch));
            let (Some(ours), Some(theirs)) = (at(Front::Triarch), at(Front::Qemu)) else {
                continue;
            };
            let mut line = vec![format!("{traffic}, {switch}")];
            line.extend(traffic_line(*traffic, &samples[ours], &samples[theirs]));
            lines.push(line);
        }
    }
    let switches = table::format(&switches(setups, traffics, samples));
    let first = table::format(&lines);
    format!(
        "\nFrom guest to guest\n\n{first}\n{} in place of the others\n\n{switches}",
        Switch::Netd
    )
}

/// How many times what the other switches do this project's does, under each VMM.
fn switches(setups: &[net::Setup], traffics: &[Traffic], samples: &net::Samples) -> Vec<Vec<String>> {
    let at = |front, switch| setups.iter().position(|s| (s.front, s.switch) == (front, switch));
    let pairs = [Front::Triarch, Front::Qemu]
        .into_iter()
        .flat_map(|front| [(front, Switch::Bridge), (front, Switch::Testpmd)])
        .filter_map(|(front, other)| Some((front, other, at(front, Switch::Netd)?, at(front, other)?)));
    let mut lines = vec![vec![String::new()]];
    lines.extend(traffics.iter().map(|traffic| vec![traffic.to_string()]));
    for (front, other, ours, theirs) in pairs {
        lines[0].extend([
            format!("{other}, {front}"),
            "(of each round)".to_owned(),
            "CPU".to_owned(),
        ]);
        for (line, samples) in lines[1..].iter_mut().zip(samples) {
            let (ours, theirs) = (&samples[ours], &samples[theirs]);
            line.extend(spread(&ratios(ours, theirs, |s| s.rate)));
            line.push(cpu_ratio(&ratios(theirs, ours, |s| s.cpu)));
        }
    }
    lines
}

fn traffic_line(traffic: Traffic, ours: &[net::Sample], theirs: &[net::Sample]) -> Vec<String> {
    let of = |samples: &[net::Sample], value: fn(&net::Sample) -> f64| median(samples.iter().map(value));
    let pair = |value: fn(&net::Sample) -> f64| format!("{} : {}", shown(of(ours, value)), shown(of(theirs, value)));
    let rate = |samples: &[net::Sample]| {
        let unit = if traffic == Traffic::Large { " MiB/s" } else { "/s" };
        format!("{:.0}{unit}", of(samples, |s| s.rate))
    };
    let mut line = vec![rate(ours), rate(theirs)];
    line.extend(spread(&ratios(ours, theirs, |s| s.rate)));
    line.push(cpu_ratio(&ratios(theirs, ours, |s| s.cpu)));
    let turns = traffic == Traffic::Turns;
    line.push(if turns { pair(|s| s.p50) } else { String::new() });
    line.push(if turns { pair(|s| s.p99) } else { String::new() });
    line.push(pair(|s| s.cpu));
    line.push(if turns { String::new() } else { pair(|s| s.lost * 100.0) });
    line
}

/// Of each round, the first one's value by the other one's.
fn ratios<T>(first: &[T], other: &[T], value: fn(&T) -> f64) -> Vec<f64> {
    let rounds = first.iter().zip(other);
    rounds.map(|(first, other)| value(first) / value(other)).collect()
}

/// How many times the CPU time of ours the other takes.
fn cpu_ratio(ratios: &[f64]) -> String {
    format!("{:.2}", median(ratios.iter().copied()))
}

/// The median of some ratios, and from where to where they go.
fn spread(ratios: &[f64]) -> [String; 2] {
    let (least, most) = ratios
        .iter()
        .fold((f64::MAX, 0.0_f64), |(l, m), r| (l.min(*r), m.max(*r)));
    [
        format!("{:.2}", median(ratios.iter().copied())),
        format!("{least:.2}-{most:.2}"),
    ]
}

/// Reads a second; MiB a second of sequential ones.
fn rate(work: &Work, samples: &[Sample]) -> String {
    let rate = median(samples.iter().map(|s| s.rate));
    if work.sequential {
        format!("{:.0} MiB/s", rate * f64::from(work.kib) / 1024.0)
    } else {
        format!("{rate:.0}/s")
    }
}

fn at_rest(setups: &[Setup], rests: &[Rest]) -> Vec<Vec<String>> {
    let heading = [
        "",
        "VMM dirty KiB",
        "Pss KiB",
        "CPU ms",
        "daemon dirty KiB",
        "Pss KiB",
        "CPU ms",
    ];
    let mut lines = vec![heading.map(str::to_owned).to_vec()];
    for (setup, rest) in setups.iter().zip(rests) {
        let cpu = |time: std::time::Duration| format!("{:.2}", time.as_secs_f64() * 1000.0);
        let mut line = vec![
            format!("{}, {}", setup.front, setup.back),
            rest.vmm.private_dirty.to_string(),
            rest.vmm.pss.to_string(),
            cpu(rest.vmm_cpu),
        ];
        if let Some(daemon) = rest.daemon {
            line.extend([
                daemon.private_dirty.to_string(),
                daemon.pss.to_string(),
                cpu(rest.daemon_cpu),
            ]);
        }
        lines.push(line);
    }
    lines
}

/// The middle one, half way between the two middle ones of an even number, NaN of none.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let at = |n: usize| values.get(n).copied().unwrap_or(f64::NAN);
    f64::midpoint(at(values.len() / 2), at(values.len().saturating_sub(1) / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(rate: f64) -> Sample {
        Sample {
            rate,
            p50: 1.0,
            p99: 2.0,
            vmm: 3.0,
            vcpu: 4.0,
            daemon: 5.0,
        }
    }

    #[test]
    fn ratios_are_those_of_rounds() {
        // The machine was slow in the second round, for both.
        let ours = [100.0, 10.0, 120.0].map(sample).to_vec();
        let theirs = [50.0, 5.0, 100.0].map(sample).to_vec();
        let lines = compare(&Work::all()[..1], &vec![vec![ours, theirs]], 0, 1, Back::StorageDaemon);
        assert_eq!(lines[1][1..5], ["100/s", "50/s", "2.00", "1.20-2.00"]);
        assert_eq!(lines[1][5], "1.00");
        assert_eq!(lines[1][10], "5.00 : 5.00");
        assert_eq!(lines[0].len(), lines[1].len());
    }

    #[test]
    fn the_middle_of_an_even_number_is_between() {
        assert_eq!(median([4.0, 1.0, 9.0, 2.0].into_iter()), 3.0);
        assert_eq!(median([4.0, 1.0, 9.0].into_iter()), 4.0);
        assert!(median(std::iter::empty()).is_nan());
    }

    #[test]
    fn sequential_reads_are_told_in_bytes() {
        let work = Work::all()[4];
        assert_eq!(rate(&work, &[sample(80.0)]), "10 MiB/s");
    }
}
