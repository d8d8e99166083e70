//! Every metric there is, a table for each part of the VMM: docs/metrics.md is checked against them.

mod devices;
mod machine;
mod memory;
mod process;
mod snapshots;

use super::text::{Family, Kind, Samples};
use super::{Metrics, Requests};
use crate::Phase;

/// What the text is made from.
#[derive(Debug)]
pub struct Source<'a> {
    /// What the owner of the VM gathered.
    pub metrics: &'a Metrics,
    /// Where the VM is in its life.
    pub phase: Phase,
    /// Version of this program.
    pub version: &'a str,
    /// How clients were served.
    pub requests: &'a Requests,
}
/// A metric, and what writes its samples.
pub(super) type Entry = (Family, fn(&Source<'_>, &mut Samples<'_>));

/// The Prometheus text.
pub fn render(source: &Source<'_>) -> String {
    let mut output = String::new();
    for (family, fill) in families() {
        fill(source, &mut Samples::new(&mut output, *family));
    }
    output
}

/// Every metric, in the order of the text.
pub(super) fn families() -> impl Iterator<Item = &'static Entry> {
    [
        machine::FAMILIES,
        memory::FAMILIES,
        devices::FAMILIES,
        snapshots::FAMILIES,
        process::FAMILIES,
    ]
    .into_iter()
    .flatten()
}

const fn family(name: &'static str, kind: Kind, labels: &'static [&'static str], help: &'static str) -> Family {
    Family {
        name,
        kind,
        labels,
        help,
    }
}
