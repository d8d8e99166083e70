//! Processor devices.
//!
//! Every processor that may ever be there has a device in `\_SB.CPUS`. Where processors come and go, each has registers of its own
//! (triarch-legacy, `hotplug/cpus.rs`) for `_STA`, `_EJ0` and `_OST`, and `\_SB.CPUS.CSCN` passes the notices on that a register
//! they share hands out one by one.

use acpi_tables::aml::{
    And, Arg, BufferData, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    If, Local, Method, MethodCall, Name, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Path, Return, ShiftRight,
    Store, While, ZERO,
};

use super::config::{AcpiConfig, Cpu};
use super::dsdt::{Raw, name, refs};
use super::madt::enabled_cpu_entry;

/// Present, enabled, shown, functioning (ACPI 6.3.7).
pub(super) const STATUS_THERE: u8 = 0xf;
const STATUS_ABSENT: u8 = 0;

/// Handles what the event device reports about processors.
pub(super) const SCAN: &str = "\\_SB_.CPUS.CSCN";

/// Bytes of the registers that all processors share, and of those of each, which follow in their order.
const STRIDE: u64 = 0x10;

/// A processor, as far as its device does not depend on the architecture.
pub(super) struct Processor {
    /// Its entry of the MADT, as that of a processor that is there.
    pub(super) entry: Vec<u8>,
    /// `_STA` where processors neither come nor go.
    pub(super) status: u8,
    /// Whether it can be given back.
    pub(super) removable: bool,
    /// Its NUMA node, with NUMA.
    pub(super) node: Option<u32>,
}

/// `\_SB.CPUS` of a PC.
pub(super) fn container(config: &AcpiConfig) -> Raw {
    let numa = !config.numa.is_empty();
    let processor = |(uid, cpu): (u32, &Cpu)| Processor {
        entry: enabled_cpu_entry(uid, cpu),
        status: if cpu.enabled { STATUS_THERE } else { STATUS_ABSENT },
        removable: cpu.removable,
        node: numa.then_some(cpu.node),
    };
    let processors: Vec<_> = (0u32..).zip(&config.cpus).map(processor).collect();
    processor_container(&processors, config.cpu_hotplug)
}

/// `\_SB.CPUS` with `processors`, which come and go by the registers at `registers`.
pub(super) fn processor_container(processors: &[Processor], registers: Option<u64>) -> Raw {
    let mut children = vec![name("_HID", &"ACPI0010"), name("_CID", &EISAName::new("PNP0A05"))];
    children.extend(
        (0u32..)
            .zip(processors)
            .map(|(uid, processor)| device(uid, processor, registers)),
    );
    if let Some(at) = registers {
        children.extend(shared_registers(at));
        children.push(pass_on(processors.len() as u32));
        children.push(scan());
    }
    Raw::of(&Device::new(Path::new("\\_SB_.CPUS"), refs(&children)))
}

/// Bytes of all registers.
pub(super) fn registers_size(processors: usize) -> u64 {
    STRIDE * (processors as u64 + 1)
}

/// A processor's name, unique up to 4096.
fn device_name(uid: u32) -> String {
    format!("C{uid:03X}")
}

fn device(uid: u32, processor: &Processor, registers: Option<u64>) -> Raw {
    let mut children = vec![name("_HID", &"ACPI0007"), name("_UID", &uid)];
    match registers {
        Some(at) => children.extend(own_registers(at + STRIDE * (u64::from(uid) + 1), processor.removable)),
        None => children.push(method("_STA", 0, &[Raw::of(&Return::new(&processor.status))])),
    }
    let entry = BufferData::new(processor.entry.clone());
    children.push(Raw::of(&Name::new(Path::new("_MAT"), &entry)));
    if let Some(node) = &processor.node {
        children.push(name("_PXM", node));
    }
    Raw::of(&Device::new(Path::new(&device_name(uid)), refs(&children)))
}

/// A region with registers of 32 bits.
fn region(region: &str, at: u64, names: &[[u8; 4]]) -> [Raw; 2] {
    let length = (names.len() * 4) as u8;
    [
        Raw::of(&OpRegion::new(
            Path::new(region),
            OpRegionSpace::SystemMemory,
            &at,
            &length,
        )),
        Raw::of(&Field::new(
            Path::new(region),
            FieldAccessType::DWord,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            names.iter().map(|name| FieldEntry::Named(*name, 32)).collect(),
        )),
    ]
}

/// Registers of one processor, and the methods over them.
fn own_registers(at: u64, removable: bool) -> Vec<Raw> {
    let mut children = Vec::from(region("CREG", at, &[*b"CSTA", *b"CEJT", *b"COEV", *b"COST"]));
    children.push(method("_STA", 0, &[Raw::of(&Return::new(&Path::new("CSTA")))]));
    let store = |register: &str, argument| Raw::of(&Store::new(&Path::new(register), &Arg(argument)));
    children.push(serialized("_OST", 3, &[store("COEV", 0), store("COST", 1)]));
    if removable {
        let eject = Raw::of(&Store::new(&Path::new("CEJT"), &ONE));
        children.push(method("_EJ0", 1, &[eject]));
    }
    children
}

/// The number of processors, and the next notice.
fn shared_registers(at: u64) -> [Raw; 2] {
    region("CNOT", at, &[*b"CNUM", *b"CNXT"])
}

/// `CTFY(processor, value)`: notifies that processor's device.
fn pass_on(processors: u32) -> Raw {
    let one = |uid: u32| {
        let device = Path::new(&device_name(uid));
        let notify = Notify::new(&device, &Arg(1));
        Raw::of(&If::new(&Equal::new(&Arg(0), &uid), vec![&notify]))
    };
    let body: Vec<_> = (0..processors).map(one).collect();
    method("CTFY", 2, &body)
}

/// `CSCN()`: takes one notice after the other until there is none.
fn scan() -> Raw {
    let next = Raw::of(&Store::new(&Local(0), &Path::new("CNXT")));
    let (processor, value) = (
        ShiftRight::new(&ZERO, &Local(0), &8u8),
        And::new(&ZERO, &Local(0), &0xffu8),
    );
    let pass_on = MethodCall::new(Path::new("CTFY"), vec![&processor, &value]);
    let more = NotEqual::new(&Local(0), &ZERO);
    let all = Raw::of(&While::new(&more, vec![&pass_on, &next]));
    serialized("CSCN", 0, &[next, all])
}

fn method(name: &str, arguments: u8, body: &[Raw]) -> Raw {
    Raw::of(&Method::new(Path::new(name), arguments, false, refs(body)))
}

/// A method that only one thread of the guest's interpreter runs at a time.
fn serialized(name: &str, arguments: u8, body: &[Raw]) -> Raw {
    Raw::of(&Method::new(Path::new(name), arguments, true, refs(body)))
}
