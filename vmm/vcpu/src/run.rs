//! The vCPU threads of a guest and their common state.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thiserror::Error;
use triarch_device_core::metrics::Padded;
use triarch_device_core::{RateLimit, Sandbox, ThreadClass};
use triarch_hypervisor::{Exit, Firmware, Vcpu};

use crate::exits::{Buses, dispatch};
use crate::kick::{Running, ThreadId, kick};
use crate::metrics::{Reason, VcpuMetrics};
use crate::throttle::{Throttle, Throttling};

/// What a vCPU tells the rest of the VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEvent {
    /// The guest's processor shut down (triple fault): the machine resets.
    Reset,
    /// The guest asked to be powered off through its processor (PSCI).
    PowerOff,
    /// The guest crashed, by its own word.
    Crashed,
    /// The guest has started this vCPU, which it was given while it ran.
    Started,
    /// The vCPU cannot go on; the reason is for the operator.
    Failed(String),
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
    /// It has not left the guest, or its thread has ended.
    #[error("vCPU {index} is still busy with what it did for the guest before")]
    Busy {
        /// Index of the vCPU.
        index: usize,
    },
    /// No thread that slows them down.
    #[error("cannot start the thread that slows vCPUs down")]
    Throttle(#[source] io::Error),
    /// Its registers change while it runs.
    #[error("the guest runs; pause it first")]
    Running,
    /// Its thread is gone.
    #[error("the thread of vCPU {index} has ended")]
    Ended {
        /// Index of the vCPU.
        index: usize,
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

/// How long a vCPU that was given back may take to leave the guest, which it does at once unless the guest is about to end.
const REST: Duration = Duration::from_secs(1);

const PAUSE: u8 = 0;
const RUN: u8 = 1;
const STOP: u8 = 2;

/// Something that every vCPU's thread does once while it is parked.
type Errand = Arc<dyn Fn(usize, &Vcpu) + Send + Sync>;

/// How many threads have come how far.
#[derive(Default)]
struct Counts {
    /// Have begun, and have their names.
    begun: usize,
    /// Those, by their numbers.
    threads: Vec<ThreadId>,
    /// Are parked, by their vCPUs.
    parked: BTreeSet<usize>,
    /// What those of them have to do that have not done it.
    errand: Option<(Errand, BTreeSet<usize>)>,
}

impl Counts {
    /// What vCPU `index` has to do, taken by it.
    fn take_errand(&mut self, index: usize) -> Option<Errand> {
        let (errand, open) = self.errand.as_mut()?;
        open.remove(&index).then(|| errand.clone())
    }
}

/// What all vCPU threads of a guest share.
struct Shared {
    /// What they should do. Written under the lock, read on every exit without it.
    want: AtomicU8,
    counts: Mutex<Counts>,
    changed: Condvar,
    buses: Buses,
    firmware: Arc<dyn Firmware>,
    /// Makes them stand still for a share of the time they should run.
    throttle: Arc<Throttle>,
    events: Box<dyn Fn(usize, VcpuEvent) + Send + Sync>,
    log: RateLimit,
}

impl Shared {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread has begun.
    fn begin(&self) {
        let mut counts = self.counts();
        counts.begun += 1;
        counts.threads.push(ThreadId::current());
        self.changed.notify_all();
    }

    fn set(&self, want: u8) {
        let _guard = self.counts();
        self.want.store(want, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// What vCPU `index` should do; one that the guest has not started rests as if it were paused, as do all while they are held.
    fn want(&self, index: usize) -> u8 {
        match self.want.load(Ordering::SeqCst) {
            RUN if self.throttle.holds() || !self.firmware.runs(index) => PAUSE,
            want => want,
        }
    }

    /// Parks the calling thread, that of `vcpu` with this index, while it should not run; false when it should end.
    fn may_run(&self, index: usize, vcpu: &Vcpu) -> bool {
        if self.want(index) == RUN {
            return true;
        }
        let mut counts = self.counts();
        counts.parked.insert(index);
        let mut news = true;
        let want = loop {
            if let Some(errand) = counts.take_errand(index) {
                drop(counts);
                errand(index, vcpu);
                counts = self.counts();
                continue;
            }
            match self.want(index) {
                PAUSE => {
                    let rested = self.firmware.rested(index);
                    if let Err(error) = self.firmware.rest(index, vcpu) {
                        (self.events)(index, failed(&error));
                    }
                    // Only of news: those who are woken by it may be parked as well.
                    if std::mem::take(&mut news) || rested != self.firmware.rested(index) {
                        self.changed.notify_all();
                    }
                    counts = self.changed.wait(counts).unwrap_or_else(PoisonError::into_inner);
                }
                want => break want,
            }
        };
        counts.parked.remove(&index);
        want == RUN
    }

    /// Serves a call of vCPU `index` to firmware, which may start another vCPU. What went wrong, if so.
    fn call(&self, index: usize, vcpu: &Vcpu, function: u64) -> Option<VcpuEvent> {
        let outcome = self.firmware.call(index, vcpu, function);
        // Under the lock: a thread that has just found that it should not run has to hear of it.
        self.look_again();
        match outcome {
            Ok(true) => None,
            Ok(false) => Some(VcpuEvent::Failed(format!(
                "the guest made the unknown call {function:#x}"
            ))),
            Err(error) => Some(failed(&error)),
        }
    }

    /// Makes parked threads look whether they should run.
    fn look_again(&self) {
        let _guard = self.counts();
        self.changed.notify_all();
    }
}

/// The vCPU threads of one guest. They start parked; all run, pause and stop together. Dropping the set stops them.
pub struct VcpuSet {
    threads: Vec<JoinHandle<Vcpu>>,
    sandbox: Arc<dyn Sandbox>,
    metrics: Vec<Arc<Padded<VcpuMetrics>>>,
    shared: Arc<Shared>,
    /// There is one while they are slowed down.
    throttling: Option<Throttling>,
}

impl VcpuSet {
    /// Starts a thread `vcpuN` for each of `vcpus`, parked. `events` is called on those threads. Once the set runs, `firmware` tells
    /// which of them do.
    pub fn start(
        vcpus: Vec<Vcpu>,
        buses: Buses,
        firmware: Arc<dyn Firmware>,
        sandbox: &Arc<dyn Sandbox>,
        events: impl Fn(usize, VcpuEvent) + Send + Sync + 'static,
    ) -> Result<Self, VcpuError> {
        let shared = Arc::new(Shared {
            want: AtomicU8::new(PAUSE),
            counts: Mutex::default(),
            changed: Condvar::new(),
            buses,
            firmware,
            throttle: Arc::default(),
            events: Box::new(events),
            log: RateLimit::default(),
        });
        let mut set = Self {
            threads: Vec::with_capacity(vcpus.len()),
            sandbox: sandbox.clone(),
            metrics: Vec::with_capacity(vcpus.len()),
            shared,
            throttling: None,
        };
        for vcpu in vcpus {
            set.spawn(vcpu)?;
        }
        Ok(set)
    }

    /// Starts the thread of the next vCPU, parked.
    fn spawn(&mut self, vcpu: Vcpu) -> Result<(), VcpuError> {
        let index = self.threads.len();
        let (shared, sandbox) = (self.shared.clone(), self.sandbox.clone());
        let metrics = Arc::<Padded<VcpuMetrics>>::default();
        let theirs = metrics.clone();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || run_thread(index, vcpu, &shared, &theirs, &*sandbox))
            .map_err(|source| VcpuError::Spawn { index, source })?;
        self.threads.push(thread);
        self.metrics.push(metrics);
        Ok(())
    }

    /// Adds a vCPU, whose index is the next, and which the guest does not have yet. Its thread has begun, and has its name, when
    /// [`wait_rested`](Self::wait_rested) has returned: several that are added begin side by side.
    pub fn add(&mut self, vcpu: Vcpu) -> Result<(), VcpuError> {
        self.spawn(vcpu)
    }

    /// Waits until vCPU `index`, which the guest does not have, can be plugged: its thread is parked, and has made an end of what it
    /// did before.
    pub fn wait_rested(&self, index: usize) -> Result<(), VcpuError> {
        let deadline = Instant::now() + REST;
        let mut counts = self.shared.counts();
        while !(counts.parked.contains(&index) && self.shared.firmware.rested(index)) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Err(VcpuError::Busy { index });
            };
            counts = self
                .shared
                .changed
                .wait_timeout(counts, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// Lets the guest start vCPU `index`, after [`wait_rested`](Self::wait_rested).
    pub fn plug(&self, index: usize) {
        self.shared.firmware.plug(index);
        self.shared.look_again();
    }

    /// Takes vCPU `index` from the guest; it parks as soon as it has left it, and can be given again by [`plug`](Self::plug).
    pub fn unplug(&self, index: usize) -> Result<(), VcpuError> {
        self.shared.firmware.unplug(index);
        self.shared.look_again();
        self.nudge(index)
    }

    /// Makes the thread of vCPU `index` leave the guest for a moment.
    pub fn nudge(&self, index: usize) -> Result<(), VcpuError> {
        match self.threads.get(index).filter(|thread| !thread.is_finished()) {
            Some(thread) => kick(thread).map_err(|source| VcpuError::Kick { index, source }),
            None => Ok(()),
        }
    }

    /// Whether vCPU `index` has to look by itself whether the guest has started it.
    pub fn waits(&self, index: usize) -> bool {
        self.shared.firmware.waits(index)
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
        self.wait_begun();
    }

    fn wait_begun(&self) {
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
        while counts.parked.len() < self.threads.iter().filter(|t| !t.is_finished()).count() {
            let wait = Duration::from_millis(10);
            counts = self
                .shared
                .changed
                .wait_timeout(counts, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// Has the thread of each vCPU call `errand` with its index and vCPU, and returns what that returned, in their order. Only while the
    /// set is paused, and not from one of these threads.
    pub fn on_each<R: Send + 'static>(
        &self,
        errand: impl Fn(usize, &Vcpu) -> R + Send + Sync + 'static,
    ) -> Result<Vec<R>, VcpuError> {
        let (sender, answers) = mpsc::channel();
        let all: BTreeSet<usize> = (0..self.threads.len()).collect();
        let errand = move |index, vcpu: &Vcpu| {
            // Nobody waits any more when a thread of the others has ended.
            let _ = sender.send((index, errand(index, vcpu)));
        };
        let mut counts = self.shared.counts();
        if self.shared.want.load(Ordering::SeqCst) != PAUSE {
            return Err(VcpuError::Running);
        }
        counts.errand = Some((Arc::new(errand), all));
        self.shared.changed.notify_all();
        drop(counts);
        let mut answered = BTreeMap::new();
        while answered.len() < self.threads.len() {
            match answers.recv_timeout(Duration::from_millis(10)) {
                Ok((index, answer)) => drop(answered.insert(index, answer)),
                Err(_) => {
                    let ended = |(index, thread): (usize, &JoinHandle<Vcpu>)| {
                        (thread.is_finished() && !answered.contains_key(&index)).then_some(index)
                    };
                    if let Some(index) = self.threads.iter().enumerate().find_map(ended) {
                        self.shared.counts().errand = None;
                        return Err(VcpuError::Ended { index });
                    }
                }
            }
        }
        self.shared.counts().errand = None;
        Ok(answered.into_values().collect())
    }

    /// Lets vCPUs stand still for `percent` of the time, 99 at most; 0: not at all.
    ///
    /// # Errors
    /// There is no thread for it; then they are as fast as they were.
    pub fn throttle(&mut self, percent: u8) -> Result<(), VcpuError> {
        let throttle = self.shared.throttle.clone();
        if percent == 0 {
            // Its end lets them go.
            self.throttling = None;
            return Ok(());
        }
        throttle.set(percent);
        if self.throttling.is_none() {
            let (held, released) = (self.shared.clone(), self.shared.clone());
            let hold = move || {
                let threads = held.counts().threads.clone();
                threads.into_iter().for_each(ThreadId::kick);
            };
            let started = Throttling::start(&throttle, hold, move || released.look_again(), &self.sandbox);
            self.throttling = Some(started.map_err(VcpuError::Throttle)?);
        }
        Ok(())
    }

    /// Which vCPUs run and may be started, while the set is paused.
    pub fn firmware(&self) -> &Arc<dyn Firmware> {
        &self.shared.firmware
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
        self.throttling = None;
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
    while shared.may_run(index, &vcpu) {
        let event = run_until_event(index, &mut vcpu, shared, metrics);
        tell(index, event, shared);
        let event = complete_io(index, &mut vcpu, shared);
        tell(index, event, shared);
        switch.set(false);
    }
    vcpu
}

/// Tells of `event`, if there is one. Whoever handles it pauses or stops the set; until then this vCPU rests.
fn tell(index: usize, event: Option<VcpuEvent>, shared: &Shared) {
    if let Some(event) = event {
        (shared.events)(index, event);
        rest(shared);
    }
}

/// Brings the access that was just served to its end, and with it the registers.
fn complete_io(index: usize, vcpu: &mut Vcpu, shared: &Shared) -> Option<VcpuEvent> {
    loop {
        match vcpu.complete_io() {
            // All of it is served. What keeps the vCPU from running shows at the next run.
            Ok(Exit::Interrupted | Exit::Waiting) | Err(_) => return None,
            Ok(Exit::Call(function)) => {
                if let Some(event) = shared.call(index, vcpu, function) {
                    return Some(event);
                }
            }
            Ok(exit) => {
                if let Some(event) = dispatch(exit, &shared.buses, &shared.log) {
                    return Some(event);
                }
            }
        }
    }
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
    if let Err(error) = shared.firmware.prepare(index, vcpu) {
        return Some(failed(&error));
    }
    note_start(index, vcpu, shared);
    // Not every KVM leaves the guest when a vCPU is started, so any exit may be the first one after it.
    let mut waits = shared.firmware.waits(index);
    while shared.want.load(Ordering::SeqCst) == RUN {
        match vcpu.run() {
            Ok(Exit::Interrupted) => {
                metrics.exited(Reason::Interrupted);
                vcpu.immediate_exit().set(false);
                // Whoever interrupts has something new: the guest may not have this vCPU any more.
                return None;
            }
            Ok(Exit::Waiting) => {
                metrics.exited(Reason::Interrupted);
                waits = waits && !note_start(index, vcpu, shared);
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
                if let Some(event) = dispatch(exit, &shared.buses, &shared.log) {
                    return Some(event);
                }
                waits = waits && !note_start(index, vcpu, shared);
            }
            Err(error) => {
                metrics.exited(Reason::Failed);
                return Some(VcpuEvent::Failed(format!("KVM cannot run the vCPU: {error}")));
            }
        }
    }
    None
}

/// Reports it if the guest has just started the vCPU. Returns whether it has.
fn note_start(index: usize, vcpu: &Vcpu, shared: &Shared) -> bool {
    let started = shared.firmware.started(index, vcpu);
    if started {
        (shared.events)(index, VcpuEvent::Started);
    }
    started
}

/// The error and its causes, for the operator.
fn failed(error: &dyn std::error::Error) -> VcpuEvent {
    let causes = std::iter::successors(Some(error), |error| error.source());
    VcpuEvent::Failed(causes.map(ToString::to_string).collect::<Vec<_>>().join(": "))
}
