//! The interrupt pin of a device (PCI Local Bus 3.0, 2.2.6): a level that goes from VFIO to KVM and back by two event descriptors, inside
//! the kernel.
//!
//! When the device asserts its pin, VFIO masks the pin and rings `raised`, by which KVM raises the wire. The guest's end of interrupt lowers the
//! wire and rings `lowered`, by which VFIO unmasks the pin: if the device still asserts it, it begins anew.

use std::io;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::VFIO_PCI_INTX_IRQ_INDEX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Vm;
use crate::handle::Handle;
use crate::interrupts::failure;

/// The pin of one device.
pub(crate) struct Pin {
    handle: Arc<Handle>,
    vm: Arc<dyn Vm>,
    /// 1: INTA.
    number: u8,
    raised: EventFd,
    lowered: EventFd,
}

impl Pin {
    /// Pin `number` (1: INTA) of the device, which is not connected.
    pub(crate) fn new(handle: &Arc<Handle>, vm: &Arc<dyn Vm>, number: u8) -> io::Result<Self> {
        Ok(Self {
            handle: handle.clone(),
            vm: vm.clone(),
            number,
            raised: EventFd::new(EFD_NONBLOCK)?,
            lowered: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Connects it to the wire of the guest's `slot`.
    pub(crate) fn connect(&self, slot: u8) -> io::Result<()> {
        // What an earlier connection left there.
        for event in [&self.raised, &self.lowered] {
            let _ = event.read();
        }
        self.vm.wire(slot, self.number, &self.raised, &self.lowered)?;
        let file = &self.handle.file;
        let set = file.set_irqs(VFIO_PCI_INTX_IRQ_INDEX, 0, &[Some(&self.raised)]);
        let done = set
            .map_err(failure)
            .and_then(|()| file.unmask_by(VFIO_PCI_INTX_IRQ_INDEX, &self.lowered));
        if done.is_err() {
            // The error that is told came before.
            let _ = self.disconnect(slot);
        }
        done
    }

    /// Undoes that.
    pub(crate) fn disconnect(&self, slot: u8) -> io::Result<()> {
        let quiet = self.handle.file.disable_irqs(VFIO_PCI_INTX_IRQ_INDEX);
        let unwired = self.vm.unwire(slot, self.number, &self.raised);
        quiet.and(unwired)
    }
}
