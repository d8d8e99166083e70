//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use triarch_api::Operation;

const AFTER: &str = "\
Exit status: 0 done, 1 the VMM refused or failed, 2 the command line is wrong, 3 no answer (no connection, or it was lost).

Example:
  export TRIARCH_API_SOCKET=api.sock
  trictl create vm.json && trictl boot && trictl info";

/// Drives one Triarch VMM over its API socket
#[derive(Debug, Parser)]
#[command(name = "trictl", version, after_help = AFTER, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Socket of the VMM (its --api-socket) [default: what TRIARCH_API_SOCKET says]
    #[arg(short = 's', long, value_name = "PATH", global = true)]
    pub(crate) api_socket: Option<PathBuf>,
    /// Print the VMM's JSON as it is
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Seconds to wait for an answer; 0 waits for ever
    #[arg(long, value_name = "SECONDS", default_value_t = 60, global = true)]
    pub(crate) timeout: u32,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show who answers
    Ping,
    /// Show the VM: its phase, processors, memory and devices
    Info,
    /// Show what disks and network interfaces have counted
    Counters,
    /// Show what CPUs guests can have on this host, and what the VM's is
    CpuFeatures,
    /// Give the VMM a configuration, the JSON of vm.create
    Create {
        /// File with the configuration; - reads standard input
        #[arg(value_name = "FILE", default_value = "-")]
        file: PathBuf,
    },
    /// Build the guest and let it run
    Boot,
    /// Let the guest stand still
    Pause,
    /// Let it go on
    Resume,
    /// Ask the guest to shut down
    PowerButton,
    /// Send every vCPU a non-maskable interrupt
    Nmi,
    /// End the guest at once, keep its configuration
    Shutdown,
    /// End the guest at once and boot it again
    Reboot,
    /// End the guest if there is one, forget the configuration
    Delete,
    /// Set the number of vCPUs, the size of memory
    Resize(Resize),
    /// Set the size of a memory zone
    ResizeZone {
        /// The zone's id
        id: String,
        /// Its size with what it started with, such as 4G
        #[arg(value_parser = triarch_api::parse_size)]
        size: u64,
        /// Wait until the guest has done its part, or has not
        #[arg(long)]
        wait: bool,
    },
    /// Make a disk larger
    ResizeDisk {
        /// The disk's id
        id: String,
        /// Its new size, such as 20G
        #[arg(value_parser = triarch_api::parse_size)]
        size: u64,
    },
    /// Add a disk
    AddDisk {
        /// path=FILE[,readonly=on][,direct=on][,num_queues=N]..., as of the VMM's --disk
        disk: String,
    },
    /// Add a network interface
    AddNet(AddNet),
    /// Add a file system that a daemon shares
    AddFs {
        /// tag=NAME,socket=PATH[,num_queues=N][,id=ID]..., as of the VMM's --fs
        fs: String,
    },
    /// Add a device of any type that a daemon serves
    AddGenericVhostUser {
        /// device_type=TYPE,socket=PATH,queue_sizes=[N,...][,id=ID], as of the VMM's --generic-vhost-user
        device: String,
    },
    /// Pass a device of the host through
    AddDevice(AddDevice),
    /// Add sockets between guest and host
    AddVsock {
        /// cid=N,socket=PATH[,id=ID], as of the VMM's --vsock
        vsock: String,
    },
    /// Take a device away
    RemoveDevice {
        /// The device's id
        id: String,
        /// Take it without asking the guest, or after it did nothing when asked
        #[arg(long)]
        force: bool,
        /// Go on until the guest has given it back
        #[arg(long)]
        wait: bool,
    },
    /// Save the VM, which must be paused
    Snapshot {
        /// Where to: a directory, which is made if it is not there
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Save only what was written since this snapshot of the VM, the last one with --track-writes on
        #[arg(long, value_name = "DIR")]
        base: Option<PathBuf>,
        /// From now on note what is written, so that later snapshots can build on this one; or do not any more
        #[arg(long, value_name = "on|off", value_parser = clap::builder::BoolishValueParser::new())]
        track_writes: Option<bool>,
    },
    /// Make a VM from a snapshot, and let it stand still until it is told to go on
    Restore {
        /// The snapshot's directory
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// How memory comes back: copy, mapped or ondemand
        #[arg(long, value_name = "MODE", default_value = "copy")]
        memory: triarch_api::RestoreMode,
        /// Let it go on at once
        #[arg(long)]
        resume: bool,
        /// Whether the guest's time stands between the snapshot and now, or passes
        #[arg(long, value_name = "stands|passes", default_value = "stands")]
        clock: triarch_api::RestoreClock,
        /// Note what is written from now on, so that later snapshots can build on this one
        #[arg(long)]
        track_writes: bool,
    },
    /// Move the VM to another VMM, which waits for it
    SendMigration(SendMigration),
    /// Wait for a VM from another VMM and take it
    ReceiveMigration {
        /// Where to listen: unix:/path, tcp:host:port with --cert, --key and --ca, or tcp-plain:host:port
        #[arg(value_name = "URL")]
        from: String,
        #[command(flatten)]
        tls: Tls,
        /// A file with what of the VM's configuration is different here, in JSON; - is standard input
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Show what would be in the way of moving the VM to another VMM, which waits for it
    CheckMigration {
        /// Where the other VMM waits: unix:/path, tcp:host:port with --cert, --key and --ca, or tcp-plain:host:port
        #[arg(value_name = "URL")]
        to: String,
        #[command(flatten)]
        tls: Tls,
        /// Ask for a move that hands memory over within this host
        #[arg(long, conflicts_with = "post_copy")]
        local: bool,
        /// Ask for a move that lets the guest run there before all of its memory came
        #[arg(long)]
        post_copy: bool,
    },
    /// Change a migration that is under way
    SetMigration {
        /// Bytes a second that may be sent, such as 400M; 0 for as many as there is room for
        #[arg(long, value_parser = triarch_api::parse_size, required_unless_present_any = ["post_copy", "recover"])]
        bandwidth: Option<u64>,
        /// Move the guest now with the memory that is there; the rest follows
        #[arg(long)]
        post_copy: bool,
        /// Try a connection again that was lost after that
        #[arg(long)]
        recover: bool,
    },
    /// End a migration that is under way; the guest stays where it is
    CancelMigration,
    /// Show how far the migration is that is under way, or how the last one ended
    MigrationProgress,
    /// Show long work: what is under way, and the last that ended
    Jobs {
        /// Only this one
        id: Option<u64>,
        /// Go on until it has ended
        #[arg(long)]
        watch: bool,
    },
    /// Show what happens
    Events(Events),
    /// Print all figures in Prometheus' text format
    Metrics,
    /// Watch processors, memory, disks and network at work
    Top(Top),
    /// Send any request and print the answer's body
    Raw {
        #[arg(value_enum, ignore_case = true)]
        method: Method,
        /// Name of a route, such as vm.info, or a path, such as /metrics
        route: String,
        /// Body; - reads standard input
        body: Option<String>,
    },
    /// End the VMM
    VmmShutdown,
    /// Print a completion script
    Completion {
        /// For this shell
        shell: Shell,
    },
    /// Print the manual page
    Man {
        /// Write it and those of all commands to this directory instead
        #[arg(long, value_name = "DIR")]
        directory: Option<PathBuf>,
    },
}

