//! A device of the host as the guest's bus has it.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use thiserror::Error;
use triarch_device_core::{AccessError, MsiRouter, RateLimit};
use triarch_pci::{Bar, Bars, MsiXStateV1, PciAddress, PciFunction, ROM_BAR, command};
use vfio_bindings::bindings::vfio::{VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX};
use vmm_sys_util::eventfd::EventFd;

use crate::config::{Config, SIZE};
use crate::dma::Peer;
use crate::handle::{Admission, Handle};
use crate::interrupts::Interrupts;
use crate::intx::Pin;
use crate::kernel::Region;
use crate::rom::Rom;
use crate::{CliqueError, Counters, DmaMap, HostDevice, Mapping, areas, lock};

const COMMAND: u64 = 0x04;
const INTERRUPT_PIN: usize = 0x3d;

/// What a device needs of the VM.
pub trait Vm: Send + Sync {
    /// Has the guest reach `registers` at `gpa` without anybody noticing. They stay mapped until [`unmap`](Self::unmap).
    fn map(&self, gpa: u64, registers: &Mapping) -> io::Result<()>;
    /// Undoes that.
    fn unmap(&self, gpa: u64) -> io::Result<()>;
    /// Tells the hypervisor of a device that the guest has, by its own file or that of its IOMMU group, once for each device.
    fn admit(&self, file: BorrowedFd<'_>) -> io::Result<()>;
    /// Undoes that.
    fn dismiss(&self, file: BorrowedFd<'_>) -> io::Result<()>;
    /// Has `raised`, when it is rung, raise the wire of pin `pin` (1: INTA) of the device in `slot`, until the guest's end of interrupt lowers it,
    /// which rings `lowered`.
    fn wire(&self, slot: u8, pin: u8, raised: &EventFd, lowered: &EventFd) -> io::Result<()>;
    /// Undoes that.
    fn unwire(&self, slot: u8, pin: u8, raised: &EventFd) -> io::Result<()>;
}

/// How the guest has a device.
#[derive(Clone, Default)]
pub struct Options {
    /// The bus has I/O ports.
    pub ports: bool,
    /// It is below a root port, to which it has a link.
    pub link: bool,
    /// It has wires for interrupt pins.
    pub wires: bool,
    /// NVIDIA's driver is told that the device reaches others of this clique directly, 0 to 15.
    pub clique: Option<u8>,
    /// Where the device reaches the registers of others, and they its own. They must be of the same map.
    pub peers: Option<DmaMap>,
}

/// Why no function can be made of a device.
#[derive(Debug, Error)]
pub enum FunctionError {
    /// What was in it would go to the guest.
    #[error("{name} cannot be reset")]
    Reset {
        /// The device.
        name: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// What the guest should be told of it does not fit.
    #[error("{name}: {source}")]
    Clique {
        /// The device.
        name: String,
        /// Cause.
        source: CliqueError,
    },
    /// It is not what the guest had.
    #[error("{name} is not like the device that the guest had: {what}")]
    Differs {
        /// The device.
        name: String,
        /// What is different.
        what: String,
    },
    /// The kernel refuses something.
    #[error("cannot {what} of {name}")]
    Kernel {
        /// What was asked of it.
        what: &'static str,
        /// The device.
        name: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// What a guest had of a device, for another one of the same kind: what that one was is not in here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedFunction {
    /// Configuration space.
    pub registers: Vec<u8>,
    /// Bytes of its BARs.
    pub bars: [u64; 6],
    /// Its vectors.
    pub msix: Option<MsiXStateV1>,
}

/// A part of a BAR that the guest reaches by itself.
struct Area {
    start: u64,
    mapping: Mapping,
    /// Where the guest has it.
    at: Option<u64>,
}

/// A BAR.
#[derive(Default)]
struct BarParts {
    region: Region,
    areas: Vec<Area>,
}

/// A PCI function that is a device of the host.
pub struct VfioPci {
    host: Arc<HostDevice>,
    handle: Arc<Handle>,
    vm: Arc<dyn Vm>,
    /// Until the guest has it no more.
    admission: Mutex<Option<Admission>>,
    config: Mutex<Config>,
    /// Where its configuration space is in its descriptor.
    registers: u64,
    bars: Mutex<[BarParts; 6]>,
    rom: Option<Rom>,
    interrupts: Interrupts,
    peer: Mutex<Option<Peer>>,
    /// The guest has it no more.
    gone: AtomicBool,
    counters: Arc<Counters>,
    log: RateLimit,
}

impl VfioPci {
    /// Makes a function of `host`, which is reset: of what another guest left in it nothing is there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(
        host: &Arc<HostDevice>,
        vm: Arc<dyn Vm>,
        router: &Arc<dyn MsiRouter>,
        options: Options,
    ) -> Result<Self, FunctionError> {
        let (handle, admission) = host.enter(&vm)?;
        host.reset(&handle).map_err(|source| FunctionError::Reset {
            name: host.name().to_owned(),
            source,
        })?;
        let (function, _) = Self::of(host, (handle, admission), vm, router, options)?;
        function.set_command(0);
        Ok(function)
    }

    /// The same of a device that [became](crate::Mover::finish_load) another one, of which the guest had what was `saved`.
    ///
    /// # Errors
    /// The kernel's, or the device is of another kind.
    pub fn restore(
        host: &Arc<HostDevice>,
        vm: Arc<dyn Vm>,
        router: &Arc<dyn MsiRouter>,
        options: Options,
        saved: &SavedFunction,
    ) -> Result<Self, FunctionError> {
        let entered = host.enter(&vm)?;
        let (function, sizes) = Self::of(host, entered, vm, router, options)?;
        let differs = |what: String| FunctionError::Differs {
            name: host.name().to_owned(),
            what,
        };
        if sizes != saved.bars {
            return Err(differs("its BARs have other sizes".to_owned()));
        }
        let mut config = lock(&function.config);
        config.restore(&saved.registers).map_err(|at| {
            differs(match at {
                SIZE => "its configuration space has another size".to_owned(),
                at => format!("its configuration space at {at:#x}"),
            })
        })?;
        if !function.interrupts.restore(saved.msix.as_ref()) {
            return Err(differs("it has another number of interrupts".to_owned()));
        }
        function.set_command(config.command());
        drop(config);
        Ok(function)
    }

    /// What the guest has of it, which stands still.
    pub fn save(&self) -> SavedFunction {
        let bars = lock(&self.bars);
        SavedFunction {
            registers: lock(&self.config).save(),
            bars: std::array::from_fn(|i| bars[i].region.size),
            msix: self.interrupts.save(),
        }
    }

    /// A function of an open device, with the sizes of its BARs.
    fn of(
        host: &Arc<HostDevice>,
        (handle, admission): (Arc<Handle>, Admission),
        vm: Arc<dyn Vm>,
        router: &Arc<dyn MsiRouter>,
        options: Options,
    ) -> Result<(Self, [u64; 6]), FunctionError> {
        let name = host.name();
        let failed = |what| {
            move |source| FunctionError::Kernel {
                what,
                name: name.to_owned(),
                source,
            }
        };
        let file = &handle.file;
        let mut regions: [Region; 6] = Default::default();
        for (index, region) in (0..).zip(&mut regions) {
            *region = file.region(index).map_err(failed("learn the BARs"))?;
        }
        let own = file
            .region(VFIO_PCI_CONFIG_REGION_INDEX)
            .map_err(failed("find the configuration space"))?;
        let mut bytes = Box::new([0; SIZE]);
        let len = usize::try_from(own.size).unwrap_or(SIZE).min(SIZE);
        file.read_at(own.offset, &mut bytes[..len])
            .map_err(failed("read the configuration space"))?;
        let sizes = std::array::from_fn(|i| regions[i].size);
        let mut config = Config::new(&bytes, &sizes, options.ports);
        if options.link {
            config.show_link(&bytes);
        }
        if let Some(number) = options.clique {
            let joined = config.join_clique(number);
            let name = name.to_owned();
            joined.map_err(|source| FunctionError::Clique { name, source })?;
        }
        let rom = Rom::of(&**file);
        if let Some(rom) = &rom {
            config.show_rom(rom.size());
        }
        let pin = pin(&handle, &vm, bytes[INTERRUPT_PIN], options.wires).map_err(failed("connect the pin"))?;
        if pin.is_some() {
            config.show_pin(bytes[INTERRUPT_PIN]);
        }
        let vectors = file.irq_count(VFIO_PCI_MSIX_IRQ_INDEX).unwrap_or(0);
        config.limit_msix(u16::try_from(vectors).unwrap_or(u16::MAX));
        let mut bars: [BarParts; 6] = Default::default();
        for (index, (parts, region)) in (0u8..).zip(bars.iter_mut().zip(regions)) {
            let shown = config.bars()[usize::from(index)].is_some();
            let trapped = config.trapped(index);
            let areas = if shown {
                map(&handle, &region, &trapped, host.page_size())
            } else {
                Ok(Vec::new())
            };
            let areas = areas.map_err(failed("map the registers"))?;
            *parts = BarParts { region, areas };
        }
        let counters = Arc::new(Counters::default());
        counters.reset();
        let function = Self {
            interrupts: Interrupts::new(name, &handle, router, &config, pin, &counters),
            host: host.clone(),
            handle,
            vm,
            admission: Mutex::new(Some(admission)),
            config: Mutex::new(config),
            registers: own.offset,
            bars: Mutex::new(bars),
            rom,
            peer: Mutex::new(options.peers.map(|map| map.join())),
            gone: AtomicBool::new(false),
            counters,
            log: RateLimit::default(),
        };
        host.set_live(true);
        Ok((function, sizes))
    }

    /// The device on the host.
    pub fn host(&self) -> &Arc<HostDevice> {
        &self.host
    }

    /// What it counts.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Stops the device for good: it reaches no memory and interrupts nobody, and what it knew of the guest is gone. The guest's memory may
    /// go when this returns.
    pub fn stop(&self) {
        if self.gone.swap(true, Ordering::AcqRel) {
            return;
        }
        self.interrupts.silence();
        // Without being the bus's master it reaches nothing, also if it cannot be reset.
        let _ = self.handle.file.write_at(self.registers + COMMAND, &[0, 0]);
        self.host.set_live(false);
        if let Err(error) = self.host.reset(&self.handle) {
            tracing::warn!("{} cannot be reset: {error}", self.host.name());
        }
        for parts in lock(&self.bars).iter_mut() {
            for area in std::mem::take(&mut parts.areas) {
                self.hide(&area);
            }
        }
        drop(lock(&self.peer).take());
        drop(lock(&self.admission).take());
    }

    /// Lets the device decode its registers, and reach memory if `wanted` of the guest says so. It decodes them whatever the guest wants:
    /// those that are mapped would be gone otherwise, under the guest's hands. Where the guest has no BAR, nothing is mapped.
    fn set_command(&self, wanted: u16) {
        let value = command::IO | command::MEMORY | wanted & command::BUS_MASTER;
        if let Err(error) = self
            .handle
            .file
            .write_at(self.registers + COMMAND, &value.to_le_bytes())
        {
            self.warn("write the command register", &error);
        }
    }

    /// Takes `area` from where the guest has it.
    fn hide(&self, area: &Area) {
        let Some(at) = area.at else { return };
        if let Some(peer) = &*lock(&self.peer) {
            peer.hide(at);
        }
        if let Err(error) = self.vm.unmap(at) {
            self.warn("take registers from the guest", &error);
        }
    }

    /// The guest resets its function.
    fn restart(&self, config: &mut Config) {
        if let Err(error) = self.handle.reset() {
            return self.warn("reset the device", &error);
        }
        self.counters.reset();
        config.reset();
        self.interrupts.changed(config);
        self.set_command(0);
    }

    fn gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Where `offset` of BAR `bar` is in the device's descriptor.
    fn place(&self, bar: u8, offset: u64, len: usize) -> Result<u64, AccessError> {
        let bars = lock(&self.bars);
        let parts = bars.get(usize::from(bar)).ok_or(AccessError::BadAccess)?;
        let end = offset.checked_add(len as u64).ok_or(AccessError::BadAccess)?;
        match end <= parts.region.size && !self.gone() {
            true => Ok(parts.region.offset + offset),
            false => Err(AccessError::BadAccess),
        }
    }

    fn warn(&self, what: &str, error: &io::Error) {
        if let Some(held_back) = self.log.admit() {
            tracing::warn!(held_back, "cannot {what}, of {}: {error}", self.host.name());
        }
    }
}

/// The pin of a device whose register for it says `number`, if it has one, the host has it, and there are `wires`.
fn pin(handle: &Arc<Handle>, vm: &Arc<dyn Vm>, number: u8, wires: bool) -> io::Result<Option<Pin>> {
    let known = wires && (1..=4).contains(&number);
    if !known || handle.file.irq_count(VFIO_PCI_INTX_IRQ_INDEX).unwrap_or(0) == 0 {
        return Ok(None);
    }
    Pin::new(handle, vm, number).map(Some)
}

/// Maps of `region` what the guest may reach by itself.
fn map(handle: &Handle, region: &Region, trapped: &[Range<u64>], page: u64) -> io::Result<Vec<Area>> {
    let parts = areas::mappable(region, trapped, page);
    let area = |part: Range<u64>| {
        let mapping = handle.file.map(region.offset + part.start, part.end - part.start)?;
        Ok(Area {
            start: part.start,
            mapping,
            at: None,
        })
    };
    parts.into_iter().map(area).collect()
}

impl PciFunction for VfioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if self.gone() {
            return data.fill(0xff);
        }
        self.counters.read();
        lock(&self.config).read(offset, data, |data| {
            let at = self.registers + u64::from(offset);
            self.handle.file.read_at(at, data).is_ok()
        });
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        if self.gone() {
            return;
        }
        self.counters.write();
        let mut config = lock(&self.config);
        let effects = config.write(offset, data);
        if effects.command {
            self.set_command(config.command());
        }
        if effects.messages || effects.command {
            self.interrupts.changed(&config);
        }
        if effects.reset {
            self.restart(&mut config);
        }
    }

    fn bars(&self) -> Bars {
        lock(&self.config).bars()
    }

    fn rom(&self) -> Option<Bar> {
        lock(&self.config).rom()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        if let Some(rom) = self.rom.as_ref().filter(|_| bar == ROM_BAR && !self.gone()) {
            rom.read(&*self.handle.file, offset, data);
            return Ok(());
        }
        let at = self.place(bar, offset, data.len())?;
        self.counters.read();
        if let Some(done) = self.interrupts.read(bar, offset, data) {
            return done;
        }
        self.handle.file.read_at(at, data).map_err(|_| AccessError::BadAccess)
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        if bar == ROM_BAR && self.rom.is_some() {
            // It is a copy for all who look.
            return Ok(());
        }
        let at = self.place(bar, offset, data.len())?;
        self.counters.write();
        if let Some(done) = self.interrupts.write(bar, offset, data) {
            return done;
        }
        self.handle.file.write_at(at, data).map_err(|_| AccessError::BadAccess)
    }

    fn bar_moved(&self, bar: u8, address: Option<u64>) {
        let mut bars = lock(&self.bars);
        let Some(parts) = bars.get_mut(usize::from(bar)) else {
            return;
        };
        for area in &mut parts.areas {
            self.hide(area);
            area.at = address.map(|address| address + area.start);
            let shown = area.at.map_or(Ok(()), |at| self.vm.map(at, &area.mapping));
            if let Err(error) = shown {
                // Each access then goes by way of the VMM.
                area.at = None;
                self.warn("have the guest reach registers", &error);
            }
            if let (Some(at), Some(peer)) = (area.at, &*lock(&self.peer)) {
                peer.show(at, &area.mapping);
            }
        }
    }

    fn attach(&self, address: PciAddress, slot: u8) {
        self.interrupts.attach(address.requester(), slot);
        // One that was restored has some.
        self.interrupts.changed(&lock(&self.config));
    }

    fn reset(&self) {
        if !self.gone() {
            self.restart(&mut lock(&self.config));
        }
    }

    fn detach(&self) {
        self.stop();
    }
}

impl Drop for VfioPci {
    fn drop(&mut self) {
        self.stop();
    }
}
