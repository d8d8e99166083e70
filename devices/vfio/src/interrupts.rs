//! Messages of a device that become interrupts of the guest inside the kernel: each goes from VFIO to KVM by an event descriptor.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use triarch_device_core::{AccessError, MsiMessage, MsiRouter, MsiVector, RateLimit};
use triarch_pci::{MsiX, MsiXStateV1};
use vfio_bindings::bindings::vfio::{VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX};
use vmm_sys_util::eventfd::EventFd;

use crate::config::{Config, MsiPlace, MsiXPlace};
use crate::handle::Handle;
use crate::intx::Pin;
use crate::kernel::IrqError;
use crate::{Counters, lock};

/// Bit of MSI's control register: it is enabled.
const MSI_ENABLE: u16 = 1;

/// The interrupts of one device.
pub(crate) struct Interrupts {
    name: String,
    handle: Arc<Handle>,
    router: Arc<dyn MsiRouter>,
    msix: Option<(MsiXPlace, MsiX)>,
    msi: Option<MsiPlace>,
    pin: Option<Pin>,
    wires: Mutex<Wires>,
    counters: Arc<Counters>,
    log: RateLimit,
}

/// What of the device's interrupts the host has set up.
#[derive(Default)]
struct Wires {
    requester: Option<u16>,
    /// Whose wires the pin has.
    slot: Option<u8>,
    /// The pin is connected, as that of a device in this slot.
    pin: Option<u8>,
    /// MSI-X is on.
    msix: bool,
    /// Vectors of MSI-X that ring the guest.
    connected: BTreeSet<u16>,
    /// Vectors of MSI, all that the guest enabled.
    msi: Vec<Arc<dyn MsiVector>>,
}

impl Interrupts {
    pub(crate) fn new(
        name: &str,
        handle: &Arc<Handle>,
        router: &Arc<dyn MsiRouter>,
        config: &Config,
        pin: Option<Pin>,
        counters: &Arc<Counters>,
    ) -> Self {
        let msix = config
            .msix()
            .map(|place| (place, MsiX::new(router.clone(), place.count)));
        Self {
            name: name.to_owned(),
            handle: handle.clone(),
            router: router.clone(),
            msix,
            msi: config.msi(),
            pin,
            wires: Mutex::default(),
            counters: counters.clone(),
            log: RateLimit::default(),
        }
    }

    /// The function sends messages as `requester`, and its pin has the wires of `slot`.
    pub(crate) fn attach(&self, requester: u16, slot: u8) {
        let mut wires = lock(&self.wires);
        (wires.requester, wires.slot) = (Some(requester), Some(slot));
        for vector in &wires.msi {
            if let Err(error) = vector.rename(requester) {
                self.warn(&error);
            }
        }
        drop(wires);
        if let Some((_, msix)) = &self.msix {
            msix.attach(requester);
        }
    }

    /// The table of MSI-X, if the device has it.
    pub(crate) fn save(&self) -> Option<MsiXStateV1> {
        self.msix.as_ref().map(|(_, msix)| msix.save())
    }

    /// Takes over one that was saved.
    pub(crate) fn restore(&self, saved: Option<&MsiXStateV1>) -> bool {
        match (&self.msix, saved) {
            (Some((_, msix)), Some(saved)) => msix.restore(saved).is_ok(),
            (None, None) => true,
            _ => false,
        }
    }

    /// The guest changed COMMAND, or registers of MSI or MSI-X, in `config`.
    pub(crate) fn changed(&self, config: &Config) {
        // The kernel has one kind at a time.
        let by_pin = config.uses_pin();
        if !by_pin {
            self.end_pin(&mut lock(&self.wires));
        }
        if let Some((place, msix)) = &self.msix {
            msix.set_control(config.u16_at(place.at + MsiX::CONTROL));
            self.connect(msix);
        }
        if let Some(place) = self.msi
            && let Err(error) = self.set_msi(place, config)
        {
            self.warn(&error);
        }
        let mut wires = lock(&self.wires);
        if by_pin {
            self.begin_pin(&mut wires);
        }
        self.count(&wires);
    }

    /// Has the pin interrupt the guest.
    fn begin_pin(&self, wires: &mut Wires) {
        let (Some(pin), Some(slot), None) = (&self.pin, wires.slot, wires.pin) else {
            return;
        };
        match pin.connect(slot) {
            Ok(()) => wires.pin = Some(slot),
            Err(error) => self.warn(&error),
        }
    }

    fn end_pin(&self, wires: &mut Wires) {
        if let (Some(pin), Some(slot)) = (&self.pin, wires.pin.take())
            && let Err(error) = pin.disconnect(slot)
        {
            self.warn(&error);
        }
    }

    /// As many ring the guest now.
    fn count(&self, wires: &Wires) {
        let pins = usize::from(wires.pin.is_some());
        self.counters
            .set_vectors(wires.connected.len() + wires.msi.len() + pins);
    }

    /// Reads `data` at `offset` of BAR `bar`, if the table or the pending bits are there.
    pub(crate) fn read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Option<Result<(), AccessError>> {
        let (place, msix) = self.msix.as_ref()?;
        if let Some(offset) = inside(place.table, 16 * u64::from(place.count), bar, offset) {
            return Some(msix.table_read(offset, data));
        }
        let size = u64::from(place.count).div_ceil(64) * 8;
        let offset = inside(place.pending, size, bar, offset)?;
        Some(msix.pba_read(offset, data))
    }

