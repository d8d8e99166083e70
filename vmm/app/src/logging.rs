//! What is logged, and how it looks.

use std::str::FromStr;

use anyhow::{Context, bail};
use tracing::Level;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt, registry};

use crate::cli::LogOptions;
use crate::sink::Sink;

type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// The parts of Triarch whose level can be set, and the crates that they are.
const MODULES: &[(&str, &str)] = &[
    ("api", "triarch_api"),
    ("app", "triarch"),
    ("arch", "triarch_arch"),
    ("block", "triarch_block"),
    ("boot", "triarch_boot"),
    ("core", "triarch_device_core"),
    ("cpu-model", "triarch_cpu_model"),
    ("hypervisor", "triarch_hypervisor"),
    ("legacy", "triarch_legacy"),
    ("machine", "triarch_machine"),
    ("memory", "triarch_memory"),
    ("net", "triarch_net"),
    ("pci", "triarch_pci"),
    ("sandbox", "triarch_sandbox"),
    ("tables", "triarch_tables"),
    ("vcpu", "triarch_vcpu"),
    ("virtio", "triarch_virtio"),
];

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The level of everything, and of parts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Levels {
    everything: Option<LevelFilter>,
    /// Crates.
    parts: Vec<(String, LevelFilter)>,
}

impl FromStr for Levels {
    type Err = anyhow::Error;

    /// Reads `LEVEL`, `MODULE=LEVEL` and any number of them with commas between. A module may go on like a path: `virtio::block`.
    fn from_str(text: &str) -> anyhow::Result<Self> {
        let mut levels = Self::default();
        for part in text.split(',') {
            let Some((module, name)) = part.split_once('=') else {
                if levels.everything.replace(level(part)?).is_some() {
                    bail!(
                        "--log-level: '{text}' has two levels for everything; give one of them a module, like block=debug"
                    );
                }
                continue;
            };
            let (head, rest) = module.split_once("::").map_or((module, None), |(h, r)| (h, Some(r)));
            let Some((_, target)) = MODULES.iter().find(|(name, _)| *name == head) else {
                let names: Vec<_> = MODULES.iter().map(|(name, _)| *name).collect();
                bail!(
                    "--log-level: there is no module '{head}'; there are {}",
                    names.join(", ")
                );
            };
            let target = rest.map_or_else(|| (*target).to_owned(), |rest| format!("{target}::{rest}"));
            levels.parts.push((target, level(name)?));
        }
        Ok(levels)
    }
}

fn level(name: &str) -> anyhow::Result<LevelFilter> {
    Ok(match name {
        "off" => LevelFilter::OFF,
        "error" => LevelFilter::ERROR,
        "warn" => LevelFilter::WARN,
        "info" => LevelFilter::INFO,
        "debug" => LevelFilter::DEBUG,
        "trace" => LevelFilter::TRACE,
        _ => bail!("--log-level: '{name}' is no level; write off, error, warn, info, debug or trace"),
    })
}

fn filter(options: &LogOptions) -> Targets {
    let level = match options.verbosity {
        0 => Level::WARN,
        1 => Level::INFO,
        2 => Level::DEBUG,
        _ => Level::TRACE,
    };
    let everything = options.levels.everything.unwrap_or(level.into());
    Targets::new()
        .with_default(everything)
        .with_targets(options.levels.parts.iter().cloned())
        // A guest could make this library log as often as it likes; our own layer above it reports the same, with a limit.
        .with_target("virtio_queue", LevelFilter::OFF)
}

/// Starts logging to standard error or the file of `--log-file`.
pub(crate) fn start(options: &LogOptions) -> anyhow::Result<Sink> {
    let loss = match options.format {
        Format::Text => loss_as_text,
        Format::Json => loss_as_json,
    };
    let sink = match &options.file {
        Some(path) => Sink::file(path, loss).with_context(|| format!("--log-file: cannot write {}", path.display()))?,
        None => Sink::stderr(loss).context("cannot use standard error")?,
    };
    let filter = filter(options);
    let layer = fmt::layer().with_ansi(false).with_writer(sink.clone());
    let layer: BoxedLayer = match options.format {
        Format::Text => layer.boxed(),
        Format::Json => layer.json().flatten_event(true).with_thread_names(true).boxed(),
    };
    registry().with(layer.with_filter(filter)).init();
    Ok(sink)
}

fn now() -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut text));
    text
}

fn loss_as_text(lines: u64) -> String {
    format!("{}  WARN triarch::sink: log lines were lost lines={lines}\n", now())
}

fn loss_as_json(lines: u64) -> String {
    let time = now();
    let line = serde_json::json!({
        "timestamp": time,
        "level": "WARN",
        "message": "log lines were lost",
        "lines": lines,
        "target": "triarch::sink",
    });
    format!("{line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enabled(verbosity: u8, levels: &str, target: &str, level: Level) -> bool {
        let options = LogOptions {
            file: None,
            format: Format::Text,
            levels: levels.parse().expect("levels"),
            verbosity,
        };
        filter(&options).would_enable(target, &level)
    }

    #[test]
    fn levels_are_those_of_the_most_special_module() {
        let spec = "info,block=debug,virtio::net=trace,vcpu=off";
        for (target, level, expected) in [
            ("triarch_api::server", Level::INFO, true),
            ("triarch_api::server", Level::DEBUG, false),
            ("triarch_block::uring", Level::DEBUG, true),
            ("triarch_block::uring", Level::TRACE, false),
            ("triarch_virtio::net", Level::TRACE, true),
            ("triarch_virtio::block", Level::DEBUG, false),
            ("triarch_vcpu::run", Level::ERROR, false),
            ("virtio_queue", Level::ERROR, false),
        ] {
            assert_eq!(enabled(0, spec, target, level), expected, "{target} {level}");
        }
    }

    #[test]
    fn a_level_beats_how_verbose_it_should_be_and_a_module_does_not() {
        assert!(enabled(1, "block=debug", "triarch_api", Level::INFO));
        assert!(!enabled(0, "block=debug", "triarch_api", Level::INFO));
        assert!(!enabled(3, "error", "triarch_api", Level::WARN));
    }

    #[test]
    fn nonsense_is_refused_with_the_choice() {
        let error = |text: &str| text.parse::<Levels>().expect_err(text).to_string();
        assert!(error("loud").contains("'loud' is no level; write off, error"));
        assert!(error("block=loud").contains("'loud' is no level"));
        assert!(error("bloc=info").contains("no module 'bloc'; there are api, app"));
        assert!(error("info,debug").contains("two levels for everything"));
        assert!(error("").contains("'' is no level"));
    }

    #[test]
    fn the_documentation_has_the_modules() {
        let documentation = include_str!("../../../docs/command-line.md").replace('\n', " ");
        let names: Vec<_> = MODULES.iter().map(|(name, _)| format!("`{name}`")).collect();
        let sentence = format!("The modules are {}.", names.join(", "));
        assert!(documentation.contains(&sentence), "no {sentence}");
    }

    #[test]
    fn what_tells_of_lost_lines_is_a_line_itself() {
        let line: serde_json::Value = serde_json::from_str(&loss_as_json(3)).expect("JSON");
        assert_eq!((&line["lines"], &line["level"]), (&3.into(), &"WARN".into()));
        assert!(loss_as_text(3).contains("Z  WARN triarch::sink: log lines were lost lines=3\n"));
    }
}
