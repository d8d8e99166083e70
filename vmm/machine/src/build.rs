//! One built guest.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use kvm_ioctls::Kvm;
use triarch_api::events::EventLog;
use triarch_api::{CpuTopology, DeviceLink, DeviceTree, HotplugMethod, MemoryConfig, VmConfig};
use triarch_arch::{Board, BoardConfig, CpuCount, CpuPlan, LoadConfig, NmiError, Numa, Platform, Vcpus, layout};
use triarch_cpu_model::{GuestProcessor, Topology};
use triarch_device_core::{Bus, Sandbox};
use triarch_hypervisor::{Vcpu, Vm};
use triarch_legacy::{CpuHotplug, MemoryHotplug, MemoryPlace, PciHotplug, SerialPort};
use triarch_memory::{Discarder, GuestMemory, GuestMemoryHandle};
use triarch_pci::{BarAllocator, PciRoot};
use triarch_vcpu::{Buses, VcpuSet};
use triarch_vfio::Reached;
use triarch_vhost_user::VhostUserHandle;
use triarch_virtio::BlockHandle;
use triarch_virtio::balloon::BalloonHandle;
use vm_memory::GuestAddressSpace;

use crate::backends::Backends;
use crate::consoles::Consoles;
use crate::cpus::CpuMeters;
use crate::devices::{Devices, Host};
use crate::memory::plan::MemoryPlan;
use crate::memory::{self, MemoryMeters, Regions, virtio_mem};
use crate::metrics::GuestMeters;
use crate::plug::PlugMeters;
use crate::progress::Progress;
use crate::snapshot::{Pager, Saved, WriteLog};
use crate::{GuestEvent, MachineError, passthrough};

/// Takes what happens in the guest.
pub(crate) type Report = Arc<dyn Fn(GuestEvent) + Send + Sync>;

/// Where a machine tells what happens.
pub(crate) struct Reports<'a> {
    /// What the guest does that the controller has to know.
    pub(crate) guest: Report,
    /// What its devices do.
    pub(crate) events: &'a Arc<EventLog>,
    /// How far it is built.
    pub(crate) progress: Progress<'a>,
}

/// What a guest begins with.
pub(crate) enum Origin<'a> {
    /// With what it boots.
    Boot {
        /// vCPUs.
        vcpus: u32,
        /// Memory devices that came while it ran before its reset.
        memory: &'a [MemoryPlace],
    },
    /// Where another one was.
    Saved(&'a mut Saved),
}

/// A guest with its devices, built and paused. Dropping it ends it: first the vCPUs, then the devices, then memory.
pub struct Machine {
    pub(crate) vcpus: VcpuSet,
    pub(crate) devices: Devices,
    /// Other processes can map its memory.
    shared: bool,
    pub(crate) board: Board,
    pub(crate) platform: Platform,
    /// The PCI root does not keep these alive.
    _buses: [Arc<Bus>; 2],
    /// vCPUs the guest never had.
    parked: VecDeque<Vcpu>,
    pub(crate) plan: CpuPlan,
    processor: Option<GuestProcessor>,
    /// The VM outlives its vCPUs and devices, the memory outlives the VM.
    pub(crate) vm: Vm,
    /// How many interrupts by message are handed out.
    interrupts: Arc<AtomicU64>,
    /// What provides memory that comes on demand. Nobody touches memory any more when it goes.
    pub(crate) pager: Option<Pager>,
    /// What was written since a snapshot that others may build on.
    pub(crate) log: Option<WriteLog>,
    pub(crate) memory: Regions,
}

