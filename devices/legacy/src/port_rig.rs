//! What tests of a console's port have: the port, and who is at the other end of its console.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use triarch_device_core::mock::CountingLine;

use crate::console::{Backend, Console};
use crate::port::SerialPort;

pub(crate) struct PortRig<P> {
    pub(crate) port: P,
    pub(crate) line: Arc<CountingLine>,
    pub(crate) client: UnixStream,
    _dir: tempfile::TempDir,
}

impl<P: SerialPort> PortRig<P> {
    /// The port that `make` makes, with a client that is connected to its console.
    pub(crate) fn new(make: impl FnOnce(Arc<Console>, Arc<CountingLine>) -> P) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("serial");
        let console = Arc::new(Console::open(&Backend::Socket(path.clone())).expect("console"));
        let line = Arc::new(CountingLine::default());
        let port = make(console, line.clone());
        let client = UnixStream::connect(&path).expect("client");
        port.on_event();
        Self {
            port,
            line,
            client,
            _dir: dir,
        }
    }

    /// What the guest reads at `offset`.
    pub(crate) fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut value = [0; N];
        self.port.read(offset, &mut value).expect("read");
        value
    }

    /// The guest writes.
    pub(crate) fn write<const N: usize>(&self, offset: u64, value: [u8; N]) {
        self.port.write(offset, &value).expect("write");
    }

    /// The client sends, and the port hears of it.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.client.write_all(bytes).expect("send");
        self.port.on_event();
    }
}
