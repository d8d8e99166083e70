//! The ioctls of netdevice(7) and of the kernel's tun driver (Documentation/networking/tuntap.rst), in safe clothes.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Bytes of an interface's name with its terminating zero (IFNAMSIZ).
pub(crate) const NAME_LEN: usize = 16;
/// ETHTOOL_GDRVINFO.
const GET_DRIVER: u32 = 3;

/// `struct ifreq`: an interface's name and 24 bytes that mean something else for every request.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    name: [u8; NAME_LEN],
    data: [u8; 24],
}

impl Request {
    /// About the interface called `name`, which was checked to be shorter than [`NAME_LEN`].
    pub(crate) fn new(name: &str) -> Self {
        let mut request = Self {
            name: [0; NAME_LEN],
            data: [0; 24],
        };
        let n = name.len().min(NAME_LEN - 1);
        request.name[..n].copy_from_slice(&name.as_bytes()[..n]);
        request
    }

    /// The name the kernel filled in.
    pub(crate) fn name(&self) -> String {
        let end = self.name.iter().position(|b| *b == 0).unwrap_or(NAME_LEN);
        String::from_utf8_lossy(&self.name[..end]).into_owned()
    }

    pub(crate) fn with_flags(mut self, flags: u16) -> Self {
        self.data[..2].copy_from_slice(&flags.to_ne_bytes());
        self
    }

    pub(crate) fn flags(&self) -> u16 {
        u16::from_ne_bytes([self.data[0], self.data[1]])
    }

    pub(crate) fn with_int(mut self, value: i32) -> Self {
        self.data[..4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    pub(crate) fn int(&self) -> i32 {
        i32::from_ne_bytes([self.data[0], self.data[1], self.data[2], self.data[3]])
    }

    /// With an IPv4 `struct sockaddr_in`.
    pub(crate) fn with_ipv4(mut self, address: Ipv4Addr) -> Self {
        self.data = [0; 24];
        self.data[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        self.data[4..8].copy_from_slice(&address.octets());
        self
    }

    pub(crate) fn ipv4(&self) -> Ipv4Addr {
        Ipv4Addr::new(self.data[4], self.data[5], self.data[6], self.data[7])
    }

    /// With a hardware address (`struct sockaddr` of ARPHRD_ETHER).
    pub(crate) fn with_mac(mut self, mac: [u8; 6]) -> Self {
        self.data = [0; 24];
        self.data[..2].copy_from_slice(&libc::ARPHRD_ETHER.to_ne_bytes());
        self.data[2..8].copy_from_slice(&mac);
        self
    }

    pub(crate) fn mac(&self) -> [u8; 6] {
        let mut mac = [0; 6];
        mac.copy_from_slice(&self.data[2..8]);
        mac
    }
}

/// Performs an ioctl that reads and writes a [`Request`].
pub(crate) fn request(fd: BorrowedFd<'_>, code: libc::c_ulong, request: &mut Request) -> io::Result<()> {
    // SAFETY: `request` has the layout and size of `struct ifreq`, which every code used here takes, and outlives the call; no
    // code used here follows a pointer in it, except SIOCETHTOOL, which `driver` below calls on its own.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), code as libc::Ioctl, request as *mut Request) })
}

/// TUNSETOFFLOAD.
pub(crate) fn set_offload(fd: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    // SAFETY: this ioctl takes its argument by value.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
}

/// TUNGETVNETHDRSZ.
pub(crate) fn header_len(fd: BorrowedFd<'_>) -> io::Result<i32> {
    let mut len: i32 = 0;
    // SAFETY: the kernel writes an int through a pointer that outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETVNETHDRSZ, &mut len as *mut i32) })?;
    Ok(len)
}

/// TUNSETVNETHDRSZ.
pub(crate) fn set_header_len(fd: BorrowedFd<'_>, len: i32) -> io::Result<()> {
    // SAFETY: the kernel reads an int through a pointer that outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &len as *const i32) })
}

/// `struct ethtool_drvinfo`, of which only two strings matter here.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    version: [u8; 32],
    firmware: [u8; 32],
    bus: [u8; 32],
    rest: [u8; 64],
}

/// The driver of an interface and its place, for a tap "tun" and "tap".
pub(crate) fn driver(socket: BorrowedFd<'_>, name: &str) -> io::Result<(String, String)> {
    let mut info = DriverInfo {
        command: GET_DRIVER,
        driver: [0; 32],
        version: [0; 32],
        firmware: [0; 32],
        bus: [0; 32],
        rest: [0; 64],
    };
    let mut request = Request::new(name);
    let address = (&raw mut info) as usize;
    request.data[..size_of::<usize>()].copy_from_slice(&address.to_ne_bytes());
    // SAFETY: the request carries a pointer to a buffer of the size of `struct ethtool_drvinfo` (196 bytes), which GDRVINFO
    // fills; both outlive the call.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCETHTOOL as libc::Ioctl,
            &mut request as *mut Request,
        )
    })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    Ok((text(&info.driver), text(&info.bus)))
}

/// Adds or takes away an IPv6 address.
pub(crate) fn ipv6_address(
    socket: BorrowedFd<'_>,
    code: libc::c_ulong,
    index: i32,
    address: Ipv6Addr,
    prefix: u32,
) -> io::Result<()> {
    let request = libc::in6_ifreq {
        ifr6_addr: libc::in6_addr {
            s6_addr: address.octets(),
        },
        ifr6_prefixlen: prefix,
        ifr6_ifindex: index,
    };
    // SAFETY: on an AF_INET6 socket SIOCSIFADDR and SIOCDIFADDR take `struct in6_ifreq`, which outlives the call.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            code as libc::Ioctl,
            &request as *const libc::in6_ifreq,
        )
    })
}

/// A socket of `family` for ioctls.
pub(crate) fn socket(family: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: the descriptor is new and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets O_NONBLOCK.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: takes no pointers.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    check(flags)?;
    if flags & libc::O_NONBLOCK != 0 {
        return Ok(());
    }
    // SAFETY: takes no pointers.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
