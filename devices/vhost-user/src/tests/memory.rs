//! Memory of the guest comes and goes.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use triarch_memory::{RamOptions, allocate_region, insert, remove};
use triarch_vhost_protocol::{Payload, Request, protocol};
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::direct::{Rig, Twist};
use super::fake::{Conversation, Received};
use crate::{DataPath, LinkError, LinkState};

const MIB: u64 = 1 << 20;
const MORE: GuestAddress = GuestAddress(64 * MIB);

/// What a daemon was told of memory: the message, and how many regions or where the region is.
type Told = Arc<Mutex<Vec<(Request, u64)>>>;

fn is(received: &Received, request: Request) -> bool {
    received.request == request as u32
}

/// A daemon that works on the guest's rings and offers these protocol features. It takes `slots` regions, and refuses those at `not`.
fn daemon(offers: u64, slots: u64, not: u64, told: Told, streams: Arc<Mutex<Vec<UnixStream>>>) -> Box<Twist> {
    Box::new(move |talk: &mut Conversation, received: &Received| {
        let number = |at: usize| u64::from_le_bytes(received.payload[at..at + 8].try_into().expect("8 bytes"));
        let note = |what, number| told.lock().expect("lock").push((what, number));
        if is(received, Request::SET_OWNER) {
            let stream = talk.stream.try_clone().expect("stream");
            streams.lock().expect("lock").push(stream);
        }
        if is(received, Request::GET_PROTOCOL_FEATURES) {
            talk.reply(received.request, &offers.encode());
            return true;
        }
        if is(received, Request::GET_MAX_MEM_SLOTS) {
            talk.reply(received.request, &slots.encode());
            return true;
        }
        if is(received, Request::SET_MEM_TABLE) {
            note(Request::SET_MEM_TABLE, number(0) & 0xffff_ffff);
        }
        if is(received, Request::ADD_MEM_REG) {
            note(Request::ADD_MEM_REG, number(8));
            assert_eq!(received.fds.len(), 1);
            if number(8) == not {
                talk.reply(received.request, &1u64.encode());
                return true;
            }
        }
        if is(received, Request::REM_MEM_REG) {
            note(Request::REM_MEM_REG, number(8));
        }
        talk.offer_record(received)
    })
}

struct Bench {
    rig: Rig,
    told: Told,
    streams: Arc<Mutex<Vec<UnixStream>>>,
}

impl Bench {
    fn new(offers: u64, slots: u64, not: u64, path: DataPath) -> Self {
        let (told, streams): (Told, Arc<Mutex<Vec<UnixStream>>>) = Default::default();
        let rig = Rig::with(daemon(offers, slots, not, told.clone(), streams.clone()), |options| {
            options.data_path = path;
        });
        rig.wait(|status| status.state == LinkState::Connected);
        let bench = Self { rig, told, streams };
        // All orders so far have been carried out when this one is.
        bench.remap().expect("nothing new");
        bench.told();
        bench
    }

    fn remap(&self) -> Result<(), LinkError> {
        self.rig.handle.remap().wait()
    }

    /// What came since it was last asked.
    fn told(&self) -> Vec<(Request, u64)> {
        std::mem::take(&mut *self.told.lock().expect("lock"))
    }

    fn add(&self) -> Result<(), LinkError> {
        self.add_at(MORE)
    }

    fn add_at(&self, at: GuestAddress) -> Result<(), LinkError> {
        let memory = self.rig.driver.context(0).memory;
        let options = RamOptions {
            shared: true,
            ..RamOptions::default()
        };
        let region = allocate_region(&memory.memory(), at, MIB, &options).expect("allocate");
        insert(&memory, region).expect("free addresses");
        self.remap()
    }

    fn take(&self) -> Result<(), LinkError> {
        remove(&self.rig.driver.context(0).memory, MORE).expect("a region");
        self.remap()
    }
}

const SLOTS: u64 = protocol::COMMON;
const TABLE: u64 = protocol::COMMON & !protocol::CONFIGURE_MEM_SLOTS;

#[test]
fn what_comes_and_goes_is_told_alone_where_it_can_be() {
    for path in [DataPath::Direct, DataPath::Relay] {
        let bench = Bench::new(SLOTS, 32, 0xbad, path);
        bench.add().expect("added");
        assert_eq!(bench.told(), [(Request::ADD_MEM_REG, MORE.0)]);
        bench.remap().expect("nothing new");
        assert_eq!(bench.told(), []);
        bench.take().expect("taken");
        assert_eq!(bench.told(), [(Request::REM_MEM_REG, MORE.0)]);
    }
}

#[test]
fn others_are_told_all_of_it() {
    for (path, more) in [(DataPath::Direct, 0), (DataPath::Relay, 1)] {
        // One that acknowledges nothing is asked something, which it answers behind it.
        for offers in [TABLE, TABLE & !protocol::REPLY_ACK] {
            let bench = Bench::new(offers, 0, 0xbad, path);
            bench.add().expect("added");
            assert_eq!(bench.told(), [(Request::SET_MEM_TABLE, 2 + more)]);
            bench.take().expect("taken");
            assert_eq!(bench.told(), [(Request::SET_MEM_TABLE, 1 + more)]);
        }
    }
}

#[test]
fn one_that_cannot_goes_on_with_what_it_had() {
    let bench = Bench::new(SLOTS, 1, 0xbad, DataPath::Direct);
    let error = bench.add().expect_err("full").to_string();
    assert!(error.contains("2 parts, it takes 1"), "{error}");
    bench.take().expect("as before");
    assert_eq!(bench.told(), []);

    let bench = Bench::new(SLOTS, 32, MORE.0, DataPath::Direct);
    assert!(matches!(bench.add(), Err(LinkError::Failed("ADD_MEM_REG"))));
    bench.take().expect("as before");
    assert_eq!(
        bench.told(),
        [(Request::ADD_MEM_REG, MORE.0)],
        "it has nothing to give back"
    );
    let status = bench.rig.handle.status();
    assert_eq!((status.state, status.reconnects), (LinkState::Connected, 0));
}

#[test]
fn one_that_comes_back_hears_of_all_of_it() {
    let bench = Bench::new(SLOTS, 32, 0xbad, DataPath::Direct);
    let first = bench.streams.lock().expect("lock")[0].try_clone().expect("stream");
    first.shutdown(std::net::Shutdown::Both).expect("shutdown");
    bench.add().expect("no daemon is no error");
    bench.rig.wait(|s| s.reconnects == 1 && s.state == LinkState::Connected);
    bench.remap().expect("nothing new");
    let told = bench.told();
    assert!(
        told.contains(&(Request::ADD_MEM_REG, 0)) && told.contains(&(Request::ADD_MEM_REG, MORE.0)),
        "{told:?}"
    );
}

#[test]
fn a_log_of_pages_must_reach_so_far() {
    let bench = Bench::new(TABLE, 0, 0xbad, DataPath::Direct);
    bench.rig.log(None).expect("it can");
    // It reaches over where daemons find memory of the VMM's own, below 4 GiB.
    bench.add().expect("within it");
    let error = bench
        .add_at(GuestAddress(4096 * MIB))
        .expect_err("beyond it")
        .to_string();
    assert!(error.contains("log"), "{error}");
    assert_eq!(bench.told(), [(Request::SET_MEM_TABLE, 2)]);
    bench.rig.handle.stop_log();
    bench.remap().expect("no log, no limit");
    assert_eq!(bench.told(), [(Request::SET_MEM_TABLE, 3)]);
}
