//! Guest memory as the engines see it.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use triarch_api::VmConfig;
use triarch_arch::layout;
use triarch_hypervisor::MemorySlots;
use triarch_memory::{Backing, Discarder, GuestMemory, GuestMemoryHandle, GuestRegion, Touched};
use triarch_migration::{Inlet, Layout, Memory, Outlet, PAGE, Region, Target};
use triarch_state::SnapshotError;
use triarch_vfio::Fleet;
use triarch_vhost_user::{LOG_PAGE, PageLog, VhostUserHandle};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
    MmapRegion,
};

use super::call::Caller;
use super::hand_over::Given;
use crate::MachineError;
use crate::memory::plan::MemoryPlan;
use crate::memory::virtio_mem::{self, Room};
use crate::snapshot::Pager;

/// The memory of the guest that is here.
pub(super) struct Here {
    // Before the memory that KVM maps.
    slots: MemorySlots,
    memory: GuestMemory,
    touched: Touched,
    caller: Caller,
    writers: Writers,
    /// Bytes of a page, as KVM and the bitmaps count them.
    page: u64,
}

/// Those who write to the guest's memory unseen.
pub(super) struct Writers {
    pub(super) daemons: Daemons,
    /// Devices of the host.
    pub(super) fleet: Fleet,
}

/// Those who write to it from other processes.
pub(super) struct Daemons {
    devices: Vec<(String, VhostUserHandle)>,
    /// Where all of them log that.
    log: Option<Arc<PageLog>>,
}

impl Daemons {
    /// Those of `devices`, of which memory of the guest may come and go in `rooms`.
    ///
    /// # Errors
    /// A daemon cannot log what it writes, or there is no memory for the log.
    pub(super) fn new(
        devices: &[(String, VhostUserHandle)],
        memory: &GuestMemory,
        rooms: &[Arc<GuestRegion>],
    ) -> Result<Self, MachineError> {
        for (id, device) in devices {
            let movable = device.check_movable();
            movable.map_err(|error| MachineError::device(&Some(id.clone()), error))?;
        }
        let log = || match PageLog::new(memory, rooms, None) {
            Ok(log) => Ok(Arc::new(log)),
            Err(error) => Err(MachineError::Moved(error.to_string())),
        };
        Ok(Self {
            log: (!devices.is_empty()).then(log).transpose()?,
            devices: devices.to_vec(),
        })
    }

    fn start_log(&self) -> io::Result<()> {
        let Some(log) = &self.log else { return Ok(()) };
        for (id, device) in &self.devices {
            if let Err(error) = device.start_log(log) {
                self.stop_log();
                return Err(io::Error::other(format!("device '{id}': {error}")));
            }
        }
        Ok(())
    }

    fn stop_log(&self) {
        self.devices.iter().for_each(|(_, device)| device.stop_log());
    }
}

impl Here {
    /// `memory`, which was made as `backing` says and is in `slots`; `writers` write to it, too.
    pub(super) fn new(
        memory: GuestMemory,
        slots: MemorySlots,
        backing: &Backing,
        writers: Writers,
        caller: Caller,
    ) -> Self {
        Self {
            slots,
            memory,
            touched: Touched::new(backing),
            caller,
            writers,
            page: triarch_memory::host_page(),
        }
    }

    /// What devices of the host wrote of each region.
    fn written_by_host(&self) -> Vec<Vec<u64>> {
        let of = |region: &GuestRegion| {
            let (gpa, mut words) = (region.start_addr().raw_value(), Vec::new());
            let range = gpa..gpa + region.len();
            self.writers.fleet.take_log(self.page, range, &mut words);
            words
        };
        self.memory.iter().map(of).collect()
    }

    /// Marks in `words` what of `region` may hold anything at all: nobody knows what of it was written.
    fn mark_all(&self, region: &GuestRegion, words: &mut Vec<u64>) -> io::Result<()> {
        let mut at = 0;
        while let Some(found) = self.touched.first(region, at..region.len())? {
            (found.start / self.page..found.end.div_ceil(self.page)).for_each(|page| mark(words, page));
            at = found.end.max(at + self.page).min(region.len());
        }
        Ok(())
    }

    fn region(&self, gpa: u64) -> io::Result<(&GuestRegion, u64)> {
        let found = self.memory.to_region_addr(GuestAddress(gpa));
        let (region, at) = found.ok_or(io::ErrorKind::NotFound)?;
        Ok((region, at.raw_value()))
    }
}

/// What the VMM itself wrote of `region`.
pub(crate) fn marks(region: &GuestRegion) -> &AtomicBitmap {
    MmapRegion::bitmap(region)
}

