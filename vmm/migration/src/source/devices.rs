//! What devices are that only their drivers understand: bytes beside memory and state, before the guest is paused and after.

use std::sync::atomic::Ordering;

use super::worker::Failed;
use super::{Guest, Session, Source, SourceError};
use crate::stream::StreamError;
use crate::wire::{MAX_STATE_PART, Message};

/// A part of it that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevicePart {
    /// Number of the device.
    pub device: u16,
    /// All that came of it before is void.
    pub begins: bool,
    /// Bytes.
    pub len: usize,
}

impl Source {
    /// Sends what devices have to tell while the guest runs, as much as there was when this began.
    pub(super) fn copy_devices(&self, session: &mut Session, guest: &mut dyn Guest) -> Result<(), SourceError> {
        let mut left = guest.devices_ahead();
        let mut buffer = Vec::new();
        while left > 0 {
            let Some(sent) = self.send_device(session, guest, &mut buffer)? else {
                break;
            };
            left = left.saturating_sub(sent.max(1) as u64);
            self.handle
                .pacer()
                .wait(sent as u64, || match self.handle.is_cancelled() {
                    true => Err(StreamError::Stopped),
                    false => Ok(()),
                })?;
        }
        Ok(())
    }

    /// Sends all that is left of them, of a guest that is paused.
    pub(super) fn finish_devices(&self, session: &mut Session, guest: &mut dyn Guest) -> Result<(), SourceError> {
        let mut buffer = Vec::new();
        while self.send_device(session, guest, &mut buffer)?.is_some() {}
        Ok(())
    }

    fn send_device(
        &self,
        session: &mut Session,
        guest: &mut dyn Guest,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<usize>, SourceError> {
        buffer.resize(MAX_STATE_PART, 0);
        let read = guest.read_devices(buffer).map_err(|source| {
            let what = "read the state of the guest's devices";
            SourceError::Guest { what, source }
        })?;
        let Some(DevicePart { device, begins, len }) = read else {
            return Ok(None);
        };
        let part = &buffer[..len.min(MAX_STATE_PART)];
        let sent = session.control.send(&Message::Device { device, begins, part });
        // A destination that does not want it says why before it closes the connection.
        let sent = sent.map_err(|error| self.reason(session, Failed::Stream(error)))?;
        let wire = &self.handle.counters().wire_bytes;
        wire.fetch_add(sent as u64, Ordering::Relaxed);
        session.has_devices = true;
        Ok(Some(part.len()))
    }
}
