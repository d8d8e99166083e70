//! MSI-X: the vector table, its masks and the pending bits (PCI Local Bus 3.0, 6.8.2).

use std::io;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use triarch_device_core::{AccessError, MsiMessage, MsiRouter, MsiVector, RateLimit};
use vmm_sys_util::eventfd::EventFd;

use crate::lock;

const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
const ENTRY_SIZE: u64 = 16;
const ENTRY_MASKED: u32 = 1;

/// One entry of a saved vector table, as the guest wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsiXEntryV1 {
    /// Message address (GPA).
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Vector control: bit 0 masks.
    pub control: u32,
}

impl Default for MsiXEntryV1 {
    fn default() -> Self {
        Self {
            address: 0,
            data: 0,
            control: ENTRY_MASKED,
        }
    }
}

/// A saved [`MsiX`]. The message control register is saved with the configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsiXStateV1 {
    /// The vector table.
    pub entries: Vec<MsiXEntryV1>,
    /// Numbers of the vectors with a pending bit.
    pub pending: Vec<u16>,
}

/// A saved vector table that belongs to another kind of function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the saved MSI-X state does not fit {0} vectors")]
pub struct MsiXStateError(usize);

/// The MSI-X vectors of a function. Raising one takes no lock.
///
/// A vector costs nothing until the guest unmasks it for the first time: most functions offer more than a guest uses, and
/// none is in use yet when the guest starts.
pub struct MsiX {
    router: Arc<dyn MsiRouter>,
    enabled: AtomicBool,
    vectors: Box<[Vector]>,
    table: Mutex<Table>,
    log: RateLimit,
}

#[derive(Default)]
struct Vector {
    msi: OnceLock<Arc<dyn MsiVector>>,
    /// Raised before there was a vector to raise.
    early: AtomicBool,
}

struct Table {
    requester: Option<u16>,
    control: u16,
    entries: Vec<MsiXEntryV1>,
    /// The message each vector delivers now, `None` while masked.
    live: Vec<Option<MsiMessage>>,
}

impl MsiX {
    /// Where the message control register is in the capability, in bytes.
    pub const CONTROL: u16 = 2;
    /// Capability id.
    pub const CAPABILITY_ID: u8 = 0x11;

    /// `count` masked vectors (1 to 2048), disabled.
    pub fn new(router: Arc<dyn MsiRouter>, count: u16) -> Self {
        let count = usize::from(count.clamp(1, 2048));
        Self {
            router,
            enabled: AtomicBool::new(false),
            vectors: std::iter::repeat_with(Vector::default).take(count).collect(),
            table: Mutex::new(Table {
                requester: None,
                control: 0,
                entries: vec![MsiXEntryV1::default(); count],
                live: vec![None; count],
            }),
            log: RateLimit::default(),
        }
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        self.vectors.len() as u16 // at most 2048
    }

