//! What is logged.

use std::io;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt, registry};

/// How much is logged, as flags of a daemon.
#[derive(Debug, Clone, clap::Args)]
pub struct LogOptions {
    /// How much to log: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: LevelFilter,
    /// How a line looks
    #[arg(long, value_enum, default_value = "text")]
    log_format: Format,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl LogOptions {
    /// Starts logging to standard error. Once.
    pub fn start(&self) {
        // A guest could make these libraries log as often as it likes; our own layers above them say the same, with a limit.
        let quiet = ["virtio_queue", "vhost", "vhost_user_backend"].map(|name| (name, LevelFilter::OFF));
        let filter = Targets::new().with_default(self.log_level).with_targets(quiet);
        let layer = fmt::layer().with_ansi(false).with_writer(io::stderr);
        match self.log_format {
            Format::Text => registry().with(layer.with_filter(filter)).init(),
            Format::Json => registry()
                .with(
                    layer
                        .json()
                        .flatten_event(true)
                        .with_thread_names(true)
                        .with_filter(filter),
                )
                .init(),
        }
    }
}
