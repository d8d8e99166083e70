//! Confines each thread of the VMM to the system calls its work needs (seccomp, by seccompiler).
//!
//! A filter is inherited by the threads a thread makes, and adding another one can only narrow it. So threads of devices are made by
//! a thread of their own, the `spawner`, never by a vCPU: each then has exactly the filter of its class and, above it, the
//! spawner's, which allows what any of them needs.

mod filter;
mod spawner;
mod syscalls;

pub use filter::{Mode, SandboxError, Seccomp};
