//! What differs between kinds of device.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use triarch_device_core::{NoSandbox, Sandbox};
use triarch_vhost_protocol::{ConfigRange, PROTOCOL_FEATURES, Payload, Request, protocol};
use triarch_virtio::mock::{Desc, FakeDriver};
use triarch_virtio::net::{NetCounters, NetPort, OffloadGroups, features as f};
use triarch_virtio::{DeviceId, VirtioDevice, feature};
use vm_memory::{Bytes, GuestAddress};

use super::fake::{Conversation, FakeDaemon, Received};
use crate::{DaemonFs, DaemonGeneric, DaemonNet, DataPath, Kind, LinkState, NetOptions, OnDisconnect, Peer, VhostUser};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const THEIRS: [u8; 6] = [2, 9, 9, 9, 9, 9];

/// A device with its daemon.
struct Rig {
    device: VhostUser,
    // Last: the device talks to it until it ends.
    _daemon: FakeDaemon,
    _dir: tempfile::TempDir,
}

impl Rig {
    /// Requests pass through the VMM. Each message goes to `twist` first.
    fn new(
        kind: Arc<dyn Kind>,
        on_disconnect: OnDisconnect,
        twist: impl Fn(&mut Conversation, &Received) -> bool + Send + Sync + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let daemon = FakeDaemon::start(dir.path(), twist);
        let options = crate::PeerOptions {
            on_disconnect,
            data_path: DataPath::Relay,
            ..daemon.options()
        };
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let peer = Peer::open("_dev0", options, kind, None, &sandbox).expect("a daemon");
        let device = VhostUser::new("_dev0", peer, &sandbox, Arc::new(|_| ())).expect("a device");
        Self {
            device,
            _daemon: daemon,
            _dir: dir,
        }
    }

    fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.device.read_config(offset, &mut bytes);
        bytes
    }
}

/// Answers questions about features, protocol features and queues with these.
fn offers(talk: &mut Conversation, received: &Received, features: u64, protocol: u64, queues: u64) -> bool {
    let answer = match received.request {
        request if request == Request::GET_FEATURES as u32 => PROTOCOL_FEATURES | feature::VERSION_1 | features,
        request if request == Request::GET_PROTOCOL_FEATURES as u32 => protocol,
        request if request == Request::GET_QUEUE_NUM as u32 => queues,
        _ => return false,
    };
    talk.reply(received.request, &answer.encode());
    true
}

fn net(mac: Option<[u8; 6]>, counters: NetCounters) -> Arc<DaemonNet> {
    net_with(1, mac, counters)
}

fn net_with(pairs: u16, mac: Option<[u8; 6]>, counters: NetCounters) -> Arc<DaemonNet> {
    let options = NetOptions {
        pairs,
        queue_size: 64,
        mac,
        fallback_mac: MAC,
        mtu: Some(1400),
        offloads: OffloadGroups {
            tso: false,
            ..OffloadGroups::default()
        },
    };
    Arc::new(DaemonNet::new(options, counters))
}

