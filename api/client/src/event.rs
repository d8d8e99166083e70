//! What happens, as it happens.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use triarch_api::jobs::Timestamp;

use crate::Error;
use crate::client::decode;
use crate::connection::{Connection, Deadline};

/// An event, as `vm.events` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its number, which rises by one; VMMs of others do not count.
    #[serde(default)]
    pub id: Option<u64>,
    /// When it was: time since the VMM's start.
    pub timestamp: Timestamp,
    /// Whose event it is, such as `vm`.
    pub source: String,
    /// What happened, such as `booted`.
    pub event: String,
    /// More about it.
    #[serde(default)]
    pub properties: Option<Map<String, Value>>,
}

impl Event {
    /// Understands one object of the stream.
    ///
    /// # Errors
    /// [`Error::Body`].
    pub fn parse(text: &str) -> Result<Self, Error> {
        decode("vm.events", text)
    }
}

/// An answer without an end: one line after the other.
#[derive(Debug)]
pub struct Follow {
    connection: Connection,
    target: String,
}

impl Follow {
    pub(crate) fn new(connection: Connection, target: &str) -> Self {
        let target = target.to_owned();
        Self { connection, target }
    }

    /// The next line; waits at most `limit` for it, zero: for ever. `None`: the VMM has ended the answer.
    ///
    /// # Errors
    /// None in time, after which it can be asked for again; or the connection broke.
    pub fn line(&mut self, limit: Duration) -> Result<Option<String>, Error> {
        let line = self.connection.line(Deadline::after(limit));
        let line = line.map_err(|broken| broken.asking(&self.target, limit))?;
        let text = line.map(String::from_utf8).transpose();
        text.map_err(|_| Error::Malformed {
            target: self.target.clone(),
            why: "a line is not UTF-8".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_understood_with_and_without_our_additions() {
        let ours = r#"{"id":7,"timestamp":{"secs":1,"nanos":5},"source":"vm","event":"booted","properties":null}"#;
        let event = Event::parse(ours).expect("an event");
        assert_eq!(
            (event.id, event.timestamp.secs, event.event.as_str()),
            (Some(7), 1, "booted")
        );
        assert_eq!(event.properties, None);
        let theirs =
            r#"{"timestamp":{"secs":0,"nanos":0},"source":"virtio-device","event":"reset","properties":{"id":"d"}}"#;
        let event = Event::parse(theirs).expect("an event");
        assert_eq!(event.id, None);
        assert_eq!(event.properties.expect("properties")["id"], "d");
        assert!(matches!(Event::parse("{}"), Err(Error::Body { .. })));
    }
}
