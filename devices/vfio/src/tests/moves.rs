//! Devices that go with their guest.

use std::sync::{Arc, Mutex};

use triarch_device_core::MsiRouter;
use triarch_device_core::mock::MockRouter;
use triarch_pci::{PciAddress, PciFunction};

use super::fake::{CONFIG, Fake, Sysfs, host, message, options, ring, rung};
use super::space::nvme;
use crate::kernel::{MoveKinds, MoveState};
use crate::mover::MOST;
use crate::{Fleet, FunctionError, HostDevice, Immovable, MoveError, Mover, Piece, SavedFunction, VfioPci, lock};

const ALL: MoveKinds = MoveKinds {
    p2p: true,
    pre_copy: true,
};
const NONE: MoveKinds = MoveKinds {
    p2p: false,
    pre_copy: false,
};
const MSIX: u32 = 2;
const TABLE: u64 = 0x2000;
const SIZES: [u64; 6] = [0x4000, 0, 0, 0, 0, 0];

type Ways = Arc<Mutex<Vec<String>>>;

/// A device that tells `ahead` while it works, and `rest` then.
fn fake(name: &'static str, kinds: MoveKinds, ahead: &[u8], rest: &[u8], ways: &Ways) -> Fake {
    let fake = Fake::new(&nvme(), SIZES);
    {
        let moves = &mut lock(&fake.world).moves;
        (moves.name, moves.kinds, moves.ways) = (name, Some(kinds), ways.clone());
        (moves.ahead, moves.rest) = (ahead.to_vec(), rest.to_vec());
        moves.told = rest.len() as u64;
    }
    fake
}

fn one(kinds: MoveKinds, ahead: &[u8], rest: &[u8]) -> (Fake, Arc<HostDevice>, Fleet) {
    let fake = fake("", kinds, ahead, rest, &Ways::default());
    let device = host(&fake);
    let fleet = Fleet::new(vec![device.mover().expect("it moves")]);
    (fake, device, fleet)
}

fn ways(fake: &Fake) -> String {
    let ways = lock(&fake.world).moves.ways.clone();
    let taken = std::mem::take(&mut *lock(&ways));
    taken.join(",").replace(' ', "")
}

fn state(fake: &Fake) -> MoveState {
    lock(&fake.world).moves.state.unwrap_or(MoveState::Running)
}

/// Reads all there is now.
fn read(fleet: &Fleet) -> Result<Vec<(usize, bool, Vec<u8>)>, MoveError> {
    let (mut all, mut buffer) = (Vec::new(), [0; 4]);
    while let Some((number, Piece { begins, len })) = fleet.read(&mut buffer)? {
        all.push((number, begins, buffer[..len].to_vec()));
    }
    Ok(all)
}

/// The same to another one.
fn carry(from: &Fleet, to: &Fleet) -> Result<(), MoveError> {
    for (number, begins, bytes) in read(from)? {
        to.load(number, begins, &bytes)?;
    }
    Ok(())
}

fn loaded(fake: &Fake) -> Vec<u8> {
    lock(&fake.world).moves.loaded.clone()
}

#[test]
fn a_device_is_copied_while_it_works_and_when_it_stands_still() {
    let (there, _, source) = one(ALL, b"ahead", b"the rest");
    let (here, device, destination) = one(ALL, b"", b"");
    assert_eq!(ways(&there), "");
    assert_eq!(source.ahead(), 5);
    assert_eq!(ways(&there), "PreCopy");
    carry(&source, &destination).expect("ahead");
    assert_eq!((source.ahead(), source.size()), (0, 8));
    assert_eq!(
        (ways(&here).as_str(), loaded(&here).as_slice()),
        ("Resuming", &b"ahead"[..])
    );
    source.pause();
    assert_eq!(ways(&there), "PreCopyP2p,StopCopy");
    carry(&source, &destination).expect("the rest");
    assert_eq!(source.size(), 0);
    assert_eq!(loaded(&here), b"aheadthe rest", "nothing was void");
    finish(&device).expect("taken");
    destination.resume();
    assert_eq!(ways(&here), "Stop,RunningP2p,Running");
    assert_eq!(here.calls().iter().filter(|call| *call == "reset").count(), 1);
}

#[test]
fn a_device_that_only_stands_still_is_copied_then() {
    let (there, _, source) = one(NONE, b"", b"all of it");
    assert_eq!(source.ahead(), 0);
    assert!(read(&source).expect("nothing").is_empty());
    source.pause();
    assert_eq!(ways(&there), "Stop");
    let all = read(&source).expect("all");
    assert_eq!(
        all.iter().map(|(_, begins, _)| *begins).collect::<Vec<_>>(),
        [true, false, false]
    );
    assert_eq!(ways(&there), "StopCopy");
    source.finish();
    source.resume();
    assert_eq!(ways(&there), "Stop,Running");
}

