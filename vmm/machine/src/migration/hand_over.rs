//! A guest's memory as files, for a VMM on the same host and from one.
//!
//! Each zone, each room of virtio-mem and each memory device has a file of its own, and both sides know from the configuration what is in
//! it and where. So a destination believes nothing of the files that come: they must be what it would have made itself.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Mutex, PoisonError};

use triarch_api::VmConfig;
use triarch_memory::{GuestMemory, GuestRegion, Identity, RamOptions, ZoneRam, check_handed, file_of, shared_file};
use triarch_migration::{Blocker, Cause, Handed, Layout, Memory, Part, Place, Region};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::Role;
use super::call::Caller;
use super::destination::moved;
use super::memory::regions;
use crate::MachineError;
use crate::control::Controller;
use crate::memory::plan::MemoryPlan;
use crate::memory::virtio_mem::{self, Room};

/// Bytes of the file that is no memory of the guest.
const WORD: u64 = 4096;

/// What both sides know and neither forgets when it is killed: whether the destination has let the guest run. Its memory is not what the
/// source saved from then on.
pub(super) struct Ran(File);

impl Ran {
    pub(super) fn new() -> Result<Self, MachineError> {
        Ok(Self(shared_file(WORD)?))
    }

    pub(super) fn set(&self, ran: bool) -> io::Result<()> {
        self.0.write_all_at(&[u8::from(ran)], 0)
    }

    /// Where that cannot be known, it has.
    fn is_set(&self) -> bool {
        let mut byte = [1];
        self.0.read_exact_at(&mut byte, 0).is_err() || byte != [0]
    }

    fn copy(&self) -> io::Result<File> {
        self.0.try_clone()
    }
}

/// The memory of a guest with this configuration that no other process can have.
pub(super) fn private(config: &VmConfig) -> Vec<Blocker> {
    let plan = MemoryPlan::new(config, false);
    let named = !config.memory.zones().is_empty();
    let blocker = |id: &str| {
        let what = match named {
            true => format!("the memory zone '{id}'"),
            false => "the guest's memory".to_owned(),
        };
        Blocker {
            what: Part::Memory,
            name: if named { id.to_owned() } else { String::new() },
            reason: format!("{what} is private to its VMM, which cannot hand it over"),
            remedy: "start the guest with shared=on, or leave local out, and its memory is copied".to_owned(),
        }
    };
    let private = plan.zones.iter().filter(|zone| !zone.ram.options.shared);
    private.map(|zone| blocker(&zone.ram.id)).collect()
}

/// The files of `memory`, and behind them that of `ran`.
pub(super) fn files(memory: &GuestMemory, ran: &Ran) -> Result<Handed, MachineError> {
    let failed = MachineError::host("hand the guest's memory over");
    let mut handed = Handed::default();
    let mut known: Vec<(u64, u64)> = Vec::new();
    for region in memory.iter() {
        let (file, offset) = file_of(region).ok_or_else(|| {
            let at = region.start_addr().raw_value();
            moved(format!(
                "its memory at {at:#x} is in no file that another process can have; leave local out"
            ))
        })?;
        let found = file.metadata().map_err(&failed)?;
        let identity = (found.dev(), found.ino());
        let number = match known.iter().position(|other| *other == identity) {
            Some(number) => number,
            None => {
                known.push(identity);
                handed.files.push(file.try_clone().map_err(&failed)?.into());
                known.len() - 1
            }
        };
        handed.places.push((number as u64, offset));
    }
    handed.files.push(ran.copy().map_err(&failed)?.into());
    Ok(handed)
}

/// The memory of a guest that is here, and whose VMM's successor has it already.
pub(super) struct Handing {
    regions: Vec<Region>,
    /// Until they were sent. They are looked at before: the thread of a migration may not.
    files: Mutex<Option<Handed>>,
    caller: Caller,
}

impl Handing {
    pub(super) fn new(memory: &GuestMemory, ran: &Ran, caller: Caller) -> Result<Self, MachineError> {
        Ok(Self {
            regions: regions(memory),
            files: Mutex::new(Some(files(memory, ran)?)),
            caller,
        })
    }
}

impl Memory for Handing {
    fn regions(&self) -> Vec<Region> {
        self.regions.clone()
    }

    fn read(&self, _gpa: u64, _buffer: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn hand_over(&self) -> Result<Handed, Cause> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner).take();
        files.ok_or_else(|| "it was handed over already".into())
    }

    fn start_log(&self) -> io::Result<()> {
        self.caller.post(Controller::migration_copies);
        Ok(())
    }

    fn fetch_log(&self) -> io::Result<Vec<Range<u64>>> {
        Ok(Vec::new())
    }

    fn stop_log(&self) {}
}

/// Files that came with an offer.
pub(super) struct Given {
    files: Vec<Option<File>>,
    /// Where regions of the guest are, by their GPAs.
    places: Vec<(u64, Place)>,
    known: Vec<Identity>,
}

