use std::path::Path;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

use super::mock::{Fails, MockGuest, MockMemory, destination_options, migrate, regions, source_options};
use crate::{
    ConnectError, Destination, DestinationError, DestinationOptions, Handle, SourceError, SourceOptions, TlsFiles,
    Whereabouts,
};

/// An authority, and the files of those it knows.
struct Authority {
    dir: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("an authority");
        std::fs::write(dir.path().join("ca.pem"), issuer.pem()).expect("written");
        Self { dir, issuer }
    }

    fn files(&self, name: &str, peer: Option<&str>) -> TlsFiles {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        let cert = params.signed_by(&key, &self.issuer).expect("a certificate");
        let put = |file: &str, text: String| {
            let path = self.dir.path().join(format!("{name}.{file}"));
            std::fs::write(&path, text).expect("written");
            path
        };
        TlsFiles {
            cert: put("cert", cert.pem()),
            key: put("key", key.serialize_pem()),
            ca: self.dir.path().join("ca.pem"),
            peer: peer.map(str::to_owned),
        }
    }
}

const ADDRESS: &str = "tcp:127.0.0.1:0";

fn listen(files: TlsFiles) -> Destination {
    let options = DestinationOptions {
        tls: Some(files),
        ..destination_options(&ADDRESS.parse().expect("an address"))
    };
    Destination::bind(options).expect("listens")
}

#[test]
fn a_guest_moves_over_tls() {
    let authority = Authority::new();
    // The source expects the host of the address, and the other way round a name.
    let destination = listen(authority.files("127.0.0.1", Some("source.example")));
    let memory = MockMemory::new(&regions());
    memory.fill(300);
    let mut guest = MockGuest::new(&Arc::default(), Fails::Nothing);
    let options = SourceOptions {
        tls: Some(authority.files("source.example", None)),
        streams: 4,
        ..source_options(destination.address())
    };
    let end = migrate(
        destination,
        Fails::Nothing,
        options,
        &memory,
        &mut guest,
        &Handle::new(None),
    );
    assert!(end.source.is_ok(), "{:?}", end.source);
    assert_eq!(end.world.running(), (false, true));
    assert!(memory.equals(end.memory.as_ref().expect("memory")));
}

/// Whoever is not whom the other side expects gets nothing; the destination goes on waiting.
fn refused(destination: TlsFiles, source: TlsFiles) -> String {
    let destination = listen(destination);
    let memory = MockMemory::new(&regions());
    let mut guest = MockGuest::new(&Arc::default(), Fails::Nothing);
    let options = SourceOptions {
        tls: Some(source),
        ..source_options(destination.address())
    };
    let waits = Handle::new(None);
    let (handle, world) = (waits.clone(), guest.world.clone());
    let takes = std::thread::spawn(move || {
        let sandbox: Arc<dyn triarch_device_core::Sandbox> = Arc::new(triarch_device_core::NoSandbox);
        let mut sink = super::mock::MockSink::new(&world, Fails::Nothing);
        destination
            .run(&mut sink, &handle, &sandbox)
            .map(|_| sink.memory.is_some())
    });
    let (sandbox, handle): (Arc<dyn triarch_device_core::Sandbox>, _) =
        (Arc::new(triarch_device_core::NoSandbox), Handle::new(None));
    let source = crate::Source::new(options, memory, &handle, &sandbox).expect("a source");
    let error = source.run(&mut guest, b"config", b"cpu").expect_err("refused");
    assert_eq!(error.guest, Whereabouts::RunsHere);
    assert!(waits.cancel());
    let taken = takes.join().expect("no panic");
    assert!(matches!(taken, Err(DestinationError::Cancelled)), "{taken:?}");
    crate::sentence(&error)
}

#[test]
fn nobody_is_served_with_the_wrong_name_or_authority() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    // The destination is another host of ours.
    let why = refused(
        ours.files("elsewhere.example", None),
        ours.files("source.example", None),
    );
    assert!(why.contains("not valid for name"), "{why}");
    // The source is another host of ours.
    refused(
        ours.files("127.0.0.1", Some("source.example")),
        ours.files("other.example", None),
    );
    // The source is nobody's, or somebody else's.
    let source = TlsFiles {
        ca: ours.files("127.0.0.1", None).ca,
        ..theirs.files("source.example", None)
    };
    refused(ours.files("127.0.0.1", None), source);
    // The destination is somebody else's.
    let why = refused(theirs.files("127.0.0.1", None), ours.files("source.example", None));
    assert!(why.contains("UnknownIssuer") || why.contains("certificate"), "{why}");
}

#[test]
fn tls_is_neither_forgotten_nor_ignored() {
    let sandbox: Arc<dyn triarch_device_core::Sandbox> = Arc::new(triarch_device_core::NoSandbox);
    let handle = Handle::new(None);
    let source = |address: &str, tls: Option<TlsFiles>| {
        let options = SourceOptions {
            tls,
            ..source_options(&address.parse().expect("an address"))
        };
        let made = crate::Source::new(options, MockMemory::new(&regions()), &handle, &sandbox);
        made.map(|_| ()).expect_err("refused")
    };
    let files = Authority::new().files("a", None);
    let forgotten = source("tcp:127.0.0.1:1", None);
    assert!(
        matches!(forgotten, SourceError::Connect(ConnectError::Plain(_))),
        "{forgotten:?}"
    );
    let ignored = source("tcp-plain:127.0.0.1:1", Some(files));
    assert!(
        matches!(ignored, SourceError::Connect(ConnectError::NotPlain(_))),
        "{ignored:?}"
    );
    let forgotten = Destination::bind(destination_options(&ADDRESS.parse().expect("an address"))).map(|_| ());
    assert!(
        matches!(forgotten, Err(DestinationError::Connect(ConnectError::Plain(_)))),
        "{forgotten:?}"
    );
    let missing = TlsFiles {
        cert: Path::new("/does/not/exist").into(),
        ..Authority::new().files("a", None)
    };
    let missing = source("tcp:127.0.0.1:1", Some(missing));
    assert!(crate::sentence(&missing).contains("/does/not/exist"), "{missing:?}");
}
