//! A device of the host on a guest's bus.

use std::sync::Arc;

use triarch_device_core::{AccessError, Bus};
use triarch_pci::{BarAllocator, PciAddress, PciFunction, PciRoot};

use super::fake::{BAR_STEP, CONFIG, Fake, function, host, message, options, ring, rung};
use super::space::nvme;
use crate::{VfioPci, lock};

const MSI: u32 = 1;
const MSIX: u32 = 2;
const TABLE: u64 = 0x2000;

fn fake() -> Fake {
    Fake::new(&nvme(), [0x4000, 0, 0, 0, 0, 0])
}

fn attach(function: &VfioPci) {
    function.attach(PciAddress::from_devfn(0, 0, 0x20), 4);
}

fn set_control(function: &VfioPci, control: u16) {
    function.config_write(0x42, &control.to_le_bytes());
}

fn program(function: &VfioPci, vector: u64, address: u64, data: u32, control: u32) {
    let at = TABLE + 16 * vector;
    function.bar_write(0, at, &address.to_le_bytes()).expect("address");
    function.bar_write(0, at + 8, &data.to_le_bytes()).expect("data");
    function.bar_write(0, at + 12, &control.to_le_bytes()).expect("control");
}

#[test]
fn it_begins_reset_and_reaches_nothing() {
    let fake = fake();
    fake.device.set_len(8 * BAR_STEP).expect("room");
    let (function, _) = function(&fake);
    let calls = fake.calls();
    let reset = calls.iter().position(|call| call == "reset").expect("a reset");
    assert!(!calls[..reset].contains(&"read".to_owned()), "{calls:?}");
    assert_eq!(
        fake.register(CONFIG + 4) & 0xffff,
        3,
        "decodes, and is not the bus's master"
    );
    assert_eq!(lock(&fake.world).admitted, 1);
    function.config_write(4, &[6, 0]);
    assert_eq!(fake.register(CONFIG + 4) & 0xffff, 7);
    function.config_write(4, &[0, 0]);
    assert_eq!(
        fake.register(CONFIG + 4) & 0xffff,
        3,
        "its registers stay where they are mapped"
    );
    assert_eq!(function.counters().resets(), 1);
    function.stop();
    assert_eq!(fake.register(CONFIG + 4) & 0xffff, 0);
    assert_eq!(lock(&fake.world).admitted, 0);
    let calls = fake.calls();
    assert_eq!(calls.iter().filter(|call| *call == "reset").count(), 1);
    function.stop();
    assert!(fake.calls().is_empty(), "once");
    let mut data = [0; 4];
    function.config_read(0, &mut data);
    assert_eq!(data, [0xff; 4]);
    assert_eq!(function.bar_read(0, 0, &mut data), Err(AccessError::BadAccess));
    drop(function);
    assert_eq!(fake.open_files(), 0);
}

#[test]
fn a_device_that_cannot_be_reset_goes_to_nobody() {
    let fake = fake();
    fake.fail("reset", libc::ENOTTY);
    let router: Arc<dyn triarch_device_core::MsiRouter> = Arc::new(triarch_device_core::mock::MockRouter::default());
    let made = VfioPci::new(&host(&fake), Arc::new(fake.clone()), &router, options(None));
    assert_eq!(made.err().expect("refused").to_string(), "0000:01:00.0 cannot be reset");
    assert_eq!(fake.open_files(), 0);
}

#[test]
fn registers_are_mapped_without_the_table_and_follow_the_bar() {
    let fake = fake();
    let (function, _) = function(&fake);
    let mapped = || {
        lock(&fake.world)
            .mapped
            .iter()
            .map(|(at, len)| (*at, *len))
            .collect::<Vec<_>>()
    };
    assert!(mapped().is_empty());
    function.bar_moved(0, Some(0x1_0000_0000));
    assert_eq!(mapped(), [(0x1_0000_0000, 0x2000)]);
    function.bar_moved(0, Some(0x2_0000_0000));
    assert_eq!(mapped(), [(0x2_0000_0000, 0x2000)]);
    fake.fail("show", libc::ENOSPC);
    function.bar_moved(0, Some(0x3_0000_0000));
    assert!(mapped().is_empty(), "then each access is trapped");
    lock(&fake.world).fails.clear();
    function.bar_moved(0, Some(0x3_0000_0000));
    function.bar_moved(0, None);
    assert!(mapped().is_empty());
    function.bar_moved(0, Some(0x3_0000_0000));
    function.stop();
    assert!(mapped().is_empty());
    function.bar_moved(9, Some(0));
}