/// The regions of `memory`.
pub(super) fn regions(memory: &GuestMemory) -> Vec<Region> {
    let region = |region: &GuestRegion| Region {
        gpa: region.start_addr().raw_value(),
        len: region.len(),
    };
    memory.iter().map(region).collect()
}

impl Memory for Here {
    fn regions(&self) -> Vec<Region> {
        regions(&self.memory)
    }

    fn read(&self, gpa: u64, buffer: &mut [u8]) -> io::Result<()> {
        let (region, at) = self.region(gpa)?;
        region
            .read_slice(buffer, MemoryRegionAddress(at))
            .map_err(io::Error::other)
    }

    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let (region, at) = self.region(range.start)?;
        let base = range.start - at;
        let found = self.touched.first(region, at..range.end - base)?;
        Ok(found.map(|found| base + found.start..base + found.end))
    }

    fn zeroes(&self, gpa: u64, zero: &mut [bool]) -> io::Result<()> {
        let (region, at) = self.region(gpa)?;
        triarch_memory::find_zeroes(region, at, zero)
    }

    fn outlet(&self) -> Option<&dyn Outlet> {
        Some(self)
    }

    fn start_log(&self) -> io::Result<()> {
        self.slots.log_writes(true).map_err(io::Error::other)?;
        // What devices wrote before is copied in the first round.
        self.memory.iter().for_each(|region| marks(region).reset());
        self.writers.daemons.start_log()?;
        let ranges: Vec<_> = regions(&self.memory)
            .iter()
            .map(|region| region.gpa..region.gpa + region.len)
            .collect();
        self.writers.fleet.start_log(self.page, &ranges);
        self.caller.post(|controller| controller.migration_copies());
        Ok(())
    }

    fn fetch_log(&self) -> io::Result<Vec<Range<u64>>> {
        let mut runs = Vec::new();
        let (mut theirs, mut gaps) = (Vec::new(), false);
        if let Some(log) = &self.writers.daemons.log {
            gaps = log.has_gaps();
            log.take(|page| theirs.push(page * LOG_PAGE));
        }
        if gaps {
            tracing::warn!("a daemon was lost that may have written what it did not log: all memory is sent again");
        }
        let of_host = self.written_by_host();
        // What nobody knows may be anything.
        let gaps = gaps || self.writers.fleet.wrote_anything();
        for (region, by_host) in self.memory.iter().zip(of_host) {
            let gpa = region.start_addr().raw_value();
            let mut words = self.slots.written(gpa).map_err(io::Error::other)?;
            if words.len() < by_host.len() {
                words.resize(by_host.len(), 0);
            }
            words.iter_mut().zip(by_host).for_each(|(word, more)| *word |= more);
            let devices = marks(region).get_and_reset();
            if words.len() < devices.len() {
                words.resize(devices.len(), 0);
            }
            words.iter_mut().zip(devices).for_each(|(word, more)| *word |= more);
            // They are in order.
            let before = |gpa: u64| theirs.partition_point(|page| *page < gpa);
            let inside = &theirs[before(gpa)..before(gpa + region.len())];
            inside
                .iter()
                .for_each(|page| mark(&mut words, (page - gpa) / self.page));
            if gaps {
                self.mark_all(region, &mut words)?;
            }
            push_runs(&mut runs, &words, gpa, region.len(), self.page);
        }
        Ok(runs)
    }

    fn stop_log(&self) {
        self.writers.daemons.stop_log();
        self.writers.fleet.stop_log();
        if let Err(error) = self.slots.log_writes(false) {
            tracing::warn!("writes of the guest are still logged: {}", triarch_api::chain(&error));
        }
    }
}

impl Outlet for Here {
    fn send(&self, runs: &[(u64, u64)], socket: BorrowedFd<'_>) -> io::Result<usize> {
        triarch_memory::send(&self.memory, runs, socket)
    }
}

/// Sets the bit of `page`.
fn mark(words: &mut Vec<u64>, page: u64) {
    let word = (page / 64) as usize;
    if words.len() <= word {
        words.resize(word + 1, 0);
    }
    words[word] |= 1 << (page % 64);
}

/// Appends the runs of bits in `words`, each of which stands for a page of `page` bytes from `gpa` on.
pub(crate) fn push_runs(runs: &mut Vec<Range<u64>>, words: &[u64], gpa: u64, len: u64, page: u64) {
    let first = runs.len();
    for (number, word) in (0u64..).zip(words) {
        let mut bits = *word;
        while bits != 0 {
            let from = bits.trailing_zeros();
            let count = (bits >> from).trailing_ones();
            let start = (64 * number + u64::from(from)) * page;
            let end = (start + u64::from(count) * page).min(len);
            match runs[first..].last_mut() {
                Some(last) if last.end == gpa + start => last.end = gpa + end,
                _ if start < end => runs.push(gpa + start..gpa + end),
                _ => {}
            }
            bits = match from + count {
                64 => 0,
                done => bits >> done << done,
            };
        }
    }
}

