//! A connection to the API byte by byte, for clients that write their own requests and pass descriptors with them.

use crate::agent::connect_socket;
use anyhow::{Context, Result, ensure};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long a socket is waited for.
const APPEARS: Duration = Duration::from_secs(10);
/// Descriptors the kernel passes in one go (SCM_MAX_FD).
pub const MAX_FDS: usize = 253;

/// A connected client.
pub struct Wire {
    stream: UnixStream,
}

impl Wire {
    /// Connects to `socket`; each read and write may take `patience`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(socket: &Path, patience: Duration) -> Result<Self> {
        let stream = connect_socket(socket, APPEARS)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self { stream })
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The server has closed the connection, or does not read.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends bytes with descriptors (SCM_RIGHTS, unix(7)) by one sendmsg.
    ///
    /// # Errors
    /// As [`Wire::send`], and when not all bytes went out at once.
    pub fn send_with(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fits = fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds));
        ensure!(fits, "{} descriptors are too many for one message", fds.len());
        let parts = [IoSlice::new(bytes)];
        let sent = rustix::net::sendmsg(&self.stream, &parts, &mut control, SendFlags::NOSIGNAL)?;
        ensure!(sent == bytes.len(), "{sent} of {} bytes were sent", bytes.len());
        Ok(())
    }

    /// One read into a buffer of `size` bytes; empty at the end of the stream.
    ///
    /// # Errors
    /// Nothing came in time.
    pub fn read_some(&mut self, size: usize) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; size];
        let count = self.stream.read(&mut buffer)?;
        buffer.truncate(count);
        Ok(buffer)
    }

    /// Ends our side: no more requests will come.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn finish(&mut self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Write)
    }
}

/// A TCP port on the loopback interface that leads to a unix socket, for clients that speak TCP only. It ends when dropped.
pub struct Bridge {
    address: SocketAddr,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bridge {
    /// A port that leads to `socket`; each connection becomes one of its own.
    ///
    /// # Errors
    /// No port is free.
    pub fn to(socket: &Path) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("no port on the loopback interface")?;
        let address = listener.local_addr()?;
        let ended = Arc::new(AtomicBool::new(false));
        let (stop, socket) = (ended.clone(), PathBuf::from(socket));
        let thread = thread::spawn(move || {
            for client in listener.incoming() {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                let Ok(client) = client else { continue };
                // A client whose server is gone sees its connection end.
                if let Ok(server) = UnixStream::connect(&socket) {
                    join(client, server);
                }
            }
        });
        Ok(Self {
            address,
            ended,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        // Wakes the thread that waits for clients.
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Copies both ways until either side ends.
fn join(client: TcpStream, server: UnixStream) {
    let (Ok(client2), Ok(server2)) = (client.try_clone(), server.try_clone()) else {
        return;
    };
    let _ = client.set_nodelay(true);
    thread::spawn(move || {
        let (mut from, mut to) = (client, server);
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    thread::spawn(move || {
        let (mut from, mut to) = (server2, client2);
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Both);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_bridge_carries_bytes_both_ways_and_ends() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = String::new();
            stream.read_to_string(&mut asked).unwrap();
            stream.write_all(asked.to_uppercase().as_bytes()).unwrap();
        });
        let bridge = Bridge::to(&socket).unwrap();
        let mut client = TcpStream::connect(bridge.address()).unwrap();
        client.write_all(b"hello").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "HELLO");
        server.join().unwrap();
        drop(bridge);
    }
}