#[test]
fn trapped_registers_are_the_devices() {
    let fake = fake();
    let (function, _) = function(&fake);
    function.bar_write(0, 0x2ff8, &[1, 2, 3, 4]).expect("beside the table");
    assert_eq!(fake.register(0x2ff8), 0x0403_0201);
    let mut data = [0; 4];
    function.bar_read(0, 0x2ff8, &mut data).expect("there");
    assert_eq!(data, [1, 2, 3, 4]);
    let (reads, writes) = function.counters().accesses();
    program(&function, 1, 0xfee0_0000, 0x41, 1);
    assert_eq!(fake.register(TABLE + 16), 0, "the table is the guest's");
    assert_eq!((reads, writes), (1, 1));
    assert_eq!(function.counters().accesses(), (1, 4));
    for (bar, offset, len) in [(0, 0x3ffe, 4), (0, u64::MAX, 4), (0, 0x4000, 1), (1, 0, 4), (6, 0, 4)] {
        let mut data = vec![0; len];
        assert_eq!(function.bar_read(bar, offset, &mut data), Err(AccessError::BadAccess));
        assert_eq!(function.bar_write(bar, offset, &data), Err(AccessError::BadAccess));
    }
}

#[test]
fn vectors_ring_the_guest_without_the_vmm() {
    let fake = fake();
    let (function, router) = function(&fake);
    attach(&function);
    program(&function, 3, 0xfee0_1000, 0x41, 1);
    set_control(&function, 0xc000);
    fake.calls();
    set_control(&function, 0x8000);
    assert!(!ring(&fake, MSIX, 3), "masked");
    assert_eq!(function.counters().vectors(), 0);
    program(&function, 3, 0xfee0_1000, 0x41, 0);
    assert!(ring(&fake, MSIX, 3));
    assert_eq!(function.counters().vectors(), 1);
    assert_eq!(message(&router, 0), Some((0xfee0_1000, 0x41)));
    assert_eq!(rung(&router, 0), 1);
    let before = fake.calls().iter().filter(|call| *call == "set irqs").count();
    assert_eq!(before, 1, "one for the vector, and none for others");
    program(&function, 3, 0xfee0_2000, 0x42, 0);
    assert_eq!(message(&router, 0), Some((0xfee0_2000, 0x42)));
    assert!(fake.calls().is_empty(), "the kernel is not asked again");
    set_control(&function, 0);
    assert!(!ring(&fake, MSIX, 3));
    assert_eq!(fake.calls(), ["disable irqs"]);
    set_control(&function, 0x8000);
    assert!(ring(&fake, MSIX, 3), "and again");
}

#[test]
fn a_host_with_fewer_interrupts_gives_what_it_has() {
    let fake = fake();
    lock(&fake.world).vectors = 4;
    let (function, _) = function(&fake);
    attach(&function);
    set_control(&function, 0x8000);
    program(&function, 3, 0xfee0_1000, 0x41, 0);
    assert!(ring(&fake, MSIX, 3));
}

#[test]
fn interrupts_that_the_host_refuses_are_no_panic() {
    let fake = fake();
    fake.fail("set irqs", libc::ENOSPC);
    let (function, _) = function(&fake);
    attach(&function);
    set_control(&function, 0x8000);
    program(&function, 3, 0xfee0_1000, 0x41, 0);
    assert!(!ring(&fake, MSIX, 3));
    lock(&fake.world).fails.clear();
    program(&function, 4, 0xfee0_1000, 0x41, 0);
    assert!(ring(&fake, MSIX, 3) && ring(&fake, MSIX, 4), "once it can");
}

#[test]
fn messages_without_a_table_ring_as_well() {
    let mut device = nvme();
    // MSI: two vectors, 64 bits, with masks.
    device[0x40..0x44].copy_from_slice(&[0x05, 0x80, 0x82, 0x01]);
    let fake = Fake::new(&device, [0x4000, 0, 0, 0, 0, 0]);
    let (function, router) = function(&fake);
    attach(&function);
    function.config_write(0x44, &0xfee0_3000u32.to_le_bytes());
    function.config_write(0x4c, &0x51u16.to_le_bytes());
    function.config_write(0x42, &0x0011u16.to_le_bytes());
    assert!(ring(&fake, MSI, 0) && ring(&fake, MSI, 1));
    assert_eq!(message(&router, 0), Some((0xfee0_3000, 0x50)));
    assert_eq!(message(&router, 1), Some((0xfee0_3000, 0x51)));
    function.config_write(0x50, &0b10u32.to_le_bytes());
    assert_eq!((message(&router, 0).is_some(), message(&router, 1)), (true, None));
    function.config_write(0x42, &0u16.to_le_bytes());
    assert!(!ring(&fake, MSI, 0));
    assert_eq!(message(&router, 0), None);
}

