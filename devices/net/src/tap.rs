//! Tap interfaces: opening, settings, and putting settings back.

use std::fs::OpenOptions;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::sys::{self, NAME_LEN, Request};
use crate::{HEADER_LEN, Offloads, PacketBackend, PacketQueue, TapError};

/// The kernel's limit (MAX_TAP_QUEUES).
const MAX_QUEUES: usize = 256;
/// The kernel puts a free number in the place of `%d`.
const DEFAULT_NAME: &str = "vmtap%d";
const FLAGS: u16 = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
const MULTI_QUEUE: u16 = libc::IFF_MULTI_QUEUE as u16;
const PERSIST: u16 = libc::IFF_PERSIST as u16;

/// How to undo one setting.
enum Undo {
    HeaderLen(i32),
    Offloads,
    Mac([u8; 6]),
    Mtu(i32),
    Down,
    Ipv4(Ipv4),
    Ipv6 { address: Ipv6Addr, prefix: u32 },
}

/// An interface's IPv4 address, unspecified when it has none.
#[derive(Clone, Copy)]
struct Ipv4 {
    address: Ipv4Addr,
    mask: Ipv4Addr,
    broadcast: Ipv4Addr,
}

/// A tap interface of the host with one or more queues.
///
/// An interface that [`open`](Self::open) created goes when the last of its queues is dropped. One that was there before stays,
/// and dropping the `Tap` puts its settings back.
pub struct Tap {
    name: String,
    queues: Vec<Arc<PacketQueue>>,
    /// Which queues are in use; empty when the interface has only one and they cannot be taken out.
    active: Mutex<Vec<bool>>,
    offloads: Offloads,
    /// For ioctls by name; `None` when the interface is in another network namespace.
    socket: Option<OwnedFd>,
    /// What to put back, oldest first; stays empty for an interface that goes with us.
    undo: Vec<Undo>,
    ours: bool,
}

impl Tap {
    /// Attaches `queues` queues (1 to 256) to the tap interface `name`, which is created if it does not exist. Without a name the
    /// kernel picks one that is free.
    pub fn open(name: Option<&str>, queues: usize) -> Result<Self, TapError> {
        if queues == 0 || queues > MAX_QUEUES {
            return Err(TapError::QueueCount(queues));
        }
        let wanted = name.unwrap_or(DEFAULT_NAME);
        check_name(wanted)?;
        let socket = control_socket()?;
        let existed = index(socket.as_fd(), wanted).is_ok();
        let mut flags = FLAGS | if queues > 1 { MULTI_QUEUE } else { 0 };
        let mut attached = attach(wanted, flags);
        if queues == 1 && existed && matches!(&attached, Err(Attach::Set(e)) if e.raw_os_error() == Some(libc::EINVAL))
        {
            // It may be a multi-queue interface, of which one queue will do.
            flags |= MULTI_QUEUE;
            attached = attach(wanted, flags);
        }
        let (first, name) = attached.map_err(|e| attach_error(e, wanted, existed, socket.as_fd()))?;
        let mut info = Request::new("");
        sys::request(first.as_fd(), libc::TUNGETIFF as libc::c_ulong, &mut info).map_err(|source| {
            TapError::System {
                what: "ask for the flags of a tap",
                source,
            }
        })?;
        let persistent = info.flags() & PERSIST != 0;
        if existed && !persistent {
            // It lives through someone else's descriptor; a multi-queue interface lets us in beside them.
            return Err(TapError::Busy(name));
        }
        let mut fds = vec![first];
        while fds.len() < queues {
            let (fd, _) = attach(&name, flags).map_err(|e| attach_error(e, &name, existed, socket.as_fd()))?;
            fds.push(fd);
        }
        Self::set_up(name, fds, flags & MULTI_QUEUE != 0, Some(socket), !persistent)
    }

