//! System calls that x86-64 has beside the ones every architecture has; the C library still uses them here.

/// Older spellings of calls the sandbox allows.
pub const OLDER_SYSCALLS: &[i64] = &[libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_arch_prctl];
