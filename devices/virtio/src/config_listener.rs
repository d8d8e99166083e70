//! Who hears that a device's configuration space has changed.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::VirtioInterrupt;

/// The driver of a device, while there is one.
#[derive(Default)]
pub(crate) struct ConfigListener(Mutex<Option<Arc<dyn VirtioInterrupt>>>);

impl ConfigListener {
    /// Sets who listens from now on.
    pub(crate) fn set(&self, driver: Option<Arc<dyn VirtioInterrupt>>) {
        *self.lock() = driver;
    }

    /// Whether somebody does.
    pub(crate) fn is_there(&self) -> bool {
        self.lock().is_some()
    }

    /// Tells it of a change; without it, the next driver reads what is there then.
    pub(crate) fn config_changed(&self) -> io::Result<()> {
        match &*self.lock() {
            Some(driver) => driver.config(),
            None => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<dyn VirtioInterrupt>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
