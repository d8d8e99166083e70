//! Daemons that serve devices of this VM alone, and live as long as they are used.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;
use triarch_api::DiskConfig;

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
    let failed = |error: Box<dyn Error + Send + Sync>| MachineError::device(&config.id, error);
    let daemons = daemons.ok_or_else(|| failed(Forbidden("blkd").into()))?;
    let id = config.id.clone().unwrap_or_default();
    let path = config
        .path
        .as_deref()
        .and_then(Path::to_str)
        .filter(|path| !path.contains('"'));
    let path = path.ok_or_else(|| failed("the path of its file must be UTF-8 text without quotation marks".into()))?;
    let order = DaemonOrder {
        program: "triarch-blkd",
        arguments: vec!["--export".to_owned(), export(&id, path, config)],
    };
    let socket = daemons.start(&id, order).map_err(|error| failed(error.into()))?;
    let daemons = daemons.clone();
    Ok((Started { daemons, id }, socket))
}

/// What `triarch-blkd` is told of a disk.
fn export(id: &str, path: &str, config: &DiskConfig) -> String {
    let mut text = format!(r#"name="{id}",path="{path}",socket=fd=3"#);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_told_what_the_disk_is() {
        let told = export("_disk0", "/d", &DiskConfig::default());
        assert_eq!(
            told,
            r#"name="_disk0",path="/d",socket=fd=3,num_queues=1,queue_size=128"#
        );
        let other = DiskConfig {
            readonly: true,
            direct: true,
            disable_io_uring: true,
            num_queues: 4,
            serial: Some("s".into()),
            ..DiskConfig::default()
        };
        let told = export("x", "/a,b=c", &other);
        assert!(told.starts_with(r#"name="x",path="/a,b=c",socket"#), "{told}");
        assert!(
            told.ends_with(r#"num_queues=4,queue_size=128,serial="s",readonly=on,direct=on,io_uring=off"#),
            "{told}"
        );
    }
}