    /// Body and writable bits of the capability for [`ConfigSpace::add_capability`](crate::ConfigSpace::add_capability), with the
    /// table at byte `table` of BAR `bar` and the pending bits at byte `pba` of it, both multiples of 8.
    pub fn capability(&self, bar: u8, table: u32, pba: u32) -> ([u8; 10], [u8; 2]) {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(self.count() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pba | u32::from(bar)).to_le_bytes());
        (body, (ENABLE | FUNCTION_MASK).to_le_bytes())
    }

    /// The function got its place on the bus, or another one: vectors can be made from now on, and those unmasked already are.
    pub fn attach(&self, requester: u16) {
        let mut table = lock(&self.table);
        table.requester = Some(requester);
        for (index, vector) in self.vectors.iter().enumerate() {
            if let Some(Err(error)) = vector.msi.get().map(|msi| msi.rename(requester)) {
                self.warn(index, &error);
            }
        }
        self.sync_all(&mut table);
    }

    /// The guest wrote message control.
    pub fn set_control(&self, control: u16) {
        let mut table = lock(&self.table);
        if table.control == control {
            return;
        }
        table.control = control;
        self.enabled.store(control & ENABLE != 0, Ordering::Release);
        self.sync_all(&mut table);
    }

    /// Whether the guest enabled MSI-X.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Raises vector `index`; one that does not exist raises nothing.
    pub fn trigger(&self, index: u16) -> io::Result<()> {
        let Some(vector) = self.vectors.get(usize::from(index)) else {
            return Ok(());
        };
        if let Some(msi) = vector.msi.get() {
            return msi.trigger();
        }
        vector.early.store(true, Ordering::Relaxed);
        // Pairs with the one in `vector`: either it sees the mark or this thread sees the vector.
        fence(Ordering::SeqCst);
        match vector.msi.get() {
            Some(msi) if vector.early.swap(false, Ordering::Relaxed) => msi.trigger(),
            _ => Ok(()),
        }
    }

    /// The vectors that deliver messages now.
    pub fn live(&self) -> Vec<u16> {
        let table = lock(&self.table);
        let live = (0u16..).zip(&table.live);
        live.filter(|(_, message)| message.is_some())
            .map(|(index, _)| index)
            .collect()
    }

    /// The event behind vector `index`, to be raised by the kernel or another process. Fails when the vector does not exist or
    /// none can be had.
    pub fn event_fd(&self, index: u16) -> io::Result<EventFd> {
        let table = lock(&self.table);
        let requester = table.requester.ok_or(io::ErrorKind::NotConnected)?;
        self.vector(usize::from(index), requester)?.event_fd().try_clone()
    }

    /// Reads the vector table at `offset` bytes: 4 or 8 bytes, aligned.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let table = lock(&self.table);
        for (at, word) in words(offset, data.len())?.zip(data.chunks_exact_mut(4)) {
            let entry = table
                .entries
                .get((at / ENTRY_SIZE) as usize)
                .ok_or(AccessError::BadAccess)?;
            let value = match at % ENTRY_SIZE {
                0 => entry.address as u32,
                4 => (entry.address >> 32) as u32,
                8 => entry.data,
                _ => entry.control,
            };
            word.copy_from_slice(&value.to_le_bytes());
        }
        Ok(())
    }

    /// Writes the vector table at `offset` bytes: 4 or 8 bytes, aligned.
    pub fn table_write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let mut table = lock(&self.table);
        let index = (offset / ENTRY_SIZE) as usize;
        // Eight aligned bytes never leave an entry.
        for (at, word) in words(offset, data.len())?.zip(data.chunks_exact(4)) {
            let entry = table.entries.get_mut(index).ok_or(AccessError::BadAccess)?;
            let value = word.iter().rev().fold(0, |n, byte| n << 8 | u32::from(*byte));
            match at % ENTRY_SIZE {
                0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
                4 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
                8 => entry.data = value,
                _ => entry.control = value & ENTRY_MASKED,
            }
        }
        self.sync(&mut table, index);
        Ok(())
    }

    /// Reads the pending bits at `offset` bytes: 4 or 8 bytes, aligned.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let size = (self.vectors.len() as u64).div_ceil(64) * 8;
        if words(offset, data.len())?.any(|at| at >= size) {
            return Err(AccessError::BadAccess);
        }
        for (byte, at) in data.iter_mut().zip(offset as usize..) {
            let bits = self.vectors.iter().skip(8 * at).take(8);
            *byte = bits
                .rev()
                .fold(0, |byte, vector| byte << 1 | u8::from(vector.pending()));
        }
        Ok(())
    }

    /// The table and what is pending, for a snapshot.
    pub fn save(&self) -> MsiXStateV1 {
        MsiXStateV1 {
            entries: lock(&self.table).entries.clone(),
            pending: (0..self.count())
                .filter(|i| self.vectors[usize::from(*i)].pending())
                .collect(),
        }
    }

    /// Takes over a saved table; follow with [`set_control`](Self::set_control).
    pub fn restore(&self, state: &MsiXStateV1) -> Result<(), MsiXStateError> {
        let count = self.vectors.len();
        if state.entries.len() != count || state.pending.iter().any(|i| usize::from(*i) >= count) {
            return Err(MsiXStateError(count));
        }
        let mut table = lock(&self.table);
        table.entries.copy_from_slice(&state.entries);
        for entry in &mut table.entries {
            entry.control &= ENTRY_MASKED;
            entry.address &= !3;
        }
        self.sync_all(&mut table);
        drop(table);
        for index in &state.pending {
            if let Err(error) = self.trigger(*index) {
                self.warn(usize::from(*index), &error);
            }
        }
        Ok(())
    }

    fn sync_all(&self, table: &mut Table) {
        for index in 0..self.vectors.len() {
            self.sync(table, index);
        }
    }

    /// Makes a vector deliver what the table and the masks say.
    fn sync(&self, table: &mut Table, index: usize) {
        let (Some(entry), Some(live)) = (table.entries.get(index), table.live.get_mut(index)) else {
            return;
        };
        let open = table.control & (ENABLE | FUNCTION_MASK) == ENABLE && entry.control & ENTRY_MASKED == 0;
        let wanted = open.then_some(MsiMessage {
            address: entry.address,
            data: entry.data,
        });
        if *live == wanted {
            return;
        }
        let done = match (wanted, table.requester) {
            (Some(message), Some(requester)) => self.vector(index, requester).and_then(|msi| msi.unmask(message)),
            (Some(_), None) => return, // attach() comes back here
            (None, _) => self.vectors[index].msi.get().map_or(Ok(()), |msi| msi.mask()),
        };
        match done {
            Ok(()) => *live = wanted,
            Err(error) => self.warn(index, &error),
        }
    }

    /// Vector `index`, made if need be. Called with the table locked, so by one thread at a time.
    fn vector(&self, index: usize, requester: u16) -> io::Result<&Arc<dyn MsiVector>> {
        let vector = self.vectors.get(index).ok_or(io::ErrorKind::InvalidInput)?;
        if let Some(msi) = vector.msi.get() {
            return Ok(msi);
        }
        let made = self.router.allocate(requester)?;
        let msi = vector.msi.get_or_init(|| made);
        fence(Ordering::SeqCst);
        if vector.early.swap(false, Ordering::Relaxed) {
            msi.trigger()?;
        }
        Ok(msi)
    }

    fn warn(&self, index: usize, error: &io::Error) {
        if let Some(held_back) = self.log.admit() {
            tracing::warn!(vector = index, held_back, "cannot set up an MSI-X vector: {error}");
        }
    }
}

