//! Live migration: a guest moves to another VMM while it runs.
//!
//! This crate knows no KVM and no devices. A [`Source`] has a [`Guest`] and its [`Memory`]; a [`Destination`] has a [`Sink`], which makes
//! a machine with memory, a [`Target`]. Both run on a thread of their caller, and have one more, `migrate-N`, for each stream of memory.
//! A [`Handle`] shows others how far they are, cancels, and changes the bandwidth.
//!
//! # Course
//!
//! 1. The source connects: one control stream and 1 to 16 streams of memory, which a random token joins to a session. Over TCP all are
//!    mutual TLS 1.3, unless `tcp-plain:` was asked for ([`Address`], [`TlsFiles`]).
//! 2. It offers the guest: memory layout, configuration, what its processors can do. The destination makes a machine or refuses,
//!    before a byte of memory was moved.
//! 3. Memory is copied in rounds while the guest runs: first all that was ever touched, then what was written during the round before.
//!    Zero pages go as their numbers, and not at all in the first round; pages are packed by LZ4 where that is faster.
//! 4. After each round it is decided: switch over if the guest would be paused for no longer than promised ([`Limits`]); go on; slow
//!    down the vCPUs, never more than allowed; give up. Once the guest is paused the promise is checked again, with what it wrote
//!    last: if it would be broken, the guest runs on and copying goes on.
//! 5. The switch: last pages and state go over, and the guest is given away such that it runs once, whatever fails: see [`commit`].
//!
//! Within one host memory need not be copied: the files that have it are [handed over](Handed), and 3 and 4 are left out.
//!
//! Where that was allowed, the switch may come before all memory is there (post-copy): the guest runs at the destination, and what it
//! lacks comes when it is touched, and by and by all of it. A connection that is lost then is made anew.
//!
//! Whether a guest could be moved can be asked before ([`Check`]): the destination looks, answers, and waits on.
//!
//! # Trust
//!
//! Neither side believes the other. What a message may be long is known before its body is read, and buffers grow with what comes;
//! pages outside the layout are refused before any of their message is written; the saved state has a size limit. Everything that is
//! waited for has a deadline ([`Deadlines`]), each message as a whole too. Whoever connects without saying quickly who he is,
//! without a certificate or without the token is dropped and logged, and the session goes on. On a network that others reach, plain TCP
//! lets them read and change the guest.
//!
//! # Format
//!
//! One [`VERSION`] number stands for all of it; a destination takes its own only, and says so. A session that may come to post-copy
//! begins with another role, so that a destination that does not know it refuses it, and all others are what they were.

mod address;
mod blocker;
pub mod commit;
mod connect;
mod converge;
mod destination;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod hand_over;
mod handle;
mod memory;
mod pace;
mod pages;
mod post_copy;
mod source;
mod stream;
#[cfg(test)]
mod tests;
mod tls;
mod wire;

pub use address::{Address, AddressError};
pub use blocker::{Blocker, MAX_BLOCKERS, Part};
pub use connect::{ConnectError, Deadlines};
pub use converge::{Limits, OnTimeOut};
pub use destination::{Destination, DestinationError, DestinationOptions, Sink, Taken};
pub use hand_over::{Handed, Place};
pub use handle::{Handle, Phase, Progress};
pub use memory::{Inlet, Lacking, Layout, Memory, Outlet, PAGE, Region, Target};
pub use pages::PageSet;
pub use post_copy::{PostCopy, Turn};
pub use source::{Check, DevicePart, Guest, Moved, NotMoved, Source, SourceError, SourceOptions, Whereabouts};
pub use stream::StreamError;
pub use tls::{TlsError, TlsFiles};
pub use wire::{MAX_STREAMS, Offer, VERSION, WireError};

/// Why something of a machine failed.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// An error with its causes.
pub(crate) fn sentence(error: &(impl std::error::Error + ?Sized)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // An error that stands for its cause has the same text.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
