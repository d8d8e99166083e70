//! Daemons that serve devices of this VM alone, and live as long as they are used.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use thiserror::Error;
use triarch_api::server::Method;
use triarch_api::{Answer, ApiError, DiskConfig, NetConfig, Operation, Reply};
use triarch_client::Client;
use triarch_device_core::{Sandbox, ThreadClass};
use triarch_vhost_user::VhostUserHandle;

use crate::MachineError;

/// How long a daemon may take to answer an order; one that was killed is back by then.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long what it did may take to reach the device.
const HEARSAY: Duration = Duration::from_secs(2);

/// Starts daemons. Calls come from the controller's thread and from those that take devices away.
pub trait Daemons: Send + Sync {
    /// Starts the daemon of device `id`, and starts it again whenever it ends. Returns where it serves.
    ///
    /// # Errors
    /// It cannot be started, or does not get ready.
    fn start(&self, id: &str, order: DaemonOrder) -> Result<DaemonSockets, DaemonError>;

    /// Ends it. Returns when it has finished what it was given.
    fn stop(&self, id: &str);
}

/// A daemon that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonOrder {
    /// Name of the program's file.
    pub program: &'static str,
    /// Its arguments. It finds its listening socket as descriptor 3, and the one for orders as descriptor 4.
    pub arguments: Vec<String>,
    /// It takes orders.
    pub control: bool,
}

/// The sockets of a daemon that was started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonSockets {
    /// Where it serves the device.
    pub device: PathBuf,
    /// Where it takes orders, if it was to.
    pub control: Option<PathBuf>,
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
    /// Where it takes orders.
    control: Option<PathBuf>,
    /// Those who wait for its answer to one.
    waiting: Vec<JoinHandle<()>>,
}

impl Started {
    /// Whether it takes orders.
    pub(crate) fn takes_orders(&self) -> bool {
        self.control.is_some()
    }

