//! What of the transport goes into a snapshot.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use triarch_pci::{ConfigStateError, ConfigStateV1, MsiXStateError, MsiXStateV1};

use super::core::{Core, QueueSlot};
use super::status;
use crate::{QueueStateV1, feature_names};

/// A saved queue: its registers and, when the device works on it, how far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioPciQueueV1 {
    /// Number of descriptors.
    pub size: u16,
    /// queue_enable.
    pub enabled: bool,
    /// queue_msix_vector.
    pub vector: u16,
    /// GPA of the descriptor table.
    pub descriptors: u64,
    /// GPA of the driver area.
    pub driver: u64,
    /// GPA of the device area.
    pub device: u64,
    /// Where the device stands, when it works on the queue.
    pub progress: Option<QueueStateV1>,
}

/// A saved virtio-pci function. The state of the device behind it is saved by the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioPciStateV1 {
    /// Configuration space.
    pub config: ConfigStateV1,
    /// Vector table.
    pub msix: MsiXStateV1,
    /// device_status.
    pub status: u8,
    /// ISR status.
    pub isr: u8,
    /// config_generation.
    pub generation: u8,
    /// config_msix_vector.
    pub config_vector: u16,
    /// device_feature_select.
    pub device_feature_select: u32,
    /// driver_feature_select.
    pub driver_feature_select: u32,
    /// Features the driver acknowledged.
    pub driver_features: u64,
    /// The driver acknowledged features past bit 63.
    pub foreign_features: bool,
    /// queue_select.
    pub queue_select: u16,
    /// The queues, in order.
    pub queues: Vec<VirtioPciQueueV1>,
}

/// Why a function cannot be saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SaveError {
    /// Its queues are being worked on.
    #[error("the device must be paused to be saved")]
    NotPaused,
}

/// Why a function cannot be restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The function cannot be made at all.
    #[error("cannot make the device")]
    Create(#[source] std::io::Error),
    /// The configuration space is another device's.
    #[error("the saved configuration space is not this device's")]
    Config(#[source] ConfigStateError),
    /// The vector table is another device's.
    #[error("the saved interrupts are not this device's")]
    MsiX(#[source] MsiXStateError),
    /// The driver relies on features this device does not offer: their names.
    #[error("the guest uses features that this device does not offer: {0}")]
    Features(String),
    /// The queues are not this device's.
    #[error("the saved queues do not fit this device")]
    Queues,
    /// The device did not start from this state.
    #[error("the device refuses the saved state")]
    Refused,
}

impl Core {
    /// The registers and queues, beside configuration space and vector table.
    pub(super) fn save(&self, config: ConfigStateV1) -> Result<VirtioPciStateV1, SaveError> {
        if !self.paused {
            return Err(SaveError::NotPaused);
        }
        let queues = self.queues.iter().zip(0u16..).map(|(queue, index)| VirtioPciQueueV1 {
            size: queue.size,
            enabled: queue.enabled,
            vector: self.interrupts.queue_vector(index),
            descriptors: queue.descriptors,
            driver: queue.driver,
            device: queue.device,
            progress: queue.progress(),
        });
        Ok(VirtioPciStateV1 {
            config,
            msix: self.interrupts.msix.save(),
            status: self.interrupts.status(),
            isr: self.interrupts.isr(),
            generation: self.interrupts.generation(),
            config_vector: self.interrupts.config_vector(),
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
            foreign_features: self.foreign_features,
            queue_select: self.queue_select,
            queues: queues.collect(),
        })
    }

    /// Continues from saved registers and queues; leaves the device paused.
    pub(super) fn restore(&mut self, state: &VirtioPciStateV1) -> Result<(), RestoreError> {
        let foreign = state.driver_features & !self.offered();
        if state.status & (status::FEATURES_OK | status::DRIVER_OK) != 0 && foreign != 0 {
            let names = feature_names(self.device.id(), foreign);
            return Err(RestoreError::Features(names));
        }
        let runs = state.status & status::DRIVER_OK != 0;
        let fits = |((saved, here), index): ((&VirtioPciQueueV1, &QueueSlot), u16)| {
            let started = |progress: &QueueStateV1| runs && saved.enabled && progress.index == index;
            saved.size.is_power_of_two() && saved.size <= here.max_size && saved.progress.as_ref().is_none_or(started)
        };
        if state.queues.len() != self.queues.len() || !state.queues.iter().zip(&self.queues).zip(0..).all(fits) {
            return Err(RestoreError::Queues);
        }
        self.driver_features = state.driver_features;
        self.foreign_features = state.foreign_features;
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.queue_select = state.queue_select;
        let interrupts = self.interrupts.clone();
        interrupts.set_config_vector(state.config_vector);
        for ((queue, saved), index) in self.queues.iter_mut().zip(&state.queues).zip(0u16..) {
            queue.size = saved.size;
            queue.descriptors = saved.descriptors;
            queue.driver = saved.driver;
            queue.device = saved.device;
            interrupts.set_queue_vector(index, saved.vector);
        }
        let broken = state.status & status::NEEDS_RESET;
        interrupts.restore(state.status & status::BY_DRIVER, state.isr, state.generation);
        if runs {
            self.activate();
        }
        for (index, saved) in (0u16..).zip(&state.queues) {
            self.queues[usize::from(index)].enabled = saved.enabled;
            if let Some(progress) = &saved.progress {
                self.start(index, Some(progress));
            }
        }
        // One that was broken before may be so in the same way again.
        if interrupts.status() & status::NEEDS_RESET & !broken != 0 {
            return Err(RestoreError::Refused);
        }
        interrupts.add_status(broken);
        Ok(())
    }
}
