//! The channels on which the agent may be reached.

use crate::agent;
use crate::sys::{self, Vsock};
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

/// How often a channel that is not there yet, or has no client, is looked at.
const RETRY: Duration = Duration::from_millis(20);

/// Where the agent listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Channel {
    /// `port:NAME`: the virtio-serial port of that name.
    Port(String),
    /// `vsock:PORT`: a listening vsock port; any number of clients.
    Vsock(u32),
    /// `serial:PATH` or `console:NAME`: a terminal, which must not be the kernel's console; one
    /// client for the life of the machine.
    Terminal(PathBuf),
}

impl FromStr for Channel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("port", name)) if !name.is_empty() => Ok(Self::Port(name.into())),
            Some(("vsock", port)) => port
                .parse()
                .map(Self::Vsock)
                .map_err(|e| format!("{text}: the vsock port is not a number: {e}")),
            Some(("serial", path)) if path.starts_with("/dev/") => Ok(Self::Terminal(path.into())),
            Some(("console", name)) if !name.is_empty() => Ok(Self::Terminal(Path::new("/dev").join(name))),
            _ => Err(format!(
                "{text}: not a channel; write port:NAME, vsock:PORT, serial:/dev/ttyS1 or console:hvc0"
            )),
        }
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(name) => write!(f, "port:{name}"),
            Self::Vsock(port) => write!(f, "vsock:{port}"),
            Self::Terminal(path) => write!(f, "serial:{}", path.display()),
        }
    }
}

impl Channel {
    /// Parses a list separated by commas.
    ///
    /// # Errors
    /// An entry that is no channel.
    pub fn list(text: &str) -> Result<Vec<Self>, String> {
        text.split(',').map(str::parse).collect()
    }

    /// Waits until one of `channels` exists, earlier ones first; `None` if none does within `limit`.
    pub fn first(channels: &[Self], limit: Duration) -> Option<&Self> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(channel) = channels.iter().find(|c| c.exists()) {
                return Some(channel);
            }
            if Instant::now() >= deadline {
                return None;
            }
            thread::sleep(RETRY);
        }
    }

    fn exists(&self) -> bool {
        match self {
            Self::Port(name) => port_device(name).is_some(),
            Self::Vsock(_) => Vsock::local_cid().is_some(),
            Self::Terminal(path) => path.exists(),
        }
    }

    /// Serves clients for ever.
    ///
    /// # Errors
    /// The channel cannot be opened, or broke.
    pub fn serve(&self) -> io::Result<()> {
        match self {
            Self::Port(name) => {
                let device =
                    port_device(name).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such port"))?;
                serve_port(&device)
            }
            Self::Vsock(port) => serve_vsock(*port),
            Self::Terminal(path) => {
                let file = File::options().read(true).write(true).open(path)?;
                sys::make_raw(&file)?;
                agent::serve(file.try_clone()?, file)
            }
        }
    }
}

/// The device of a virtio-serial port, by the name that the host gave it.
fn port_device(wanted: &str) -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    let found = ports.flatten().find(|port| {
        let name = fs::read_to_string(port.path().join("name"));
        name.is_ok_and(|name| name.trim() == wanted)
    })?;
    let device = Path::new("/dev").join(found.file_name());
    device.exists().then_some(device)
}

/// A port reads as ended while the host has not opened it, and again when it has closed it.
fn serve_port(device: &Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(device)?;
    loop {
        while sys::hung_up(file.as_fd())? {
            thread::sleep(RETRY);
        }
        agent::serve(file.try_clone()?, file.try_clone()?)?;
    }
}

fn serve_vsock(port: u32) -> io::Result<()> {
    let listener = Vsock::listen(port)?;
    loop {
        let stream = listener.accept()?;
        let writer = stream.try_clone()?;
        thread::Builder::new().name("client".into()).spawn(move || {
            // A client that breaks off ends its own session only.
            let _ = agent::serve(stream, writer);
        })?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_channels() {
        let list = Channel::list("port:triarch.agent,vsock:1024,serial:/dev/ttyS1,console:hvc0");
        let expected = [
            Channel::Port("triarch.agent".into()),
            Channel::Vsock(1024),
            Channel::Terminal("/dev/ttyS1".into()),
            Channel::Terminal("/dev/hvc0".into()),
        ];
        assert_eq!(list.unwrap(), expected);
        assert_eq!(expected[1].to_string(), "vsock:1024");
        for wrong in ["", "port:", "vsock:x", "serial:ttyS1", "hvc0"] {
            assert!(wrong.parse::<Channel>().unwrap_err().starts_with(wrong), "{wrong}");
        }
    }

    #[test]
    fn waits_for_a_terminal_to_appear() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tty");
        let channels = [Channel::Terminal(path.clone())];
        assert_eq!(Channel::first(&channels, Duration::from_millis(1)), None);
        fs::write(&path, "").unwrap();
        assert_eq!(Channel::first(&channels, Duration::ZERO), Some(&channels[0]));
    }
}
