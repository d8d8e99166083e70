//! A server on a thread, a VM that is only a phase, and a client that reads HTTP by itself.

use std::collections::VecDeque;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tempfile::TempDir;
use triarch_api::events::EventLog;
use triarch_api::jobs::JobBoard;
use triarch_api::server::{Identity, Limits, Listener, Router, Server, Service, Stopper};
use triarch_api::{
    Answer, ApiError, CpuDescription, CpuFeatures, DeviceConfig, DeviceTree, Handler, NetConfig, Phase, Reply, Request,
    VmConfig, VmInfo,
};

/// Follows the phases and tells so; a boot is answered only when the test says so.
pub struct FakeVm {
    info: Mutex<Option<Arc<VmInfo>>>,
    pub events: Arc<EventLog>,
    pub jobs: Arc<JobBoard>,
    /// Boots that wait, when they are to wait.
    held: Mutex<VecDeque<Answer>>,
    hold: Mutex<bool>,
    /// The last network interface that was added, with its descriptors.
    pub handed: Mutex<Option<(NetConfig, Vec<OwnedFd>)>>,
    /// The last device of the host.
    pub passed: Mutex<Option<(DeviceConfig, Vec<OwnedFd>)>>,
}

impl Default for FakeVm {
    fn default() -> Self {
        let events = EventLog::new();
        Self {
            info: Mutex::default(),
            jobs: JobBoard::new(events.clone()),
            events,
            held: Mutex::default(),
            hold: Mutex::default(),
            handed: Mutex::default(),
            passed: Mutex::default(),
        }
    }
}

impl FakeVm {
    /// Boots take until [`finish`](Self::finish) from now on.
    pub fn hold_boots(&self) {
        *self.hold.lock().unwrap() = true;
    }

    /// Waits for a boot to be under way.
    pub fn wait_for_boot(&self) {
        while self.held.lock().unwrap().is_empty() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends one held boot.
    pub fn finish(&self, answer: impl FnOnce(Answer)) {
        answer(self.held.lock().unwrap().pop_front().expect("a held boot"));
    }

    fn set(&self, phase: Phase) {
        let mut info = self.info.lock().unwrap();
        let config = info.take().map(|old| old.config.clone()).unwrap_or_default();
        *info = Some(Arc::new(VmInfo {
            config,
            state: phase,
            memory_actual_size: 0,
            device_tree: DeviceTree::new(),
            vcpus: None,
            memory: None,
            memory_zones: Vec::new(),
            links: Default::default(),
        }));
    }

    pub fn create(&self, config: VmConfig) {
        *self.info.lock().unwrap() = Some(Arc::new(VmInfo {
            config,
            state: Phase::Created,
            memory_actual_size: 0,
            device_tree: DeviceTree::new(),
            vcpus: None,
            memory: None,
            memory_zones: Vec::new(),
            links: Default::default(),
        }));
    }
}

/// What the host of the fake VM offers.
pub fn cpu_features() -> CpuFeatures {
    let host = CpuDescription {
        architecture: "x86_64".to_owned(),
        vendor: Some("HygonGenuine".to_owned()),
        signature: None,
        kernel: None,
        tsc_khz: None,
        tsc_scaling: Some(false),
        features: vec!["avx2".to_owned()],
        values: [("physical_address_bits".to_owned(), 48)].into(),
        unnamed: Vec::new(),
    };
    CpuFeatures { host, vm: None }
}

impl Handler for FakeVm {
    fn submit(&self, request: Request, answer: Answer) {
        let phase = self.info().map_or(Phase::Absent, |info| info.state);
        if let Err(error) = request.check(phase) {
            return answer.send(Err(error));
        }
        match request {
            Request::Create(config) if config.payload.is_none() => {
                let error = ApiError::BadRequest("there is nothing to boot".into());
                return answer.send(Err(error));
            }
            Request::Create(config) => self.create(*config),
            Request::Boot if *self.hold.lock().unwrap() => {
                self.held.lock().unwrap().push_back(answer);
                return;
            }
            Request::Boot | Request::Resume | Request::Reboot => self.set(Phase::Running),
            Request::Pause => self.set(Phase::Paused),
            Request::Shutdown => self.set(Phase::Shutdown),
            Request::Delete => *self.info.lock().unwrap() = None,
            Request::PowerButton | Request::Nmi | Request::VmmShutdown => {}
            Request::CpuFeatures => return answer.send(Ok(Reply::CpuFeatures(Box::new(cpu_features())))),
            Request::AddNet(net, fds) => *self.handed.lock().unwrap() = Some((*net, fds)),
            Request::AddDevice(device, fds) => *self.passed.lock().unwrap() = Some((device, fds)),
            Request::Resize(_)
            | Request::ResizeZone(_)
            | Request::ResizeDisk(_)
            | Request::AddDisk(_)
            | Request::AddFs(_)
            | Request::AddGenericVhostUser(_)
            | Request::AddVsock(_)
            | Request::RemoveDevice(_)
            | Request::Snapshot(_)
            | Request::Restore(..)
            | Request::SendMigration(_)
            | Request::ReceiveMigration(..)
            | Request::CheckMigration(_)
            | Request::SetMigration(_) => {}
            Request::CancelMigration => {
                let error = ApiError::WrongPhase("vm.cancel-migration: no migration is under way".into());
                return answer.send(Err(error));
            }
            Request::MigrationProgress => {
                let error = ApiError::NotFound("vm.migration-progress: nobody asked for a migration yet".into());
                return answer.send(Err(error));
            }
        }
        answer.send(Ok(Reply::Done));
    }