#[test]
fn one_that_has_nothing_to_tell_begins_all_the_same() {
    let (_, _, source) = one(ALL, b"", b"");
    source.pause();
    assert_eq!(read(&source).expect("nothing"), [(0, true, Vec::new())]);
    assert!(read(&source).expect("no more").is_empty());
}

#[test]
fn a_guest_that_runs_on_begins_anew() {
    let (there, _, source) = one(ALL, b"ahead", b"rest");
    let (here, _, destination) = one(ALL, b"", b"");
    source.ahead();
    carry(&source, &destination).expect("ahead");
    source.pause();
    source.resume();
    assert_eq!(ways(&there), "PreCopy,PreCopyP2p,StopCopy,RunningP2p,Running");
    assert_eq!(state(&there), MoveState::Running);
    lock(&there.world).moves.ahead = b"other".to_vec();
    assert_eq!(source.ahead(), 5);
    carry(&source, &destination).expect("ahead");
    source.pause();
    carry(&source, &destination).expect("the rest");
    assert_eq!(loaded(&here), b"otherrest", "what came before is void");
    assert_eq!(ways(&here), "Resuming,Resuming", "it was reset in between");
}

#[test]
fn a_cancel_while_it_works_has_it_work_on() {
    let (there, _, source) = one(ALL, b"ahead", b"rest");
    source.ahead();
    source.finish();
    assert_eq!(ways(&there), "PreCopy,Running");
    assert!(!there.calls().contains(&"reset".to_owned()));
}

#[test]
fn a_reset_of_the_guests_while_it_is_copied_begins_anew() {
    let (there, device, source) = one(ALL, b"ahead", b"rest");
    let router: Arc<dyn MsiRouter> = Arc::new(MockRouter::default());
    let function = VfioPci::new(&device, Arc::new(there.clone()), &router, options(None)).expect("a function");
    source.ahead();
    assert_eq!(read(&source).expect("ahead").len(), 2);
    // Its function level reset.
    function.config_write(0x89, &[0x80]);
    assert!(read(&source).expect("nothing").is_empty());
    source.pause();
    assert!(read(&source).expect("the rest")[0].1, "what came before is void");
}

#[test]
fn none_begins_anything_before_all_stand_still() {
    let ways = Ways::default();
    let fakes = [fake("a", ALL, b"", b"1", &ways), fake("b", ALL, b"", b"2", &ways)];
    let devices: Vec<_> = fakes.iter().map(host).collect();
    let movers: Vec<Mover> = devices.iter().map(|device| device.mover().expect("it moves")).collect();
    Fleet::check_together(&movers, true).expect("both can");
    let fleet = Fleet::new(movers);
    let went = || std::mem::take(&mut *lock(&ways)).join(", ");
    fleet.pause();
    assert_eq!(went(), "a RunningP2p, b RunningP2p, a Stop, b Stop");
    assert_eq!(
        read(&fleet)
            .expect("both")
            .iter()
            .map(|(number, ..)| *number)
            .collect::<Vec<_>>(),
        [0, 1]
    );
    went();
    fleet.resume();
    assert_eq!(went(), "a RunningP2p, b RunningP2p, a Running, b Running");
    let alone = fake("c", NONE, b"", b"", &ways);
    let (one, other) = (host(&alone), host(&fakes[0]));
    let movers = [one.mover().expect("it moves"), other.mover().expect("it moves")];
    let refused = Fleet::check_together(&movers, true).expect_err("refused").to_string();
    assert!(refused.contains("vfio_p2p_dma=off"), "{refused}");
    assert!(Fleet::check_together(&movers, false).is_ok() && Fleet::check_together(&movers[..1], true).is_ok());
}

