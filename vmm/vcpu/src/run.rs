//! The vCPU threads of a guest and their common state.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use thiserror::Error;
use triarch_device_core::metrics::Padded;
use triarch_device_core::{AccessError, Bus, RateLimit, Sandbox, ThreadClass};
use triarch_hypervisor::{Exit, Firmware, Vcpu};

use crate::kick::{Running, kick};
use crate::metrics::{Reason, VcpuMetrics};

/// What a vCPU tells the rest of the VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEvent {
    /// The guest's processor shut down (triple fault): the machine resets.
    Reset,
    /// The guest asked to be powered off through its processor (PSCI).
    PowerOff,
    /// The guest crashed, by its own word.
    Crashed,
    /// The vCPU cannot go on; the reason is for the operator.
    Failed(String),
}

/// Where exits are dispatched to.
pub struct Buses {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O, by GPA.
    pub mmio: Arc<Bus>,
}

/// Why vCPU threads could not be started or reached.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// No thread.
    #[error("cannot start the thread of vCPU {index}")]
    Spawn {
        /// Index of the vCPU.
        index: usize,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// No signal.
    #[error("cannot interrupt vCPU {index}")]
    Kick {
        /// Index of the vCPU.
        index: usize,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

const PAUSE: u8 = 0;
const RUN: u8 = 1;
const STOP: u8 = 2;

/// How many threads have come how far.
#[derive(Default)]
struct Counts {
    /// Have begun, and have their names.
    begun: usize,
    /// Are parked.
    parked: usize,
}

/// What all vCPU threads of a guest share.
struct Shared {
    /// What they should do. Written under the lock, read on every exit without it.
    want: AtomicU8,
    counts: Mutex<Counts>,
    changed: Condvar,
    buses: Buses,
    firmware: Option<Arc<dyn Firmware>>,
    events: Box<dyn Fn(usize, VcpuEvent) + Send + Sync>,
    log: RateLimit,
}

impl Shared {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread has begun.
    fn begin(&self) {
        self.counts().begun += 1;
        self.changed.notify_all();
    }

    fn set(&self, want: u8) {
        let _guard = self.counts();
        self.want.store(want, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// What vCPU `index` should do; one that the guest has not started rests as if it were paused.
    fn want(&self, index: usize) -> u8 {
        match (self.want.load(Ordering::SeqCst), &self.firmware) {
            (RUN, Some(firmware)) if !firmware.runs(index) => PAUSE,
            (want, _) => want,
        }
    }

    /// Parks the calling thread, that of vCPU `index`, while it should not run; false when it should end.
    fn may_run(&self, index: usize) -> bool {
        if self.want(index) == RUN {
            return true;
        }
        let mut counts = self.counts();
        counts.parked += 1;
        self.changed.notify_all();
        let want = loop {
            match self.want(index) {
                PAUSE => counts = self.changed.wait(counts).unwrap_or_else(PoisonError::into_inner),
                want => break want,
            }
        };
        counts.parked -= 1;
        want == RUN
    }

    /// Serves a call of vCPU `index` to firmware, which may start another vCPU. What went wrong, if so.
    fn call(&self, index: usize, vcpu: &Vcpu, function: u64) -> Option<VcpuEvent> {
        let Some(firmware) = &self.firmware else {
            let unknown = format!("the guest made the unknown call {function:#x}");
            return Some(VcpuEvent::Failed(unknown));
        };
        let outcome = firmware.call(index, vcpu, function);
        // Under the lock: a thread that has just found that it should not run has to hear of it.
        let _guard = self.counts();
        self.changed.notify_all();
        outcome.err().map(|error| failed(&error))
    }
}

/// The vCPU threads of one guest. They start parked; all run, pause and stop together. Dropping the set stops them.
pub struct VcpuSet {
    threads: Vec<JoinHandle<Vcpu>>,
    metrics: Vec<Arc<Padded<VcpuMetrics>>>,
    shared: Arc<Shared>,
}

impl VcpuSet {
    /// Starts a thread `vcpuN` for each of `vcpus`, parked. `events` is called on those threads. Without `firmware` all of them run once
    /// the set does, and KVM holds back those the guest has not started.
    pub fn start(
        vcpus: Vec<Vcpu>,
        buses: Buses,
        firmware: Option<Arc<dyn Firmware>>,
        sandbox: &Arc<dyn Sandbox>,
        events: impl Fn(usize, VcpuEvent) + Send + Sync + 'static,
    ) -> Result<Self, VcpuError> {
        let shared = Arc::new(Shared {
            want: AtomicU8::new(PAUSE),
            counts: Mutex::default(),
            changed: Condvar::new(),
            buses,
            firmware,
            events: Box::new(events),
            log: RateLimit::default(),
        });
        let mut set = Self {
            threads: Vec::with_capacity(vcpus.len()),
            metrics: vcpus.iter().map(|_| Arc::default()).collect(),
            shared,
        };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let (shared, sandbox) = (set.shared.clone(), sandbox.clone());
            let metrics = set.metrics[index].clone();
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || run_thread(index, vcpu, &shared, &metrics, &*sandbox))
                .map_err(|source| VcpuError::Spawn { index, source })?;
            set.threads.push(thread);
        }
        Ok(set)
    }

    /// Number of vCPUs.
    pub fn len(&self) -> usize {
        self.threads.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// What each vCPU counts, in their order.
    pub fn metrics(&self) -> &[Arc<Padded<VcpuMetrics>>] {
        &self.metrics
    }

    /// Lets the guest run. Returns when each thread has its name: whoever starts a guest pins its vCPUs by them, as libvirt does.
    pub fn resume(&self) {
        self.shared.set(RUN);
        let mut counts = self.shared.counts();
        while counts.begun < self.threads.len() {
            counts = self.shared.changed.wait(counts).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Stops the guest where it is and returns when no vCPU runs it any more. Interrupts that come meanwhile wait in KVM.
    pub fn pause(&self) -> Result<(), VcpuError> {
        self.shared.set(PAUSE);
        self.kick_all()?;
        let mut counts = self.shared.counts();
        while counts.parked < self.threads.iter().filter(|t| !t.is_finished()).count() {
            let wait = std::time::Duration::from_millis(10);
            counts = self
                .shared
                .changed
                .wait_timeout(counts, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    fn kick_all(&self) -> Result<(), VcpuError> {
        let live = self.threads.iter().enumerate().filter(|(_, t)| !t.is_finished());
        for (index, thread) in live {
            kick(thread).map_err(|source| VcpuError::Kick { index, source })?;
        }
        Ok(())
    }

    /// Ends the threads and gives the vCPUs back (fewer, if one panicked).
    pub fn stop(mut self) -> Vec<Vcpu> {
        self.end()
    }

    fn end(&mut self) -> Vec<Vcpu> {
        self.shared.set(STOP);
        // A thread that cannot be signalled has ended.
        let _ = self.kick_all();
        self.threads.drain(..).filter_map(|t| t.join().ok()).collect()
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        self.end();
    }
}

fn run_thread(index: usize, mut vcpu: Vcpu, shared: &Shared, metrics: &VcpuMetrics, sandbox: &dyn Sandbox) -> Vcpu {
    shared.begin();
    metrics.watch_this_thread();
    if let Err(error) = sandbox.enter(ThreadClass::Vcpu) {
        tracing::error!("cannot confine vCPU {index}: {error}");
        std::process::abort();
    }
    let _running = Running::enter(&vcpu);
    let switch = vcpu.immediate_exit();
    while shared.may_run(index) {
        if let Some(event) = run_until_event(index, &mut vcpu, shared, metrics) {
            (shared.events)(index, event);
            // Whoever handles the event pauses or stops the set; until then this vCPU rests.
            rest(shared);
        }
        vcpu.complete_io();
        switch.set(false);
    }
    vcpu
}

/// Waits until the set is no longer meant to run.
fn rest(shared: &Shared) {
    let mut counts = shared.counts();
    while shared.want.load(Ordering::SeqCst) == RUN {
        counts = shared.changed.wait(counts).unwrap_or_else(PoisonError::into_inner);
    }
    drop(counts);
}

/// Runs the guest until the vCPU should not run any more (`None`) or something happened.
fn run_until_event(index: usize, vcpu: &mut Vcpu, shared: &Shared, metrics: &VcpuMetrics) -> Option<VcpuEvent> {
    if let Some(Err(error)) = shared.firmware.as_ref().map(|firmware| firmware.prepare(index, vcpu)) {
        return Some(failed(&error));
    }
    while shared.want.load(Ordering::SeqCst) == RUN {
        match vcpu.run() {
            Ok(Exit::Interrupted) => {
                metrics.exited(Reason::Interrupted);
                vcpu.immediate_exit().set(false);
            }
            Ok(Exit::Call(function)) => {
                metrics.exited(Reason::Call);
                let event = shared.call(index, vcpu, function);
                if event.is_some() || shared.want(index) != RUN {
                    return event;
                }
            }
            Ok(exit) => {
                metrics.exited(Reason::of(&exit));
                if let Some(event) = dispatch(exit, shared) {
                    return Some(event);
                }
            }
            Err(error) => {
                metrics.exited(Reason::Failed);
                return Some(VcpuEvent::Failed(format!("KVM cannot run the vCPU: {error}")));
            }
        }
    }
    None
}

/// The error and its causes, for the operator.
fn failed(error: &dyn std::error::Error) -> VcpuEvent {
    let causes = std::iter::successors(Some(error), |error| error.source());
    VcpuEvent::Failed(causes.map(ToString::to_string).collect::<Vec<_>>().join(": "))
}

fn dispatch(exit: Exit<'_>, shared: &Shared) -> Option<VcpuEvent> {
    let Buses { pio, mmio } = &shared.buses;
    match exit {
        Exit::PortOut { port, size, data } => {
            for value in data.chunks(size) {
                note(shared, "port write", u64::from(port), pio.write(u64::from(port), value));
            }
        }
        Exit::PortIn { port, size, data } => {
            for value in data.chunks_mut(size) {
                note(shared, "port read", u64::from(port), pio.read(u64::from(port), value));
            }
        }
        Exit::MmioWrite { address, data } => note(shared, "write", address, mmio.write(address, data)),
        Exit::MmioRead { address, data } => note(shared, "read", address, mmio.read(address, data)),
        // Served where the vCPU is at hand.
        Exit::Interrupted | Exit::Call(_) => {}
        Exit::Shutdown => return Some(VcpuEvent::Reset),
        Exit::SystemEvent(kind) => return Some(system_event(kind)),
        Exit::Halted => return Some(VcpuEvent::PowerOff),
        Exit::Failed(reason) => return Some(VcpuEvent::Failed(reason)),
    }
    None
}

fn system_event(kind: u32) -> VcpuEvent {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => VcpuEvent::PowerOff,
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => VcpuEvent::Reset,
        kvm_bindings::KVM_SYSTEM_EVENT_CRASH => VcpuEvent::Crashed,
        other => VcpuEvent::Failed(format!("KVM reported the unknown system event {other}")),
    }
}

/// Guests probe for devices all the time, so an access nobody serves is worth a line only when somebody debugs.
fn note(shared: &Shared, what: &str, address: u64, outcome: Result<(), AccessError>) {
    if let Err(error) = outcome
        && tracing::enabled!(tracing::Level::DEBUG)
        && shared.log.admit().is_some()
    {
        tracing::debug!("{what} at {address:#x}: {error}");
    }
}
