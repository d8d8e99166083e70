//! What each command does.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Read};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use triarch_api::flags::{self, FlagError};
use triarch_api::jobs::{Job, JobState};
use triarch_api::server::Method;
use triarch_api::{
    CheckMigration, MigrationCheck, Operation, ReceiveMigration, RemoveDevice, Resize, ResizeDisk, ResizeZone,
    RestoreConfig, SendMigration, SetMigration, SnapshotConfig, TimeoutStrategy,
};
use triarch_client::{Client, Response};

use crate::cli::{self, AddDevice, AddNet, Cli, Command, Global};
use crate::output::{Failure, print};
use crate::{cpu, documents, follow, inherit, jobs, progress, show, top};

/// What may be read from standard input or a file: more than a VMM takes.
const MAX_INPUT: u64 = 16 << 20;
/// The environment's variable that names the socket.
const SOCKET: &str = "TRIARCH_API_SOCKET";

/// Carries out one command.
pub(crate) fn run(cli: Cli) -> Result<(), Failure> {
    let Cli { global, command } = cli;
    match command {
        Command::Completion { shell } => return documents::completion(shell),
        Command::Man { directory } => return documents::manual(directory.as_deref()),
        _ => {}
    }
    let mut session = Session::new(&global)?;
    if let Some(operation) = command.operation() {
        return session.put(operation, None, &[]);
    }
    match command {
        Command::Ping => session.show("vmm.ping", show::ping),
        Command::Info => session.show("vm.info", show::info),
        Command::Counters => session.show("vm.counters", show::counters),
        Command::CpuFeatures => session.show("vmm.cpu-features", cpu::features),
        Command::Create { file } => {
            let config = read(&file)?;
            session.put(Operation::Create, Some(config), &[])
        }
        Command::Resize(target) => session.resize(&target),
        Command::ResizeZone { id, size, wait } => {
            let desired_ram = size;
            session.put_and_follow(Operation::ResizeZone, &ResizeZone { id, desired_ram }, wait)
        }
        Command::ResizeDisk { id, size } => {
            let desired_size = size;
            session.put_json(Operation::ResizeDisk, &ResizeDisk { id, desired_size })
        }
        Command::AddDisk { disk } => session.put_json(Operation::AddDisk, &value("add-disk", flags::disk(&disk))?),
        Command::AddNet(net) => session.add_net(net),
        Command::AddFs { fs } => session.put_json(Operation::AddFs, &value("add-fs", flags::fs(&fs))?),
        Command::AddGenericVhostUser { device } => {
            let device = value("add-generic-vhost-user", flags::generic_vhost_user(&device))?;
            session.put_json(Operation::AddGenericVhostUser, &device)
        }
        Command::AddDevice(arguments) => session.add_device(arguments),
        Command::AddVsock { vsock } => {
            session.put_json(Operation::AddVsock, &value("add-vsock", flags::vsock(&vsock))?)
        }
        Command::RemoveDevice { id, force, wait } => {
            let body = RemoveDevice { id, force };
            session.put_and_follow(Operation::RemoveDevice, &body, wait)
        }
        Command::Snapshot {
            directory,
            base,
            track_writes,
        } => {
            let body = SnapshotConfig {
                destination_url: url(&directory)?,
                base: base.as_deref().map(url).transpose()?,
                track_writes,
            };
            session.put_json(Operation::Snapshot, &body)
        }
        Command::Restore {
            directory,
            memory,
            resume,
            clock,
            track_writes,
        } => {
            let body = RestoreConfig {
                source_url: url(&directory)?,
                memory_restore_mode: memory,
                resume,
                clock,
                track_writes,
                ..RestoreConfig::default()
            };
            session.put_json(Operation::Restore, &body)
        }
        Command::SendMigration(arguments) => session.send_migration(arguments),
        Command::ReceiveMigration { from, tls, config } => {
            let body = ReceiveMigration {
                receiver_url: from,
                tls: tls.into_request()?,
                config: config.as_deref().map(overlay).transpose()?.unwrap_or_default(),
                net_fds: None,
            };
            session.patient();
            session.put_json(Operation::ReceiveMigration, &body)
        }
        Command::CheckMigration {
            to,
            tls,
            local,
            post_copy,
        } => {
            let tls = tls.into_request()?;
            session.check_migration(&CheckMigration {
                destination_url: to,
                tls,
                local,
                post_copy,
            })
        }
        Command::SetMigration {
            bandwidth,
            post_copy,
            recover,
        } => {
            let body = SetMigration {
                bandwidth,
                post_copy,
                recover,
            };
            session.put_json(Operation::SetMigration, &body)
        }
        Command::MigrationProgress => session.show("vm.migration-progress", show::migration),
        Command::Jobs { id, watch } => jobs::run(&mut session.client, id, watch, session.json),
        Command::Events(events) => follow::run(&mut session.client, &events, session.json),
        Command::Metrics => print(&session.client.get("/metrics")?),
        Command::Top(arguments) => top::run(&session.client, &arguments),
        Command::Raw { method, route, body } => session.raw(method, &route, body),
        // All others need no more than their name, and are done.
        _ => Ok(()),
    }
}

