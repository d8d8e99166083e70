//! The host's side of network tests: a network namespace of the test's own, and tap interfaces in
//! it. Both vanish with the test's process.
#![allow(unsafe_code)]

use anyhow::{Context, Result, bail, ensure};
use std::ffi::{CString, c_int};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::mem;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};
use triarch_guest_init::interface_up;

/// Moves this thread, and what it starts from now on, into a new network namespace, in which only
/// the loopback interface is, and up. Call it before threads or VMs are started.
///
/// # Errors
/// No permission: it takes CAP_SYS_ADMIN.
pub fn enter_namespace() -> Result<()> {
    // SAFETY: takes plain flags and changes only which network this thread sees.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    if result < 0 {
        return Err(io::Error::last_os_error()).context("cannot make a network namespace");
    }
    interface_up("lo").context("cannot bring lo up")
}

/// Why network tests cannot run here, if they cannot.
pub fn unavailable() -> Option<String> {
    // SAFETY: takes nothing.
    if unsafe { libc::geteuid() } != 0 {
        return Some("network namespaces and tap interfaces need root".into());
    }
    let tun = File::options().read(true).write(true).open("/dev/net/tun");
    tun.err().map(|e| format!("/dev/net/tun: {e}"))
}

/// The names of the interfaces in this thread's namespace.
///
/// # Errors
/// `/proc` is missing.
pub fn interfaces() -> Result<Vec<String>> {
    let table = fs::read_to_string("/proc/thread-self/net/dev")?;
    let names = table.lines().skip(2).filter_map(|line| line.split_once(':'));
    Ok(names.map(|(name, _)| name.trim().to_owned()).collect())
}

/// A persistent tap interface, such as an administrator or an agent makes for a VM.
#[derive(Debug)]
pub struct Tap {
    name: String,
}

impl Tap {
    /// Makes the interface, with several queues if asked, gives it an address and brings it up.
    ///
    /// # Errors
    /// No permission, or there is one of that name.
    pub fn create(name: &str, address: Ipv4Addr, mask: Ipv4Addr, multi_queue: bool) -> Result<Self> {
        let tap = Self::without_address(name, multi_queue)?;
        add_address(name, address, mask)?;
        Ok(tap)
    }