    /// Writes there.
    pub(crate) fn write(&self, bar: u8, offset: u64, data: &[u8]) -> Option<Result<(), AccessError>> {
        let (place, msix) = self.msix.as_ref()?;
        if let Some(offset) = inside(place.table, 16 * u64::from(place.count), bar, offset) {
            let done = msix.table_write(offset, data);
            self.connect(msix);
            self.count(&lock(&self.wires));
            return Some(done);
        }
        let size = u64::from(place.count).div_ceil(64) * 8;
        inside(place.pending, size, bar, offset).map(|_| Ok(()))
    }

    /// The guest hears nothing of the device any more.
    pub(crate) fn silence(&self) {
        let mut wires = lock(&self.wires);
        self.end_pin(&mut wires);
        if wires.msix {
            self.disable(VFIO_PCI_MSIX_IRQ_INDEX);
        }
        wires.msix = false;
        wires.connected.clear();
        self.end_msi(&mut wires);
        self.count(&wires);
    }

    fn end_msi(&self, wires: &mut Wires) {
        if !wires.msi.is_empty() {
            self.disable(VFIO_PCI_MSI_IRQ_INDEX);
        }
        for vector in wires.msi.drain(..) {
            if let Err(error) = vector.mask() {
                self.warn(&error);
            }
        }
    }

    fn disable(&self, index: u32) {
        if let Err(error) = self.handle.file.disable_irqs(index) {
            self.warn(&error);
        }
    }

    /// Has the device's vectors ring those that the guest uses.
    fn connect(&self, msix: &MsiX) {
        let mut wires = lock(&self.wires);
        if !msix.enabled() {
            if wires.msix {
                self.disable(VFIO_PCI_MSIX_IRQ_INDEX);
                wires.msix = false;
                wires.connected.clear();
            }
            return;
        }
        if !wires.msix {
            // All of them, none of which rings anybody: a vector that comes later then disturbs none that is there.
            if let Err(error) = self.enable(VFIO_PCI_MSIX_IRQ_INDEX, msix.count()) {
                return self.warn(&error);
            }
            wires.msix = true;
        }
        for index in msix.live() {
            if wires.connected.contains(&index) {
                continue;
            }
            let rung = msix.event_fd(index).and_then(|event| {
                let set = self
                    .handle
                    .file
                    .set_irqs(VFIO_PCI_MSIX_IRQ_INDEX, index.into(), &[Some(&event)]);
                set.map_err(failure)
            });
            match rung {
                Ok(()) => drop(wires.connected.insert(index)),
                Err(error) => self.warn(&error),
            }
        }
    }

    /// Makes `count` vectors ready, or as many as the host has.
    fn enable(&self, index: u32, count: u16) -> io::Result<()> {
        let nobody: Vec<Option<&EventFd>> = vec![None; count.into()];
        match self.handle.file.set_irqs(index, 0, &nobody) {
            Err(IrqError::Only(fewer)) if fewer < u32::from(count) => {
                let name = &self.name;
                tracing::warn!("the host has {fewer} interrupts for {name}, which has {count}");
                let some = nobody.get(..fewer as usize).unwrap_or_default();
                self.handle.file.set_irqs(index, 0, some).map_err(failure)
            }
            other => other.map_err(failure),
        }
    }

    fn set_msi(&self, place: MsiPlace, config: &Config) -> io::Result<()> {
        let mut wires = lock(&self.wires);
        let control = config.u16_at(place.at + 2);
        let Some(requester) = wires.requester.filter(|_| control & MSI_ENABLE != 0) else {
            self.end_msi(&mut wires);
            return Ok(());
        };
        let count = 1u16 << (control >> 4 & 7).min(5);
        let count = count.min(place.count);
        if wires.msi.is_empty() {
            let made: io::Result<Vec<_>> = (0..count).map(|_| self.router.allocate(requester)).collect();
            let made = made?;
            let events: Vec<_> = made.iter().map(|vector| Some(vector.event_fd())).collect();
            let set = self.handle.file.set_irqs(VFIO_PCI_MSI_IRQ_INDEX, 0, &events);
            set.map_err(failure)?;
            wires.msi = made;
        }
        let high = if place.wide { config.u32_at(place.at + 8) } else { 0 };
        let address = u64::from(high) << 32 | u64::from(config.u32_at(place.at + 4));
        let data = config.u16_at(place.data());
        let masked = place.mask().map_or(0, |at| config.u32_at(at));
        for (i, vector) in (0u16..).zip(&wires.msi) {
            // The device puts the number of the vector into the lowest bits.
            let data = u32::from(data & !(count - 1) | i);
            match masked & 1 << i {
                0 => vector.unmask(MsiMessage { address, data })?,
                _ => vector.mask()?,
            }
        }
        Ok(())
    }

    fn warn(&self, error: &io::Error) {
        if let Some(held_back) = self.log.admit() {
            let name = &self.name;
            tracing::warn!(held_back, "cannot set up interrupts of {name}: {error}");
        }
    }
}

pub(crate) fn failure(error: IrqError) -> io::Error {
    match error {
        IrqError::Only(count) => io::Error::other(format!("the host has only {count} for it")),
        IrqError::Failed(error) => error,
    }
}

/// Where in the `size` bytes at `place` an access is, if it begins there.
fn inside(place: (u8, u64), size: u64, bar: u8, offset: u64) -> Option<u64> {
    let within = offset.checked_sub(place.1)?;
    (place.0 == bar && within < size).then_some(within)
}
