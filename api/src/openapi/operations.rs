//! What each route takes and answers.

use std::collections::BTreeMap;

use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::{examples, reference};
use crate::jobs::{Job, Timestamp};
use crate::server::{Action, Identity, Method, ROUTES, Route};
use crate::{
    AddedDevice, CheckMigration, CpuFeatures, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig,
    MigrationCheck, MigrationProgress, NetConfig, Operation, Phase, ReceiveMigration, RemoveDevice, Resize, ResizeDisk,
    ResizeZone, RestoreConfig, SendMigration, SetMigration, SnapshotConfig, VmConfig, VmInfo, VsockConfig,
};

/// Something that happened.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
struct Event {
    /// Rises by one with each event.
    id: u64,
    /// Time since the VMM's start.
    timestamp: Timestamp,
    /// Whose event it is: `vmm`, `vm`, `vcpu`, `virtio-device`, `guest`, `job`.
    source: String,
    /// What happened.
    event: String,
    /// What belongs to it.
    properties: Option<BTreeMap<String, Value>>,
}

/// Statuses that every request can meet: it is malformed, too slow, too large, or one too many.
const ALWAYS: [u16; 7] = [400, 408, 413, 417, 431, 501, 503];

/// Media type of bodies.
const JSON: &str = "application/json";

/// Media type of a stream of events.
const STREAM: &str = "application/x-ndjson";

