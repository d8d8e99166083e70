//! The files that have the guest's memory go to a destination on the same host, instead of what is in them.
//!
//! Before its [`Offer`](crate::Offer) the source says in which file, and where in it, each region of that begins
//! ([`Message::Files`]), and sends the descriptors behind that: bytes with up to [`CHUNK`] of them each (SCM_RIGHTS, unix(7)). Memory is
//! there from then on, for both sides, and nothing is copied. All else is as in any other migration: the destination prepares a machine
//! while the guest runs, then the guest is paused, its state goes over, and it is given away (see [`commit`](crate::commit)).
//!
//! Both have the memory at the same time, so a destination writes nothing there before the guest is its own. What it has let run cannot
//! go on at the source, whose state is older than the memory then.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::stream::{Stream, StreamError};
use crate::wire::{Message, WireError};

/// Most descriptors at once; the kernel takes 253.
pub(crate) const CHUNK: usize = 64;
/// Most files: more than a guest has zones, rooms and devices of memory.
pub(crate) const MAX_FILES: usize = 1024;

/// What a region of memory is in: the number of a file, and the byte in it where the region begins.
pub type Place = (u64, u64);

/// The files that have a guest's memory.
#[derive(Debug, Default)]
pub struct Handed {
    /// The files: those of [`places`](Self::places), and behind them what else the two machines share. Nothing was looked at of those that
    /// came.
    pub files: Vec<OwnedFd>,
    /// Where each region of the offer is, in the same order.
    pub places: Vec<Place>,
}

/// Sends what has the guest's memory.
pub(crate) fn send(stream: &mut Stream, handed: &Handed) -> Result<(), StreamError> {
    if handed.files.len() > MAX_FILES {
        return Err(WireError::Invalid("more files of memory than any guest has").into());
    }
    stream.send(&Message::Files {
        count: handed.files.len() as u32,
        places: handed.places.clone(),
    })?;
    for files in handed.files.chunks(CHUNK) {
        let files: Vec<BorrowedFd> = files.iter().map(AsFd::as_fd).collect();
        stream.send_files(&files)?;
    }
    Ok(())
}

/// The message that is to be the offer, and what came before it: `what` says what the other side should do. `post_copy`: the stream is of a
/// guest that may run before all of its memory is there, which [`Offer::post_copy`](crate::Offer::post_copy) tells, and nothing of it is
/// handed over.
pub(crate) fn offered<'a>(
    stream: &'a mut Stream,
    wait: Duration,
    what: &'static str,
    post_copy: bool,
) -> Result<(Message<'a>, Option<Handed>), StreamError> {
    let mut came = stream.take(wait, what)?;
    let mut handed = None;
    if let Message::Files { count, places } = stream.message(came)? {
        if post_copy {
            let both = "memory that is handed over, of a guest that would run before it is there";
            return Err(WireError::Invalid(both).into());
        }
        handed = Some(receive(stream, count, places)?);
        came = stream.take(wait, what)?;
    }
    let mut message = stream.message(came)?;
    if let Message::Offer(offer) = &mut message {
        offer.post_copy = post_copy;
    }
    match (&message, &handed) {
        (Message::Offer(offer), Some(handed)) if handed.places.len() != offer.layout.regions().len() => {
            Err(WireError::Invalid("files for another number of regions than the guest has").into())
        }
        _ => Ok((message, handed)),
    }
}

/// Takes the descriptors behind [`Message::Files`]. After an error none of them is open.
pub(crate) fn receive(stream: &mut Stream, count: u32, places: Vec<Place>) -> Result<Handed, StreamError> {
    let mut files = Vec::new();
    let mut left = count as usize;
    while left > 0 {
        let some = left.min(CHUNK);
        files.extend(stream.receive_files(some)?);
        left -= some;
    }
    Ok(Handed { files, places })
}
