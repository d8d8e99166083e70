//! A guest that sees the function through its buses only, and a device that does nothing by itself.

mod interrupts;
mod lifecycle;
mod probe;
mod robustness;
mod saved;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use triarch_device_core::mock::{MockIoEvents, MockMsi, MockRouter};
use triarch_device_core::{Bus, IoAddress, NoSandbox};
use triarch_memory::{GuestMemoryHandle, RamOptions, allocate};
use triarch_pci::{BarAllocator, ConfigPorts, Ecam, PciAddress, PciRoot};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::{DeviceEvent, VirtioPci};
use crate::{ActivateError, DeviceContext, DeviceId, VirtQueue, VirtioDevice, feature, read_config_bytes};

const ECAM: u64 = 0xe800_0000;
const WINDOW: u64 = 0x10_0000_0000;
/// A feature of the device type, beside the common ones.
const TYPE_FEATURE: u64 = 1 << 5;
const OFFERED: u64 = feature::COMMON | TYPE_FEATURE;
const QUEUE_SIZE: u16 = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Activate(u64),
    Start(u16),
    Stop(u16),
    Interrupts,
    Reset,
}

/// What the device was told, and the queues it has.
#[derive(Default)]
struct Log {
    calls: Vec<Call>,
    queues: BTreeMap<u16, VirtQueue>,
    context: Option<DeviceContext>,
    config: [u8; 8],
    refuse_activation: bool,
    refuse_queues: bool,
    lose_queues: bool,
}

struct FakeDevice {
    log: Arc<Mutex<Log>>,
    sizes: Vec<u16>,
}

impl FakeDevice {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().expect("lock")
    }
}

impl VirtioDevice for FakeDevice {
    fn id(&self) -> DeviceId {
        DeviceId::Block
    }
    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }
    fn features(&self) -> u64 {
        OFFERED
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.log().config, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut log = self.log();
        for (byte, new) in log.config.iter_mut().skip(offset as usize).zip(data) {
            *byte = *new;
        }
    }
    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError> {
        let mut log = self.log();
        log.calls.push(Call::Activate(context.features));
        if log.refuse_activation {
            let source = io::Error::other("no");
            return Err(ActivateError::Host { what: "it", source });
        }
        assert!(log.context.is_none(), "active already");
        log.context = Some(context);
        Ok(())
    }
    fn start_queue(&mut self, queue: VirtQueue) -> Result<(), ActivateError> {
        let mut log = self.log();
        assert!(log.context.is_some(), "not active");
        log.calls.push(Call::Start(queue.index()));
        if log.refuse_queues {
            return Err(ActivateError::Driver("no"));
        }
        let before = log.queues.insert(queue.index(), queue);
        assert!(before.is_none(), "started already");
        Ok(())
    }
    fn stop_queue(&mut self, index: u16) -> Option<VirtQueue> {
        let mut log = self.log();
        log.calls.push(Call::Stop(index));
        let queue = log.queues.remove(&index);
        queue.filter(|_| !log.lose_queues)
    }
    fn interrupts_changed(&mut self) {
        self.log().calls.push(Call::Interrupts);
    }
    fn reset(&mut self) {
        let mut log = self.log();
        assert!(log.queues.is_empty(), "a queue still runs");
        log.calls.push(Call::Reset);
        log.context = None;
    }
}

/// The machine around the function.
struct Machine {
    mmio: Arc<Bus>,
    io: Arc<Bus>,
    root: Arc<PciRoot>,
    memory: GuestMemoryHandle,
    router: Arc<MockRouter>,
    doorbells: Arc<MockIoEvents>,
    log: Arc<Mutex<Log>>,
}

impl Machine {
    fn new() -> Self {
        let (mmio, io) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let windows = BarAllocator {
            mmio32: 0xc000_0000..0xe800_0000,
            mmio64: WINDOW..WINDOW + 0x1000_0000,
            io: 0x1000..0x2000,
        };
        let root = Arc::new(PciRoot::new(0, mmio.clone(), io.clone(), windows));
        mmio.claim(ECAM, Ecam::BUS_LEN, Arc::new(Ecam::new(root.clone())))
            .expect("ecam");
        let ports = Arc::new(ConfigPorts::new(root.clone()));
        io.claim(ConfigPorts::BASE, ConfigPorts::LEN, ports).expect("ports");
        let ram = allocate(&[(GuestAddress(0), 1 << 20)], &RamOptions::default()).expect("guest memory");
        Self {
            mmio,
            io,
            root,
            memory: GuestMemoryHandle::new(ram),
            router: Arc::default(),
            doorbells: Arc::default(),
            log: Arc::default(),
        }
    }

