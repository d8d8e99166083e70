//! Mutual TLS 1.3.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use thiserror::Error;

use crate::stream::{Channel, Socket};

/// Files with which the two sides know each other; PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Our certificate, and those between it and the authority's.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Certificates of authorities, one of which must have signed the other side's.
    pub ca: PathBuf,
    /// The name that the other side's certificate must have, a DNS name or an IP address. A source that gives none expects the host
    /// of the address; a destination that gives none takes whoever has a certificate of the authority.
    pub peer: Option<String>,
}

/// Why there is no TLS.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file.
    #[error("cannot read {what} from {}", .path.display())]
    File {
        /// What it should hold.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// Nothing is in it.
    #[error("{} holds no certificate", .0.display())]
    Empty(PathBuf),
    /// Something in the files does not fit.
    #[error("the certificates cannot be used")]
    Unusable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No name.
    #[error("'{0}' is no name of a host, which a certificate could have")]
    Name(String),
    /// It is not clear whom to expect.
    #[error("TLS over a unix socket needs the name that the destination's certificate has")]
    NoName,
    /// The other side has the wrong name.
    #[error("the certificate of the other side is not that of '{0}'")]
    Peer(String),
}

/// Bytes that are encrypted before any of them is sent, at most: many records for one system call.
const AT_ONCE: usize = 512 << 10;

/// What one side needs to begin TLS.
pub(crate) enum Tls {
    Client(Arc<ClientConfig>, ServerName<'static>),
    Server(Arc<ServerConfig>, Option<(String, ServerName<'static>)>),
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>, Arc<RootCertStore>);

fn unusable(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> TlsError {
    TlsError::Unusable(error.into())
}

fn certificates(path: &PathBuf, what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source| TlsError::File {
        what,
        path: path.clone(),
        source,
    };
    let found = CertificateDer::pem_file_iter(path).map_err(failed)?;
    let found: Vec<_> = found.collect::<Result<_, _>>().map_err(failed)?;
    match found.is_empty() {
        true => Err(TlsError::Empty(path.clone())),
        false => Ok(found),
    }
}

fn identity(files: &TlsFiles) -> Result<Identity, TlsError> {
    let chain = certificates(&files.cert, "a certificate")?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|source| TlsError::File {
        what: "a private key",
        path: files.key.clone(),
        source,
    })?;
    let mut roots = RootCertStore::empty();
    for root in certificates(&files.ca, "the authority's certificate")? {
        roots.add(root).map_err(unusable)?;
    }
    Ok((chain, key, Arc::new(roots)))
}

fn name(text: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(text.to_owned()).map_err(|_| TlsError::Name(text.to_owned()))
}

impl Tls {
    /// Of a source that connects to `host`.
    pub(crate) fn client(files: &TlsFiles, host: Option<&str>) -> Result<Self, TlsError> {
        let expected = name(files.peer.as_deref().or(host).ok_or(TlsError::NoName)?)?;
        let (chain, key, roots) = identity(files)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(unusable)?;
        Ok(Self::Client(Arc::new(config), expected))
    }

    /// Of a destination.
    pub(crate) fn server(files: &TlsFiles) -> Result<Self, TlsError> {
        let expected = files.peer.as_deref().map(|text| Ok((text.to_owned(), name(text)?)));
        let expected = expected.transpose()?;
        let (chain, key, roots) = identity(files)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(clients.build().map_err(unusable)?)
            .with_single_cert(chain, key)
            .map_err(unusable)?;
        // Nobody resumes: every connection proves who it is.
        config.send_tls13_tickets = 0;
        Ok(Self::Server(Arc::new(config), expected))
    }

    /// Begins on a fresh connection, whose deadline was set; ends when both sides know each other.
    pub(crate) fn begin(&self, mut socket: Socket) -> Result<Channel, Begin> {
        let unusable = |error| Begin::Tls(unusable(error));
        socket.read_ahead();
        match self {
            Self::Client(config, expected) => {
                let mut tls = ClientConnection::new(config.clone(), expected.clone()).map_err(unusable)?;
                tls.set_buffer_limit(Some(AT_ONCE));
                while tls.is_handshaking() {
                    tls.complete_io(&mut socket).map_err(Begin::Io)?;
                }
                Ok(Channel::Client(Box::new(StreamOwned::new(tls, socket))))
            }
            Self::Server(config, expected) => {
                let mut tls = ServerConnection::new(config.clone()).map_err(unusable)?;
                tls.set_buffer_limit(Some(AT_ONCE));
                while tls.is_handshaking() {
                    tls.complete_io(&mut socket).map_err(Begin::Io)?;
                }
                if let Some((text, expected)) = expected {
                    let peer = tls.peer_certificates().and_then(|chain| chain.first());
                    let fits =
                        |cert| ParsedCertificate::try_from(cert).and_then(|cert| verify_server_name(&cert, expected));
                    if peer.is_none_or(|cert| fits(cert).is_err()) {
                        return Err(Begin::Tls(TlsError::Peer(text.clone())));
                    }
                }
                Ok(Channel::Server(Box::new(StreamOwned::new(tls, socket))))
            }
        }
    }
}

/// Why TLS did not begin.
pub(crate) enum Begin {
    Tls(TlsError),
    Io(std::io::Error),
}