impl Machine {
    /// Builds the guest `config` describes, ready to run its first instruction, or its next.
    pub(crate) fn build(
        kvm: &Kvm,
        config: &VmConfig,
        mut origin: Origin<'_>,
        consoles: &Consoles,
        backends: &Backends,
        sandbox: &Arc<dyn Sandbox>,
        reports: Reports<'_>,
    ) -> Result<Self, MachineError> {
        let Reports {
            guest: report,
            events,
            progress,
        } = reports;
        progress.note("memory");
        let plan = plan(kvm, config, &mut origin)?;
        let ram = MemoryPlan::new(config, origin.saved().is_some_and(Saved::is_mapped));
        let memory = match origin.saved().and_then(Saved::memory) {
            Some(memory) => memory.clone(),
            None => GuestMemoryHandle::new(ram.allocate()?),
        };
        // Most of what cannot be addressed is more than the host has, which is the better thing to say.
        layout::check_ram(ram.boot, ram.span, plan.address_bits())?;
        let regions = Regions::new(memory.clone(), ram.options);
        if let Origin::Saved(saved) = &mut origin {
            saved.begin(sandbox, events, &report)?;
            let room = layout::hotplug(ram.boot, ram.span);
            regions.restore(&saved.board.memory_places(), room)?;
            saved.fill(&memory.memory(), &ram.backing(), progress)?;
        }
        let vm = Vm::new(kvm)?;
        // Before the interrupt controllers: making those leaves a grace period open in KVM, and a memory slot made after them waits
        // for its end, 8 ms of a start of 10.
        vm.map_memory(&memory.memory())?;
        let platform = Platform::new(&vm)?;
        progress.note("processors");
        let Vcpus {
            processor,
            running,
            parked,
            firmware,
        } = match &origin {
            Origin::Boot { .. } => triarch_arch::create_vcpus(&vm, &plan, &platform)?,
            Origin::Saved(saved) => saved.vcpus(&vm, &plan, &platform)?,
        };
        let processor = crate::cpu_features::told(processor);

        let (mmio, pio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let windows = BarAllocator {
            mmio32: layout::MMIO32,
            mmio64: layout::mmio64(ram.boot, ram.span, plan.address_bits()),
            io: layout::PCI_IO,
        };
        let root = Arc::new(PciRoot::with_roots(
            0,
            mmio.clone(),
            pio.clone(),
            windows.divided(config.pci_roots()),
        ));
        let (power, processors, slots, changes) = (report.clone(), report.clone(), report.clone(), report.clone());
        let board = Board::new(&BoardConfig {
            mmio: &mmio,
            pio: &pio,
            interrupts: &platform.interrupts,
            root: &root,
            memory_size: ram.boot,
            plan: &plan,
            cpus_changed: Arc::new(move || processors(GuestEvent::Processors)),
            memory_slots: memory_slots(config),
            memory_changed: Arc::new(move || changes(GuestEvent::Dimms)),
            slots_changed: Arc::new(move || slots(GuestEvent::Slots)),
            serial: consoles.serial.as_ref(),
            debug: consoles.debug.as_ref(),
            device_tree: has_device_tree(config),
            power: Arc::new(move |event| power(GuestEvent::Power(event))),
            saved: origin.saved().map(|saved| &saved.board),
        })?;
        regions.expose()?;
        let rooms = match origin.saved_mut().and_then(Saved::rooms) {
            Some(rooms) => rooms,
            None => virtio_mem::rooms(&ram)?,
        };
        let host = Host {
            root,
            memory: memory.clone(),
            discarder: Discarder::new(memory.clone(), ram.backing())?,
            router: platform.interrupts.router(),
            io_events: vm.io_events(),
            sandbox: sandbox.clone(),
            events: events.clone(),
            report: report.clone(),
            rooms,
            slots: vm.memory_slots().clone(),
            reach: regions.reach().map().clone(),
            peers: config.has_peers(),
            wires: platform.interrupts.has_wires(),
            vm: passthrough::Host::of(&vm, &platform.interrupts),
        };
        let devices = Devices::build(config, consoles, backends, host, origin.saved_mut(), progress)?;
        if let Some(slots) = board.slots() {
            let (present, fixed) = devices.slots();
            slots.begin(present, fixed);
        }
        match &origin {
            Origin::Boot { memory: places, .. } => {
                progress.note("kernel");
                let numa = ram.numa(config);
                boot(&memory.memory(), config, numa, &plan, &board, &devices, &running)?;
                // Not before: what the guest finds as memory devices is not in the memory map it boots with.
                for (slot, place) in places.iter().enumerate() {
                    regions.add(&vm, devices.served(), place.start, place.size)?;
                    if let Some(slots) = board.memory() {
                        slots.put(slot, *place);
                    }
                }
            }
            Origin::Saved(saved) => {
                saved.restore_platform(&vm, &platform, &running)?;
                board.restore_events(&saved.board)?;
                devices.renew_interrupts();
            }
        }

        let _buses = [pio.clone(), mmio.clone()];
        let buses = Buses { pio, mmio };
        let vcpus = VcpuSet::start(running, buses, firmware, sandbox, move |index, event| {
            report(GuestEvent::Vcpu(index, event));
        })?;
        Ok(Self {
            vcpus,
            devices,
            shared: ram.shared(),
            board,
            interrupts: platform.interrupts.count().clone(),
            platform,
            _buses,
            parked: parked.into(),
            plan,
            processor,
            vm,
            pager: origin.pager(),
            log: None,
            memory: regions,
        })
    }

    /// Stops the guest where it is: first its vCPUs, then its devices, whose requests in flight are finished.
    pub(crate) fn pause(&mut self) -> Result<(), MachineError> {
        self.vcpus.pause()?;
        self.devices.pause();
        self.devices.pause_hosts();
        Ok(())
    }

    /// Lets it go on.
    pub(crate) fn resume(&mut self) -> Result<(), MachineError> {
        self.devices.resume_hosts();
        self.devices.resume();
        self.vcpus.resume();
        Ok(())
    }

    /// What it counts.
    pub(crate) fn meters(
        &self,
        config: &VmConfig,
        cpus: &Arc<CpuMeters>,
        ram: &Arc<MemoryMeters>,
        plug: &Arc<PlugMeters>,
        reached: &Arc<Reached>,
    ) -> GuestMeters {
        GuestMeters {
            memory: MemoryConfig {
                shared: config.memory.shared || config.needs_shared_memory(),
                ..config.memory.clone()
            },
            vcpus: self.vcpus.metrics().to_vec(),
            cpus: cpus.clone(),
            ram: ram.clone(),
            plug: (plug.clone(), self.devices.len()),
            devices: self.devices.meters(),
            interrupts: self.interrupts.clone(),
            slots: self.vm.memory_slots().count().clone(),
            reached: reached.clone(),
        }
    }

    /// Its processors that come and go, if they can.
    pub(crate) fn cpus(&self) -> Option<&Arc<CpuHotplug>> {
        self.board.cpus()
    }

    /// The CPU its vCPUs are, as it was given to the guest, if KVM told.
    pub(crate) fn processor(&self) -> Option<&GuestProcessor> {
        self.processor.as_ref()
    }

    /// Its memory that comes and goes, if it can.
    pub(crate) fn memory_slots(&self) -> Option<&Arc<MemoryHotplug>> {
        self.board.memory()
    }

    /// Where in `room` there is no memory: start and length of each gap.
    pub(crate) fn memory_gaps(&self, room: &Range<u64>) -> Vec<(u64, u64)> {
        triarch_memory::gaps(&self.memory.memory(), room)
    }

    /// Provides memory at `place`, of which the guest does not know yet: all of it, everywhere, or none.
    pub(crate) fn add_memory(&self, place: MemoryPlace) -> Result<(), MachineError> {
        self.memory
            .add(&self.vm, self.devices.served(), place.start, place.size)
    }

    /// Takes back the memory at `start`, which the guest does not use any more.
    pub(crate) fn remove_memory(&self, start: u64) {
        self.memory.remove(&self.vm, self.devices.served(), start);
    }

    /// The slots of its PCI devices, if those can come and go.
    pub(crate) fn slots(&self) -> Option<&Arc<PciHotplug>> {
        self.board.slots()
    }

    /// Its PCI devices.
    pub(crate) fn devices(&self) -> &Devices {
        &self.devices
    }

    /// The same, to add or take one.
    pub(crate) fn devices_mut(&mut self) -> &mut Devices {
        &mut self.devices
    }

    /// Whether other processes can be given its memory.
    pub(crate) fn shares_memory(&self) -> bool {
        self.shared
    }

    /// Whether all of its memory is there, and not still to come from a snapshot.
    pub(crate) fn has_its_memory(&self) -> bool {
        self.pager.as_ref().is_none_or(Pager::is_complete)
    }

    /// vCPUs it started with.
    pub(crate) fn boot_vcpus(&self) -> u32 {
        self.plan.boot_vcpus()
    }

    /// Makes the vCPUs with these indexes and their threads, if it never had them. They rest until the guest gets them.
    pub(crate) fn ready_vcpus(&mut self, indexes: &[u32]) -> Result<(), MachineError> {
        let needed = indexes.iter().max().map_or(0, |last| *last as usize + 1);
        while self.vcpus.len() < needed {
            let vcpu = match self.parked.pop_front() {
                Some(vcpu) => vcpu,
                None => triarch_arch::create_later(&self.vm, &self.plan, self.vcpus.len() as u32)?,
            };
            self.vcpus.add(vcpu)?;
        }
        for index in indexes {
            self.vcpus.wait_rested(*index as usize)?;
        }
        Ok(())
    }

    /// Lets the guest start vCPU `index`.
    pub(crate) fn plug_vcpu(&self, index: u32) {
        self.vcpus.plug(index as usize);
    }

    /// Takes vCPU `index`, which the guest has given back.
    pub(crate) fn unplug_vcpu(&self, index: u32) {
        if let Err(error) = self.vcpus.unplug(index as usize) {
            tracing::error!("cannot stop a vCPU: {}", MachineError::from(error).chain());
        }
    }

    /// Makes vCPU `index` look whether it was started, if it would not be known otherwise.
    pub(crate) fn nudge_vcpu(&self, index: u32) {
        if self.vcpu_waits(index) {
            // A thread that cannot be signalled has ended.
            let _ = self.vcpus.nudge(index as usize);
        }
    }

    /// Whether vCPU `index`, which the guest has, may be started without that being known at once.
    pub(crate) fn vcpu_waits(&self, index: u32) -> bool {
        self.vcpus.waits(index as usize)
    }

    /// Its devices, as `vm.info` shows them.
    pub(crate) fn device_tree(&self) -> DeviceTree {
        self.devices.tree()
    }

    /// The serial port, for its input.
    pub(crate) fn serial(&self) -> Option<&Arc<dyn SerialPort>> {
        self.board.serial()
    }

    /// Tells the guest of the new size of its terminal, if that has one.
    pub(crate) fn terminal_resized(&self) {
        self.devices.terminal_resized();
    }

    /// Interrupts every vCPU with an NMI.
    pub(crate) fn inject_nmi(&self) -> Result<(), NmiError> {
        triarch_arch::inject_nmi(&self.vm)
    }

    /// A disk of the guest, by its id.
    pub(crate) fn disk(&self, id: &str) -> Option<&BlockHandle> {
        self.devices.disk(id)
    }

    /// Its balloon, if it has one.
    pub(crate) fn balloon(&self) -> Option<&BalloonHandle> {
        self.devices.balloon()
    }

    /// Its memory devices.
    pub(crate) fn memories(&self) -> &[virtio_mem::Named] {
        self.devices.memories()
    }

    /// How its devices stand with their daemons, by their ids.
    pub(crate) fn links(&self) -> BTreeMap<String, DeviceLink> {
        self.devices.links()
    }

    /// What tells of the daemon of device `id`, if it has one.
    pub(crate) fn daemon(&self, id: &str) -> Option<VhostUserHandle> {
        self.devices.daemon(id).cloned()
    }

    /// Asks the guest's operating system to shut down.
    pub(crate) fn press_power_button(&self) -> io::Result<()> {
        self.board.press_power_button()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Devices must not lose requests they took: finish them while memory and interrupts are still there.
        if let Err(error) = self.vcpus.pause() {
            tracing::error!("cannot stop the guest in order: {}", MachineError::from(error).chain());
        }
        self.devices.pause();
        // Others may still hold its memory for a moment: devices of the host do not.
        self.devices.stop();
        self.memory.reach().clear();
    }
}

impl Origin<'_> {
    fn saved(&self) -> Option<&Saved> {
        match self {
            Self::Saved(saved) => Some(saved),
            Self::Boot { .. } => None,
        }
    }

