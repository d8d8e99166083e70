//! Tests that run a whole VMM, one module a subject. `triarch-suites --help` tells how to run them.
//!
//! A module exports its tests as `TESTS`; adding one touches that module and the list below.

use std::process::ExitCode;
use triarch_harness::suite;

mod bad_input;
mod framework;
mod held;
mod linux;
mod passt;
mod payload;
mod soak;
mod storage;
mod switches;
mod virtiofsd;

fn main() -> ExitCode {
    if std::env::var_os(framework::VICTIMS).is_some() {
        return suite::main(&framework::victims());
    }
    suite::main(
        &[
            framework::TESTS,
            &linux::tests(),
            &payload::tests(),
            &bad_input::tests(),
        ]
        .concat(),
    )
}
