//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{ArgAction, ArgMatches, CommandFactory, FromArgMatches, Parser};
use triarch_api::flags::{self, FlagError, Restored};
use triarch_api::{
    ConsoleConfig, ConsoleMode, CpusConfig, DebugConsoleConfig, MemoryConfig, PayloadConfig, RngConfig, VmConfig,
};
use triarch_sandbox::Mode;

use crate::compat::{self, CLOUD_HYPERVISOR, Personality};
use crate::config_file;
use crate::exit::{self, Wrong};
use crate::logging::{Format, Levels};
use crate::places::{self, ApiSocket, AuditLog, Target};
use crate::restore;

/// What described a VM if no file did.
pub(crate) const FLAGS: &str = "the command line";

const EXAMPLE: &str = "\
Example:
  triarch --kernel vmlinuz --initramfs initrd.img --cmdline console=ttyS0 \\
          --cpus boot=4 --memory size=2G --disk path=root.img --net tap=tap0 \\
          --serial tty --console off";

/// One virtual machine on KVM.
#[derive(Parser)]
#[command(name = "triarch", version, disable_help_subcommand = true)]
struct Args {
    /// The VM as JSON, like the body of vm.create, instead of the flags that describe one; - is stdin
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A VM that was saved: source_url=file://DIRECTORY[,memory_restore_mode=MODE][,resume=on][,prefault=on][,clock=passes][,track_writes=on][,net_fds=[ID@[N,...],...]]
    #[arg(long, value_name = "SNAPSHOT")]
    restore: Option<String>,
    /// Kernel: a bzImage or an ELF with a PVH note
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Firmware to start instead of a kernel
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    firmware: Option<PathBuf>,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE", alias = "initrd")]
    initramfs: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// boot=N[,max=N][,topology=THREADS:CORES:DIES:PACKAGES] (default boot=1)
    #[arg(long, value_name = "CPUS")]
    cpus: Option<String>,
    /// size=SIZE[,shared=on][,hugepages=on[,hugepage_size=SIZE]][,prefault=on][,thp=off][,mergeable=on] (default size=512M)
    #[arg(long, value_name = "MEMORY")]
    memory: Option<String>,
    /// id=NAME,size=SIZE[,hotplug_size=SIZE][,host_numa_node=N] and keys of --memory, whose size is 0 then
    #[arg(long, value_name = "ZONE", num_args = 1.., action = ArgAction::Append)]
    memory_zone: Vec<String>,
    /// guest_numa_id=N[,cpus=[N-N,...]][,memory_zones=[NAME,...]][,distances=[N@DISTANCE,...]]
    #[arg(long, value_name = "NODE", num_args = 1.., action = ArgAction::Append)]
    numa: Vec<String>,
    /// path=FILE[,readonly=on][,direct=on][,num_queues=N][,queue_size=N][,serial=TEXT][,io_uring=off][,backend=blkd][,id=ID]
    #[arg(long, value_name = "DISK", num_args = 1.., action = ArgAction::Append)]
    disk: Vec<String>,
    /// [tap=NAME|fd=[N,...]][,mac=MAC][,ip=IP,mask=MASK][,mtu=N][,num_queues=N][,queue_size=N][,id=ID]
    #[arg(long, value_name = "NET", num_args = 1.., action = ArgAction::Append)]
    net: Vec<String>,
    /// tag=NAME,socket=PATH[,num_queues=N][,queue_size=N][,on_disconnect=error-after=SECONDS][,id=ID]
    #[arg(long, value_name = "FS", num_args = 1.., action = ArgAction::Append)]
    fs: Vec<String>,
    /// device_type=TYPE,socket=PATH,queue_sizes=[N,...][,id=ID]
    #[arg(long, value_name = "DEVICE", num_args = 1.., action = ArgAction::Append)]
    generic_vhost_user: Vec<String>,
    /// path=/sys/bus/pci/devices/0000:01:00.0[,id=ID]: a device of the host
    #[arg(long, value_name = "DEVICE", num_args = 1.., action = ArgAction::Append)]
    device: Vec<String>,
    /// cid=N,socket=PATH
    #[arg(long, value_name = "VSOCK")]
    vsock: Option<String>,
    /// size=SIZE[,deflate_on_oom=on][,free_page_reporting=on][,id=ID]
    #[arg(long, value_name = "BALLOON")]
    balloon: Option<String>,
    /// src=FILE (default src=/dev/urandom)
    #[arg(long, value_name = "RNG")]
    rng: Option<String>,
    /// Serial port: tty, pty, null, off, file=PATH or socket=PATH (default null)
    #[arg(long, value_name = "CONSOLE")]
    serial: Option<String>,
    /// virtio console: the same choices (default tty)
    #[arg(long, value_name = "CONSOLE")]
    console: Option<String>,
    /// Debug port 0x402: tty, null, off or file=PATH (default off)
    #[arg(long, value_name = "CONSOLE")]
    debug_console: Option<String>,
    /// [uuid=UUID][,serial_number=TEXT][,oem_strings=[TEXT,...]][,dtb=on]
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// API socket: PATH, path=PATH or fd=N
    #[arg(long, value_name = "SOCKET")]
    api_socket: Option<String>,
    /// Lets requests ask for devices with backend=blkd or netd, whose daemon the VMM starts; flags and files may in any case
    #[arg(long)]
    daemons: bool,
    /// Events, one JSON object a line: path=FILE or fd=N
    #[arg(long, value_name = "EVENTS")]
    event_monitor: Option<String>,
    /// A line for each call that changes something: file=PATH, syslog[=SOCKET] or journald[=SOCKET]
    #[arg(long, value_name = "LOG")]
    audit_log: Option<String>,
    /// System calls outside of the filters: true kills, log reports, false has no filters
    #[arg(long, value_name = "MODE", default_value = "true", value_parser = ["true", "false", "log"])]
    seccomp: String,
    /// Log to FILE instead of stderr; SIGHUP opens it again
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// How log lines look
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = ["text", "json"])]
    log_format: String,
    /// [LEVEL][,MODULE=LEVEL...], like info,block=debug
    #[arg(long, value_name = "LEVELS")]
    log_level: Option<String>,
    /// The name and version to go by: cloud-hypervisor
    #[arg(long, value_name = "PROGRAM", value_parser = [CLOUD_HYPERVISOR])]
    compat: Option<String>,
    /// More log lines; twice and three times for still more
    #[arg(short = 'v', action = ArgAction::Count)]
    verbosity: u8,
}