    fn info(&self) -> Option<Arc<VmInfo>> {
        self.info.lock().unwrap().clone()
    }

    fn events(&self) -> &Arc<EventLog> {
        &self.events
    }

    fn jobs(&self) -> &Arc<JobBoard> {
        &self.jobs
    }
}

/// A server on a thread of its own; dropping it ends both.
pub struct Running {
    pub path: PathBuf,
    stopper: Stopper,
    thread: Option<JoinHandle<Server>>,
    _directory: TempDir,
}

impl Running {
    /// Serves `service`.
    pub fn start(service: Box<dyn Service>, limits: Limits) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("api.sock");
        let mut server = Server::new(Listener::bind(&path).expect("a socket"), service, limits).expect("a server");
        Self {
            path,
            stopper: server.stopper(),
            thread: Some(thread::spawn(move || {
                server.run().expect("the loop");
                server
            })),
            _directory: directory,
        }
    }

    /// Serves the API for a fake VM.
    pub fn api(limits: Limits) -> (Self, Arc<FakeVm>) {
        let vm = Arc::new(FakeVm::default());
        let identity = Identity {
            build_version: "v1.2.3".into(),
            version: "1.2.3".into(),
            pid: 42,
            features: vec!["kvm".into()],
        };
        let router = Router::new(vm.clone(), &identity);
        (Self::start(Box::new(router), limits), vm)
    }

    pub fn connect(&self) -> Client {
        Client::connect(&self.path)
    }

    /// Ends the loop and gives the server back.
    pub fn stop(mut self) -> Server {
        self.stopper.stop();
        self.thread.take().expect("a thread").join().expect("no panic")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the server must fail the test, but not a second time.
            if thread.join().is_err() && !thread::panicking() {
                panic!("the server panicked");
            }
        }
    }
}

/// A response as it came.
#[derive(Debug, PartialEq, Eq)]
pub struct Got {
    pub status: u16,
    pub head: String,
    pub body: String,
}

/// A client on one connection.
pub struct Client {
    pub stream: UnixStream,
    buffer: Vec<u8>,
}

impl Client {
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).expect("connect");
        let patience = Some(Duration::from_secs(10));
        stream.set_read_timeout(patience).expect("a timeout");
        stream.set_write_timeout(patience).expect("a timeout");
        let buffer = Vec::new();
        Self { stream, buffer }
    }

    pub fn send(&mut self, text: impl AsRef<[u8]>) {
        self.stream.write_all(text.as_ref()).expect("send");
    }

    /// Sends descriptors with the first of these bytes.
    pub fn send_fds(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let sent = rustix::net::sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
        assert_eq!(sent.expect("send"), bytes.len());
    }

    /// The next response; `None` when the server closed the connection.
    pub fn response(&mut self) -> Option<Got> {
        let head_end = loop {
            if let Some(at) = self.buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            if !self.fill() {
                assert!(self.buffer.is_empty(), "closed in the middle of {:?}", self.buffer);
                return None;
            }
        };
        let head = String::from_utf8(self.buffer.drain(..head_end).collect()).expect("ASCII");
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
        let length = head.split("Content-Length: ").nth(1).map_or(0, |rest| {
            let number = rest.split("\r\n").next().expect("a value");
            number.parse().expect("a length")
        });
        while self.buffer.len() < length {
            assert!(self.fill(), "closed in the middle of a body");
        }
        let body = String::from_utf8(self.buffer.drain(..length).collect()).expect("ASCII");
        Some(Got { status, head, body })
    }

    fn fill(&mut self) -> bool {
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk) {
            Ok(0) => false,
            Ok(n) => {
                self.buffer.extend_from_slice(&chunk[..n]);
                true
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => false,
            Err(error) => panic!("no response: {error}"),
        }
    }

    pub fn get(&mut self, name: &str) -> Got {
        self.send(format!("GET /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
        self.response().expect("a response")
    }

    pub fn put(&mut self, name: &str, body: &str) -> Got {
        self.send(put(name, body));
        self.response().expect("a response")
    }
}

/// A PUT request as text.
pub fn put(name: &str, body: &str) -> String {
    let length = body.len();
    format!("PUT /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}")
}
