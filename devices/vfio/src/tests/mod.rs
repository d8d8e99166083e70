//! Tests against a kernel that is not there.

mod alarms;
mod bus;
mod dma;
mod fake;
mod function;
mod gpu;
mod intx;
mod open;
mod space;
mod translated;
