//! The routes of the API.

use std::sync::Arc;

use serde::Serialize;

use super::http::{Method, Response, ascii};
use super::{Call, Later, Served, Service, create};
use crate::{Answer, ApiError, Handler, Phase, Reply, Request, VmInfo};

const BASE: &str = "/api/v1/";

/// Where a path leads.
enum Route {
    Ping,
    Info,
    Create,
    Change(Request),
    /// Agents know it, this build does not have it.
    Missing,
}

/// Every route of Cloud Hypervisor's API.
fn route(name: &str) -> Option<(Method, Route)> {
    use Method::{Get, Put};
    Some(match name {
        "vmm.ping" => (Get, Route::Ping),
        "vm.info" => (Get, Route::Info),
        "vm.counters" => (Get, Route::Missing),
        "vm.create" => (Put, Route::Create),
        "vm.delete" => (Put, Route::Change(Request::Delete)),
        "vm.boot" => (Put, Route::Change(Request::Boot)),
        "vm.pause" => (Put, Route::Change(Request::Pause)),
        "vm.resume" => (Put, Route::Change(Request::Resume)),
        "vm.shutdown" => (Put, Route::Change(Request::Shutdown)),
        "vm.reboot" => (Put, Route::Change(Request::Reboot)),
        "vm.power-button" => (Put, Route::Change(Request::PowerButton)),
        "vmm.shutdown" => (Put, Route::Change(Request::VmmShutdown)),
        "vm.nmi"
        | "vm.resize"
        | "vm.resize-disk"
        | "vm.resize-zone"
        | "vm.add-device"
        | "vm.add-disk"
        | "vm.add-fs"
        | "vm.add-generic-vhost-user"
        | "vm.add-net"
        | "vm.add-pmem"
        | "vm.add-vdpa"
        | "vm.add-user-device"
        | "vm.add-vsock"
        | "vm.remove-device"
        | "vm.snapshot"
        | "vm.restore"
        | "vm.coredump"
        | "vm.send-migration"
        | "vm.receive-migration" => (Put, Route::Missing),
        _ => return None,
    })
}

/// What `vmm.ping` says this is.
#[derive(Debug, Clone, Serialize)]
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
    /// The latest state that was asked for, and its JSON text.
    info: Option<(Arc<VmInfo>, Arc<[u8]>)>,
    reader: create::Reader,
}

impl Router {
    /// A router to `handler` that introduces itself as `identity`.
    pub fn new(handler: Arc<dyn Handler>, identity: &Identity) -> Self {
        // Strings and numbers always serialise.
        let ping = ascii(serde_json::to_string(identity).unwrap_or_default());
        Self {
            handler,
            ping,
            info: None,
            reader: create::Reader::default(),
        }
    }

    fn info(&mut self) -> Response {
        let Some(info) = self.handler.info() else {
            self.info = None;
            return match Request::Info.check(Phase::Absent) {
                Err(error) => response(Err(error)),
                Ok(()) => Response::done(),
            };
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

    fn submit(&self, request: Request, call: &Call<'_>, later: Later) {
        let (name, peer) = (request.name(), call.peer);
        let answer = Answer::new(move |result| {
            let response = response(result);
            let status = response.status();
            tracing::info!(uid = peer.uid, pid = peer.pid, request = name, status, "answered");
            later.respond(response);
        });
        self.handler.submit(request, answer);
    }
}

impl Service for Router {
    fn serve(&mut self, call: Call<'_>, later: &dyn Fn() -> Later) -> Served {
        let found = call.path.strip_prefix(BASE).and_then(|name| Some((name, route(name)?)));
        let Some((name, (method, route))) = found else {
            return Served::Now(Response::error(404, &["there is no such path in this API"]));
        };
        if call.method != method {
            let allow = if method == Method::Get { "GET" } else { "PUT" };
            return Served::Now(Response::wrong_method(allow, &format!("{name} is called with {allow}")));
        }
        if !call.fds.is_empty() && !matches!(route, Route::Missing) {
            let error = ApiError::BadRequest(format!("{name} takes no descriptors"));
            return Served::Now(response(Err(error)));
        }
        let request = match route {
            Route::Ping => return Served::Now(Response::json(self.ping.clone())),
            Route::Info => return Served::Now(self.info()),
            Route::Missing => {
                let error = ApiError::Unsupported(format!("{name} is not supported by this version"));
                return Served::Now(response(Err(error)));
            }
            Route::Create => match self.reader.read(call.body) {
                Ok(config) => Request::Create(Box::new(config)),
                Err(error) => return Served::Now(response(Err(error))),
            },
            Route::Change(request) => request,
        };
        self.submit(request, &call, later());
        Served::Later
    }
}

fn response(result: Result<Reply, ApiError>) -> Response {
    let error = match result {
        Ok(Reply::Done) => return Response::done(),
        Ok(Reply::Info(info)) => match to_json(&info) {
            Ok(text) => return Response::json(text),
            Err(error) => error,
        },
        Err(error) => error,
    };
    Response::error(error.status(), &error.messages())
}

/// Fails when a path in it is not UTF-8.
fn to_json(info: &VmInfo) -> Result<Arc<[u8]>, ApiError> {
    match serde_json::to_string(info) {
        Ok(text) => Ok(ascii(text)),
        Err(error) => Err(ApiError::Failed(
            format!("the configuration cannot be shown: {error}").into(),
        )),
    }
}