    /// Takes over open taps: all queues of one interface, opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR. Their interface stays
    /// when they are dropped, unless they were all that kept it.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Self, TapError> {
        if fds.is_empty() || fds.len() > MAX_QUEUES {
            return Err(TapError::QueueCount(fds.len()));
        }
        let mut interface: Option<(String, u16)> = None;
        for (index, fd) in fds.iter().enumerate() {
            let mut info = Request::new("");
            sys::request(fd.as_fd(), libc::TUNGETIFF as libc::c_ulong, &mut info)
                .map_err(|source| TapError::BadFd { index, source })?;
            let (name, flags) = (info.name(), info.flags());
            let needed = [
                (libc::IFF_TAP, "IFF_TAP"),
                (libc::IFF_NO_PI, "IFF_NO_PI"),
                (libc::IFF_VNET_HDR, "IFF_VNET_HDR"),
            ];
            if let Some(&(_, flag)) = needed.iter().find(|(bit, _)| flags & *bit as u16 == 0) {
                return Err(TapError::FdFlags { index, name, flag });
            }
            match &interface {
                Some((first, _)) if *first != name => {
                    return Err(TapError::FdsDiffer {
                        first: first.clone(),
                        other: name,
                    });
                }
                Some(_) => {}
                None => interface = Some((name, flags)),
            }
        }
        let (name, flags) = interface.unwrap_or_default();
        let socket = control_socket()?;
        let here = same_interface(fds[0].as_fd(), socket.as_fd(), &name);
        Self::set_up(name, fds, flags & MULTI_QUEUE != 0, here.then_some(socket), false)
    }

    fn set_up(
        name: String,
        fds: Vec<OwnedFd>,
        multi: bool,
        socket: Option<OwnedFd>,
        ours: bool,
    ) -> Result<Self, TapError> {
        let failed = |what| move |source| TapError::System { what, source };
        let mut undo = Vec::new();
        let first = fds[0].as_fd();
        let before = sys::header_len(first).map_err(failed("ask for a tap's header length"))?;
        if before != HEADER_LEN as i32 {
            sys::set_header_len(first, HEADER_LEN as i32).map_err(failed("set a tap's header length"))?;
            undo.push(Undo::HeaderLen(before));
        }
        undo.push(Undo::Offloads);
        let offloads = probe_offloads(first);
        let queues = fds
            .into_iter()
            .map(|fd| PacketQueue::new(fd).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()
            .map_err(failed("make a tap non-blocking"))?;
        let active = if multi { vec![true; queues.len()] } else { Vec::new() };
        Ok(Self {
            name,
            queues,
            active: Mutex::new(active),
            offloads,
            socket,
            undo,
            ours,
        })
    }

    /// Name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Hardware address of the host's end.
    pub fn mac(&self) -> io::Result<[u8; 6]> {
        let mut request = Request::new(&self.name);
        sys::request(
            self.queues[0].as_fd(),
            libc::SIOCGIFHWADDR as libc::c_ulong,
            &mut request,
        )?;
        Ok(request.mac())
    }

    /// Sets the hardware address of the host's end.
    pub fn set_mac(&mut self, mac: [u8; 6]) -> Result<(), TapError> {
        let text = mac.map(|b| format!("{b:02x}")).join(":");
        let failed = |source| self.set_error(format!("hardware address {text}"), source);
        let before = self.mac().map_err(failed)?;
        if before != mac {
            let mut request = Request::new(&self.name).with_mac(mac);
            sys::request(
                self.queues[0].as_fd(),
                libc::SIOCSIFHWADDR as libc::c_ulong,
                &mut request,
            )
            .map_err(|source| self.set_error(format!("hardware address {text}"), source))?;
            self.undo.push(Undo::Mac(before));
        }
        Ok(())
    }

    /// Sets the largest frame without its Ethernet header, in bytes.
    pub fn set_mtu(&mut self, mtu: u16) -> Result<(), TapError> {
        let mtu = i32::from(mtu);
        let before = self.get(libc::SIOCGIFMTU, &format!("MTU {mtu}"))?.int();
        if before != mtu {
            self.set(
                libc::SIOCSIFMTU,
                Request::new(&self.name).with_int(mtu),
                &format!("MTU {mtu}"),
            )?;
            self.undo.push(Undo::Mtu(before));
        }
        Ok(())
    }

    /// Brings the interface up.
    pub fn bring_up(&mut self) -> Result<(), TapError> {
        let what = "state up";
        let flags = self.get(libc::SIOCGIFFLAGS, what)?.flags();
        let up = libc::IFF_UP as u16;
        if flags & up == 0 {
            self.set(
                libc::SIOCSIFFLAGS,
                Request::new(&self.name).with_flags(flags | up),
                what,
            )?;
            self.undo.push(Undo::Down);
        }
        Ok(())
    }

    /// Gives the host's end an address, with a mask of the same family.
    pub fn set_address(&mut self, address: IpAddr, mask: IpAddr) -> Result<(), TapError> {
        let prefix = prefix_len(address, mask).ok_or(TapError::Mask { address, mask })?;
        match (address, mask) {
            (IpAddr::V4(address), IpAddr::V4(mask)) => self.set_ipv4(address, mask, prefix),
            (IpAddr::V6(address), _) => self.set_ipv6(address, prefix),
            _ => Err(TapError::Mask { address, mask }),
        }
    }

    fn set_ipv4(&mut self, address: Ipv4Addr, mask: Ipv4Addr, prefix: u32) -> Result<(), TapError> {
        let what = format!("address {address}/{prefix}");
        // Address families have ioctls of their own; this one needs their socket.
        let inet = sys::socket(libc::AF_INET).map_err(|e| self.set_error(what.clone(), e))?;
        let before = read_ipv4(inet.as_fd(), &self.name);
        if (before.address, before.mask) == (address, mask) {
            return Ok(());
        }
        self.home()?;
        let broadcast = address | !mask;
        let after = Ipv4 {
            address,
            mask,
            broadcast,
        };
        write_ipv4(inet.as_fd(), &self.name, after).map_err(|e| self.set_error(what, e))?;
        self.undo.push(Undo::Ipv4(before));
        Ok(())
    }

    fn set_ipv6(&mut self, address: Ipv6Addr, prefix: u32) -> Result<(), TapError> {
        let what = format!("address {address}/{prefix}");
        let socket = self.home()?;
        let done = index(socket, &self.name).and_then(|index| {
            let inet6 = sys::socket(libc::AF_INET6)?;
            sys::ipv6_address(
                inet6.as_fd(),
                libc::SIOCSIFADDR as libc::c_ulong,
                index,
                address,
                prefix,
            )
        });
        match done {
            Ok(()) => self.undo.push(Undo::Ipv6 { address, prefix }),
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
            Err(e) => return Err(self.set_error(what, e)),
        }
        Ok(())
    }

    fn home(&self) -> Result<BorrowedFd<'_>, TapError> {
        self.socket
            .as_ref()
            .map(AsFd::as_fd)
            .ok_or_else(|| TapError::OtherNamespace(self.name.clone()))
    }

    fn get(&self, code: impl Into<libc::c_ulong>, what: &str) -> Result<Request, TapError> {
        let mut request = Request::new(&self.name);
        sys::request(self.home()?, code.into(), &mut request).map_err(|e| self.set_error(what.to_owned(), e))?;
        Ok(request)
    }

    fn set(&self, code: impl Into<libc::c_ulong>, mut request: Request, what: &str) -> Result<(), TapError> {
        sys::request(self.home()?, code.into(), &mut request).map_err(|e| self.set_error(what.to_owned(), e))
    }

    fn set_error(&self, what: String, source: io::Error) -> TapError {
        TapError::Set {
            what,
            name: self.name.clone(),
            source,
        }
    }

    fn put_back(&self, undo: &Undo) -> io::Result<()> {
        let tap = self.queues[0].as_fd();
        let name = Request::new(&self.name);
        let by_name = |code: libc::c_ulong, mut request: Request| match &self.socket {
            Some(socket) => sys::request(socket.as_fd(), code, &mut request),
            None => Ok(()),
        };
        match *undo {
            Undo::HeaderLen(len) => sys::set_header_len(tap, len),
            Undo::Offloads => sys::set_offload(tap, 0),
            Undo::Mac(mac) => sys::request(tap, libc::SIOCSIFHWADDR as libc::c_ulong, &mut name.with_mac(mac)),
            Undo::Mtu(mtu) => by_name(libc::SIOCSIFMTU as libc::c_ulong, name.with_int(mtu)),
            Undo::Down => {
                let mut flags = name;
                if let Some(socket) = &self.socket {
                    sys::request(socket.as_fd(), libc::SIOCGIFFLAGS as libc::c_ulong, &mut flags)?;
                }
                let down = flags.flags() & !(libc::IFF_UP as u16);
                by_name(libc::SIOCSIFFLAGS as libc::c_ulong, name.with_flags(down))
            }
            Undo::Ipv4(before) => write_ipv4(sys::socket(libc::AF_INET)?.as_fd(), &self.name, before),
            Undo::Ipv6 { address, prefix } => {
                let Some(socket) = &self.socket else { return Ok(()) };
                let index = index(socket.as_fd(), &self.name)?;
                let inet6 = sys::socket(libc::AF_INET6)?;
                sys::ipv6_address(
                    inet6.as_fd(),
                    libc::SIOCDIFADDR as libc::c_ulong,
                    index,
                    address,
                    prefix,
                )
            }
        }
    }
}

