//! The Triarch virtual machine monitor.

fn main() {}
