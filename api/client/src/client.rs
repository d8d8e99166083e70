//! Requests and answers.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use triarch_api::server::{Action, Identity, Method, ROUTES};
use triarch_api::{
    CheckMigration, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, Operation, ReceiveMigration,
    RemoveDevice, Resize, ResizeDisk, ResizeZone, RestoreConfig, SendMigration, SnapshotConfig, VmConfig, VmInfo,
    VsockConfig,
};

use crate::connection::{Connection, Deadline, Head, MAX_FDS};
use crate::error::Broken;
use crate::{ConnectError, Error, Follow, Samples};

/// Where the API is.
const BASE: &str = "/api/v1/";
/// How long an answer is waited for unless the caller says something else.
const LIMIT: Duration = Duration::from_secs(60);
/// How often a socket is tried that is not there yet.
const RETRY: Duration = Duration::from_millis(5);

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// Media type of the body, if there is one.
    pub content_type: Option<String>,
    /// The body; the VMM's are UTF-8.
    pub body: String,
}

impl Response {
    /// Whether the request was carried out.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The sentence of a refusal: of `{"error": sentence}`, or of the list of sentences that Cloud Hypervisor answers with.
    pub fn refusal(&self) -> String {
        #[derive(serde::Deserialize)]
        #[serde(untagged)]
        enum Body {
            Object { error: String },
            List(Vec<String>),
        }
        match serde_json::from_str(&self.body) {
            Ok(Body::Object { error }) => error,
            Ok(Body::List(causes)) if !causes.is_empty() => causes.join(": "),
            _ if self.body.trim().is_empty() => format!("the VMM answered with HTTP status {}", self.status),
            _ => format!(
                "the VMM answered with HTTP status {}: {}",
                self.status,
                self.body.trim()
            ),
        }
    }

    /// Fails with the sentence of a refusal unless the request was carried out.
    ///
    /// # Errors
    /// [`Error::Refused`].
    pub fn success(self) -> Result<Self, Error> {
        if self.is_success() {
            return Ok(self);
        }
        Err(Error::Refused {
            status: self.status,
            message: self.refusal(),
        })
    }
}

/// A client of one VMM, with a connection that is made when it is needed and kept.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    limit: Duration,
    patience: Duration,
    connection: Option<Connection>,
}

