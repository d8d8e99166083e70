//! The server, over real sockets.

mod clients;
mod common;
mod listener;
mod metrics;
mod routes;
mod streams;
