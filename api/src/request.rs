//! Requests as data: what a client asks, what it gets, and which phase of a VM accepts what.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::VmConfig;

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// There is no VM: the VMM waits for one.
    Absent,
    /// It has a configuration and nothing else.
    Created,
    /// The guest runs.
    Running,
    /// The guest stands still.
    Paused,
    /// The guest was shut down; it can be booted again.
    Shutdown,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Self; 5] = [Self::Absent, Self::Created, Self::Running, Self::Paused, Self::Shutdown];

    /// The name agents know it by; an absent VM has none.
    pub fn name(self) -> &'static str {
        match self {
            Self::Absent => "none",
            Self::Created => "Created",
            Self::Running => "Running",
            Self::Paused => "Paused",
            Self::Shutdown => "Shutdown",
        }
    }
}

/// What a client asks of the VMM. One variant a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// `vm.create`: take this configuration.
    Create(Box<VmConfig>),
    /// `vm.delete`: shut down if needed and forget the configuration.
    Delete,
    /// `vm.boot`.
    Boot,
    /// `vm.info`.
    Info,
    /// `vm.pause`.
    Pause,
    /// `vm.resume`.
    Resume,
    /// `vm.shutdown`: stop at once, without asking the guest.
    Shutdown,
    /// `vm.reboot`: stop at once and boot again.
    Reboot,
    /// `vm.power-button`: ask the guest to shut itself down.
    PowerButton,
    /// `vmm.shutdown`: end the process.
    VmmShutdown,
}

impl Request {
    /// The route's name, for messages and audit lines.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Create(_) => "vm.create",
            Self::Delete => "vm.delete",
            Self::Boot => "vm.boot",
            Self::Info => "vm.info",
            Self::Pause => "vm.pause",
            Self::Resume => "vm.resume",
            Self::Shutdown => "vm.shutdown",
            Self::Reboot => "vm.reboot",
            Self::PowerButton => "vm.power-button",
            Self::VmmShutdown => "vmm.shutdown",
        }
    }

    /// Whether a VM in `phase` accepts the request; if not, what the client is told.
    pub fn check(&self, phase: Phase) -> Result<(), ApiError> {
        use Phase::{Absent, Created, Paused, Running, Shutdown};
        let accepted: &[Phase] = match self {
            Self::Create(_) => &[Absent],
            Self::Delete | Self::Info => &[Created, Running, Paused, Shutdown],
            Self::Boot => &[Created, Shutdown],
            Self::Pause | Self::PowerButton => &[Running],
            Self::Resume => &[Paused],
            Self::Shutdown | Self::Reboot => &[Running, Paused],
            Self::VmmShutdown => &Phase::ALL,
        };
        if accepted.contains(&phase) {
            return Ok(());
        }
        let name = self.name();
        Err(match phase {
            Absent => ApiError::NotFound(format!("{name}: there is no VM; create one with vm.create")),
            _ if matches!(self, Self::Create(_)) => {
                ApiError::WrongPhase(format!("{name}: there is a VM already; remove it with vm.delete"))
            }
            _ => {
                let names: Vec<_> = accepted.iter().map(|p| p.name()).collect();
                let wanted = names.join(" or ");
                ApiError::WrongPhase(format!("{name}: the VM is {}, it must be {wanted}", phase.name()))
            }
        })
    }
}

/// What a client gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Done, nothing to tell.
    Done,
    /// Answer to [`Request::Info`].
    Info(Box<VmInfo>),
}

/// Body of `vm.info`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Configuration as it is now, with the paths of terminals made for it.
    pub config: VmConfig,
    /// `Created`, `Running`, `Paused` or `Shutdown`.
    pub state: Phase,
    /// Bytes of RAM the guest has.
    pub memory_actual_size: u64,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ApiError {
    /// 400: the request itself is wrong.
    #[error("{0}")]
    BadRequest(String),
    /// 404: what it speaks of does not exist.
    #[error("{0}")]
    NotFound(String),
    /// 409: not in this phase.
    #[error("{0}")]
    WrongPhase(String),
    /// 501: this build does not have it.
    #[error("{0}")]
    Unsupported(String),
    /// 500: it was tried and failed.
    #[error("{0}")]
    Failed(Causes),
}

impl ApiError {
    /// The HTTP status.
    pub fn status(&self) -> u16 {
        match self {
            Self::BadRequest(_) => 400,
            Self::NotFound(_) => 404,
            Self::WrongPhase(_) => 409,
            Self::Unsupported(_) => 501,
            Self::Failed(_) => 500,
        }
    }

    /// The error and its causes, the outermost first: the body clients get.
    pub fn messages(&self) -> Vec<&str> {
        match self {
            Self::BadRequest(text) | Self::NotFound(text) | Self::WrongPhase(text) | Self::Unsupported(text) => {
                vec![text]
            }
            Self::Failed(causes) => causes.0.iter().map(String::as_str).collect(),
        }
    }
}

/// An error and its causes, the outermost first. Shown as one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Causes(Vec<String>);

impl Causes {
    /// `error` and its chain of sources.
    pub fn of(error: &dyn std::error::Error) -> Self {
        let chain = std::iter::successors(Some(error), |error| error.source());
        Self(chain.map(ToString::to_string).collect())
    }
}

impl<T: Into<String>> From<T> for Causes {
    fn from(text: T) -> Self {
        Self(vec![text.into()])
    }
}

impl std::fmt::Display for Causes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.join(": "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Request> {
        use Request::*;
        vec![
            Create(Box::default()),
            Delete,
            Boot,
            Info,
            Pause,
            Resume,
            Shutdown,
            Reboot,
            PowerButton,
            VmmShutdown,
        ]
    }

    #[test]
    fn every_request_is_accepted_somewhere_and_refusals_say_why() {
        for request in all() {
            let (good, bad): (Vec<_>, Vec<_>) = Phase::ALL.into_iter().partition(|p| request.check(*p).is_ok());
            assert!(!good.is_empty(), "{request:?}");
            for phase in bad {
                let error = request.check(phase).expect_err("refused");
                assert!(error.to_string().starts_with(request.name()));
                let expected = if phase == Phase::Absent { 404 } else { 409 };
                assert_eq!(error.status(), expected, "{request:?} in {phase:?}");
            }
        }
    }

    #[test]
    fn nothing_but_create_and_the_end_works_without_a_vm() {
        let accepted: Vec<_> = all().into_iter().filter(|r| r.check(Phase::Absent).is_ok()).collect();
        assert_eq!(accepted, [Request::Create(Box::default()), Request::VmmShutdown]);
    }

    #[test]
    fn a_failure_tells_all_its_causes() {
        #[derive(Debug, Error)]
        #[error("cannot load the kernel")]
        struct Outer(#[source] std::fmt::Error);
        let error = ApiError::Failed(Causes::of(&Outer(std::fmt::Error)));
        let inner = std::fmt::Error.to_string();
        assert_eq!(error.messages(), ["cannot load the kernel", &inner]);
        assert_eq!(error.to_string(), format!("cannot load the kernel: {inner}"));
    }

    #[test]
    fn pause_and_resume_exclude_each_other() {
        for phase in Phase::ALL {
            assert!(!(Request::Pause.check(phase).is_ok() && Request::Resume.check(phase).is_ok()));
        }
    }
}
