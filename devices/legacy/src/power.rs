//! How a guest turns itself off or on again, and hears that it should.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bitflags::bitflags;
use serde::{Deserialize, Serialize};
use triarch_device_core::{AccessError, BusDevice, ByteRegisters, InterruptLine, RateLimit};

use crate::clock::Clock;

/// What a guest did to its own power.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PowerEvent {
    /// It turned itself off.
    Off,
    /// It wants to start anew.
    Reset,
    /// It reported that it cannot go on.
    Panicked,
}

/// Who acts on a [`PowerEvent`].
pub trait PowerSink: Send + Sync {
    /// Called on the vCPU thread that did it, so it must return at once; the guest may do it many times.
    fn power_event(&self, event: PowerEvent);
}

impl<F: Fn(PowerEvent) + Send + Sync> PowerSink for F {
    fn power_event(&self, event: PowerEvent) {
        self(event);
    }
}

/// Sleep type the firmware tables must give for S5.
pub const S5_SLEEP_TYPE: u8 = 5;
/// What turns the guest off when written to the sleep control register: SLP_EN and the type of S5.
pub const SLEEP_OFF: u8 = SLEEP_ENABLE | S5_SLEEP_TYPE << 2;
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE: u8 = 7 << 2;

/// The sleep control and sleep status registers of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7). Claim two bytes for it.
pub struct SleepControl(Arc<dyn PowerSink>);

impl SleepControl {
    /// Registers that report to `sink`.
    pub fn new(sink: Arc<dyn PowerSink>) -> Self {
        Self(sink)
    }
}

impl ByteRegisters for SleepControl {
    const COUNT: u64 = 2;

    fn read_byte(&self, offset: u64) -> Result<u8, AccessError> {
        match offset {
            // Nothing of control can be read back, and it never woke up.
            0..=1 => Ok(0),
            _ => Err(AccessError::BadAccess),
        }
    }

    fn write_byte(&self, offset: u64, value: u8) -> Result<(), AccessError> {
        match offset {
            0 => {
                if value & (SLEEP_ENABLE | SLEEP_TYPE) == SLEEP_OFF {
                    self.0.power_event(PowerEvent::Off);
                }
                Ok(())
            }
            1 => Ok(()),
            _ => Err(AccessError::BadAccess),
        }
    }
}

/// The reset register the FADT names (ACPI 6.5, 4.8.3.6): one byte, of which one value resets.
pub struct ResetRegister {
    value: u8,
    sink: Arc<dyn PowerSink>,
}

impl ResetRegister {
    /// A register that resets when `value` is written: the FADT's RESET_VALUE.
    pub fn new(value: u8, sink: Arc<dyn PowerSink>) -> Self {
        Self { value, sink }
    }
}

impl ByteRegisters for ResetRegister {
    const COUNT: u64 = 1;

    fn read_byte(&self, _offset: u64) -> Result<u8, AccessError> {
        Ok(0)
    }

    fn write_byte(&self, _offset: u64, value: u8) -> Result<(), AccessError> {
        if value == self.value {
            self.sink.power_event(PowerEvent::Reset);
        }
        Ok(())
    }
}

/// The chipset's reset control register, port 0xcf9 on a PC: bit 1 chooses a hard reset, a rising bit 2 does it.
///
/// The port lies inside of PCI's configuration address register, which has only 32-bit accesses; who claims 0xcf8 passes
/// single bytes at 0xcf9 on to this.
pub struct ResetPort {
    value: AtomicU8,
    sink: Arc<dyn PowerSink>,
}

impl ResetPort {
    const RESET_CPU: u8 = 1 << 2;
    const SYSTEM_RESET: u8 = 1 << 1;
    const FULL_RESET: u8 = 1 << 3;

    /// A register that reports to `sink`.
    pub fn new(sink: Arc<dyn PowerSink>) -> Self {
        Self {
            value: AtomicU8::new(0),
            sink,
        }
    }
}

impl ByteRegisters for ResetPort {
    const COUNT: u64 = 1;

    fn read_byte(&self, _offset: u64) -> Result<u8, AccessError> {
        Ok(self.value.load(Ordering::Relaxed))
    }

    fn write_byte(&self, _offset: u64, value: u8) -> Result<(), AccessError> {
        // The bit is never found set, since setting it resets: so each time it is set it rises.
        self.value
            .store(value & (Self::SYSTEM_RESET | Self::FULL_RESET), Ordering::Relaxed);
        if value & Self::RESET_CPU != 0 {
            self.sink.power_event(PowerEvent::Reset);
        }
        Ok(())
    }
}