/// What is logged, where to, and how it looks.
#[derive(Debug)]
pub(crate) struct LogOptions {
    /// A file instead of standard error.
    pub(crate) file: Option<PathBuf>,
    /// How lines look.
    pub(crate) format: Format,
    /// Levels, as far as `--log-level` sets them.
    pub(crate) levels: Levels,
    /// How often `-v` was given.
    pub(crate) verbosity: u8,
}

/// A VM that is to run from the start.
#[derive(Debug)]
pub(crate) struct Described {
    /// What it is.
    pub(crate) config: VmConfig,
    /// What described it: [`FLAGS`], or the name of a file.
    pub(crate) by: String,
    /// Fields of the file that mean nothing.
    pub(crate) ignored: Vec<String>,
}

/// The guest that is there from the start.
#[derive(Debug)]
pub(crate) enum Guest {
    /// It boots.
    Described(Box<Described>),
    /// It goes on where it was.
    Saved(Restored),
}

/// The command line, understood.
#[derive(Debug)]
pub(crate) struct Cli {
    /// The guest, if there is to be one.
    pub(crate) guest: Option<Guest>,
    /// Where the API listens, if anywhere.
    pub(crate) api_socket: Option<ApiSocket>,
    /// Whether the VMM may start daemons.
    pub(crate) daemons: bool,
    /// Where events go, if anywhere.
    pub(crate) event_monitor: Option<Target>,
    /// Where audit lines go, if anywhere.
    pub(crate) audit_log: Option<AuditLog>,
    /// The system call filters; `None`: none.
    pub(crate) seccomp: Option<Mode>,
    /// The log.
    pub(crate) log: LogOptions,
    /// Which program this is.
    pub(crate) personality: Personality,
}

impl Cli {
    /// Reads the process's arguments, and the file they name if they name one. Prints help and version by itself. Errors are [`Wrong`].
    pub(crate) fn from_args() -> anyhow::Result<Self> {
        let arguments: Vec<OsString> = std::env::args_os().collect();
        match Self::parse(&arguments) {
            Ok(Parsed::Cli(cli)) => Ok(*cli),
            Ok(Parsed::Help(help)) => help.exit(),
            Err(error) => Err(wrong(&error)),
        }
    }

    fn parse(arguments: &[OsString]) -> anyhow::Result<Parsed> {
        let personality = Personality::of(arguments);
        match matches(arguments, personality)? {
            Ok(mut matches) => {
                let args = Args::from_arg_matches_mut(&mut matches)?;
                Ok(Parsed::Cli(Box::new(Self::from_parsed(args, personality)?)))
            }
            Err(help) => Ok(Parsed::Help(help)),
        }
    }

