//! One connection: bytes and descriptors out, heads and bodies in.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::error::Broken;

/// Header fields of a response.
const MAX_FIELDS: usize = 64;
/// Bytes of a response's head.
const MAX_HEAD: usize = 64 << 10;
/// Bytes of a response's body, of a line of a stream.
const MAX_BODY: usize = 64 << 20;
/// Descriptors that the kernel takes in one message (SCM_MAX_FD).
pub(crate) const MAX_FDS: usize = 253;

/// Until when something has to be done; `None`: there is no hurry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline(Option<Instant>);

impl Deadline {
    /// In `limit`; a limit of zero is none.
    pub(crate) fn after(limit: Duration) -> Self {
        Self(if limit.is_zero() {
            None
        } else {
            Instant::now().checked_add(limit)
        })
    }

    fn left(self) -> Result<Option<Duration>, Broken> {
        match self.0 {
            None => Ok(None),
            Some(end) => match end.saturating_duration_since(Instant::now()) {
                Duration::ZERO => Err(Broken::Timeout),
                left => Ok(Some(left)),
            },
        }
    }
}

/// The head of a response.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) status: u16,
    pub(crate) content_type: Option<String>,
    /// Bytes of the body; `None`: it ends with the connection.
    pub(crate) length: Option<usize>,
    /// Whether the VMM takes another request on this connection.
    pub(crate) keep_alive: bool,
}

#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    /// Bytes that came and were not used yet.
    buffer: Vec<u8>,
}

impl Connection {
    pub(crate) fn open(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        let buffer = Vec::new();
        Ok(Self { stream, buffer })
    }

    /// A connection that is there already.
    #[cfg(test)]
    pub(crate) fn on(stream: UnixStream) -> Self {
        let buffer = Vec::new();
        Self { stream, buffer }
    }

