//! What the process may use.

#![allow(unsafe_code)] // getrlimit, setrlimit

/// Lets the process have as many descriptors as it may at most. Shells and service managers start programs with 1024 for the sake of
/// `select`, which nothing here uses; a guest of 254 vCPUs, or one with a few disks of many queues, takes more.
pub(crate) fn raise_descriptors() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` outlives both calls.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && limit.rlim_cur < limit.rlim_max {
            limit.rlim_cur = limit.rlim_max;
            // It is no more than we may have. Should it fail, what does not fit any more says so.
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}
