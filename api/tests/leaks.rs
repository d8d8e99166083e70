//! Nothing stays open after bad requests. Alone in its process, because it counts the descriptors of the process.

#[path = "server/common.rs"]
#[allow(dead_code)]
mod common;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use common::{Running, put};
use triarch_api::server::Limits;

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc").count()
}

/// Waits until there are `expected`: the server closes a moment after it answered.
fn settle(expected: usize) -> usize {
    let start = Instant::now();
    while open_descriptors() != expected && start.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(5));
    }
    open_descriptors()
}

#[test]
fn descriptors_of_bad_requests_are_closed() {
    let (server, _vm) = Running::api(Limits::default());
    let file = std::fs::File::open("/dev/null").expect("open");
    let fds = [file.as_fd(); 20];
    let before = open_descriptors();
    for round in 0..1000 {
        let mut client = server.connect();
        match round % 5 {
            // Refused by the route, by the parser, by the limits; cut off; and of a client that is gone.
            0 => client.send_fds(put("vm.boot", "").as_bytes(), &fds),
            1 => client.send_fds(b"hello\r\n\r\n", &fds),
            2 => client.send_fds(
                put("vm.create", "").replace("Length: 0", "Length: 99999999").as_bytes(),
                &fds,
            ),
            3 => client.send_fds(b"PUT /api/v1/vm.create HT", &fds),
            _ => client.send_fds(put("vm.nmi", "{}").as_bytes(), &fds),
        }
        if round % 5 < 3 {
            assert!(client.response().expect("a response").status >= 400);
        }
    }
    assert_eq!(settle(before), before);
}