#[test]
fn all_devices_of_a_paused_guest_stand_still_or_none() {
    let moves = |kinds| {
        let fake = fake("", kinds, b"", b"", &Ways::default());
        let device = host(&fake);
        (fake, device)
    };
    let ((one, first), (other, second), (alone, third)) = (moves(ALL), moves(ALL), moves(NONE));
    let plain = Fake::new(&nvme(), SIZES);
    let unmoved = host(&plain);
    let stood = |devices: &[&Arc<HostDevice>], peers| {
        let devices: Vec<_> = devices.iter().map(|device| Arc::clone(device)).collect();
        let fleet = Fleet::paused(&devices, peers);
        fleet.pause();
        let states = [&one, &other, &alone].map(|fake| state(fake) == MoveState::Stop);
        fleet.resume();
        states
    };
    assert_eq!(stood(&[&first, &second], true), [true, true, false]);
    assert_eq!(
        stood(&[&first, &third], true),
        [false; 3],
        "one would reach the other in vain"
    );
    assert_eq!(stood(&[&first, &third], false), [true, false, true]);
    assert_eq!(stood(&[&third], true), [false, false, true]);
    assert_eq!(stood(&[&first, &unmoved], true), [false; 3]);
    // Who stands still works again, whatever the kernel answers then.
    let fleet = Fleet::paused(std::slice::from_ref(&first), true);
    fleet.pause();
    one.fail("can move", libc::EACCES);
    Fleet::new(vec![first.mover().expect("it moves")]).resume();
    assert_eq!(state(&one), MoveState::Running);
}

#[test]
fn a_device_that_does_not_stand_still_works_on() {
    for (kinds, failing) in [
        (NONE, MoveState::Stop),
        (ALL, MoveState::RunningP2p),
        (ALL, MoveState::Stop),
    ] {
        let (there, device, source) = one(kinds, b"", b"rest");
        lock(&there.world).moves.fails = vec![(failing, MoveState::Running)];
        source.pause();
        assert_eq!(state(&there), MoveState::Running);
        let mover = device.mover().expect("it moves");
        let error = mover.check_still().expect_err("it works").to_string();
        assert!(
            error.contains("0000:01:00.0 does not stand still: Input/output error"),
            "{error}"
        );
        // The next time it may.
        lock(&there.world).moves.fails.clear();
        source.resume();
        source.pause();
        mover.check_still().expect("it stands still");
    }
}

fn finish(device: &HostDevice) -> Result<(), MoveError> {
    device.mover().expect("it moves").finish_load()
}

#[test]
fn a_device_that_fails_is_reset_and_its_guest_runs_on() {
    // It comes from where it tells its state into an error.
    let (there, device, source) = one(ALL, b"", b"rest");
    source.pause();
    lock(&there.world).moves.fails = vec![(MoveState::StopCopy, MoveState::Error)];
    let error = read(&source).expect_err("fails").to_string();
    assert_eq!(error, "the device 0000:01:00.0 cannot begin to tell its state");
    there.calls();
    lock(&there.world).moves.fails = vec![
        (MoveState::RunningP2p, MoveState::Error),
        (MoveState::Running, MoveState::Error),
    ];
    // There is no way out of an error but the reset.
    source.resume();
    assert_eq!(there.calls(), ["reset"]);
    assert_eq!(state(&there), MoveState::Running);
    // While it is read: it is as it was.
    source.pause();
    assert!(
        device.mover().expect("it moves").check_still().is_err(),
        "it fails again"
    );
    lock(&there.world).moves.fails.clear();
    source.resume();
    source.pause();
    there.fail("read data", libc::EIO);
    assert!(read(&source).is_err());
    source.finish();
    source.resume();
    assert_eq!(state(&there), MoveState::Running);
}

#[test]
fn more_than_was_told_is_carried_and_more_than_a_driver_takes_is_refused() {
    let (there, _, source) = one(NONE, b"", b"longer than it said");
    lock(&there.world).moves.told = 3;
    let (here, device, destination) = one(NONE, b"", b"");
    source.pause();
    assert_eq!(source.size(), 3);
    carry(&source, &destination).expect("all of it");
    assert_eq!(loaded(&here), b"longer than it said");
    // The destination's driver has a limit of its own.
    lock(&there.world).moves.rest = b"longer than it said".to_vec();
    source.resume();
    source.pause();
    lock(&here.world).moves.most = Some(10);
    let error = carry(&source, &destination).expect_err("too much").to_string();
    assert_eq!(error, "the device 0000:01:00.0 cannot take the state that came");
    // What it took it may not want.
    lock(&here.world).moves.fails = vec![(MoveState::Stop, MoveState::Error)];
    let error = finish(&device).expect_err("refused").to_string();
    assert_eq!(error, "the device 0000:01:00.0 cannot become what came");
}

