//! The routes of the API.

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::http::{Method, Response, ascii};
use super::route::{Action, Route};
use super::{Call, Later, Peer, Served, Service, StreamWaker, body, progress};
use crate::audit::{AuditSink, Audited, NoAudit};
use crate::metrics::{self, Requests, Source};
use crate::{Answer, ApiError, DeviceConfig, Handler, NetConfig, Operation, Phase, Reply, Request, VmConfig, VmInfo};

/// What requests of paths that the API does not have are counted as.
const OTHER: &str = "other";

/// What `vmm.ping` says this is.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(schemars::JsonSchema))]
pub struct Identity {
    /// Version with what tells this build from others of it.
    pub build_version: String,
    /// Version.
    pub version: String,
    /// This process.
    pub pid: u32,
    /// What was compiled in.
    pub features: Vec<String>,
}

/// Speaks the API for a [`Handler`]. Questions are answered at once from what it publishes; everything else waits for it, and only the
/// client that asked waits along.
pub struct Router {
    handler: Arc<dyn Handler>,
    ping: Arc<[u8]>,
    version: String,
    requests: Arc<Requests>,
    /// The latest state that was asked for, and its JSON text.
    info: Option<(Arc<VmInfo>, Arc<[u8]>)>,
    reader: body::Reader,
    audit: Arc<dyn AuditSink>,
}

impl Router {
    /// A router to `handler` that introduces itself as `identity`.
    pub fn new(handler: Arc<dyn Handler>, identity: &Identity) -> Self {
        // Strings and numbers always serialise.
        let ping = ascii(serde_json::to_string(identity).unwrap_or_default());
        Self {
            handler,
            ping,
            version: identity.version.clone(),
            requests: Arc::default(),
            info: None,
            reader: body::Reader::default(),
            audit: Arc::new(NoAudit),
        }
    }

    /// Gives a record of each call that changes something, or tried to, to `audit`.
    pub fn with_audit(self, audit: Arc<dyn AuditSink>) -> Self {
        Self { audit, ..self }
    }

    fn info(&mut self) -> Response {
        let Some(info) = self.handler.info() else {
            self.info = None;
            return response(Operation::Info.check(Phase::Absent).map(|()| Reply::Done));
        };
        if let Some((known, text)) = &self.info
            && Arc::ptr_eq(known, &info)
        {
            return Response::json(text.clone());
        }
        match to_json(&info) {
            Ok(text) => {
                self.info = Some((info, text.clone()));
                Response::json(text)
            }
            Err(error) => response(Err(error)),
        }
    }

    /// Turns a call of `operation` into a request; `None`: it is a question, not a request.
    fn request(&mut self, operation: Operation, call: &mut Call<'_>) -> Result<Option<Request>, ApiError> {
        let name = operation.name();
        if !call.fds.is_empty()
            && !matches!(
                operation,
                Operation::AddNet | Operation::AddDevice | Operation::Restore | Operation::ReceiveMigration
            )
        {
            return Err(ApiError::BadRequest(format!("{name} takes no descriptors")));
        }
        let (reader, body) = (&mut self.reader, call.body);
        Ok(Some(match operation {
            Operation::Info | Operation::Counters => return Ok(None),
            Operation::Create => Request::Create(Box::new(create(reader.read(name, body)?))),
            Operation::Delete => Request::Delete,
            Operation::Boot => Request::Boot,
            Operation::Pause => Request::Pause,
            Operation::Resume => Request::Resume,
            Operation::Shutdown => Request::Shutdown,
            Operation::Reboot => Request::Reboot,
            Operation::PowerButton => Request::PowerButton,
            Operation::Nmi => Request::Nmi,
            Operation::Resize => Request::Resize(reader.read(name, body)?),
            Operation::ResizeZone => Request::ResizeZone(reader.read(name, body)?),
            Operation::ResizeDisk => Request::ResizeDisk(reader.read(name, body)?),
            Operation::AddDisk => Request::AddDisk(reader.read(name, body)?),
            Operation::AddNet => {
                let mut net: Box<NetConfig> = reader.read(name, body)?;
                net.fds = None;
                Request::AddNet(net, std::mem::take(&mut call.fds))
            }
            Operation::AddFs => Request::AddFs(reader.read(name, body)?),
            Operation::AddGenericVhostUser => Request::AddGenericVhostUser(reader.read(name, body)?),
            Operation::AddVsock => Request::AddVsock(reader.read(name, body)?),
            Operation::AddDevice => {
                let mut device: DeviceConfig = reader.read(name, body)?;
                device.fd = None;
                Request::AddDevice(device, std::mem::take(&mut call.fds))
            }
            Operation::RemoveDevice => Request::RemoveDevice(reader.read(name, body)?),
            Operation::Snapshot => Request::Snapshot(reader.read(name, body)?),
            Operation::Restore => Request::Restore(reader.read(name, body)?, std::mem::take(&mut call.fds)),
            Operation::SendMigration => Request::SendMigration(reader.read(name, body)?),
            Operation::ReceiveMigration => {
                Request::ReceiveMigration(reader.read(name, body)?, std::mem::take(&mut call.fds))
            }
            Operation::CheckMigration => Request::CheckMigration(reader.read(name, body)?),
            Operation::SetMigration => Request::SetMigration(reader.read(name, body)?),
            Operation::CancelMigration => Request::CancelMigration,
            Operation::MigrationProgress => Request::MigrationProgress,
            Operation::CpuFeatures => Request::CpuFeatures,
            Operation::VmmShutdown => Request::VmmShutdown,
        }))
    }

