//! Packets both ways.

use proptest::prelude::*;

use super::*;

#[test]
fn packets_leave_in_order_with_their_headers() {
    for event_idx in [false, true] {
        let mut rig = Rig::new("_order", 0, event_idx);
        for i in 0..20 {
            rig.send(i, &packet(i as u8, 60 + 50 * i));
        }
        for i in 0..20 {
            assert_eq!(rig.receive_on_wire(), packet(i as u8, 60 + 50 * i), "packet {i}");
        }
        for _ in 0..20 {
            assert!(matches!(rig.tx.wait_used(), Some((_, 0))));
        }
        eventually("an interrupt", || rig.tx.interrupt.queue_count(1) > 0);
        let sent = rig.net.handle().stats().tx;
        let bytes = (0..20u64).map(|i| 60 + 50 * i - 12).sum();
        assert_eq!((sent.packets, sent.bytes, sent.dropped), (20, bytes, 0));
    }
}

#[test]
fn packets_of_no_frame_are_dropped_and_counted() {
    let mut rig = Rig::new("_runt", 0, false);
    for len in [1, HEADER_LEN, HEADER_LEN + 13] {
        rig.send(0, &packet(1, len));
    }
    rig.tx.add(&[Desc::readable(buffer(1, 0), 70000)]);
    rig.tx.add(&[Desc::writable(buffer(1, 0), 100)]);
    rig.tx.kick();
    for _ in 0..5 {
        assert!(matches!(rig.tx.wait_used(), Some((_, 0))));
    }
    rig.send(1, &packet(2, 64));
    assert_eq!(rig.receive_on_wire(), packet(2, 64), "the next one leaves");
    rig.tx.wait_used().expect("completed");
    let sent = rig.net.handle().stats().tx;
    assert_eq!((sent.packets, sent.dropped), (1, 5));
    assert_eq!(rig.tx.interrupt.needs_reset_count(), 0);
}

#[test]
fn a_full_host_makes_the_guest_wait_and_loses_nothing() {
    let mut rig = Rig::new("_full", 0, false);
    // A socket holds some 200 KiB; these are four times as much.
    for i in 0..30 {
        rig.send(15 * i, &packet(i as u8, 30_000));
    }
    let mut used = 0;
    while used < 3 {
        rig.tx.wait_used().expect("some leave at once");
        used += 1;
    }
    assert!(ticks_used("_full_qp0") < 5, "it must wait, not spin");
    assert!(
        rig.net.handle().stats().tx.packets < 30,
        "the socket holds less than was sent"
    );
    for i in 0..30 {
        assert_eq!(rig.receive_on_wire(), packet(i as u8, 30_000), "packet {i}");
    }
    eventually("completion of all", || {
        used += usize::from(rig.tx.used().is_some());
        used == 30
    });
    assert_eq!(rig.net.handle().stats().tx.dropped, 0);
}

#[test]
fn a_large_packet_fills_mergeable_buffers() {
    for event_idx in [false, true] {
        let mut rig = Rig::new("_merge", f::MRG_RXBUF, event_idx);
        rig.provide(0..60, 1526);
        let big = packet(7, triarch_net::MAX_PACKET);
        rig.wire.send(&big).expect("send");
        rig.wire.send(&packet(9, 100)).expect("send");
        let chains = big.len().div_ceil(1526);
        let mut got = Vec::new();
        for slot in 0..chains {
            let (_, len) = rig.rx.wait_used().expect("used");
            got.extend(rig.read(slot, len as usize));
        }
        assert_eq!(got.len(), big.len());
        assert_eq!(got[10..12], (chains as u16).to_le_bytes());
        assert_eq!(got[12..], big[12..]);
        let (_, len) = rig.rx.wait_used().expect("the second");
        assert_eq!(len, 100);
        let second = rig.read(chains, 100);
        assert_eq!((&second[10..12], &second[12..]), (&[1, 0][..], &packet(9, 100)[12..]));
        let received = rig.net.handle().stats().rx;
        assert_eq!((received.packets, received.bytes), (2, (big.len() + 100 - 24) as u64));
    }
}

