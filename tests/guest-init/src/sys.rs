//! System calls that std does not offer, each wrapped so that its callers need no `unsafe`.
#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int, c_short};
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::ptr;
use std::time::Duration;

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn text(value: &str) -> io::Result<CString> {
    CString::new(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// mount(2).
pub fn mount(source: &str, target: &str, kind: &str, flags: u64, data: &str) -> io::Result<()> {
    let (source, target) = (text(source)?, text(target)?);
    let (kind, data) = (text(kind)?, text(data)?);
    // SAFETY: all pointers are to NUL-terminated strings that outlive the call.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            data.as_ptr().cast(),
        )
    };
    check(result).map(drop)
}

/// finit_module(2), without parameters.
pub fn load_module(file: &File) -> io::Result<()> {
    let none: *const c_char = c"".as_ptr();
    // SAFETY: the descriptor is open, and the parameters are a NUL-terminated string.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), none, 0) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// sync(2).
pub fn sync() {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::sync() }
}

/// reboot(2); returns only on failure.
pub fn reboot(how: c_int) -> io::Result<()> {
    // SAFETY: takes a plain number.
    check(unsafe { libc::reboot(how) }).map(drop)
}

/// Waits for any child and reaps it; `None` if there is none.
pub fn reap() -> Option<(u32, ExitStatus)> {
    let mut status = 0;
    loop {
        // SAFETY: the pointer is to a live integer.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if let Ok(pid @ 1..) = u32::try_from(pid) {
            return Some((pid, ExitStatus::from_raw(status)));
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return None;
        }
    }
}

/// A descriptor that becomes readable when the process `pid` ends (pidfd_open(2)).
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes plain numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = check(c_int::try_from(fd).unwrap_or(-1))?;
    // SAFETY: the kernel just made this descriptor and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Kills the process group that `leader` leads.
pub fn kill_group(leader: u32) -> io::Result<()> {
    let group = c_int::try_from(leader).map_err(io::Error::other)?;
    // SAFETY: takes plain numbers.
    check(unsafe { libc::kill(-group, libc::SIGKILL) }).map(drop)
}

/// What [`poll`] looks for.
#[derive(Clone, Copy)]
pub enum For {
    /// Data, or the end of the stream.
    Reading,
    /// Room.
    Writing,
}

/// poll(2): whether each descriptor is ready (or broken); absent ones never are. `None` waits for ever.
pub fn poll<const N: usize>(
    wanted: [Option<(BorrowedFd<'_>, For)>; N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    let mut fds = wanted.map(|entry| match entry {
        Some((fd, For::Reading)) => pollfd(fd.as_raw_fd(), libc::POLLIN),
        Some((fd, For::Writing)) => pollfd(fd.as_raw_fd(), libc::POLLOUT),
        None => pollfd(-1, 0),
    });
    // One millisecond more than asked for, so that a deadline is past when the call returns.
    let millis = timeout.map_or(-1, |t| c_int::try_from(t.as_millis() + 1).unwrap_or(c_int::MAX));
    poll_raw(&mut fds, millis)?;
    Ok(fds.map(|fd| fd.revents != 0))
}

/// Waits until one of `files` is readable and gives its index.
pub fn wait_readable(files: &[File]) -> io::Result<usize> {
    let mut fds: Vec<_> = files.iter().map(|f| pollfd(f.as_raw_fd(), libc::POLLIN)).collect();
    loop {
        poll_raw(&mut fds, -1)?;
        if let Some(ready) = fds.iter().position(|fd| fd.revents != 0) {
            return Ok(ready);
        }
    }
}

/// Whether the other side of a port has hung up.
pub fn hung_up(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut fds = [pollfd(fd.as_raw_fd(), 0)];
    poll_raw(&mut fds, 0)?;
    Ok(fds[0].revents & libc::POLLHUP != 0)
}

fn pollfd(fd: c_int, events: c_short) -> libc::pollfd {
    libc::pollfd { fd, events, revents: 0 }
}

fn poll_raw(fds: &mut [libc::pollfd], millis: c_int) -> io::Result<()> {
    // SAFETY: pointer and length are of one live slice.
    match check(unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, millis) }) {
        Err(e) if e.kind() != io::ErrorKind::Interrupted => Err(e),
        _ => Ok(()),
    }
}

