//! Keeps what a guest can cause from drowning everything else.

use std::time::{Duration, Instant};

use super::{Kind, Value};

/// How long the events of a subject are counted.
const WINDOW: Duration = Duration::from_secs(10);
/// How many of them are let through meanwhile.
const BURST: u32 = 32;
/// Subjects that are told apart; further ones share the last place.
const SUBJECTS: usize = 64;

/// A property of an event that is held back.
#[derive(Debug)]
pub(super) enum Owned {
    Text(Box<str>),
    Number(u64),
}

impl Owned {
    pub(super) fn as_value(&self) -> Value<'_> {
        match self {
            Self::Text(text) => Value::Text(text),
            Self::Number(number) => Value::Number(*number),
        }
    }
}

/// An event that is held back.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) kind: &'static Kind,
    pub(super) properties: Vec<(&'static str, Owned)>,
    /// Events of the same subject before it that nobody will see.
    pub(super) left_out: u64,
}

#[derive(Debug)]
struct Subject {
    name: Box<str>,
    window: Instant,
    used: u32,
    held: Option<Held>,
}

impl Subject {
    fn end(&self) -> Instant {
        self.window + WINDOW
    }
}

/// One limit a subject.
#[derive(Debug, Default)]
pub(super) struct Limits(Vec<Subject>);

impl Limits {
    /// Whether an event goes through; if not, it is held back in the place of the one that was. Call [`release`](Self::release) first.
    pub(super) fn admit(
        &mut self,
        now: Instant,
        subject: &str,
        kind: &'static Kind,
        properties: &[(&'static str, Value<'_>)],
    ) -> bool {
        let known = self.0.iter().position(|known| *known.name == *subject);
        let at = known.unwrap_or_else(|| self.insert(now, subject));
        let Some(subject) = self.0.get_mut(at) else {
            return false;
        };
        if subject.end() <= now {
            subject.window = now;
            subject.used = 0;
        }
        if subject.used < BURST {
            subject.used += 1;
            return true;
        }
        let left_out = subject.held.take().map_or(0, |held| held.left_out + 1);
        let own = |value: &Value<'_>| match value {
            Value::Text(text) => Owned::Text((*text).into()),
            Value::Number(number) => Owned::Number(*number),
        };
        let properties = properties.iter().map(|(name, value)| (*name, own(value))).collect();
        subject.held = Some(Held {
            kind,
            properties,
            left_out,
        });
        false
    }

    /// An event that need not be held back any longer.
    pub(super) fn release(&mut self, now: Instant) -> Option<Held> {
        let over = |subject: &&mut Subject| subject.held.is_some() && subject.end() <= now;
        let subject = self.0.iter_mut().find(over)?;
        subject.window = now;
        subject.used = 1;
        subject.held.take()
    }

    /// An event that is held back, whether its time is over or not; its subject stays limited.
    pub(super) fn give_up(&mut self) -> Option<Held> {
        self.0.iter_mut().find_map(|subject| subject.held.take())
    }

    /// When the next one need not be held back any longer.
    pub(super) fn due(&self) -> Option<Instant> {
        let held = self.0.iter().filter(|subject| subject.held.is_some());
        held.map(Subject::end).min()
    }

    fn insert(&mut self, now: Instant, name: &str) -> usize {
        if self.0.len() < SUBJECTS {
            self.0.push(Subject {
                name: name.into(),
                window: now,
                used: 0,
                held: None,
            });
        }
        self.0.len() - 1
    }
}

#[cfg(test)]
mod tests {
    use super::super::kind::{DEVICE_ACTIVATED, DEVICE_RESET};
    use super::*;

    #[test]
    fn a_burst_goes_through_and_of_the_rest_the_last_with_a_count() {
        let (mut limits, start) = (Limits::default(), Instant::now());
        let id = [("id", Value::Text("_disk0"))];
        for _ in 0..BURST {
            assert!(limits.admit(start, "_disk0", &DEVICE_RESET, &id));
        }
        for _ in 0..5 {
            assert!(!limits.admit(start, "_disk0", &DEVICE_RESET, &id));
        }
        assert!(!limits.admit(start, "_disk0", &DEVICE_ACTIVATED, &id));
        // Others are not touched by it.
        assert!(limits.admit(start, "_net1", &DEVICE_RESET, &[("id", Value::Text("_net1"))]));
        let end = limits.due().expect("one is held");
        assert_eq!(end, start + WINDOW);
        assert!(limits.release(end - Duration::from_nanos(1)).is_none());
        let held = limits.release(end).expect("released");
        assert_eq!((held.kind, held.left_out), (&DEVICE_ACTIVATED, 5));
        assert!(limits.release(end).is_none());
        assert_eq!(limits.due(), None);
        for _ in 1..BURST {
            assert!(limits.admit(end, "_disk0", &DEVICE_RESET, &id));
        }
        assert!(!limits.admit(end, "_disk0", &DEVICE_RESET, &id));
    }

    #[test]
    fn a_subject_that_is_given_up_early_stays_limited() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        let refused = |limits: &mut Limits| !limits.admit(now, "_disk0", &DEVICE_RESET, &[]);
        while !refused(&mut limits) {}
        assert!(limits.give_up().is_some() && limits.give_up().is_none());
        assert!(refused(&mut limits));
    }

    #[test]
    fn subjects_without_number_share_a_place() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        for n in 0..1000 {
            limits.admit(now, &n.to_string(), &DEVICE_RESET, &[]);
        }
        assert_eq!(limits.0.len(), SUBJECTS);
        assert!(limits.0.last().expect("the last").held.is_some());
    }
}