/// Body of `vm.counters`: figures of each device that has some, by its id.
type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// What a route takes and answers.
pub(super) struct Contract {
    /// Schema of the body it needs.
    body: Option<Value>,
    /// Media types and schemas of what a success tells; without one it is 204.
    answer: Vec<(&'static str, Value)>,
    /// Statuses of failures, ascending.
    failures: Vec<u16>,
    /// A success may have nothing to tell.
    may_say_nothing: bool,
    /// Phases that accept it.
    phases: &'static [Phase],
}

impl Contract {
    pub(super) fn of(route: &Route, generator: &mut SchemaGenerator) -> Self {
        let mut contract = Self {
            body: None,
            answer: Vec::new(),
            failures: ALWAYS.to_vec(),
            may_say_nothing: false,
            phases: &Phase::ALL,
        };
        match route.action {
            Action::Ping => contract.answer = vec![(JSON, reference::<Identity>(generator))],
            Action::Metrics => contract.answer = vec![(crate::metrics::CONTENT_TYPE, json!({ "type": "string" }))],
            Action::Events => {
                let events = reference::<Vec<Event>>(generator);
                contract.answer = vec![(JSON, events), (STREAM, json!({ "type": "string" }))];
            }
            Action::Jobs => contract.answer = vec![(JSON, reference::<Vec<Job>>(generator))],
            Action::Job => {
                contract.answer = vec![(JSON, reference::<Job>(generator))];
                contract.failures.push(404);
            }
            Action::Missing => contract.phases = &[],
            Action::Vm(operation) => {
                contract.body = body(operation, generator);
                contract.phases = operation.phases();
                contract.answer = match operation {
                    Operation::Info => vec![(JSON, reference::<VmInfo>(generator))],
                    Operation::Counters => vec![(JSON, reference::<Counters>(generator))],
                    Operation::CpuFeatures => vec![(JSON, reference::<CpuFeatures>(generator))],
                    Operation::MigrationProgress => vec![(JSON, reference::<MigrationProgress>(generator))],
                    Operation::CheckMigration => vec![(JSON, reference::<MigrationCheck>(generator))],
                    _ if adds(operation) => vec![(JSON, reference::<AddedDevice>(generator))],
                    _ => Vec::new(),
                };
                contract.may_say_nothing = adds(operation);
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
        operation.insert("summary".into(), capital(&without_links(route.summary)).into());
        operation.insert("description".into(), self.description(route).into());
        operation.insert("x-phases".into(), self.phases.iter().map(|p| p.name()).collect());
        let parameters = parameters(route.action);
        if !parameters.is_empty() {
            operation.insert("parameters".into(), parameters.into());
        }
        if let Some(schema) = self.body {
            let body = json!({
                "required": true,
                "content": { JSON: { "schema": schema, "examples": examples::of_body(route.name) } },
            });
            operation.insert("requestBody".into(), body);
        }
        let mut responses = Map::new();
        if !self.answer.is_empty() {
            let examples = examples::of_answer(route.name);
            let mut content = Map::new();
            for (media, schema) in self.answer {
                content.insert(media.into(), json!({ "schema": schema }));
            }
            if let Some(first) = content.values_mut().next() {
                first["examples"] = examples;
            }
            responses.insert(
                "200".into(),
                json!({ "description": "What was asked for.", "content": content }),
            );
        }
        if self.may_say_nothing {
            let description = "Done: there is no guest that runs, the next one has it.";
            responses.insert("204".into(), json!({ "description": description }));
        } else if responses.is_empty() && route.action != Action::Missing {
            responses.insert("204".into(), json!({ "description": "Done." }));
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

/// What stands in a path or behind it.
fn parameters(action: Action) -> Vec<Value> {
    let number = json!({ "type": "integer", "format": "uint64", "minimum": 0, "maximum": u64::MAX });
    match action {
        Action::Job => {
            vec![
                json!({ "name": "id", "in": "path", "required": true, "description": "Number of the job.", "schema": number }),
            ]
        }
        Action::Events => {
            let since = "Number of the last event that the client has; 0 for all that are kept. Without it and with `follow`, the events \
                         from now on.";
            let follow = "Whether the client waits for more.";
            let boolean = json!({ "type": "boolean", "default": true });
            vec![
                json!({ "name": "since", "in": "query", "description": since, "schema": number }),
                json!({ "name": "follow", "in": "query", "description": follow, "schema": boolean, "example": false }),
            ]
        }
        Action::Ping | Action::Metrics | Action::Jobs | Action::Vm(_) | Action::Missing => Vec::new(),
    }
}

/// The text without references into the documentation it was written for, which stand in parentheses.
fn without_links(text: &str) -> String {
    text.split(" ([").next().unwrap_or_default().to_owned()
}

/// What a client has to know beside phases and schemas.
fn note(action: Action) -> Option<&'static str> {
    let operation = match action {
        Action::Events => {
            return Some(
                "Unless `follow` is false this is a stream: one event a line, as they happen, without a Content-Length, until the client \
                 closes the connection. A number in `since` that no event has yet is answered with 400.",
            );
        }
        Action::Vm(operation) => operation,
        _ => return None,
    };
    match operation {
        Operation::Boot => Some("A kernel, an image or an interface that cannot be used is answered with 400."),
        Operation::Resize => Some("A target that is reached already is free in every phase."),
        Operation::ResizeZone => {
            Some("A target that is reached already is free. A job tells what the guest does about it.")
        }
        Operation::AddNet => Some(
            "The descriptors of an open tap interface, one for each pair of queues, come with the bytes of the request (SCM_RIGHTS); \
             `fds` in the body is ignored.",
        ),
        Operation::AddDevice => Some(
            "A guest that runs has the device at once and is told of it; one that is paused is told when it goes on. Instead of `path` the \
             descriptor of its file, or of its group's, comes with the bytes of the request (SCM_RIGHTS), and with it that of /dev/iommu or \
             /dev/vfio/vfio if the VM has none yet; `fd` in the body is ignored.",
        ),
        Operation::AddDisk | Operation::AddFs | Operation::AddGenericVhostUser | Operation::AddVsock => Some(
            "A guest that runs has the device at once and is told of it; one that is paused is told when it goes on.",
        ),
        Operation::RemoveDevice => Some(
            "A guest that runs is asked for the device, and a job tells what comes of it; until the guest answers, asking once more is \
             answered with 429, and `force` takes the device.",
        ),
        Operation::Snapshot => {
            Some("A directory that already holds a snapshot is answered with 400. If it fails nothing is left there.")
        }
        Operation::Restore => Some(
            "The guest is as it was saved, and paused until `vm.resume` unless `resume` says otherwise. `config.json` of the snapshot may \
             have been edited before: paths, sockets and taps. Descriptors of taps come with the bytes of the request (SCM_RIGHTS), in the \
             order of `net_fds`.",
        ),
        Operation::SendMigration => Some(
            "It is answered when it is over: with 204 when the guest runs at the destination, and this VMM has none any more. After a \
             failure the guest runs here, unless the error says otherwise.",
        ),
        Operation::ReceiveMigration => Some(
            "It is answered when the guest runs here. It waits for as long as it takes, until `vm.cancel-migration`. Descriptors of taps \
             come with the bytes of the request (SCM_RIGHTS), in the order of `net_fds`.",
        ),
        Operation::CheckMigration => Some(
            "The other VMM goes on waiting, and the guest notices nothing. An empty list does not reserve anything: what is there now may \
             be gone when the VM is moved.",
        ),
        Operation::SetMigration => {
            Some("Without a migration, or one for which it is too early or too late, it is answered with 409.")
        }
        Operation::CancelMigration => Some(
            "Without a migration, or once the guest was given away, it is answered with 409. The guest goes on at the source soon after. At the \
             source, in `post-copy-paused`, it gives the guest up, whose memory there is thrown away.",
        ),
        Operation::MigrationProgress => Some("Where nobody asked for a migration yet it is answered with 404."),
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
    if matches!(
        operation,
        Operation::RemoveDevice | Operation::ResizeDisk | Operation::ResizeZone | Operation::MigrationProgress
    ) {
        statuses.push(404);
    }
    // Where a migration is under way, or there is none.
    statuses.push(409);
    if matches!(operation, Operation::Resize | Operation::RemoveDevice) {
        statuses.push(429);
    }
    statuses
}

/// Whether it adds a device: told where, when the guest runs, and otherwise done.
fn adds(operation: Operation) -> bool {
    use Operation::{AddDevice, AddDisk, AddFs, AddGenericVhostUser, AddNet, AddVsock};
    matches!(
        operation,
        AddDisk | AddNet | AddFs | AddGenericVhostUser | AddVsock | AddDevice
    )
}

fn body(operation: Operation, generator: &mut SchemaGenerator) -> Option<Value> {
    match operation {
        Operation::Create => Some(reference::<VmConfig>(generator)),
        Operation::Resize => Some(reference::<Resize>(generator)),
        Operation::ResizeZone => Some(reference::<ResizeZone>(generator)),
        Operation::ResizeDisk => Some(reference::<ResizeDisk>(generator)),
        Operation::AddDisk => Some(reference::<DiskConfig>(generator)),
        Operation::AddNet => Some(reference::<NetConfig>(generator)),
        Operation::AddFs => Some(reference::<FsConfig>(generator)),
        Operation::AddGenericVhostUser => Some(reference::<GenericVhostUserConfig>(generator)),
        Operation::AddVsock => Some(reference::<VsockConfig>(generator)),
        Operation::AddDevice => Some(reference::<DeviceConfig>(generator)),
        Operation::RemoveDevice => Some(reference::<RemoveDevice>(generator)),
        Operation::Snapshot => Some(reference::<SnapshotConfig>(generator)),
        Operation::Restore => Some(reference::<RestoreConfig>(generator)),
        Operation::SendMigration => Some(reference::<SendMigration>(generator)),
        Operation::ReceiveMigration => Some(reference::<ReceiveMigration>(generator)),
        Operation::CheckMigration => Some(reference::<CheckMigration>(generator)),
        Operation::SetMigration => Some(reference::<SetMigration>(generator)),
        Operation::CancelMigration
        | Operation::MigrationProgress
        | Operation::Info
        | Operation::Counters
        | Operation::Delete
        | Operation::Boot
        | Operation::Pause
        | Operation::Resume
        | Operation::Shutdown
        | Operation::Reboot
        | Operation::PowerButton
        | Operation::Nmi
        | Operation::CpuFeatures
        | Operation::VmmShutdown => None,
    }
}

/// Name and meaning of a status that is a failure.
fn failure(status: u16) -> (&'static str, &'static str) {
    match status {
        400 => ("BadRequest", "The request is wrong."),
        404 => ("NotFound", "There is no VM, or nothing of that name."),
        408 => ("RequestTimeout", "The request did not arrive in time."),
        409 => (
            "Conflict",
            "The VM is not in a phase that accepts it, or is being moved.",
        ),
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
    let mut words = name.split(['.', '-', '/', '{', '}']);
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |id, word| id + &capital(word))
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    let first = letters.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(letters).collect()
}