#[test]
fn an_interface_is_the_vmms_and_its_packets_the_daemons() {
    let mtu = Arc::new(Mutex::new(0));
    let told = mtu.clone();
    let counters = NetCounters::new(1);
    let rig = Rig::new(
        net(None, counters.clone()),
        OnDisconnect::Stall,
        move |talk, received| {
            if received.request == Request::NET_SET_MTU as u32 {
                *told.lock().expect("lock") = u16::from_le_bytes([received.payload[0], received.payload[1]]);
            }
            if received.request == Request::SET_VRING_ENABLE as u32 && received.payload[0] == 1 {
                // The transmit queue.
                talk.reply(received.request, &0u64.encode());
                talk.wait_offered(1);
                talk.put_used(0, talk.head(0).into());
                talk.set_used(1);
                return true;
            }
            let features = f::CSUM | f::HOST_TSO4 | f::MRG_RXBUF | f::CTRL_GUEST_OFFLOADS;
            offers(talk, received, features, protocol::REPLY_ACK | protocol::NET_MTU, 1)
        },
    );
    let mut device = rig.device;
    assert_eq!((device.id(), device.queue_sizes()), (DeviceId::Net, &[64, 64, 64][..]));
    let wanted = f::CSUM | f::MRG_RXBUF | f::MTU | NetPort::FEATURES;
    let rings = feature::VERSION_1 | feature::EVENT_IDX | feature::RING_RESET;
    assert_eq!(device.features(), wanted | rings);
    let mut config = [0; 12];
    device.read_config(0, &mut config);
    assert_eq!((&config[..6], &config[6..]), (&MAC[..], &[1, 0, 1, 0, 0x78, 5][..]));

    let receive = FakeDriver::sharing(64, true);
    let mut transmit = FakeDriver::beside(&receive, 1);
    let mut control = FakeDriver::beside(&receive, 2);
    device.activate(receive.context(wanted)).expect("activate");
    for driver in [&receive, &transmit, &control] {
        device.start_queue(driver.queue()).expect("start");
    }
    let mut receive = receive;
    receive.add(&[Desc::writable(0x9000, 1500)]);
    receive.kick();
    let head = transmit.add(&[Desc::readable(0x8000, 12 + 60)]);
    transmit.kick();
    assert_eq!(transmit.wait_used(), Some((head, 0)));
    assert_eq!((counters.read()[0].tx.packets, counters.read()[0].tx.bytes), (1, 60));
    assert_eq!(*mtu.lock().expect("lock"), 1400);
    // The driver sets another address; no daemon is asked.
    receive
        .ram()
        .write_slice(&[1, 1, 2, 0, 0, 0, 0, 8], GuestAddress(0xa000))
        .expect("command");
    let head = control.add(&[Desc::readable(0xa000, 8), Desc::writable(0xa100, 1)]);
    control.kick();
    assert_eq!(control.wait_used(), Some((head, 1)));
    device.read_config(0, &mut config);
    assert_eq!(config[..6], [2, 0, 0, 0, 0, 8]);
    // Nobody waits for a packet to come.
    let begun = Instant::now();
    for index in 0..3 {
        assert!(device.stop_queue(index).is_some(), "{index}");
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    device.reset();
    device.read_config(0, &mut config);
    assert_eq!(config[..6], MAC);
}

#[test]
fn a_daemon_hears_of_all_rings_before_it_has_one() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let (seen, last) = (heard.clone(), Arc::new(Mutex::new(None)));
    let told = last.clone();
    let rig = Rig::new(
        net(None, NetCounters::new(1)),
        OnDisconnect::Stall,
        move |talk, received| {
            let mut told = told.lock().expect("lock");
            if received.request == Request::SET_VRING_CALL as u32 && told.is_none() {
                seen.lock().expect("lock").push(received.payload[0]);
            }
            if received.request == Request::SET_VRING_ENABLE as u32 {
                *told = Some(received.payload[0]);
            }
            offers(talk, received, 0, protocol::REPLY_ACK, 1)
        },
    );
    let mut device = rig.device;
    let receive = FakeDriver::sharing(64, true);
    let transmit = FakeDriver::beside(&receive, 1);
    device.activate(receive.context(0)).expect("activate");
    for driver in [&receive, &transmit] {
        device.start_queue(driver.queue()).expect("start");
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while *last.lock().expect("lock") != Some(1) {
        assert!(Instant::now() < deadline, "the rings are not enabled");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(*heard.lock().expect("lock"), [0, 1, 0]);
    device.reset();
}

#[test]
fn pairs_that_are_chosen_while_the_daemon_is_waited_for_are_used() {
    const WORKS: u8 = 4;
    let (asked, begins) = channel();
    let (go_on, told) = channel();
    let told = Mutex::new(told);
    let enabled = Arc::new(Mutex::new(Vec::new()));
    let seen = enabled.clone();
    let rig = Rig::new(
        net_with(2, None, NetCounters::new(2)),
        OnDisconnect::Stall,
        move |talk, received| {
            let is = |request: Request| received.request == request as u32;
            // It takes its time until all rings are there, and then until the driver has chosen.
            if is(Request::SET_FEATURES) || is(Request::SET_STATUS) && received.payload[0] & WORKS != 0 {
                asked.send(()).expect("somebody waits");
                let _ = told.lock().expect("lock").recv_timeout(Duration::from_secs(5));
            }
            if is(Request::SET_VRING_ENABLE) && received.payload[4] == 1 {
                seen.lock().expect("lock").push(received.payload[0]);
            }
            offers(
                talk,
                received,
                0,
                protocol::REPLY_ACK | protocol::MQ | protocol::STATUS,
                2,
            )
        },
    );
    let mut device = rig.device;
    let first = FakeDriver::sharing(64, true);
    let others: Vec<_> = (1..5).map(|index| FakeDriver::beside(&first, index)).collect();
    device.activate(first.context(f::MQ | f::CTRL_VQ)).expect("activate");
    begins.recv_timeout(Duration::from_secs(5)).expect("features");
    for driver in std::iter::once(&first).chain(&others) {
        device.start_queue(driver.queue()).expect("start");
    }
    go_on.send(()).expect("the daemon waits");
    begins.recv_timeout(Duration::from_secs(5)).expect("the status");
    assert_eq!(*enabled.lock().expect("lock"), [0, 1]);
    // VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
    first
        .ram()
        .write_slice(&[4, 0, 2, 0], GuestAddress(0xa000))
        .expect("command");
    let mut control = others.into_iter().nth(3).expect("the control queue");
    let head = control.add(&[Desc::readable(0xa000, 4), Desc::writable(0xa100, 1)]);
    control.kick();
    assert_eq!(control.wait_used(), Some((head, 1)));
    // So that the ring is heard by who waits for the daemon.
    std::thread::sleep(Duration::from_millis(50));
    go_on.send(()).expect("the daemon waits");
    let deadline = Instant::now() + Duration::from_secs(5);
    while *enabled.lock().expect("lock") != [0, 1, 2, 3] {
        assert!(Instant::now() < deadline, "{enabled:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    device.reset();
}

#[test]
fn the_address_is_whose_it_is_to_say() {
    for (mac, wanted) in [(None, THEIRS), (Some(MAC), MAC)] {
        let rig = Rig::new(net(mac, NetCounters::new(1)), OnDisconnect::Stall, |talk, received| {
            if received.request == Request::GET_CONFIG as u32 {
                let mut config = [0; 12];
                config[..6].copy_from_slice(&THEIRS);
                talk.reply(received.request, &ConfigRange::encode_with(0, &config));
                return true;
            }
            offers(talk, received, f::MAC, protocol::CONFIG, 1)
        });
        assert_eq!(rig.read(0, 6), wanted);
    }
}

#[test]
fn a_file_system_without_a_daemon_fails_as_fuse_does() {
    let kind = Arc::new(DaemonFs::new("shared", 1, 64));
    let policy = OnDisconnect::ErrorAfter(Duration::from_millis(50));
    let mut rig = Rig::new(kind, policy, |talk, received| {
        if received.request == Request::SET_VRING_ENABLE as u32 || talk.number > 0 {
            talk.stream.shutdown(std::net::Shutdown::Both).expect("shutdown");
            return true;
        }
        offers(talk, received, 0, protocol::MQ, 2)
    });
    assert_eq!(rig.read(0, 7), b"shared\0");
    let mut driver = FakeDriver::beside(&FakeDriver::sharing(64, true), 1);
    rig.device.activate(driver.context(0)).expect("activate");
    rig.device.start_queue(driver.queue()).expect("start");
    let mut request = [0u8; 40];
    request[8..16].copy_from_slice(&0x1122_3344_5566_7788u64.to_le_bytes());
    driver
        .ram()
        .write_slice(&request, GuestAddress(0x8000))
        .expect("request");
    let asked = driver.add(&[
        Desc::readable(0x8000, 40),
        Desc::writable(0x9000, 16),
        Desc::writable(0x9100, 64),
    ]);
    let forget = driver.add(&[Desc::readable(0x8000, 48)]);
    driver.kick();
    assert_eq!(driver.wait_used(), Some((asked, 16)));
    assert_eq!(driver.wait_used(), Some((forget, 0)));
    let mut answer = [0u8; 16];
    driver
        .ram()
        .read_slice(&mut answer, GuestAddress(0x9000))
        .expect("answer");
    assert_eq!(answer[..8], [16, 0, 0, 0, 0xfb, 0xff, 0xff, 0xff]);
    assert_eq!(answer[8..], request[8..16]);
    assert_eq!(rig.device.handle().status().state, LinkState::Failing);
}

#[test]
fn accesses_to_an_unknown_configuration_space_go_to_the_daemon() {
    let space = Arc::new(Mutex::new([7u8; 16]));
    let theirs = space.clone();
    let kind = Arc::new(DaemonGeneric::new(18, vec![64]));
    let mut rig = Rig::new(kind, OnDisconnect::Stall, move |talk, received| {
        let at = received.payload.first().map_or(0, |at| usize::from(*at));
        if received.request == Request::GET_CONFIG as u32 {
            let length = received.payload.len() - ConfigRange::BYTES;
            assert!(length <= 256, "longer than any configuration space");
            // Whatever place it is asked for, it answers with the beginning, as QEMU's daemons do. Behind its end there is nothing.
            let space = theirs.lock().expect("lock");
            let answer = match space.get(..length) {
                Some(bytes) => ConfigRange::encode_with(at as u32, bytes),
                None => Vec::new(),
            };
            drop(space);
            talk.reply(received.request, &answer);
            return true;
        }
        if received.request == Request::SET_CONFIG as u32 {
            let data = &received.payload[ConfigRange::BYTES..];
            theirs.lock().expect("lock")[at..at + data.len()].copy_from_slice(data);
            return false;
        }
        offers(
            talk,
            received,
            1 << 3 | 1 << 55,
            protocol::CONFIG | protocol::REPLY_ACK,
            1,
        )
    });
    assert_eq!(rig.device.id().number(), 18);
    assert_eq!(rig.device.features() & (1 << 3 | 1 << 55), 1 << 3 | 1 << 55);
    // The thread may not have its daemon yet.
    let deadline = Instant::now() + Duration::from_secs(5);
    while rig.device.handle().status().state != LinkState::Connected {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(rig.read(4, 2), [7, 7]);
    rig.device.write_config(5, &[1, 2]);
    assert_eq!(rig.read(4, 4), [7, 1, 2, 7]);
    // What changes without the driver is seen as well.
    space.lock().expect("lock")[4] = 9;
    assert_eq!(rig.read(4, 1), [9]);
    assert_eq!(rig.read(15, 4), [0; 4]);
    assert_eq!(rig.read(254, 4), [0; 4]);
    assert_eq!(rig.read(u64::MAX, 4), [0; 4]);
}