    /// Whether another request can be sent: the other end is there and has not said anything unasked.
    pub(crate) fn is_fresh(&self) -> bool {
        let peeked = rustix::net::recv(&self.stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        self.buffer.is_empty() && matches!(peeked, Err(rustix::io::Errno::AGAIN))
    }

    /// Sends all of `bytes`, with the first of them `fds`.
    pub(crate) fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>], deadline: Deadline) -> Result<(), Broken> {
        self.stream.set_write_timeout(deadline.left()?)?;
        let mut sent = 0;
        if !fds.is_empty() {
            let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(Broken::Failed(io::Error::other("these are too many descriptors")));
            }
            let parts = [IoSlice::new(bytes)];
            sent = rustix::io::retry_on_intr(|| {
                rustix::net::sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL)
            })
            .map_err(io::Error::from)?;
        }
        while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
            self.stream.set_write_timeout(deadline.left()?)?;
            match self.stream.write(rest) {
                Ok(n) => sent += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next response's head.
    pub(crate) fn head(&mut self, deadline: Deadline) -> Result<Head, Broken> {
        loop {
            while let Some(at) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                let head = parse(&self.buffer[..at + 4])?;
                self.buffer.drain(..at + 4);
                // An interim response (RFC 9110, section 15.2) announces another one.
                if head.status >= 200 {
                    return Ok(head);
                }
            }
            if self.buffer.len() > MAX_HEAD {
                return Err(Broken::Malformed(format!("its head has more than {MAX_HEAD} bytes")));
            }
            if !self.fill(deadline)? {
                return Err(Broken::Closed);
            }
        }
    }

    /// A body of `length` bytes, or all that comes until the end of the connection.
    pub(crate) fn body(&mut self, length: Option<usize>, deadline: Deadline) -> Result<Vec<u8>, Broken> {
        if length.is_some_and(|length| length > MAX_BODY) {
            return Err(too_long());
        }
        while length.is_none_or(|length| self.buffer.len() < length) {
            if self.buffer.len() > MAX_BODY {
                return Err(too_long());
            }
            if !self.fill(deadline)? {
                match length {
                    None => break,
                    Some(_) => return Err(Broken::Closed),
                }
            }
        }
        let length = length.unwrap_or(self.buffer.len());
        Ok(self.buffer.drain(..length).collect())
    }

    /// The next line of a body without a length, without its newline; `None` at the end of the connection.
    pub(crate) fn line(&mut self, deadline: Deadline) -> Result<Option<Vec<u8>>, Broken> {
        let mut scanned = 0;
        loop {
            if let Some(at) = self.buffer[scanned..].iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.buffer.drain(..=scanned + at).collect();
                line.pop();
                return Ok(Some(line));
            }
            scanned = self.buffer.len();
            if scanned > MAX_BODY {
                return Err(too_long());
            }
            if !self.fill(deadline)? {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(Broken::Closed)
                };
            }
        }
    }

    /// Waits for more bytes; false at the end of the connection.
    fn fill(&mut self, deadline: Deadline) -> Result<bool, Broken> {
        let mut chunk = [0; 16 << 10];
        loop {
            self.stream.set_read_timeout(deadline.left()?)?;
            match self.stream.read(&mut chunk) {
                Ok(n) => {
                    self.buffer.extend_from_slice(&chunk[..n]);
                    return Ok(n > 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn too_long() -> Broken {
    Broken::Malformed(format!("its body has more than {MAX_BODY} bytes"))
}

/// Reads a whole head (RFC 9112, section 4).
fn parse(bytes: &[u8]) -> Result<Head, Broken> {
    let malformed = |why: &str| Broken::Malformed(why.to_owned());
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut response = httparse::Response::new(&mut fields);
    match response.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err(malformed("its head is not complete")),
        Err(error) => return Err(Broken::Malformed(error.to_string())),
    }
    let status = response.code.unwrap_or_default();
    let mut head = Head {
        status,
        content_type: None,
        // These have no body (RFC 9110, sections 15.2, 15.3.5, 15.4.5).
        length: matches!(status, 100..=199 | 204 | 304).then_some(0),
        keep_alive: response.version == Some(1),
    };
    for field in response.headers.iter() {
        let value = str::from_utf8(field.value).map_err(|_| malformed("a header field is not UTF-8"))?;
        let value = value.trim();
        if field.name.eq_ignore_ascii_case("content-length") && head.length.is_none() {
            let length = value
                .parse()
                .map_err(|_| malformed("its Content-Length is no number"))?;
            head.length = Some(length);
        } else if field.name.eq_ignore_ascii_case("content-type") {
            head.content_type = Some(value.to_owned());
        } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(malformed("it has a Transfer-Encoding"));
        } else if field.name.eq_ignore_ascii_case("connection") {
            head.keep_alive &= !value.eq_ignore_ascii_case("close");
        }
    }
    head.keep_alive &= head.length.is_some();
    Ok(head)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Deadline = Deadline(None);

    /// A connection whose other end has said `text` and nothing more.
    fn hearing(text: &[u8]) -> Connection {
        let (stream, mut other) = UnixStream::pair().expect("a pair");
        other.write_all(text).expect("write");
        Connection::on(stream)
    }

    #[test]
    fn heads_are_understood() {
        let head = |text: &str| hearing(text.as_bytes()).head(NOW).expect("a head");
        let plain = head("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Type: application/json\r\n\r\n");
        assert_eq!((plain.status, plain.length, plain.keep_alive), (200, Some(3), true));
        assert_eq!(plain.content_type.as_deref(), Some("application/json"));
        let empty = head("HTTP/1.1 204 No Content\r\nContent-Length: 7\r\n\r\n");
        assert_eq!((empty.length, empty.keep_alive), (Some(0), true));
        let stream = head("HTTP/1.1 200 OK\r\nconnection: Close\r\n\r\n");
        assert_eq!((stream.length, stream.keep_alive), (None, false));
        let interim = head("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
        assert_eq!(interim.status, 404);
        assert!(!head("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n").keep_alive);
    }

    #[test]
    fn what_is_no_answer_is_told_apart() {
        let head = |text: &str| hearing(text.as_bytes()).head(NOW).expect_err("broken");
        assert!(matches!(head("SSH-2.0-OpenSSH\r\n\r\n"), Broken::Malformed(_)));
        assert!(matches!(head("HTTP/1.1 200 OK\r\n"), Broken::Closed));
        assert!(matches!(head(""), Broken::Closed));
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert!(matches!(head(chunked), Broken::Malformed(_)));
        assert!(matches!(
            head("HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"),
            Broken::Malformed(_)
        ));
        let long = "x".repeat(MAX_HEAD + 1);
        assert!(matches!(head(&long), Broken::Malformed(_)));
        assert!(matches!(hearing(b"ab").body(Some(3), NOW), Err(Broken::Closed)));
        assert!(matches!(
            hearing(b"ab").body(Some(MAX_BODY + 1), NOW),
            Err(Broken::Malformed(_))
        ));
    }

    #[test]
    fn bodies_end_where_they_say_and_lines_where_they_end() {
        let mut connection = hearing(b"abcdef");
        assert_eq!(connection.body(Some(4), NOW).expect("a body"), b"abcd");
        assert!(!connection.is_fresh());
        assert_eq!(connection.body(None, NOW).expect("the rest"), b"ef");
        let mut lines = hearing(b"one\n\ntwo\nhalf");
        for line in [&b"one"[..], b"", b"two"] {
            assert_eq!(lines.line(NOW).expect("a line").as_deref(), Some(line));
        }
        assert!(matches!(lines.line(NOW), Err(Broken::Closed)));
        assert!(hearing(b"").line(NOW).expect("the end").is_none());
    }

    #[test]
    fn a_silent_vmm_is_not_waited_for_longer_than_asked() {
        let (stream, _other) = UnixStream::pair().expect("a pair");
        let mut connection = Connection::on(stream);
        assert!(connection.is_fresh());
        let deadline = Deadline::after(Duration::from_millis(20));
        assert!(matches!(connection.head(deadline), Err(Broken::Timeout)));
    }

    proptest! {
        #[test]
        fn whatever_comes_there_is_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            // The answer may be anything; it must neither panic nor wait.
            let _ = hearing(&bytes).head(NOW);
            let _ = parse(&bytes);
        }
    }
}
