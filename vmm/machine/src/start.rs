//! From a configuration to a guest.

use std::sync::{Arc, Mutex};

use event_manager::SubscriberOps;
use triarch_api::events::kind;
use triarch_api::{Handler, Phase};
use triarch_legacy::MemoryPlace;

use crate::backends::{Backends, Opener};
use crate::build::{Machine, Origin, Reports};
use crate::control::{Cause, Controller, SerialInput, Subscriber};
use crate::progress::Progress;
use crate::{MachineError, Message};

impl Controller {
    /// Lets a new guest run, with `vcpus` vCPUs, or as many as the last one had or are configured, and `memory` beside its RAM.
    pub(crate) fn start(
        &mut self,
        progress: Progress<'_>,
        cause: Cause,
        vcpus: Option<u32>,
        memory: &[MemoryPlace],
    ) -> Result<(), MachineError> {
        self.take_back_locks()?;
        let Some(config) = &self.config else {
            return Ok(());
        };
        let vcpus = vcpus.unwrap_or(self.processors.at_boot(config.cpus.boot_vcpus));
        self.tell(&kind::VM_BOOTING, cause);
        let mut machine = self.build(progress, Origin::Boot { vcpus, memory })?;
        machine.resume()?;
        self.take_in(machine, Phase::Running);
        self.tell(&kind::VM_BOOTED, cause);
        Ok(())
    }

    /// Builds the guest, which does not run yet.
    pub(crate) fn build(&mut self, progress: Progress<'_>, origin: Origin<'_>) -> Result<Machine, MachineError> {
        let (Some(config), Some(consoles)) = (&self.config, &self.consoles) else {
            return Err(MachineError::Host {
                what: "build a guest without a configuration",
                source: std::io::ErrorKind::InvalidInput.into(),
            });
        };
        progress.note("disks and networks");
        let mut backends = match self.backends.take() {
            Some(backends) => backends,
            None => {
                let platform = config.platform.as_ref();
                self.iommu.by_iommufd(platform.and_then(|platform| platform.iommufd));
                let (handed, daemons, sandbox) = (&self.handed, self.daemons.as_ref(), &self.sandbox);
                let opener = Opener {
                    handed,
                    daemons,
                    sandbox,
                    iommu: &self.iommu,
                    behind_iommu: config.iommu_for_all(),
                    moved: None,
                };
                Backends::open(config, opener)?
            }
        };
        self.generation += 1;
        let (generation, inbox) = (self.generation, self.inbox.clone());
        let reports = Reports {
            guest: Arc::new(move |event| inbox.post(Message::Guest(generation, event))),
            events: self.inbox.events(),
            progress,
        };
        let machine = Machine::build(&self.kvm, config, origin, consoles, &backends, &self.sandbox, reports)?;
        backends.places = machine.devices().places();
        self.backends = Some(backends);
        self.processors.begin(machine.cpus());
        self.dimms.begin(machine.memory_slots());
        self.outbox.show_meters(self.meters(&machine));
        Ok(machine)
    }

    /// Takes in a guest that was built and is in `phase` now.
    pub(crate) fn take_in(&mut self, machine: Machine, phase: Phase) {
        self.serial_input = machine.serial().map(|serial| {
            let input: Subscriber = Arc::new(Mutex::new(SerialInput(serial.clone())));
            self.events.add_subscriber(input)
        });
        self.machine = Some(machine);
        self.phase = phase;
    }

    /// Leaves the guest alone whose memory cannot be provided: whoever waited for the threads that touch it would wait for ever. The end of
    /// the process ends them, and none of them has seen anything but what was saved.
    pub(crate) fn abandon_guest(&mut self, reason: String) -> MachineError {
        std::mem::forget(self.machine.take());
        // What it listened on would stay behind with it.
        if let Some(config) = &self.config {
            let consoles = [&config.serial, &config.console].map(|console| console.socket.as_ref());
            let vsock = config.vsock.as_ref().map(|vsock| &vsock.socket);
            for path in consoles.into_iter().flatten().chain(vsock) {
                let _ = std::fs::remove_file(path);
            }
        }
        MachineError::MemoryLost(reason)
    }
}
