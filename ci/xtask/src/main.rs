//! Builds, hosts, demo, tests and benchmarks of Triarch.

fn main() {}
