//! GSI routing: which interrupt each event descriptor becomes.

use std::io;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KVM_MSI_VALID_DEVID, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::{Cap, VmFd};
use triarch_device_core::{InterruptLine, MsiMessage, MsiRouter, MsiVector};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// GSIs below this are pins of the wired interrupt controller.
const FIRST_MSI_GSI: u32 = 256;
/// KVM_MAX_IRQ_ROUTES.
const GSI_LIMIT: u32 = 4096;

struct Routes {
    /// Pins of the wired controller, as the architecture laid them out.
    wired: Vec<kvm_irq_routing_entry>,
    /// Messages of the unmasked vectors.
    msi: Vec<kvm_irq_routing_entry>,
    /// GSIs handed out; index 0 is [`FIRST_MSI_GSI`].
    taken: Vec<bool>,
}

/// The interrupts of one VM.
pub struct Interrupts {
    vm: Arc<VmFd>,
    /// Whether messages carry the id of their sender (the ITS on ARM needs it).
    with_device_id: bool,
    routes: Mutex<Routes>,
    /// How many GSIs are handed out.
    count: Arc<AtomicU64>,
}

impl Interrupts {
    /// Interrupts of a VM whose wired controller has the routes `wired`, which replace the kernel's default.
    pub fn new(vm: Arc<VmFd>, wired: Vec<kvm_irq_routing_entry>, with_device_id: bool) -> io::Result<Arc<Self>> {
        let routes = Routes {
            wired,
            msi: Vec::new(),
            taken: Vec::new(),
        };
        let interrupts = Self {
            vm,
            with_device_id,
            routes: Mutex::new(routes),
            count: Arc::default(),
        };
        interrupts.publish(&interrupts.lock())?;
        Ok(Arc::new(interrupts))
    }

    /// An edge-triggered pin of the wired controller. Costs no descriptor when the architecture can set pins directly.
    pub fn line(self: &Arc<Self>, pin: u32) -> io::Result<Arc<Line>> {
        let fd = EventFd::new(EFD_NONBLOCK)?;
        self.vm.register_irqfd(&fd, pin)?;
        Ok(Arc::new(Line { fd }))
    }

    /// Whether [`wire`](Self::wire) works on this host.
    pub fn has_wires(&self) -> bool {
        self.vm.check_extension(Cap::IrqfdResample)
    }

    /// Has `raised`, when it is rung, raise the level of pin `pin` of the wired controller, until the guest's end of interrupt lowers it, which
    /// rings `lowered`. Several can share a pin.
    pub fn wire(&self, pin: u32, raised: &EventFd, lowered: &EventFd) -> io::Result<()> {
        Ok(self.vm.register_irqfd_with_resample(raised, lowered, pin)?)
    }

    /// Undoes that. The pin is low if nobody else has it.
    pub fn unwire(&self, pin: u32, raised: &EventFd) -> io::Result<()> {
        Ok(self.vm.unregister_irqfd(raised, pin)?)
    }

    /// Hands out message-signalled interrupts.
    pub fn router(self: &Arc<Self>) -> Arc<dyn MsiRouter> {
        Arc::new(Router(self.clone()))
    }

    /// How many message-signalled interrupts are handed out, each of which has a GSI of its own, of which KVM has 3,840.
    pub fn count(&self) -> &Arc<AtomicU64> {
        &self.count
    }

