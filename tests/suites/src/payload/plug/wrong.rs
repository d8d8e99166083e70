//! What cannot be: a sentence for whoever asked, and nothing changes.

use super::{Plug, image};
use crate::payload::payload_tests;
use anyhow::{Result, ensure};
use serde_json::json;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("plug":
    what_is_wrong_changes_nothing,
);

fn what_is_wrong_changes_nothing(context: &Context) -> Result<Outcome> {
    let first = image(context, "first", 1)?;
    let disk = format!("path={},id=first", first.path().display());
    let mut p = Plug::start(context, &[("--disk", &disk), ("--balloon", "size=0,id=lend")])?;
    p.guest.ask("blk 0 verify 0 100 1")?;
    let before = p.api.get("vm.info")?;
    let missing = context.dir.join("missing");
    for (route, body, status, words) in [
        (
            "vm.add-disk",
            json!({ "path": first.path() }),
            400,
            vec!["another disk"],
        ),
        ("vm.add-disk", json!({ "path": missing }), 400, vec!["does not exist"]),
        (
            "vm.add-disk",
            json!({ "path": "/a", "id": "first" }),
            400,
            vec!["'first'"],
        ),
        ("vm.add-disk", json!({ "path": "/a", "id": "_rng" }), 400, vec!["_rng"]),
        (
            "vm.add-fs",
            json!({ "tag": "t", "socket": "/s", "id": "shared" }),
            400,
            vec!["shared", "memory.shared"],
        ),
        (
            "vm.add-vsock",
            json!({ "cid": 3, "socket": "/nonexistent/s" }),
            400,
            vec!["No such file"],
        ),
        (
            "vm.add-net",
            json!({ "vhost_user": true, "vhost_socket": "/s" }),
            400,
            vec!["memory.shared"],
        ),
        (
            "vm.remove-device",
            json!({ "id": "second" }),
            404,
            vec!["second", "vm.info"],
        ),
        ("vm.remove-device", json!({ "id": "_rng" }), 400, vec!["_rng", "stays"]),
        (
            "vm.remove-device",
            json!({ "id": "_rng", "force": true }),
            400,
            vec!["_rng", "stays"],
        ),
        ("vm.remove-device", json!({ "id": "lend" }), 400, vec!["lend", "stays"]),
        ("vm.remove-device", json!({}), 400, vec!["id"]),
    ] {
        p.api.refused(route, &body, status, &words)?;
        ensure!(p.api.get("vm.info")? == before, "{route} {body} changed something");
    }
    ensure!(p.guest.ask("slots events")? == "0x0" && p.guest.ask("slots next")? == "none");
    ensure!(!p.api.get("vm.jobs")?.to_string().contains("vm.remove-device") && p.events()?.is_empty());
    // What stays cannot be given back either.
    for slot in 0..32 {
        if slot != 1 {
            p.guest.ask(&format!("slots eject {slot}"))?;
        }
    }
    p.guest.ask("blk 0 verify 0 100 1")?;
    ensure!(p.api.get("vm.info")? == before);
    Ok(Outcome::Passed)
}