#[test]
fn a_driver_that_has_us_wait_is_waited_for_but_not_for_ever() {
    let (there, _, source) = one(ALL, b"", b"the rest");
    let (here, _, destination) = one(ALL, b"", b"");
    source.pause();
    lock(&there.world).moves.waits = 5;
    lock(&here.world).moves.waits = 5;
    carry(&source, &destination).expect("all of it");
    assert_eq!(loaded(&here), b"the rest");
    // While nobody is held up who pauses or resets it.
    source.resume();
    source.pause();
    lock(&there.world).moves.waits = u64::MAX;
    let late = std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(&source));
        while lock(&there.world).moves.waits == u64::MAX {
            std::thread::yield_now();
        }
        source.resume();
        reader.join().expect("no panic")
    });
    assert!(late.expect("nothing").is_empty(), "it works on");
    source.pause();
    let error = read(&source).expect_err("late").to_string();
    assert_eq!(
        error,
        "the driver of the device 0000:01:00.0 would not tell its state for 1 s"
    );
    source.resume();
    assert_eq!(state(&there), MoveState::Running);
    lock(&here.world).moves.waits = u64::MAX;
    let late = destination.load(0, true, b"data");
    assert!(matches!(late, Err(MoveError::Late { .. })), "{late:?}");
}

#[test]
fn a_device_that_stands_still_without_data_is_not_taken_for_one_that_is_nothing() {
    let (there, _, source) = one(NONE, b"", b"rest");
    lock(&there.world).moves.mute = true;
    source.pause();
    let error = read(&source).expect_err("refused").to_string();
    assert_eq!(error, "the device 0000:01:00.0 cannot tell its state");
    source.finish();
    source.resume();
    assert_eq!(state(&there), MoveState::Running);
}

#[test]
fn nobody_believes_a_device_that_is_larger_than_any() {
    let (there, device, source) = one(NONE, b"", b"more");
    let (_, other, destination) = one(NONE, b"", b"");
    destination.load(0, true, b"more").expect("taken");
    lock(&other.mover().expect("it moves").handle().moving).carried = MOST - 1;
    destination.load(0, false, b"m").expect("taken");
    let error = destination.load(0, false, b"o").expect_err("refused").to_string();
    assert_eq!(error, "the state of the device 0000:01:00.0 has more than 1024 GiB");
    // It begins to tell, and goes on for too long.
    let mut buffer = [0; 2];
    source.pause();
    assert!(source.read(&mut buffer).expect("a part").is_some());
    lock(&device.mover().expect("it moves").handle().moving).carried = MOST - 1;
    assert!(matches!(source.read(&mut buffer), Err(MoveError::TooLarge(_))));
    source.finish();
    source.resume();
    assert_eq!(state(&there), MoveState::Running);
}

#[test]
fn data_that_nobody_asked_for_are_refused() {
    let (here, device, destination) = one(ALL, b"", b"");
    for (number, begins) in [(1, true), (0, false)] {
        let refused = destination.load(number, begins, b"data");
        assert!(matches!(refused, Err(MoveError::Unasked(_))), "{refused:?}");
    }
    assert!(matches!(finish(&device), Err(MoveError::Unasked(_))));
    assert_eq!(ways(&here), "");
    // It could be reset, and then it could not be told.
    here.fail("reset", libc::EIO);
    assert!(destination.load(0, true, b"").is_err());
}

#[test]
fn who_cannot_move_is_told() {
    let plain = Fake::new(&nvme(), SIZES);
    let refused = host(&plain).mover().err().expect("refused");
    assert!(
        matches!(&refused, Immovable::Driver(name) if name == "0000:01:00.0"),
        "{refused}"
    );
    plain.fail("can move", libc::EACCES);
    assert!(matches!(host(&plain).mover().err(), Some(Immovable::Kernel { .. })));
    let sysfs = Sysfs::new();
    let uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    let path = sysfs.mediated(uuid, 9, Some("mdev"), "vfio-pci");
    let device = plain.iommu().open(&path, false).expect("a device");
    assert!(matches!(device.mover().err(), Some(Immovable::Mediated(_))));
}

fn made(fake: &Fake, device: &Arc<HostDevice>) -> (VfioPci, Arc<MockRouter>) {
    let router = Arc::new(MockRouter::default());
    let dynamic: Arc<dyn MsiRouter> = router.clone();
    let function = VfioPci::new(device, Arc::new(fake.clone()), &dynamic, options(None));
    (function.expect("a function"), router)
}

fn restored(
    fake: &Fake,
    device: &Arc<HostDevice>,
    saved: &SavedFunction,
) -> Result<(VfioPci, Arc<MockRouter>), FunctionError> {
    let router = Arc::new(MockRouter::default());
    let dynamic: Arc<dyn MsiRouter> = router.clone();
    let function = VfioPci::restore(device, Arc::new(fake.clone()), &dynamic, options(None), saved)?;
    Ok((function, router))
}

