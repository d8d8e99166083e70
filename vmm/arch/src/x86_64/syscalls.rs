//! System calls that x86-64 has beside the ones every architecture has; the C library still uses them here.

/// Calls with their older spellings; the sandbox allows an older one where it allows the newer.
pub const OLDER_SYSCALLS: &[(i64, i64)] = &[
    (libc::SYS_epoll_pwait, libc::SYS_epoll_wait),
    (libc::SYS_ppoll, libc::SYS_poll),
    // A starting thread tells where its thread-local data are, and that it has restartable sequences.
    (libc::SYS_rseq, libc::SYS_arch_prctl),
    (libc::SYS_unlinkat, libc::SYS_unlink),
];
