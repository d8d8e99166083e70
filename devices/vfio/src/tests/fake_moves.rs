//! A device that moves, and is not there.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use super::fake::{Fake, Opened};
use crate::kernel::{DataFile, MoveKinds, MoveState, Moves};
use crate::lock;

/// What a device that moves does.
#[derive(Default)]
pub(crate) struct FakeMoves {
    /// None: it has no such protocol.
    pub(crate) kinds: Option<MoveKinds>,
    pub(crate) state: Option<MoveState>,
    /// Where it was, in the order of all devices that share this.
    pub(crate) ways: Arc<Mutex<Vec<String>>>,
    pub(crate) name: &'static str,
    /// What it is: what it tells while it works, and then.
    pub(crate) ahead: Vec<u8>,
    pub(crate) rest: Vec<u8>,
    /// How much of it there is, as it says.
    pub(crate) told: u64,
    /// What it became.
    pub(crate) loaded: Vec<u8>,
    /// Bytes after which its driver has enough.
    pub(crate) most: Option<usize>,
    /// How often its driver has nothing yet, and takes nothing.
    pub(crate) waits: u64,
    /// Its driver gives no data when it should.
    pub(crate) mute: bool,
    /// States that it does not get to, and where it is then.
    pub(crate) fails: Vec<(MoveState, MoveState)>,
    pub(crate) no_log: bool,
    /// What it is asked to log.
    pub(crate) logged: Vec<(u64, u64)>,
    /// Pages that it wrote, by their addresses.
    pub(crate) wrote: BTreeSet<u64>,
}

impl FakeMoves {
    fn at(&self) -> MoveState {
        self.state.unwrap_or(MoveState::Running)
    }

    fn wait(&mut self) -> io::Result<()> {
        let waits = self.waits > 0;
        self.waits = self.waits.saturating_sub(1);
        match waits {
            true => Err(refused(libc::EAGAIN)),
            false => Ok(()),
        }
    }
}

/// What the state of a device is read from and written to.
struct Data(Fake);

fn refused(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl Moves for Opened {
    fn can_move(&self) -> io::Result<Option<MoveKinds>> {
        self.fake.call("can move")?;
        Ok(lock(&self.fake.world).moves.kinds)
    }

    fn enter(&self, state: MoveState) -> io::Result<Option<Box<dyn DataFile>>> {
        let mut world = lock(&self.fake.world);
        let moves = &mut world.moves;
        let before = moves.at();
        assert!(
            moves.kinds.is_some_and(|kinds| legal(before, state, kinds)),
            "{before:?} to {state:?}"
        );
        lock(&moves.ways).push(format!("{} {state:?}", moves.name));
        if let Some((_, then)) = moves.fails.iter().find(|(failing, _)| *failing == state) {
            moves.state = Some(*then);
            return Err(refused(libc::EIO));
        }
        moves.state = Some(state);
        if state == MoveState::Resuming {
            moves.loaded.clear();
        }
        let begins = state.has_data() && !before.has_data() && !moves.mute;
        Ok(begins.then(|| Box::new(Data(self.fake.clone())) as Box<dyn DataFile>))
    }

    fn state(&self) -> io::Result<MoveState> {
        Ok(lock(&self.fake.world).moves.at())
    }

    fn data_size(&self) -> io::Result<u64> {
        Ok(lock(&self.fake.world).moves.told)
    }

    fn can_log(&self) -> bool {
        !lock(&self.fake.world).moves.no_log
    }

    fn start_log(&self, _page: u64, ranges: &[(u64, u64)]) -> io::Result<()> {
        self.fake.call("start log")?;
        lock(&self.fake.world).moves.logged = ranges.to_vec();
        Ok(())
    }

    fn stop_log(&self) -> io::Result<()> {
        self.fake.call("stop log")
    }

    fn take_log(&self, page: u64, iova: u64, len: u64, bitmap: &mut [u64]) -> io::Result<()> {
        self.fake.call("take log")?;
        let moves = &mut lock(&self.fake.world).moves;
        let here = iova..iova + len;
        for at in moves.wrote.range(here.clone()) {
            let bit = (at - iova) / page;
            bitmap[(bit / 64) as usize] |= 1 << (bit % 64);
        }
        moves.wrote.retain(|at| !here.contains(at));
        Ok(())
    }
}

/// The ways that the kernel knows (vfio.h), as far as they are used.
fn legal(from: MoveState, to: MoveState, kinds: MoveKinds) -> bool {
    use MoveState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
    let has = match to {
        RunningP2p => kinds.p2p,
        PreCopy => kinds.pre_copy,
        PreCopyP2p => kinds.pre_copy && kinds.p2p,
        _ => true,
    };
    let known = match from {
        Error => false,
        Running | RunningP2p => to != StopCopy && to != Resuming || from == Running && to == Resuming,
        Stop | StopCopy => !matches!(to, PreCopy | PreCopyP2p),
        Resuming => matches!(to, Stop | Running | RunningP2p),
        PreCopy | PreCopyP2p => matches!(to, StopCopy | Running | RunningP2p | PreCopy | PreCopyP2p),
    };
    has && known
}

impl DataFile for Data {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.call("read data")?;
        let moves = &mut lock(&self.0.world).moves;
        moves.wait()?;
        let still = moves.at().is_still();
        let from = match moves.ahead.is_empty() {
            false => &mut moves.ahead,
            true if still => &mut moves.rest,
            true => return Err(refused(libc::ENOMSG)),
        };
        let len = from.len().min(buffer.len());
        buffer[..len].copy_from_slice(&from[..len]);
        from.drain(..len);
        Ok(len)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.call("write data")?;
        let moves = &mut lock(&self.0.world).moves;
        moves.wait()?;
        // Never all of it at once.
        let bytes = &bytes[..bytes.len().min(3)];
        if moves.most.is_some_and(|most| moves.loaded.len() + bytes.len() > most) {
            return Err(refused(libc::EINVAL));
        }
        moves.loaded.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn ahead(&self) -> io::Result<u64> {
        Ok(lock(&self.0.world).moves.ahead.len() as u64)
    }
}
