//! Where log lines go.

use std::fs::OpenOptions;
use std::io::stderr;
use std::sync::Mutex;

use anyhow::Context;
use tracing::Level;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt, registry};

use crate::cli::Cli;

type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// Starts logging to stderr or the file of `--log-file`.
pub(crate) fn start(cli: &Cli) -> anyhow::Result<()> {
    let level = match cli.verbosity {
        0 => Level::WARN,
        1 => Level::INFO,
        2 => Level::DEBUG,
        _ => Level::TRACE,
    };
    // A guest could make this library log as often as it likes; our own layer above it reports the same, with a limit.
    let filter = Targets::new()
        .with_default(level)
        .with_target("virtio_queue", LevelFilter::OFF);
    let start = |layer: BoxedLayer| registry().with(layer.with_filter(filter)).init();
    let layer = fmt::layer().with_ansi(false);
    match &cli.log_file {
        Some(path) => {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("--log-file: cannot write {}", path.display()))?;
            start(layer.with_writer(Mutex::new(file)).boxed());
        }
        None => start(layer.with_writer(stderr).boxed()),
    }
    Ok(())
}
