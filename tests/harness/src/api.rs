//! The VMM's HTTP API over its unix socket, one request a connection.

use crate::agent::connect_socket;
use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a client waits for an answer; agents in the field give up sooner.
const LIMIT: Duration = Duration::from_secs(10);

/// A client of one VMM.
#[derive(Clone, Debug)]
pub struct Api {
    socket: PathBuf,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Body.
    pub body: String,
}

impl Api {
    /// A client of the VMM that listens on `socket`, now or soon.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// Path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends a request to `/api/v1/ROUTE`.
    ///
    /// # Errors
    /// No connection, or no well-formed answer in time.
    pub fn request(&self, method: &str, route: &str, body: Option<&str>) -> Result<Answer> {
        let mut stream = connect_socket(&self.socket, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        let body = body.unwrap_or_default();
        let head = format!("{method} /api/v1/{route} HTTP/1.1\r\nHost: localhost\r\n");
        let kind = if body.is_empty() {
            ""
        } else {
            "Content-Type: application/json\r\n"
        };
        let length = body.len();
        write!(stream, "{head}{kind}Content-Length: {length}\r\n\r\n{body}")?;
        let answer = read_answer(&mut stream);
        answer.with_context(|| format!("no answer to {method} {route}"))
    }

    /// Sends a request that has to succeed (200 or 204).
    ///
    /// # Errors
    /// As [`Api::request`], and any other status.
    pub fn put(&self, route: &str, body: Option<&str>) -> Result<String> {
        let answer = self.request("PUT", route, body)?;
        match answer.status {
            200 | 204 => Ok(answer.body),
            status => bail!("PUT {route} answered {status}: {}", answer.body),
        }
    }
}

/// Reads one answer. The connection stays open, so its length has to come from the header.
fn read_answer(stream: &mut impl Read) -> Result<Answer> {
    let mut data = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        if let Some(answer) = parse(&data)? {
            return Ok(answer);
        }
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            bail!("the connection ended after {} bytes", data.len());
        }
        data.extend_from_slice(&buffer[..n]);
    }
}

/// Parses an answer; `None` if it is not complete yet.
fn parse(data: &[u8]) -> Result<Option<Answer>> {
    let Some(end) = data.windows(4).position(|w| w == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = std::str::from_utf8(&data[..end])?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 "));
    let status = status.and_then(|rest| rest.get(..3)?.parse().ok());
    let status = status.with_context(|| format!("not an HTTP/1.1 status line: {head}"))?;
    // Spelled exactly so: some clients compare the name byte by byte.
    let length = match lines.find_map(|line| line.strip_prefix("Content-Length: ")) {
        Some(length) => length.trim().parse()?,
        None if status == 204 => 0,
        None => bail!("no Content-Length in: {head}"),
    };
    let body = &data[end + 4..];
    if body.len() < length {
        return Ok(None);
    }
    Ok(Some(Answer {
        status,
        body: String::from_utf8(body[..length].to_vec())?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread;

    /// Serves one connection: returns what was asked, answers `answer`, keeps the connection open.
    fn serve_one(answer: &'static str) -> (tempfile::TempDir, Api, thread::JoinHandle<String>) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = thread::spawn(move || {
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
        (dir, Api::new(socket), server)
    }

    #[test]
    fn asks_and_understands() {
        let (_dir, api, server) = serve_one("HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{\"state\":\"Paused\"}");
        assert_eq!(api.put("vm.pause", None).unwrap(), "{\"state\":\"Paused\"}");
        let asked = server.join().unwrap();
        assert!(asked.starts_with("PUT /api/v1/vm.pause HTTP/1.1\r\n"), "{asked}");
        assert!(asked.contains("\r\nContent-Length: 0\r\n"), "{asked}");
    }

    #[test]
    fn waits_for_the_whole_answer() {
        let data = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc";
        for cut in 0..data.len() {
            assert_eq!(parse(&data[..cut]).unwrap(), None, "{cut}");
        }
        let body = parse(data).unwrap().unwrap().body;
        assert_eq!(body, "abc");
    }

    #[test]
    fn needs_no_body_with_204() {
        let (_dir, api, _server) = serve_one("HTTP/1.1 204 No Content\r\n\r\n");
        assert_eq!(api.request("PUT", "vm.boot", Some("{}")).unwrap().status, 204);
    }

    #[test]
    fn a_refusal_is_an_error_with_its_text() {
        let (_dir, api, _server) = serve_one("HTTP/1.1 409 Conflict\r\nContent-Length: 3\r\n\r\nnot");
        let error = api.put("vm.resume", None).unwrap_err().to_string();
        assert_eq!(error, "PUT vm.resume answered 409: not");
    }

    #[test]
    fn a_misspelt_header_is_an_error() {
        let (_dir, api, _server) = serve_one("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
        assert!(api.request("GET", "vmm.ping", None).is_err());
    }
}
