//! A request of a front end, and what it must bring.

use std::os::fd::OwnedFd;

use triarch_vhost_protocol::{Payload, Reader, Region, Request};
use vmm_sys_util::eventfd::EventFd;

use super::error::SessionError;
use super::fd;

/// A request with what came with it.
pub(crate) struct Ask<'a> {
    pub(crate) request: Request,
    pub(crate) payload: &'a [u8],
    pub(crate) fds: Vec<OwnedFd>,
}

impl Ask<'_> {
    /// What its payload begins with.
    pub(crate) fn payload<T: Payload>(&self) -> Result<T, SessionError> {
        self.read(&mut Reader::new(self.payload))
    }

    /// What `numbers`, which are of its payload, go on with.
    pub(crate) fn read<T: Payload>(&self, numbers: &mut Reader<'_>) -> Result<T, SessionError> {
        T::read(numbers).ok_or_else(|| self.short())
    }

    /// That it cannot be.
    pub(crate) fn wrong(&self, what: &'static str) -> SessionError {
        SessionError::Request {
            request: self.request.name().to_owned(),
            what,
        }
    }

    pub(crate) fn short(&self) -> SessionError {
        self.wrong("its payload is too short")
    }

    /// The one descriptor that must have come.
    pub(crate) fn only_fd(mut self) -> Result<OwnedFd, SessionError> {
        match (self.fds.pop(), self.fds.is_empty()) {
            (Some(fd), true) => Ok(fd),
            _ => Err(self.wrong("it needs exactly one descriptor")),
        }
    }

    /// The event descriptor that must have come.
    pub(crate) fn only_event(self) -> Result<EventFd, SessionError> {
        let request = self.request;
        made(request, self.only_fd()?)
    }

    /// The event descriptor of a ring, or none if it says so.
    pub(crate) fn event(&mut self, none: bool) -> Result<Option<EventFd>, SessionError> {
        match (self.fds.pop(), none) {
            (None, true) => Ok(None),
            (Some(found), false) if self.fds.is_empty() => made(self.request, found).map(Some),
            _ => Err(self.wrong("its descriptors are not what it says")),
        }
    }

    /// The region of ADD_MEM_REG and REM_MEM_REG.
    pub(crate) fn region(&self) -> Result<Region, SessionError> {
        Region::read_single(&mut Reader::new(self.payload)).ok_or_else(|| self.short())
    }
}

/// The event descriptor that came with `request`.
fn made(request: Request, fd: OwnedFd) -> Result<EventFd, SessionError> {
    fd::event(fd).map_err(|source| SessionError::Descriptor {
        request: request.name().to_owned(),
        source,
    })
}
