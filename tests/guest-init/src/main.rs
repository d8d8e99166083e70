//! The init of test guests: runs commands and reports.

fn main() {}
