//! The device on a real tap, in a network namespace of its own; says so where that is not allowed.

#![allow(unsafe_code)] // unshare

use std::net::UdpSocket;

use triarch_net::Tap;

use super::*;

fn in_namespace(body: impl FnOnce() + Send + 'static) {
    let done = std::thread::spawn(move || {
        // SAFETY: takes no pointers; only this thread and those it starts change their namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 || !std::path::Path::new("/dev/net/tun").exists() {
            eprintln!("skipped: no network namespace or no /dev/net/tun");
            return;
        }
        body();
    });
    if let Err(panic) = done.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A UDP packet over IPv4 from the guest at 192.0.2.2 to port `port` of 192.0.2.1, with its checksum left to the host.
fn udp_packet(host_mac: [u8; 6], port: u16, payload: &[u8]) -> Vec<u8> {
    let udp_len = (8 + payload.len()) as u16;
    // NEEDS_CSUM, no GSO, checksum from byte 34 on at 6 bytes in.
    let mut packet = vec![1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
    packet.extend(host_mac);
    packet.extend([2, 0, 0, 0, 0, 1, 8, 0]);
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_len).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 2, 192, 0, 2, 1]);
    let checksum = !fold(sum(&ip));
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend(&ip);
    packet.extend(2000u16.to_be_bytes());
    packet.extend(port.to_be_bytes());
    packet.extend(udp_len.to_be_bytes());
    let pseudo = fold(sum(&ip[12..20]) + 17 + u32::from(udp_len));
    packet.extend(pseudo.to_be_bytes());
    packet.extend(payload);
    packet
}

fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
        .sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[test]
fn a_guest_talks_to_the_host_over_a_tap() {
    in_namespace(|| {
        let mut tap = Tap::open(None, 1).expect("tap");
        let mask = "255.255.255.0".parse().unwrap();
        tap.set_address("192.0.2.1".parse().unwrap(), mask).expect("address");
        tap.bring_up().expect("up");
        let host_mac = tap.mac().expect("mac");
        let neighbour = [
            "neigh",
            "add",
            "192.0.2.2",
            "lladdr",
            "02:00:00:00:00:01",
            "dev",
            tap.name(),
        ];
        assert!(
            std::process::Command::new("ip")
                .args(neighbour)
                .status()
                .expect("ip")
                .success()
        );
        let socket = UdpSocket::bind("192.0.2.1:0").expect("socket");
        socket.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        let port = socket.local_addr().expect("address").port();

        let mut net = Net::new(options("_tap"), Arc::new(tap)).expect("device");
        let offloads = f::MRG_RXBUF | f::CSUM | f::GUEST_CSUM;
        let mut rx = FakeDriver::new(64, true);
        let mut tx = FakeDriver::beside(&rx, 1);
        net.activate(rx.context(offloads)).expect("activate");
        for slot in 0..60 {
            rx.add(&[Desc::writable(buffer(0, slot), 1526)]);
        }
        net.start_queue(rx.queue()).expect("rx");
        net.start_queue(tx.queue()).expect("tx");

        let request = udp_packet(host_mac, port, b"from the guest");
        tx.ram()
            .write_slice(&request, GuestAddress(buffer(1, 0)))
            .expect("packet");
        tx.add(&[Desc::readable(buffer(1, 0), request.len() as u32)]);
        tx.kick();
        let mut got = [0; 64];
        let (n, from) = socket.recv_from(&mut got).expect("the host gets it");
        assert_eq!(
            (&got[..n], from.to_string().as_str()),
            (&b"from the guest"[..], "192.0.2.2:2000")
        );

        socket.send_to(b"from the host", from).expect("send");
        let mut slot = 0;
        eventually("the answer", || {
            let Some((_, len)) = rx.used() else { return false };
            let mut packet = vec![0; len as usize];
            rx.ram()
                .read_slice(&mut packet, GuestAddress(buffer(0, slot)))
                .expect("buffer");
            slot += 1;
            assert_eq!(packet[10..12], [1, 0]);
            // The host's own chatter comes by too.
            packet.ends_with(b"from the host") && packet[0] & 1 == 1
        });
        assert_eq!(net.handle().stats().tx.packets, 1);
    });
}

#[test]
fn an_interface_that_is_deleted_costs_packets_only() {
    in_namespace(|| {
        let mut tap = Tap::open(Some("doomed"), 1).expect("tap");
        tap.bring_up().expect("up");
        let mut net = Net::new(options("_del"), Arc::new(tap)).expect("device");
        let rx = FakeDriver::new(64, true);
        let mut tx = FakeDriver::beside(&rx, 1);
        net.activate(rx.context(0)).expect("activate");
        net.start_queue(rx.queue()).expect("rx");
        net.start_queue(tx.queue()).expect("tx");
        let delete = ["link", "del", "doomed"];
        assert!(
            std::process::Command::new("ip")
                .args(delete)
                .status()
                .expect("ip")
                .success()
        );
        assert!(ticks_used("_del_qp0") < 5, "it must wait, not spin");
        tx.add(&[Desc::readable(buffer(1, 0), 100)]);
        tx.kick();
        tx.wait_used().expect("completed");
        assert_eq!(net.handle().stats().tx.dropped, 1);
        for index in [0, 1] {
            let queue = net.stop_queue(index).expect("queue");
            net.start_queue(queue).expect("again");
        }
        assert!(ticks_used("_del_qp0") < 5, "nor when it is gone at the start");
    });
}
