//! The host's ends of the guest's consoles. They are opened once and outlive resets of the guest.

use std::io::{IsTerminal, stdin, stdout};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use triarch_api::{ConsoleConfig, ConsoleMode, DebugConsoleConfig, VmConfig};
use triarch_legacy::console::{Backend, Console};

use crate::MachineError;

/// One console a device; `None` where the device is off.
pub(crate) struct Consoles {
    /// Of the serial port.
    pub(crate) serial: Option<Arc<Console>>,
    /// Of the virtio console.
    pub(crate) console: Option<Arc<Console>>,
    /// Of the debug port.
    pub(crate) debug: Option<Arc<Console>>,
    on_terminal: bool,
}

impl Consoles {
    pub(crate) fn open(config: &VmConfig) -> Result<Self, MachineError> {
        let tty = [config.serial.mode, config.console.mode].contains(&ConsoleMode::Tty);
        Ok(Self {
            on_terminal: tty && Self::terminal_there(),
            serial: open("--serial", &backend(&config.serial))?,
            console: open("--console", &backend(&config.console))?,
            debug: open("--debug-console", &debug_backend(&config.debug_console))?,
        })
    }

    /// Whether a console of the guest leads to a terminal, or led there when it was opened.
    pub(crate) fn on_terminal(&self) -> bool {
        self.on_terminal
    }

    /// Whether the VMM has a terminal now; one that hung up is none any more.
    pub(crate) fn terminal_there() -> bool {
        stdin().is_terminal() || stdout().is_terminal()
    }

    /// Waits until slow readers have what the guest wrote, at most `timeout` each.
    pub(crate) fn drain(&self, timeout: Duration) {
        for console in [&self.serial, &self.console, &self.debug].into_iter().flatten() {
            console.drain(timeout);
        }
    }

    /// Writes the paths of terminals that were made into `config`, where clients look for them.
    pub(crate) fn show_paths(&self, config: &mut VmConfig) {
        show(self.serial.as_ref(), &mut config.serial);
        show(self.console.as_ref(), &mut config.console);
    }
}

fn show(console: Option<&Arc<Console>>, config: &mut ConsoleConfig) {
    if config.mode == ConsoleMode::Pty {
        config.file = console.and_then(|c| c.path()).map(Into::into);
    }
}

fn open(device: &'static str, backend: &Backend) -> Result<Option<Arc<Console>>, MachineError> {
    if *backend == Backend::Off {
        return Ok(None);
    }
    let console = Console::open(backend).map_err(|source| MachineError::Console { device, source })?;
    Ok(Some(Arc::new(console)))
}

fn path(path: &Option<PathBuf>) -> PathBuf {
    path.clone().unwrap_or_default()
}

fn backend(config: &ConsoleConfig) -> Backend {
    match config.mode {
        ConsoleMode::Off => Backend::Off,
        ConsoleMode::Null => Backend::Null,
        ConsoleMode::Pty => Backend::Pty,
        ConsoleMode::Tty => Backend::Tty,
        ConsoleMode::File => Backend::File(path(&config.file)),
        ConsoleMode::Socket => Backend::Socket(path(&config.socket)),
    }
}

fn debug_backend(config: &DebugConsoleConfig) -> Backend {
    backend(&ConsoleConfig {
        mode: config.mode,
        file: config.file.clone(),
        socket: None,
    })
}