    /// The same without an address, such as a bridge's port is.
    ///
    /// # Errors
    /// As [`Tap::create`].
    pub fn without_address(name: &str, multi_queue: bool) -> Result<Self> {
        if interfaces()?.iter().any(|n| n == name) {
            bail!("there is an interface {name} already");
        }
        let file = attach(name, multi_queue).with_context(|| format!("cannot make the tap interface {name}"))?;
        let keep: c_int = 1;
        // SAFETY: TUNSETPERSIST takes a plain number.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST as _, keep) })?;
        interface_up(name)?;
        Ok(Self { name: name.into() })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Makes a bridge of Linux's with these interfaces as its ports, and brings all of them up.
///
/// # Errors
/// No permission, or there is one of that name, or no such interface, or the kernel has no bridges.
pub fn bridge(name: &str, ports: &[&str]) -> Result<()> {
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    let mut named = request(name)?;
    // SAFETY: the name ends in a zero byte, which `request` sees to, and it is what this ioctl reads.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCBRADDBR, named.ifr_name.as_ptr()) })
        .with_context(|| format!("cannot make the bridge {name}"))?;
    for port in ports {
        let ends = CString::new(*port)?;
        // SAFETY: takes a string that ends in a zero byte.
        let index = unsafe { libc::if_nametoindex(ends.as_ptr()) };
        named.ifr_ifru.ifru_ifindex = c_int::try_from(index)?;
        // SAFETY: the request is a live ifreq, which is what this ioctl reads.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCBRADDIF, &raw const named) })
            .with_context(|| format!("cannot make {port} a port of {name}"))?;
    }
    let mut all = ports.iter().chain([&name]);
    Ok(all.try_for_each(|name| interface_up(name))?)
}

/// Requests of Linux's bridges (linux/sockios.h).
const SIOCBRADDBR: libc::Ioctl = 0x89a0;
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// A socket that is closed when a program is started.
fn socket(domain: c_int, kind: c_int) -> io::Result<OwnedFd> {
    // SAFETY: takes plain numbers.
    let socket = check(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the kernel just made this descriptor and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

/// Makes a wire: a pair of Ethernet interfaces, each of which receives what the other one sends, and brings both up.
///
/// # Errors
/// No permission, or there is one of these names, or the kernel has no veth.
pub fn wire(ends: [&str; 2]) -> Result<()> {
    // The header of a message about an interface, which says nothing.
    const INTERFACE: [u8; 16] = [0; 16];
    const INFO_KIND: u16 = 1;
    const INFO_DATA: u16 = 2;
    const PEER: u16 = 1;
    let name = |name: &str| attribute(libc::IFLA_IFNAME, format!("{name}\0").as_bytes());
    let peer = attribute(PEER, &[&INTERFACE[..], &name(ends[1])].concat());
    let info = [attribute(INFO_KIND, b"veth"), attribute(INFO_DATA, &peer)].concat();
    let body = [&INTERFACE[..], &name(ends[0]), &attribute(libc::IFLA_LINKINFO, &info)].concat();
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    let len = 16 + body.len() as u32;
    let [kind, flags] = [libc::RTM_NEWLINK, flags].map(u16::to_ne_bytes);
    let message = [&len.to_ne_bytes()[..], &kind, &flags, &[0; 8], &body].concat();
    // NETLINK_ROUTE is the protocol 0.
    let mut socket = File::from(socket(libc::AF_NETLINK, libc::SOCK_RAW)?);
    let make = || -> io::Result<i32> {
        socket.write_all(&message)?;
        let mut answer = [0; 512];
        let n = socket.read(&mut answer)?;
        // Behind the header of an acknowledgement stands the error, negated.
        let error = answer[..n].get(16..20).and_then(|bytes| bytes.try_into().ok());
        error
            .map(i32::from_ne_bytes)
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    };
    match { make }() {
        Ok(0) => {}
        Ok(error) => return Err(io::Error::from_raw_os_error(-error)).context("cannot make a wire"),
        Err(error) => return Err(error).context("cannot ask for a wire"),
    }
    Ok(ends.into_iter().try_for_each(interface_up)?)
}

/// An attribute of a netlink message (rtnetlink(7)).
fn attribute(kind: u16, data: &[u8]) -> Vec<u8> {
    let len = 4 + data.len() as u16;
    let mut bytes = [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), data].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Gives an interface an address.
///
/// # Errors
/// No permission, or no such interface.
pub fn add_address(name: &str, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
    set_address(name, libc::SIOCSIFADDR, address)?;
    set_address(name, libc::SIOCSIFNETMASK, mask)
}

/// Bytes and packets that came in at an interface.
///
/// # Errors
/// There is none of that name.
pub fn received(name: &str) -> Result<(u64, u64)> {
    let table = fs::read_to_string("/proc/thread-self/net/dev")?;
    let mut lines = table
        .lines()
        .filter_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'));
    let line = lines.next().with_context(|| format!("there is no {name}"))?;
    let mut numbers = line.split_whitespace().map_while(|word| word.parse().ok());
    numbers.next().zip(numbers.next()).context("no counters")
}

/// Hears what comes in at an interface (packet(7)).
#[derive(Debug)]
pub struct Ear {
    // Receiving is the same for packet sockets.
    socket: UdpSocket,
}

impl Ear {
    /// Hears frames of this EtherType from now on.
    ///
    /// # Errors
    /// No permission, or no such interface.
    pub fn at(interface: &str, ethertype: u16) -> Result<Self> {
        let socket = socket(libc::AF_PACKET, libc::SOCK_RAW)?;
        let name = CString::new(interface)?;
        // SAFETY: takes a string that ends in a zero byte.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        // Which would be all of them.
        ensure!(index != 0, "there is no interface {interface}");
        // SAFETY: sockaddr_ll is plain data, for which zeroes are valid.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = libc::AF_PACKET as libc::c_ushort;
        address.sll_protocol = ethertype.to_be();
        address.sll_ifindex = c_int::try_from(index)?;
        let len = mem::size_of_val(&address) as libc::socklen_t;
        // SAFETY: a live address and its length.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })
            .with_context(|| format!("cannot listen at {interface}"))?;
        Ok(Self { socket: socket.into() })
    }

    /// Waits for a frame that is `wanted`; it begins with its Ethernet header.
    ///
    /// # Errors
    /// None comes within `limit`.
    pub fn hear(&self, limit: Duration, wanted: impl Fn(&[u8]) -> bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut frame = [0; 2048];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // None at all would be for ever.
            self.socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            match self.socket.recv(&mut frame) {
                Ok(len) if wanted(&frame[..len]) => return Ok(()),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error.into()),
                _ if left.is_zero() => bail!("no such frame in {limit:?}"),
                _ => {}
            }
        }
    }
}

/// Opens a tap interface, which is made if there is none of that name, as VMMs do: with virtio-net
/// headers (Linux, Documentation/networking/tuntap.rst).
///
/// # Errors
/// No permission, or another one uses it.
pub fn attach(name: &str, multi_queue: bool) -> io::Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    let queues = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues;
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request is a live ifreq, which is what this ioctl reads and writes.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) })?;
    Ok(file)
}

