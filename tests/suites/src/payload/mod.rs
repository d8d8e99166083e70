//! Tests with the bare-metal guest (tests/payload): it drives a device, the host checks what came of it. One module a
//! subject; they run on any KVM, also one in software.

mod blk;
mod boot;
mod console;
mod data;
mod guest;
mod memory;
mod net;
mod pause;
mod pci;
mod power;
mod rings;
mod rng;
mod smp;
mod vsock;

use anyhow::Result;
use std::fs::File;
use triarch_harness::suite::{Context, Outcome, Test};

/// This module's tests.
pub fn tests() -> Vec<Test> {
    [
        boot::TESTS,
        power::TESTS,
        memory::TESTS,
        smp::TESTS,
        pci::TESTS,
        blk::TESTS,
        net::TESTS,
        rng::TESTS,
        console::TESTS,
        vsock::TESTS,
        rings::TESTS,
        pause::TESTS,
    ]
    .concat()
}

/// Declares a module's tests: functions of a [`Context`], each skipped where KVM cannot be used.
macro_rules! payload_tests {
    ($subject:literal: $($name:ident),* $(,)?) => {
        /// This module's tests.
        pub const TESTS: &[triarch_harness::suite::Test] = &[$(
            triarch_harness::suite::Test::payload(
                concat!($subject, "::", stringify!($name)),
                |context| $crate::payload::with_kvm(context, $name),
            ),
        )*];
    };
}
use payload_tests;

fn with_kvm(context: &Context, test: fn(&Context) -> Result<Outcome>) -> Result<Outcome> {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => test(context),
        Err(error) => Ok(Outcome::Skipped(format!("/dev/kvm: {error}"))),
    }
}
