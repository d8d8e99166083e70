//! What every device is built on: the buses it answers on, the interrupts it raises, the doorbells it listens to.
//!
//! Beside that it has what programs with devices need: threads that are confined, rates of log lines, and their service manager.
//!
//! Nothing here knows KVM. `triarch-hypervisor` implements [`InterruptLine`], [`MsiRouter`] and [`IoEvents`] over it; tests
//! implement them over plain memory (see [`mock`]).

mod bus;
mod event;
mod interrupt;
mod io_event;
mod limit;
pub mod metrics;
pub mod mock;
mod observed;
mod service_manager;
mod thread;

pub use bus::{AccessError, Bus, BusDevice, BusError, ByteRegisters};
pub use event::Event;
pub use interrupt::{InterruptLine, MsiMessage, MsiRouter, MsiVector};
pub use io_event::{IoAddress, IoEvents};
pub use limit::RateLimit;
pub use observed::Observed;
pub use service_manager::ServiceManager;
pub use thread::{NoSandbox, Sandbox, ThreadClass, Worker};