impl PacketBackend for Tap {
    fn queues(&self) -> &[Arc<PacketQueue>] {
        &self.queues
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let mut offloads = offloads & self.offloads;
        let uso = Offloads::USO4 | Offloads::USO6;
        if !offloads.contains(uso) {
            // The kernel takes both or none.
            offloads -= uso;
        }
        if !offloads.contains(Offloads::CSUM) {
            offloads = Offloads::empty();
        }
        sys::set_offload(self.queues[0].as_fd(), offloads.bits())
    }

    fn set_queue_active(&self, index: usize, active: bool) -> io::Result<()> {
        let mut states = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(state), Some(queue)) = (states.get_mut(index), self.queues.get(index)) else {
            return Ok(());
        };
        if *state != active {
            let flag = if active {
                libc::IFF_ATTACH_QUEUE
            } else {
                libc::IFF_DETACH_QUEUE
            };
            let mut request = Request::new("").with_flags(flag as u16);
            sys::request(queue.as_fd(), libc::TUNSETQUEUE as libc::c_ulong, &mut request)?;
            *state = active;
        }
        Ok(())
    }

    fn mtu(&self) -> Option<u32> {
        let mut request = Request::new(&self.name);
        sys::request(
            self.socket.as_ref()?.as_fd(),
            libc::SIOCGIFMTU as libc::c_ulong,
            &mut request,
        )
        .ok()?;
        u32::try_from(request.int()).ok()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if self.ours {
            return;
        }
        for undo in self.undo.iter().rev() {
            // Nothing better can be done here than to go on with the others.
            let _ = self.put_back(undo);
        }
    }
}

