//! What a guest can do wrong, and stopping and starting.

use proptest::prelude::*;

use super::*;

#[test]
fn what_belongs_to_no_stream_is_refused() {
    let mut rig = Rig::new("_none");
    for op in [
        op::RESPONSE,
        op::RW,
        op::SHUTDOWN,
        op::CREDIT_UPDATE,
        op::CREDIT_REQUEST,
        0,
        99,
    ] {
        rig.send(&Peer::new(5, 6).header(op), &[]);
        let reset = rig.expect(op::RST);
        assert_eq!((reset.src_port, reset.dst_port), (5, 6), "operation {op}");
    }
    rig.send(&Peer::new(5, 6).header(op::REQUEST), &[]);
    rig.expect(op::RST);
    let datagram = Header {
        kind: 3,
        ..Peer::new(5, 6).header(op::REQUEST)
    };
    rig.send(&datagram, &[]);
    assert_eq!(rig.expect(op::RST).kind, 3);
    let elsewhere = Header {
        dst_cid: 77,
        ..Peer::new(5, 6).header(op::REQUEST)
    };
    rig.send(&elsewhere, &[]);
    let (reset, _) = std::iter::from_fn(|| {
        std::thread::sleep(Duration::from_millis(1));
        Some(rig.poll())
    })
    .take(5000)
    .flatten()
    .next()
    .expect("an answer");
    assert_eq!((reset.op, reset.src_cid), (op::RST, 77));
    // Neither an RST nor a packet with another's address is answered.
    rig.send(&Peer::new(5, 6).header(op::RST), &[]);
    let forged = Header {
        src_cid: 43,
        ..Peer::new(5, 6).header(op::REQUEST)
    };
    rig.send(&forged, &[]);
    rig.send_raw(&[0; HEADER_LEN - 1]);
    assert!(rig.tx.wait_used().is_some());
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.poll().is_none());
    let stats = rig.device.handle().stats();
    assert_eq!((stats.refused, stats.dropped, stats.open), (1, 4, 0));
    assert_eq!(rig.rx.interrupt.needs_reset_count(), 0);
}

#[test]
fn wrong_moves_reset_the_stream() {
    let wrong: [(u16, u32, &[u8]); 4] = [
        (op::REQUEST, 0, b""),
        (op::RESPONSE, 0, b""),
        (op::RW, 100, b"less than it says"),
        (99, 0, b""),
    ];
    for (port, (op, len, data)) in (10..).zip(wrong) {
        let mut rig = Rig::new("_wrong");
        let (mut stream, peer) = rig.open_from_guest(port);
        let header = Header { len, ..peer.header(op) };
        rig.send(&header, data);
        rig.expect(op::RST);
        assert_eq!(stream.read(&mut [0]).expect("end"), 0);
    }
    let mut rig = Rig::new("_wrong");
    let (mut stream, peer) = rig.open_from_guest(20);
    rig.send(&peer.shutdown(SHUT_SEND), &[]);
    rig.send(&peer.data(1), b"x");
    rig.expect(op::RST);
    assert_eq!(stream.read(&mut [0]).expect("end"), 0);
    let (mut stream, peer) = rig.open_from_guest(21);
    rig.send(&peer.shutdown(SHUT_RECEIVE), &[]);
    assert!(stream.write_all(&[0; 10]).is_err(), "the guest does not read any more");
}

#[test]
fn a_guest_that_takes_no_packets_is_not_answered_without_end() {
    let mut rig = Rig::without_buffers("_deaf");
    let mut done = 0;
    for port in 0..600 {
        rig.send_raw(&Peer::new(5, port).header(op::RW).to_bytes());
        // The ring holds 64; what is taken makes room for more.
        for _ in 0..50 {
            if rig.tx.used().is_some() {
                done += 1;
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // Those that wait must not lie over each other.
        if port >= done + 3 {
            break;
        }
    }
    assert_eq!(done, 256, "as many refusals as are kept");
    assert!(ticks_used("_deaf") < 5, "it must wait, not spin");
    rig.provide(SLOTS);
    for port in 0..260 {
        assert_eq!(rig.expect(op::RST).dst_port, port, "in order");
    }
}

#[test]
fn without_buffers_the_host_waits() {
    let mut rig = Rig::without_buffers("_nobuf");
    let mut stream = rig.connect(5);
    assert!(ticks_used("_nobuf") < 5, "it must wait, not spin");
    rig.provide(2);
    let request = rig.expect(op::REQUEST);
    rig.send(&Peer::new(request.src_port, 5).header(op::RESPONSE), &[]);
    line(&mut stream);
    stream.write_all(&pattern(0, 20_000)).expect("write");
    let mut got = Vec::new();
    while got.len() < 20_000 {
        got.extend(rig.receive().1);
    }
    assert_eq!(got, pattern(0, 20_000));
}

#[test]
fn streams_outlive_a_stop() {
    let mut rig = Rig::new("_pause");
    let (mut stream, peer) = rig.open_from_guest(5);
    stream.write_all(b"before").expect("write");
    assert_eq!(rig.receive().1, b"before");
    let queues = [rig.device.stop_queue(0), rig.device.stop_queue(1)];
    assert!(rig.device.stop_queue(0).is_none());
    stream.write_all(b"meanwhile").expect("write");
    rig.send_raw(&[&peer.data(5).to_bytes()[..], b"hello"].concat());
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.poll().is_none() && rig.tx.used().is_none());
    for queue in queues {
        let queue = queue.expect("queue");
        assert_eq!(queue.state().next_avail, queue.state().next_used, "nothing in flight");
        rig.device.start_queue(queue).expect("start");
    }
    assert_eq!(rig.receive().1, b"meanwhile");
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).expect("answer");
    assert_eq!(&answer, b"hello");
    rig.device.stop_queue(0);
    rig.device.stop_queue(1);
    rig.device.reset();
    assert_eq!(stream.read(&mut answer).expect("a reset ends it"), 0);
    assert_eq!(rig.device.handle().stats().open, 0);
    let context = rig.rx.context(0);
    rig.device.activate(context).expect("again");
}

