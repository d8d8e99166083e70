//! Against a daemon that does what a test wants, well or badly.

mod direct;
mod fake;
mod handshake;
mod kinds;
mod log;
mod memory;
mod moves;
mod rings;
mod server;
mod state;