    fn device(&self, queues: usize) -> Box<dyn VirtioDevice> {
        Box::new(FakeDevice {
            log: self.log.clone(),
            sizes: vec![QUEUE_SIZE; queues],
        })
    }

    fn function(&self, queues: usize) -> io::Result<VirtioPci> {
        VirtioPci::new(
            self.device(queues),
            self.memory.clone(),
            self.router.clone(),
            self.doorbells.clone(),
            Arc::new(NoSandbox),
        )
    }
}

/// A driver that found its device the way Linux does.
struct Guest {
    machine: Machine,
    function: Arc<VirtioPci>,
    address: PciAddress,
    bar: u64,
    common: u64,
    isr: u64,
    device: u64,
    notify: u64,
    multiplier: u64,
    access: u64,
    msix: u64,
    table: u64,
    pending: u64,
}

impl Guest {
    /// A device with `queues` queues, found and with memory decoding and MSI-X on.
    fn new(queues: usize) -> Self {
        let machine = Machine::new();
        let function = Arc::new(machine.function(queues).expect("function"));
        Self::plug(machine, function)
    }

    fn plug(machine: Machine, function: Arc<VirtioPci>) -> Self {
        let address = machine.root.add(function.clone(), None).expect("slot");
        let mut guest = Self {
            machine,
            function,
            address,
            bar: 0,
            common: 0,
            isr: 0,
            device: 0,
            notify: 0,
            multiplier: 0,
            access: 0,
            msix: 0,
            table: 0,
            pending: 0,
        };
        guest.find_bar();
        guest.find_capabilities();
        guest.set_config(4, 2, 0x406);
        guest.set_config(guest.msix + 2, 2, 0x8000);
        guest
    }

    fn find_bar(&mut self) {
        self.bar = (self.config(0x10, 4) & !0xf) | self.config(0x14, 4) << 32;
    }

    fn find_capabilities(&mut self) {
        assert_eq!(self.config(6, 2) & 0x10, 0x10, "has capabilities");
        let mut at = self.config(0x34, 1);
        while at != 0 {
            let (id, next) = (self.config(at, 1), self.config(at + 1, 1));
            if id == 0x11 {
                self.msix = at;
                self.table = self.config(at + 4, 4);
                self.pending = self.config(at + 8, 4);
                assert_eq!((self.table & 7, self.pending & 7), (0, 0), "in BAR 0");
            } else if id == 9 {
                let offset = self.config(at + 8, 4);
                match self.config(at + 3, 1) {
                    1 => self.common = offset,
                    2 => {
                        self.notify = offset;
                        self.multiplier = self.config(at + 16, 4);
                    }
                    3 => self.isr = offset,
                    4 => self.device = offset,
                    5 => self.access = at,
                    kind => panic!("capability {kind}"),
                }
            }
            at = next;
        }
    }

    fn ecam(&self) -> u64 {
        ECAM + (u64::from(self.address.devfn()) << 12)
    }

    fn config(&self, offset: u64, len: usize) -> u64 {
        get(&self.machine.mmio, self.ecam() + offset, len)
    }

    fn set_config(&self, offset: u64, len: usize, value: u64) {
        put(&self.machine.mmio, self.ecam() + offset, len, value);
    }

    fn get(&self, offset: u64, len: usize) -> u64 {
        get(&self.machine.mmio, self.bar + offset, len)
    }

    fn put(&self, offset: u64, len: usize, value: u64) {
        put(&self.machine.mmio, self.bar + offset, len, value);
    }

    fn status(&self) -> u64 {
        self.get(self.common + 0x14, 1)
    }

    fn set_status(&self, value: u64) {
        self.put(self.common + 0x14, 1, value);
    }

    fn acknowledge(&self, features: u64) {
        for half in 0..2 {
            self.put(self.common + 8, 4, half);
            self.put(self.common + 12, 4, features >> (32 * half) & 0xffff_ffff);
        }
    }

    /// Resets the device and agrees on features.
    fn negotiate(&self, features: u64) {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(1);
        self.set_status(3);
        self.acknowledge(features);
        self.set_status(11);
        assert_eq!(self.status(), 11);
    }