/// What failed when attaching.
enum Attach {
    Open(io::Error),
    Set(io::Error),
}

/// Opens one queue of interface `name`; returns it with the name the kernel settled on.
fn attach(name: &str, flags: u16) -> Result<(OwnedFd, String), Attach> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(Attach::Open)?;
    let mut request = Request::new(name).with_flags(flags);
    sys::request(file.as_fd(), libc::TUNSETIFF as libc::c_ulong, &mut request).map_err(Attach::Set)?;
    Ok((file.into(), request.name()))
}

fn attach_error(error: Attach, name: &str, existed: bool, socket: BorrowedFd<'_>) -> TapError {
    let name = name.to_owned();
    let source = match error {
        Attach::Open(e) if e.kind() == io::ErrorKind::PermissionDenied => return TapError::NoDriverPermission(e),
        Attach::Open(e) => return TapError::NoDriver(e),
        Attach::Set(e) => e,
    };
    match source.raw_os_error() {
        Some(libc::EPERM) if existed => TapError::Permission(name),
        Some(libc::EPERM) => TapError::Missing(name),
        Some(libc::EBUSY) => TapError::Busy(name),
        Some(libc::EINVAL) if existed => match sys::driver(socket, &name) {
            Ok((driver, place)) if driver == "tun" && place == "tap" => TapError::NotMultiQueue(name),
            _ => TapError::NotTap(name),
        },
        _ => TapError::System {
            what: "attach to a tap",
            source,
        },
    }
}