impl Client {
    /// A client of the VMM that listens on `socket`. Nothing is connected yet. Answers are waited for at most a minute.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            limit: LIMIT,
            patience: Duration::ZERO,
            connection: None,
        }
    }

    /// Waits for each answer at most `limit`; zero: for ever.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Waits at most `patience` for a VMM that does not listen yet.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Another client of the same VMM, with a connection of its own.
    pub fn another(&self) -> Self {
        Self {
            socket: self.socket.clone(),
            connection: None,
            ..*self
        }
    }

    /// Sends one request and waits for its answer, whatever its status.
    ///
    /// `target` is the name of a route (`vm.info`) or a whole path (`/metrics`), either with a query if it has one. `fds` go with the
    /// request's first byte (SCM_RIGHTS, unix(7)).
    ///
    /// A kept connection that the VMM has closed meanwhile is made anew, but a request is never sent twice if it might have been heard.
    ///
    /// # Errors
    /// There is no whole answer.
    pub fn request(
        &mut self,
        method: Method,
        target: &str,
        body: Option<&str>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Response, Error> {
        let text = request(method, target, body)?;
        if fds.len() > MAX_FDS {
            let message = format!(
                "{target}: {} descriptors are too many, {MAX_FDS} can be sent",
                fds.len()
            );
            return Err(Error::Request(message));
        }
        let deadline = Deadline::after(self.limit);
        let mut connection = match self.connection.take().filter(Connection::is_fresh) {
            Some(kept) => kept,
            None => self.connect()?,
        };
        let (response, keep) =
            exchange(&mut connection, &text, fds, deadline).map_err(|broken| broken.asking(target, self.limit))?;
        self.connection = Some(connection).filter(|_| keep);
        Ok(response)
    }

    /// [`request`](Self::request) that has to be carried out.
    ///
    /// # Errors
    /// There is no whole answer, or it is a refusal.
    pub fn call(&mut self, method: Method, target: &str, body: Option<&str>) -> Result<Response, Error> {
        self.request(method, target, body, &[])?.success()
    }

    /// Gets the body of a route that answers.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn get(&mut self, target: &str) -> Result<String, Error> {
        Ok(self.call(Method::Get, target, None)?.body)
    }

    /// Gets the body of a route as what it is.
    ///
    /// # Errors
    /// As [`call`](Self::call), and another body than expected.
    pub fn get_as<T: DeserializeOwned>(&mut self, target: &str) -> Result<T, Error> {
        let body = self.get(target)?;
        decode(target, &body)
    }

    /// Who answers.
    ///
    /// # Errors
    /// As [`get_as`](Self::get_as).
    pub fn ping(&mut self) -> Result<Identity, Error> {
        self.get_as(name_of(Action::Ping))
    }

    /// What the VM is and in which phase.
    ///
    /// # Errors
    /// As [`get_as`](Self::get_as); without a VM the answer is a refusal.
    pub fn info(&mut self) -> Result<VmInfo, Error> {
        self.get_as(Operation::Info.name())
    }

    /// The figures of `/metrics`.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn metrics(&mut self) -> Result<Samples, Error> {
        Ok(Samples::parse(&self.get("/metrics")?))
    }

    /// Asks for an operation that needs no more than its name, such as a boot.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn run(&mut self, operation: Operation) -> Result<(), Error> {
        self.call(Method::Put, operation.name(), None).map(drop)
    }

    /// Gives the VMM this configuration.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn create(&mut self, config: &VmConfig) -> Result<(), Error> {
        self.put(Operation::Create, config, &[]).map(drop)
    }

    /// Asks for another number of vCPUs, another size of RAM.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn resize(&mut self, target: &Resize) -> Result<(), Error> {
        self.put(Operation::Resize, target, &[]).map(drop)
    }

    /// Asks for another size of a memory zone.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn resize_zone(&mut self, target: &ResizeZone) -> Result<(), Error> {
        self.put(Operation::ResizeZone, target, &[]).map(drop)
    }

    /// Asks for a larger disk.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn resize_disk(&mut self, target: &ResizeDisk) -> Result<(), Error> {
        self.put(Operation::ResizeDisk, target, &[]).map(drop)
    }

    /// Adds a disk; the answer tells where, if the guest has it already.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn add_disk(&mut self, disk: &DiskConfig) -> Result<Response, Error> {
        self.put(Operation::AddDisk, disk, &[])
    }

    /// Adds a network interface whose tap the caller opened as `fds`, one a queue pair; or that the VMM opens, without any.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn add_net(&mut self, net: &NetConfig, fds: &[BorrowedFd<'_>]) -> Result<Response, Error> {
        self.put(Operation::AddNet, net, fds)
    }

    /// Adds a file system that a daemon shares.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn add_fs(&mut self, fs: &FsConfig) -> Result<Response, Error> {
        self.put(Operation::AddFs, fs, &[])
    }

    /// Adds a device of any type that a daemon serves.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn add_generic_vhost_user(&mut self, device: &GenericVhostUserConfig) -> Result<Response, Error> {
        self.put(Operation::AddGenericVhostUser, device, &[])
    }

    /// Passes a device of the host through.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn add_device(&mut self, device: &DeviceConfig, fds: &[BorrowedFd<'_>]) -> Result<Response, Error> {
        self.put(Operation::AddDevice, device, fds)
    }

    /// Adds a vsock.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn add_vsock(&mut self, vsock: &VsockConfig) -> Result<Response, Error> {
        self.put(Operation::AddVsock, vsock, &[])
    }

    /// Takes a device away.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn remove_device(&mut self, id: &str) -> Result<(), Error> {
        let device = RemoveDevice {
            id: id.to_owned(),
            force: false,
        };
        self.put(Operation::RemoveDevice, &device, &[]).map(drop)
    }

    /// Saves a paused VM.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn snapshot(&mut self, to: &SnapshotConfig) -> Result<(), Error> {
        self.put(Operation::Snapshot, to, &[]).map(drop)
    }

    /// Makes a VM from a snapshot; `fds` are the descriptors of its taps that the caller opened.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn restore(&mut self, from: &RestoreConfig, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.put(Operation::Restore, from, fds).map(drop)
    }

    /// Asks a VMM that waits for a VM what would be in the way of this one; the answer is a [`MigrationCheck`](triarch_api::MigrationCheck).
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn check_migration(&mut self, to: &CheckMigration) -> Result<Response, Error> {
        self.put(Operation::CheckMigration, to, &[])
    }

    /// Moves the VM to another VMM, and returns when that is over; the client's limit on time has to allow for it.
    ///
    /// # Errors
    /// As [`call`](Self::call). The guest runs here as before, unless the error says otherwise.
    pub fn send_migration(&mut self, to: &SendMigration) -> Result<(), Error> {
        self.put(Operation::SendMigration, to, &[]).map(drop)
    }

    /// Takes a VM from another VMM, and returns when it runs; `fds` are the descriptors of its taps that the caller opened.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn receive_migration(&mut self, from: &ReceiveMigration, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.put(Operation::ReceiveMigration, from, fds).map(drop)
    }

    /// Follows a route whose answer has no end, on a connection of its own.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn follow(&self, target: &str) -> Result<Follow, Error> {
        let text = request(Method::Get, target, None)?;
        let mut connection = self.connect()?;
        let deadline = Deadline::after(self.limit);
        let asking = |broken: Broken| broken.asking(target, self.limit);
        connection.send(&text, &[], deadline).map_err(asking)?;
        let head = connection.head(deadline).map_err(asking)?;
        if head.status != 200 || head.length.is_some() {
            let response = rest(&mut connection, head, deadline).map_err(asking)?;
            response.success()?;
            let why = "it has an end".to_owned();
            return Err(Broken::Malformed(why).asking(target, self.limit));
        }
        Ok(Follow::new(connection, target))
    }

    fn put(&mut self, operation: Operation, body: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<Response, Error> {
        let name = operation.name();
        let body = serde_json::to_string(body).map_err(|error| Error::Request(format!("{name}: {error}")))?;
        self.request(Method::Put, name, Some(&body), fds)?.success()
    }

    fn connect(&self) -> Result<Connection, Error> {
        let start = Instant::now();
        loop {
            let source = match Connection::open(&self.socket) {
                Ok(connection) => return Ok(connection),
                Err(error) => ConnectError::from(error),
            };
            let soon = matches!(source, ConnectError::Missing | ConnectError::Dead | ConnectError::Busy);
            if !soon || start.elapsed() >= self.patience {
                let socket = self.socket.clone();
                return Err(Error::Connect { socket, source });
            }
            thread::sleep(RETRY);
        }
    }
}