/// Lets a file's descriptor pass to the programs that are started from now on.
///
/// # Errors
/// The kernel refused.
pub fn inheritable(file: File) -> io::Result<File> {
    // SAFETY: an open descriptor and plain numbers.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) })?;
    Ok(file)
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the interface's name is too long",
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn set_address(name: &str, what: libc::Ioctl, address: Ipv4Addr) -> io::Result<()> {
    let mut request = request(name)?;
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr {
            s_addr: u32::from(address).to_be(),
        },
        sin_zero: [0; 8],
    };
    // SAFETY: both are 16 bytes of plain data, one the general, one the particular form.
    request.ifr_ifru.ifru_addr = unsafe { mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) };
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    // SAFETY: the request is a live ifreq, which is what this ioctl reads.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw const request) }).map(drop)
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::thread;
    use std::time::{Duration, Instant};

    #[test]
    fn a_tap_lives_in_the_threads_own_namespace() {
        if let Some(why) = unavailable() {
            eprintln!("not tried: {why}");
            return;
        }
        let before = interfaces().unwrap();
        let inside = thread::spawn(|| {
            enter_namespace().unwrap();
            assert_eq!(interfaces().unwrap(), ["lo"]);
            let address = Ipv4Addr::new(192, 168, 249, 1);
            let tap = Tap::create("ttest0", address, Ipv4Addr::new(255, 255, 255, 0), false).unwrap();
            assert_eq!(tap.name(), "ttest0");
            // The address is the host's own: it answers there.
            let listener = TcpListener::bind((address, 0)).unwrap();
            TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            // A program that another test starts just now has a copy of each descriptor until it is another program.
            let deadline = Instant::now() + Duration::from_secs(5);
            let open = loop {
                match attach("ttest0", false) {
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                        assert!(Instant::now() < deadline, "{error}");
                        thread::sleep(Duration::from_millis(5));
                    }
                    opened => break opened.unwrap(),
                }
            };
            assert!(attach("ttest0", false).is_err(), "a second user of a single queue");
            drop(open);
            assert!(Tap::create("ttest0", address, address, false).is_err());
            assert!(Tap::create("a_name_that_is_too_long", address, address, false).is_err());
            interfaces().unwrap()
        });
        let inside = inside.join().unwrap();
        assert!(inside.contains(&"ttest0".to_owned()), "{inside:?}");
        assert_eq!(interfaces().unwrap(), before);
    }

    #[test]
    fn a_bridge_has_ports() {
        if let Some(why) = unavailable() {
            eprintln!("not tried: {why}");
            return;
        }
        let inside = thread::spawn(|| {
            enter_namespace().unwrap();
            for port in ["port0", "port1"] {
                Tap::without_address(port, false).unwrap();
            }
            bridge("bridge0", &["port0", "port1"]).unwrap();
            assert!(bridge("bridge0", &[]).is_err(), "there is one of that name");
            assert!(bridge("bridge1", &["port0"]).is_err(), "it is a port already");
            assert!(bridge("bridge2", &["nothing"]).is_err());
        });
        inside.join().unwrap();
    }

    #[test]
    fn a_wire_has_two_ends() {
        if let Some(why) = unavailable() {
            eprintln!("not tried: {why}");
            return;
        }
        let inside = thread::spawn(|| {
            enter_namespace().unwrap();
            wire(["here0", "there0"]).unwrap();
            assert!(wire(["here0", "there1"]).is_err(), "there is one of that name");
            let address = Ipv4Addr::new(192, 168, 249, 1);
            add_address("here0", address, Ipv4Addr::new(255, 255, 255, 0)).unwrap();
            // What is for somebody else there is asked for on the wire.
            let socket = std::net::UdpSocket::bind((address, 0)).unwrap();
            let before = received("there0").unwrap();
            let ear = Ear::at("there0", 0x0806).unwrap();
            let deaf = Ear::at("there0", 0x8035).unwrap();
            socket.send_to(b"hello", "192.168.249.2:9").unwrap();
            let deadline = Instant::now() + Duration::from_secs(5);
            while received("there0").unwrap().1 == before.1 {
                assert!(Instant::now() < deadline, "nothing came");
                thread::sleep(Duration::from_millis(5));
            }
            assert!(received("there0").unwrap().0 > before.0);
            // The question is for everybody, and its sender is known.
            let question = |frame: &[u8]| frame[..6] == [0xff; 6] && frame[28..32] == address.octets();
            ear.hear(Duration::from_secs(5), question).unwrap();
            deaf.hear(Duration::from_millis(20), |_| true).unwrap_err();
            Ear::at("there1", 0x0806).unwrap_err();
            received("there1").unwrap_err();
        });
        inside.join().unwrap();
    }
}
