//! Console device (virtio 1.2, 5.3): one port, its bytes exchanged with a host [`Console`].
//!
//! Without MULTIPORT a port is a pair of queues, receive and transmit, at twice its number. More ports would each be another
//! [`Port`] with a console of its own in the same thread, and two control queues beside them.

mod port;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use triarch_device_core::{ThreadClass, Worker};
use triarch_legacy::console::Console;

use crate::{
    ActivateError, DeviceContext, DeviceId, VirtQueue, VirtioDevice, VirtioInterrupt, feature, read_config_bytes,
};
use port::Port;

/// The configuration space has the console's size.
const F_SIZE: u64 = 1 << 0;
/// A byte can be written through the configuration space before the queues are set up.
const F_EMERG_WRITE: u64 = 1 << 2;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Offset of `emerg_wr` in the configuration space: after columns, rows and the number of ports.
const EMERG_WRITE: u64 = 8;

/// A console with one port.
pub struct VirtioConsole {
    name: String,
    console: Arc<Console>,
    shared: Arc<Shared>,
    has_size: bool,
    context: Option<DeviceContext>,
    worker: Option<Worker<Port>>,
    /// The port while no thread has it.
    port: Option<Port>,
}

/// What the one who watches the terminal's size needs of the device.
struct Shared {
    console: Arc<Console>,
    /// Columns in the low half, rows in the high half.
    size: AtomicU32,
    interrupt: Mutex<Option<Arc<dyn VirtioInterrupt>>>,
}

/// Tells the guest of a new terminal size; can be kept and used apart from the device.
#[derive(Clone)]
pub struct ConsoleResizer(Arc<Shared>);

impl ConsoleResizer {
    /// To be called when the terminal may have another size (SIGWINCH). The guest hears of it only if it has.
    pub fn resized(&self) {
        let size = pack(self.0.console.size());
        if self.0.size.swap(size, Ordering::SeqCst) == size {
            return;
        }
        let interrupt = self.0.interrupt.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(error)) = interrupt.as_ref().map(|i| i.config()) {
            tracing::warn!("cannot tell the guest of its console's new size: {error}");
        }
    }
}

fn pack(size: Option<(u16, u16)>) -> u32 {
    let (columns, rows) = size.unwrap_or((0, 0));
    u32::from(rows) << 16 | u32::from(columns)
}

impl VirtioConsole {
    /// A device whose bytes go to and come from `console`. Its thread is called `name`.
    pub fn new(name: &str, console: Arc<Console>) -> Self {
        let size = console.size();
        let shared = Shared {
            console: console.clone(),
            size: AtomicU32::new(pack(size)),
            interrupt: Mutex::new(None),
        };
        Self {
            name: name.to_owned(),
            port: Some(Port::new(console.clone())),
            console,
            shared: Arc::new(shared),
            has_size: size.is_some(),
            context: None,
            worker: None,
        }
    }

    /// What to call when the terminal changes its size.
    pub fn resizer(&self) -> ConsoleResizer {
        ConsoleResizer(self.shared.clone())
    }

    /// Stops the thread and takes the port back.
    fn halt(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.port = worker.stop();
        }
    }

    /// Runs the thread if there is a queue to serve.
    fn run(&mut self) -> Result<(), ActivateError> {
        let Some(context) = &self.context else {
            return Err(ActivateError::Driver("a queue was started before the device"));
        };
        let Some(port) = self.port.take_if(|p| !p.is_idle()) else {
            return Ok(());
        };
        let worker = Worker::spawn(&self.name, ThreadClass::Device, &context.sandbox, port, Port::run);
        self.worker = Some(worker.map_err(|source| ActivateError::Host {
            what: "the console thread",
            source,
        })?);
        Ok(())
    }
}

impl VirtioDevice for VirtioConsole {
    fn id(&self) -> DeviceId {
        DeviceId::Console
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        feature::COMMON | F_EMERG_WRITE | if self.has_size { F_SIZE } else { 0 }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..4].copy_from_slice(&self.shared.size.load(Ordering::SeqCst).to_le_bytes());
        // The number of ports, read without MULTIPORT too by some.
        config[4..8].copy_from_slice(&1u32.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (EMERG_WRITE, Some(byte)) = (offset, data.first()) {
            self.console.write(&[*byte]);
        }
    }

    fn activate(&mut self, context: DeviceContext) -> Result<(), ActivateError> {
        if self.context.is_some() {
            return Err(ActivateError::Driver("the device is active already"));
        }
        if context.features & F_SIZE != 0 {
            *self.shared.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = Some(context.interrupt.clone());
        }
        self.context = Some(context);
        Ok(())
    }

    fn start_queue(&mut self, queue: VirtQueue) -> Result<(), ActivateError> {
        if self.context.is_none() {
            return Err(ActivateError::Driver("a queue was started before the device"));
        }
        self.halt();
        let Some(port) = &mut self.port else {
            return Err(ActivateError::Driver("the console thread is gone"));
        };
        let outcome = port.give(queue);
        self.run()?;
        outcome
    }

    fn stop_queue(&mut self, index: u16) -> Option<VirtQueue> {
        self.halt();
        let queue = self.port.as_mut().and_then(|p| p.take(index));
        if let Err(error) = self.run()
            && self.context.is_some()
        {
            tracing::error!("the console's other queue cannot go on: {error}");
        }
        queue
    }

    fn reset(&mut self) {
        self.context = None;
        *self.shared.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests;