    fn from_parsed(args: Args, personality: Personality) -> anyhow::Result<Self> {
        let api_socket = args.api_socket.as_deref().map(places::api_socket).transpose()?;
        let event_monitor = args.event_monitor.as_deref().map(places::event_monitor).transpose()?;
        let audit_log = args.audit_log.as_deref().map(places::audit_log).transpose()?;
        if audit_log.is_some() && api_socket.is_none() {
            anyhow::bail!("--audit-log records calls of the API, which is off; give --api-socket PATH beside it");
        }
        let seccomp = match args.seccomp.as_str() {
            "false" => None,
            "log" => Some(Mode::Log),
            _ => Some(Mode::Enforce),
        };
        let log = LogOptions {
            file: args.log_file.clone(),
            format: if args.log_format == "json" {
                Format::Json
            } else {
                Format::Text
            },
            levels: args
                .log_level
                .as_deref()
                .map(str::parse)
                .transpose()?
                .unwrap_or_default(),
            verbosity: args.verbosity,
        };
        let asked = args.daemons;
        let guest = guest(args, api_socket.is_some())?;
        let needed = match &guest {
            Some(Guest::Described(vm)) => vm.config.needs_daemons(),
            Some(Guest::Saved(saved)) => restore::needs_daemons(saved),
            None => false,
        };
        Ok(Self {
            daemons: asked || needed,
            guest,
            api_socket,
            event_monitor,
            audit_log,
            seccomp,
            log,
            personality,
        })
    }
}

/// The guest that `args` ask for. There may be none where the API is `served`.
fn guest(args: Args, served: bool) -> anyhow::Result<Option<Guest>> {
    let booted = args.kernel.is_some() || args.firmware.is_some();
    let described = describes(&args);
    if let Some(text) = &args.restore {
        if let Some(flag) = args.config.as_ref().map(|_| "--config").or(described) {
            anyhow::bail!(
                "{flag} describes a VM, and --restore takes one as it was saved; leave {flag} out, what may differ is changed in the \
                 snapshot's config.json"
            );
        }
        return Ok(Some(Guest::Saved(restore::parse(text, served)?)));
    }
    let vm = match (&args.config, described) {
        (Some(path), Some(flag)) => anyhow::bail!(
            "{flag} describes a VM, and so does --config; write it into {}, or leave --config out",
            config_file::name(path)
        ),
        (Some(path), None) => {
            let (config, ignored) = config_file::read(path)?;
            let by = config_file::name(path);
            Some(Described { config, by, ignored })
        }
        (None, _) if booted => Some(Described {
            config: config(args)?,
            by: FLAGS.to_owned(),
            ignored: Vec::new(),
        }),
        (None, Some(flag)) => {
            anyhow::bail!("{flag} describes a VM that has nothing to boot; give --kernel FILE beside it")
        }
        (None, None) if !served => anyhow::bail!(
            "there is nothing to do; give --kernel FILE or --config FILE to boot, --restore source_url=URL to go on with a snapshot, \
             or --api-socket PATH to be driven; or see --help"
        ),
        (None, None) => None,
    };
    Ok(vm.map(|vm| Guest::Described(Box::new(vm))))
}

/// What the arguments come to.
#[derive(Debug)]
enum Parsed {
    Cli(Box<Cli>),
    /// Help or version, to be printed.
    Help(clap::Error),
}