#[test]
fn a_guest_resets_its_function() {
    let fake = fake();
    let (function, _) = function(&fake);
    attach(&function);
    function.config_write(4, &[6, 0]);
    set_control(&function, 0x8000);
    program(&function, 0, 0xfee0_1000, 0x41, 0);
    assert!(ring(&fake, MSIX, 0));
    fake.calls();
    function.config_write(0x88, &0xa810u16.to_le_bytes());
    assert!(fake.calls().contains(&"reset".to_owned()));
    assert!(!ring(&fake, MSIX, 0));
    assert_eq!(fake.register(CONFIG + 4) & 0xffff, 3);
    let mut command = [1; 2];
    function.config_read(4, &mut command);
    assert_eq!(command, [0, 0]);
}

/// A guest's bus without devices, and what leads to the BARs there.
fn bus() -> (PciRoot, Arc<Bus>) {
    let (mmio, io) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let windows = BarAllocator {
        mmio32: 0xc000_0000..0xd000_0000,
        mmio64: 0x10_0000_0000..0x20_0000_0000,
        io: 0x1000..0x2000,
    };
    (PciRoot::new(0, mmio.clone(), io, windows), mmio)
}

#[test]
fn a_guest_that_puts_its_bar_over_memory_or_over_another_has_it_nowhere() {
    let fake = fake();
    let (function, _) = function(&fake);
    let (root, _mmio) = bus();
    let at = root.add(Arc::new(function), None).expect("a slot");
    let mapped = || lock(&fake.world).mapped.keys().copied().collect::<Vec<_>>();
    let place = |address: u64| {
        root.config_write(at, 4, &[0, 0]);
        root.config_write(at, 0x10, &(address as u32).to_le_bytes());
        root.config_write(at, 0x14, &((address >> 32) as u32).to_le_bytes());
        root.config_write(at, 4, &[6, 0]);
    };
    root.config_write(at, 4, &[6, 0]);
    assert_eq!(mapped(), [0x10_0000_0000]);
    place(0x1000_0000);
    assert!(mapped().is_empty(), "over memory");
    place(0x11_0000_0000);
    assert_eq!(mapped(), [0x11_0000_0000]);
    let other = Fake::new(&nvme(), [0x4000, 0, 0, 0, 0, 0]);
    let second = Arc::new(super::fake::function(&other).0);
    let there = root.add(second, None).expect("a slot");
    root.config_write(there, 4, &[6, 0]);
    let theirs = *lock(&other.world).mapped.keys().next().expect("a place");
    place(theirs);
    assert!(mapped().is_empty(), "over another");
    assert_eq!(lock(&other.world).mapped.len(), 1);
    place(0x12_0000_0000);
    root.remove(at).expect("it was there");
    assert!(mapped().is_empty());
}

#[test]
fn a_rom_is_read_once_and_only_when_somebody_looks() {
    let fake = fake();
    lock(&fake.world).rom = 0x3000;
    std::os::unix::fs::FileExt::write_all_at(&*fake.device, &[0x55, 0xaa, 1, 2], 6 * BAR_STEP).expect("a ROM");
    let (function, _) = function(&fake);
    let (root, mmio) = bus();
    let at = root.add(Arc::new(function), None).expect("a slot");
    let register = || {
        let mut data = [0; 4];
        root.config_read(at, 0x30, &mut data);
        u32::from_le_bytes(data)
    };
    let base = register();
    assert!(base >= 0xc000_0000 && base & 0x3fff == 0, "placed and off: {base:#x}");
    root.config_write(at, 4, &[2, 0]);
    let mut data = [0; 4];
    assert!(mmio.read(base.into(), &mut data).is_err(), "not enabled");
    root.config_write(at, 0x30, &u32::MAX.to_le_bytes());
    assert_eq!(register(), 0xffff_c001, "its size");
    fake.calls();
    root.config_write(at, 0x30, &(base | 1).to_le_bytes());
    assert!(!fake.calls().contains(&"read".to_owned()), "nobody has looked");
    for _ in 0..2 {
        mmio.read(base.into(), &mut data).expect("the ROM");
        assert_eq!(data, [0x55, 0xaa, 1, 2]);
    }
    mmio.write(base.into(), &[0; 4]).expect("no effect");
    mmio.read(u64::from(base) + 0x3000, &mut data).expect("behind its end");
    assert_eq!(data, [0xff; 4]);
    assert_eq!(fake.calls().iter().filter(|call| *call == "read").count(), 1);
    root.config_write(at, 0x30, &base.to_le_bytes());
    assert!(mmio.read(base.into(), &mut data).is_err());
}
