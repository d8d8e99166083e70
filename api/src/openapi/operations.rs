//! What each route takes and answers.

use std::collections::BTreeMap;

use schemars::SchemaGenerator;
use serde_json::{Map, Value, json};

use super::{examples, reference};
use crate::server::{Action, Identity, Method, ROUTES, Route};
use crate::{DiskConfig, NetConfig, Operation, Phase, RemoveDevice, Resize, ResizeDisk, VmConfig, VmInfo, VsockConfig};

/// Statuses that every request can meet: it is malformed, too slow, too large, or one too many.
const ALWAYS: [u16; 7] = [400, 408, 413, 417, 431, 501, 503];

/// Media type of bodies.
const JSON: &str = "application/json";

/// Body of `vm.counters`: figures of each device that has some, by its id.
type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// What a route takes and answers.
pub(super) struct Contract {
    /// Schema of the body it needs.
    body: Option<Value>,
    /// Media type and schema of what a success tells; without one it is 204.
    answer: Option<(&'static str, Value)>,
    /// Statuses of failures, ascending.
    failures: Vec<u16>,
    /// Phases that accept it.
    phases: &'static [Phase],
}

impl Contract {
    pub(super) fn of(route: &Route, generator: &mut SchemaGenerator) -> Self {
        let mut contract = Self {
            body: None,
            answer: None,
            failures: ALWAYS.to_vec(),
            phases: &Phase::ALL,
        };
        match route.action {
            Action::Ping => contract.answer = Some((JSON, reference::<Identity>(generator))),
            Action::Metrics => contract.answer = Some((crate::metrics::CONTENT_TYPE, json!({ "type": "string" }))),
            Action::Missing => contract.phases = &[],
            Action::Vm(operation) => {
                contract.body = body(operation, generator);
                contract.phases = operation.phases();
                contract.answer = match operation {
                    Operation::Info => Some((JSON, reference::<VmInfo>(generator))),
                    Operation::Counters => Some((JSON, reference::<Counters>(generator))),
                    _ => None,
                };
                contract.failures.push(500);
                contract.failures.extend(refusals(operation));
            }
        }
        contract.failures.sort_unstable();
        contract.failures.dedup();
        contract
    }

    pub(super) fn path_item(self, route: &Route) -> Value {
        let mut operation = Map::new();
        operation.insert("operationId".into(), id(route.name).into());
        operation.insert("summary".into(), capital(route.summary).into());
        operation.insert("description".into(), self.description(route).into());
        operation.insert("x-phases".into(), self.phases.iter().map(|p| p.name()).collect());
        if let Some(schema) = self.body {
            let body = json!({
                "required": true,
                "content": { JSON: { "schema": schema, "examples": examples::of_body(route.name) } },
            });
            operation.insert("requestBody".into(), body);
        }
        let mut responses = Map::new();
        match self.answer {
            Some((media, schema)) => {
                let examples = examples::of_answer(route.name);
                let content = json!({ media: { "schema": schema, "examples": examples } });
                responses.insert(
                    "200".into(),
                    json!({ "description": "What was asked for.", "content": content }),
                );
            }
            None if route.action == Action::Missing => {}
            None => {
                responses.insert("204".into(), json!({ "description": "Done." }));
            }
        }
        for status in self.failures {
            let name = failure(status).0;
            responses.insert(
                status.to_string(),
                json!({ "$ref": format!("#/components/responses/{name}") }),
            );
        }
        operation.insert("responses".into(), responses.into());
        let method = if route.method == Method::Get { "get" } else { "put" };
        json!({ method: operation })
    }

