//! Client of the Triarch API: HTTP/1.1 over a unix socket, with descriptors.
//!
//! [`Client`] keeps one connection and sends one request after the other; calls block, each for a time that can be set. Routes, phases
//! and the types of bodies are those of [`triarch_api`].
//!
//! ```no_run
//! # fn main() -> Result<(), triarch_client::Error> {
//! let mut client = triarch_client::Client::new("api.sock");
//! client.run(triarch_api::Operation::Pause)?;
//! println!("the VM is {}", client.info()?.state.name());
//! # Ok(())
//! # }
//! ```

mod client;
mod connection;
mod error;
mod event;
mod samples;

pub use client::{Client, Response};
pub use error::{ConnectError, Error};
pub use event::{Event, Follow};
pub use samples::{Sample, Samples};
