//! Which processors of an ARM guest run: the part of PSCI (Arm DEN 0022) that starts and stops them. No KVM inside.

/// CPU_OFF.
pub const CPU_OFF: u32 = 0x8400_0002;
/// CPU_ON with arguments of 32 bits.
pub const CPU_ON_32: u32 = 0x8400_0003;
/// CPU_ON with arguments of 64 bits.
pub const CPU_ON_64: u32 = 0xc400_0003;

/// Answers to calls (DEN 0022, 5.2.2).
const SUCCESS: i64 = 0;
const NOT_SUPPORTED: i64 = -1;
const INVALID_PARAMETERS: i64 = -2;
const DENIED: i64 = -3;
const ALREADY_ON: i64 = -4;
const ON_PENDING: i64 = -5;

/// Where a processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Address of its first instruction.
    pub entry: u64,
    /// What it finds in X0.
    pub context: u64,
    /// Whether it ran before, so that its registers have to be reset first.
    pub again: bool,
}

/// How one processor stands: what is saved of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The guest may start it.
    pub enabled: bool,
    /// It ran before.
    pub ran: bool,
    /// It is known that the guest has started it since it was enabled.
    pub told: bool,
    /// It runs, or is about to.
    pub on: bool,
    /// Where it starts, with what in X0, if it was started and is not there yet.
    pub start: Option<(u64, u64)>,
}

/// What a guest's call comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The caller goes on with this in X0.
    Value(i64),
    /// The caller stops; the call does not return.
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Started, and not yet at its first instruction.
    Starting {
        entry: u64,
        context: u64,
    },
    On,
    Off,
}

#[derive(Clone, Copy, Debug)]
struct Processor {
    affinity: u64,
    enabled: bool,
    ran: bool,
    /// It is known that the guest has started it since it was enabled.
    told: bool,
    state: State,
}

/// The processors of a guest and which of them run.
#[derive(Clone, Debug)]
pub struct Processors(Vec<Processor>);

impl Processors {
    /// Processors with these affinity fields of MPIDR_EL1. The first runs, the guest may start those before `enabled`.
    pub fn new(affinities: impl IntoIterator<Item = u64>, enabled: usize) -> Self {
        let processor = |(index, affinity)| Processor {
            affinity,
            enabled: index < enabled,
            ran: index == 0,
            told: index < enabled,
            state: if index == 0 { State::On } else { State::Off },
        };
        Self(affinities.into_iter().enumerate().map(processor).collect())
    }

    /// Processors with these affinity fields that stand as they were saved.
    pub fn restored(saved: impl IntoIterator<Item = (u64, Standing)>) -> Self {
        let processor = |(affinity, saved): (u64, Standing)| Processor {
            affinity,
            enabled: saved.enabled,
            ran: saved.ran,
            told: saved.told,
            state: match saved.start {
                _ if !saved.on => State::Off,
                Some((entry, context)) => State::Starting { entry, context },
                None => State::On,
            },
        };
        Self(saved.into_iter().map(processor).collect())
    }

    /// How they stand, in their order.
    pub fn standings(&self) -> impl Iterator<Item = Standing> {
        self.0.iter().map(|processor| Standing {
            enabled: processor.enabled,
            ran: processor.ran,
            told: processor.told,
            on: processor.state != State::Off,
            start: match processor.state {
                State::Starting { entry, context } => Some((entry, context)),
                State::On | State::Off => None,
            },
        })
    }

    /// Serves the call `function` of processor `caller`, with the arguments the guest has in X1, X2 and X3.
    pub fn call(&mut self, caller: usize, function: u32, arguments: [u64; 3]) -> Answer {
        let narrow = |argument| argument & u64::from(u32::MAX);
        Answer::Value(match function {
            CPU_ON_64 => self.start(arguments),
            CPU_ON_32 => self.start(arguments.map(narrow)),
            CPU_OFF => match self.0.get_mut(caller) {
                Some(processor) => {
                    processor.state = State::Off;
                    return Answer::Stopped;
                }
                None => DENIED,
            },
            _ => NOT_SUPPORTED,
        })
    }

    fn start(&mut self, [affinity, entry, context]: [u64; 3]) -> i64 {
        let Some(processor) = self.0.iter_mut().find(|p| p.affinity == affinity) else {
            return INVALID_PARAMETERS;
        };
        match processor.state {
            _ if !processor.enabled => DENIED,
            State::On => ALREADY_ON,
            State::Starting { .. } => ON_PENDING,
            State::Off => {
                processor.state = State::Starting { entry, context };
                SUCCESS
            }
        }
    }

    /// Whether processor `index` has been started and not stopped since.
    pub fn runs(&self, index: usize) -> bool {
        self.0.get(index).is_some_and(|p| p.state != State::Off)
    }

    /// Lets the guest start processor `index`.
    pub fn enable(&mut self, index: usize) {
        if let Some(processor) = self.0.get_mut(index).filter(|processor| !processor.enabled) {
            processor.enabled = true;
            processor.told = false;
        }
    }

    /// Whether the guest may start processor `index`.
    pub fn is_enabled(&self, index: usize) -> bool {
        self.0.get(index).is_some_and(|processor| processor.enabled)
    }

    /// Takes processor `index` from the guest. It stops if it runs.
    pub fn disable(&mut self, index: usize) {
        if let Some(processor) = self.0.get_mut(index) {
            processor.enabled = false;
            processor.state = State::Off;
        }
    }

    /// Whether the guest has started processor `index` since that was enabled while it ran; told once.
    pub fn take_first_start(&mut self, index: usize) -> bool {
        let Some(processor) = self.0.get_mut(index) else {
            return false;
        };
        let first = !processor.told && processor.enabled && processor.state != State::Off;
        processor.told |= first;
        first
    }