#[test]
fn the_header_may_be_cut_anywhere() {
    let mut rig = Rig::new("_cut", f::MRG_RXBUF, false);
    let at = buffer(0, 0);
    rig.rx.add(&[
        Desc::writable(at, 11),
        Desc::writable(at + 11, 5),
        Desc::writable(at + 16, 84),
    ]);
    rig.rx.kick();
    rig.wire.send(&packet(3, 100)).expect("send");
    assert_eq!(rig.rx.wait_used().map(|u| u.1), Some(100));
    let got = rig.read(0, 100);
    assert_eq!((&got[10..12], &got[12..]), (&[1, 0][..], &packet(3, 100)[12..]));
}

#[test]
fn what_does_not_fit_is_dropped_and_the_buffer_used_again() {
    for features in [0, f::MRG_RXBUF] {
        let mut rig = Rig::new("_fit", features, false);
        rig.provide(0..1, 100);
        rig.wire.send(&packet(1, 101)).expect("send");
        rig.wire.send(&[1; 5]).expect("send");
        rig.wire.send(&packet(2, 100)).expect("send");
        assert_eq!(rig.rx.wait_used().map(|u| u.1), Some(100));
        let got = rig.read(0, 100);
        assert_eq!((&got[10..12], &got[12..]), (&[1, 0][..], &packet(2, 100)[12..]));
        let received = rig.net.handle().stats().rx;
        assert_eq!((received.packets, received.dropped), (1, 2), "features {features:#x}");
    }
}

#[test]
fn without_buffers_packets_wait_and_nobody_spins() {
    let mut rig = Rig::new("_wait", 0, false);
    for i in 0..3 {
        rig.wire.send(&packet(i, 80)).expect("send");
    }
    assert!(ticks_used("_wait_qp0") < 5, "it must wait, not spin");
    rig.provide(0..2, 1526);
    assert!(rig.rx.wait_used().is_some() && rig.rx.wait_used().is_some());
    assert_eq!(rig.read(1, 80)[12..], packet(1, 80)[12..]);
    assert!(ticks_used("_wait_qp0") < 5, "with a packet left and no buffer");
    assert!(rig.rx.used().is_none());
    rig.provide(2..3, 1526);
    assert!(rig.rx.wait_used().is_some());
    assert_eq!(rig.read(2, 80)[12..], packet(2, 80)[12..]);
}

#[test]
fn a_host_that_goes_away_costs_packets_only() {
    let mut rig = Rig::new("_gone", 0, false);
    rig.provide(0..4, 1526);
    rig.wire.send(&packet(1, 80)).expect("send");
    assert!(rig.rx.wait_used().is_some());
    let (other, _) = UnixDatagram::pair().expect("sockets");
    drop(std::mem::replace(&mut rig.wire, other));
    rig.send(0, &packet(1, 80));
    assert!(rig.tx.wait_used().is_some(), "sent into the void");
    rig.provide(4..5, 1526);
    assert!(ticks_used("_gone_qp0") < 5, "it must wait, not spin");
    assert_eq!(rig.net.handle().stats().tx.dropped, 1);
    assert!(rig.net.stop_queue(0).is_some() && rig.net.stop_queue(1).is_some());
}