/// Memory for a guest that comes, made before the guest is.
pub(crate) struct Prepared {
    /// All but that of virtio-mem.
    pub(crate) handle: GuestMemoryHandle,
    /// Where that has its own; `None`: the devices have it.
    pub(crate) rooms: Option<Vec<Room>>,
    /// All regions there will be.
    layout: Vec<Region>,
    /// Those of memory devices.
    devices: Vec<Region>,
    /// What provides memory that is missing.
    pub(crate) pager: Option<Pager>,
}

/// The same, as it is written.
pub(super) struct There {
    pub(super) memory: GuestMemory,
    pub(super) discarder: Discarder,
    pub(super) touched: Touched,
    /// Pages are written with zeroes and not given back.
    keep: bool,
}

fn misplaced(region: &Region) -> MachineError {
    SnapshotError::Memory(format!(
        "the source has memory at {:#x}, {} MiB, where a guest of this configuration has none",
        region.gpa,
        region.len >> 20
    ))
    .into()
}

impl Prepared {
    /// Makes the memory that `layout` tells of, of a guest with this configuration. All of it reads as zeroes, unless its files are
    /// `given`: then it has what they have.
    ///
    /// # Errors
    /// The host has not as much, or the guest cannot have memory there.
    pub(super) fn new(
        config: &VmConfig,
        layout: &Layout,
        mut given: Option<&mut Given>,
    ) -> Result<(Self, Arc<There>), MachineError> {
        let plan = MemoryPlan::new(config, false);
        let (ram, mut rooms) = match &mut given {
            Some(given) => (given.ram(&plan)?, given.rooms(&plan)?),
            None => (plan.allocate()?, virtio_mem::rooms(&plan)?),
        };
        let handle = GuestMemoryHandle::new(ram);
        let ram = regions(&handle.memory());
        let room = layout::hotplug(plan.boot, plan.span).unwrap_or_default();
        let (mut parts, mut devices) = (Vec::new(), Vec::new());
        let mut missing = ram.len();
        for region in layout.regions() {
            if ram.contains(region) {
                missing -= 1;
                continue;
            }
            let range = region.gpa..region.gpa + region.len;
            if let Some(part) = rooms.iter_mut().find_map(|room| room.part(range.clone())) {
                parts.push(part?);
            } else if rooms.is_empty() && room.start <= range.start && range.end <= room.end {
                let at = GuestAddress(region.gpa);
                let made = match &mut given {
                    Some(given) => given.device(region, &plan.options)?,
                    None => triarch_memory::allocate_region(&handle.memory(), at, region.len, &plan.options)?,
                };
                triarch_memory::insert(&handle, made)?;
                devices.push(*region);
            } else {
                return Err(misplaced(region));
            }
        }
        if missing > 0 {
            let text = "the source's guest has not all the memory of its configuration".to_owned();
            return Err(SnapshotError::Memory(text).into());
        }
        let mut all = (*handle.memory()).clone();
        for part in parts {
            all = all.insert_region(part).map_err(triarch_memory::MemoryError::Layout)?;
        }
        let there = There {
            discarder: Discarder::new(GuestMemoryHandle::new(all.clone()), plan.backing())?,
            touched: Touched::new(&plan.backing()),
            memory: all,
            keep: plan.zones.iter().any(|zone| zone.ram.options.prefault),
        };
        let prepared = Self {
            handle,
            rooms: Some(rooms),
            layout: layout.regions().to_vec(),
            devices,
            pager: None,
        };
        Ok((prepared, Arc::new(there)))
    }

    /// Whether the memory devices that were saved are those that memory came for.
    pub(crate) fn check_devices(&self, places: impl Iterator<Item = (u64, u64)>) -> Result<(), MachineError> {
        let mut saved: Vec<_> = places.map(|(gpa, len)| Region { gpa, len }).collect();
        saved.sort_unstable_by_key(|region| region.gpa);
        match saved == self.devices {
            true => Ok(()),
            false => Err(
                SnapshotError::Memory("its memory devices are not those that it was offered with".to_owned()).into(),
            ),
        }
    }

    /// Whether the machine has all of it, and no more.
    pub(crate) fn check(&self, memory: &GuestMemory) -> Result<(), MachineError> {
        match regions(memory) == self.layout {
            true => Ok(()),
            false => Err(
                SnapshotError::Memory("its memory is not where it was when the guest was offered".to_owned()).into(),
            ),
        }
    }
}

