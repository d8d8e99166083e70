//! Starts VMs, hosts and daemons for the tests.
//!
//! [`agent`] runs commands in a machine that has `triarch-guest-init` as PID 1.

pub mod agent;
