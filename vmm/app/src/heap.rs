//! The C library's heap.

#![allow(unsafe_code)] // mallopt

/// Keeps the heap in one piece. By default each thread gets an arena of its own: a reservation of 128 MiB and some system calls at
/// its start, for threads that hardly allocate once the guest runs.
pub(crate) fn one_arena() {
    // SAFETY: `mallopt` only sets a number, and no other thread exists yet. Where it fails, the default stays.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
