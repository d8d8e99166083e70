//! A memory device of ACPI that the guest takes and gives back.

use anyhow::Result;

use super::{Change, More, RAM, Row, Setup, comes_and_goes};

/// Bytes of it.
const SIZE: u64 = 1 << 30;

/// Measures them.
pub(super) fn measure(setup: &Setup) -> Result<Vec<Row>> {
    let resize = |target: u64| format!(r#"{{"desired_ram":{target}}}"#);
    let [with, without] = [resize(RAM + SIZE), resize(RAM)];
    let change = |body, counts| Change {
        route: "vm.resize",
        body,
        guest: "dimm timed 1 10000",
        counts,
        job: Some("vm.resize"),
    };
    let add = change(&with, [("taken", 1), ("ejected", 0)]);
    let remove = change(&without, [("taken", 0), ("ejected", 1)]);
    let more = More {
        memory: format!(r#""hotplug_size":{},"#, 8 * SIZE),
        ..More::default()
    };
    comes_and_goes(
        setup,
        &more,
        "DIMM of 1 GiB",
        |client, guest| add.make(client, guest),
        |client, guest| remove.make(client, guest),
    )
}
