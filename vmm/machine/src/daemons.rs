//! Daemons that serve devices of this VM alone, and live as long as they are used.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;
use triarch_api::{DiskConfig, NetConfig};

use crate::MachineError;

/// Starts daemons. All calls come from the controller's thread.
pub trait Daemons: Send + Sync {
    /// Starts the daemon of device `id`, and starts it again whenever it ends. Returns the socket at which it serves.
    ///
    /// # Errors
    /// It cannot be started, or does not get ready.
    fn start(&self, id: &str, order: DaemonOrder) -> Result<PathBuf, DaemonError>;

    /// Ends it. Returns when it has finished what it was given.
    fn stop(&self, id: &str);
}

/// A daemon that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonOrder {
    /// Name of the program's file.
    pub program: &'static str,
    /// Its arguments. It finds its listening socket as descriptor 3.
    pub arguments: Vec<String>,
}

/// Why a daemon was not started, in a sentence.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct DaemonError(pub String);

/// The VMM may start no daemon.
#[derive(Debug, Error)]
#[error(
    "backend={0} needs a daemon, and this VMM may start none; start it with --daemons, or start the daemon yourself and give vhost_user=on and vhost_socket"
)]
struct Forbidden(&'static str);

/// A daemon that was started. It ends with this.
pub(crate) struct Started {
    daemons: Arc<dyn Daemons>,
    id: String,
}

impl Drop for Started {
    fn drop(&mut self) {
        self.daemons.stop(&self.id);
    }
}

/// Starts the daemon of a disk whose file `triarch-blkd` serves; its socket.
pub(crate) fn start_disk(
    config: &DiskConfig,
    daemons: Option<&Arc<dyn Daemons>>,
) -> Result<(Started, PathBuf), MachineError> {
    let path = config.path.as_deref().and_then(Path::to_str);
    let path = path.filter(|path| !path.contains('"')).ok_or_else(|| {
        let text = "the path of its file must be UTF-8 text without quotation marks";
        MachineError::device(&config.id, text)
    })?;
    let arguments = vec!["--export".to_owned(), export(path, config)];
    start(&config.id, "triarch-blkd", "blkd", arguments, daemons)
}

/// Starts the daemon of an interface whose tap `triarch-netd` serves; its socket.
pub(crate) fn start_net(
    config: &NetConfig,
    daemons: Option<&Arc<dyn Daemons>>,
) -> Result<(Started, PathBuf), MachineError> {
    let [guest, host] = ports(config);
    let arguments = vec!["--port".to_owned(), guest, "--port".to_owned(), host];
    start(&config.id, "triarch-netd", "netd", arguments, daemons)
}

fn start(
    id: &Option<String>,
    program: &'static str,
    backend: &'static str,
    arguments: Vec<String>,
    daemons: Option<&Arc<dyn Daemons>>,
) -> Result<(Started, PathBuf), MachineError> {
    let failed = |error: Box<dyn Error + Send + Sync>| MachineError::device(id, error);
    let daemons = daemons.ok_or_else(|| failed(Forbidden(backend).into()))?.clone();
    let id = id.clone().unwrap_or_default();
    let order = DaemonOrder { program, arguments };
    let socket = daemons.start(&id, order).map_err(|error| failed(error.into()))?;
    Ok((Started { daemons, id }, socket))
}

/// What `triarch-blkd` is told of a disk.
fn export(path: &str, config: &DiskConfig) -> String {
    let mut text = format!(r#"name=disk,path="{path}",socket=fd=3"#);
    text += &format!(",num_queues={},queue_size={}", config.num_queues, config.queue_size);
    if let Some(serial) = &config.serial {
        text += &format!(r#",serial="{serial}""#);
    }
    for (key, given) in [
        (",readonly=on", config.readonly),
        (",direct=on", config.direct),
        (",io_uring=off", config.disable_io_uring),
    ] {
        if given {
            text += key;
        }
    }
    text
}

/// What `triarch-netd` is told of an interface: its port, and that of the host.
fn ports(config: &NetConfig) -> [String; 2] {
    let mut guest = format!("name=guest,socket=fd=3,num_queues={}", config.num_queues);
    if let Some(mac) = config.mac {
        guest += &format!(",mac={mac}");
    }
    let tap = config.tap.as_deref().unwrap_or_default();
    let mut host = format!(r#"name=host,tap="{tap}",num_queues={}"#, config.num_queues / 2);
    if let Some(mtu) = config.mtu {
        host += &format!(",mtu={mtu}");
    }
    [guest, host]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_told_what_the_disk_is() {
        let told = export("/d", &DiskConfig::default());
        assert_eq!(told, r#"name=disk,path="/d",socket=fd=3,num_queues=1,queue_size=128"#);
        let other = DiskConfig {
            readonly: true,
            direct: true,
            disable_io_uring: true,
            num_queues: 4,
            serial: Some("s".into()),
            ..DiskConfig::default()
        };
        let told = export("/a,b=c", &other);
        assert!(told.starts_with(r#"name=disk,path="/a,b=c",socket"#), "{told}");
        assert!(
            told.ends_with(r#"num_queues=4,queue_size=128,serial="s",readonly=on,direct=on,io_uring=off"#),
            "{told}"
        );
    }
    #[test]
    fn a_switch_is_told_what_the_interface_is() {
        let mut net = NetConfig {
            tap: Some("tap7".into()),
            ..NetConfig::default()
        };
        assert_eq!(
            ports(&net),
            [
                "name=guest,socket=fd=3,num_queues=2",
                r#"name=host,tap="tap7",num_queues=1"#
            ]
        );
        net.mac = "12:34:56:78:9a:bc".parse().ok();
        net.mtu = Some(9000);
        net.num_queues = 8;
        let [guest, host] = ports(&net);
        assert_eq!(guest, "name=guest,socket=fd=3,num_queues=8,mac=12:34:56:78:9a:bc");
        assert_eq!(host, r#"name=host,tap="tap7",num_queues=4,mtu=9000"#);
    }
}
