//! Tests with stock Linux guests, one module a subject.

use triarch_harness::suite::Test;

mod blk;
mod boot;
mod clock;
mod console;
mod net;
mod pause;
mod power;
mod rng;
mod vsock;

/// All of them, cheap ones first.
pub fn tests() -> Vec<Test> {
    [
        boot::TESTS,
        clock::TESTS,
        power::TESTS,
        console::TESTS,
        rng::TESTS,
        blk::TESTS,
        net::TESTS,
        vsock::TESTS,
        pause::TESTS,
    ]
    .concat()
}