/// The body of the answer to `target`, understood.
pub(crate) fn decode<T: DeserializeOwned>(target: &str, body: &str) -> Result<T, Error> {
    serde_json::from_str(body).map_err(|source| Error::Body {
        target: target.to_owned(),
        source,
    })
}

fn name_of(action: Action) -> &'static str {
    let route = ROUTES.iter().find(|route| route.action == action);
    route.map_or("", |route| route.name)
}

/// A request as bytes. What would end the first line early is no target.
fn request(method: Method, target: &str, body: Option<&str>) -> Result<Vec<u8>, Error> {
    if target.is_empty() || !target.bytes().all(|byte| byte.is_ascii_graphic()) {
        let target = target.escape_debug();
        return Err(Error::Request(format!(
            "'{target}' is no route; write one like vm.info, without spaces"
        )));
    }
    let method = match method {
        Method::Get => "GET",
        Method::Put => "PUT",
        Method::Head | Method::Other => {
            return Err(Error::Request(format!("{target}: the API has only GET and PUT")));
        }
    };
    let base = if target.starts_with('/') { "" } else { BASE };
    let mut text = format!("{method} {base}{target} HTTP/1.1\r\nHost: localhost\r\n");
    if let Some(body) = body {
        text.push_str(&format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n",
            body.len()
        ));
    } else if method == "PUT" {
        text.push_str("Content-Length: 0\r\n");
    }
    text.push_str("\r\n");
    text.push_str(body.unwrap_or_default());
    Ok(text.into_bytes())
}

