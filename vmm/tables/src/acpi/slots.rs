//! Slots whose contents come and go by a block of registers (triarch-legacy, `hotplug/registers.rs`): the methods of each, and those
//! that pass notices on.

use acpi_tables::aml::{
    And, Arg, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, GreaterThan, If, Local,
    Method, MethodCall, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Path, ShiftRight, Store, While, ZERO,
};

use super::dsdt::{Raw, refs};

/// A block of registers, wherever it is.
pub(super) struct Slots {
    /// What all names of it begin with.
    pub(super) letter: char,
    /// Bytes of the registers that all slots share, and of those of each, which follow in their order.
    pub(super) stride: u64,
}

impl Slots {
    /// Bytes of the registers of `count` slots.
    pub(super) fn size(&self, count: usize) -> u64 {
        self.stride * (count as u64 + 1)
    }

    /// A name of the block: `CSTA` for `STA`.
    pub(super) fn name(&self, rest: &str) -> String {
        format!("{}{rest}", self.letter)
    }

    /// A name of a slot's device, unique up to 4096.
    pub(super) fn device_name(&self, slot: u32) -> String {
        format!("{}{slot:03X}", self.letter)
    }

    /// Registers of `slot` in its device, of the block at `at`: [`name`](Self::name)s `STA` and those in `more`, which follow the others;
    /// `_OST`, and `_EJ0` if what is in it can be given back.
    pub(super) fn own(&self, at: u64, slot: u32, removable: bool, more: &[&str]) -> Vec<Raw> {
        let at = at + self.stride * (u64::from(slot) + 1);
        let names: Vec<_> = ["STA", "EJT", "OEV", "OST"].iter().chain(more).collect();
        let mut children = Vec::from(self.region("REG", at, &names));
        let store = |register: &str, argument| Raw::of(&Store::new(&Path::new(&self.name(register)), &Arg(argument)));
        children.push(serialized("_OST", 3, &[store("OEV", 0), store("OST", 1)]));
        if removable {
            let eject = Raw::of(&Store::new(&Path::new(&self.name("EJT")), &ONE));
            children.push(method("_EJ0", 1, &[eject]));
        }
        children
    }

    /// What the container of `slots`' devices has besides them, for the block at `at`: `SCN`, which takes one notice after the other until
    /// there is none. A notice with the value 0 goes to `vanished`, if that is given. Those of slots from a number in `others` on go to the
    /// method there.
    pub(super) fn shared(
        &self,
        at: u64,
        slots: impl IntoIterator<Item = u32>,
        vanished: Option<&str>,
        others: &[(String, u32)],
    ) -> Vec<Raw> {
        let mut children = Vec::from(self.region("NOT", at, &[&"NUM", &"NXT"]));
        children.push(self.pass_on(slots, vanished, others));
        children.push(self.scan());
        children
    }

    /// `TFY(slot, value)`: notifies that slot's device, or has another method do so.
    pub(super) fn pass_on(
        &self,
        slots: impl IntoIterator<Item = u32>,
        vanished: Option<&str>,
        others: &[(String, u32)],
    ) -> Raw {
        let mut body = Vec::new();
        for (method, first) in others.iter().rev() {
            let call = Raw::of(&MethodCall::new(Path::new(method), vec![&Arg(0), &Arg(1)]));
            // Nothing is left to do here.
            let [slot, value] = [
                Raw::of(&Store::new(&Arg(0), &ZERO)),
                Raw::of(&Store::new(&Arg(1), &ONE)),
            ];
            let beyond = GreaterThan::new(&Arg(0), first);
            body.push(Raw::of(&If::new(&beyond, vec![&call, &slot, &value])));
        }
        if let Some(container) = vanished {
            let container = Path::new(container);
            let notify = Raw::of(&Notify::new(&container, &Arg(1)));
            let nothing = Raw::of(&Store::new(&Arg(0), &ZERO));
            body.push(Raw::of(&If::new(&Equal::new(&Arg(1), &ZERO), vec![&notify, &nothing])));
        }
        body.extend(slots.into_iter().map(|slot| {
            let device = Path::new(&self.device_name(slot));
            let notify = Notify::new(&device, &Arg(1));
            Raw::of(&If::new(&Equal::new(&Arg(0), &slot), vec![&notify]))
        }));
        method(&self.name("TFY"), 2, &body)
    }

    fn scan(&self) -> Raw {
        let next = Raw::of(&Store::new(&Local(0), &Path::new(&self.name("NXT"))));
        let (slot, value) = (
            ShiftRight::new(&ZERO, &Local(0), &8u8),
            And::new(&ZERO, &Local(0), &0xffu8),
        );
        let pass_on = MethodCall::new(Path::new(&self.name("TFY")), vec![&slot, &value]);
        let more = NotEqual::new(&Local(0), &ZERO);
        let all = Raw::of(&While::new(&more, vec![&pass_on, &next]));
        serialized(&self.name("SCN"), 0, &[next, all])
    }

    /// A region with registers of 32 bits.
    fn region(&self, region: &str, at: u64, names: &[&&str]) -> [Raw; 2] {
        let (region, length) = (self.name(region), (names.len() * 4) as u8);
        let mut named = [0; 4];
        let field = |rest: &&&str| {
            named.copy_from_slice(self.name(rest).as_bytes());
            FieldEntry::Named(named, 32)
        };
        [
            Raw::of(&OpRegion::new(
                Path::new(&region),
                OpRegionSpace::SystemMemory,
                &at,
                &length,
            )),
            Raw::of(&Field::new(
                Path::new(&region),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                names.iter().map(field).collect(),
            )),
        ]
    }
}

/// A method.
pub(super) fn method(name: &str, arguments: u8, body: &[Raw]) -> Raw {
    Raw::of(&Method::new(Path::new(name), arguments, false, refs(body)))
}

/// A method that only one thread of the guest's interpreter runs at a time.
pub(super) fn serialized(name: &str, arguments: u8, body: &[Raw]) -> Raw {
    Raw::of(&Method::new(Path::new(name), arguments, true, refs(body)))
}
