//! Whether a guest could be moved.

use super::{SourceError, SourceOptions, connect, fits, random};
use crate::blocker::Blocker;
use crate::connect::Dialer;
use crate::hand_over::{self, Handed};
use crate::memory::{Layout, Region};
use crate::stream::Interrupt;
use crate::wire::{Message, Offer, Role};

/// A question to a destination. Nothing is moved, and the destination goes on waiting.
pub struct Check {
    options: SourceOptions,
    dialer: Dialer,
    layout: Layout,
    handed: Option<Handed>,
}

impl Check {
    /// Reads certificates and resolves names: the thread that asks may do neither. `regions` is the guest's memory, and
    /// `handed` the files of it if it is to be handed over.
    pub fn new(options: SourceOptions, regions: Vec<Region>, handed: Option<Handed>) -> Result<Self, SourceError> {
        options.check()?;
        let dialer = Dialer::new(&options.address, options.tls.as_ref(), options.deadlines)?;
        let layout = Layout::new(regions).map_err(SourceError::Layout)?;
        Ok(Self {
            options,
            dialer,
            layout,
            handed,
        })
    }

    /// Asks. What is in the way is returned; nothing is: the guest would be taken. `config` and `cpu` are for the destination's
    /// [`check`](crate::Sink::check).
    ///
    /// # Errors
    /// The destination could not be asked.
    pub fn run(self, config: &[u8], cpu: &[u8]) -> Result<Vec<Blocker>, SourceError> {
        fits(config, cpu)?;
        let interrupt = Interrupt::default();
        let role = match self.options.post_copy {
            Some(_) => Role::CheckPostCopy,
            None => Role::Check,
        };
        let mut stream = connect(&self.dialer, &self.options, &interrupt, random()?, role)?;
        let offer = Offer {
            layout: self.layout,
            config,
            cpu,
            post_copy: self.options.post_copy.is_some(),
        };
        if let Some(handed) = &self.handed {
            hand_over::send(&mut stream, handed)?;
        }
        stream.send(&Message::Offer(offer))?;
        let found = match stream.receive(self.options.deadlines.silence, "say what is in the way")? {
            Message::Blockers(blockers) => Ok(blockers),
            Message::Abort(reason) => Err(SourceError::Refused(reason.to_owned())),
            other => Err(crate::stream::unexpected(&other, "what is in the way").into()),
        };
        let _ = stream.send(&Message::End);
        found
    }
}