impl Vector {
    fn pending(&self) -> bool {
        self.msi
            .get()
            .map_or_else(|| self.early.load(Ordering::Relaxed), |msi| msi.pending())
    }
}

/// Offsets of the 32-bit words of an access, which must be one or two of them, aligned to its size.
fn words(offset: u64, len: usize) -> Result<impl Iterator<Item = u64>, AccessError> {
    if !matches!(len, 4 | 8) || !offset.is_multiple_of(len as u64) {
        return Err(AccessError::BadAccess);
    }
    Ok((offset..).step_by(4).take(len / 4))
}

#[cfg(test)]
mod tests {
    use triarch_device_core::mock::{MockMsi, MockRouter};

    use super::*;

    fn msix(count: u16) -> (MsiX, Arc<MockRouter>) {
        let router = Arc::new(MockRouter::default());
        (MsiX::new(router.clone(), count), router)
    }

    fn made(router: &MockRouter) -> Vec<Arc<MockMsi>> {
        router.vectors.lock().expect("lock").clone()
    }

    fn program(msix: &MsiX, index: u64, message: MsiMessage) {
        msix.table_write(16 * index, &message.address.to_le_bytes())
            .expect("address");
        msix.table_write(16 * index + 8, &message.data.to_le_bytes())
            .expect("data");
    }

    fn mask(msix: &MsiX, index: u64, on: bool) {
        msix.table_write(16 * index + 12, &u32::from(on).to_le_bytes())
            .expect("control");
    }

    fn pba(msix: &MsiX) -> u64 {
        let mut bits = [0; 8];
        msix.pba_read(0, &mut bits).expect("pba");
        u64::from_le_bytes(bits)
    }

    const MESSAGE: MsiMessage = MsiMessage {
        address: 0xfee0_1000,
        data: 0x41,
    };

    #[test]
    fn a_vector_is_made_when_first_unmasked() {
        let (msix, router) = msix(3);
        msix.attach(8);
        msix.set_control(ENABLE);
        program(&msix, 1, MESSAGE);
        assert!(made(&router).is_empty());
        mask(&msix, 1, false);
        let vectors = made(&router);
        assert_eq!(vectors.len(), 1);
        assert_eq!(vectors[0].message(), Some(MESSAGE));
        msix.trigger(1).expect("trigger");
        assert_eq!(vectors[0].take(), 1);
        mask(&msix, 1, true);
        mask(&msix, 1, false);
        assert_eq!(made(&router).len(), 1, "and only then");
        assert_eq!(vectors[0].requester(), 8);
        msix.attach(0x0900);
        assert_eq!(vectors[0].requester(), 0x0900, "its bus got another number");
    }

