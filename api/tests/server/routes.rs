//! What the routes answer.

use triarch_api::server::Limits;
use triarch_api::{PayloadConfig, VmConfig, VmInfo};

use crate::common::{Running, put};

const MINIMAL: &str = r#"{"payload": {"kernel": "/k"}, "memory": {"size": 1048576}}"#;

#[test]
fn a_vm_goes_through_its_life() {
    let (server, _vm) = Running::api(Limits::default());
    let mut client = server.connect();
    assert_eq!(client.get("vm.info").status, 404);
    assert_eq!(client.put("vm.boot", "").status, 404);
    let created = client.put("vm.create", MINIMAL);
    assert_eq!((created.status, created.body.as_str()), (204, ""));
    assert!(!created.head.contains("Content-Length"), "{}", created.head);
    assert_eq!(client.put("vm.create", MINIMAL).status, 409);
    for (name, state) in [
        ("vm.boot", "Running"),
        ("vm.pause", "Paused"),
        ("vm.resume", "Running"),
        ("vm.reboot", "Running"),
        ("vm.power-button", "Running"),
        ("vm.shutdown", "Shutdown"),
    ] {
        assert_eq!(client.put(name, "").status, 204, "{name}");
        let got = client.get("vm.info");
        assert_eq!(got.status, 200);
        let info: VmInfo = serde_json::from_str(&got.body).expect("JSON");
        assert_eq!(info.state.name(), state, "after {name}");
        assert_eq!(info.config.memory.size, 1 << 20);
    }
    let refused = client.put("vm.pause", "");
    assert_eq!(refused.status, 409);
    assert_eq!(
        refused.body,
        r#"{"error":"vm.pause: the VM is Shutdown, it must be Running"}"#
    );
    assert_eq!(client.put("vm.delete", "").status, 204);
    assert_eq!(client.get("vm.info").status, 404);
    assert_eq!(client.put("vmm.shutdown", "").status, 204);
}

#[test]
fn ping_tells_who_answers() {
    let (server, _vm) = Running::api(Limits::default());
    let got = server.connect().get("vmm.ping");
    assert_eq!(
        (got.status, got.body.as_str()),
        (
            200,
            r#"{"build_version":"v1.2.3","version":"1.2.3","pid":42,"features":["kvm"]}"#
        )
    );
    assert!(got.head.contains("\r\nContent-Length: 72\r\n"), "{}", got.head);
    assert!(got.head.contains("\r\nContent-Type: application/json\r\n"));
}

#[test]
fn cpus_are_told_with_and_without_a_vm() {
    let (server, vm) = Running::api(Limits::default());
    let mut client = server.connect();
    let got = client.get("vmm.cpu-features");
    assert_eq!(
        (got.status, got.body.as_str()),
        (
            200,
            r#"{"host":{"architecture":"x86_64","vendor":"HygonGenuine","tsc_scaling":false,"features":["avx2"],"values":{"physical_address_bits":48},"unnamed":[]}}"#
        )
    );
    vm.create(VmConfig::default());
    assert_eq!(client.get("vmm.cpu-features").body, got.body);
    assert_eq!(client.put("vmm.cpu-features", "").status, 405);
}

