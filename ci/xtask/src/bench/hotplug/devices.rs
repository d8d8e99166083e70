//! A disk that the guest takes, reads and gives back.

use std::fs::File;

use anyhow::{Context, Result};

use super::{Change, More, Row, Setup, comes_and_goes};

const LISTEN: &str = "slots timed 1 10000";

/// Measures them.
pub(super) fn measure(setup: &Setup) -> Result<Vec<Row>> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    File::create(&disk)?.set_len(1 << 20).context("the disk's image")?;
    let add = Change {
        route: "vm.add-disk",
        body: &serde_json::json!({ "id": "data", "path": disk }).to_string(),
        guest: LISTEN,
        counts: [("came", 1), ("went", 0)],
        // It is there when the request is answered.
        job: None,
    };
    let remove = Change {
        route: "vm.remove-device",
        body: r#"{"id":"data"}"#,
        guest: LISTEN,
        counts: [("came", 0), ("went", 1)],
        job: Some("vm.remove-device"),
    };
    comes_and_goes(
        setup,
        &More::default(),
        "disk",
        |client, guest| {
            let sample = add.make(client, guest)?;
            // It is a disk that works.
            guest.ask("blk 0 read 0 8")?;
            Ok(sample)
        },
        |client, guest| remove.make(client, guest),
    )
}
