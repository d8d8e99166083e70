//! What the host tells of a device while a guest has it: that it wants it back, and that it broke.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::kernel::{DeviceFile, IrqError};

/// What the host tells of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alarm {
    /// It wants it back: somebody takes it from vfio-pci, or pulled it out. It asks again about every 10 s, and waits for as long as
    /// the device is open here.
    Wanted,
    /// It had an error that it did not correct by itself (PCI Express 4.0, 6.2; VFIO_PCI_ERR_IRQ_INDEX).
    Failed,
}

/// Kinds of interrupts, and what each means.
const KINDS: [(u32, Alarm); 2] = [
    (VFIO_PCI_REQ_IRQ_INDEX, Alarm::Wanted),
    (VFIO_PCI_ERR_IRQ_INDEX, Alarm::Failed),
];

/// The events of one device, in a set with those of the others.
pub(crate) struct Alarms {
    set: Arc<Epoll>,
    events: Vec<(Alarm, EventFd)>,
}

impl Alarms {
    /// Listens to what the kernel tells of the device `file`, which is called `name`, by `set`. What it does not tell the device works
    /// without.
    pub(crate) fn listen(name: &str, file: &dyn DeviceFile, set: &Arc<Epoll>) -> Self {
        let told = |(kind, _): &(u32, Alarm)| file.irq_count(*kind).is_ok_and(|count| count > 0);
        let heard = |(kind, alarm)| match hear(file, kind, set) {
            Ok(event) => Some((alarm, event)),
            Err(error) => {
                tracing::warn!("the host cannot tell of {name} that it is {alarm:?}: {error}");
                None
            }
        };
        Self {
            set: set.clone(),
            events: KINDS.into_iter().filter(told).filter_map(heard).collect(),
        }
    }

    /// What was told since the last time.
    pub(crate) fn take(&self) -> impl Iterator<Item = Alarm> {
        let told = self.events.iter().filter(|(_, event)| event.read().is_ok());
        told.map(|(alarm, _)| *alarm)
    }
}

/// An event of `set` that the interrupts `kind` ring.
fn hear(file: &dyn DeviceFile, kind: u32, set: &Epoll) -> io::Result<EventFd> {
    let event = EventFd::new(EFD_NONBLOCK)?;
    let rung = file.set_irqs(kind, 0, &[Some(&event)]);
    rung.map_err(|error| match error {
        IrqError::Failed(error) => error,
        IrqError::Only(_) => io::ErrorKind::Unsupported.into(),
    })?;
    let readable = EpollEvent::new(EventSet::IN, 0);
    set.ctl(ControlOperation::Add, event.as_raw_fd(), readable)?;
    Ok(event)
}

impl Drop for Alarms {
    fn drop(&mut self) {
        for (_, event) in &self.events {
            // It is in there as long as anybody has it open.
            let _ = self
                .set
                .ctl(ControlOperation::Delete, event.as_raw_fd(), EpollEvent::default());
        }
    }
}