    fn pager(&mut self) -> Option<Pager> {
        match self {
            Self::Saved(saved) => saved.pager(),
            Self::Boot { .. } => None,
        }
    }

    fn saved_mut(&mut self) -> Option<&mut Saved> {
        match self {
            Self::Saved(saved) => Some(saved),
            Self::Boot { .. } => None,
        }
    }
}

fn plan(kvm: &Kvm, config: &VmConfig, origin: &mut Origin<'_>) -> Result<CpuPlan, MachineError> {
    let cpus = &config.cpus;
    let vcpus = match origin {
        Origin::Saved(saved) => return saved.plan(kvm),
        Origin::Boot { vcpus, .. } => *vcpus,
    };
    let count = CpuCount {
        boot: cpus.boot_vcpus,
        now: vcpus,
        max: cpus.max_vcpus,
    };
    let mut plan = CpuPlan::new(kvm, count, cpus.topology.map(topology))?;
    if let Some(bits) = cpus.max_phys_bits {
        plan.limit_address_bits(bits);
    }
    Ok(plan)
}

/// Loads what the guest boots and puts the first vCPU at its entry.
fn boot(
    memory: &GuestMemory,
    config: &VmConfig,
    numa: Numa,
    plan: &CpuPlan,
    board: &Board,
    devices: &Devices,
    vcpus: &[Vcpu],
) -> Result<(), MachineError> {
    let payload = config.payload.clone().unwrap_or_default();
    let platform = config.platform.clone().unwrap_or_default();
    let entry = triarch_arch::load(&LoadConfig {
        memory,
        plan,
        board,
        windows: devices.windows(),
        kernel: payload.kernel.or(payload.firmware).unwrap_or_default(),
        initramfs: payload.initramfs,
        cmdline: payload.cmdline.unwrap_or_default(),
        device_tree: has_device_tree(config),
        numa,
        iommu: devices.iommu(),
        serial_number: platform.serial_number,
        uuid: platform.uuid,
        oem_strings: platform.oem_strings.unwrap_or_default(),
    })?;
    match vcpus.first() {
        Some(first) => Ok(triarch_arch::set_entry(first, &entry)?),
        None => Ok(()),
    }
}

/// Slots for memory devices, if memory comes by them.
fn memory_slots(config: &VmConfig) -> u32 {
    match (config.memory.hotplug_method, config.memory.hotplug_room()) {
        (HotplugMethod::Acpi, 1..) => memory::SLOTS,
        _ => 0,
    }
}

fn has_device_tree(config: &VmConfig) -> bool {
    config.platform.as_ref().is_some_and(|platform| platform.dtb)
}

fn topology(t: CpuTopology) -> Topology {
    Topology {
        threads_per_core: t.threads_per_core,
        cores_per_die: t.cores_per_die,
        dies_per_package: t.dies_per_package,
        packages: t.packages,
    }
}