/// One request and its response, and whether another one can follow.
fn exchange(
    connection: &mut Connection,
    text: &[u8],
    fds: &[BorrowedFd<'_>],
    deadline: Deadline,
) -> Result<(Response, bool), Broken> {
    let sent = connection.send(text, fds, deadline);
    match sent {
        // A VMM that refuses a request by its head may answer and close before it has read the body.
        Ok(()) | Err(Broken::Closed) => {}
        Err(broken) => return Err(broken),
    }
    let head = connection.head(deadline)?;
    let keep = head.keep_alive && sent.is_ok();
    Ok((rest(connection, head, deadline)?, keep))
}

/// A response whose head was read.
fn rest(connection: &mut Connection, head: Head, deadline: Deadline) -> Result<Response, Broken> {
    let body = connection.body(head.length, deadline)?;
    let body = String::from_utf8(body).map_err(|_| Broken::Malformed("its body is not UTF-8".to_owned()))?;
    Ok(Response {
        status: head.status,
        content_type: head.content_type,
        body,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn requests_are_spelled_as_http_has_it() {
        let text = |method, target, body| String::from_utf8(request(method, target, body).expect("a request"));
        assert_eq!(
            text(Method::Get, "vm.info", None).as_deref(),
            Ok("GET /api/v1/vm.info HTTP/1.1\r\nHost: localhost\r\n\r\n")
        );
        assert_eq!(
            text(Method::Put, "vm.boot", None).as_deref(),
            Ok("PUT /api/v1/vm.boot HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        );
        let with_body = text(Method::Put, "/x?y=1", Some("{}")).expect("UTF-8");
        assert!(with_body.starts_with("PUT /x?y=1 HTTP/1.1\r\n"), "{with_body}");
        assert!(with_body.ends_with("\r\nContent-Length: 2\r\n\r\n{}"), "{with_body}");
        for bad in ["", "vm.info HTTP/1.1\r\nX: y", "vm info", "größe"] {
            assert!(
                matches!(request(Method::Get, bad, None), Err(Error::Request(_))),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_refusal_that_came_before_the_request_was_heard_out_is_read() {
        let (stream, mut other) = UnixStream::pair().expect("a pair");
        other
            .write_all(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\n{}")
            .expect("an answer");
        drop(other);
        let mut connection = Connection::on(stream);
        let (response, keep) =
            exchange(&mut connection, &[0; 1 << 20], &[], Deadline::after(LIMIT)).expect("an answer");
        assert_eq!((response.status, response.body.as_str(), keep), (413, "{}", false));
    }

    #[test]
    fn refusals_are_read_in_either_dialect() {
        let refusal = |body: &str| {
            let response = Response {
                status: 500,
                content_type: None,
                body: body.to_owned(),
            };
            response.success().expect_err("refused").to_string()
        };
        assert_eq!(refusal(r#"{"error":"no kernel"}"#), "no kernel");
        assert_eq!(refusal(r#"["cannot boot","no kernel"]"#), "cannot boot: no kernel");
        assert_eq!(refusal(""), "the VMM answered with HTTP status 500");
        assert_eq!(refusal("Oh\n"), "the VMM answered with HTTP status 500: Oh");
    }
}
