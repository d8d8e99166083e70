//! Streams from beginning to end.

use std::net::Shutdown;

use super::*;

#[test]
fn a_program_of_the_host_reaches_the_guest() {
    let mut rig = Rig::new("_fromhost");
    let mut stream = rig.connect(1234);
    // What follows the greeting at once belongs to the stream.
    stream.write_all(b"early").expect("write");
    let request = rig.expect(op::REQUEST);
    assert_eq!(
        (request.dst_port, request.kind, request.buf_alloc),
        (1234, STREAM, 64 << 10)
    );
    let peer = Peer::new(request.src_port, 1234);
    rig.send(&peer.header(op::RESPONSE), &[]);
    assert_eq!(line(&mut stream), format!("OK {}\n", request.src_port));
    let (header, data) = rig.receive();
    assert_eq!((header.op, &data[..]), (op::RW, &b"early"[..]));
    rig.send(&peer.data(5), b"hello");
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).expect("answer");
    assert_eq!(&answer, b"hello");
    let stats = rig.device.handle().stats();
    assert_eq!((stats.opened, stats.open, stats.rx_bytes, stats.tx_bytes), (1, 1, 5, 5));
}

#[test]
fn two_programs_to_one_port_are_kept_apart() {
    let mut rig = Rig::new("_apart");
    let mut streams = [rig.connect(7), rig.connect(7)];
    let ports = [rig.expect(op::REQUEST).src_port, rig.expect(op::REQUEST).src_port];
    assert_ne!(ports[0], ports[1]);
    for port in ports {
        rig.send(&Peer::new(port, 7).header(op::RESPONSE), &[]);
        rig.send(&Peer::new(port, 7).data(4), &port.to_le_bytes());
    }
    for stream in &mut streams {
        let answer = line(stream);
        let port: u32 = answer.trim_end().trim_start_matches("OK ").parse().expect("port");
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes).expect("data");
        assert_eq!(u32::from_le_bytes(bytes), port);
    }
}