    /// Where processor `index` starts, if it was started since this was asked last.
    pub fn take_start(&mut self, index: usize) -> Option<Start> {
        let processor = self.0.get_mut(index)?;
        let State::Starting { entry, context } = processor.state else {
            return None;
        };
        let again = processor.ran;
        (processor.ran, processor.state) = (true, State::On);
        Some(Start { entry, context, again })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(processors: &mut Processors, affinity: u64) -> Answer {
        processors.call(0, CPU_ON_64, [affinity, 0x4040_0000, 7])
    }

    #[test]
    fn a_processor_is_started_once_and_where_the_guest_said() {
        let mut cpus = Processors::new([0, 1, 0x100], 3);
        assert_eq!([0, 1, 2, 3].map(|n| cpus.runs(n)), [true, false, false, false]);
        assert_eq!(on(&mut cpus, 0x100), Answer::Value(SUCCESS));
        assert!(cpus.runs(2) && !cpus.runs(1));
        assert_eq!(on(&mut cpus, 0x100), Answer::Value(ON_PENDING));
        let start = Start {
            entry: 0x4040_0000,
            context: 7,
            again: false,
        };
        assert_eq!(cpus.take_start(2), Some(start));
        assert_eq!(cpus.take_start(2), None);
        assert_eq!(on(&mut cpus, 0x100), Answer::Value(ALREADY_ON));
        assert_eq!(on(&mut cpus, 0), Answer::Value(ALREADY_ON));
        assert_eq!(cpus.take_start(0), None);
    }

    #[test]
    fn one_that_is_not_enabled_is_denied() {
        let mut cpus = Processors::new(0..4, 2);
        assert_eq!(on(&mut cpus, 2), Answer::Value(DENIED));
        assert_eq!(cpus.call(0, CPU_ON_32, [3, 0, 0]), Answer::Value(DENIED));
        assert!(!cpus.runs(2));
        assert_eq!(on(&mut cpus, 1), Answer::Value(SUCCESS));
        for stranger in [4, 1 << 31, u64::MAX] {
            assert_eq!(on(&mut cpus, stranger), Answer::Value(INVALID_PARAMETERS));
        }
    }

    #[test]
    fn one_that_stopped_is_reset_when_it_starts_again() {
        let mut cpus = Processors::new(0..2, 2);
        on(&mut cpus, 1);
        cpus.take_start(1);
        assert_eq!(cpus.call(1, CPU_OFF, [0; 3]), Answer::Stopped);
        assert!(!cpus.runs(1));
        assert_eq!(on(&mut cpus, 1), Answer::Value(SUCCESS));
        assert!(cpus.take_start(1).is_some_and(|start| start.again));
        assert_eq!(cpus.call(9, CPU_OFF, [0; 3]), Answer::Value(DENIED));
        assert_eq!(cpus.call(0, 0x8400_0009, [0; 3]), Answer::Value(NOT_SUPPORTED));
    }

    #[test]
    fn one_that_is_added_can_be_started_until_it_is_taken() {
        let mut cpus = Processors::new(0..3, 1);
        cpus.enable(2);
        assert!(!cpus.take_first_start(2), "not yet");
        assert_eq!(on(&mut cpus, 2), Answer::Value(SUCCESS));
        assert_eq!([cpus.take_first_start(2), cpus.take_first_start(2)], [true, false]);
        cpus.take_start(2);
        cpus.enable(2);
        assert!(!cpus.take_first_start(2), "it had it already");
        cpus.disable(2);
        assert!(!cpus.is_enabled(2) && cpus.is_enabled(0) && !cpus.is_enabled(9));
        assert!(!cpus.runs(2), "whether the guest stopped it or not");
        assert_eq!(on(&mut cpus, 2), Answer::Value(DENIED));
        cpus.enable(2);
        on(&mut cpus, 2);
        assert!(cpus.take_first_start(2) && cpus.take_start(2).is_some_and(|start| start.again));
        assert_eq!(on(&mut cpus, 1), Answer::Value(DENIED));
        assert!(!cpus.take_first_start(0), "it was there from the start");
        cpus.enable(9);
        cpus.disable(9);
    }

    #[test]
    fn how_they_stand_is_saved_and_restored() {
        let mut cpus = Processors::new(0..4, 3);
        on(&mut cpus, 1);
        on(&mut cpus, 2);
        cpus.take_start(2);
        let saved: Vec<_> = cpus.standings().collect();
        let mut again = Processors::restored((0..4).zip(saved.clone()));
        assert_eq!(again.standings().collect::<Vec<_>>(), saved);
        assert_eq!(again.take_start(1), cpus.take_start(1));
        assert_eq!(on(&mut again, 2), Answer::Value(ALREADY_ON));
        assert_eq!(on(&mut again, 3), Answer::Value(DENIED));
        again.call(2, CPU_OFF, [0; 3]);
        on(&mut again, 2);
        assert!(again.take_start(2).is_some_and(|start| start.again));
    }

    #[test]
    fn a_call_of_32_bits_has_arguments_of_32_bits() {
        let mut cpus = Processors::new(0..2, 2);
        let high = |n: u64| 0xabcd << 32 | n;
        assert_eq!(
            cpus.call(0, CPU_ON_32, [high(1), high(0x4000), high(5)]),
            Answer::Value(SUCCESS)
        );
        let start = cpus.take_start(1).unwrap();
        assert_eq!((start.entry, start.context), (0x4000, 5));
    }
}