#[test]
fn stopped_queues_come_back_as_far_as_worked_off() {
    let mut rig = Rig::new("_stop", f::MRG_RXBUF, true);
    rig.provide(0..10, 1526);
    rig.wire.send(&packet(1, 3000)).expect("send");
    assert!(rig.rx.wait_used().is_some() && rig.rx.wait_used().is_some());
    rig.send(0, &packet(4, 64));
    assert!(rig.tx.wait_used().is_some());
    let rx = rig.net.stop_queue(0).expect("rx");
    assert_eq!((rx.state().next_avail, rx.state().next_used), (2, 2));
    rig.send(1, &packet(5, 64));
    assert_eq!(rig.receive_on_wire(), packet(4, 64));
    assert_eq!(rig.receive_on_wire(), packet(5, 64), "the other queue goes on");
    assert!(rig.tx.wait_used().is_some());
    let tx = rig.net.stop_queue(1).expect("tx");
    assert_eq!((tx.state().next_avail, tx.state().next_used), (2, 2));
    assert!(rig.net.stop_queue(1).is_none());
    rig.wire.send(&packet(6, 700)).expect("send");
    rig.send(2, &packet(7, 64));
    assert!(rig.tx.used().is_none() && rig.rx.used().is_none());
    rig.net.start_queue(rx).expect("rx");
    rig.net.start_queue(tx).expect("tx");
    assert_eq!(rig.rx.wait_used().map(|u| u.1), Some(700), "no notification needed");
    assert_eq!(rig.read(2, 700)[12..], packet(6, 700)[12..]);
    assert_eq!(rig.receive_on_wire(), packet(7, 64));
}

#[test]
fn a_driver_that_breaks_a_ring_breaks_its_device_only() {
    let mut rig = Rig::new("_broken", 0, false);
    rig.rx.add(&[Desc::writable(buffer(0, 0), 11)]);
    rig.rx.kick();
    eventually("the mark", || rig.rx.interrupt.needs_reset_count() == 1);
    rig.wire.send(&packet(1, 80)).expect("send");
    assert!(ticks_used("_broken_qp0") < 5, "it must wait, not spin");
    rig.send(0, &packet(1, 80));
    assert_eq!(rig.receive_on_wire(), packet(1, 80), "the other queue is whole");
    rig.net.stop_queue(0).expect("rx");
    rig.net.stop_queue(1).expect("tx");
    rig.net.reset();
    let context = rig.rx.context(0);
    rig.net.activate(context).expect("again");
}

fn any_desc() -> impl Strategy<Value = Desc> {
    let addr = prop_oneof![8 => 0x8000u64..0x2_0000, 1 => any::<u64>()];
    let len = prop_oneof![8 => 0u32..3000, 1 => any::<u32>()];
    let flags = prop_oneof![Just(0u16), Just(2), Just(1), Just(3), Just(4), 0u16..8];
    (addr, len, flags, 0u16..20).prop_map(|(addr, len, flags, next)| Desc { addr, len, flags, next })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn no_ring_contents_panic_a_worker(
        rx in prop::collection::vec(any_desc(), 16),
        tx in prop::collection::vec(any_desc(), 16),
        heads in prop::collection::vec(0u16..18, 0..12),
        packets in prop::collection::vec(0usize..3000, 0..6),
        mergeable in any::<bool>(),
    ) {
        let features = if mergeable { f::MRG_RXBUF } else { 0 };
        let (host, wires) = FakeHost::new(1);
        let mut net = Net::new(options("_any"), host).expect("device");
        let mut rxd = FakeDriver::new(16, false);
        let mut txd = FakeDriver::beside(&rxd, 1);
        rxd.write_descriptors(&rx);
        txd.write_descriptors(&tx);
        for head in &heads {
            rxd.offer(*head);
            txd.offer(*head);
        }
        for len in &packets {
            wires[0].send(&vec![1; *len]).expect("send");
        }
        net.activate(rxd.context(features)).expect("activate");
        net.start_queue(rxd.queue()).expect("rx");
        net.start_queue(txd.queue()).expect("tx");
        std::thread::sleep(Duration::from_millis(5));
        let (rxq, txq) = (net.stop_queue(0), net.stop_queue(1));
        prop_assert!(rxq.is_some() && txq.is_some(), "a worker died");
        let offered = heads.len() as u16;
        for queue in [rxq, txq].into_iter().flatten() {
            let state = queue.state();
            // Every chain popped was completed or put back, but for the one that broke the queue.
            let lost = state.next_avail.wrapping_sub(state.next_used);
            prop_assert!(queue.faulted() || lost == 0, "{:?}", state);
            prop_assert!(state.next_avail <= offered);
        }
    }
}
