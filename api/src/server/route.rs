//! Every path of the API.

use super::http::Method;
use crate::Operation;

/// Where the API is.
const BASE: &str = "/api/v1/";
/// Where collectors of metrics look unless told otherwise.
const METRICS: &str = "/metrics";

/// Where a path leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Who answers here.
    Ping,
    /// To everything that is counted.
    Metrics,
    /// What happened, and what happens.
    Events,
    /// Long work.
    Jobs,
    /// One of these.
    Job,
    /// To the owner of the VM.
    Vm(Operation),
    /// Agents know it, this version does not have it.
    Missing,
}

/// A path of the API.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// Its name: the last part of its path.
    pub name: &'static str,
    /// The only method it has.
    pub method: Method,
    /// Where it leads.
    pub action: Action,
    /// What it does, in a few words.
    pub summary: &'static str,
}

impl Route {
    /// The whole path.
    pub fn path(&self) -> String {
        format!("{BASE}{}", self.name)
    }

    /// Finds a route by its whole path, and what stands there for the `{id}` in its name.
    pub(super) fn find(path: &str) -> Option<(&'static Self, &str)> {
        if path == METRICS {
            let route = ROUTES.iter().find(|route| route.action == Action::Metrics);
            return route.map(|route| (route, ""));
        }
        let name = path.strip_prefix(BASE)?;
        ROUTES.iter().find_map(|route| match route.name.strip_suffix("{id}") {
            Some(start) => Some((route, name.strip_prefix(start)?)),
            None => (route.name == name).then_some((route, "")),
        })
    }
}

const fn get(name: &'static str, action: Action, summary: &'static str) -> Route {
    Route {
        name,
        method: Method::Get,
        action,
        summary,
    }
}

const fn put(name: &'static str, action: Operation, summary: &'static str) -> Route {
    Route {
        name,
        method: Method::Put,
        action: Action::Vm(action),
        summary,
    }
}

const fn missing(name: &'static str, what: &'static str) -> Route {
    Route {
        name,
        method: Method::Put,
        action: Action::Missing,
        summary: what,
    }
}

