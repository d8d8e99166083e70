//! Giving up what a daemon needs only to start.

use std::io;

use thiserror::Error;

/// _LINUX_CAPABILITY_VERSION_3 (capget(2)).
const VERSION_3: u32 = 0x2008_0522;
/// More than any kernel has; asking for one it does not have ends the loop.
const MAX_CAPABILITY: libc::c_ulong = 64;

/// Why privileges could not be given up.
#[derive(Debug, Error)]
#[error("cannot {what}")]
pub struct PrivilegeError {
    what: &'static str,
    #[source]
    source: io::Error,
}

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Gives up every capability, of this process and of programs it could start, for good. Call it before there is another thread:
/// capabilities belong to threads.
pub fn drop_privileges() -> Result<(), PrivilegeError> {
    let failed = |what| PrivilegeError {
        what,
        source: io::Error::last_os_error(),
    };
    // SAFETY: takes no pointers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(failed("forbid new privileges"));
    }
    for capability in 0..MAX_CAPABILITY {
        // Without CAP_SETPCAP it is not allowed, and with the next step done it does not matter.
        // SAFETY: takes no pointers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            break;
        }
    }
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let none = [Sets {
        effective: 0,
        permitted: 0,
        inheritable: 0,
    }; 2];
    // SAFETY: both have the layout of capset(2) in version 3 (two sets of 32), and outlive the call.
    if unsafe { libc::syscall(libc::SYS_capset, &header, none.as_ptr()) } != 0 {
        return Err(failed("drop capabilities"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left() {
        let status = std::thread::spawn(|| {
            drop_privileges().expect("drop");
            std::fs::read_to_string("/proc/thread-self/status").expect("status")
        });
        let status = status.join().expect("no panic");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert!(status.contains(&format!("{set}:\t0000000000000000")), "{status}");
        }
        assert!(status.contains("NoNewPrivs:\t1"));
    }
}
