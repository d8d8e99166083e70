//! Network cards, and any other Ethernet interface of the host, by packet sockets (packet(7)).

#![allow(unsafe_code)] // socket options and addresses

use std::ffi::c_int;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use thiserror::Error;
use triarch_net::PacketQueue;

use crate::offload::{Accepts, LEGACY_HEADER};
use crate::plane::HostEnd;

/// Bytes that may wait in each direction: a hundred large segments.
const BUFFER: c_int = 8 << 20;

/// Why an interface cannot be a port.
#[derive(Debug, Error)]
pub enum CardError {
    /// The name is none that an interface can have.
    #[error("`{0}` is not an interface name; use 1 to 15 characters without `/`, `:` and blanks")]
    Name(String),
    /// There is none of that name.
    #[error("there is no interface {0}")]
    Missing(String),
    /// Packet sockets are for those with a capability.
    #[error("no permission for a packet socket on {0}; run with CAP_NET_RAW, or pass an open one with the request")]
    Permission(String),
    /// It carries something else.
    #[error("interface {0} is not an Ethernet interface")]
    NotEthernet(String),
    /// Nothing goes through it.
    #[error("interface {0} is down; bring it up with `ip link set {0} up`")]
    Down(String),
    /// A descriptor that was handed in is something else.
    #[error(
        "the descriptor for {0} is not a raw packet socket that is bound to an interface for all protocols; pass one, and no other"
    )]
    BadFd(String),
    /// The system refused in a way that has no entry above.
    #[error("cannot {what} of {name}")]
    System {
        /// What was being done.
        what: &'static str,
        /// The interface.
        name: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// The interface `name`: all frames that come in there, those for other stations too, and a way out. It has to be up. What the host
/// itself sends there is not seen. `fds` may have an open packet socket to be used instead of a new one.
pub fn card(name: &str, mut fds: Vec<OwnedFd>) -> Result<HostEnd, CardError> {
    let bad_name = name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', ':', ' ']);
    if bad_name {
        return Err(CardError::Name(name.to_owned()));
    }
    let failed = |what| {
        let name = name.to_owned();
        move |source| CardError::System { what, name, source }
    };
    let given = fds.pop();
    if !fds.is_empty() {
        return Err(CardError::BadFd(name.to_owned()));
    }
    let socket = match given {
        Some(socket) => socket,
        None => open(name)?,
    };
    let address = bound(&socket).ok_or_else(|| CardError::BadFd(name.to_owned()))?;
    if address.sll_hatype != libc::ARPHRD_ETHER {
        return Err(CardError::NotEthernet(name.to_owned()));
    }
    let fd = socket.as_raw_fd();
    let on: c_int = 1;
    let packet = libc::SOL_PACKET;
    // What is undone in a frame is told before it, and is taken so; its tag, which the kernel takes off, is told beside it.
    set(fd, packet, libc::PACKET_VNET_HDR, &on).map_err(failed("pass on the offloads"))?;
    set(fd, packet, libc::PACKET_AUXDATA, &on).map_err(failed("ask for the VLAN tags"))?;
    set(fd, packet, libc::PACKET_IGNORE_OUTGOING, &on).map_err(failed("leave out the outgoing frames"))?;
    // SAFETY: plain data, for which zeroes are valid.
    let mut membership: libc::packet_mreq = unsafe { mem::zeroed() };
    membership.mr_ifindex = address.sll_ifindex;
    membership.mr_type = libc::PACKET_MR_PROMISC as u16;
    // It ends with the socket.
    set(fd, packet, libc::PACKET_ADD_MEMBERSHIP, &membership).map_err(failed("see all frames"))?;
    for (forced, limited) in [
        (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
        (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
    ] {
        // Without CAP_NET_ADMIN it becomes as large as the system lets it.
        if set(fd, libc::SOL_SOCKET, forced, &BUFFER).is_err() {
            set(fd, libc::SOL_SOCKET, limited, &BUFFER).map_err(failed("set the buffers"))?;
        }
    }
    let queue = PacketQueue::new(socket).map_err(failed("make non-blocking the socket"))?;
    Ok(HostEnd {
        queues: vec![Arc::new(queue)],
        header: LEGACY_HEADER,
        tags_beside: true,
        // Rows of UDP datagrams are taken by newer kernels only, and no kernel tells.
        accepts: Accepts {
            uso4: false,
            uso6: false,
            ..Accepts::ALL
        },
        label: format!("interface {name}"),
    })
}

/// A packet socket bound to the interface, which must be up.
pub(crate) fn open(name: &str) -> Result<OwnedFd, CardError> {
    let failed = |what| {
        let name = name.to_owned();
        move |source: io::Error| match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => CardError::Permission(name),
            Some(libc::ENODEV) => CardError::Missing(name),
            _ => CardError::System { what, name, source },
        }
    };
    // No protocol yet: nothing comes before it is bound.
    // SAFETY: takes plain numbers.
    let fd = check(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) })
        .map_err(failed("make a packet socket for frames"))?;
    // SAFETY: the kernel just made this descriptor, and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: plain data, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: the request is a live ifreq with a name that ends within it, which is what this ioctl reads and writes.
    check(unsafe { libc::ioctl(fd, libc::SIOCGIFFLAGS as libc::Ioctl, &raw mut request) })
        .map_err(failed("ask for the state"))?;
    // SAFETY: the kernel has set the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    if flags & libc::IFF_UP as libc::c_short == 0 {
        return Err(CardError::Down(name.to_owned()));
    }
    // SAFETY: as above.
    check(unsafe { libc::ioctl(fd, libc::SIOCGIFINDEX as libc::Ioctl, &raw mut request) })
        .map_err(failed("ask for the number"))?;
    // SAFETY: plain data, for which zeroes are valid.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: the kernel has set the number.
    address.sll_ifindex = unsafe { request.ifr_ifru.ifru_ifindex };
    let len = mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is live and of this length.
    check(unsafe { libc::bind(fd, (&raw const address).cast(), len) }).map_err(failed("bind to frames"))?;
    Ok(socket)
}

/// Where a raw packet socket is bound; `None` for what is no such socket or not bound.
fn bound(socket: &OwnedFd) -> Option<libc::sockaddr_ll> {
    let fd = socket.as_raw_fd();
    if get(fd, libc::SO_DOMAIN).ok()? != libc::AF_PACKET || get(fd, libc::SO_TYPE).ok()? != libc::SOCK_RAW {
        return None;
    }
    // SAFETY: plain data, for which zeroes are valid.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    let mut len = mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes of an address that is live.
    check(unsafe { libc::getsockname(fd, (&raw mut address).cast(), &raw mut len) }).ok()?;
    (address.sll_ifindex > 0 && address.sll_protocol == (libc::ETH_P_ALL as u16).to_be()).then_some(address)
}

fn set<T>(fd: RawFd, level: c_int, option: c_int, value: &T) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value is live and of this length.
    check(unsafe { libc::setsockopt(fd, level, option, (&raw const *value).cast(), len) }).map(drop)
}

fn get(fd: RawFd, option: c_int) -> io::Result<c_int> {
    let mut value: c_int = 0;
    let mut len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes an int into one that is live.
    check(unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut len) })?;
    Ok(value)
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