    #[test]
    fn every_mask_holds_and_shows_as_pending() {
        let (msix, router) = msix(70);
        msix.attach(8);
        program(&msix, 69, MESSAGE);
        mask(&msix, 69, false);
        assert!(made(&router).is_empty(), "disabled");
        msix.set_control(ENABLE | FUNCTION_MASK);
        assert!(made(&router).is_empty(), "function mask");
        msix.trigger(69).expect("trigger");
        let mut high = [0; 4];
        msix.pba_read(8, &mut high).expect("pba");
        assert_eq!(high, [1 << 5, 0, 0, 0], "pending before there is a vector");
        msix.set_control(ENABLE);
        let vector = made(&router).remove(0);
        assert_eq!(vector.message(), Some(MESSAGE));
        assert_eq!(vector.take(), 1, "what came early is delivered");
        mask(&msix, 69, true);
        assert_eq!(vector.message(), None);
        msix.trigger(69).expect("trigger");
        msix.pba_read(8, &mut high).expect("pba");
        assert_eq!(high, [1 << 5, 0, 0, 0]);
        mask(&msix, 69, false);
        msix.pba_read(8, &mut high).expect("pba");
        assert_eq!(high, [0; 4]);
        msix.set_control(0);
        assert_eq!(vector.message(), None);
    }

    #[test]
    fn a_new_message_takes_effect() {
        let (msix, router) = msix(1);
        msix.attach(8);
        msix.set_control(ENABLE);
        program(&msix, 0, MESSAGE);
        mask(&msix, 0, false);
        let moved = MsiMessage {
            address: 0xfee0_2000,
            ..MESSAGE
        };
        program(&msix, 0, moved);
        assert_eq!(made(&router)[0].message(), Some(moved));
    }

    #[test]
    fn odd_accesses_are_refused() {
        let (msix, _router) = msix(2);
        for (offset, len) in [(0, 1), (0, 2), (2, 4), (4, 8), (32, 4), (u64::MAX - 3, 4), (0, 16)] {
            let mut data = vec![0; len];
            assert_eq!(
                msix.table_read(offset, &mut data),
                Err(AccessError::BadAccess),
                "{offset}+{len}"
            );
            assert_eq!(
                msix.table_write(offset, &data),
                Err(AccessError::BadAccess),
                "{offset}+{len}"
            );
        }
        for (offset, len) in [(0, 1), (4, 8), (8, 4), (u64::MAX - 7, 8)] {
            assert_eq!(msix.pba_read(offset, &mut vec![0; len]), Err(AccessError::BadAccess));
        }
        let mut entry = [0; 8];
        msix.table_read(24, &mut entry).expect("entry 1");
        assert_eq!(entry, [0, 0, 0, 0, 1, 0, 0, 0], "masked at first");
    }

    #[test]
    fn state_moves_to_another_function() {
        let (first, _router) = msix(2);
        first.attach(8);
        first.set_control(ENABLE);
        program(&first, 0, MESSAGE);
        mask(&first, 0, false);
        first.trigger(1).expect("trigger");
        assert_eq!(pba(&first), 0b10);
        let (second, router) = msix(2);
        second.restore(&first.save()).expect("same function");
        second.set_control(ENABLE);
        assert!(made(&router).is_empty(), "no place on the bus yet");
        second.attach(16);
        assert_eq!(made(&router)[0].message(), Some(MESSAGE));
        assert_eq!(pba(&second), 0b10);
        assert_eq!(second.save(), first.save());
        let (other, _router) = msix(3);
        assert_eq!(other.restore(&first.save()), Err(MsiXStateError(3)));
    }

    #[test]
    fn triggers_race_with_the_first_unmask_and_none_is_lost() {
        for _ in 0..200 {
            let (msix, router) = msix(1);
            msix.attach(8);
            msix.set_control(ENABLE);
            std::thread::scope(|s| {
                s.spawn(|| msix.trigger(0).expect("trigger"));
                mask(&msix, 0, false);
            });
            assert_eq!(made(&router)[0].take(), 1);
        }
    }
}