#[test]
fn routes_without_their_device_say_so() {
    let (server, vm) = Running::api(Limits::default());
    vm.create(VmConfig::default());
    let mut client = server.connect();
    for name in "add-pmem add-vdpa add-user-device coredump".split_whitespace() {
        let got = client.put(&format!("vm.{name}"), "{}");
        assert_eq!(got.status, 501, "{name}");
        assert_eq!(
            got.body,
            format!(r#"{{"error":"vm.{name} is not supported by this version"}}"#)
        );
    }
}

#[test]
fn wrong_paths_methods_and_bodies_are_told_apart() {
    let (server, _vm) = Running::api(Limits::default());
    let mut client = server.connect();
    for path in ["vm.fly", "", "vm.info/", "vm.infos"] {
        assert_eq!(client.get(path).status, 404, "{path}");
    }
    client.send("GET / HTTP/1.1\r\n\r\n");
    assert_eq!(client.response().expect("a response").status, 404);
    let wrong = client.get("vm.boot");
    assert_eq!(wrong.status, 405);
    assert!(wrong.head.contains("\r\nAllow: PUT\r\n"));
    assert!(client.put("vm.info", "").head.contains("\r\nAllow: GET\r\n"));
    client.send("DELETE /api/v1/vm.info HTTP/1.1\r\n\r\n");
    assert_eq!(client.response().expect("a response").status, 405);
    // A response to HEAD has no body, whatever its status (RFC 9110, 9.3.2).
    client.send("HEAD /api/v1/vm.info HTTP/1.1\r\n\r\n");
    let head = client.response().expect("a response");
    assert_eq!((head.status, head.body.as_str()), (405, ""));
    assert!(!head.head.contains("Content-Length"), "{}", head.head);
    assert_eq!(client.put("vm.create", "").status, 400);
    assert_eq!(client.put("vm.create", "{}").status, 400);
    assert_eq!(client.put("vm.create", r#"{"memory": {"size": "big"}}"#).status, 400);
    assert_eq!(client.put("vm.create", r#"{"pmem": [{}]}"#).status, 501);
    // After all that the connection still serves.
    assert_eq!(client.get("vmm.ping").status, 200);
}

#[test]
fn descriptors_that_nobody_wants_are_refused() {
    use std::os::fd::AsFd;
    let (server, _vm) = Running::api(Limits::default());
    let mut client = server.connect();
    let fd = std::io::stderr();
    client.send_fds(put("vm.create", MINIMAL).as_bytes(), &[fd.as_fd()]);
    let got = client.response().expect("a response");
    assert_eq!(
        (got.status, got.body.as_str()),
        (400, r#"{"error":"vm.create takes no descriptors"}"#)
    );
    assert_eq!(client.put("vm.create", MINIMAL).status, 204);
}

#[test]
fn descriptors_of_a_network_interface_arrive_in_order_and_their_numbers_are_ignored() {
    use std::os::fd::AsFd;
    let (server, vm) = Running::api(Limits::default());
    vm.create(VmConfig::default());
    let files: Vec<_> = (0..3)
        .map(|_| tempfile::tempfile().expect("a temporary file"))
        .collect();
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut client = server.connect();
    client.send_fds(
        put("vm.add-net", r#"{"num_queues": 6, "fds": [7, 8, 9]}"#).as_bytes(),
        &fds,
    );
    assert_eq!(client.response().expect("a response").status, 204);
    let (net, received) = vm.handed.lock().unwrap().take().expect("a network interface");
    assert_eq!((net.num_queues, net.fds), (6, None));
    let inode = |fd: &dyn AsFd| rustix::fs::fstat(fd.as_fd()).expect("fstat").st_ino;
    let sent: Vec<_> = files.iter().map(|file| inode(file)).collect();
    let got: Vec<_> = received.iter().map(|fd| inode(fd)).collect();
    assert_eq!(got, sent);
}

#[test]
fn descriptors_of_a_device_arrive_and_numbers_of_the_client_mean_nothing() {
    use std::os::fd::AsFd;
    let (server, vm) = Running::api(Limits::default());
    vm.create(VmConfig::default());
    let files = [0, 1].map(|_| tempfile::tempfile().expect("a temporary file"));
    let fds = files.each_ref().map(AsFd::as_fd);
    let mut client = server.connect();
    client.send_fds(put("vm.add-device", r#"{"id": "gpu", "fd": 7}"#).as_bytes(), &fds);
    assert_eq!(client.response().expect("a response").status, 204);
    let (device, received) = vm.passed.lock().unwrap().take().expect("a device");
    assert_eq!(
        (device.id.as_deref(), device.fd, received.len()),
        (Some("gpu"), None, 2)
    );
    client.send(put("vm.delete", ""));
    assert_eq!(client.response().expect("a response").status, 204);
    let body = r#"{"payload": {"kernel": "k"}, "devices": [{"path": "/p", "fd": 7}],
        "platform": {"iommufd_fd": 8, "container_fd": 9}}"#;
    client.send(put("vm.create", body));
    assert_eq!(client.response().expect("a response").status, 204);
    let info = client.get("vm.info").body;
    assert!(
        info.contains(r#""devices":[{"path":"/p"}]"#) && !info.contains("_fd"),
        "{info}"
    );
}

#[test]
fn info_is_the_state_of_now_and_ascii() {
    let (server, vm) = Running::api(Limits::default());
    let mut client = server.connect();
    for kernel in ["/Größe", "/b"] {
        vm.create(VmConfig {
            payload: Some(PayloadConfig {
                kernel: Some(kernel.into()),
                ..PayloadConfig::default()
            }),
            ..VmConfig::default()
        });
        for _ in 0..2 {
            let got = client.get("vm.info");
            assert!(got.body.is_ascii());
            let info: VmInfo = serde_json::from_str(&got.body).expect("JSON");
            assert_eq!(info.config.payload.and_then(|p| p.kernel), Some(kernel.into()));
        }
    }
}
