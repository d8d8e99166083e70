//! Certificates: who has the wrong one gets no guest.

use super::super::guest::{Guest, builder};
use super::super::payload_tests;
use super::{Waiting, begin, joined, send};
use anyhow::{Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::{Value, json};
use std::fs;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("migration::tls":
    nobody_else_gets_the_guest,
);

/// Signs certificates.
pub struct Authority {
    dir: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// What both sides of a migration are told.
pub struct Secrets {
    pub source: Value,
    pub destination: Value,
}

impl Authority {
    /// A new one.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let dir = tempfile::tempdir()?;
        fs::write(dir.path().join("ca.pem"), issuer.pem())?;
        Ok(Self { dir, issuer })
    }

    /// What somebody called `name` is told who expects `peer`.
    fn of(&self, name: &str, peer: &str) -> Result<Value> {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec![name.to_owned()])?.signed_by(&key, &self.issuer)?;
        let path = |end: &str| self.dir.path().join(format!("{name}.{end}"));
        fs::write(path("pem"), certificate.pem())?;
        fs::write(path("key"), key.serialize_pem())?;
        let ca = self.dir.path().join("ca.pem");
        Ok(json!({ "certificate": path("pem"), "key": path("key"), "ca": ca, "peer": peer }))
    }

    /// What the two sides are told who have these names.
    pub fn pair(&self, source: &str, destination: &str) -> Result<Secrets> {
        Ok(Secrets {
            source: self.of(source, destination)?,
            destination: self.of(destination, source)?,
        })
    }
}

fn nobody_else_gets_the_guest(context: &Context) -> Result<Outcome> {
    let (ours, theirs) = (Authority::new()?, Authority::new()?);
    let good = ours.pair("source.test", "destination.test")?;
    let mut guest = Guest::start(builder(context)?.api())?;
    let waiting = Waiting::start(context, "tcp:127.0.0.1:0", &json!({ "tls": good.destination }))?;
    let mut another_name = good.source.clone();
    another_name["peer"] = json!("somebody.test");
    let api = guest.vm().api()?;
    for (tls, words) in [
        // Somebody of another authority; the right one who expects somebody else; the wrong one who expects the right one.
        (theirs.pair("source.test", "destination.test")?.source, "destination"),
        (another_name, "somebody.test"),
        (ours.pair("other.test", "destination.test")?.source, "destination"),
    ] {
        let failed = joined(begin(&guest, &waiting.address, &json!({ "tls": tls }))?);
        let error = format!("{:#}", failed.err().unwrap_or_else(|| anyhow::anyhow!("it was moved")));
        ensure!(error.contains(words) && error.contains("runs here"), "{error}");
        let state = api.get("vm.info")?["state"].clone();
        ensure!(state == "Running", "{state}");
    }
    // Nor without any, and nobody leaves TLS out by accident.
    for (address, words) in [
        (waiting.address.clone(), "needs TLS"),
        (waiting.address.replace("tcp:", "tcp-plain:"), ""),
    ] {
        let failed = joined(begin(&guest, &address, &json!({}))?);
        let error = format!("{:#}", failed.err().unwrap_or_else(|| anyhow::anyhow!("it was moved")));
        ensure!(error.contains(words), "{error}");
    }
    guest.ask("hello")?;
    // The one who was waited for comes in spite of all that.
    send(&guest, &waiting, &json!({ "tls": good.source }))?;
    let mut guest = waiting.guest(guest)?;
    guest.ask("hello")?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}