impl Target for There {
    fn write(&self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory
            .write_slice(bytes, GuestAddress(gpa))
            .map_err(io::Error::other)
    }

    fn zero(&self, gpa: u64, len: u64) -> io::Result<()> {
        if !self.keep && self.discarder.page_size() == PAGE {
            return match self.discarder.discard(GuestAddress(gpa), len) {
                Ok(_) => Ok(()),
                Err(error) => Err(error.source),
            };
        }
        const ZEROES: [u8; PAGE as usize] = [0; PAGE as usize];
        (gpa..gpa + len)
            .step_by(ZEROES.len())
            .try_for_each(|page| self.write(page, &ZEROES))
    }

    fn inlet(&self) -> Option<&dyn Inlet> {
        Some(self)
    }
}

impl Inlet for There {
    fn expect(&self, runs: &[(u64, u64)]) {
        triarch_memory::populate(&self.memory, runs);
    }

    fn receive(&self, runs: &[(u64, u64)], socket: BorrowedFd<'_>) -> io::Result<usize> {
        triarch_memory::receive(&self.memory, runs, socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_become_runs() {
        let runs = |words: &[u64], len: u64| {
            let mut runs = Vec::from([0..PAGE, 8 * PAGE..16 * PAGE]);
            push_runs(&mut runs, words, 16 * PAGE, len * PAGE, PAGE);
            let pages = |run: &Range<u64>| (run.start / PAGE, run.end / PAGE);
            runs[2..].iter().map(pages).collect::<Vec<_>>()
        };
        assert_eq!(runs(&[0, 0], 128), []);
        assert_eq!(runs(&[1, 0], 128), [(16, 17)]);
        assert_eq!(runs(&[0b1011_0110, 0], 128), [(17, 19), (20, 22), (23, 24)]);
        assert_eq!(runs(&[u64::MAX, u64::MAX], 128), [(16, 144)]);
        assert_eq!(runs(&[1 << 63, 1], 128), [(79, 81)]);
        assert_eq!(runs(&[1 << 63, 2], 128), [(79, 80), (81, 82)]);
        // Bits behind the end of the region mean nothing.
        assert_eq!(runs(&[u64::MAX], 40), [(16, 56)]);
        assert_eq!(runs(&[0b11 << 39], 40), [(55, 56)]);
    }

    #[test]
    fn memory_is_made_where_a_guest_may_have_it() {
        const MIB: u64 = 1 << 20;
        let mut config = VmConfig::default();
        config.memory.size = 64 * MIB;
        let base = layout::ram_ranges(64 * MIB)[0].0.raw_value();
        let ram = Region {
            gpa: base,
            len: 64 * MIB,
        };
        let make = |config: &VmConfig, regions: Vec<Region>| {
            let layout = Layout::new(regions).expect("a layout");
            Prepared::new(config, &layout, None)
        };
        let (prepared, there) = make(&config, vec![ram]).expect("made");
        assert_eq!(regions(&prepared.handle.memory()), [ram]);
        there.write(base + PAGE, &[7; 2 * PAGE as usize]).expect("write");
        there.zero(base + PAGE, PAGE).expect("zero");
        let byte = |at: u64| {
            prepared
                .handle
                .memory()
                .read_obj::<u8>(GuestAddress(base + at))
                .expect("read")
        };
        assert_eq!((byte(PAGE), byte(2 * PAGE - 1), byte(2 * PAGE)), (0, 0, 7));
        // More, less, and elsewhere.
        let more = Region {
            gpa: base + 64 * MIB,
            len: MIB,
        };
        assert!(make(&config, vec![ram, more]).is_err());
        assert!(make(&config, vec![]).is_err());
        assert!(
            make(
                &config,
                vec![Region {
                    gpa: base,
                    len: 32 * MIB
                }]
            )
            .is_err()
        );
        config.memory.hotplug_size = Some(256 * MIB);
        let room = layout::hotplug(64 * MIB, 256 * MIB).expect("room");
        let device = Region {
            gpa: room.start,
            len: 128 * MIB,
        };
        let (prepared, _) = make(&config, vec![ram, device]).expect("made");
        assert_eq!(regions(&prepared.handle.memory()), [ram, device]);
        assert!(prepared.check_devices([(device.gpa, device.len)].into_iter()).is_ok());
        assert!(prepared.check_devices([].into_iter()).is_err());
        let beyond = Region {
            gpa: room.end,
            len: 128 * MIB,
        };
        assert!(make(&config, vec![ram, beyond]).is_err());
    }
}