impl Given {
    pub(super) fn new(handed: Handed, layout: &Layout) -> Self {
        let gpas = layout.regions().iter().map(|region| region.gpa);
        Self {
            files: handed.files.into_iter().map(|file| Some(file.into())).collect(),
            places: gpas.zip(handed.places).collect(),
            known: Vec::new(),
        }
    }

    /// The file of `what`, which is `size` bytes made with `options`, and has the regions of the guest at `parts`: GPAs, and where they are
    /// in it. `None`: the guest has none.
    ///
    /// # Errors
    /// The files that came are not such.
    fn take(
        &mut self,
        what: &str,
        parts: impl Iterator<Item = (u64, u64)>,
        size: u64,
        options: &RamOptions,
    ) -> Result<Option<File>, MachineError> {
        let elsewhere = || moved(format!("{what} is in other files than with this configuration"));
        let mut number = None;
        for (gpa, offset) in parts {
            let at = self.places.binary_search_by_key(&gpa, |(gpa, _)| *gpa);
            let (_, (file, found)) = self.places[at.map_err(|_| elsewhere())?];
            if found != offset || *number.get_or_insert(file) != file {
                return Err(elsewhere());
            }
        }
        let Some(number) = number else { return Ok(None) };
        let file = self.files.get_mut(number as usize).and_then(Option::take);
        let file = file.ok_or_else(elsewhere)?;
        self.check(what, &file, size, options)?;
        Ok(Some(file))
    }

    /// What the guest starts with.
    pub(super) fn ram(&mut self, plan: &MemoryPlan) -> Result<GuestMemory, MachineError> {
        let mut files = Vec::new();
        for ZoneRam { id, ranges, options } in plan.zones.iter().map(|zone| &zone.ram) {
            let mut size = 0;
            let parts = ranges.iter().map(|(at, len)| {
                let offset = size;
                size += len;
                (at.0, offset)
            });
            let parts: Vec<_> = parts.collect();
            let what = format!("its memory '{id}'");
            let file = self.take(&what, parts.into_iter(), size, options)?;
            files.push(file.ok_or_else(|| moved(format!("{what} did not come")))?);
        }
        Ok(plan.adopt(&files)?)
    }

    /// Where it grows by virtio-mem.
    pub(super) fn rooms(&mut self, plan: &MemoryPlan) -> Result<Vec<Room>, MachineError> {
        virtio_mem::rooms_of(plan, |zone, range| {
            let places = self.places.iter().map(|(gpa, _)| *gpa);
            let inside = places.filter(|gpa| range.contains(gpa));
            let parts: Vec<_> = inside.map(|gpa| (gpa, gpa - range.start)).collect();
            let what = format!("what came to its memory '{}'", zone.ram.id);
            let size = range.end - range.start;
            self.take(&what, parts.into_iter(), size, &zone.ram.options)
        })
    }

    /// A memory device.
    pub(super) fn device(&mut self, region: &Region, options: &RamOptions) -> Result<Arc<GuestRegion>, MachineError> {
        let what = format!("its memory device at {:#x}", region.gpa);
        let file = self.take(&what, std::iter::once((region.gpa, 0)), region.len, options)?;
        let file = file.ok_or_else(|| moved(format!("{what} did not come")))?;
        let at = GuestAddress(region.gpa);
        Ok(triarch_memory::adopt_region(at, region.len, options, &file)?)
    }

    fn check(&mut self, what: &str, file: &File, size: u64, options: &RamOptions) -> Result<(), MachineError> {
        let checked = check_handed(file, size, options);
        let identity = checked.map_err(|error| moved(format!("{what}: {}", triarch_api::chain(&error))))?;
        if self.known.contains(&identity) {
            return Err(moved(format!("{what} came as a file that is something else already")));
        }
        self.known.push(identity);
        Ok(())
    }

    /// What is left when all memory was taken.
    pub(super) fn end(mut self) -> Result<Ran, MachineError> {
        let last = self.files.pop().flatten();
        let last = last.ok_or_else(|| moved("not all files of it came".to_owned()))?;
        if self.files.iter().any(Option::is_some) {
            return Err(moved("more files came than it has memory".to_owned()));
        }
        let shared = RamOptions {
            shared: true,
            ..RamOptions::default()
        };
        self.check("what tells whether it runs", &last, WORD, &shared)?;
        Ok(Ran(last))
    }
}

impl Controller {
    /// Whether the guest that is here can go on: not if a destination that had its memory has let it run.
    pub(crate) fn check_memory_is_ours(&self) -> Result<(), MachineError> {
        let sent = match self.migrations.running.as_ref().map(|running| &running.role) {
            Some(Role::Source(sent)) => sent.ran.as_ref(),
            _ => None,
        };
        match sent.or(self.migrations.handed.as_ref()) {
            Some(ran) if ran.is_set() => Err(moved(
                "it ran at the destination with the memory that was handed over, which is not that of its state here any more. If it does \
                 not run there either, it is lost like a guest whose host failed: vm.reboot starts it anew"
                    .to_owned(),
            )),
            _ => Ok(()),
        }
    }