#[test]
fn megabytes_go_both_ways_unharmed() {
    const TOTAL: usize = 4 << 20;
    let mut rig = Rig::new("_mega");
    let (stream, mut peer) = rig.open_from_guest(5000);
    let echo = std::thread::spawn(move || {
        let (mut from, mut to) = (stream.try_clone().expect("clone"), stream);
        let mut buffer = vec![0; 100_000];
        loop {
            match from.read(&mut buffer).expect("read") {
                0 => break,
                n => to.write_all(&buffer[..n]).expect("write"),
            }
        }
    });
    let (mut sent, mut got) = (0usize, 0usize);
    // As the device tells it: how far it took what the guest sent.
    let mut taken = 0u32;
    let mut told = 0u32;
    let begin = std::time::Instant::now();
    while got < TOTAL {
        assert!(
            begin.elapsed() < Duration::from_secs(30),
            "stuck at {sent} sent, {got} got"
        );
        let room = (64 << 10) - (sent as u32).wrapping_sub(taken) as usize;
        let n = room.min(TOTAL - sent).min(30_000);
        if n > 0 {
            rig.send(&peer.data(n), &pattern(sent, n));
            sent += n;
        }
        let mut idle = n == 0;
        while let Some((header, data)) = rig.poll() {
            idle = false;
            taken = header.fwd_cnt;
            match header.op {
                op::RW => {
                    assert_eq!(data, pattern(got, data.len()), "at {got}");
                    got += data.len();
                    assert!(got as u32 - told <= peer.buf_alloc, "more than the guest has room for");
                    peer.fwd_cnt = got as u32;
                }
                op::CREDIT_REQUEST | op::CREDIT_UPDATE => {}
                other => panic!("operation {other}"),
            }
        }
        if peer.fwd_cnt != told {
            told = peer.fwd_cnt;
            rig.send(&peer.header(op::CREDIT_UPDATE), &[]);
        }
        if idle {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    rig.send(&peer.shutdown(SHUT_SEND), &[]);
    echo.join().expect("echo");
    let stats = rig.device.handle().stats();
    assert_eq!((stats.rx_bytes, stats.tx_bytes), (TOTAL as u64, TOTAL as u64));
}

#[test]
fn a_guest_without_room_holds_the_host_up() {
    let mut rig = Rig::new("_room");
    let listener = rig.listen(9);
    let mut peer = Peer {
        buf_alloc: 1000,
        ..Peer::new(9, 1000)
    };
    rig.send(&peer.header(op::REQUEST), &[]);
    rig.expect(op::RESPONSE);
    let (mut stream, _) = listener.accept().expect("accept");
    stream.write_all(&pattern(0, 2500)).expect("write");
    let mut got = Vec::new();
    for round in 1..=3 {
        while got.len() < (1000 * round).min(2500) {
            let (header, data) = rig.receive();
            assert_eq!(header.op, op::RW);
            got.extend(data);
        }
        if round < 3 {
            rig.expect(op::CREDIT_REQUEST);
            assert!(ticks_used("_room") < 5, "it must wait, not spin");
            assert!(rig.poll().is_none(), "nothing beyond the guest's room");
        }
        peer.fwd_cnt = got.len() as u32;
        rig.send(&peer.header(op::CREDIT_UPDATE), &[]);
    }
    assert_eq!(got, pattern(0, 2500));
    // A guest that says it took more than was sent has no room, whatever it claims.
    peer.fwd_cnt = 1_000_000;
    rig.send(&peer.header(op::CREDIT_UPDATE), &[]);
    stream.write_all(b"x").expect("write");
    rig.expect(op::CREDIT_REQUEST);
}

#[test]
fn a_host_that_does_not_read_costs_a_bounded_buffer() {
    let mut rig = Rig::new("_bounded");
    let (mut stream, peer) = rig.open_from_guest(5);
    // The kernel's socket buffer takes some; then the guest may send no more than it was told.
    let (mut sent, mut taken) = (0u32, 0u32);
    loop {
        let room = (64 << 10) - (sent - taken);
        if room > 0 {
            let n = room.min(16 << 10) as usize;
            rig.send(&peer.data(n), &pattern(sent as usize, n));
            sent += n as u32;
        }
        if let Some((header, _)) = rig.poll() {
            taken = header.fwd_cnt;
        } else if room == 0 {
            rig.send(&peer.header(op::CREDIT_REQUEST), &[]);
            let update = rig.expect(op::CREDIT_UPDATE);
            if update.fwd_cnt == taken {
                break;
            }
            taken = update.fwd_cnt;
        }
    }
    assert_eq!(sent - taken, 64 << 10, "the buffer is full");
    assert!(ticks_used("_bounded") < 5, "it must wait, not spin");
    let mut all = vec![0; sent as usize];
    stream.read_exact(&mut all).expect("all of it");
    assert_eq!(all, pattern(0, sent as usize));
    while taken != sent {
        taken = rig.expect(op::CREDIT_UPDATE).fwd_cnt;
    }
    rig.send(&peer.data(4), b"more");
    stream.read_exact(&mut all[..4]).expect("goes on");
}

#[test]
fn a_guest_beyond_its_credit_is_cut_off() {
    let mut rig = Rig::new("_beyond");
    for (port, len) in [(5, (64 << 10) + 1), (6, 32 << 10)] {
        let (mut stream, peer) = rig.open_from_guest(port);
        // The kernel's socket buffer takes some 200 KiB before ours fills up.
        let packets = (1..=32).find(|_| {
            rig.send(&peer.data(len), &pattern(0, len));
            std::iter::from_fn(|| rig.poll()).any(|(header, _)| header.op == op::RST)
        });
        assert!(
            packets.is_some(),
            "a megabyte was taken from a guest that has credit for 64 KiB"
        );
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("end");
        assert!(all.len() < 1 << 20);
    }
    rig.eventually("the end", |s| s.open == 0);
}

#[test]
fn the_guest_may_end_first() {
    let mut rig = Rig::new("_gfirst");
    let (mut stream, peer) = rig.open_from_guest(5);
    rig.send(&peer.data(8), b"question");
    rig.send(&peer.shutdown(SHUT_SEND), &[]);
    let mut all = String::new();
    stream.read_to_string(&mut all).expect("until the end");
    assert_eq!(all, "question");
    stream.write_all(b"answer").expect("the other direction lives");
    let (header, data) = rig.receive();
    assert_eq!((header.op, &data[..]), (op::RW, &b"answer"[..]));
    drop(stream);
    assert_eq!(rig.expect(op::SHUTDOWN).flags & SHUT_SEND, SHUT_SEND);
    rig.expect(op::RST);
    rig.eventually("the end", |s| s.open == 0);
}

#[test]
fn the_host_may_end_first() {
    let mut rig = Rig::new("_hfirst");
    let (mut stream, peer) = rig.open_from_guest(5);
    stream.write_all(b"last words").expect("write");
    stream.shutdown(Shutdown::Write).expect("half close");
    let (header, data) = rig.receive();
    assert_eq!((header.op, &data[..]), (op::RW, &b"last words"[..]));
    assert_eq!(rig.expect(op::SHUTDOWN).flags, SHUT_SEND);
    rig.send(&peer.data(6), b"answer");
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).expect("the other direction lives");
    rig.send(&peer.shutdown(SHUT_BOTH), &[]);
    rig.expect(op::RST);
    assert_eq!(stream.read(&mut answer).expect("end"), 0);
    rig.eventually("the end", |s| s.open == 0);
}

#[test]
fn a_host_that_dies_is_reported_after_its_last_data() {
    let mut rig = Rig::new("_hdies");
    let (mut stream, peer) = rig.open_from_guest(5);
    stream.write_all(&pattern(0, 10_000)).expect("write");
    drop(stream);
    let mut got = Vec::new();
    let flags = loop {
        let (header, data) = rig.receive();
        got.extend(data);
        if header.op == op::SHUTDOWN && header.flags == SHUT_BOTH {
            break header.flags;
        }
    };
    assert_eq!((flags, got), (SHUT_BOTH, pattern(0, 10_000)));
    rig.send(&peer.header(op::RST), &[]);
    rig.eventually("the end", |s| s.open == 0);
    assert!(rig.poll().is_none(), "an RST is not answered");
    // A guest that does not answer is not waited for.
    let (stream, _) = rig.open_from_guest(6);
    drop(stream);
    while rig.receive().0.op != op::RST {}
    rig.eventually("the end", |s| s.open == 0);
}

#[test]
fn a_guest_that_closes_lets_the_host_read_the_rest() {
    let mut rig = Rig::new("_gcloses");
    let (mut stream, peer) = rig.open_from_guest(5);
    let mut sent = 0;
    // Until the device itself holds something.
    loop {
        rig.send(&peer.data(32 << 10), &pattern(sent, 32 << 10));
        sent += 32 << 10;
        rig.send(&peer.header(op::CREDIT_REQUEST), &[]);
        let taken = loop {
            let (header, _) = rig.receive();
            if header.op == op::CREDIT_UPDATE {
                break header.fwd_cnt;
            }
        };
        if taken as usize != sent {
            break;
        }
    }
    rig.send(&peer.shutdown(SHUT_BOTH), &[]);
    rig.send(&peer.header(op::RST), &[]);
    let listener = rig.listen(6);
    let again = Peer { host: 6, ..peer };
    rig.send(&again.header(op::REQUEST), &[]);
    rig.expect(op::RESPONSE);
    drop(listener);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).expect("the rest");
    assert_eq!(all, pattern(0, sent));
}

