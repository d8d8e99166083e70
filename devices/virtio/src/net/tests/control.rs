//! The control queue and everything that is not packets.

use proptest::prelude::*;

use super::*;

const ACKED: u64 = f::CTRL_VQ
    | f::CTRL_RX
    | f::CTRL_RX_EXTRA
    | f::CTRL_VLAN
    | f::CTRL_MAC_ADDR
    | f::CTRL_GUEST_OFFLOADS
    | f::GUEST_CSUM
    | f::GUEST_TSO4
    | f::GUEST_ANNOUNCE
    | f::STATUS
    | f::MQ;

/// A device with three pairs and its control queue running.
struct Controlled {
    net: Net,
    host: Arc<FakeHost>,
    driver: FakeDriver,
}

impl Controlled {
    fn new(features: u64) -> Self {
        let (host, _) = FakeHost::new(3);
        let mut net = Net::new(options("_ctl"), host.clone()).expect("device");
        let index = if features & f::MQ != 0 { 6 } else { 2 };
        let first = FakeDriver::new(64, false);
        let driver = FakeDriver::beside(&first, index);
        net.activate(first.context(features)).expect("activate");
        net.start_queue(driver.queue()).expect("control");
        Self { net, host, driver }
    }

    /// Sends a command and returns the answer.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        let at = buffer(6, 0);
        let ack = buffer(6, 100);
        self.driver.ram().write_slice(bytes, GuestAddress(at)).expect("command");
        self.driver.ram().write_obj(0xffu8, GuestAddress(ack)).expect("ack");
        self.driver
            .add(&[Desc::readable(at, bytes.len() as u32), Desc::writable(ack, 1)]);
        self.driver.kick();
        assert_eq!(self.driver.wait_used().map(|u| u.1), Some(1));
        self.driver.ram().read_obj(GuestAddress(ack)).expect("ack")
    }

    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        self.net.read_config(0, &mut config);
        config
    }
}

#[test]
fn queue_pairs_come_and_go() {
    let mut c = Controlled::new(ACKED);
    assert_eq!(*c.host.active.lock().unwrap(), [true, false, false]);
    assert_eq!(c.command(&[4, 0, 3, 0]), 0);
    assert_eq!(*c.host.active.lock().unwrap(), [true, true, true]);
    for bad in [0u8, 4, 200] {
        assert_eq!(c.command(&[4, 0, bad, 0]), 1, "{bad} pairs");
    }
    assert_eq!(c.command(&[4, 0, 2, 0]), 0);
    assert_eq!(*c.host.active.lock().unwrap(), [true, true, false]);
    assert_eq!(c.net.handle().state().pairs, 2);
    assert_eq!(c.command(&[4, 1, 2, 0]), 1, "no hash");
    assert_eq!(c.command(&[4, 0, 2]), 1, "half a number");
}

#[test]
fn offloads_follow_the_driver() {
    let mut c = Controlled::new(ACKED);
    assert_eq!(*c.host.offloads.lock().unwrap(), Offloads::CSUM | Offloads::TSO4);
    let mut set = |bits: u64| c.command(&[&[5, 0][..], &bits.to_le_bytes()].concat());
    assert_eq!(set(f::GUEST_CSUM), 0);
    assert_eq!(set(f::GUEST_CSUM | f::GUEST_TSO6), 1, "not negotiated");
    assert_eq!(set(1 << 40), 1, "no offload");
    assert_eq!(*c.host.offloads.lock().unwrap(), Offloads::CSUM);
    assert_eq!(c.net.handle().state().offloads, f::GUEST_CSUM);
}

#[test]
fn addresses_and_filters_are_taken() {
    let mut c = Controlled::new(ACKED);
    assert_eq!(c.command(&[1, 1, 2, 3, 4, 5, 6, 7]), 0);
    assert_eq!(c.config()[..6], [2, 3, 4, 5, 6, 7]);
    assert_eq!(c.command(&[1, 1, 2, 3, 4]), 1, "half an address");
    assert_eq!(c.command(&[0, 0, 1]), 0);
    assert_eq!(c.command(&[0, 5, 1]), 0);
    assert_eq!(c.command(&[0, 6, 1]), 1);
    let mode = c.net.handle().state().rx_mode;
    assert!(mode.promiscuous && mode.no_broadcast && !mode.all_multicast);
    let tables = [&[1, 0, 1, 0, 0, 0][..], &[2; 6], &[2, 0, 0, 0], &[3; 12]].concat();
    assert_eq!(c.command(&tables), 0);
    assert_eq!(c.command(&tables[..tables.len() - 1]), 1, "a table cut short");
    assert_eq!(c.command(&[1, 0, 255, 255, 255, 255]), 1, "more than there is");
    assert_eq!(c.command(&[2, 0, 0xff, 0x0f]), 0);
    assert_eq!(c.command(&[2, 1, 0xff, 0x0f]), 0);
    assert_eq!(c.command(&[2, 0, 0x00, 0x10]), 1, "no VLAN id");
    assert_eq!(c.command(&[9, 9]), 1);
    assert_eq!(c.command(&[1]), 1);
    c.net.reset();
    assert_eq!(c.config()[..6], [2, 0, 0, 0, 0, 1], "back to its own");
}