/// The arguments, taken apart; or the help that they ask for.
fn matches(arguments: &[OsString], personality: Personality) -> anyhow::Result<Result<ArgMatches, clap::Error>> {
    let command = || personality.name(Args::command().after_help(format!("{EXAMPLE}\n\n{}", exit::HELP)));
    let error = match command().try_get_matches_from(arguments) {
        Ok(matches) => return Ok(Ok(matches)),
        Err(error) if error.kind() != ErrorKind::UnknownArgument => error,
        // It may be one that Cloud Hypervisor knows.
        Err(unknown) => match compat::with_lacking(command()).try_get_matches_from(arguments) {
            Ok(matches) => match compat::lacking(&matches) {
                Some(refusal) => anyhow::bail!(refusal),
                None => return Ok(Ok(matches)),
            },
            Err(error) if error.kind() != ErrorKind::UnknownArgument => error,
            Err(_) => unknown,
        },
    };
    if !error.use_stderr() {
        return Ok(Err(error));
    }
    // One sentence, like every other error; the rest of clap's text is in --help.
    let text = error.render().to_string();
    let text = text
        .trim_start_matches("error: ")
        .split("\n\n")
        .next()
        .unwrap_or_default();
    anyhow::bail!("{}; see --help", text.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Marks an error as one of the command line.
fn wrong(error: &anyhow::Error) -> anyhow::Error {
    Wrong(format!("{error:#}")).into()
}

/// A flag that says what a VM is like.
fn describes(args: &Args) -> Option<&'static str> {
    let given = [
        ("--kernel", args.kernel.is_some()),
        ("--firmware", args.firmware.is_some()),
        ("--initramfs", args.initramfs.is_some()),
        ("--cmdline", args.cmdline.is_some()),
        ("--cpus", args.cpus.is_some()),
        ("--memory", args.memory.is_some()),
        ("--memory-zone", !args.memory_zone.is_empty()),
        ("--numa", !args.numa.is_empty()),
        ("--disk", !args.disk.is_empty()),
        ("--net", !args.net.is_empty()),
        ("--fs", !args.fs.is_empty()),
        ("--generic-vhost-user", !args.generic_vhost_user.is_empty()),
        ("--device", !args.device.is_empty()),
        ("--vsock", args.vsock.is_some()),
        ("--balloon", args.balloon.is_some()),
        ("--rng", args.rng.is_some()),
        ("--serial", args.serial.is_some()),
        ("--console", args.console.is_some()),
        ("--debug-console", args.debug_console.is_some()),
        ("--platform", args.platform.is_some()),
    ];
    given.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag)
}

fn config(args: Args) -> anyhow::Result<VmConfig> {
    let serial = match &args.serial {
        Some(text) => flags::console("--serial", text)?,
        None => ConsoleConfig::default(),
    };
    Ok(VmConfig {
        cpus: parsed(&args.cpus, flags::cpus)?.unwrap_or_else(CpusConfig::default),
        memory: MemoryConfig {
            zones: list(&args.memory_zone, flags::memory_zone)?,
            ..parsed(&args.memory, flags::memory)?.unwrap_or_else(MemoryConfig::default)
        },
        numa: list(&args.numa, flags::numa)?,
        payload: Some(PayloadConfig {
            kernel: args.kernel,
            cmdline: args.cmdline,
            initramfs: args.initramfs,
            firmware: args.firmware,
        }),
        disks: list(&args.disk, flags::disk)?,
        net: list(&args.net, flags::net)?,
        fs: list(&args.fs, flags::fs)?,
        generic_vhost_user: list(&args.generic_vhost_user, flags::generic_vhost_user)?,
        devices: list(&args.device, flags::device)?,
        rng: parsed(&args.rng, flags::rng)?.unwrap_or_else(RngConfig::default),
        console: console(args.console.as_deref(), &serial)?,
        serial,
        debug_console: parsed(&args.debug_console, flags::debug_console)?.unwrap_or_else(DebugConsoleConfig::default),
        vsock: parsed(&args.vsock, flags::vsock)?,
        balloon: parsed(&args.balloon, flags::balloon)?,
        platform: parsed(&args.platform, flags::platform)?,
    })
}

/// A flag that can be given several times.
fn list<T>(texts: &[String], parse: fn(&str) -> Result<T, FlagError>) -> Result<Option<Vec<T>>, FlagError> {
    let items: Vec<T> = texts.iter().map(|text| parse(text)).collect::<Result<_, _>>()?;
    Ok(Some(items).filter(|items| !items.is_empty()))
}

fn parsed<T>(text: &Option<String>, parse: fn(&str) -> Result<T, FlagError>) -> Result<Option<T>, FlagError> {
    text.as_deref().map(parse).transpose()
}

