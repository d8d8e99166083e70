//! The first process of test machines, both of the emulated hosts and of the guests on them, and
//! the agent with which tests run commands in there.
//!
//! The binary is PID 1: it prepares the system ([`setup`]), loads kernel modules ([`modules`]),
//! reports on the console and starts itself once more as the agent. The agent ([`agent`]) answers
//! requests ([`proto`]) on a channel chosen on the kernel command line ([`channel`]). Host-side
//! tools use the same crate for the protocol and for the modules' dependencies.

pub mod agent;
pub mod channel;
pub mod cmdline;
mod exec;
pub mod modules;
pub mod power;
pub mod proto;
pub mod reading;
pub mod setup;
pub mod soak;
mod sys;
pub mod tools;

pub use sys::{interface_up, kill_group, reap};
