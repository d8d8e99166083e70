//! A device that goes with its guest: it stands still, tells what it is, and another one becomes that.
//!
//! ```text
//!  Running ─► PreCopy ──────────┐             Resuming ─► Stop ─► [RunningP2p] ─► Running
//!     │          │ [PreCopyP2p]  ▼                ▲
//!     │          └──────────► StopCopy            └ reset, and as often as the data begin anew
//!     └─► [RunningP2p] ─► Stop ─┘
//! ```
//!
//! Every way back ends in Running, if need be by a reset: then the guest's driver has lost its device, as after an error of the hardware.

use std::io;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;

use crate::handle::Handle;
use crate::kernel::{DataFile, MoveKinds, MoveState};
use crate::lock;

/// Most bytes that a device may be: more than the memory of any.
pub(crate) const MOST: u64 = 1 << 40;
/// How long a driver may have no data, or take none: the guest may stand still meanwhile.
const PATIENCE: Duration = match cfg!(test) {
    true => Duration::from_secs(1),
    false => Duration::from_secs(10),
};
/// After how long it is asked again.
const AGAIN: Duration = Duration::from_millis(1);

/// What may take a driver a while.
const TELL: &str = "tell its state";
const TAKE: &str = "take the state that came";

/// Why a device cannot go with its guest.
#[derive(Debug, Error)]
pub enum Immovable {
    /// Its driver cannot do it.
    #[error("the driver of the device {0} on this host cannot tell its state (VFIO's migration protocol)")]
    Driver(String),
    /// Nobody can have it forget what came before.
    #[error("the device {0} cannot be reset, so that it could not become another one")]
    Reset(String),
    /// It is opened only when its guest is there.
    #[error("{0} is a mediated device, which cannot be moved or saved yet")]
    Mediated(String),
    /// Others reach it while it stands still.
    #[error(
        "the device {0} cannot stand still together with others of this guest, which reach it directly; start the guest with --platform \
         vfio_p2p_dma=off"
    )]
    Peers(String),
    /// The kernel refuses.
    #[error("cannot learn whether the device {name} can be moved")]
    Kernel {
        /// The device.
        name: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// Why a device did not go with its guest.
#[derive(Debug, Error)]
pub enum MoveError {
    /// The kernel or its driver refuses.
    #[error("the device {name} cannot {what}")]
    Kernel {
        /// The device.
        name: String,
        /// What was asked of it.
        what: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Its driver has us wait.
    #[error("the driver of the device {name} would not {what} for {} s", PATIENCE.as_secs())]
    Late {
        /// The device.
        name: String,
        /// What was asked of it.
        what: &'static str,
    },
    /// It did not stop when it should have.
    #[error("the device {name} does not stand still: {why}")]
    Moves {
        /// The device.
        name: String,
        /// What was in the way.
        why: String,
    },
    /// Nobody would believe it.
    #[error("the state of the device {0} has more than {limit} GiB", limit = MOST >> 30)]
    TooLarge(String),
    /// What comes is for another time.
    #[error("data came for the device {0} that was not told to take any")]
    Unasked(String),
}

/// How far a device is.
pub(crate) struct Moving {
    at: MoveState,
    data: Option<Box<dyn DataFile>>,
    /// Nothing was read since the data began.
    fresh: bool,
    /// Nothing more is to be read while it stands still.
    done: bool,
    /// Bytes since the data began.
    pub(crate) carried: u64,
    /// Why it does not stand still.
    trouble: Option<String>,
}

impl Default for Moving {
    fn default() -> Self {
        Self {
            at: MoveState::Running,
            data: None,
            fresh: true,
            done: false,
            carried: 0,
            trouble: None,
        }
    }
}

impl Moving {
    /// A part of it was carried.
    fn carry(&mut self, len: usize, name: &str) -> Result<(), MoveError> {
        self.carried = self.carried.saturating_add(len as u64);
        match self.carried > MOST {
            true => Err(MoveError::TooLarge(name.to_owned())),
            false => Ok(()),
        }
    }
}

/// Data of a device that were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// All that came of it before is void.
    pub begins: bool,
    /// Bytes.
    pub len: usize,
}

/// A device that goes with its guest.
#[derive(Clone)]
pub struct Mover {
    name: String,
    handle: Arc<Handle>,
    kinds: MoveKinds,
}

impl Mover {
    pub(crate) fn of(name: &str, handle: &Arc<Handle>) -> Result<Self, Immovable> {
        // Asked once: whoever stood still works again, whatever the kernel says then.
        let kinds = match handle.kinds.get() {
            Some(kinds) => *kinds,
            None => {
                let kinds = handle.file.can_move().map_err(|source| Immovable::Kernel {
                    name: name.to_owned(),
                    source,
                })?;
                *handle.kinds.get_or_init(|| kinds)
            }
        };
        let kinds = kinds.ok_or_else(|| Immovable::Driver(name.to_owned()))?;
        match handle.info.resets {
            true => Ok(Self {
                name: name.to_owned(),
                handle: handle.clone(),
                kinds,
            }),
            false => Err(Immovable::Reset(name.to_owned())),
        }
    }

    /// Its name on the host.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it can be told to begin nothing while others still work.
    pub(crate) fn has_p2p(&self) -> bool {
        self.kinds.p2p
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    fn moving(&self) -> &Mutex<Moving> {
        &self.handle.moving
    }

    /// Whether it stands still.
    pub fn is_still(&self) -> bool {
        lock(self.moving()).at.is_still()
    }

    /// What kind of device it is: only another one of that becomes it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn kind(&self) -> Result<String, MoveError> {
        let mut bytes = [0; 64];
        let file = &self.handle.file;
        let read = file.region(VFIO_PCI_CONFIG_REGION_INDEX);
        read.and_then(|region| file.read_at(region.offset, &mut bytes))
            .map_err(self.failed("be asked what it is"))?;
        let number = |at: usize| u16::from(bytes[at]) | u16::from(bytes[at + 1]) << 8;
        let class = u32::from(number(0x0a)) << 8 | u32::from(bytes[0x09]);
        Ok(format!(
            "{:04x}:{:04x} (subsystem {:04x}:{:04x}, class {class:06x}, revision {:02x})",
            number(0x00),
            number(0x02),
            number(0x2c),
            number(0x2e),
            bytes[0x08]
        ))
    }

    fn failed(&self, what: &'static str) -> impl Fn(io::Error) -> MoveError {
        let name = self.name.clone();
        move |source| MoveError::Kernel {
            name: name.clone(),
            what,
            source,
        }
    }

    fn enter(&self, moving: &mut Moving, to: MoveState) -> io::Result<()> {
        if moving.at == to {
            return Ok(());
        }
        match self.handle.file.enter(to) {
            Ok(data) => {
                if let Some(data) = data {
                    (moving.data, moving.fresh, moving.done, moving.carried) = (Some(data), true, false, 0);
                }
                moving.at = to;
            }
            Err(error) => {
                // It may have come half the way.
                moving.at = self.handle.file.state().unwrap_or(MoveState::Error);
                return Err(error);
            }
        }
        if !to.has_data() {
            (moving.data, moving.done) = (None, false);
        }
        Ok(())
    }

    /// Has it begin nothing any more, if it can: others do as it told them yet.
    pub(crate) fn quiet(&self) {
        let mut moving = lock(self.moving());
        let to = match moving.at {
            MoveState::Running if self.kinds.p2p => MoveState::RunningP2p,
            MoveState::PreCopy if self.kinds.p2p => MoveState::PreCopyP2p,
            _ => return,
        };
        if let Err(error) = self.enter(&mut moving, to) {
            self.trouble(&mut moving, &error);
        }
    }

    /// Has it stand still. One that does not works on, and says why when it is [`checked`](Self::check_still).
    pub(crate) fn stop(&self) {
        let mut moving = lock(self.moving());
        let to = match moving.at {
            _ if moving.trouble.is_some() => return,
            MoveState::Running | MoveState::RunningP2p => MoveState::Stop,
            MoveState::PreCopy | MoveState::PreCopyP2p => MoveState::StopCopy,
            MoveState::Stop | MoveState::StopCopy | MoveState::Resuming => return,
            MoveState::Error => {
                let error = io::Error::other("its driver tells of an error");
                return self.trouble(&mut moving, &error);
            }
        };
        if let Err(error) = self.enter(&mut moving, to) {
            self.trouble(&mut moving, &error);
        }
    }

    fn trouble(&self, moving: &mut Moving, error: &io::Error) {
        tracing::warn!("the device {} does not stand still, and works on: {error}", self.name);
        self.work(moving);
        moving.trouble = Some(error.to_string());
    }

    /// Whether it stands still.
    ///
    /// # Errors
    /// It does not, since something failed.
    pub fn check_still(&self) -> Result<(), MoveError> {
        let moving = lock(self.moving());
        match (&moving.trouble, moving.at.is_still()) {
            (None, true) => Ok(()),
            (why, _) => Err(MoveError::Moves {
                name: self.name.clone(),
                why: why.clone().unwrap_or_else(|| "its guest runs".to_owned()),
            }),
        }
    }

    /// Has it do as others tell it, if it can, before all of them work.
    pub(crate) fn wake(&self) {
        let mut moving = lock(self.moving());
        if self.kinds.p2p
            && matches!(moving.at, MoveState::Stop | MoveState::StopCopy)
            && let Err(error) = self.enter(&mut moving, MoveState::RunningP2p)
        {
            tracing::warn!("the device {} cannot work yet: {error}", self.name);
        }
    }

    /// Has it work, whatever it was told before.
    pub(crate) fn run(&self) {
        let mut moving = lock(self.moving());
        moving.trouble = None;
        self.work(&mut moving);
    }

    fn work(&self, moving: &mut Moving) {
        let worked = match moving.at {
            MoveState::Error => Err(io::Error::other("its driver tells of an error")),
            _ => self.enter(moving, MoveState::Running),
        };
        let Err(error) = worked else { return };
        tracing::error!("the device {} does not work any more, and is reset: {error}", self.name);
        match self.handle.file.reset() {
            Ok(()) => moving.was_reset(),
            Err(error) => tracing::error!("the device {} cannot be reset: {error}", self.name),
        }
    }

    /// Nobody reads any more what it is: it works, or stands still if it does that.
    pub fn finish(&self) {
        let mut moving = lock(self.moving());
        match moving.at {
            MoveState::PreCopy | MoveState::PreCopyP2p => self.work(&mut moving),
            MoveState::StopCopy => {
                if let Err(error) = self.enter(&mut moving, MoveState::Stop) {
                    self.trouble(&mut moving, &error);
                }
            }
            _ => {}
        }
    }

    /// About how many bytes it would have if it stood still now.
    pub(crate) fn size(&self) -> u64 {
        let moving = lock(self.moving());
        match moving.done {
            true => 0,
            false => self.handle.file.data_size().unwrap_or(0).min(MOST),
        }
    }

    /// How many bytes it has to tell while it works.
    pub(crate) fn ahead(&self) -> u64 {
        let mut moving = lock(self.moving());
        if moving.at == MoveState::Running && self.kinds.pre_copy {
            // What fails here fails again when it is stopped, and is told then.
            if let Err(error) = self.enter(&mut moving, MoveState::PreCopy) {
                tracing::warn!("the device {} tells nothing while it works: {error}", self.name);
                self.work(&mut moving);
            }
        }
        match (&moving.data, moving.at) {
            (Some(data), MoveState::PreCopy) => data.ahead().unwrap_or(0).min(MOST),
            _ => 0,
        }
    }

    /// Reads more of what it is. `None`: there is nothing more now, and if it stands still, nothing at all.
    ///
    /// # Errors
    /// Its driver fails: what was read is void.
    pub fn read(&self, buffer: &mut [u8]) -> Result<Option<Piece>, MoveError> {
        self.patiently(TELL, |moving| self.try_read(moving, buffer))
    }

    /// The same; pending: its driver has none yet.
    fn try_read(&self, moving: &mut Moving, buffer: &mut [u8]) -> Result<Poll<Option<Piece>>, MoveError> {
        if moving.at == MoveState::Stop {
            let begun = self.enter(moving, MoveState::StopCopy);
            begun.map_err(self.failed("begin to tell its state"))?;
        }
        if moving.at == MoveState::Resuming || moving.done {
            return Ok(Poll::Ready(None));
        }
        let Some(data) = &mut moving.data else {
            return match moving.at.is_still() {
                // It is something, and another one would become nothing.
                true => Err(self.failed(TELL)(io::ErrorKind::NotFound.into())),
                false => Ok(Poll::Ready(None)),
            };
        };
        let len = match data.read(buffer) {
            Err(error) if error.raw_os_error() == Some(libc::ENOMSG) && !moving.at.is_still() => 0,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Poll::Pending),
            other => other.map_err(self.failed(TELL))?,
        };
        if len == 0 && !moving.at.is_still() {
            return Ok(Poll::Ready(None));
        }
        moving.done = len == 0;
        moving.carry(len, &self.name)?;
        let begins = std::mem::replace(&mut moving.fresh, false);
        Ok(Poll::Ready((begins || len > 0).then_some(Piece { begins, len })))
    }

    /// Tries until its driver can, but not for ever. Nobody who wants to pause or reset it waits meanwhile.
    fn patiently<T>(
        &self,
        what: &'static str,
        mut act: impl FnMut(&mut Moving) -> Result<Poll<T>, MoveError>,
    ) -> Result<T, MoveError> {
        let end = Instant::now() + PATIENCE;
        loop {
            let tried = act(&mut lock(self.moving()))?;
            match tried {
                Poll::Ready(done) => return Ok(done),
                Poll::Pending if Instant::now() < end => thread::sleep(AGAIN),
                Poll::Pending => {
                    let name = self.name.clone();
                    return Err(MoveError::Late { name, what });
                }
            }
        }
    }

    /// Has it become another one, whose data come next. All that came before is void.
    ///
    /// # Errors
    /// Its driver's.
    pub fn begin_load(&self) -> Result<(), MoveError> {
        self.handle.reset().map_err(self.failed("be reset"))?;
        let mut moving = lock(self.moving());
        let begun = self.enter(&mut moving, MoveState::Resuming);
        begun.map_err(self.failed("take the state of another one"))
    }

    /// Takes the next of these data.
    ///
    /// # Errors
    /// Its driver does not want them, or they are too many.
    pub fn load(&self, bytes: &[u8]) -> Result<(), MoveError> {
        lock(self.moving()).carry(bytes.len(), &self.name)?;
        let mut left = bytes;
        while !left.is_empty() {
            let taken = self.patiently(TAKE, |moving| self.try_load(moving, left))?;
            left = left.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    /// Takes some of them; pending: its driver takes none yet.
    fn try_load(&self, moving: &mut Moving, bytes: &[u8]) -> Result<Poll<usize>, MoveError> {
        let Moving { at, data, .. } = moving;
        let data = data.as_mut().filter(|_| *at == MoveState::Resuming);
        let data = data.ok_or_else(|| MoveError::Unasked(self.name.clone()))?;
        match data.write(bytes) {
            Ok(0) => Err(self.failed(TAKE)(io::ErrorKind::WriteZero.into())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Poll::Pending),
            other => other.map(Poll::Ready).map_err(self.failed(TAKE)),
        }
    }

    /// That were all. Now it stands still, as the other one did.
    ///
    /// # Errors
    /// Its driver does not want them.
    pub fn finish_load(&self) -> Result<(), MoveError> {
        let mut moving = lock(self.moving());
        if moving.at != MoveState::Resuming {
            return Err(MoveError::Unasked(self.name.clone()));
        }
        let done = self.enter(&mut moving, MoveState::Stop);
        done.map_err(self.failed("become what came"))
    }
}

impl Moving {
    /// The device was reset: that ends everything.
    pub(crate) fn was_reset(&mut self) {
        *self = Self::default();
    }
}