/// Frequency of the ACPI power management timer in Hz (ACPI 6.5, 4.8.2.1).
pub const PM_TIMER_HZ: u64 = 3_579_545;

/// The power management timer: a 32-bit counter (the FADT says TMR_VAL_EXT). Claim four bytes for it.
pub struct PmTimer {
    clock: Arc<dyn Clock>,
    /// Value when the clock showed zero.
    start: u32,
}

/// What the timer saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmTimerStateV1 {
    /// Value of the counter.
    pub counter: u32,
}

impl PmTimer {
    /// A timer that counts from zero.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self::restore(PmTimerStateV1 { counter: 0 }, clock)
    }

    /// A timer that counts on from `state`, as if no time had passed since.
    pub fn restore(state: PmTimerStateV1, clock: Arc<dyn Clock>) -> Self {
        let start = state.counter.wrapping_sub(ticks(&*clock));
        Self { clock, start }
    }

    /// The counter as it is now.
    pub fn state(&self) -> PmTimerStateV1 {
        PmTimerStateV1 {
            counter: self.counter(),
        }
    }

    fn counter(&self) -> u32 {
        self.start.wrapping_add(ticks(&*self.clock))
    }
}

/// Ticks since the clock showed zero; the counter wraps as the register does.
fn ticks(clock: &dyn Clock) -> u32 {
    (clock.monotonic().as_nanos() * u128::from(PM_TIMER_HZ) / 1_000_000_000) as u32
}

impl BusDevice for PmTimer {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let bytes = self.counter().to_le_bytes();
        let wanted = usize::try_from(offset)
            .ok()
            .and_then(|from| bytes.get(from..from.checked_add(data.len())?))
            .ok_or(AccessError::BadAccess)?;
        data.copy_from_slice(wanted);
        Ok(())
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> Result<(), AccessError> {
        // The counter is read-only.
        Ok(())
    }
}

bitflags! {
    /// What the guest's ACPI event handler (`_EVT` of the generic event device) finds in the [`Ged`] register.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct GedEvents: u8 {
        /// Processors came or are to go.
        const CPUS = 1 << 0;
        /// Memory came or is to go.
        const MEMORY = 1 << 1;
        /// PCI devices came or are to go.
        const PCI = 1 << 2;
        /// The power button was pressed.
        const POWER_BUTTON = 1 << 3;
    }
}

/// The register behind the generic event device (ACPI 6.5, 5.6.9): one byte, cleared by reading, with an interrupt for each change.
pub struct Ged {
    pending: Mutex<u8>,
    line: Arc<dyn InterruptLine>,
    log: RateLimit,
}

/// What the generic event device saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GedStateV1 {
    /// Events the guest has not seen yet, as [`GedEvents`].
    pub pending: u8,
}

impl Ged {
    /// Nothing pending; interrupts through `line`.
    pub fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self {
            pending: Mutex::new(0),
            line,
            log: RateLimit::default(),
        }
    }

    /// Takes up what was pending in `state`, and interrupts for it once more: the first interrupt may not have been saved.
    pub fn restore(state: GedStateV1, line: Arc<dyn InterruptLine>) -> Self {
        let ged = Self::new(line);
        if state.pending != 0 {
            ged.notify(GedEvents::from_bits_retain(state.pending));
        }
        ged
    }

    /// Events the guest has not seen yet.
    pub fn state(&self) -> GedStateV1 {
        GedStateV1 {
            pending: *self.pending.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Tells the guest of `events`. From any thread.
    pub fn notify(&self, events: GedEvents) {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner) |= events.bits();
        if let Err(error) = self.line.trigger()
            && self.log.admit().is_some()
        {
            tracing::warn!("cannot tell the guest of {events:?}: {error}");
        }
    }
}

