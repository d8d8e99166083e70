//! Cloud Hypervisor's command line, as those who drive it expect it.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::{Arg, ArgAction, ArgMatches, Command};
use triarch_api::server::Identity;

/// Which program this is to whoever started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Personality {
    /// Itself.
    Triarch,
    /// The version of Cloud Hypervisor whose dialect this is; libvirt and Kata look at it.
    CloudHypervisor,
}

/// The name of the other personality.
pub(crate) const CLOUD_HYPERVISOR: &str = "cloud-hypervisor";
const CLOUD_HYPERVISOR_VERSION: &str = "v53.0.0";

/// Flags of Cloud Hypervisor that ask for what this version does not have.
const LACKING: &[&str] = &[
    "dbus-object-path",
    "dbus-service-name",
    "dbus-system-bus",
    "fw-cfg-config",
    "gdb",
    "host-data",
    "igvm",
    "ivshmem",
    "landlock",
    "landlock-rules",
    "no-shutdown",
    "pci-segment",
    "pmem",
    "pvmemcontrol",
    "pvpanic",
    "rate-limit-group",
    "tpm",
    "user-device",
    "vdpa",
    "watchdog",
];

impl Personality {
    /// What the arguments say: the name the program was started by, and `--compat`.
    pub(crate) fn of(arguments: &[OsString]) -> Self {
        let started_as = arguments.first().and_then(|name| Path::new(name).file_name());
        let asked = |pair: &[OsString]| pair[0] == "--compat" && pair[1] == CLOUD_HYPERVISOR;
        let one = |argument: &OsString| argument.to_str() == Some("--compat=cloud-hypervisor");
        if started_as == Some(OsStr::new(CLOUD_HYPERVISOR))
            || arguments.windows(2).any(asked)
            || arguments.iter().any(one)
        {
            Self::CloudHypervisor
        } else {
            Self::Triarch
        }
    }

    /// `command` under this name and version.
    pub(crate) fn name(self, command: Command) -> Command {
        match self {
            Self::Triarch => command,
            Self::CloudHypervisor => command.name(CLOUD_HYPERVISOR).version(CLOUD_HYPERVISOR_VERSION),
        }
    }

    /// What `vmm.ping` says.
    pub(crate) fn identity(self) -> Identity {
        let version = match self {
            Self::Triarch => concat!("v", env!("CARGO_PKG_VERSION")),
            Self::CloudHypervisor => CLOUD_HYPERVISOR_VERSION,
        };
        Identity {
            build_version: version.to_owned(),
            version: version.trim_start_matches('v').to_owned(),
            pid: std::process::id(),
            features: vec!["kvm".to_owned()],
        }
    }
}

/// `command` with Cloud Hypervisor's other flags, whatever their values.
pub(crate) fn with_lacking(command: Command) -> Command {
    command.args(LACKING.iter().map(|name| {
        Arg::new(*name)
            .long(*name)
            .hide(true)
            .num_args(0..)
            .action(ArgAction::Append)
    }))
}

/// The first of those flags that asks for something: a switch, or a value that is not as good as no flag.
pub(crate) fn lacking(matches: &ArgMatches) -> Option<String> {
    let asks = |name: &&&str| {
        let Some(given) = matches.get_occurrences::<String>(name) else {
            return false;
        };
        // Each time it was given.
        given.into_iter().any(|values| {
            let mut values = values.peekable();
            values.peek().is_none() || values.any(|value| !is_nothing(value))
        })
    };
    let name = LACKING.iter().find(asks)?;
    Some(format!("--{name} is not supported by this version; leave it out"))
}

/// `off`, or `key=value` of nothing but such.
fn is_nothing(value: &str) -> bool {
    let off = |text: &str| matches!(text, "off" | "false" | "0");
    value
        .split(',')
        .all(|part| off(part.split_once('=').map_or(part, |(_, value)| value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn personality(arguments: &[&str]) -> Personality {
        Personality::of(&arguments.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn name_and_flag_make_it_the_other() {
        use Personality::{CloudHypervisor, Triarch};
        for (arguments, expected) in [
            (&["/usr/bin/cloud-hypervisor", "--version"][..], CloudHypervisor),
            (&["cloud-hypervisor"], CloudHypervisor),
            (
                &["triarch", "--version", "--compat", "cloud-hypervisor"],
                CloudHypervisor,
            ),
            (&["triarch", "--compat=cloud-hypervisor"], CloudHypervisor),
            (&["triarch", "--cmdline", "cloud-hypervisor"], Triarch),
            (&["cloud-hypervisor/triarch"], Triarch),
            (&[], Triarch),
        ] {
            assert_eq!(personality(arguments), expected, "{arguments:?}");
        }
        let identity = Personality::CloudHypervisor.identity();
        assert_eq!((&*identity.build_version, &*identity.version), ("v53.0.0", "53.0.0"));
    }

    #[test]
    fn flags_it_lacks_are_refused_unless_they_ask_for_nothing() {
        let refusal = |arguments: &[&str]| {
            let matches = with_lacking(Command::new("x")).no_binary_name(true);
            lacking(&matches.try_get_matches_from(arguments).expect("parsed"))
        };
        for (arguments, name) in [
            (&["--watchdog"][..], Some("--watchdog")),
            (&["--watchdog", "off"], None),
            (&["--watchdog", "off", "--watchdog"], Some("--watchdog")),
            (&["--pvpanic", "a=0"], None),
            (&["--pvpanic", "a=0,b=off"], None),
            (&["--pvpanic", "a=0,b=on"], Some("--pvpanic")),
            (&["--pmem", "file=a", "--landlock=false"], Some("--pmem")),
            (
                &["--rate-limit-group", "id=a,bw_size=1", "id=b"],
                Some("--rate-limit-group"),
            ),
            (&[], None),
        ] {
            let expected = name.map(|name| format!("{name} is not supported by this version; leave it out"));
            assert_eq!(refusal(arguments), expected, "{arguments:?}");
        }
    }
}
