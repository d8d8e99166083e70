//! What the service manager is told of the VM.

use std::time::Duration;

use triarch_api::Phase;
use triarch_device_core::ServiceManager;

/// The way to the service manager.
pub(crate) struct Notify {
    manager: ServiceManager,
    watchdog: Option<Duration>,
}

impl Notify {
    /// The manager the environment tells of, if any.
    pub(crate) fn from_env() -> Option<Self> {
        let manager = ServiceManager::from_env()?;
        let [usec, pid] = ["WATCHDOG_USEC", "WATCHDOG_PID"].map(|name| std::env::var(name).ok());
        let watchdog = watchdog(usec.as_deref(), pid.as_deref(), std::process::id());
        Some(Self { manager, watchdog })
    }

    /// How often [`alive`](Self::alive) is due.
    pub(crate) fn alive_every(&self) -> Option<Duration> {
        self.watchdog
    }

    /// The start is over.
    pub(crate) fn ready(&self, phase: Phase) {
        self.manager.send(&format!("READY=1\n{}", status(phase)));
    }

    /// The guest is in another phase.
    pub(crate) fn phase(&self, phase: Phase) {
        self.manager.send(status(phase));
    }

    /// The process is about to end.
    pub(crate) fn stopping(&self) {
        self.manager.send("STOPPING=1\nSTATUS=Ending");
    }

    /// The process does its work.
    pub(crate) fn alive(&self) {
        self.manager.send("WATCHDOG=1");
    }
}

/// Half the time after which the manager takes us for dead, if it watches this process.
fn watchdog(usec: Option<&str>, watched: Option<&str>, pid: u32) -> Option<Duration> {
    if watched.is_some_and(|watched| watched.parse() != Ok(pid)) {
        return None;
    }
    let usec: u64 = usec?.parse().ok()?;
    (usec > 0).then(|| Duration::from_micros((usec / 2).max(1)))
}

fn status(phase: Phase) -> &'static str {
    match phase {
        Phase::Absent => "STATUS=Waiting for vm.create",
        Phase::Created => "STATUS=The VM is created",
        Phase::Running => "STATUS=The guest runs",
        Phase::Paused => "STATUS=The guest is paused",
        Phase::Shutdown => "STATUS=The guest is shut down",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_is_fed_twice_a_period_and_only_if_it_is_ours() {
        let ms = |ms| Some(Duration::from_millis(ms));
        assert_eq!(watchdog(Some("3000000"), None, 7), ms(1500));
        assert_eq!(watchdog(Some("3000000"), Some("7"), 7), ms(1500));
        assert_eq!(watchdog(Some("3000000"), Some("8"), 7), None);
        assert_eq!(watchdog(Some("1"), None, 7), Some(Duration::from_micros(1)));
        for bad in [None, Some("0"), Some("-1"), Some("soon")] {
            assert_eq!(watchdog(bad, None, 7), None);
        }
    }
}
