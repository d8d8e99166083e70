//! The control socket: JSON over HTTP, and figures for Prometheus.
//!
//! The thread that speaks HTTP waits for nothing; the one here, the steward, does what is asked, one call after the other.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use triarch_api::MacAddress;
use triarch_api::chain;
use triarch_api::server::{Call, Later, Method, Response, Served, Service};
use triarch_device_core::{Sandbox, ThreadClass};

use crate::metrics;
use crate::options::{KEYS, PortOptions, Settings};
use crate::plane::{PortError, PortState};
use crate::registry::{Described, Opened, Registry, RegistryError};
use crate::switch::Drop;

/// Where the API is.
const BASE: &str = "/api/v1/";

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Ping,
    Ports,
    Table,
    Metrics,
    Add,
    Remove,
    Set,
    Announce,
}

impl Action {
    fn find(path: &str) -> Option<(Self, Method)> {
        if path == "/metrics" {
            return Some((Self::Metrics, Method::Get));
        }
        Some(match path.strip_prefix(BASE)? {
            "ping" => (Self::Ping, Method::Get),
            "ports" => (Self::Ports, Method::Get),
            "table" => (Self::Table, Method::Get),
            "metrics" => (Self::Metrics, Method::Get),
            "ports.add" => (Self::Add, Method::Put),
            "ports.remove" => (Self::Remove, Method::Put),
            "ports.set" => (Self::Set, Method::Put),
            "ports.announce" => (Self::Announce, Method::Put),
            _ => return None,
        })
    }
}

/// A call for the steward.
enum Order {
    Call {
        action: Action,
        body: Vec<u8>,
        fds: Vec<OwnedFd>,
        later: Later,
    },
    End,
}

/// Takes calls and gives them to the steward.
pub struct ControlService {
    orders: Sender<Order>,
}

impl Service for ControlService {
    fn serve(&mut self, call: Call<'_>, later: &dyn Fn() -> Later) -> Served {
        let Some((action, method)) = Action::find(call.path) else {
            return Served::Now(Response::error(404, "there is no such path"));
        };
        if call.method != method {
            let allow = if method == Method::Get { "GET" } else { "PUT" };
            let message = format!("{} is called with {allow}", call.path);
            return Served::Now(Response::wrong_method(allow, &message));
        }
        let order = Order::Call {
            action,
            body: call.body.to_vec(),
            fds: call.fds,
            later: later(),
        };
        // If the steward is gone, what was taken says so when it is dropped.
        let _ = self.orders.send(order);
        Served::Later
    }
}

/// The thread that owns the ports. Dropped, it ends, and the ports with it.
pub struct Steward {
    orders: Sender<Order>,
    thread: Option<JoinHandle<()>>,
}

impl Steward {
    /// Gives `registry` to a thread of its own.
    pub fn start(mut registry: Registry, sandbox: &Arc<dyn Sandbox>) -> io::Result<Self> {
        let (orders, inbox) = channel();
        let confine = sandbox.clone();
        let body = move || {
            if let Err(error) = confine.enter(ThreadClass::Control) {
                tracing::error!("cannot confine a thread: {error}");
                std::process::abort();
            }
            work(&mut registry, &inbox);
        };
        let thread = Some(sandbox.spawn("steward".to_owned(), Box::new(body))?);
        Ok(Self { orders, thread })
    }

    /// What gives it calls.
    pub fn service(&self) -> ControlService {
        ControlService {
            orders: self.orders.clone(),
        }
    }
}