/// The virtio console has the terminal by default; a serial port that asks for it gets it instead.
fn console(text: Option<&str>, serial: &ConsoleConfig) -> anyhow::Result<ConsoleConfig> {
    let mode = match text {
        Some(text) => return Ok(flags::console("--console", text)?),
        None if serial.mode == ConsoleMode::Tty => ConsoleMode::Off,
        None => ConsoleMode::Tty,
    };
    Ok(ConsoleConfig {
        mode,
        ..ConsoleConfig::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> anyhow::Result<Cli> {
        let arguments: Vec<_> = ["triarch"].iter().chain(arguments).map(OsString::from).collect();
        match Cli::parse(&arguments)? {
            Parsed::Cli(cli) => Ok(*cli),
            Parsed::Help(help) => panic!("{help}"),
        }
    }

    fn described(arguments: &[&str]) -> Described {
        match parse(arguments).expect("a command line").guest {
            Some(Guest::Described(vm)) => *vm,
            other => panic!("{other:?}"),
        }
    }

    fn error(arguments: &[&str]) -> String {
        format!("{:#}", wrong(&parse(arguments).expect_err("refused")))
    }

    #[test]
    fn defaults_are_those_of_the_help() {
        let vm = described(&["--kernel", "k"]);
        let expected = VmConfig {
            payload: Some(PayloadConfig {
                kernel: Some("k".into()),
                ..PayloadConfig::default()
            }),
            console: flags::console("--console", "tty").expect("a console"),
            ..VmConfig::default()
        };
        assert_eq!((vm.config, &*vm.by), (expected, FLAGS));
        // One of them has the terminal.
        let vm = described(&["--kernel", "k", "--serial", "tty"]);
        assert_eq!(vm.config.console.mode, ConsoleMode::Off);
        let vm = described(&["--kernel=k", "--serial=tty", "--console=pty"]);
        assert_eq!(vm.config.console.mode, ConsoleMode::Pty);
    }

    #[test]
    fn a_file_describes_the_whole_vm() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("vm.json");
        let file = path.to_str().expect("a path");
        std::fs::write(
            &path,
            r#"{"payload": {"kernel": "k"}, "cpus": {"boot_vcpus": 2, "max_vcpus": 2}}"#,
        )
        .expect("write");
        let vm = described(&["--config", file, "--api-socket", "s", "-v"]);
        assert_eq!((vm.config.cpus.boot_vcpus, &*vm.by), (2, file));
        assert_eq!(vm.config.console.mode, ConsoleMode::Null);
        for flag in [
            "--cpus=1",
            "--kernel=k",
            "--serial=tty",
            "--disk=path=d",
            "--rng=src=/dev/urandom",
            "--memory=1G",
        ] {
            let text = error(&["--config", file, flag]);
            let name = flag.split_once('=').expect("a flag").0;
            assert!(
                text.starts_with(&format!("{name} describes a VM, and so does --config;")),
                "{text}"
            );
        }
    }

    #[test]
    fn a_guest_that_was_saved_is_nothing_that_flags_describe() {
        let from = "source_url=file:///nowhere,resume=on";
        match parse(&["--restore", from]).expect("a command line").guest {
            Some(Guest::Saved(saved)) => assert!(saved.config.resume),
            other => panic!("{other:?}"),
        }
        for flag in ["--kernel=k", "--config=vm.json", "--memory=1G", "--console=off"] {
            let text = error(&["--restore", from, flag]);
            let name = flag.split_once('=').expect("a flag").0;
            let expected = format!("{name} describes a VM, and --restore takes one as it was saved;");
            assert!(text.starts_with(&expected), "{text}");
        }
        let paused = ["--restore", "source_url=file:///nowhere"];
        assert!(error(&paused).contains("add resume=on"), "{}", error(&paused));
        parse(&[paused[0], paused[1], "--api-socket", "s"]).expect("somebody can resume it");
    }

    #[test]
    fn unknown_flags_are_told_from_lacking_ones() {
        assert!(error(&["--kernel", "k", "--bogus"]).contains("unexpected argument '--bogus'"));
        assert!(error(&["--kernel", "k", "--watchdog", "--bogus"]).contains("'--watchdog'"));
        let text = error(&["--kernel", "k", "--pmem", "file=a"]);
        assert_eq!(text, "--pmem is not supported by this version; leave it out");
        let vm = described(&["--watchdog", "off", "--kernel", "k", "--disk", "path=d"]);
        assert_eq!(vm.config.disks.expect("disks").len(), 1);
    }

    #[test]
    fn versions_are_those_of_the_personality() {
        let version = |arguments: &[&str]| {
            let arguments: Vec<_> = arguments.iter().map(OsString::from).collect();
            match Cli::parse(&arguments).expect("a version") {
                Parsed::Help(text) => text.to_string(),
                Parsed::Cli(_) => panic!("no version"),
            }
        };
        assert_eq!(
            version(&["x/cloud-hypervisor", "--version"]),
            "cloud-hypervisor v53.0.0\n"
        );
        assert_eq!(
            version(&["triarch", "--compat", "cloud-hypervisor", "-V"]),
            "cloud-hypervisor v53.0.0\n"
        );
        assert_eq!(
            version(&["triarch", "--version"]),
            concat!("triarch ", env!("CARGO_PKG_VERSION"), "\n")
        );
    }
}