    fn phase(&self) -> Phase {
        self.handler.info().map_or(Phase::Absent, |info| info.state)
    }

    fn counters(&self) -> Response {
        if let Err(error) = Operation::Counters.check(self.phase()) {
            return response(Err(error));
        }
        // Strings and numbers always serialise.
        let text = serde_json::to_string(&metrics::counters(&self.handler.metrics())).unwrap_or_default();
        Response::json(ascii(text))
    }

    fn metrics(&self) -> Response {
        let source = Source {
            metrics: &self.handler.metrics(),
            phase: self.phase(),
            version: &self.version,
            requests: &self.requests,
        };
        Response::text(metrics::CONTENT_TYPE, metrics::render(&source))
    }

    /// Turns a call down. One for a change is on record all the same.
    fn refuse(&self, route: &Route, peer: Peer, error: ApiError) -> Response {
        if route.method == Method::Put {
            let text = error.to_string();
            Audited::new(peer, route.name, None).answered(error.status(), Some(&text), &*self.audit);
        }
        response(Err(error))
    }

    fn submit(&self, request: Request, peer: Peer, since: Instant, later: Later) {
        let (name, requests, audit) = (request.name(), self.requests.clone(), self.audit.clone());
        let audited = (!request.is_question()).then(|| Audited::new(peer, name, Some(&request)));
        let answer = Answer::new(move |result| {
            let error = result.as_ref().err().map(ToString::to_string);
            let response = response(result);
            let status = response.status();
            requests.answered(name, status, since.elapsed());
            // It is on record before the client has it.
            if let Some(audited) = audited {
                audited.answered(status, error.as_deref(), &*audit);
            }
            later.respond(response);
        });
        self.handler.submit(request, answer);
    }
}

/// Numbers of descriptors are the client's own and mean nothing here.
fn create(mut config: VmConfig) -> VmConfig {
    for net in config.net.iter_mut().flatten() {
        net.fds = None;
    }
    for device in config.devices.iter_mut().flatten() {
        device.fd = None;
    }
    if let Some(platform) = &mut config.platform {
        platform.iommufd_fd = None;
        platform.container_fd = None;
    }
    config
}

impl Service for Router {
    fn attach(&mut self, waker: StreamWaker) {
        self.handler.events().subscribe(move || waker.wake());
    }

    fn serve(&mut self, call: Call<'_>, later: &dyn Fn() -> Later) -> Served {
        let since = Instant::now();
        let route = Route::find(call.path);
        let served = match route {
            Some((route, id)) => self.follow(route, id, call, since, later),
            None => Served::Now(Response::error(404, "there is no such path in this API")),
        };
        let status = match &served {
            Served::Now(response) => Some(response.status()),
            Served::Stream(_) => Some(200),
            Served::Later => None,
        };
        if let Some(status) = status {
            let name = route.map_or(OTHER, |(route, _)| route.name);
            self.requests.answered(name, status, since.elapsed());
        }
        served
    }
}

impl Router {
    fn follow(
        &mut self,
        route: &Route,
        id: &str,
        mut call: Call<'_>,
        since: Instant,
        later: &dyn Fn() -> Later,
    ) -> Served {
        let name = route.name;
        if call.method != route.method {
            let allow = if route.method == Method::Get { "GET" } else { "PUT" };
            return Served::Now(Response::wrong_method(allow, &format!("{name} is called with {allow}")));
        }
        match route.action {
            Action::Ping => Served::Now(Response::json(self.ping.clone())),
            Action::Metrics => Served::Now(self.metrics()),
            Action::Events => progress::events(self.handler.events(), call.query),
            Action::Jobs => Served::Now(progress::jobs(self.handler.jobs())),
            Action::Job => Served::Now(progress::job(self.handler.jobs(), id)),
            Action::Missing => {
                let error = ApiError::Unsupported(format!("{name} is not supported by this version"));
                Served::Now(self.refuse(route, call.peer, error))
            }
            Action::Vm(operation) => match self.request(operation, &mut call) {
                Ok(Some(request)) => {
                    self.submit(request, call.peer, since, later());
                    Served::Later
                }
                Ok(None) if operation == Operation::Counters => Served::Now(self.counters()),
                Ok(None) => Served::Now(self.info()),
                Err(error) => Served::Now(self.refuse(route, call.peer, error)),
            },
        }
    }
}

fn response(result: Result<Reply, ApiError>) -> Response {
    match result {
        Ok(Reply::Done) => Response::done(),
        // Text and numbers always serialise.
        Ok(Reply::CpuFeatures(features)) => {
            Response::json(ascii(serde_json::to_string(&*features).unwrap_or_default()))
        }
        // Strings always serialise.
        Ok(Reply::MigrationProgress(progress)) => {
            Response::json(ascii(serde_json::to_string(&progress).unwrap_or_default()))
        }
        Ok(Reply::MigrationCheck(check)) => Response::json(ascii(serde_json::to_string(&check).unwrap_or_default())),
        Ok(Reply::Added(device)) => Response::json(ascii(serde_json::to_string(&device).unwrap_or_default())),
        Err(error) => Response::error(error.status(), &error.to_string()),
    }
}

/// Fails when a path in it is not UTF-8.
fn to_json(info: &VmInfo) -> Result<Arc<[u8]>, ApiError> {
    match serde_json::to_string(info) {
        Ok(text) => Ok(ascii(text)),
        Err(error) => Err(ApiError::Failed(format!("the configuration cannot be shown: {error}"))),
    }
}
