//! All ports of the process: made, changed, removed and described.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use thiserror::Error;
use triarch_api::server::ListenError;
use triarch_device_core::Sandbox;
use triarch_net::TapError;

use crate::card::{CardError, card};
use crate::device::{DeviceOptions, PortDevice};
use crate::host::{self, Keep};
use crate::options::{Mode, PortOptions, Settings};
use crate::plane::{HostEnd, PlaneGone, PlaneHandle, PortError, PortInfo, PortKey};
use crate::server::{Door, PortServer};
use crate::switch::Rules;

/// Why a port could not be made or changed.
#[derive(Debug, Error)]
pub enum RegistryError {
    /// Its description is wrong.
    #[error("{0}")]
    Options(String),
    /// There is no such port.
    #[error("there is no port {0}")]
    Missing(String),
    /// The switch refuses.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The switch has ended.
    #[error(transparent)]
    Gone(#[from] PlaneGone),
    /// Its socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Its tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// Its interface.
    #[error(transparent)]
    Card(#[from] CardError),
    /// Its thread, or the address it connects to.
    #[error("cannot serve port {name}")]
    Serve {
        /// The port.
        name: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

impl RegistryError {
    /// Whether whoever asked for it is to blame.
    pub fn is_request(&self) -> bool {
        matches!(
            self,
            Self::Options(_)
                | Self::Missing(_)
                | Self::Port(PortError::NameTaken(_) | PortError::MacTaken(_) | PortError::NoPort)
        )
    }
}

/// What a port leads to.
enum End {
    Guest(Door),
    Host(HostEnd, Option<Keep>),
}

/// A port whose socket or tap is open; what is left needs no privileges.
pub struct Opened {
    options: PortOptions,
    rules: Rules,
    end: End,
}

impl Opened {
    /// Opens what `options` describe. `fds` are open queues of a tap, or a packet socket of an interface, to be used instead of opening it.
    pub fn open(options: PortOptions, fds: Vec<OwnedFd>) -> Result<Self, RegistryError> {
        options.check().map_err(RegistryError::Options)?;
        let rules = options.settings.rules().map_err(RegistryError::Options)?;
        let end = match &options.socket {
            Some(_) if !fds.is_empty() => {
                return Err(RegistryError::Options(
                    "descriptors are for taps and interfaces only".to_owned(),
                ));
            }
            Some(socket) if options.mode == Mode::Client => {
                let failed = |source| RegistryError::Serve {
                    name: options.name.clone(),
                    source,
                };
                End::Guest(Door::client(Path::new(socket)).map_err(failed)?)
            }
            Some(socket) => End::Guest(Door::Server(triarch_daemon::listen(socket)?)),
            None if options.interface.is_some() => {
                let name = options.interface.as_deref().unwrap_or_default();
                End::Host(card(name, fds)?, None)
            }
            None => {
                // `check` has seen to it that there is one.
                let tap = options.tap.as_deref().unwrap_or_default();
                let (end, keep) = host::tap(tap, options.num_queues.unwrap_or(1), rules.mtu, fds)?;
                End::Host(end, Some(keep))
            }
        };
        Ok(Self { options, rules, end })
    }

    /// What it will be called.
    pub fn name(&self) -> &str {
        &self.options.name
    }
}

struct Entry {
    key: PortKey,
    options: PortOptions,
    server: Option<PortServer>,
    _keep: Option<Keep>,
}

/// A port as it is described to others.
pub struct Described {
    /// What the switch knows.
    pub info: PortInfo,
    /// As it was described, changes included.
    pub options: PortOptions,
    /// Connections that were made, and that ended badly.
    pub connections: (u64, u64),
}

/// The ports.
pub struct Registry {
    plane: PlaneHandle,
    sandbox: Arc<dyn Sandbox>,
    ports: BTreeMap<String, Entry>,
}

impl Registry {
    /// None yet.
    pub fn new(plane: PlaneHandle, sandbox: Arc<dyn Sandbox>) -> Self {
        Self {
            plane,
            sandbox,
            ports: BTreeMap::new(),
        }
    }

    /// The switch.
    pub fn plane(&self) -> &PlaneHandle {
        &self.plane
    }

    /// Adds a port.
    pub fn add(&mut self, port: Opened) -> Result<(), RegistryError> {
        let Opened { options, rules, end } = port;
        let name = options.name.clone();
        let title = name.clone();
        match end {
            End::Host(end, keep) => {
                let key = self
                    .plane
                    .call(move |plane| plane.add_host_port(&title, rules, end))??;
                self.note(options, key, None, keep);
            }
            End::Guest(door) => {
                let device = DeviceOptions {
                    pairs: options.pairs(),
                    mac: rules.mac,
                    mtu: rules.mtu,
                };
                let pairs = usize::from(device.pairs);
                let key = self
                    .plane
                    .call(move |plane| plane.add_guest_port(&title, rules, pairs))??;
                let port = PortDevice::new(self.plane.clone(), key, &device);
                match PortServer::start(&name, door, port, &self.sandbox) {
                    Ok(server) => self.note(options, key, Some(server), None),
                    Err(source) => {
                        self.plane.call(move |plane| plane.remove(key))?;
                        return Err(RegistryError::Serve { name, source });
                    }
                }
            }
        }
        Ok(())
    }

    fn note(&mut self, options: PortOptions, key: PortKey, server: Option<PortServer>, keep: Option<Keep>) {
        tracing::info!(port = options.name, "the port is there");
        let entry = Entry {
            key,
            options,
            server,
            _keep: keep,
        };
        self.ports.insert(entry.options.name.clone(), entry);
    }

    /// Removes a port.
    pub fn remove(&mut self, name: &str) -> Result<(), RegistryError> {
        let entry = self
            .ports
            .remove(name)
            .ok_or_else(|| RegistryError::Missing(name.to_owned()))?;
        // Its front end goes first: the port has its queues.
        drop(entry.server);
        let key = entry.key;
        self.plane.call(move |plane| plane.remove(key))?;
        tracing::info!(port = name, "the port is gone");
        Ok(())
    }

    /// Changes what can be changed of a port.
    pub fn set(&mut self, name: &str, change: Settings) -> Result<(), RegistryError> {
        let entry = self
            .ports
            .get_mut(name)
            .ok_or_else(|| RegistryError::Missing(name.to_owned()))?;
        let settings = entry.options.settings.clone().with(change);
        let rules = settings.rules().map_err(RegistryError::Options)?;
        let key = entry.key;
        self.plane.call(move |plane| plane.set_rules(key, rules))??;
        entry.options.settings = settings;
        Ok(())
    }

    /// Whether there is a port of this name.
    pub fn has(&self, name: &str) -> bool {
        self.ports.contains_key(name)
    }

    /// All ports.
    pub fn describe(&self) -> Result<Vec<Described>, PlaneGone> {
        let all = self.plane.call(|plane| plane.ports())?;
        let described = all.into_iter().filter_map(|info| {
            let entry = self.ports.get(&info.name)?;
            let counters = entry.server.as_ref().map(PortServer::counters);
            let connections = counters.map_or((0, 0), |c| (c.connections.load(Relaxed), c.broken.load(Relaxed)));
            Some(Described {
                info,
                options: entry.options.clone(),
                connections,
            })
        });
        Ok(described.collect())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Front ends first: they give their queues back.
        for entry in self.ports.values_mut() {
            entry.server = None;
        }
        self.plane.end();
    }
}