/// Makes reads and writes return instead of waiting.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: an open descriptor and plain numbers.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) }).map(drop)
}

/// Makes a terminal pass bytes as they are, without echo. Files that are no terminal are left alone.
pub fn make_raw(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: takes a descriptor.
    if unsafe { libc::isatty(fd) } == 0 {
        return Ok(());
    }
    // SAFETY: termios is plain data, for which zeroes are valid.
    let mut settings: libc::termios = unsafe { mem::zeroed() };
    // SAFETY: the pointer is to a live structure of the right type.
    check(unsafe { libc::tcgetattr(fd, &raw mut settings) })?;
    // SAFETY: as above.
    unsafe { libc::cfmakeraw(&raw mut settings) };
    // SAFETY: as above.
    check(unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw const settings) }).map(drop)
}

/// Brings a network interface up (SIOCSIFFLAGS, netdevice(7)).
pub fn interface_up(name: &str) -> io::Result<()> {
    // SAFETY: ifreq is plain data, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(room)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = c_short::try_from(libc::IFF_UP).map_err(io::Error::other)?;
    // SAFETY: takes plain numbers.
    let socket = check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the kernel just made this descriptor and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: the request is a live ifreq, which is what this ioctl reads.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }).map(drop)
}

/// A stream socket of the vsock family (vsock(7)).
pub struct Vsock(OwnedFd);

impl Vsock {
    fn socket() -> io::Result<OwnedFd> {
        // SAFETY: takes plain numbers.
        let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
        let fd = check(fd)?;
        // SAFETY: the kernel just made this descriptor and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
        // SAFETY: sockaddr_vm is plain data, for which zeroes are valid.
        let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_cid = cid;
        address.svm_port = port;
        address
    }

    /// Listens on `port` of every CID of this machine.
    pub fn listen(port: u32) -> io::Result<Self> {
        let socket = Self::socket()?;
        let address = Self::address(libc::VMADDR_CID_ANY, port);
        let size = mem::size_of_val(&address) as libc::socklen_t;
        // SAFETY: pointer and length are of one live address.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) })?;
        // SAFETY: an open socket and a plain number.
        check(unsafe { libc::listen(socket.as_raw_fd(), 16) })?;
        Ok(Self(socket))
    }

    /// Waits for a client.
    pub fn accept(&self) -> io::Result<File> {
        let (fd, none) = (self.0.as_raw_fd(), ptr::null_mut());
        // SAFETY: null pointers mean that the peer's address is not asked for.
        let fd = check(unsafe { libc::accept4(fd, none, ptr::null_mut(), libc::SOCK_CLOEXEC) })?;
        // SAFETY: the kernel just made this descriptor and nothing else owns it.
        Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Connects to `port` of the machine `cid`.
    pub fn connect(cid: u32, port: u32) -> io::Result<File> {
        let socket = Self::socket()?;
        let address = Self::address(cid, port);
        let size = mem::size_of_val(&address) as libc::socklen_t;
        // SAFETY: pointer and length are of one live address.
        check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size) })?;
        Ok(File::from(socket))
    }

    /// The CID of this machine; `None` if no host has given it one.
    pub fn local_cid() -> Option<u32> {
        const IOCTL_VM_SOCKETS_GET_LOCAL_CID: libc::Ioctl = 0x7b9;
        let device = File::open("/dev/vsock").ok()?;
        let mut cid = 0_u32;
        let request = IOCTL_VM_SOCKETS_GET_LOCAL_CID;
        // SAFETY: the kernel writes one u32 to a live u32.
        check(unsafe { libc::ioctl(device.as_raw_fd(), request, &raw mut cid) }).ok()?;
        // 1 is the loopback transport's.
        (cid != libc::VMADDR_CID_ANY && cid > libc::VMADDR_CID_LOCAL).then_some(cid)
    }
}

/// shutdown(2) of the sending side.
pub fn shutdown_write(fd: &impl AsFd) -> io::Result<()> {
    // SAFETY: an open descriptor and a plain number.
    check(unsafe { libc::shutdown(fd.as_fd().as_raw_fd(), libc::SHUT_WR) }).map(drop)
}