    /// Has the daemon of a disk make it `size` bytes large; `device`, and so the guest, hears of it from the daemon. A thread waits for it
    /// and gives `answer`: nothing else has to wait for a daemon that hangs.
    pub(crate) fn resize_disk(
        &mut self,
        size: u64,
        device: Option<VhostUserHandle>,
        answer: Answer,
        sandbox: &Arc<dyn Sandbox>,
    ) {
        let Some(control) = self.control.clone() else {
            return;
        };
        self.waiting.retain(|thread| !thread.is_finished());
        let (id, confine) = (self.id.clone(), sandbox.clone());
        let body = move || {
            if let Err(error) = confine.enter(ThreadClass::VhostUser) {
                tracing::error!("cannot confine a thread: {error}");
                std::process::abort();
            }
            let done = resize(&id, control, size).map(|()| Reply::Done);
            if let (Ok(_), Some(device)) = (&done, device) {
                // A daemon that died in between tells it when it is back: the disk has its size all the same.
                device.wait_config(HEARSAY, |config| has_size(config, size));
            }
            answer.send(done.map_err(|error| error.of_route(Operation::ResizeDisk.name())));
        };
        match sandbox.spawn(format!("{}_resize", self.id), Box::new(body)) {
            Ok(thread) => self.waiting.push(thread),
            // The answer went with the body, which was an error, too.
            Err(error) => tracing::warn!("cannot start a thread that asks the daemon of {}: {error}", self.id),
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.daemons.stop(&self.id);
        for thread in std::mem::take(&mut self.waiting) {
            // What it waited for is gone. One that panicked, too.
            let _ = thread.join();
        }
    }
}

/// Why an order was not carried out, other than that the daemon refused it.
#[derive(Debug, Error)]
enum OrderError {
    #[error("the daemon of the disk '{id}' did not answer within {} s; it may still do it", PATIENCE.as_secs())]
    Hangs { id: String },
    #[error("the daemon of the disk '{id}' ended before it answered; try again")]
    Ended { id: String },
    #[error("cannot ask the daemon of the disk '{id}'")]
    Other { id: String, source: triarch_client::Error },
}

/// Whether the configuration space of a disk (virtio 1.2, 5.2.4) tells of `size` bytes or more.
fn has_size(config: &[u8], size: u64) -> bool {
    let sectors = config.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    sectors >= size / 512
}

/// Asks the daemon at `control` to make its disk `size` bytes large.
fn resize(id: &str, control: PathBuf, size: u64) -> Result<(), ApiError> {
    use triarch_client::Error::{Closed, Refused, Timeout};
    let body = format!(r#"{{"name":"{EXPORT}","size":{size}}}"#);
    let mut client = Client::new(control).limit(PATIENCE);
    let done = client.call(Method::Put, "/api/v1/export.resize", Some(&body));
    let id = id.to_owned();
    let error = match done {
        Ok(_) => return Ok(()),
        Err(Refused { status: 400, message }) => return Err(ApiError::BadRequest(message)),
        Err(Timeout { .. }) => OrderError::Hangs { id },
        Err(Closed { .. }) => OrderError::Ended { id },
        Err(source) => OrderError::Other { id, source },
    };
    Err(ApiError::failed(&error))
}

/// Starts the daemon of a disk whose file `triarch-blkd` serves; its socket. Not `locked`: another VMM still uses the disk.
pub(crate) fn start_disk(
    config: &DiskConfig,
    locked: bool,
    daemons: Option<&Arc<dyn Daemons>>,
) -> Result<(Started, PathBuf), MachineError> {
    let path = config.path.as_deref().and_then(Path::to_str);
    let path = path.filter(|path| !path.contains('"')).ok_or_else(|| {
        let text = "the path of its file must be UTF-8 text without quotation marks";
        MachineError::device(&config.id, text)
    })?;
    let arguments = ["--export", &export(path, config, locked), "--control-socket", "fd=4"];
    let order = DaemonOrder {
        program: "triarch-blkd",
        arguments: arguments.map(str::to_owned).into(),
        control: true,
    };
    start(&config.id, "blkd", order, daemons)
}

/// Starts the daemon of an interface whose tap `triarch-netd` serves; its socket.
pub(crate) fn start_net(
    config: &NetConfig,
    daemons: Option<&Arc<dyn Daemons>>,
) -> Result<(Started, PathBuf), MachineError> {
    let [guest, host] = ports(config);
    let order = DaemonOrder {
        program: "triarch-netd",
        arguments: vec!["--port".to_owned(), guest, "--port".to_owned(), host],
        control: false,
    };
    start(&config.id, "netd", order, daemons)
}

fn start(
    id: &Option<String>,
    backend: &'static str,
    order: DaemonOrder,
    daemons: Option<&Arc<dyn Daemons>>,
) -> Result<(Started, PathBuf), MachineError> {
    let failed = |error: Box<dyn Error + Send + Sync>| MachineError::device(id, error);
    let daemons = daemons.ok_or_else(|| failed(Forbidden(backend).into()))?.clone();
    let id = id.clone().unwrap_or_default();
    let sockets = daemons.start(&id, order).map_err(|error| failed(error.into()))?;
    let started = Started {
        daemons,
        id,
        control: sockets.control,
        waiting: Vec::new(),
    };
    Ok((started, sockets.device))
}

/// What `triarch-blkd` calls the disk.
const EXPORT: &str = "disk";

/// What `triarch-blkd` is told of a disk.
fn export(path: &str, config: &DiskConfig, locked: bool) -> String {
    let mut text = format!(r#"name={EXPORT},path="{path}",socket=fd=3"#);
    text += &format!(",num_queues={},queue_size={}", config.num_queues, config.queue_size);
    if let Some(serial) = &config.serial {
        text += &format!(r#",serial="{serial}""#);
    }
    for (key, given) in [
        (",readonly=on", config.readonly),
        (",direct=on", config.direct),
        (",io_uring=off", config.disable_io_uring),
        (",lock=late", !locked),
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
        let told = export("/d", &DiskConfig::default(), true);
        assert_eq!(told, r#"name=disk,path="/d",socket=fd=3,num_queues=1,queue_size=128"#);
        let other = DiskConfig {
            readonly: true,
            direct: true,
            disable_io_uring: true,
            num_queues: 4,
            serial: Some("s".into()),
            ..DiskConfig::default()
        };
        let told = export("/a,b=c", &other, false);
        assert!(told.starts_with(r#"name=disk,path="/a,b=c",socket"#), "{told}");
        assert!(
            told.ends_with(r#"num_queues=4,queue_size=128,serial="s",readonly=on,direct=on,io_uring=off,lock=late"#),
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
