//! Tests against a kernel that is not there.

mod alarms;
mod bus;
mod dma;
mod fake;
mod fake_moves;
mod function;
mod given;
mod gpu;
mod intx;
mod moves;
mod open;
mod space;
mod translated;