impl BusDevice for Ged {
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let (0, [value]) = (offset, data) else {
            return Err(AccessError::BadAccess);
        };
        *value = std::mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        match (offset, data) {
            (0, [_]) => Ok(()),
            _ => Err(AccessError::BadAccess),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use triarch_device_core::mock::CountingLine;

    use super::*;
    use crate::clock::ManualClock;

    /// Remembers what the guest did.
    #[derive(Default)]
    pub(crate) struct Events(Mutex<Vec<PowerEvent>>);

    impl Events {
        pub(crate) fn take(&self) -> Vec<PowerEvent> {
            std::mem::take(&mut *self.0.lock().unwrap())
        }
    }

    impl PowerSink for Events {
        fn power_event(&self, event: PowerEvent) {
            self.0.lock().unwrap().push(event);
        }
    }

    #[test]
    fn only_s5_turns_off() {
        let events = Arc::new(Events::default());
        let sleep = SleepControl::new(events.clone());
        for value in 0..=255 {
            sleep.write(0, &[value]).unwrap();
            let off = value & 0x3c == 0x34;
            assert_eq!(events.take().len(), usize::from(off), "{value:#x}");
        }
        assert_eq!(SLEEP_OFF, 0x34);
        sleep.write(1, &[SLEEP_OFF]).unwrap();
        assert_eq!(sleep.write(0, &[SLEEP_OFF, 0]), Err(AccessError::BadAccess));
        assert_eq!(sleep.read(2, &mut [0]), Err(AccessError::BadAccess));
        assert_eq!(events.take(), []);
        sleep.write(0, &[SLEEP_OFF]).unwrap();
        assert_eq!(events.take(), [PowerEvent::Off]);
    }

    #[test]
    fn only_the_reset_value_resets() {
        let events = Arc::new(Events::default());
        let reset = ResetRegister::new(1, events.clone());
        reset.write(0, &[0]).unwrap();
        reset.write(0, &[3]).unwrap();
        assert_eq!(events.take(), []);
        reset.write(0, &[1]).unwrap();
        assert_eq!(events.take(), [PowerEvent::Reset]);
        assert_eq!(reset.write(1, &[1]), Err(AccessError::BadAccess));
    }

    #[test]
    fn the_reset_port_acts_on_the_rising_bit() {
        let events = Arc::new(Events::default());
        let port = ResetPort::new(events.clone());
        port.write(0, &[0x02]).unwrap();
        assert_eq!(events.take(), []);
        port.write(0, &[0x06]).unwrap();
        assert_eq!(events.take(), [PowerEvent::Reset]);
        let mut value = [0];
        port.read(0, &mut value).unwrap();
        assert_eq!(value, [0x02]);
        port.write(0, &[0x0e]).unwrap();
        assert_eq!(events.take(), [PowerEvent::Reset]);
    }

    #[test]
    fn any_closure_is_a_sink() {
        let seen = Arc::new(Mutex::new(None));
        let kept = seen.clone();
        let sink: Arc<dyn PowerSink> = Arc::new(move |event| *kept.lock().unwrap() = Some(event));
        sink.power_event(PowerEvent::Panicked);
        assert_eq!(*seen.lock().unwrap(), Some(PowerEvent::Panicked));
    }

    #[test]
    fn the_timer_counts_and_wraps() {
        const SECOND: u64 = 1_000_000_000;
        let clock = ManualClock::at(0);
        let timer = PmTimer::new(clock.clone());
        let read = |timer: &PmTimer| {
            let mut value = [0; 4];
            timer.read(0, &mut value).unwrap();
            u32::from_le_bytes(value)
        };
        assert_eq!(read(&timer), 0);
        clock.set(SECOND);
        assert_eq!(read(&timer), 3_579_545);
        clock.set(SECOND + 280);
        assert_eq!(read(&timer), 3_579_546, "one tick is 279.4 ns");
        clock.set(3600 * SECOND);
        assert_eq!(read(&timer), (3600 * PM_TIMER_HZ % (1 << 32)) as u32);
        let mut high = [0; 2];
        timer.read(2, &mut high).unwrap();
        assert_eq!(u16::from_le_bytes(high), (read(&timer) >> 16) as u16);
        assert_eq!(timer.read(1, &mut [0; 4]), Err(AccessError::BadAccess));
        assert_eq!(timer.read(u64::MAX, &mut [0; 4]), Err(AccessError::BadAccess));

        let state = timer.state();
        let later = ManualClock::at(77 * SECOND);
        let restored = PmTimer::restore(state, later.clone());
        assert_eq!(read(&restored), state.counter);
        later.set(78 * SECOND);
        assert_eq!(read(&restored), state.counter.wrapping_add(3_579_545));
    }

    #[test]
    fn ged_events_are_read_once() {
        let line = Arc::new(CountingLine::default());
        let ged = Ged::new(line.clone());
        let read = |ged: &Ged| {
            let mut value = [0xaa];
            ged.read(0, &mut value).unwrap();
            value[0]
        };
        ged.notify(GedEvents::POWER_BUTTON);
        ged.notify(GedEvents::MEMORY);
        assert_eq!(line.count(), 2);
        let state = ged.state();
        assert_eq!(read(&ged), 0x0a);
        assert_eq!(read(&ged), 0);
        let line = Arc::new(CountingLine::default());
        let restored = Ged::restore(state, line.clone());
        assert_eq!((line.count(), read(&restored)), (1, 0x0a));
        assert_eq!(ged.read(1, &mut [0]), Err(AccessError::BadAccess));
    }
}