#[test]
fn a_moved_guest_is_told() {
    let mut rig = Rig::new("_moved");
    let (mut stream, _) = rig.open_from_guest(5);
    let (rx, tx) = (rig.device.stop_queue(0), rig.device.stop_queue(1));
    rig.device.restore();
    assert_eq!(stream.read(&mut [0]).expect("gone"), 0);
    let mut event = FakeDriver::beside(&rig.rx, 2);
    rig.device.start_queue(event.queue()).expect("event");
    rig.device.start_queue(rx.expect("rx")).expect("rx");
    rig.device.start_queue(tx.expect("tx")).expect("tx");
    std::thread::sleep(Duration::from_millis(20));
    event
        .ram()
        .write_obj(0xffff_ffffu32, GuestAddress(0x21_0000))
        .expect("fill");
    event.add(&[Desc::writable(0x21_0000, 8)]);
    event.add(&[Desc::writable(0x21_0000 + 8, 8)]);
    event.kick();
    assert_eq!(event.wait_used().map(|u| u.1), Some(4));
    assert_eq!(event.ram().read_obj::<u32>(GuestAddress(0x21_0000)).expect("event"), 0);
    assert!(rig.rx.interrupt.wait_queue(2));
    event.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert!(event.used().is_none(), "once");
}

#[test]
fn buffers_that_hold_no_header_break_the_device() {
    let mut rig = Rig::without_buffers("_short");
    rig.rx.add(&[Desc::writable(0x1_0000, HEADER_LEN as u32 - 1)]);
    rig.rx.kick();
    rig.send_raw(&Peer::new(5, 6).header(op::RW).to_bytes());
    for _ in 0..5000 {
        if rig.rx.interrupt.needs_reset_count() > 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(rig.rx.interrupt.needs_reset_count(), 1);
    assert!(ticks_used("_short") < 5, "it must wait, not spin");
}

#[test]
fn out_of_turn_calls_are_refused() {
    let directory = TempDir::new().expect("directory");
    let mut device = Vsock::new(&options(&directory, "_turn")).expect("device");
    let driver = FakeDriver::new(64, false);
    assert!(matches!(
        device.start_queue(driver.queue()),
        Err(ActivateError::Driver(_))
    ));
    device.activate(driver.context(0)).expect("activate");
    assert!(matches!(
        device.activate(driver.context(0)),
        Err(ActivateError::Driver(_))
    ));
    let far = FakeDriver::beside(&driver, 3);
    assert!(matches!(device.start_queue(far.queue()), Err(ActivateError::Driver(_))));
    assert!(device.stop_queue(3).is_none());
}

fn any_header() -> impl Strategy<Value = Header> {
    let port = prop_oneof![Just(5u32), Just(6), Just(7), any::<u32>()];
    let len = prop_oneof![4 => 0u32..3000, 1 => any::<u32>()];
    let cid = prop_oneof![9 => Just(u64::from(CID)), 1 => any::<u64>()];
    let kind = prop_oneof![9 => Just(STREAM), 1 => any::<u16>()];
    let credit = (
        prop_oneof![Just(64u32 << 10), any::<u32>()],
        prop_oneof![Just(0u32), any::<u32>()],
    );
    (cid, port, 0u32..3, len, kind, 0u16..9, 0u32..4, credit).prop_map(
        |(src_cid, dst_port, src_port, len, kind, op, flags, (buf_alloc, fwd_cnt))| Header {
            src_cid,
            dst_cid: HOST_CID,
            src_port,
            dst_port,
            len,
            kind,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn no_packets_kill_the_device(packets in prop::collection::vec((any_header(), 0usize..3000), 1..40)) {
        let mut rig = Rig::new("_anyp");
        let listeners = [rig.listen(5), rig.listen(6)];
        for (header, data) in &packets {
            rig.send(header, &vec![7; *data]);
            while rig.poll().is_some() {}
        }
        let stats = rig.device.handle().stats();
        prop_assert!(stats.open <= 8);
        prop_assert_eq!(stats.tx_packets, packets.len() as u64);
        prop_assert_eq!(rig.rx.interrupt.needs_reset_count(), 0);
        drop(listeners);
        prop_assert!(rig.device.stop_queue(0).is_some(), "the thread died");
    }
}