    fn lock(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_gsi(&self) -> io::Result<u32> {
        let mut routes = self.lock();
        let at = routes.taken.iter().position(|t| !t).unwrap_or(routes.taken.len());
        let gsi = FIRST_MSI_GSI + at as u32;
        if gsi >= GSI_LIMIT {
            return Err(io::Error::other("all interrupt routes of the VM are taken"));
        }
        if at == routes.taken.len() {
            routes.taken.push(true);
        } else {
            routes.taken[at] = true;
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        Ok(gsi)
    }

    fn free_gsi(&self, gsi: u32) {
        let mut routes = self.lock();
        let before = routes.msi.len();
        routes.msi.retain(|r| r.gsi != gsi);
        if before != routes.msi.len() {
            // The old table is a superset: nothing is lost when the kernel refuses.
            let _ = self.publish(&routes);
        }
        routes.taken[(gsi - FIRST_MSI_GSI) as usize] = false;
        self.count.fetch_sub(1, Ordering::Relaxed);
    }

    fn route(&self, gsi: u32, requester: u16, message: MsiMessage) -> io::Result<()> {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        entry.u.msi.address_lo = message.address as u32;
        entry.u.msi.address_hi = (message.address >> 32) as u32;
        entry.u.msi.data = message.data;
        if self.with_device_id {
            entry.flags = KVM_MSI_VALID_DEVID;
            entry.u.msi.__bindgen_anon_1.devid = u32::from(requester);
        }
        let mut routes = self.lock();
        routes.msi.retain(|r| r.gsi != gsi);
        routes.msi.push(entry);
        self.publish(&routes)
    }

    fn publish(&self, routes: &Routes) -> io::Result<()> {
        let all: Vec<_> = routes.wired.iter().chain(&routes.msi).copied().collect();
        let table = KvmIrqRouting::from_entries(&all).map_err(|e| io::Error::other(format!("routing table: {e:?}")))?;
        Ok(self.vm.set_gsi_routing(&table)?)
    }
}

/// Hands out the vectors of a VM, each of which keeps the VM's interrupts alive.
struct Router(Arc<Interrupts>);

impl MsiRouter for Router {
    fn allocate(&self, requester: u16) -> io::Result<Arc<dyn MsiVector>> {
        let fd = EventFd::new(EFD_NONBLOCK)?;
        let gsi = self.0.take_gsi()?;
        let state = Mutex::new(None);
        Ok(Arc::new(Vector {
            interrupts: self.0.clone(),
            gsi,
            requester: AtomicU16::new(requester),
            fd,
            state,
        }))
    }
}

struct Vector {
    interrupts: Arc<Interrupts>,
    gsi: u32,
    /// Read and written with the message locked.
    requester: AtomicU16,
    fd: EventFd,
    /// The message in force, `None` while masked.
    state: Mutex<Option<MsiMessage>>,
}

impl Vector {
    fn state(&self) -> MutexGuard<'_, Option<MsiMessage>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MsiVector for Vector {
    fn unmask(&self, message: MsiMessage) -> io::Result<()> {
        let mut state = self.state();
        if *state == Some(message) {
            return Ok(());
        }
        let requester = self.requester.load(Ordering::Relaxed);
        self.interrupts.route(self.gsi, requester, message)?;
        if state.is_none() {
            // The kernel looks at the descriptor right away: what came while masked is delivered now.
            self.interrupts.vm.register_irqfd(&self.fd, self.gsi)?;
        }
        *state = Some(message);
        Ok(())
    }

    fn rename(&self, requester: u16) -> io::Result<()> {
        let state = self.state();
        match (self.requester.swap(requester, Ordering::Relaxed), *state) {
            (before, Some(message)) if before != requester => self.interrupts.route(self.gsi, requester, message),
            _ => Ok(()),
        }
    }

    fn mask(&self) -> io::Result<()> {
        let mut state = self.state();
        if state.take().is_some() {
            self.interrupts.vm.unregister_irqfd(&self.fd, self.gsi)?;
        }
        Ok(())
    }

    fn trigger(&self) -> io::Result<()> {
        match self.fd.write(1) {
            // A counter at its limit is pending as it is.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }

    fn pending(&self) -> bool {
        let state = self.state();
        if state.is_some() {
            return false;
        }
        // Masked, so the kernel does not read the descriptor; put back what reading took.
        match self.fd.read() {
            Ok(count) => self.fd.write(count).is_ok(),
            Err(_) => false,
        }
    }

    fn event_fd(&self) -> &EventFd {
        &self.fd
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        let _ = self.mask();
        self.interrupts.free_gsi(self.gsi);
    }
}

/// A wired, edge-triggered interrupt.
pub struct Line {
    fd: EventFd,
}

impl InterruptLine for Line {
    fn trigger(&self) -> io::Result<()> {
        self.fd.write(1)
    }
}
