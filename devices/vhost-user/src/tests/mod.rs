//! Against a daemon that does what a test wants, well or badly.

mod fake;
mod handshake;
mod rings;
