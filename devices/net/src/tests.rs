//! Taps in network namespaces of their own. They need root: otherwise they say so and prove nothing.

#![allow(unsafe_code)] // unshare, and buffers for packet queues

use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;

use super::*;
use crate::tap::prefix_len;

/// Runs `body` on a thread in a new network namespace.
fn in_namespace(body: impl FnOnce() + Send + 'static) {
    let done = std::thread::spawn(move || {
        // SAFETY: takes no pointers; only this thread changes its namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            eprintln!("skipped: no network namespace: {}", std::io::Error::last_os_error());
            return;
        }
        if !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("skipped: no /dev/net/tun");
            return;
        }
        body();
    });
    if let Err(panic) = done.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` with `args` in the namespace of this thread and returns what it says.
fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split(' ')).output().expect("iproute2");
    assert!(output.status.success(), "ip {args}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn exists(name: &str) -> bool {
    Command::new("ip")
        .args(["link", "show", name])
        .output()
        .expect("iproute2")
        .status
        .success()
}

#[test]
fn a_tap_of_ours_comes_and_goes() {
    in_namespace(|| {
        let mut tap = Tap::open(None, 1).expect("tap");
        assert!(exists(tap.name()), "{}", tap.name());
        tap.set_mtu(9000).expect("mtu");
        assert_eq!(tap.mtu(), Some(9000));
        tap.set_mac([2, 0, 0, 1, 2, 3]).expect("mac");
        assert_eq!(tap.mac().expect("mac"), [2, 0, 0, 1, 2, 3]);
        tap.set_address("192.0.2.1".parse().unwrap(), "255.255.255.0".parse().unwrap())
            .expect("v4");
        tap.set_address("2001:db8::1".parse().unwrap(), "ffff:ffff:ffff:ffff::".parse().unwrap())
            .expect("v6");
        tap.bring_up().expect("up");
        let shown = ip(&format!("addr show dev {}", tap.name()));
        for part in ["mtu 9000", "192.0.2.1/24", "2001:db8::1/64", "02:00:00:01:02:03", ",UP"] {
            assert!(shown.contains(part), "{part} in {shown}");
        }
        assert!(
            tap.offloads().contains(Offloads::CSUM | Offloads::TSO4),
            "{:?}",
            tap.offloads()
        );
        tap.set_offloads(tap.offloads()).expect("offloads");
        let name = tap.name().to_owned();
        drop(tap);
        assert!(!exists(&name));
    });
}

#[test]
fn a_persistent_tap_stays_as_it_was() {
    in_namespace(|| {
        ip("tuntap add p0 mode tap");
        ip("link set p0 mtu 1400 address 02:00:00:00:00:09");
        ip("addr add 198.51.100.1/25 dev p0");
        let state = || {
            let text = ip("-o addr show dev p0") + &ip("-o link show dev p0");
            // Going up once gives it a queueing discipline for good.
            let words = text
                .split_whitespace()
                .filter(|w| !["noop", "pfifo_fast", "fq_codel", "noqueue"].contains(w));
            words.collect::<Vec<_>>().join(" ")
        };
        let before = state();
        let mut tap = Tap::open(Some("p0"), 1).expect("tap");
        tap.set_mtu(2000).expect("mtu");
        tap.set_mac([2, 0, 0, 1, 2, 3]).expect("mac");
        tap.set_address("192.0.2.1".parse().unwrap(), "255.255.0.0".parse().unwrap())
            .expect("v4");
        tap.set_address("2001:db8::1".parse().unwrap(), "ffff::".parse().unwrap())
            .expect("v6");
        tap.bring_up().expect("up");
        assert_ne!(state(), before);
        drop(tap);
        assert_eq!(state(), before);
    });
}

#[test]
fn refusals_name_the_reason() {
    in_namespace(|| {
        ip("tuntap add single mode tap");
        ip("tuntap add multi mode tap multi_queue");
        ip("tuntap add layer3 mode tun");
        let refuse = |name, queues| match Tap::open(Some(name), queues) {
            Ok(tap) => panic!("{} opened", tap.name()),
            Err(error) => error,
        };
        assert!(matches!(refuse("single", 2), TapError::NotMultiQueue(_)));
        assert!(matches!(refuse("layer3", 1), TapError::NotTap(_)));
        assert!(matches!(refuse("lo", 1), TapError::NotTap(_)));
        for bad in ["", "a/b", "a b", "far-too-long-a-name", "..", "a:1"] {
            assert!(matches!(refuse(bad, 1), TapError::Name(_)), "{bad:?}");
        }
        assert!(matches!(refuse("single", 0), TapError::QueueCount(0)));
        assert!(matches!(refuse("single", 257), TapError::QueueCount(257)));
        let held = Tap::open(Some("single"), 1).expect("free");
        assert!(matches!(refuse("single", 1), TapError::Busy(_)));
        drop(held);
        Tap::open(Some("single"), 1).expect("free again");
        let held = Tap::open(Some("fresh"), 2).expect("created");
        assert!(matches!(refuse("fresh", 2), TapError::Busy(_)));
        drop(held);
        Tap::open(Some("multi"), 1).expect("one queue of a multi-queue interface");
        let mut tap = Tap::open(Some("multi"), 4).expect("four queues");
        assert!(matches!(
            tap.set_address("192.0.2.1".parse().unwrap(), "255.0.255.0".parse().unwrap()),
            Err(TapError::Mask { .. })
        ));
        assert!(matches!(tap.set_mtu(10), Err(TapError::Set { .. })));
    });
}

#[test]
fn without_the_capability_it_says_what_to_do() {
    in_namespace(|| {
        // SAFETY: takes no pointers. The raw call changes this thread only, which is what the test wants.
        if unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) } != 0 {
            eprintln!("skipped: not root");
            return;
        }
        let error = Tap::open(Some("nothere"), 1).map(|_| ()).expect_err("refused");
        match error {
            TapError::Missing(name) => assert_eq!(name, "nothere"),
            // Where the device file is closed to other users that is the first obstacle.
            TapError::NoDriverPermission(_) => {}
            other => panic!("{other}"),
        }
    });
}

fn fds(tap: &Tap) -> Vec<OwnedFd> {
    tap.queues()
        .iter()
        .map(|q| q.as_fd().try_clone_to_owned().expect("dup"))
        .collect()
}

#[test]
fn descriptors_are_taken_over_and_checked() {
    in_namespace(|| {
        let first = Tap::open(Some("one"), 2).expect("tap");
        let other = Tap::open(Some("other"), 1).expect("tap");
        let again = Tap::from_fds(fds(&first)).expect("from descriptors");
        assert_eq!((again.name(), again.queues().len()), ("one", 2));
        assert_eq!(again.mtu(), Some(1500));
        let mut mixed = fds(&first);
        mixed.extend(fds(&other));
        assert!(matches!(Tap::from_fds(mixed), Err(TapError::FdsDiffer { .. })));
        let file = std::fs::File::open("/dev/null").expect("null");
        assert!(matches!(
            Tap::from_fds(vec![file.into()]),
            Err(TapError::BadFd { index: 0, .. })
        ));
        assert!(matches!(Tap::from_fds(Vec::new()), Err(TapError::QueueCount(0))));
        drop(first);
        drop(again);
        assert!(!exists("one"), "nothing keeps it");
    });
}

#[test]
fn descriptors_from_another_namespace_work_without_settings() {
    in_namespace(|| {
        let tap = Tap::open(Some("far"), 1).expect("tap");
        let fd = fds(&tap);
        in_namespace(move || {
            ip("tuntap add far mode tap");
            let mut tap = Tap::from_fds(fd).expect("from descriptors");
            assert_eq!(tap.mtu(), None, "the one of that name here is another");
            assert!(matches!(tap.set_mtu(1400), Err(TapError::OtherNamespace(_))));
        });
    });
}

fn send(queue: &PacketQueue, packet: &mut [u8]) -> std::io::Result<usize> {
    let buffer = libc::iovec {
        iov_base: packet.as_mut_ptr().cast(),
        iov_len: packet.len(),
    };
    // SAFETY: the buffer is this function's, for longer than the call.
    unsafe { queue.write(&[buffer]) }
}

fn receive(queue: &PacketQueue) -> Option<Vec<u8>> {
    let mut packet = vec![0; MAX_PACKET];
    let buffer = libc::iovec {
        iov_base: packet.as_mut_ptr().cast(),
        iov_len: packet.len(),
    };
    // SAFETY: the buffer is this function's, for longer than the call.
    match unsafe { queue.read(&[buffer]) } {
        Ok(n) => Some(packet[..n].to_vec()),
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => None,
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn the_host_spreads_packets_over_the_queues_in_use() {
    in_namespace(|| {
        let mut tap = Tap::open(None, 2).expect("tap");
        let mask = "255.255.255.0".parse().unwrap();
        tap.set_address("192.0.2.1".parse().unwrap(), mask).expect("address");
        tap.bring_up().expect("up");
        ip(&format!(
            "neigh add 192.0.2.99 lladdr 02:00:00:00:00:07 dev {}",
            tap.name()
        ));
        let socket = std::net::UdpSocket::bind("192.0.2.1:0").expect("socket");
        let is_ours = |p: &Vec<u8>| p.get(HEADER_LEN..HEADER_LEN + 6) == Some(&[2, 0, 0, 0, 0, 7]);
        // Sends to 32 ports, which is as many flows, and counts what comes out of each queue.
        let spread = || {
            for port in 1000..1032 {
                socket.send_to(b"hello", ("192.0.2.99", port)).expect("send");
            }
            let mut seen = [0, 0];
            for _ in 0..1000 {
                for (seen, queue) in seen.iter_mut().zip(tap.queues()) {
                    *seen += std::iter::from_fn(|| receive(queue)).filter(is_ours).count();
                }
                if seen[0] + seen[1] >= 32 {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            seen
        };
        tap.set_queue_active(1, false).expect("out of use");
        tap.set_queue_active(1, false).expect("twice is once");
        assert_eq!(spread(), [32, 0]);
        tap.set_queue_active(1, true).expect("in use");
        let both = spread();
        assert!(both[0] > 0 && both[1] > 0, "{both:?}");
        let mut frame = vec![0; HEADER_LEN + 60];
        send(&tap.queues()[1], &mut frame).expect("the other direction");
        assert!(
            send(&tap.queues()[1], &mut frame[..HEADER_LEN + 3]).is_err(),
            "no frame"
        );
    });
}

#[test]
fn masks_are_prefixes() {
    let len = |a: &str, m: &str| prefix_len(a.parse().unwrap(), m.parse().unwrap());
    assert_eq!(len("10.0.0.1", "255.255.255.0"), Some(24));
    assert_eq!(len("10.0.0.1", "0.0.0.0"), Some(0));
    assert_eq!(len("10.0.0.1", "255.255.255.255"), Some(32));
    assert_eq!(len("10.0.0.1", "255.0.255.0"), None);
    assert_eq!(len("::1", "ffff:ffff::"), Some(32));
    assert_eq!(len("::1", "255.0.0.0"), None);
}
