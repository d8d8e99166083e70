//! Where the other side is.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

/// Where a destination listens, and a source connects to.
///
/// | text | means |
/// |---|---|
/// | `unix:/path` | a unix socket; who may connect is a matter of the directory's permissions |
/// | `tcp:host:port` | TCP with mutual TLS, for which certificates must be given |
/// | `tcp-plain:host:port` | TCP that anybody on the way can read and change |
///
/// After the colon `//` may stand, as in a URL. An IPv6 address stands in brackets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// TCP.
    Tcp {
        /// A name or an address, without brackets.
        host: String,
        /// The port; 0 where one listens: any that is free.
        port: u16,
        /// Without TLS.
        plain: bool,
    },
}

/// Why a text is no [`Address`], or one that leads nowhere.
#[derive(Debug, Error)]
pub enum AddressError {
    /// Another way of transport.
    #[error("'{0}' is no address of a migration; write unix:/path, tcp:host:port (with TLS) or tcp-plain:host:port")]
    Scheme(String),
    /// No path.
    #[error("'{0}' has no path after unix:")]
    Path(String),
    /// No host or no port.
    #[error("'{0}' needs a host and a port from 0 to 65535, as in tcp:host:4444 or tcp:[::1]:4444")]
    HostPort(String),
    /// Name resolution failed.
    #[error("cannot find the address of {0}")]
    Resolve(String, #[source] std::io::Error),
    /// It knows the name, but no address of it.
    #[error("{0} has no address")]
    None(String),
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (scheme, rest) = text
            .split_once(':')
            .ok_or_else(|| AddressError::Scheme(text.to_owned()))?;
        let rest = rest.strip_prefix("//").unwrap_or(rest);
        match scheme {
            "unix" if rest.is_empty() => Err(AddressError::Path(text.to_owned())),
            "unix" => Ok(Self::Unix(rest.into())),
            "tcp" | "tcp-plain" => {
                let (host, port) = host_port(rest).ok_or_else(|| AddressError::HostPort(text.to_owned()))?;
                Ok(Self::Tcp {
                    host: host.to_owned(),
                    port,
                    plain: scheme == "tcp-plain",
                })
            }
            _ => Err(AddressError::Scheme(text.to_owned())),
        }
    }
}

fn host_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']')?,
        None if host.contains(':') => return None,
        None => host,
    };
    (!host.is_empty()).then_some((host, port.parse().ok()?))
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port, plain } => {
                let scheme = if *plain { "tcp-plain" } else { "tcp" };
                match host.contains(':') {
                    true => write!(f, "{scheme}:[{host}]:{port}"),
                    false => write!(f, "{scheme}:{host}:{port}"),
                }
            }
        }
    }
}

/// Addresses in the form that threads can use which may not resolve names.
#[derive(Debug, Clone)]
pub(crate) enum Resolved {
    Unix(PathBuf),
    Tcp(Vec<SocketAddr>),
}

impl Address {
    pub(crate) fn resolve(&self) -> Result<Resolved, AddressError> {
        match self {
            Self::Unix(path) => Ok(Resolved::Unix(path.clone())),
            Self::Tcp { host, port, .. } => {
                let found = (host.as_str(), *port).to_socket_addrs();
                let found: Vec<_> = found
                    .map_err(|source| AddressError::Resolve(host.clone(), source))?
                    .collect();
                match found.is_empty() {
                    true => Err(AddressError::None(host.clone())),
                    false => Ok(Resolved::Tcp(found)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for (text, written) in [
            ("unix:/run/a.sock", "unix:/run/a.sock"),
            ("unix:///run/a.sock", "unix:/run/a.sock"),
            ("tcp:host:4444", "tcp:host:4444"),
            ("tcp://10.0.0.1:1", "tcp:10.0.0.1:1"),
            ("tcp-plain://[::1]:65535", "tcp-plain:[::1]:65535"),
        ] {
            let address: Address = text.parse().expect(text);
            assert_eq!(address.to_string(), written);
        }
        for bad in [
            "",
            "unix",
            "unix:",
            "unix://",
            "tcp:",
            "tcp:host",
            "tcp:host:",
            "tcp::1",
            "tcp:::1:5",
            "tcp:[::1:5",
            "tcp:host:65536",
            "udp:host:1",
            "/run/a.sock",
            "tcp:host:-1",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[test]
    fn tls_is_left_out_by_name_only() {
        let plain = |text: &str| matches!(text.parse(), Ok(Address::Tcp { plain: true, .. }));
        assert!(!plain("tcp:a:1"));
        assert!(plain("tcp-plain:a:1"));
    }
}
