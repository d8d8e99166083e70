//! vCPU threads: they run the guest and dispatch its exits, nothing else.

mod exits;
#[allow(unsafe_code)] // signals
mod kick;
mod metrics;
mod run;
mod throttle;

pub use exits::Buses;
pub use kick::install_kick_signal;
pub use metrics::{VcpuMetrics, VcpuTimes};
pub use run::{VcpuError, VcpuEvent, VcpuSet};