    /// Sets queue `index` up with 8 descriptors at [`ring`] and vector `index + 1`.
    fn set_up(&self, index: u16) {
        let at = ring(index);
        self.put(self.common + 0x16, 2, index.into());
        self.put(self.common + 0x18, 2, 8);
        for (part, offset) in [(0x20, 0), (0x28, 0x1000), (0x30, 0x2000)] {
            self.put(self.common + part, 4, at + offset);
            self.put(self.common + part + 4, 4, 0);
        }
        self.put(self.common + 0x1a, 2, u64::from(index) + 1);
        self.put(self.common + 0x1c, 2, 1);
    }

    /// The whole way to a running device with all its queues, vectors unmasked.
    fn start(&self) {
        self.negotiate(OFFERED & !feature::EVENT_IDX);
        self.put(self.common + 0x10, 2, 0);
        let queues = self.get(self.common + 0x12, 2) as u16;
        for index in 0..queues {
            self.set_up(index);
        }
        for vector in 0..=u64::from(queues) {
            self.unmask(vector);
        }
        self.set_status(15);
        assert_eq!(self.status(), 15);
        self.log().calls.clear();
    }

    fn unmask(&self, vector: u64) {
        let at = self.table + 16 * vector;
        self.put(at, 4, 0xfee0_0000);
        self.put(at + 4, 4, 0);
        self.put(at + 8, 4, 0x40 + vector);
        self.put(at + 12, 4, 0);
    }

    /// Offers one buffer of 16 bytes in queue `index` and notifies.
    fn offer(&self, index: u16) {
        let ram = self.machine.memory.memory();
        let at = ring(index);
        let avail: u16 = ram.read_obj(GuestAddress(at + 0x1002)).expect("index");
        let slot = u64::from(avail % 8);
        let descriptor = u128::from(0x8000u64) | 16 << 64 | 2 << 96;
        ram.write_obj(descriptor, GuestAddress(at + 16 * slot))
            .expect("descriptor");
        ram.write_obj(slot as u16, GuestAddress(at + 0x1004 + 2 * slot))
            .expect("entry");
        ram.write_obj(avail.wrapping_add(1), GuestAddress(at + 0x1002))
            .expect("index");
        self.put(self.notify + u64::from(index) * self.multiplier, 2, index.into());
    }

    /// The device takes notifications of queue `index` and completes what it finds; the number of chains.
    fn serve(&self, index: u16) -> usize {
        let mut log = self.log();
        let queue = log.queues.get_mut(&index).expect("a running queue");
        if queue.kick().read().is_err() {
            return 0;
        }
        let mut served = 0;
        while let Some(chain) = queue.pop() {
            queue.complete(chain.head(), 1);
            served += 1;
        }
        queue.signal();
        served
    }

    fn used(&self, index: u16) -> u16 {
        let ram = self.machine.memory.memory();
        ram.read_obj(GuestAddress(ring(index) + 0x2002)).expect("used index")
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.machine.log.lock().expect("lock")
    }

    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.log().calls)
    }

    fn vectors(&self) -> Vec<Arc<MockMsi>> {
        self.machine.router.vectors.lock().expect("lock").clone()
    }

    fn doorbells(&self) -> Vec<u64> {
        let attached = self.machine.doorbells.attached.lock().expect("lock");
        let gpa = |a: &IoAddress| match a {
            IoAddress::Mmio(gpa) => *gpa,
            IoAddress::Pio(port) => panic!("port {port:#x}"),
        };
        attached.iter().map(gpa).collect()
    }
}

/// GPA of the rings of queue `index`: descriptors, driver area a page up, device area another one.
fn ring(index: u16) -> u64 {
    0x1_0000 * (u64::from(index) + 1)
}

fn get(bus: &Bus, at: u64, len: usize) -> u64 {
    let mut data = [0; 8];
    bus.read(at, &mut data[..len])
        .unwrap_or_else(|e| panic!("read of {len} bytes at {at:#x}: {e}"));
    u64::from_le_bytes(data)
}

fn put(bus: &Bus, at: u64, len: usize, value: u64) {
    bus.write(at, &value.to_le_bytes()[..len])
        .unwrap_or_else(|e| panic!("write of {len} bytes at {at:#x}: {e}"));
}
