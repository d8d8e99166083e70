//! vCPUs that the guest starts and gives back.

use anyhow::Result;

use super::{Change, More, Row, Setup, comes_and_goes};

const ADDED: u32 = 3;

/// Measures them.
pub(super) fn measure(setup: &Setup) -> Result<Vec<Row>> {
    let most = 1 + ADDED;
    let resize = |target: u32| format!(r#"{{"desired_vcpus":{target}}}"#);
    let [all, one] = [resize(most), resize(1)];
    let listen = format!("hot timed {ADDED} 10000");
    let change = |body, counts| Change {
        route: "vm.resize",
        body,
        guest: &listen,
        counts,
        job: Some("vm.resize"),
    };
    let add = change(&all, [("started", ADDED), ("ejected", 0)]);
    let remove = change(&one, [("started", 0), ("ejected", ADDED)]);
    let more = More {
        fields: format!(r#""cpus":{{"boot_vcpus":1,"max_vcpus":{most}}},"#),
        ..More::default()
    };
    comes_and_goes(
        setup,
        &more,
        &format!("{ADDED} vCPUs"),
        |client, guest| add.make(client, guest),
        |client, guest| remove.make(client, guest),
    )
}
