//! The VMM's HTTP API over its unix socket, one request a connection.

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use triarch_api::server::Method;
use triarch_client::{Client, Response};

/// What a client waits for a socket, and for an answer; agents in the field give up sooner.
const LIMIT: Duration = Duration::from_secs(10);

/// A client of one VMM.
#[derive(Clone, Debug)]
pub struct Api {
    socket: PathBuf,
    limit: Duration,
}

impl Api {
    /// A client of the VMM that listens on `socket`, now or soon.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            limit: LIMIT,
        }
    }

    /// The same client for work that takes longer than agents wait for most, such as all of a guest's memory.
    #[must_use]
    pub fn within(&self, limit: Duration) -> Self {
        let socket = self.socket.clone();
        Self { socket, limit }
    }

    /// Path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A client that keeps its connection.
    pub fn client(&self) -> Client {
        Client::new(&self.socket).limit(self.limit).patience(self.limit)
    }

    /// Sends a request to `/api/v1/ROUTE`, or to `ROUTE` if that begins with a slash.
    ///
    /// # Errors
    /// No connection, or no well-formed answer in time.
    pub fn request(&self, method: &str, route: &str, body: Option<&str>) -> Result<Response> {
        self.request_with(method, route, body, &[])
    }

    /// The same with descriptors.
    ///
    /// # Errors
    /// As [`Api::request`].
    pub fn request_with(
        &self,
        method: &str,
        route: &str,
        body: Option<&str>,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Response> {
        let method = match method {
            "GET" => Method::Get,
            "PUT" => Method::Put,
            other => bail!("the API has GET and PUT, not {other}"),
        };
        Ok(self.client().request(method, route, body, descriptors)?)
    }

    /// What `GET route` answers, which has to succeed.
    ///
    /// # Errors
    /// As [`Api::request`], any other status, or no JSON.
    pub fn get(&self, route: &str) -> Result<Value> {
        let answer = self.request("GET", route, None)?;
        if !answer.is_success() {
            bail!("GET {route} answered {}: {}", answer.status, answer.body);
        }
        serde_json::from_str(&answer.body).with_context(|| format!("GET {route} answered {}", answer.body))
    }

    /// Sends a request that has to succeed.
    ///
    /// # Errors
    /// As [`Api::request`], and any other status.
    pub fn put(&self, route: &str, body: Option<&str>) -> Result<String> {
        let answer = self.request("PUT", route, body)?;
        if !answer.is_success() {
            bail!("PUT {route} answered {}: {}", answer.status, answer.body);
        }
        Ok(answer.body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::thread;

    /// Serves one connection, later: returns what was asked, answers `answer`, keeps the connection open.
    fn serve_one(answer: &'static str) -> (tempfile::TempDir, Api, thread::JoinHandle<String>) {
        let dir = tempfile::tempdir().unwrap();
        let api = Api::new(dir.path().join("api.sock"));
        let socket = api.socket().to_owned();
        let server = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            let listener = UnixListener::bind(socket).unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = String::new();
            let mut buffer = [0; 1024];
            while !asked.contains("\r\n\r\n") {
                let n = stream.read(&mut buffer).unwrap();
                asked += std::str::from_utf8(&buffer[..n]).unwrap();
            }
            for piece in answer.as_bytes().chunks(7) {
                stream.write_all(piece).unwrap();
            }
            let _ = stream.read(&mut buffer);
            asked
        });
        (dir, api, server)
    }

    #[test]
    fn waits_for_the_vmm_and_understands_it() {
        let (_dir, api, server) = serve_one("HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{\"state\":\"Paused\"}");
        assert_eq!(api.put("vm.pause", None).unwrap(), "{\"state\":\"Paused\"}");
        let asked = server.join().unwrap();
        assert!(asked.starts_with("PUT /api/v1/vm.pause HTTP/1.1\r\n"), "{asked}");
    }

    #[test]
    fn a_refusal_is_an_error_with_its_text() {
        let (_dir, api, _server) = serve_one("HTTP/1.1 409 Conflict\r\nContent-Length: 3\r\n\r\nnot");
        let error = api.put("vm.resize", None).unwrap_err().to_string();
        assert_eq!(error, "PUT vm.resize answered 409: not");
    }

    #[test]
    fn only_methods_of_the_api_are_sent() {
        assert!(Api::new("/nonexistent").request("POST", "vm.info", None).is_err());
    }
}