impl Command {
    /// The operation of a command that needs no more than its name.
    pub(crate) fn operation(&self) -> Option<Operation> {
        Some(match self {
            Self::Boot => Operation::Boot,
            Self::Pause => Operation::Pause,
            Self::Resume => Operation::Resume,
            Self::PowerButton => Operation::PowerButton,
            Self::Nmi => Operation::Nmi,
            Self::Shutdown => Operation::Shutdown,
            Self::Reboot => Operation::Reboot,
            Self::Delete => Operation::Delete,
            Self::CancelMigration => Operation::CancelMigration,
            Self::VmmShutdown => Operation::VmmShutdown,
            _ => return None,
        })
    }
}

/// How a VM is moved.
#[derive(Debug, Args)]
pub(crate) struct SendMigration {
    /// Where the other VMM waits: unix:/path, tcp:host:port with --cert, --key and --ca, or tcp-plain:host:port
    #[arg(value_name = "URL")]
    pub(crate) to: String,
    #[command(flatten)]
    pub(crate) tls: Tls,
    /// Hand the descriptors of shared memory over within this host, instead of copying it
    #[arg(long, conflicts_with_all = ["connections", "bandwidth", "throttle", "compress", "downtime", "post_copy"])]
    pub(crate) local: bool,
    /// Milliseconds for which the guest may stand still
    #[arg(long, value_name = "MS", default_value_t = 300)]
    pub(crate) downtime: u64,
    /// Seconds that copying may take
    #[arg(long = "give-up-after", value_name = "S", default_value_t = 3600)]
    pub(crate) time: u64,
    /// Do not give up then, but move the guest however long it stands still
    #[arg(long)]
    pub(crate) force: bool,
    /// Connections for memory
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) connections: u16,
    /// Bytes a second that may be sent, such as 400M
    #[arg(long, value_parser = triarch_api::parse_size)]
    pub(crate) bandwidth: Option<u64>,
    /// Percent of the time for which the guest may be held if it writes too fast, 99 at most
    #[arg(long, value_name = "PERCENT", default_value_t = 0)]
    pub(crate) throttle: u8,
    /// Compress pages where that is faster
    #[arg(long)]
    pub(crate) compress: bool,
    /// Let the guest run there before all of its memory came, when told by set-migration --post-copy
    #[arg(long)]
    pub(crate) post_copy: bool,
    /// Do not give up then, but let the guest run there before all of its memory came
    #[arg(long, requires = "post_copy", conflicts_with = "force")]
    pub(crate) post_copy_then: bool,
    /// Seconds for which a connection that is lost meanwhile is tried again, instead of as long as it takes
    #[arg(long, value_name = "S", requires = "post_copy")]
    pub(crate) recover: Option<u64>,
}

