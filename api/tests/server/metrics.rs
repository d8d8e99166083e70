//! What is counted of requests, and how it is asked for.

use triarch_api::server::Limits;
use triarch_api::{Reply, VmConfig};

use crate::common::{Client, Running};

/// Value of a sample in the text at `/metrics`, by the line it begins with.
fn value(client: &mut Client, sample: &str) -> Option<u64> {
    let got = client.get("metrics");
    assert_eq!(got.status, 200);
    let line = got.body.lines().find_map(|line| line.strip_prefix(sample))?;
    Some(line.trim().parse().expect("a whole number"))
}

#[test]
fn the_text_is_where_collectors_look_and_says_what_it_is() {
    let (server, _vm) = Running::api(Limits::default());
    let mut client = server.connect();
    client.send("GET /metrics?collect=all HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let got = client.response().expect("a response");
    assert_eq!(got.status, 200);
    let kind = "\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n";
    assert!(got.head.contains(kind), "{}", got.head);
    assert!(
        got.body.contains("\ntriarch_build_info{version=\"1.2.3\"} 1\n"),
        "{}",
        got.body
    );
    assert!(
        got.body.contains("\ntriarch_vm_state{state=\"none\"} 1\n"),
        "{}",
        got.body
    );
    assert_eq!(client.put("metrics", "").status, 405);
}

#[test]
fn requests_are_counted_when_they_are_answered() {
    let (server, vm) = Running::api(Limits::default());
    vm.create(VmConfig::default());
    vm.hold_boots();
    let mut booting = server.connect();
    booting.send(crate::common::put("vm.boot", ""));
    vm.wait_for_boot();

    let mut client = server.connect();
    for _ in 0..3 {
        client.get("vm.info");
    }
    client.get("vm.fly");
    client.put("vm.pause", "");
    let info = "triarch_api_requests_total{route=\"vm.info\",status=\"2xx\"}";
    let boot = "triarch_api_requests_total{route=\"vm.boot\",status=\"2xx\"}";
    let slow = "triarch_api_request_seconds_bucket{route=\"vm.boot\",le=\"+Inf\"}";
    assert_eq!(value(&mut client, info), Some(3));
    let other = "triarch_api_requests_total{route=\"other\",status=\"4xx\"}";
    assert_eq!(value(&mut client, other), Some(1));
    let refused = "triarch_api_requests_total{route=\"vm.pause\",status=\"4xx\"}";
    assert_eq!(value(&mut client, refused), Some(1));
    // Nobody waits for the boot, and it does not count yet.
    assert_eq!(value(&mut client, boot), None);
    vm.finish(|answer| answer.send(Ok(Reply::Done)));
    assert_eq!(booting.response().expect("a response").status, 204);
    assert_eq!((value(&mut client, boot), value(&mut client, slow)), (Some(1), Some(1)));
    // Each text counts the ones before it.
    let own = "triarch_api_requests_total{route=\"metrics\",status=\"2xx\"}";
    assert_eq!(value(&mut client, own), Some(6));
    assert_eq!(value(&mut client, own), Some(7));
}

#[test]
fn counters_belong_to_a_vm() {
    let (server, vm) = Running::api(Limits::default());
    let mut client = server.connect();
    let got = client.get("vm.counters");
    assert_eq!(got.status, 404);
    assert!(got.body.contains("vm.counters: there is no VM"), "{}", got.body);
    vm.create(VmConfig::default());
    let got = client.get("vm.counters");
    assert_eq!((got.status, got.body.as_str()), (200, "{}"));
}