    fn description(&self, route: &Route) -> String {
        if route.action == Action::Missing {
            return "This version does not have it: it is answered with 501 in every phase.".to_owned();
        }
        let names: Vec<_> = self.phases.iter().map(|phase| phase.name()).collect();
        let phases = match self.phases {
            phases if phases == Phase::ALL => "Accepted in every phase, and without a VM.".to_owned(),
            [Phase::Absent] => "Accepted while there is no VM.".to_owned(),
            _ => format!("Accepted while the VM is {}.", names.join(" or ")),
        };
        match note(route.action) {
            Some(note) => format!("{phases} {note}"),
            None => phases,
        }
    }
}

/// What a client has to know beside phases and schemas.
fn note(action: Action) -> Option<&'static str> {
    let Action::Vm(operation) = action else { return None };
    match operation {
        Operation::Boot => Some("A kernel, an image or an interface that cannot be used is answered with 400."),
        Operation::Resize => Some("A target that is reached already is free in every phase."),
        Operation::AddNet => Some(
            "The descriptors of an open tap interface, one for each pair of queues, come with the bytes of the request (SCM_RIGHTS); \
             `fds` in the body is ignored.",
        ),
        Operation::VmmShutdown => Some("The process ends with exit code 0."),
        _ => None,
    }
}

/// Refusals by phase.
fn refusals(operation: Operation) -> Vec<u16> {
    let mut statuses: Vec<u16> = Phase::ALL
        .into_iter()
        .filter_map(|phase| Some(operation.check(phase).err()?.status()))
        .collect();
    if matches!(operation, Operation::RemoveDevice | Operation::ResizeDisk) {
        statuses.push(404);
    }
    statuses
}

fn body(operation: Operation, generator: &mut SchemaGenerator) -> Option<Value> {
    match operation {
        Operation::Create => Some(reference::<VmConfig>(generator)),
        Operation::Resize => Some(reference::<Resize>(generator)),
        Operation::ResizeDisk => Some(reference::<ResizeDisk>(generator)),
        Operation::AddDisk => Some(reference::<DiskConfig>(generator)),
        Operation::AddNet => Some(reference::<NetConfig>(generator)),
        Operation::AddVsock => Some(reference::<VsockConfig>(generator)),
        Operation::RemoveDevice => Some(reference::<RemoveDevice>(generator)),
        Operation::Info
        | Operation::Counters
        | Operation::Delete
        | Operation::Boot
        | Operation::Pause
        | Operation::Resume
        | Operation::Shutdown
        | Operation::Reboot
        | Operation::PowerButton
        | Operation::Nmi
        | Operation::VmmShutdown => None,
    }
}

/// Name and meaning of a status that is a failure.
fn failure(status: u16) -> (&'static str, &'static str) {
    match status {
        400 => ("BadRequest", "The request is wrong."),
        404 => ("NotFound", "There is no VM, or nothing of that name."),
        408 => ("RequestTimeout", "The request did not arrive in time."),
        409 => ("Conflict", "The VM is not in a phase that accepts it."),
        413 => ("ContentTooLarge", "The body is too large."),
        417 => (
            "ExpectationFailed",
            "The request expects something else than 100-continue.",
        ),
        431 => ("HeaderTooLarge", "The head of the request is too large."),
        501 => ("NotImplemented", "This version does not have what was asked for."),
        503 => ("ServiceUnavailable", "Too many clients are connected."),
        _ => ("InternalServerError", "It was tried and failed."),
    }
}

/// Every failure that some route can have.
pub(super) fn errors(schema: &Value) -> Value {
    let mut statuses = ALWAYS.to_vec();
    statuses.push(500);
    for route in ROUTES {
        if let Action::Vm(operation) = route.action {
            statuses.extend(refusals(operation));
        }
    }
    let response = |status: u16| {
        let (name, description) = failure(status);
        let content = json!({ JSON: { "schema": schema } });
        (
            name.to_owned(),
            json!({ "description": description, "content": content }),
        )
    };
    statuses.into_iter().map(response).collect::<Map<_, _>>().into()
}

/// `vm.add-disk` as a name for functions: `vmAddDisk`.
fn id(name: &str) -> String {
    let mut words = name.split(['.', '-', '/']);
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |id, word| id + &capital(word))
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    let first = letters.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(letters).collect()
}
