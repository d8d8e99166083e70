//! The control socket: what can be asked and changed while the daemon runs.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use triarch_api::chain;
use triarch_api::metrics::CONTENT_TYPE;
use triarch_api::server::{Call, Later, Method, Response, Served, Service};

use crate::metrics;
use crate::{Daemon, Export, ExportOptions, LimitOptions, hand_over};

const BASE: &str = "/api/v1/";

/// Why the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It was told to, by a signal or on the control socket.
    Told,
    /// Another process goes on in its place.
    HandedOver,
}

/// What takes longer than an answer may, and is done by a thread of its own.
pub struct Order {
    work: Work,
    later: Later,
}

enum Work {
    Add(Box<ExportOptions>),
    Remove(String),
    Resize(ResizeExport),
    Limit(LimitExport),
    HandOver(OwnedFd),
    ShutDown,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NamedExport {
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResizeExport {
    name: String,
    /// Bytes; without it, what the file has now.
    size: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitExport {
    name: String,
    /// Without it, there are none any more.
    #[serde(default)]
    limits: LimitOptions,
}

#[derive(Serialize)]
struct Info {
    version: &'static str,
    pid: u32,
    exports: Vec<ExportInfo>,
}

#[derive(Serialize)]
struct ExportInfo {
    #[serde(flatten)]
    options: ExportOptions,
    /// Bytes.
    size: u64,
    connected: bool,
    connections: u64,
    refused: u64,
    broken: u64,
    resubmitted: u64,
    held_back: u64,
    in_flight: u64,
    errors: u64,
}

fn info(export: &Export) -> ExportInfo {
    let (disk, counters) = (export.handle().disk(), export.counters());
    let done = export.handle().counters();
    let get = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    ExportInfo {
        options: export.options(),
        size: disk.size(),
        connected: export.connected(),
        connections: get(&counters.connections),
        refused: get(&counters.refused),
        broken: get(&counters.broken),
        resubmitted: get(&counters.resubmitted),
        held_back: disk.held_back(),
        in_flight: done.in_flight,
        errors: done.errors,
    }
}

/// Answers on the control socket.
pub struct ControlService {
    daemon: Arc<Daemon>,
    orders: Sender<Order>,
}

impl ControlService {
    /// A service for `daemon`, whose longer work goes to `orders`.
    pub fn new(daemon: Arc<Daemon>, orders: Sender<Order>) -> Self {
        Self { daemon, orders }
    }

    fn order(&self, work: Result<Work, Response>, later: &dyn Fn() -> Later) -> Served {
        match work {
            Ok(work) => {
                // Should nobody take it any more, the later says so.
                let _ = self.orders.send(Order { work, later: later() });
                Served::Later
            }
            Err(response) => Served::Now(response),
        }
    }

    fn info(&self) -> Response {
        let info = Info {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            exports: self.daemon.exports().iter().map(|export| info(export)).collect(),
        };
        match serde_json::to_vec(&info) {
            Ok(text) => Response::json(text.into()),
            Err(error) => Response::error(500, &error.to_string()),
        }
    }
}

fn body<T: DeserializeOwned>(call: &Call<'_>) -> Result<T, Response> {
    serde_json::from_slice(call.body)
        .map_err(|error| Response::error(400, &format!("the body is no such object: {error}")))
}

impl Service for ControlService {
    fn serve(&mut self, mut call: Call<'_>, later: &dyn Fn() -> Later) -> Served {
        if call.path == "/metrics" {
            return Served::Now(Response::text(CONTENT_TYPE, metrics::render(&self.daemon.exports())));
        }
        let route = call.path.strip_prefix(BASE).unwrap_or_default();
        let wanted = match route {
            "blkd.info" | "metrics" => Method::Get,
            _ => Method::Put,
        };
        let known = [
            "blkd.info",
            "metrics",
            "export.add",
            "export.remove",
            "export.resize",
            "export.limit",
            "blkd.hand-over",
            "blkd.shutdown",
        ];
        if !known.contains(&route) {
            let text = format!("there is no {}; there are {BASE}{{{}}}", call.path, known.join(","));
            return Served::Now(Response::error(404, &text));
        }
        if call.method != wanted {
            let allow = if wanted == Method::Get { "GET" } else { "PUT" };
            return Served::Now(Response::wrong_method(allow, &format!("{route} takes {allow}")));
        }
        match route {
            "blkd.info" => Served::Now(self.info()),
            "metrics" => Served::Now(Response::text(CONTENT_TYPE, metrics::render(&self.daemon.exports()))),
            "export.add" => self.order(body(&call).map(|options| Work::Add(Box::new(options))), later),
            "export.remove" => self.order(body(&call).map(|NamedExport { name }| Work::Remove(name)), later),
            "export.resize" => self.order(body(&call).map(Work::Resize), later),
            "export.limit" => self.order(body(&call).map(Work::Limit), later),
            "blkd.hand-over" => match (call.fds.pop(), call.fds.is_empty()) {
                (Some(fd), true) => self.order(Ok(Work::HandOver(fd)), later),
                _ => Served::Now(Response::error(
                    400,
                    "it needs one descriptor: a socket for what is handed over",
                )),
            },
            _ => self.order(Ok(Work::ShutDown), later),
        }
    }
}

fn refused(error: &dyn std::error::Error) -> Response {
    Response::error(400, &chain(error))
}

fn missing(name: &str) -> Response {
    Response::error(404, &format!("there is no export called {name}"))
}

/// Carries out orders, one after the other, until nobody can give any. What ends the process goes to `end`.
pub fn obey(daemon: &Daemon, orders: Receiver<Order>, end: &Sender<End>) {
    for Order { work, later } in orders {
        let (response, ended) = match work {
            Work::HandOver(socket) => match hand_over::give(daemon, socket) {
                Ok(()) => (Response::done(), Some(End::HandedOver)),
                Err(error) => {
                    tracing::error!("cannot hand over, going on: {}", chain(&error));
                    (Response::error(500, &chain(&error)), None)
                }
            },
            Work::ShutDown => (Response::done(), Some(End::Told)),
            work => (carry_out(daemon, work), None),
        };
        later.respond(response);
        if let Some(ended) = ended {
            // The main thread waits for it.
            let _ = end.send(ended);
        }
    }
}

fn carry_out(daemon: &Daemon, work: Work) -> Response {
    match work {
        Work::Add(options) => match options.check() {
            Ok(()) => match daemon.add(*options) {
                Ok(()) => Response::done(),
                Err(error) => refused(&error),
            },
            Err(error) => refused(&error),
        },
        Work::Remove(name) => match daemon.remove(&name) {
            Some(export) => {
                export.wait();
                Response::done()
            }
            None => missing(&name),
        },
        Work::Resize(ResizeExport { name, size }) => {
            let Some(export) = daemon.export(&name) else {
                return missing(&name);
            };
            let done = match size {
                Some(size) => export.handle().resize(size).map_err(|error| chain(&error)),
                None => export.handle().refresh_size().map(drop).map_err(|error| chain(&error)),
            };
            done.map_or_else(|text| Response::error(400, &text), |()| Response::done())
        }
        Work::Limit(LimitExport { name, limits }) => match daemon.export(&name) {
            Some(export) => match export.set_limits(limits) {
                Ok(()) => Response::done(),
                Err(error) => refused(&error),
            },
            None => missing(&name),
        },
        Work::HandOver(_) | Work::ShutDown => Response::done(),
    }
}