fn program(function: &VfioPci, vector: u64, address: u64, data: u32) {
    let at = TABLE + 16 * vector;
    function.bar_write(0, at, &address.to_le_bytes()).expect("address");
    function.bar_write(0, at + 8, &data.to_le_bytes()).expect("data");
    function.bar_write(0, at + 12, &0u32.to_le_bytes()).expect("control");
}

#[test]
fn the_guest_finds_its_registers_and_interrupts_again() {
    let (there, device, source) = one(ALL, b"", b"state");
    let (function, _) = made(&there, &device);
    function.attach(PciAddress::from_devfn(0, 0, 0x20), 4);
    function.config_write(0x10, &0x8000_0000u32.to_le_bytes());
    function.config_write(4, &[6, 0]);
    function.config_write(0x42, &0x8000u16.to_le_bytes());
    program(&function, 3, 0xfee0_0000, 0x41);
    source.pause();
    let saved = function.save();

    let (here, device, destination) = one(ALL, b"", b"");
    carry(&source, &destination).expect("its state");
    finish(&device).expect("taken");
    here.calls();
    let (function, router) = restored(&here, &device, &saved).expect("the same");
    assert!(!here.calls().contains(&"reset".to_owned()), "it is what came");
    function.attach(PciAddress::from_devfn(0, 0, 0x20), 4);
    let bar = function.bars()[0].expect("a BAR");
    assert_eq!((bar.address, bar.decoded), (0x8000_0000, true));
    assert_eq!(here.register(CONFIG + 4) & 0xffff, 7, "the bus's master");
    assert_eq!(message(&router, 0), Some((0xfee0_0000, 0x41)));
    assert!(ring(&here, MSIX, 3) && !ring(&here, MSIX, 2));
    assert_eq!(rung(&router, 0), 1);
    assert_eq!(state(&here), MoveState::Stop, "until the guest runs");
}

#[test]
fn another_kind_of_device_does_not_become_it() {
    let (there, device, _source) = one(ALL, b"", b"state");
    let saved = made(&there, &device).0.save();
    let told = device.mover().expect("it moves").kind().expect("its kind");
    assert_eq!(told, "1b36:0010 (subsystem 1af4:1100, class 010802, revision 02)");
    let refusal = |saved: &SavedFunction| {
        let (here, device, _) = one(ALL, b"", b"");
        let refused = restored(&here, &device, saved).err().expect("refused").to_string();
        assert_eq!(lock(&here.world).admitted, 0);
        refused
    };
    let mut other = saved.clone();
    other.registers[2] = 0x11;
    assert_eq!(
        refusal(&other),
        "0000:01:00.0 is not like the device that the guest had: its configuration space at 0x2"
    );
    other.registers.truncate(256);
    assert!(refusal(&other).contains("another size"));
    let mut other = saved.clone();
    other.bars[0] = 0x8000;
    assert!(refusal(&other).contains("BARs"));
    let mut other = saved;
    other.msix = None;
    assert!(refusal(&other).contains("interrupts"));
}

#[test]
fn what_devices_write_is_logged() {
    const PAGE: u64 = 4096;
    let (there, _, fleet) = one(ALL, b"", b"");
    fleet.start_log(PAGE, &[0..16 * PAGE, 16 * PAGE..32 * PAGE]);
    assert_eq!(lock(&there.world).moves.logged, [(0, 32 * PAGE)]);
    lock(&there.world).moves.wrote = [3 * PAGE, 17 * PAGE].into();
    let mut words = vec![1];
    fleet.take_log(PAGE, 0..16 * PAGE, &mut words);
    assert_eq!(words, [0b1001], "with what was there");
    let mut words = Vec::new();
    fleet.take_log(PAGE, 16 * PAGE..32 * PAGE, &mut words);
    assert_eq!((words.as_slice(), fleet.wrote_anything()), (&[0b10][..], false));
    // A log that breaks.
    there.fail("take log", libc::EIO);
    fleet.take_log(PAGE, 0..PAGE, &mut Vec::new());
    assert!(fleet.wrote_anything());
    fleet.stop_log();
    assert!(!fleet.wrote_anything());
    // None at all.
    lock(&there.world).moves.no_log = true;
    fleet.start_log(PAGE, &[0..PAGE, PAGE..2 * PAGE]);
    assert!(fleet.wrote_anything());
    // Who stands still writes nothing.
    fleet.pause();
    fleet.start_log(PAGE, &[0..PAGE, PAGE..2 * PAGE]);
    assert!(!fleet.wrote_anything());
}