#[test]
fn a_guest_that_resets_cuts_the_stream() {
    let mut rig = Rig::new("_gresets");
    let (mut stream, peer) = rig.open_from_guest(5);
    rig.send(&peer.header(op::RST), &[]);
    assert_eq!(stream.read(&mut [0]).expect("end"), 0);
    rig.send(&peer.data(1), b"x");
    let reset = rig.expect(op::RST);
    assert_eq!((reset.src_port, reset.dst_port), (5, 1000));
}

#[test]
fn a_port_that_does_not_answer_times_out() {
    let mut rig = Rig::new("_silent");
    let mut stream = rig.connect(77);
    let request = rig.expect(op::REQUEST);
    assert_eq!(line(&mut stream), "", "closed without an answer");
    assert_eq!(rig.expect(op::RST).src_port, request.src_port);
    let mut stream = rig.connect(78);
    let request = rig.expect(op::REQUEST);
    rig.send(&Peer::new(request.src_port, 78).header(op::RST), &[]);
    assert_eq!(line(&mut stream), "", "refused by the guest");
    let stats = rig.device.handle().stats();
    assert_eq!((stats.refused, stats.opened, stats.open), (2, 0, 0));
}

#[test]
fn greetings_that_are_none_end_the_connection() {
    let rig = Rig::new("_greet");
    for greeting in [
        "HELLO\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "CONNECT 00000000000000000000001\n",
        "\n",
    ] {
        let path = rig.directory.path().join("v.sock");
        let mut stream = UnixStream::connect(path).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        stream.write_all(greeting.as_bytes()).expect("write");
        // What was not read makes the end an error; either way there is one.
        assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)), "{greeting:?}");
    }
    let mut slow = UnixStream::connect(rig.directory.path().join("v.sock")).expect("connect");
    slow.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    slow.write_all(b"CONN").expect("write");
    assert_eq!(slow.read(&mut [0]).expect("not waited for"), 0);
    rig.eventually("the end", |s| s.open == 0);
}

#[test]
fn streams_are_limited_and_free_their_place() {
    let mut rig = Rig::new("_limit");
    let listener = rig.listen(5);
    let mut kept = Vec::new();
    for guest in 0..8 {
        rig.send(&Peer::new(5, guest).header(op::REQUEST), &[]);
        rig.expect(op::RESPONSE);
        kept.push(listener.accept().expect("accept").0);
    }
    rig.send(&Peer::new(5, 8).header(op::REQUEST), &[]);
    assert_eq!(rig.expect(op::RST).dst_port, 8);
    let mut refused = UnixStream::connect(rig.directory.path().join("v.sock")).expect("connect");
    refused.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    assert_eq!(refused.read(&mut [0]).expect("end"), 0);
    rig.send(&Peer::new(5, 3).header(op::RST), &[]);
    rig.send(&Peer::new(5, 9).header(op::REQUEST), &[]);
    assert_eq!(rig.expect(op::RESPONSE).dst_port, 9);
    assert_eq!(rig.device.handle().stats().open, 8);
}