/// Files with which the two sides of a migration know each other, PEM.
#[derive(Debug, Args)]
pub(crate) struct Tls {
    /// This side's certificate
    #[arg(long, value_name = "FILE", requires_all = ["key", "ca"])]
    cert: Option<PathBuf>,
    /// Its private key
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// Certificates of authorities
    #[arg(long, value_name = "FILE", requires = "cert")]
    ca: Option<PathBuf>,
    /// The name that the other side's certificate must have
    #[arg(long, value_name = "NAME", requires = "cert")]
    peer: Option<String>,
}

impl Tls {
    /// The same for a request.
    pub(crate) fn into_request(self) -> Result<Option<triarch_api::MigrationTls>, std::io::Error> {
        let (Some(certificate), Some(key), Some(ca)) = (self.cert, self.key, self.ca) else {
            return Ok(None);
        };
        Ok(Some(triarch_api::MigrationTls {
            certificate: std::path::absolute(certificate)?,
            key: std::path::absolute(key)?,
            ca: std::path::absolute(ca)?,
            peer: self.peer,
        }))
    }
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Resize {
    /// Number of vCPUs
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u32>,
    /// Size of memory, such as 4G
    #[arg(long, value_name = "SIZE", value_parser = triarch_api::parse_size)]
    pub(crate) memory: Option<u64>,
    /// What the balloon takes of it
    #[arg(long, value_name = "SIZE", value_parser = triarch_api::parse_size)]
    pub(crate) balloon: Option<u64>,
    /// Wait until the guest has done its part, or has not
    #[arg(long)]
    pub(crate) wait: bool,
}

#[derive(Debug, Args)]
pub(crate) struct AddNet {
    /// [tap=NAME][,mac=MAC][,ip=IP,mask=MASK][,mtu=N]..., as of the VMM's --net
    #[arg(default_value = "")]
    pub(crate) net: String,
    /// Descriptor of an open tap, inherited by trictl; one for each queue pair
    #[arg(long = "fd", value_name = "N")]
    pub(crate) fds: Vec<i32>,
}

#[derive(Debug, Args)]
pub(crate) struct AddDevice {
    /// path=/sys/bus/pci/devices/0000:01:00.0[,id=ID], as of the VMM's --device
    #[arg(default_value = "")]
    pub(crate) device: String,
    /// Descriptor of its file, or its group's, inherited by trictl; then that of /dev/iommu or /dev/vfio/vfio, if the VM has none yet
    #[arg(long = "fd", value_name = "N")]
    pub(crate) fds: Vec<i32>,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// First show what is kept after this event; 0: all of it
    #[arg(long, value_name = "ID")]
    pub(crate) since: Option<u64>,
    /// Wait for more (the default)
    #[arg(short, long, overrides_with = "no_follow")]
    pub(crate) follow: bool,
    /// Show what is kept and end
    #[arg(long, overrides_with = "follow")]
    pub(crate) no_follow: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Top {
    /// Print one page and end
    #[arg(long, conflicts_with = "iterations")]
    pub(crate) once: bool,
    /// Print N pages and end
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) iterations: Option<u64>,
    /// Milliseconds between two pages
    #[arg(long, value_name = "MS", default_value_t = 500, value_parser = clap::value_parser!(u64).range(50..=60_000))]
    pub(crate) interval: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Method {
    Get,
    Put,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_operation_has_a_command() {
        for operation in Operation::ALL {
            let name = operation.name().strip_prefix("vm.").unwrap_or("vmm-shutdown");
            let command = Cli::command();
            assert!(command.find_subcommand(name).is_some(), "{name}");
        }
    }

    #[test]
    fn the_documentation_has_every_command_and_option() {
        let documentation = include_str!("../../../../docs/trictl.md");
        let command = Cli::command();
        for name in command.get_subcommands().map(|command| command.get_name()) {
            assert!(documentation.contains(&format!("`trictl {name}")), "{name}");
        }
        let words = command.get_subcommands().flat_map(|command| command.get_arguments());
        for option in words.chain(command.get_arguments()).filter_map(|word| word.get_long()) {
            let known = ["help", "version", "follow"];
            assert!(
                known.contains(&option) || documentation.contains(&format!("--{option}")),
                "--{option}"
            );
        }
    }

    #[test]
    fn commands_without_arguments_are_the_operations_of_their_names() {
        for name in [
            "boot",
            "pause",
            "resume",
            "power-button",
            "nmi",
            "shutdown",
            "reboot",
            "delete",
        ] {
            let cli = Cli::try_parse_from(["trictl", name]).expect("a command");
            assert_eq!(
                cli.command.operation().map(Operation::name),
                Some(format!("vm.{name}").as_str())
            );
        }
        let cli = Cli::try_parse_from(["trictl", "vmm-shutdown", "-s", "x"]).expect("a command");
        assert_eq!(cli.command.operation(), Some(Operation::VmmShutdown));
        assert_eq!(cli.global.api_socket, Some("x".into()));
    }

    #[test]
    fn nonsense_is_refused() {
        for words in [
            &["resize"][..],
            &["resize", "--memory", "1.5G"],
            &["resize-disk", "_disk0"],
            &["resize-zone", "z0"],
            &["raw", "POST", "vm.info"],
            &["top", "--once", "--iterations", "2"],
            &["jobs", "x"],
            &["fly"],
            &[],
        ] {
            let words = ["trictl"].iter().chain(words);
            assert!(Cli::try_parse_from(words.clone()).is_err(), "{words:?}");
        }
    }
}
