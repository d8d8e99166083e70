//! Devices with a state that only their drivers understand.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use super::mock::{
    End, Fails, MockGuest, MockMemory, World, destination_options, migrate, regions, socket, source_options,
};
use crate::{Destination, DevicePart, Handle, SourceError, SourceOptions, Whereabouts, sentence};

pub(super) fn part(device: u16, begins: bool, bytes: &[u8]) -> (DevicePart, Vec<u8>) {
    let len = bytes.len();
    (DevicePart { device, begins, len }, bytes.to_vec())
}

fn moves(guest: &mut MockGuest, change: impl Fn(&mut SourceOptions)) -> End {
    moves_by(&Handle::new(None), guest, change)
}

fn moves_by(handle: &Handle, guest: &mut MockGuest, change: impl Fn(&mut SourceOptions)) -> End {
    let (_dir, address) = socket();
    let destination = Destination::bind(destination_options(&address)).expect("listens");
    let memory = MockMemory::new(&regions());
    memory.fill(20);
    let mut options = source_options(&address);
    change(&mut options);
    let fails = guest.fails;
    migrate(destination, fails, options, &memory, guest, handle)
}

#[test]
fn devices_go_before_the_pause_and_after_it() {
    let mut guest = MockGuest::new(&Arc::default(), Fails::Nothing);
    guest.devices = vec![
        part(0, true, b"void"),
        part(0, true, b"some "),
        part(1, true, &[7; 1 << 20]),
    ];
    guest.paused_devices = vec![part(0, false, b"more"), part(1, false, b"end"), part(2, true, b"")];
    let end = moves(&mut guest, |_| {});
    end.source.expect("moved");
    end.destination.expect("taken");
    let devices = end.world.devices.lock().unwrap().clone();
    let big = [&[7; 1 << 20][..], b"end"].concat();
    assert_eq!(devices, [(0, b"some more".to_vec()), (1, big), (2, Vec::new())]);
}

#[test]
fn a_guest_stays_whose_device_tells_nothing_or_is_not_wanted() {
    for (fails, words, pauses) in [
        (Fails::Device, "the device gpu cannot tell its state", 1),
        (Fails::LoadDevice, "the device gpu cannot take the state that came", 0),
    ] {
        let mut guest = MockGuest::new(&Arc::default(), fails);
        guest.devices = vec![part(0, true, &[1; 1000])];
        guest.paused_devices = vec![part(0, false, b"end")];
        let end = moves(&mut guest, |_| {});
        let error = end.source.expect_err("it stays");
        assert_eq!(error.guest, Whereabouts::RunsHere);
        assert!(sentence(&error).contains(words), "{}", sentence(&error));
        assert_eq!(end.world.running(), (true, false));
        // The one that refuses may do that while the next round is on its way.
        assert!(end.world.pauses.load(Ordering::SeqCst) >= pauses);
        assert!(end.world.aborted.load(Ordering::SeqCst));
    }
}

#[test]
fn a_destination_that_does_not_want_a_device_says_why_also_after_a_while() {
    let mut guest = MockGuest::new(&Arc::default(), Fails::LoadDevice);
    guest.devices = vec![part(0, true, &[1; 1000]); 100];
    // By then it has closed the connection.
    guest.tells = Duration::from_millis(100);
    let end = moves(&mut guest, |_| {});
    let error = end.source.expect_err("it stays");
    assert_eq!(error.guest, Whereabouts::RunsHere);
    let words = sentence(&error);
    assert!(
        words.contains("the device gpu cannot take the state that came"),
        "{words}"
    );
    assert!(!guest.devices.is_empty(), "the rest was not sent");
}

#[test]
fn a_cancel_while_a_device_tells_lets_its_guest_run_on() {
    let world: Arc<World> = Arc::default();
    let mut guest = MockGuest::new(&world, Fails::Nothing);
    guest.paused_devices = vec![part(0, true, b"more"); 100];
    guest.tells = Duration::from_millis(100);
    let handle = Handle::new(None);
    let end = thread::scope(|scope| {
        scope.spawn(|| {
            while world.pauses.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            handle.cancel();
        });
        moves_by(&handle, &mut guest, |_| {})
    });
    let error = end.source.expect_err("it stays");
    assert!(matches!(error.why, SourceError::Cancelled), "{error:?}");
    assert_eq!(error.guest, Whereabouts::RunsHere);
    assert_eq!(world.running(), (true, false));
    assert!(guest.paused_devices.len() > 50, "it did not wait for the rest");
}

#[test]
fn a_device_that_takes_longer_than_promised_keeps_its_guest() {
    let mut guest = MockGuest::new(&Arc::default(), Fails::Nothing);
    // It says so, whatever comes of it.
    guest.paused_devices = vec![(
        DevicePart {
            device: 0,
            begins: true,
            len: usize::MAX >> 1,
        },
        Vec::new(),
    )];
    let end = moves(&mut guest, |options| {
        options.limits.time = Some(Duration::from_millis(300));
    });
    let error = end.source.expect_err("it stays");
    assert!(matches!(error.why, SourceError::TimedOut { .. }), "{error:?}");
    assert_eq!(end.world.pauses.load(Ordering::SeqCst), 0);
}
