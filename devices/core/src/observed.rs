//! Somebody who is told that something changed, and looks at it when he has the time.

use std::sync::atomic::{AtomicBool, Ordering};

/// Something that changes, with an observer who is told once and not again before he looked: however often it changes, he has one thing
/// to do.
pub struct Observed {
    observer: Box<dyn Fn() + Send + Sync>,
    /// He knows, and has not looked yet.
    told: AtomicBool,
}

impl Observed {
    /// `observer` is called on the thread that changes something; it must return at once.
    pub fn new(observer: Box<dyn Fn() + Send + Sync>) -> Self {
        Self {
            observer,
            told: AtomicBool::new(false),
        }
    }

    /// It changed.
    pub fn changed(&self) {
        if !self.told.swap(true, Ordering::SeqCst) {
            (self.observer)();
        }
    }

    /// The observer looks now: he is told of what changes from here on.
    pub fn looked(&self) {
        self.told.store(false, Ordering::SeqCst);
    }
}