/// Every route, those of Cloud Hypervisor that this version lacks included.
pub const ROUTES: &[Route] = &[
    get("vmm.ping", Action::Ping, "version, process id, features of this build"),
    get(
        "vm.info",
        Action::Vm(Operation::Info),
        "configuration as it is now, phase, bytes of RAM",
    ),
    get(
        "vm.counters",
        Action::Vm(Operation::Counters),
        "figures of disks and network interfaces",
    ),
    get(
        "vmm.cpu-features",
        Action::Vm(Operation::CpuFeatures),
        "what CPUs guests can have on this host, and what the guest that is there has ([cpu-model.md](cpu-model.md))",
    ),
    get(
        "metrics",
        Action::Metrics,
        "everything that is counted, as Prometheus text; also at `/metrics`",
    ),
    get(
        "vm.events",
        Action::Events,
        "what happened and happens, as a stream ([below](#events))",
    ),
    get(
        "vm.jobs",
        Action::Jobs,
        "long work under way, and the last that ended ([below](#jobs))",
    ),
    get("vm.job/{id}", Action::Job, "one of these"),
    put(
        "vm.create",
        Operation::Create,
        "takes a configuration; opens its consoles",
    ),
    put("vm.boot", Operation::Boot, "builds the guest and lets it run"),
    put(
        "vm.pause",
        Operation::Pause,
        "stops vCPUs, then finishes what devices have in flight",
    ),
    put("vm.resume", Operation::Resume, "lets both go on"),
    put("vm.power-button", Operation::PowerButton, "asks the guest to shut down"),
    put("vm.nmi", Operation::Nmi, "sends every vCPU a non-maskable interrupt"),
    put(
        "vm.shutdown",
        Operation::Shutdown,
        "ends the guest at once; keeps its configuration",
    ),
    put(
        "vm.reboot",
        Operation::Reboot,
        "ends the guest at once and boots it again",
    ),
    put(
        "vm.delete",
        Operation::Delete,
        "ends the guest if there is one, forgets the configuration",
    ),
    put(
        "vm.resize",
        Operation::Resize,
        "sets the number of vCPUs, the size of RAM and of the balloon ([below](#sizes))",
    ),
    put(
        "vm.resize-zone",
        Operation::ResizeZone,
        "sets the size of a memory zone ([hotplug.md](hotplug.md#zones))",
    ),
    put(
        "vm.resize-disk",
        Operation::ResizeDisk,
        "makes a disk larger; the guest is told",
    ),
    put("vm.add-disk", Operation::AddDisk, "adds a disk"),
    put(
        "vm.add-net",
        Operation::AddNet,
        "adds a network interface; takes descriptors of its tap",
    ),
    put("vm.add-fs", Operation::AddFs, "adds a file system that a daemon shares"),
    put(
        "vm.add-generic-vhost-user",
        Operation::AddGenericVhostUser,
        "adds a device of any type that a daemon serves",
    ),
    put("vm.add-vsock", Operation::AddVsock, "adds a vsock"),
    put(
        "vm.add-device",
        Operation::AddDevice,
        "passes a device of the host through ([vfio.md](vfio.md)); takes descriptors of it",
    ),
    put(
        "vm.remove-device",
        Operation::RemoveDevice,
        "takes a disk, a network interface, a device of a daemon's or of the host or the vsock away; a guest that runs is asked for it",
    ),
    put(
        "vm.snapshot",
        Operation::Snapshot,
        "saves the VM into a directory ([snapshot.md](snapshot.md))",
    ),
    put(
        "vm.restore",
        Operation::Restore,
        "makes a VM from a snapshot, paused; takes descriptors of its taps",
    ),
    put(
        "vm.send-migration",
        Operation::SendMigration,
        "moves the VM to another VMM while the guest runs ([migration.md](migration.md))",
    ),
    put(
        "vm.receive-migration",
        Operation::ReceiveMigration,
        "waits for a VM from another VMM and takes it; takes descriptors of its taps",
    ),
    put(
        "vm.check-migration",
        Operation::CheckMigration,
        "asks a VMM that waits for a VM what would be in the way of this one; nothing is moved",
    ),
    put(
        "vm.set-migration",
        Operation::SetMigration,
        "changes the bandwidth of a migration that is under way, [switches it to post-copy](migration.md#post-copy), or has a connection tried again that was lost in post-copy",
    ),
    put(
        "vm.cancel-migration",
        Operation::CancelMigration,
        "ends a migration that is under way; the guest stays where it is",
    ),
    get(
        "vm.migration-progress",
        Action::Vm(Operation::MigrationProgress),
        "how far the migration is that is under way, or how the last one ended",
    ),
    put("vmm.shutdown", Operation::VmmShutdown, "ends the process, exit code 0"),
    missing("vm.add-pmem", "adds persistent memory"),
    missing("vm.add-vdpa", "adds a vDPA device"),
    missing("vm.add-user-device", "adds a vfio-user device"),
    missing("vm.coredump", "writes the guest's memory to a core file"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_one_route_of_its_name() {
        for operation in Operation::ALL {
            let routes: Vec<_> = ROUTES
                .iter()
                .filter(|route| route.action == Action::Vm(operation))
                .collect();
            assert_eq!(routes.len(), 1, "{operation:?}");
            assert_eq!(routes[0].name, operation.name());
        }
    }

    #[test]
    fn paths_lead_to_their_routes_and_nothing_else_does() {
        for route in ROUTES {
            assert_eq!(
                Route::find(&route.path()).map(|(found, _)| found.name),
                Some(route.name)
            );
        }
        assert_eq!(Route::find("/metrics").map(|(found, _)| found.name), Some("metrics"));
        assert_eq!(
            Route::find("/api/v1/vm.job/12").map(|(found, id)| (found.name, id)),
            Some(("vm.job/{id}", "12"))
        );
        for path in [
            "",
            "/",
            "/api/v1/",
            "/api/v1/vm.info/",
            "/vm.info",
            "vm.info",
            "/metrics/",
            "metrics",
            "/api/v1/vm.job",
            "/api/v1/vm.jobs/1",
        ] {
            assert!(Route::find(path).is_none(), "{path}");
        }
    }
}
