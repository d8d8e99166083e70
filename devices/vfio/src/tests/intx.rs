//! Interrupt pins.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use triarch_device_core::MsiRouter;
use triarch_device_core::mock::MockRouter;
use triarch_pci::{PciAddress, PciFunction};

use super::fake::{CONFIG, Fake, function, host, options, ring};
use super::space::nvme;
use crate::{Options, VfioPci, lock};

const INTX: u32 = 0;
/// Slot 4, INTA.
const WIRE: (u8, u8) = (4, 1);

fn fake() -> Fake {
    Fake::new(&nvme(), [0x4000, 0, 0, 0, 0, 0])
}

fn attached(fake: &Fake) -> VfioPci {
    let (function, _) = function(fake);
    function.attach(PciAddress::from_devfn(0, 0, 0x20), 4);
    function
}

fn set_command(function: &VfioPci, command: u16) {
    function.config_write(4, &command.to_le_bytes());
}

fn pin_register(function: &VfioPci) -> u8 {
    let mut data = [0];
    function.config_read(0x3d, &mut data);
    data[0]
}

/// The pin rings the VM's wire, and the wire's end unmasks the pin.
fn connected(fake: &Fake) -> bool {
    if !ring(fake, INTX, 0) {
        let world = lock(&fake.world);
        assert!(
            world.pins.is_empty() && !world.unmasks.contains_key(&INTX),
            "half of it"
        );
        return false;
    }
    let world = lock(&fake.world);
    let [raised, lowered] = &world.pins[&WIRE];
    assert_eq!(raised.read().ok(), Some(1), "the device's ring is the wire's");
    lowered.write(1).expect("an end of interrupt");
    world.unmasks[&INTX].read().is_ok_and(|count| count == 1)
}

#[test]
fn the_pin_is_connected_while_a_driver_uses_it() {
    let fake = fake();
    let function = attached(&fake);
    assert_eq!(pin_register(&function), 1);
    assert!(!connected(&fake), "nobody drives the device");
    set_command(&function, 0x6);
    assert!(connected(&fake));
    assert_eq!(function.counters().vectors(), 1);
    set_command(&function, 0x406);
    assert!(!connected(&fake), "it is switched off");
    assert_eq!(function.counters().vectors(), 0);
    set_command(&function, 0x6);
    fake.calls();
    // Messages instead.
    function.config_write(0x42, &0xc000u16.to_le_bytes());
    assert!(!connected(&fake));
    let calls = fake.calls();
    let at = |name: &str| calls.iter().position(|call| call == name);
    assert!(
        at("disable irqs") < at("set irqs"),
        "the kernel has one kind at a time: {calls:?}"
    );
    function.config_write(0x42, &0u16.to_le_bytes());
    assert!(connected(&fake), "and back");
    set_command(&function, 0);
    assert!(!connected(&fake));
    set_command(&function, 0x6);
    function.stop();
    assert!(!connected(&fake));
}

#[test]
fn the_status_register_tells_of_the_pin() {
    let fake = fake();
    let function = attached(&fake);
    let status = || {
        let mut data = [0; 2];
        function.config_read(6, &mut data);
        u16::from_le_bytes(data) & 0xff
    };
    assert_eq!(status(), 0x10);
    fake.device
        .write_all_at(&[0x18, 0xff], CONFIG + 6)
        .expect("the device's");
    assert_eq!(status(), 0x18, "that it asserts its pin, and nothing else");
}

#[test]
fn what_was_rung_before_is_forgotten() {
    let fake = fake();
    let function = attached(&fake);
    set_command(&function, 0x6);
    ring(&fake, INTX, 0);
    set_command(&function, 0x406);
    set_command(&function, 0x6);
    assert!(connected(&fake), "one ring, not two");
}

#[test]
fn a_pin_that_cannot_be_connected_is_not_half_connected() {
    let fake = fake();
    let function = attached(&fake);
    for step in ["wire", "set irqs", "unmask by"] {
        fake.fail(step, libc::EINVAL);
        set_command(&function, 0x6);
        assert!(!connected(&fake), "{step}");
        lock(&fake.world).fails.clear();
        set_command(&function, 0);
    }
    set_command(&function, 0x6);
    assert!(connected(&fake), "and later it can");
}

#[test]
fn without_wires_there_is_no_pin() {
    let fake = fake();
    let router: Arc<dyn MsiRouter> = Arc::new(MockRouter::default());
    let without = Options {
        wires: false,
        ..options(None)
    };
    let function = VfioPci::new(&host(&fake), Arc::new(fake.clone()), &router, without).expect("a function");
    function.attach(PciAddress::from_devfn(0, 0, 0x20), 4);
    set_command(&function, 0x6);
    assert_eq!(pin_register(&function), 0);
    assert!(!connected(&fake));
}
