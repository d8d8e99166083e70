//! How ports are.

use super::forward::End;
use super::{Plane, PortKey};
use crate::switch::{Counters, PortId, Rules};

/// Who is behind a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortState {
    /// Nobody.
    Down,
    /// A guest.
    Guest {
        /// What was agreed on with its driver.
        features: u64,
        /// Queues it receives from, and sends on, that run.
        running: (usize, usize),
        /// Queues it broke.
        broken: usize,
    },
    /// An interface of the host.
    Host,
}

/// All there is to know about a port.
#[derive(Debug, Clone)]
pub struct PortInfo {
    /// Its name.
    pub name: String,
    /// The port.
    pub key: PortKey,
    /// Who is there.
    pub state: PortState,
    /// What an interface of the host is.
    pub label: Option<String>,
    /// What it may do.
    pub rules: Rules,
    /// What it counted.
    pub counters: Counters,
}

impl Plane {
    /// All ports, in the order of their numbers.
    pub fn ports(&self) -> Vec<PortInfo> {
        let ports = self.ports.iter().enumerate();
        ports
            .filter_map(|(index, port)| {
                let (id, port) = (PortId(u32::try_from(index).ok()?), port.as_ref()?);
                let (state, label) = match &port.end {
                    End::Guest(None) => (PortState::Down, None),
                    End::Guest(Some(guest)) => {
                        let state = PortState::Guest {
                            features: guest.features,
                            running: guest.running(),
                            broken: guest.broken(),
                        };
                        (state, None)
                    }
                    End::Host(host) => (PortState::Host, Some(host.end.label.clone())),
                };
                Some(PortInfo {
                    name: port.name.clone(),
                    key: PortKey {
                        id,
                        serial: port.serial,
                    },
                    state,
                    label,
                    rules: self.switch.rules(id)?.clone(),
                    counters: self.switch.counters(id)?.clone(),
                })
            })
            .collect()
    }
}
