//! Builds, hosts, demo, tests and benchmarks of Triarch.

#[cfg_attr(not(test), allow(dead_code))]
mod cpio;

fn main() {}
