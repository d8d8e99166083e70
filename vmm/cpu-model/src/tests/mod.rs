//! All recorded CPUs against each other, and the tables against themselves.

mod arm;
mod format;
mod offered;
mod properties;
pub(crate) mod recorded;
mod tables;
mod x86;