impl std::ops::Drop for Steward {
    fn drop(&mut self) {
        let _ = self.orders.send(Order::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn work(registry: &mut Registry, inbox: &Receiver<Order>) {
    for order in inbox {
        match order {
            Order::End => return,
            Order::Call {
                action,
                body,
                fds,
                later,
            } => later.respond(answer(registry, action, &body, fds)),
        }
    }
}

fn answer(registry: &mut Registry, action: Action, body: &[u8], fds: Vec<OwnedFd>) -> Response {
    let done = match action {
        Action::Ping => {
            let version = env!("CARGO_PKG_VERSION");
            return document(&json!({ "name": "triarch-netd", "version": version, "pid": std::process::id() }));
        }
        Action::Ports => registry.describe().map_err(RegistryError::from).map(|ports| {
            let ports: Vec<_> = ports.iter().map(port).collect();
            Some(document(&json!({ "ports": ports })))
        }),
        Action::Table => registry
            .plane()
            .call(|plane| plane.table())
            .map_err(RegistryError::from)
            .map(|table| {
                let stations: Vec<_> = table
                    .into_iter()
                    .map(|(known, port)| {
                        let mac = MacAddress(known.mac).to_string();
                        let age = known.age.map(|age| age as f64 / 1e9);
                        json!({ "vlan": known.vlan, "mac": mac, "port": port, "age": age })
                    })
                    .collect();
                Some(document(&json!({ "table": stations })))
            }),
        Action::Metrics => figures(registry).map(Some),
        Action::Add => read::<PortOptions>(body, KEYS)
            .and_then(|options| add(registry, options, fds))
            .map(|()| None),
        Action::Remove => read::<Named>(body, &["name"])
            .and_then(|named| registry.remove(&named.name))
            .map(|()| None),
        Action::Set => read::<Change>(body, KEYS)
            .and_then(|change| registry.set(&change.name, change.settings))
            .map(|()| None),
        Action::Announce => read::<Named>(body, &["name"])
            .and_then(|named| announce(registry, named.name))
            .map(|()| None),
    };
    match done {
        Ok(Some(response)) => response,
        Ok(None) => Response::done(),
        Err(RegistryError::Missing(name)) => Response::error(404, &format!("there is no port {name}")),
        Err(error) => Response::error(if error.is_request() { 400 } else { 500 }, &chain(&error)),
    }
}

fn add(registry: &mut Registry, options: PortOptions, fds: Vec<OwnedFd>) -> Result<(), RegistryError> {
    // Before its socket takes the place of the one that is served.
    if registry.has(&options.name) {
        return Err(PortError::NameTaken(options.name).into());
    }
    registry.add(Opened::open(options, fds)?)
}

fn announce(registry: &mut Registry, name: String) -> Result<(), RegistryError> {
    let missing = name.clone();
    let announced = registry
        .plane()
        .call(move |plane| plane.find(&name).map(|key| plane.announce(key, None)))?;
    match announced {
        None => Err(RegistryError::Missing(missing)),
        Some(true) => Ok(()),
        Some(false) => Err(RegistryError::Options(format!(
            "the address of port {missing} is not known here; set its mac"
        ))),
    }
}

fn figures(registry: &Registry) -> Result<Response, RegistryError> {
    let ports = registry.describe()?;
    let macs = registry.plane().call(|plane| plane.table().len())?;
    Ok(Response::text(metrics::CONTENT_TYPE, metrics::render(&ports, macs)))
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

#[derive(Deserialize)]
struct Change {
    name: String,
    #[serde(flatten)]
    settings: Settings,
}

/// Reads an object that has no other keys than `known`.
fn read<T: for<'a> Deserialize<'a>>(body: &[u8], known: &[&str]) -> Result<T, RegistryError> {
    let wrong = |error: serde_json::Error| RegistryError::Options(format!("the body is not what this takes: {error}"));
    let object: Map<String, Value> = serde_json::from_slice(body).map_err(wrong)?;
    if let Some(key) = object.keys().find(|key| !known.contains(&key.as_str())) {
        let known = known.join(", ");
        return Err(RegistryError::Options(format!(
            "there is no key '{key}'; there are {known}"
        )));
    }
    T::deserialize(Value::Object(object)).map_err(wrong)
}

fn document(value: &Value) -> Response {
    Response::json(value.to_string().into_bytes().into())
}

fn port(port: &Described) -> Value {
    let (info, counters) = (&port.info, &port.info.counters);
    let drops: Map<String, Value> = Drop::ALL
        .into_iter()
        .filter(|reason| counters.drops(*reason) > 0)
        .map(|reason| (reason.name().to_owned(), counters.drops(reason).into()))
        .collect();
    let (state, guest) = match info.state {
        PortState::Down => ("down", Value::Null),
        PortState::Host => ("host", Value::Null),
        PortState::Guest {
            features,
            running: (rx, tx),
            broken,
        } => {
            let features = format!("{features:#x}");
            let guest = json!({ "features": features, "rx_queues": rx, "tx_queues": tx, "broken_queues": broken });
            ("guest", guest)
        }
    };
    json!({
        "name": info.name,
        "state": state,
        "guest": guest,
        "host": info.label,
        "options": port.options,
        "connections": port.connections.0,
        "broken_connections": port.connections.1,
        "tx_packets": counters.tx_packets,
        "tx_bytes": counters.tx_bytes,
        "rx_packets": counters.rx_packets,
        "rx_bytes": counters.rx_bytes,
        "drops": drops,
    })
}
