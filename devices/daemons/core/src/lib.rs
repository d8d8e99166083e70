//! What Triarch's daemons (`triarch-blkd`, `triarch-netd`) have in common.
//!
//! A daemon starts like this, in this order:
//!
//! 1. [`LogOptions::start`]: lines go to standard error.
//! 2. [`Signals::hold`], before there is another thread.
//! 3. It opens what takes privileges: files, taps, sockets ([`listen`]).
//! 4. [`drop_privileges`], then [`Confinement::new`]: from here on threads come from [`Confinement::sandbox`].
//! 5. [`Control::start`], which serves the control socket, and the threads that do the work.
//! 6. [`ready`] on the main thread, which waits in [`Signals::wait`] and ends everything. [`exit_code`] tells what went wrong.

pub mod backend;
mod confine;
mod control;
mod limits;
mod logging;
#[allow(unsafe_code)] // capabilities
mod privileges;
mod program;
mod signals;
mod socket;

pub use confine::{Confinement, SeccompMode};
pub use control::{Control, ControlError};
pub use limits::raise_descriptors;
pub use logging::LogOptions;
pub use privileges::{PrivilegeError, drop_privileges};
pub use program::{exit_code, ready};
pub use signals::Signals;
pub use socket::listen;