fn check_name(name: &str) -> Result<(), TapError> {
    let bad = |b: u8| b == b'/' || b == b':' || b == 0 || b.is_ascii_whitespace();
    if name.is_empty() || name.len() >= NAME_LEN || name == "." || name == ".." || name.bytes().any(bad) {
        return Err(TapError::Name(name.to_owned()));
    }
    Ok(())
}

fn control_socket() -> Result<OwnedFd, TapError> {
    // Any family serves for interfaces, and this one is there on every host.
    sys::socket(libc::AF_UNIX).map_err(|source| TapError::System {
        what: "make a socket to configure interfaces with",
        source,
    })
}

fn index(socket: BorrowedFd<'_>, name: &str) -> io::Result<i32> {
    let mut request = Request::new(name);
    sys::request(socket, libc::SIOCGIFINDEX as libc::c_ulong, &mut request)?;
    Ok(request.int())
}

/// Whether the interface behind `tap` is the one called `name` here: both must answer with the same hardware address.
fn same_interface(tap: BorrowedFd<'_>, socket: BorrowedFd<'_>, name: &str) -> bool {
    let mac = |fd| {
        let mut request = Request::new(name);
        sys::request(fd, libc::SIOCGIFHWADDR as libc::c_ulong, &mut request).map(|()| request.mac())
    };
    matches!((mac(tap), mac(socket)), (Ok(a), Ok(b)) if a == b)
}

fn read_ipv4(inet: BorrowedFd<'_>, name: &str) -> Ipv4 {
    // An interface without an address answers with an error.
    let read = |code| {
        let mut request = Request::new(name);
        match sys::request(inet, code as libc::c_ulong, &mut request) {
            Ok(()) => request.ipv4(),
            Err(_) => Ipv4Addr::UNSPECIFIED,
        }
    };
    Ipv4 {
        address: read(libc::SIOCGIFADDR),
        mask: read(libc::SIOCGIFNETMASK),
        broadcast: read(libc::SIOCGIFBRDADDR),
    }
}

fn write_ipv4(inet: BorrowedFd<'_>, name: &str, to: Ipv4) -> io::Result<()> {
    let name = Request::new(name);
    let write = |code, value| sys::request(inet, code as libc::c_ulong, &mut name.with_ipv4(value));
    write(libc::SIOCSIFADDR, to.address)?;
    if to.address.is_unspecified() {
        // That took the address away, and there is nothing left to mask.
        return Ok(());
    }
    write(libc::SIOCSIFNETMASK, to.mask)?;
    write(libc::SIOCSIFBRDADDR, to.broadcast)
}

/// Length of `mask` as a prefix; `None` if it is of the wrong family or has holes.
pub(crate) fn prefix_len(address: IpAddr, mask: IpAddr) -> Option<u32> {
    let (bits, width) = match (address, mask) {
        (IpAddr::V4(_), IpAddr::V4(m)) => (u128::from(u32::from(m)) << 96, 32),
        (IpAddr::V6(_), IpAddr::V6(m)) => (u128::from(m), 128),
        _ => return None,
    };
    let ones = bits.leading_ones();
    (ones <= width && bits.count_ones() == ones).then_some(ones)
}

/// Finds out what this kernel's TUNSETOFFLOAD takes, and leaves everything off.
fn probe_offloads(tap: BorrowedFd<'_>) -> Offloads {
    let mut taken = Offloads::empty();
    let groups = [
        Offloads::CSUM,
        Offloads::TSO4 | Offloads::TSO6 | Offloads::TSO_ECN,
        Offloads::UFO,
        Offloads::USO4 | Offloads::USO6,
    ];
    for group in groups {
        if sys::set_offload(tap, (taken | group).bits()).is_ok() {
            taken |= group;
        }
    }
    let _ = sys::set_offload(tap, 0);
    taken
}
