//! Why a tap cannot be used, and what to do about it.

use std::io;
use std::net::IpAddr;

use thiserror::Error;

/// Why a tap interface could not be opened or configured.
#[derive(Debug, Error)]
pub enum TapError {
    /// The host has no tap driver.
    #[error("the host has no /dev/net/tun; load the module with `modprobe tun`, or pass an open tap with fd=")]
    NoDriver(#[source] io::Error),
    /// The tap driver's device file may not be opened.
    #[error("no permission to open /dev/net/tun; run with access to it, or pass an open tap with fd=")]
    NoDriverPermission(#[source] io::Error),
    /// The name is not one an interface can have.
    #[error("`{0}` is not an interface name; use 1 to 15 characters without `/`, `:` and blanks")]
    Name(String),
    /// Neither does the interface exist nor may it be created.
    #[error(
        "there is no interface {0} and no permission to create it; create it with \
         `ip tuntap add {0} mode tap user USER`, or run with CAP_NET_ADMIN"
    )]
    Missing(String),
    /// The interface belongs to someone else.
    #[error(
        "no permission to use tap {0}; create it with `ip tuntap add {0} mode tap user USER` for the user that runs this"
    )]
    Permission(String),
    /// Another process is attached.
    #[error("tap {0} is in use by another process; stop that one or choose another tap")]
    Busy(String),
    /// The interface is of another kind.
    #[error("interface {0} is not a tap; choose another name, or a tap made with `ip tuntap add NAME mode tap`")]
    NotTap(String),
    /// A queue for each queue pair needs a multi-queue interface.
    #[error(
        "tap {0} has a single queue; create it with `ip tuntap add {0} mode tap multi_queue`, or ask for one queue pair \
         (num_queues=2)"
    )]
    NotMultiQueue(String),
    /// No queue, or more than a tap can have.
    #[error("{0} queue pairs asked for; a tap has 1 to 256")]
    QueueCount(usize),
    /// A descriptor handed in is no tap.
    #[error("descriptor number {} of those passed is not an attached tap; pass one on which TUNSETIFF was done", .index + 1)]
    BadFd {
        /// Its place among the descriptors given.
        index: usize,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A descriptor handed in was opened with other flags than needed.
    #[error(
        "descriptor number {} of those passed ({name}) was opened without {flag}; open the tap with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR",
        .index + 1
    )]
    FdFlags {
        /// Its place among the descriptors given.
        index: usize,
        /// The interface it is attached to.
        name: String,
        /// The flag that is missing.
        flag: &'static str,
    },
    /// The descriptors handed in lead to different interfaces.
    #[error("the descriptors belong to different interfaces, {first} and {other}; pass the queues of one")]
    FdsDiffer {
        /// Interface of the first.
        first: String,
        /// Interface of another.
        other: String,
    },
    /// The interface is not in the network namespace this process is in.
    #[error("interface {0} is in another network namespace; make this setting there before passing the descriptor")]
    OtherNamespace(String),
    /// Something about the interface could not be set.
    #[error("cannot set the {what} of {name}; it takes CAP_NET_ADMIN and an interface that allows it")]
    Set {
        /// What was being set, with its value.
        what: String,
        /// The interface.
        name: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// An address and a mask that do not belong together.
    #[error("{mask} is not a netmask for {address}; use one of the same family whose ones come first")]
    Mask {
        /// The address.
        address: IpAddr,
        /// The mask.
        mask: IpAddr,
    },
    /// The system refused in a way that has no entry above.
    #[error("cannot {what}")]
    System {
        /// What was being done.
        what: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
}
