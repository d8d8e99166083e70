//! Saved state by what it is of.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::PayloadError;
use crate::error::name;

/// What a saved state is of, and how it is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    name: &'static str,
    version: u32,
}

impl Kind {
    /// The kind `name`, laid out in its version `version`.
    pub const fn new(name: &'static str, version: u32) -> Self {
        Self { name, version }
    }
}

/// A saved state in `state.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Payload {
    pub(crate) kind: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) id: String,
    pub(crate) version: u32,
    pub(crate) state: Value,
}

/// The saved states of a guest.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Payloads(BTreeMap<(String, String), (u32, Value)>);

impl Payloads {
    /// Puts `state` among them, of the one that is called `id`; it is empty where there is one of a kind.
    ///
    /// # Errors
    /// There is one already, or `state` is nothing that JSON can tell.
    pub fn put(&mut self, kind: Kind, id: &str, state: &impl Serialize) -> Result<(), PayloadError> {
        let state = serde_json::to_value(state).map_err(|source| PayloadError::Shape {
            kind: kind.name.to_owned(),
            id: id.to_owned(),
            source,
        })?;
        self.insert(Payload {
            kind: kind.name.to_owned(),
            id: id.to_owned(),
            version: kind.version,
            state,
        })
    }

    /// Takes the state of `kind` and `id` from among them.
    pub fn take<T: DeserializeOwned>(&mut self, kind: Kind, id: &str) -> Result<T, PayloadError> {
        let own = || (kind.name.to_owned(), id.to_owned());
        let Some((version, state)) = self.0.remove(&own()) else {
            let (kind, id) = own();
            return Err(PayloadError::Missing { kind, id });
        };
        if version != kind.version {
            let known = kind.version;
            let (kind, id) = own();
            return Err(PayloadError::Version {
                kind,
                id,
                found: version,
                known,
            });
        }
        serde_json::from_value(state).map_err(|source| {
            let (kind, id) = own();
            PayloadError::Shape { kind, id, source }
        })
    }

    /// The same of what a guest may have or not; `None`: it was not there when the guest was saved.
    pub fn take_if_there<T: DeserializeOwned>(&mut self, kind: Kind, id: &str) -> Result<Option<T>, PayloadError> {
        match self.has(kind, id) {
            true => self.take(kind, id).map(Some),
            false => Ok(None),
        }
    }

    /// Whether there is a state of `kind` and `id`.
    pub fn has(&self, kind: Kind, id: &str) -> bool {
        self.0.contains_key(&(kind.name.to_owned(), id.to_owned()))
    }

    /// Makes sure that all were taken.
    pub fn finish(self) -> Result<(), PayloadError> {
        let left: Vec<_> = self.0.keys().map(|(kind, id)| name(kind, id)).collect();
        match left.is_empty() {
            true => Ok(()),
            false => Err(PayloadError::Unread(left.join(", "))),
        }
    }

    pub(crate) fn insert(&mut self, payload: Payload) -> Result<(), PayloadError> {
        let Payload {
            kind,
            id,
            version,
            state,
        } = payload;
        let key = (kind, id);
        if self.0.contains_key(&key) {
            let (kind, id) = key;
            return Err(PayloadError::Twice { kind, id });
        }
        self.0.insert(key, (version, state));
        Ok(())
    }

    pub(crate) fn into_list(self) -> Vec<Payload> {
        let payload = |((kind, id), (version, state))| Payload {
            kind,
            id,
            version,
            state,
        };
        self.0.into_iter().map(payload).collect()
    }
}
