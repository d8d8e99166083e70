//! Starts VMs, hosts and daemons for the tests.
//!
//! - [`suite`]: the framework of tests that run a whole VMM
//! - [`vm`]: a VMM with its flags, its output, and its end
//! - [`linux`]: a Linux guest on it, in which [`agent`] runs commands
//! - [`jobs`]: what the VMM says of itself
//! - [`dice`]: numbers that look random
//! - [`freeze`]: a thread of the VMM that hangs
//! - [`interrupts`]: what the backtrace of a guest that hangs shows of its processor
//! - [`net`], [`disk`], [`pci`], [`nvme`], [`vsock`], [`terminal`], [`api`], [`wire`]: the host's side of the devices

pub mod agent;
pub mod api;
pub mod capture;
pub mod dice;
pub mod disk;
pub mod freeze;
pub mod images;
pub mod interrupts;
pub mod jobs;
pub mod kvm;
pub mod linux;
pub mod net;
pub mod nvme;
pub mod pci;
pub mod process;
pub mod signals;
pub mod smaps;
pub mod suite;
pub mod terminal;
pub mod vm;
pub mod vsock;
pub mod wire;