    /// Whatever comes next has memory of its own.
    pub(crate) fn forget_handed(&mut self) {
        self.migrations.handed = None;
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use vm_memory::{Bytes, GuestAddressSpace};

    use super::super::memory::Prepared;
    use super::*;

    const MIB: u64 = 1 << 20;

    fn config(size: u64) -> VmConfig {
        let mut config = VmConfig::default();
        config.memory.size = size;
        config.memory.shared = true;
        config
    }

    /// The memory of a guest with 64 MiB, what tells of it, and where it begins.
    fn guest() -> (GuestMemory, Layout, u64) {
        let memory = MemoryPlan::new(&config(64 * MIB), false).allocate().expect("memory");
        let layout = Layout::new(regions(&memory)).expect("a layout");
        let base = layout.regions()[0].gpa;
        memory.write_obj(7u8, GuestAddress(base + MIB)).expect("write");
        (memory, layout, base)
    }

    /// Why a destination with `size` bytes of memory does not take what was handed over, after `change`.
    fn refused(size: u64, change: impl FnOnce(&mut Handed)) -> String {
        let (memory, layout, _) = guest();
        let mut handed = files(&memory, &Ran::new().expect("a file")).expect("files");
        change(&mut handed);
        let mut given = Given::new(handed, &layout);
        let made = Prepared::new(&config(size), &layout, Some(&mut given));
        let end = made.and_then(|_| given.end());
        end.err().map(|error| error.chain()).expect("refused")
    }

    #[test]
    fn memory_is_taken_with_what_is_in_it() {
        let (memory, layout, base) = guest();
        let ran = Ran::new().expect("a file");
        let mut given = Given::new(files(&memory, &ran).expect("files"), &layout);
        let (prepared, _) = Prepared::new(&config(64 * MIB), &layout, Some(&mut given)).expect("made");
        let theirs = given.end().expect("all were taken");
        drop(memory);
        let byte = prepared.handle.memory().read_obj::<u8>(GuestAddress(base + MIB));
        assert_eq!(byte.expect("read"), 7);
        assert!(!ran.is_set());
        theirs.set(true).expect("noted");
        assert!(ran.is_set());
        theirs.set(false).expect("noted");
        assert!(!ran.is_set());
    }

    #[test]
    fn what_is_not_what_it_would_have_made_is_refused() {
        let regular = || OwnedFd::from(File::open(std::env::current_exe().expect("a path")).expect("a file"));
        let memory = |size| OwnedFd::from(shared_file(size).expect("a file"));
        let says = |error: String, words: &str| assert!(error.contains(words), "{error}");
        says(
            refused(64 * MIB, |handed| handed.files[0] = regular()),
            "no memory file",
        );
        says(
            refused(64 * MIB, |handed| handed.files[0] = memory(32 * MIB)),
            "bytes where the guest has",
        );
        says(refused(64 * MIB, |handed| handed.places[0].1 = 4096), "in other files");
        says(refused(64 * MIB, |handed| handed.places[0].0 = 9), "in other files");
        says(
            refused(64 * MIB, |handed| handed.files.push(memory(4096))),
            "more files came",
        );
        says(refused(64 * MIB, |handed| drop(handed.files.pop())), "not all files");
        says(
            refused(64 * MIB, |handed| {
                let last = handed.files.len() - 1;
                handed.files[last] = regular();
            }),
            "no memory file",
        );
        // Another guest than the destination's.
        assert!(!refused(128 * MIB, |_| {}).is_empty());
        let mut given = Given::new(Handed::default(), &guest().1);
        assert!(Prepared::new(&config(64 * MIB), &guest().1, Some(&mut given)).is_err());
    }

    #[test]
    fn one_file_is_not_two_parts_of_memory() {
        let mut config = config(64 * MIB);
        config.memory.hotplug_size = Some(256 * MIB);
        let (memory, layout, base) = guest();
        let room = triarch_arch::layout::hotplug(64 * MIB, 256 * MIB).expect("room");
        let device = Region {
            gpa: room.start,
            len: 64 * MIB,
        };
        let mut all = layout.regions().to_vec();
        all.push(device);
        let all = Layout::new(all).expect("a layout");
        let mut handed = files(&memory, &Ran::new().expect("a file")).expect("files");
        let again = handed.files[0].try_clone().expect("a copy");
        handed.files.insert(1, again);
        handed.places.push((1, 0));
        let mut given = Given::new(handed, &all);
        let error = Prepared::new(&config, &all, Some(&mut given))
            .map(drop)
            .expect_err("refused");
        assert!(error.chain().contains("something else already"), "{}", error.chain());
        assert!(base < device.gpa);
    }

    #[test]
    fn private_memory_is_named_with_what_to_do() {
        assert_eq!(private(&config(64 * MIB)), []);
        let found = private(&VmConfig::default());
        assert_eq!(found.len(), 1);
        assert!(found[0].reason.contains("private") && found[0].remedy.contains("shared=on"));
        let memory = MemoryPlan::new(&VmConfig::default(), false).allocate().expect("memory");
        assert!(files(&memory, &Ran::new().expect("a file")).is_err());
    }
}
