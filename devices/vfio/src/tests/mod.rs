//! Tests against a kernel that is not there.

mod alarms;
mod dma;
mod fake;
mod function;
mod gpu;
mod open;
mod space;
