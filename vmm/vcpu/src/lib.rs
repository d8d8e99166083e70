//! vCPU threads: they run the guest and dispatch its exits, nothing else.

#[allow(unsafe_code)] // signals
mod kick;
mod metrics;
mod run;

pub use kick::install_kick_signal;
pub use metrics::{VcpuMetrics, VcpuTimes};
pub use run::{Buses, VcpuError, VcpuEvent, VcpuSet};
