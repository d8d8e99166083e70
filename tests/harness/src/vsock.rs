//! The host's side of a VM's vsock device: one unix socket, on which a client names the guest's
//! port; and `SOCKET_PORT`, where the guest's connections to the host arrive.

use crate::agent::connect_socket;
use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How long one attempt may take; a guest that boots does not answer.
const ATTEMPT: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(50);

/// Connects to `port` of the guest behind `socket`, again and again until it listens.
///
/// # Errors
/// It does not within `limit`.
pub fn connect(socket: &Path, port: u32, limit: Duration) -> Result<UnixStream> {
    let deadline = Instant::now() + limit;
    loop {
        match attempt(socket, port) {
            Ok(stream) => return Ok(stream),
            Err(e) if Instant::now() >= deadline => {
                return Err(e.context(format!("no vsock connection to port {port} in {limit:?}")));
            }
            Err(_) => thread::sleep(RETRY),
        }
    }
}

fn attempt(socket: &Path, port: u32) -> Result<UnixStream> {
    let mut stream = connect_socket(socket, Duration::ZERO)?;
    stream.set_read_timeout(Some(ATTEMPT))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut answer = Vec::new();
    // Byte by byte: what follows the line belongs to the connection.
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).context("the VMM closed the connection")?;
        match byte {
            [b'\n'] => break,
            _ if answer.len() > 64 => bail!("an endless answer to CONNECT"),
            [other] => answer.push(other),
        }
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    match answer.strip_prefix("OK ").map(str::parse::<u32>) {
        Some(Ok(_)) => {
            stream.set_read_timeout(None)?;
            Ok(stream)
        }
        _ => bail!("the VMM answered CONNECT with `{answer}`"),
    }
}

/// The socket at which the guest's connections to `port` of the host arrive.
pub fn host_socket(socket: &Path, port: u32) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}

/// Listens where the guest's connections to `port` of the host arrive.
///
/// # Errors
/// The socket cannot be made.
pub fn listen(socket: &Path, port: u32) -> Result<UnixListener> {
    let path = host_socket(socket, port);
    UnixListener::bind(&path).with_context(|| format!("cannot listen on {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    /// A VMM that answers each connection with the next of `answers`.
    fn vmm(answers: &'static [&'static str]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vsock");
        let listener = UnixListener::bind(&socket).unwrap();
        thread::spawn(move || {
            for answer in answers {
                let mut stream = BufReader::new(listener.accept().unwrap().0);
                let mut line = String::new();
                stream.read_line(&mut line).unwrap();
                assert_eq!(line, "CONNECT 1024\n");
                stream.get_mut().write_all(answer.as_bytes()).unwrap();
            }
        });
        (dir, socket)
    }

    #[test]
    fn tries_until_the_guest_listens() {
        let (_dir, socket) = vmm(&["", "OK 1073741824\nhello"]);
        let mut stream = connect(&socket, 1024, Duration::from_secs(10)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn another_answer_is_an_error() {
        let (_dir, socket) = vmm(&["NO\n"]);
        let error = format!("{:#}", connect(&socket, 1024, Duration::ZERO).unwrap_err());
        assert!(error.contains("in 0ns") && error.contains("`NO`"), "{error}");
    }

    #[test]
    fn a_listener_gets_the_port_in_its_name() {
        assert_eq!(host_socket(Path::new("/t/v.sock"), 52), Path::new("/t/v.sock_52"));
    }
}