#[test]
fn only_what_was_negotiated_is_obeyed() {
    let mut c = Controlled::new(f::CTRL_VQ);
    for command in [
        &[0, 0, 1][..],
        &[0, 2, 1],
        &[1, 1, 2, 3, 4, 5, 6, 7],
        &[2, 0, 1, 0],
        &[3, 0],
        &[4, 0, 1, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(c.command(command), 1, "{command:?}");
    }
}

#[test]
fn a_command_without_room_for_its_answer_breaks_the_device() {
    let mut c = Controlled::new(ACKED);
    c.driver.add(&[Desc::readable(buffer(6, 0), 4)]);
    c.driver.kick();
    eventually("the mark", || c.driver.interrupt.needs_reset_count() == 1);
    assert!(ticks_used("_ctl_ctrl") < 5, "it must wait, not spin");
}

#[test]
fn link_and_announcement_reach_the_driver() {
    let mut c = Controlled::new(ACKED);
    let handle = c.net.handle();
    assert_eq!(c.config()[6..8], [1, 0]);
    handle.set_link(false).expect("link");
    handle.set_link(false).expect("twice is once");
    assert_eq!((c.config()[6], c.driver.interrupt.config_count()), (0, 1));
    handle.set_link(true).expect("link");
    assert!(handle.announce().expect("announce"));
    assert_eq!((c.config()[6], c.driver.interrupt.config_count()), (3, 3));
    assert_eq!(c.command(&[3, 0]), 0);
    assert_eq!(c.config()[6], 1);
    c.net.reset();
    assert!(!handle.announce().expect("announce"), "nobody to ask");
    assert!(!Controlled::new(f::CTRL_VQ).net.handle().announce().expect("announce"));
}

#[test]
fn configuration_and_features_fit_the_host() {
    let (host, _) = FakeHost::new(3);
    let net = Net::new(options("_cfg"), host.clone()).expect("device");
    let mut config = [0xee; 16];
    net.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 3, 0, 0xdc, 5, 0, 0, 0, 0]);
    assert_eq!(net.queue_sizes(), [256, 256, 256, 256, 256, 256, 64]);
    let all = f::MQ | f::MTU | f::HOST_USO | f::HOST_TSO4 | f::CSUM | f::HOST_UFO | feature::COMMON;
    assert_eq!(net.features() & all, all);
    let (single, _) = FakeHost::new(1);
    let plain = NetOptions {
        mtu: Some(9000),
        offloads: OffloadGroups {
            csum: false,
            ..OffloadGroups::default()
        },
        ..options("_cfg")
    };
    let net = Net::new(plain, single).expect("device");
    assert_eq!(net.features() & (f::MQ | f::CSUM | f::GUEST_CSUM | f::HOST_TSO4), 0);
    net.read_config(10, &mut config[..2]);
    assert_eq!(u16::from_le_bytes([config[0], config[1]]), 9000);
    let refuse = |options| Net::new(options, host.clone()).map(|_| ()).expect_err("refused");
    for queue_size in [0, 1, 100] {
        let error = refuse(NetOptions {
            queue_size,
            ..options("_cfg")
        });
        assert_eq!(error, NetOptionsError::QueueSize(queue_size));
    }
    let group = NetOptions {
        mac: [1, 0, 0x5e, 0, 0, 1],
        ..options("_cfg")
    };
    assert!(refuse(group).to_string().starts_with("01:00:5e:00:00:01 is"));
    let small = NetOptions {
        mtu: Some(67),
        ..options("_cfg")
    };
    assert_eq!(refuse(small), NetOptionsError::Mtu(67));
}

#[test]
fn saved_state_continues_elsewhere() {
    let mut c = Controlled::new(ACKED);
    assert_eq!(c.command(&[1, 1, 2, 3, 4, 5, 6, 7]), 0);
    assert_eq!(c.command(&[4, 0, 2, 0]), 0);
    assert_eq!(c.command(&[&[5, 0][..], &f::GUEST_CSUM.to_le_bytes()].concat()), 0);
    let state = c.net.handle().state();
    let text = serde_json::to_string(&state).expect("json");
    let (host, _) = FakeHost::new(3);
    let mut net = Net::new(options("_new"), host.clone()).expect("device");
    net.restore(serde_json::from_str(&text).expect("json"));
    net.activate(c.driver.context(ACKED)).expect("activate");
    assert_eq!(net.handle().state(), state);
    assert_eq!(*host.active.lock().unwrap(), [true, true, false]);
    assert_eq!(*host.offloads.lock().unwrap(), Offloads::CSUM);
    // A state that does not fit is bent, not believed.
    net.reset();
    net.restore(NetStateV1 {
        pairs: 77,
        offloads: u64::MAX,
        ..state
    });
    net.activate(c.driver.context(ACKED)).expect("activate");
    assert_eq!(net.handle().state().pairs, 3);
    assert_eq!(net.handle().state().offloads, f::GUEST_CSUM | f::GUEST_TSO4);
}

#[test]
fn out_of_turn_calls_are_refused() {
    let (host, _) = FakeHost::new(1);
    let mut net = Net::new(options("_turn"), host).expect("device");
    let driver = FakeDriver::new(64, false);
    assert!(matches!(net.start_queue(driver.queue()), Err(ActivateError::Driver(_))));
    assert!(net.stop_queue(0).is_none());
    net.activate(driver.context(0)).expect("activate");
    assert!(matches!(net.activate(driver.context(0)), Err(ActivateError::Driver(_))));
    let far = FakeDriver::beside(&driver, 9);
    assert!(matches!(net.start_queue(far.queue()), Err(ActivateError::Driver(_))));
    assert!(net.stop_queue(9).is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_command_gets_an_answer(bytes in prop::collection::vec(any::<u8>(), 1..64), class in 0u8..7, code in 0u8..7) {
        let mut c = Controlled::new(ACKED);
        let answer = c.command(&bytes);
        prop_assert!(answer <= 1);
        let mut typed = bytes;
        typed.insert(0, code);
        typed.insert(0, class);
        prop_assert!(c.command(&typed) <= 1);
        prop_assert_eq!(c.driver.interrupt.needs_reset_count(), 0);
        prop_assert!((1..=3).contains(&c.net.handle().state().pairs));
    }
}