/// A directory of this host, as the API names it: one that is not absolute is below ours.
fn url(directory: &Path) -> Result<String, Failure> {
    let path = std::path::absolute(directory)?;
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(byte);
    let letter = |byte: u8| match plain(&byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    let path: String = path
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .copied()
        .map(letter)
        .collect();
    Ok(format!("file://{path}"))
}

/// A client, and how its answers are shown.
struct Session {
    client: Client,
    json: bool,
}

impl Session {
    fn new(global: &Global) -> Result<Self, Failure> {
        let given = global.api_socket.clone().map(OsString::from);
        let socket = given
            .or_else(|| std::env::var_os(SOCKET))
            .filter(|path| !path.is_empty());
        let Some(socket) = socket else {
            let problem = "which VMM? give its socket with --api-socket PATH, or set TRIARCH_API_SOCKET";
            return Err(Failure::Usage(problem.to_owned()));
        };
        let limit = Duration::from_secs(global.timeout.into());
        Ok(Self {
            client: Client::new(socket).limit(limit),
            json: global.json,
        })
    }

    /// Gets `target` and shows its body.
    fn show(&mut self, target: &str, table: fn(&str) -> serde_json::Result<String>) -> Result<(), Failure> {
        let body = self.client.get(target)?;
        if self.json {
            return print(&body);
        }
        let text = table(&body).map_err(|source| triarch_client::Error::Body {
            target: target.to_owned(),
            source,
        })?;
        print(&text)
    }

    fn put_json(&mut self, operation: Operation, body: &impl Serialize) -> Result<(), Failure> {
        let body = json(operation, body)?;
        self.put(operation, Some(body), &[])
    }

    /// Asks for `operation` and shows what it answers, if anything.
    fn put(&mut self, operation: Operation, body: Option<String>, fds: &[BorrowedFd<'_>]) -> Result<(), Failure> {
        let request = progress::Request {
            method: Method::Put,
            target: operation.name(),
            body: body.as_deref(),
            fds,
        };
        let response = progress::perform(&mut self.client, request)?;
        self.answer(response)
    }

    /// A migration takes as long as it takes; the VMM itself gives up in time.
    fn patient(&mut self) {
        self.client = self.client.another().limit(Duration::ZERO);
    }

    fn send_migration(&mut self, arguments: cli::SendMigration) -> Result<(), Failure> {
        let body = SendMigration {
            destination_url: arguments.to,
            downtime_ms: arguments.downtime,
            timeout_s: arguments.time,
            timeout_strategy: match (arguments.force, arguments.post_copy_then) {
                (true, _) => TimeoutStrategy::Ignore,
                (false, true) => TimeoutStrategy::PostCopy,
                (false, false) => TimeoutStrategy::Cancel,
            },
            connections: arguments.connections,
            bandwidth: arguments.bandwidth,
            throttle: arguments.throttle,
            compress: arguments.compress,
            post_copy: arguments.post_copy,
            recover_s: arguments.recover,
            tls: arguments.tls.into_request()?,
            local: arguments.local,
        };
        self.patient();
        self.put_json(Operation::SendMigration, &body)
    }

    /// Shows what is in the way; if anything is, the command fails.
    fn check_migration(&mut self, body: &CheckMigration) -> Result<(), Failure> {
        self.patient();
        let body = self.client.check_migration(body)?.body;
        let check: MigrationCheck = serde_json::from_str(&body).map_err(|source| triarch_client::Error::Body {
            target: Operation::CheckMigration.name().to_owned(),
            source,
        })?;
        match self.json {
            true => print(&body)?,
            false => print(&show::check(&check))?,
        }
        match check.blockers.len() {
            0 => Ok(()),
            1 => Err(Failure::Failed("the VM cannot be moved there".to_owned())),
            many => Err(Failure::Failed(format!(
                "the VM cannot be moved there, for {many} reasons"
            ))),
        }
    }

    /// What a guest that runs has to do itself is a job, which is shown.
    fn resize(&mut self, target: &cli::Resize) -> Result<(), Failure> {
        let body = Resize {
            desired_vcpus: target.cpus,
            desired_ram: target.memory,
            desired_balloon: target.balloon,
        };
        self.put_and_follow(Operation::Resize, &body, target.wait)
    }

    /// Asks for `operation` and shows the jobs that it leads to; with `wait`, until they have ended.
    fn put_and_follow(&mut self, operation: Operation, body: &impl Serialize, wait: bool) -> Result<(), Failure> {
        let before = jobs::of(&mut self.client, operation);
        self.put_json(operation, body)?;
        let after = jobs::of(&mut self.client, operation);
        let is_new = |job: &&Job| before.iter().all(|before| before.id != job.id);
        // vCPUs, memory or each of its zones, and the balloon have one each. A target that was asked for before has the same job still; another device's
        // removal is of no interest.
        let sizes = matches!(operation, Operation::Resize | Operation::ResizeZone);
        let same = |job: &&Job| sizes && job.state == JobState::Running;
        let shown = after.iter().filter(|job| is_new(job) || same(job));
        let show = |job: &Job| match wait {
            true => jobs::run(&mut self.client, Some(job.id), true, self.json),
            false => jobs::show(job, self.json),
        };
        shown.map(show).fold(Ok(()), Result::and)
    }

    fn answer(&self, response: Response) -> Result<(), Failure> {
        let body = response.success()?.body;
        if self.json {
            return print(&body);
        }
        print(&show::added(&body))
    }

    fn add_net(&mut self, arguments: AddNet) -> Result<(), Failure> {
        let AddNet { net, mut fds } = arguments;
        let mut net = if net.is_empty() {
            triarch_api::NetConfig::default()
        } else {
            value("add-net", flags::net(&net))?
        };
        if let Some(more) = net.fds.take() {
            fds.extend(more);
        }
        let queues = fds.len().checked_mul(2).and_then(|count| u16::try_from(count).ok());
        if let Some(queues) = queues.filter(|count| *count > 0) {
            net.num_queues = queues;
        }
        let fds = inherit::descriptors("add-net", &fds).map_err(Failure::Usage)?;
        let body = json(Operation::AddNet, &net)?;
        self.put(Operation::AddNet, Some(body), &fds)
    }

    fn add_device(&mut self, arguments: AddDevice) -> Result<(), Failure> {
        let AddDevice { device, mut fds } = arguments;
        let mut device = match device.is_empty() {
            true => triarch_api::DeviceConfig::default(),
            false => value("add-device", flags::handed_device(&device))?,
        };
        if let Some(first) = device.fd.take() {
            fds.insert(0, first);
        }
        let fds = inherit::descriptors("add-device", &fds).map_err(Failure::Usage)?;
        let body = json(Operation::AddDevice, &device)?;
        self.put(Operation::AddDevice, Some(body), &fds)
    }

    fn raw(&mut self, method: cli::Method, route: &str, body: Option<String>) -> Result<(), Failure> {
        let body = match body.as_deref() {
            Some("-") => Some(read(Path::new("-"))?),
            _ => body,
        };
        let method = match method {
            cli::Method::Get => Method::Get,
            cli::Method::Put => Method::Put,
        };
        let request = progress::Request {
            method,
            target: route,
            body: body.as_deref(),
            fds: &[],
        };
        let response = progress::perform(&mut self.client, request)?;
        print(&response.success()?.body)
    }
}

fn json(operation: Operation, body: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string(body).map_err(|error| Failure::Usage(format!("{}: {error}", operation.name())))
}

/// A part of a configuration, from a file.
fn overlay(file: &Path) -> Result<serde_json::Map<String, serde_json::Value>, Failure> {
    let problem = |error| Failure::Usage(format!("{} is no JSON object: {error}", file.display()));
    serde_json::from_str(&read(file)?).map_err(problem)
}

/// A flag's value, or what is wrong with it, called by the name it has here.
fn value<T>(command: &str, parsed: Result<T, FlagError>) -> Result<T, Failure> {
    parsed.map_err(|error| Failure::Usage(format!("{command}: {}", error.problem)))
}

/// The text of a file; `-` is standard input.
fn read(file: &Path) -> Result<String, Failure> {
    let mut text = String::new();
    let problem = |error: io::Error| Failure::Usage(format!("cannot read {}: {error}", file.display()));
    let got = if file.as_os_str() == "-" {
        let input = io::stdin();
        if input.is_terminal() {
            eprintln!("trictl: reading JSON from the terminal; end it with ^D");
        }
        input.lock().take(MAX_INPUT).read_to_string(&mut text)
    } else {
        let opened = std::fs::File::open(file).map_err(problem)?;
        opened.take(MAX_INPUT).read_to_string(&mut text)
    };
    got.map_err(problem)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_named_as_the_api_reads_them() {
        for path in ["/var/lib/vm", "/with space/%and:é"] {
            let config = SnapshotConfig {
                destination_url: url(Path::new(path)).expect("a URL"),
                base: None,
                track_writes: None,
            };
            let read = config.directory().expect("a directory");
            assert_eq!(read, Path::new(path));
        }
        let below = url(Path::new("here")).expect("a URL");
        assert!(below.starts_with("file:///") && below.ends_with("/here"), "{below}");
    }
}
