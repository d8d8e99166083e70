//! Where log lines go.

use std::fs::OpenOptions;
use std::io::stderr;
use std::sync::Mutex;

use anyhow::Context;
use tracing::Level;

use crate::cli::Cli;

/// Starts logging to stderr or the file of `--log-file`.
pub(crate) fn start(cli: &Cli) -> anyhow::Result<()> {
    let level = match cli.verbosity {
        0 => Level::WARN,
        1 => Level::INFO,
        2 => Level::DEBUG,
        _ => Level::TRACE,
    };
    let builder = tracing_subscriber::fmt().with_max_level(level).with_ansi(false);
    match &cli.log_file {
        Some(path) => {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("--log-file: cannot write {}", path.display()))?;
            builder.with_writer(Mutex::new(file)).init();
        }
        None => builder.with_writer(stderr).init(),
    }
    Ok(())
}
