//! What the documentation says of routes is what the table of routes says.

use std::fmt::Write;
use std::path::Path;

use triarch_api::Phase;
use triarch_api::server::{Action, Method, ROUTES};

/// The table of routes, as it stands in `docs/api.md`.
fn table() -> String {
    let mut text = String::from("| route | phases | what it does |\n|---|---|---|\n");
    for route in ROUTES {
        let method = if route.method == Method::Get { "GET" } else { "PUT" };
        let phases = match route.action {
            Action::Missing => "none: 501".to_owned(),
            Action::Ping | Action::Metrics | Action::Events | Action::Jobs | Action::Job => "all".to_owned(),
            Action::Vm(operation) => phases(operation.phases()),
        };
        let _ = writeln!(text, "| {method} `{}` | {phases} | {} |", route.name, route.summary);
    }
    text
}

fn phases(accepted: &[Phase]) -> String {
    if accepted == Phase::ALL {
        return "all".to_owned();
    }
    let names: Vec<_> = accepted.iter().map(|phase| phase.name()).collect();
    match names[..] {
        ["none"] => "no VM".to_owned(),
        ["Created", "Running", "Paused", "Shutdown"] => "with a VM".to_owned(),
        _ => names.join(", "),
    }
}

#[test]
fn the_documentation_has_the_table_of_routes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/api.md");
    let text = std::fs::read_to_string(&path).expect("docs/api.md");
    let table = table();
    assert!(text.contains(&table), "docs/api.md must contain this table:\n\n{table}");
}
